/* What is said about all elements of an array, as Python calls it. */
#include "nnx_cpu.h"
#include "sums.h"

static PyObject *py_all_finite(ARGUMENTS) {
    const Array *a;
    if (n_args != 1 || !(a = array_of(args[0], READ)) || !is_floating(a))
        Py_RETURN_NONE;
    int blocks_with_others = 0;
    const FiniteArgs f = {.x = a->data, .n = size_of(a), .found = &blocks_with_others};
    run(kernels->all_finite[dtype_of(a)], &f, (f.n + SUMS_BLOCK - 1) / SUMS_BLOCK,
        0.1 * SUMS_BLOCK);
    if (blocks_with_others)
        Py_RETURN_FALSE;
    Py_RETURN_TRUE;
}

static PyObject *py_total(ARGUMENTS) {
    const Array *x, *out;
    TotalArgs t = {0};
    if (n_args != 3 || !(x = array_of(args[0], READ)) || !(out = array_of(args[1], WRITE)) ||
        !is_floating(x) || dtype_of(out) != dtype_of(x) || size_of(out) != 1 ||
        !number_of(args[2], &t.scale))
        NOT_MINE;
    t.x = x->data, t.out = out->data, t.n = size_of(x);
    run(kernels->total[dtype_of(x)], &t, 1, 0.15 * (double)t.n);
    DONE;
}

PyMethodDef sums_methods[] = {
    METHOD(all_finite, "all_finite(a): whether there is neither NaN nor inf; None if it declines"),
    METHOD(total, "total(x, out, scale): out = sum(x) * scale"),
    {NULL, NULL, 0, NULL},
};
