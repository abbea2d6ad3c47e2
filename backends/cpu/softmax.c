/* Softmax with negative log-likelihood and the count of right answers, as Python calls them. */
#include "nnx_cpu.h"
#include "softmax.h"

/* Whether an array of one number for each row has them for all models, or for each; how many. */
static int of_rows(const Array *a, const Array *logits, int64_t *n) {
    *n = size_of(a);
    if (a->nd != 1 && a->nd != logits->nd - 1)
        return 0;
    for (int i = 1; i <= a->nd; i++)
        if (a->shape[a->nd - i] != logits->shape[logits->nd - 1 - i])
            return 0;
    return 1;
}

/* Reads a Python number, or a floating array `()` or one of a number for each model. */
static int read_number(PyObject *object, const Array *logits, Number *number) {
    const Array *a = array_of(object, READ);
    if (!a)
        return number_of(object, &number->value);
    number->data = a->data;
    number->dtype = dtype_of(a);
    number->step = a->nd;
    return is_floating(a) && (a->nd == 0 || (a->nd == 1 && logits->nd == 3 &&
                                             a->shape[0] == logits->shape[0]));
}

static int read_integer(PyObject *object, int64_t *integer) {
    *integer = PyLong_AsLongLong(object);
    if (*integer == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return 1;
}

enum { FEW_ROWS = 2048 }; /* up to which no array for what is kept of each row is needed */

static PyObject *py_softmax_nll(ARGUMENTS) {
    const Array *logits, *target, *loss, *other;
    if (n_args != 11 || !(logits = array_of(args[0], READ)) || !is_floating(logits) ||
        !(logits->nd == 2 || logits->nd == 3) || !(target = array_of(args[1], READ)) ||
        !(loss = array_of(args[8], WRITE)))
        NOT_MINE;
    const int dtype = dtype_of(logits), soft = is_floating(target);
    NllArgs a = {.logits = logits->data, .loss = loss->data, .scale = {.value = 1}};
    a.models = logits->nd == 3 ? logits->shape[0] : 1;
    a.rows = logits->shape[logits->nd - 2];
    a.n = last(logits);
    const int64_t rows = a.models * a.rows;
    if (a.n < 1 || dtype_of(loss) != dtype || loss->nd != logits->nd - 2 ||
        size_of(loss) != a.models)
        NOT_MINE;
    double few[2 * FEW_ROWS];
    a.factors = few;
    a.slopes = few + FEW_ROWS;
    if (rows > FEW_ROWS) {
        if (!(other = array_of(args[10], WRITE)) || dtype_of(other) != dtype ||
            size_of(other) != 2 * rows)
            NOT_MINE;
        a.factors = other->data;
        a.slopes = other->data + rows * (dtype == F32 ? 4 : 8);
    }
    if (soft) {
        if (dtype_of(target) != dtype ||
            !(same_shape(target, logits) ||
              (target->nd == 2 && target->shape[0] == a.rows && target->shape[1] == a.n)))
            NOT_MINE;
        a.soft = target->data;
        a.targets = leading(target, 1);
    } else {
        if (dtype_of(target) != I64 || !of_rows(target, logits, &a.targets))
            NOT_MINE;
        a.labels = (const int64_t *)target->data;
    }
    if (args[2] != Py_None) {
        if (!(other = array_of(args[2], READ)) || dtype_of(other) != dtype ||
            !of_rows(other, logits, &a.weights))
            NOT_MINE;
        a.weight = other->data;
    }
    if (args[3] != Py_None) {
        if (!(other = array_of(args[3], READ)) || dtype_of(other) != dtype || other->nd != 1 ||
            other->shape[0] != a.n)
            NOT_MINE;
        a.of_class = other->data;
    }
    a.ignores = args[5] != Py_None;
    a.normalized = args[6] != Py_None;
    if (!number_of(args[4], &a.smoothing) || (a.ignores && !read_integer(args[5], &a.ignored)) ||
        (a.normalized && !read_number(args[6], logits, &a.normalizer)) ||
        (args[7] != Py_None && !read_number(args[7], logits, &a.scale)))
        NOT_MINE;
    if (args[9] != Py_None) {
        if (!(other = array_of(args[9], WRITE)) || dtype_of(other) != dtype ||
            !same_shape(other, logits))
            NOT_MINE;
        a.gradient = other->data;
    }
    if (soft && (a.ignored < 0 || a.ignored >= a.n))
        a.ignores = 0;
    a.plain = !(a.weight || a.of_class || a.ignores || a.normalized);
    a.terms = soft || a.smoothing != 0;
    if (!a.plain)
        run(kernels->nll_weights[dtype], &a, rows, soft ? 0.3 * (double)a.n : 2);
    run(kernels->nll_factors[dtype], &a, a.models, (double)a.rows);
    const double ns = (dtype == F32 ? 0.7 : 1.5) * (double)a.n;
    if (a.n <= FEW)
        run(kernels->softmax_nll_few[dtype], &a, (rows + SOFTMAX_LANES - 1) / SOFTMAX_LANES, SOFTMAX_LANES * ns);
    else
        run(kernels->softmax_nll[dtype], &a, rows, a.terms ? 2 * ns : ns);
    run(kernels->nll_loss[dtype], &a, a.models, (double)a.rows);
    DONE;
}

static PyObject *py_count_correct(ARGUMENTS) {
    const Array *scores, *labels, *total;
    CountArgs a = {0};
    if (n_args != 5 || !(scores = array_of(args[0], READ)) || !is_floating(scores) ||
        !(scores->nd == 2 || scores->nd == 3) || !(labels = array_of(args[1], READ)) ||
        dtype_of(labels) != I64 || !of_rows(labels, scores, &a.n_labels) ||
        !(total = array_of(args[2], WRITE)) || dtype_of(total) != I64 ||
        !read_integer(args[3], &a.k))
        NOT_MINE;
    const int64_t models = scores->nd == 3 ? scores->shape[0] : 1;
    const int ignores = args[4] != Py_None;
    a.scores = scores->data;
    a.labels = (const int64_t *)labels->data;
    a.rows = scores->shape[scores->nd - 2];
    a.n = last(scores);
    a.right = (int64_t *)total->data;
    if (a.n < 1 || a.n > INT32_MAX || a.k < 1 || total->nd != scores->nd - 2 + ignores ||
        size_of(total) != (ignores ? 2 : 1) * models || (ignores && total->shape[0] != 2) ||
        (ignores && !read_integer(args[4], &a.ignored)))
        NOT_MINE;
    a.counted = ignores ? a.right + models : NULL;
    run(kernels->count_correct[dtype_of(scores)], &a, models * a.rows, 5 + 0.2 * (double)a.n);
    DONE;
}

static PyObject *py_softmax(ARGUMENTS) {
    const Array *x, *out;
    if (n_args != 3 || !(x = array_of(args[0], READ)) || !(out = array_of(args[1], WRITE)) ||
        !is_floating(x) || x->nd < 1 || dtype_of(x) != dtype_of(out) || !same_shape(x, out))
        NOT_MINE;
    const SoftmaxArgs a = {
        .x = x->data, .out = out->data, .n = last(x), .log = args[2] == Py_True};
    run(kernels->softmax[dtype_of(x)], &a, a.n ? leading(x, 1) : 0, 5 + 1.5 * (double)a.n);
    DONE;
}

static PyObject *py_softmax_backward(ARGUMENTS) {
    const Array *dy, *y, *out;
    if (n_args != 4 || !(dy = array_of(args[0], READ)) || !(y = array_of(args[1], READ)) ||
        !(out = array_of(args[2], WRITE)) || !is_floating(dy) || dy->nd < 1 ||
        dtype_of(dy) != dtype_of(y) || dtype_of(dy) != dtype_of(out) || !same_shape(dy, y) ||
        !same_shape(dy, out))
        NOT_MINE;
    const SoftmaxArgs a = {
        .x = y->data, .dy = dy->data, .out = out->data, .n = last(dy), .log = args[3] == Py_True};
    run(kernels->softmax_backward[dtype_of(dy)], &a, leading(dy, 1),
        5 + (a.log ? 1.5 : 0.5) * (double)a.n);
    DONE;
}

PyMethodDef softmax_methods[] = {
    METHOD(softmax_nll, "softmax_nll(logits, target, weight, class_weight, label_smoothing, "
                        "ignore_index, normalizer, grad_scale, loss, gradient, work)"),
    METHOD(softmax, "softmax(x, out, log)"),
    METHOD(softmax_backward, "softmax_backward(dy, y, out, log)"),
    METHOD(count_correct, "count_correct(scores, labels, total, k, ignore_index)"),
    {NULL, NULL, 0, NULL},
};
