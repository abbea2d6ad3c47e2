/* The optimizers, as Python calls them. */
#include "nnx_cpu.h"
#include "optimizers.h"

#include <math.h>
#include <string.h>

/* The fields of `Update` (base.py), a tuple. */
enum { VALUE, GRAD, SLOTS, GROUPS, STATE, LOSS, SCALE, DECAY, SHRINK, FIELDS };

static int same_kind(const Array *a, const Array *b) {
    return a && dtype_of(a) == dtype_of(b) && same_shape(a, b);
}

/* Reads what every operation needs: the value if all is of the right form, else NULL. */
static const Array *read_update(PyObject *update, PyObject *stretches, UpdateArgs *a) {
    if (!PyTuple_Check(update) || PyTuple_Size(update) != FIELDS)
        return NULL;
    const Array *value = array_of(PyTuple_GetItem(update, VALUE), WRITE);
    const Array *grad = array_of(PyTuple_GetItem(update, GRAD), WRITE);
    const Array *runs = array_of(stretches, READ);
    if (!value || !is_floating(value) || value->nd != 2 || !same_kind(grad, value) || !runs ||
        dtype_of(runs) != F64 || runs->nd != 2 || runs->shape[1] != STRETCH)
        return NULL;
    a->value = value->data, a->grad = grad->data;
    a->models = value->shape[0], a->size = value->shape[1];
    a->stretches = (const double *)runs->data, a->n_stretches = runs->shape[0];
    double last = 0;
    for (const double *s = a->stretches; s < a->stretches + a->n_stretches * STRETCH; s += STRETCH) {
        if (!(last <= s[0] && s[0] <= s[1] && s[1] <= (double)a->size))
            return NULL;
        last = s[1];
    }
    return value;
}

/* Reads a tuple of n numbers. */
static int numbers_of(PyObject *tuple, Py_ssize_t n, double *numbers) {
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != n)
        return 0;
    for (Py_ssize_t i = 0; i < n; i++)
        if (!number_of(PyTuple_GetItem(tuple, i), &numbers[i]))
            return 0;
    return 1;
}

/* log[position, ...] = loss; -1 and an error where that fails. */
static int enter(PyObject *log, int64_t position, PyObject *loss) {
    const Array *from = array_of(loss, READ), *to = array_of(log, WRITE);
    if (from && to && is_floating(to) && dtype_of(from) == dtype_of(to) && to->nd == from->nd + 1 &&
        position < to->shape[0] &&
        (from->nd == 0 || (from->nd == 1 && to->shape[1] == from->shape[0]))) {
        memcpy(to->data + position * to->strides[0], from->data,
               size_of(from) * (dtype_of(from) == F32 ? sizeof(float) : sizeof(double)));
        return 0;
    }
    PyObject *key = Py_BuildValue("(LO)", (long long)position, Py_Ellipsis);
    const int error = key ? PyObject_SetItem(log, key, loss) : -1;
    Py_XDECREF(key);
    return error;
}

/* An optimizer's operation: args are update, stretches, rates, position, log, and settings. */
static PyObject *apply(PyObject *const *args, Py_ssize_t n_args, const Kernel kernel[2],
                       int n_slots, int required, int n_settings, double ns) {
    UpdateArgs a = {0};
    const Array *value = n_args == 6 ? read_update(args[0], args[1], &a) : NULL;
    const Array *rates = value ? array_of(args[2], READ) : NULL;
    double position;
    if (!rates || dtype_of(rates) != F64 || rates->nd != 1 || !number_of(args[3], &position) ||
        !(position >= 0 && position < (double)rates->shape[0]) ||
        !numbers_of(args[5], n_settings, a.settings))
        NOT_MINE;
    a.rate = ((const double *)rates->data)[(int64_t)position];
    PyObject *slots = PyTuple_GetItem(args[0], SLOTS), *scale = PyTuple_GetItem(args[0], SCALE);
    if (!PyTuple_Check(slots) || PyTuple_Size(slots) != n_slots ||
        !number_of(PyTuple_GetItem(args[0], DECAY), &a.decay) ||
        !number_of(PyTuple_GetItem(args[0], SHRINK), &a.shrink))
        NOT_MINE;
    for (int i = 0; i < n_slots; i++) {
        PyObject *slot = PyTuple_GetItem(slots, i);
        if (slot == Py_None && i >= required)
            continue;
        const Array *array = array_of(slot, WRITE);
        if (!same_kind(array, value))
            NOT_MINE;
        a.slots[i] = array->data;
    }
    if (scale != Py_None) {
        const Array *factors = array_of(scale, READ);
        if (!factors || dtype_of(factors) != dtype_of(value) || factors->nd != 1 ||
            factors->shape[0] != a.models)
            NOT_MINE;
        a.scale = factors->data;
    }
    run(kernel[dtype_of(value)], &a, a.models * a.size, ns * (dtype_of(value) == F64 ? 2.5 : 1));
    PyObject *loss = PyTuple_GetItem(args[0], LOSS);
    if (loss != Py_None && enter(args[4], (int64_t)position, loss) < 0)
        return NULL;
    DONE;
}

