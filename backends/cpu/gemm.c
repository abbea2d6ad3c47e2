/* Matrix products, as Python calls them. */
#include "nnx_cpu.h"
#include "gemm.h"

/* A matrix of any two positive strides. */
static const Array *matrix(PyObject *object, int kind, int64_t *row, int64_t *column) {
    const Array *a = any_array_of(object);
    if (!a || a->nd != 2 || dtype_of(a) != kind)
        return NULL;
    const int64_t size = kind == F32 ? 4 : 8;
    if (a->strides[0] < 0 || a->strides[1] < 0 || a->strides[0] % size || a->strides[1] % size)
        return NULL;
    *row = a->strides[0] / size;
    *column = a->strides[1] / size;
    return a;
}

/* Up to so many products this is faster than OpenBLAS, whose call alone takes over a microsecond; it
 * packs and multiplies as well, and better on large matrices. */
static const double SMALL = 1 << 18;

static PyObject *py_gemm(ARGUMENTS) {
    const Array *a, *b, *c, *bias = NULL;
    GemmArgs g = {0};
    if (n_args != 6 || !(c = array_of(args[2], WRITE)) || c->nd != 2 || !is_floating(c) ||
        !(a = matrix(args[0], dtype_of(c), &g.a_row, &g.a_column)) ||
        !(b = matrix(args[1], dtype_of(c), &g.b_row, &g.b_column)) || a->shape[1] != b->shape[0] ||
        a->shape[0] != c->shape[0] || b->shape[1] != c->shape[1])
        NOT_MINE;
    g.m = a->shape[0], g.k = a->shape[1], g.n = b->shape[1];
    if (args[4] != Py_None) {
        bias = array_of(args[4], READ);
        if (!bias || bias->nd != 1 || dtype_of(bias) != dtype_of(c) || bias->shape[0] != g.n)
            NOT_MINE;
    }
    const double products = (double)g.m * g.n * g.k;
    if (!kernels->gemm[0] || products > SMALL)
        NOT_MINE;
    g.a = a->data, g.b = b->data, g.c = c->data, g.bias = bias ? bias->data : NULL;
    g.accumulate = args[3] == Py_True, g.relu = args[5] == Py_True;
    const int64_t blocks = (g.m + GEMM_ROWS - 1) / GEMM_ROWS;
    g.row_block = blocks ? ((g.m + blocks - 1) / blocks + 11) / 12 * 12 : 1;
    g.column_blocks = (g.n + GEMM_COLUMNS - 1) / GEMM_COLUMNS;
    const int64_t items = (g.m + g.row_block - 1) / g.row_block * g.column_blocks;
    run(kernels->gemm[dtype_of(c)], &g, items, items ? products / items * 0.03 : 0);
    DONE;
}

PyMethodDef gemm_methods[] = {
    METHOD(gemm, "gemm(a, b, out, accumulate, bias, relu)"),
    {NULL, NULL, 0, NULL},
};
