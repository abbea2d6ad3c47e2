/* ReLU and biases, as Python calls them. */
#include "nnx_cpu.h"
#include "relu.h"

static PyObject *py_relu(ARGUMENTS) {
    const Array *x, *out;
    if (n_args != 2 || !(x = array_of(args[0], READ)) || !(out = array_of(args[1], WRITE)) ||
        !is_floating(x) || dtype_of(x) != dtype_of(out) || !same_shape(x, out))
        NOT_MINE;
    const ReluArgs a = {.x = x->data, .out = out->data};
    run(kernels->relu[dtype_of(x)], &a, size_of(x), 0.3);
    DONE;
}

static PyObject *py_relu_backward(ARGUMENTS) {
    const Array *dy, *y, *out;
    if (n_args != 3 || !(dy = array_of(args[0], READ)) || !(y = array_of(args[1], READ)) ||
        !(out = array_of(args[2], WRITE)) || !is_floating(dy) || dtype_of(dy) != dtype_of(y) ||
        dtype_of(dy) != dtype_of(out) || !same_shape(dy, y) || !same_shape(dy, out))
        NOT_MINE;
    const ReluArgs a = {.x = dy->data, .y = y->data, .out = out->data};
    run(kernels->relu_backward[dtype_of(dy)], &a, size_of(dy), 0.4);
    DONE;
}

/* Rows `z` (N, n) with a bias (n,), or (K, N, n) with (n,) or (K, n), one vector per model: a view of
 * the flat parameters, whose rows lie apart. */
static const Array *bias_of(PyObject *object, const Array *z, int access, BiasArgs *a) {
    const Array *bias = z->nd == 2 || z->nd == 3 ? rows_of(object, access, &a->apart) : NULL;
    if (!bias || !is_floating(z) || dtype_of(z) != dtype_of(bias) || last(z) != last(bias) ||
        (bias->nd == 2 && (z->nd != 3 || bias->shape[0] != z->shape[0])))
        return NULL;
    a->rows = z->shape[z->nd - 2];
    a->n = a->row = last(z);
    return bias;
}

static PyObject *rows_and_bias(PyObject *const *args, Py_ssize_t n_args, const Kernel kernel[2]) {
    const Array *z, *bias;
    BiasArgs a = {0};
    if (n_args != 2 || !(z = array_of(args[0], WRITE)) || !(bias = bias_of(args[1], z, READ, &a)))
        NOT_MINE;
    a.z = z->data;
    a.bias = bias->data;
    run(kernel[dtype_of(z)], &a, leading(z, 1), 0.3 * (double)a.n);
    DONE;
}

static PyObject *py_bias_relu(ARGUMENTS) { return rows_and_bias(args, n_args, kernels->bias_relu); }

static PyObject *py_add_bias(ARGUMENTS) { return rows_and_bias(args, n_args, kernels->add_bias); }

static int64_t blocks_of(const Array *dy, const BiasArgs *a) {
    return leading(dy, 2) * ((a->n + COLUMNS - 1) / COLUMNS);
}

static PyObject *py_bias_relu_backward(ARGUMENTS) {
    const Array *dy, *y, *dz, *dbias;
    BiasArgs a = {0};
    if (n_args != 5 || !(dy = array_of(args[0], READ)) || !(y = array_of(args[1], READ)) ||
        !(dz = array_of(args[2], WRITE)) || dtype_of(dy) != dtype_of(y) ||
        dtype_of(dy) != dtype_of(dz) || !same_shape(dy, y) || !same_shape(dy, dz) ||
        !(dbias = bias_of(args[3], dy, WRITE, &a)) || dbias->nd != dy->nd - 1)
        NOT_MINE;
    a.dy = dy->data, a.y = y->data, a.z = dz->data, a.dbias = dbias->data;
    a.accumulate = args[4] == Py_True;
    run(kernels->bias_relu_backward[dtype_of(dy)], &a, blocks_of(dy, &a), 0.5 * COLUMNS * a.rows);
    DONE;
}

static PyObject *py_bias_grad(ARGUMENTS) {
    const Array *dy, *dbias;
    BiasArgs a = {0};
    if (n_args != 3 || !(dy = array_of(args[0], READ)) ||
        !(dbias = bias_of(args[1], dy, WRITE, &a)) || dbias->nd != dy->nd - 1)
        NOT_MINE;
    a.dy = dy->data, a.dbias = dbias->data;
    a.accumulate = args[2] == Py_True;
    run(kernels->bias_grad[dtype_of(dy)], &a, blocks_of(dy, &a), 0.3 * COLUMNS * a.rows);
    DONE;
}

PyMethodDef relu_methods[] = {
    METHOD(relu, "relu(x, out): out = max(x, 0)"),
    METHOD(relu_backward, "relu_backward(dy, y, out): out = dy where y > 0, else 0"),
    METHOD(bias_relu, "bias_relu(z, bias): z = max(z + bias, 0)"),
    METHOD(add_bias, "add_bias(z, bias): z += bias"),
    METHOD(bias_relu_backward, "bias_relu_backward(dy, y, dz, dbias, accumulate)"),
    METHOD(bias_grad, "bias_grad(dy, dbias, accumulate): sums over rows"),
    {NULL, NULL, 0, NULL},
};