static PyObject *py_sgd(ARGUMENTS) { return apply(args, n_args, kernels->sgd, 1, 0, 2, 0.2); }

static PyObject *py_adam(ARGUMENTS) { return apply(args, n_args, kernels->adam, 3, 2, 5, 0.5); }

static PyObject *py_adagrad(ARGUMENTS) {
    return apply(args, n_args, kernels->adagrad, 1, 1, 3, 0.4);
}

static PyObject *py_rmsprop(ARGUMENTS) {
    return apply(args, n_args, kernels->rmsprop, 3, 1, 3, 0.4);
}

static PyObject *py_lion(ARGUMENTS) { return apply(args, n_args, kernels->lion, 1, 1, 2, 0.3); }

static PyObject *py_condition(ARGUMENTS) {
    UpdateArgs a = {0};
    const Array *value = n_args == 8 ? read_update(args[0], args[1], &a) : NULL;
    double clip_norm = 0;
    a.settings[2] = INFINITY;
    if (!value || !number_of(args[2], &a.settings[0]) || !number_of(args[3], &a.settings[1]) ||
        (args[4] != Py_None && !number_of(args[4], &a.settings[2])) ||
        (args[5] != Py_None && !number_of(args[5], &clip_norm)))
        NOT_MINE;
    const int64_t blocks = (a.size + SQUARES - 1) / SQUARES;
    const Array *scale = NULL;
    if (args[5] != Py_None) {
        const Array *squares = array_of(args[7], WRITE);
        scale = array_of(args[6], WRITE);
        if (!scale || !squares || dtype_of(squares) != F64 || size_of(squares) < a.models * blocks ||
            dtype_of(scale) != dtype_of(value) || size_of(scale) != a.models)
            NOT_MINE;
        a.squares = (double *)squares->data;
    }
    run(kernels->condition[dtype_of(value)], &a, a.models * blocks, 0.3 * SQUARES);
    for (int64_t k = 0; scale && k < a.models; k++) {
        double square = 0;
        for (int64_t i = 0; i < blocks; i++)
            square += a.squares[k * blocks + i];
        double factor = clip_norm / (sqrt(square) + 1e-6);
        factor = factor > 1 ? 1 : factor; /* NaN stays */
        if (dtype_of(value) == F32)
            ((float *)scale->data)[k] = (float)factor;
        else
            ((double *)scale->data)[k] = factor;
    }
    DONE;
}

#define STEP "(update, stretches, rates, position, log, "
PyMethodDef optimizers_methods[] = {
    METHOD(sgd, "sgd" STEP "(momentum, nesterov))"),
    METHOD(adam, "adam" STEP "(beta1, beta2, eps, correction1, correction2))"),
    METHOD(adagrad, "adagrad" STEP "(initial, eps, slower))"),
    METHOD(rmsprop, "rmsprop" STEP "(alpha, eps, momentum))"),
    METHOD(lion, "lion" STEP "(beta1, beta2))"),
    METHOD(condition, "condition(update, stretches, l1, l2, clip_value, clip_norm, scale, squares)"),
    {NULL, NULL, 0, NULL},
};
