/* Normalizations, as Python calls them. */
#include "nnx_cpu.h"
#include "normalization.h"
#include "relu.h" /* COLUMNS */

/* Reads x `(N, C)` or `(K, N, C)`; the number of models, or 0. */
static int64_t input(PyObject *object, const Array **x, NormArgs *a) {
    *x = array_of(object, READ);
    if (!*x || !is_floating(*x) || (*x)->nd < 2 || (*x)->nd > 3 || last(*x) < 1)
        return 0;
    a->x = (*x)->data, a->rows = (*x)->shape[(*x)->nd - 2], a->n = last(*x);
    return leading(*x, 2);
}

/* Reads an array of the shape of x, or where `features` is 0 of its rows; None if that may be. */
static int like(PyObject *object, int access, const Array *x, int features, int optional,
                void **data) {
    *data = NULL;
    if (object == Py_None)
        return optional;
    const Array *a = array_of(object, access);
    if (!a || dtype_of(a) != dtype_of(x) || a->nd != x->nd - !features)
        return 0;
    for (int i = 0; i < a->nd; i++)
        if (a->shape[i] != x->shape[i])
            return 0;
    *data = a->data;
    return 1;
}

/* Reads a vector `(C,)` or one for each model `(K, C)`, or None. One for all can't be written. */
static int vector(PyObject *object, int access, const Array *x, Vector *v) {
    *v = (Vector){0};
    if (object == Py_None)
        return 1;
    const Array *a = rows_of(object, access, &v->step);
    if (!a || dtype_of(a) != dtype_of(x) || last(a) != last(x) || a->nd > x->nd - 1)
        return 0;
    v->data = a->data;
    if (a->nd == 2)
        return a->shape[0] == x->shape[0];
    return x->nd == 2 || access == READ || x->shape[0] == 1;
}

/* Reads a row of vectors without gaps, `(C,)` or `(K, C)`. */
static int statistic(PyObject *object, int access, const Array *x, void **data) {
    Vector v;
    const int good = array_of(object, access) && vector(object, access, x, &v) && v.data;
    *data = good ? v.data : NULL;
    return good && (x->nd < 3 || leading(array_of(object, access), 1) == x->shape[0]);
}

static int64_t blocks_of(int64_t models, const NormArgs *a) {
    return models * ((a->n + COLUMNS - 1) / COLUMNS);
}

static PyObject *py_layer_norm(ARGUMENTS) {
    NormArgs a = {0};
    const Array *x;
    int64_t models;
    if (n_args != 7 || !(models = input(args[0], &x, &a)) ||
        !vector(args[1], READ, x, &a.weight) || !vector(args[2], READ, x, &a.bias) ||
        !like(args[3], WRITE, x, 1, 0, &a.out) || !like(args[4], WRITE, x, 0, 1, &a.mean) ||
        !like(args[5], WRITE, x, 0, 0, &a.rstd) || !number_of(args[6], &a.eps))
        NOT_MINE;
    run(kernels->layer_norm[dtype_of(x)], &a, models * a.rows, 0.3 * (double)a.n);
    DONE;
}

static PyObject *py_layer_norm_backward(ARGUMENTS) {
    NormArgs a = {0};
    const Array *x, *partial = NULL;
    void *dy;
    int64_t models;
    if (n_args != 11 || !(models = input(args[1], &x, &a)) || !like(args[0], READ, x, 1, 0, &dy) ||
        !like(args[2], READ, x, 0, 1, &a.mean) || !like(args[3], READ, x, 0, 0, &a.rstd) ||
        !vector(args[4], READ, x, &a.weight) || !like(args[5], WRITE, x, 1, 1, &a.out) ||
        !vector(args[6], WRITE, x, &a.dweight) || !vector(args[7], WRITE, x, &a.dbias))
        NOT_MINE;
    a.dy = dy;
    a.accumulate[0] = args[8] == Py_True, a.accumulate[1] = args[9] == Py_True;
    a.chunks = a.rows;
    if (a.dweight.data || a.dbias.data) {
        partial = array_of(args[10], WRITE);
        if (!partial || dtype_of(partial) != dtype_of(x) || partial->nd != x->nd + 1 ||
            leading(partial, 3) != models || partial->shape[partial->nd - 2] != 2 ||
            last(partial) != a.n)
            NOT_MINE;
        a.partial = partial->data;
        a.chunks = partial->shape[partial->nd - 3];
        if (a.chunks < 1 && a.rows > 0)
            NOT_MINE;
    }
    const double per_chunk = (double)a.rows / (double)MAX(a.chunks, 1);
    run(kernels->layer_norm_backward[dtype_of(x)], &a, models * a.chunks, 0.7 * a.n * per_chunk);
    if (partial)
        run(kernels->norm_gradients[dtype_of(x)], &a, blocks_of(models, &a),
            0.2 * COLUMNS * a.chunks);
    DONE;
}

static PyObject *py_batch_norm(ARGUMENTS) {
    NormArgs a = {0};
    const Array *x;
    int64_t models;
    if (n_args != 11)
        NOT_MINE;
    a.training = args[10] == Py_True;
    const int access = a.training ? WRITE : READ;
    if (!(models = input(args[0], &x, &a)) || !vector(args[1], READ, x, &a.weight) ||
        !vector(args[2], READ, x, &a.bias) || !vector(args[3], access, x, &a.running_mean) ||
        !vector(args[4], access, x, &a.running_var) || !a.running_mean.data ||
        !a.running_var.data || !like(args[5], WRITE, x, 1, 0, &a.out) ||
        !statistic(args[6], WRITE, x, &a.mean) || !statistic(args[7], WRITE, x, &a.rstd) ||
        !number_of(args[8], &a.eps) || !number_of(args[9], &a.momentum) ||
        (a.training && a.rows < 2)) /* a variance of one sample says nothing */
        NOT_MINE;
    run(kernels->batch_norm[dtype_of(x)], &a, blocks_of(models, &a), 0.4 * COLUMNS * a.rows);
    DONE;
}

static PyObject *py_batch_norm_backward(ARGUMENTS) {
    NormArgs a = {0};
    const Array *x;
    void *dy;
    int64_t models;
    if (n_args != 11 || !(models = input(args[1], &x, &a)) || !like(args[0], READ, x, 1, 0, &dy) ||
        !statistic(args[2], READ, x, &a.mean) || !statistic(args[3], READ, x, &a.rstd) ||
        !vector(args[4], READ, x, &a.weight) || !like(args[5], WRITE, x, 1, 1, &a.out) ||
        !vector(args[6], WRITE, x, &a.dweight) || !vector(args[7], WRITE, x, &a.dbias))
        NOT_MINE;
    a.dy = dy;
    a.accumulate[0] = args[8] == Py_True, a.accumulate[1] = args[9] == Py_True;
    a.training = args[10] == Py_True;
    run(kernels->batch_norm_backward[dtype_of(x)], &a, blocks_of(models, &a),
        0.6 * COLUMNS * a.rows);
    DONE;
}

PyMethodDef normalization_methods[] = {
    METHOD(layer_norm, "layer_norm(x, weight, bias, y, mean, rstd, eps)"),
    METHOD(layer_norm_backward, "layer_norm_backward(dy, x, mean, rstd, weight, dx, dweight, "
                                "dbias, add_weight, add_bias, partial)"),
    METHOD(batch_norm, "batch_norm(x, weight, bias, running_mean, running_var, y, mean, rstd, "
                       "eps, momentum, training)"),
    METHOD(batch_norm_backward, "batch_norm_backward(dy, x, mean, rstd, weight, dx, dweight, "
                                "dbias, add_weight, add_bias, training)"),
    {NULL, NULL, 0, NULL},
};
