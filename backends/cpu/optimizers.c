/* The optimizers, as Python calls them. */
#include "nnx_cpu.h"
#include "optimizers.h"

#include <math.h>
#include <string.h>

/* The fields of `Update` (base.py), a tuple. */
enum { VALUE, GRAD, SLOTS, GROUPS, STATE, LOSS, SCALE, DECAY, SHRINK, FIELDS };

typedef struct {
    const Kernel *kernel; /* of each dtype */
    void (*prepare)(double *settings, double number);
    int n_slots, required, n_settings;
    double ns;
} Rule;

static int same_kind(const Array *a, const Array *b) {
    return a && dtype_of(a) == dtype_of(b) && same_shape(a, b);
}

/* The attributes that an operation asks for, held as long as it runs. */
typedef struct {
    PyObject *stretches, *rates, *log;
} Held;

static PyObject *release(Held *held, PyObject *result) {
    Py_XDECREF(held->stretches);
    Py_XDECREF(held->rates);
    Py_XDECREF(held->log);
    return result;
}

/* Reads what every operation needs: the value if all is of the right form, else NULL. */
static const Array *read_update(PyObject *update, UpdateArgs *a, Held *held) {
    if (!PyTuple_Check(update) || PyTuple_Size(update) != FIELDS)
        return NULL;
    const Array *value = array_of(PyTuple_GetItem(update, VALUE), WRITE);
    const Array *grad = array_of(PyTuple_GetItem(update, GRAD), WRITE);
    held->stretches = attribute_of(PyTuple_GetItem(update, GROUPS), NAME_STRETCHES);
    const Array *runs = held->stretches ? array_of(held->stretches, READ) : NULL;
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

/* An optimizer's operation, of which the step's number, rate and place in the log are its state's;
 * it ends by counting the step. */
static int apply(PyObject *update, PyObject *settings, const Rule *rule, Held *held) {
    UpdateArgs a = {0};
    const Array *value = read_update(update, &a, held);
    PyObject *state = value ? PyTuple_GetItem(update, STATE) : NULL;
    int64_t position, number;
    if (!value || !numbers_of(settings, rule->n_settings, a.settings) ||
        !integer_of(state, NAME_POSITION, &position) || !integer_of(state, NAME_NUMBER, &number))
        return 0;
    held->rates = attribute_of(state, NAME_RATES);
    held->log = attribute_of(state, NAME_LOG);
    const Array *rates = held->rates && held->log ? array_of(held->rates, READ) : NULL;
    if (!rates || dtype_of(rates) != F64 || rates->nd != 1 || position < 0 ||
        position >= rates->shape[0])
        return 0;
    a.rate = ((const double *)rates->data)[position];
    if (rule->prepare)
        rule->prepare(a.settings, (double)number);
    PyObject *slots = PyTuple_GetItem(update, SLOTS), *scale = PyTuple_GetItem(update, SCALE);
    if (!PyTuple_Check(slots) || PyTuple_Size(slots) != rule->n_slots ||
        !number_of(PyTuple_GetItem(update, DECAY), &a.decay) ||
        !number_of(PyTuple_GetItem(update, SHRINK), &a.shrink))
        return 0;
    for (int i = 0; i < rule->n_slots; i++) {
        PyObject *slot = PyTuple_GetItem(slots, i);
        if (slot == Py_None && i >= rule->required)
            continue;
        const Array *array = array_of(slot, WRITE);
        if (!same_kind(array, value))
            return 0;
        a.slots[i] = array->data;
    }
    if (scale != Py_None) {
        const Array *factors = array_of(scale, READ);
        if (!factors || dtype_of(factors) != dtype_of(value) || factors->nd != 1 ||
            factors->shape[0] != a.models)
            return 0;
        a.scale = factors->data;
    }
    const double ns = rule->ns * (dtype_of(value) == F64 ? 2.5 : 1);
    run(rule->kernel[dtype_of(value)], &a, a.models * a.size, ns);
    PyObject *loss = PyTuple_GetItem(update, LOSS);
    if (loss != Py_None && enter(held->log, position, loss) < 0)
        return -1;
    /* counted here: after a return to Python Ctrl-C may come between */
    const int error = set_integer(state, NAME_NUMBER, number + 1) ||
                      set_integer(state, NAME_POSITION, position + 1);
    return error ? -1 : 1;
}

static PyObject *applied(PyObject *const *args, Py_ssize_t n_args, Rule rule) {
    Held held = {0};
    const int done = n_args == 2 ? apply(args[0], args[1], &rule, &held) : 0;
    return release(&held, done < 0 ? NULL : Py_NewRef(done ? Py_True : Py_False));
}

/* The factors that correct the averages after `number` steps, as `XpBackend.adam` has them. */
static void adam_factors(double *settings, double number) {
    settings[3] = 1 - pow(settings[0], number + 1);
    settings[4] = pow(1 - pow(settings[1], number + 1), 0.5);
}

static void adagrad_factor(double *settings, double number) {
    settings[2] = 1 + number * settings[2]; /* of the learning rate's decay */
}

/* The kernel, what it does before, slots and those that must be there, settings, ns an element. */
static PyObject *py_sgd(ARGUMENTS) {
    return applied(args, n_args, (Rule){kernels->sgd, NULL, 1, 0, 2, 0.2});
}

static PyObject *py_adam(ARGUMENTS) {
    return applied(args, n_args, (Rule){kernels->adam, adam_factors, 3, 2, 3, 0.5});
}

static PyObject *py_adagrad(ARGUMENTS) {
    return applied(args, n_args, (Rule){kernels->adagrad, adagrad_factor, 1, 1, 3, 0.4});
}

static PyObject *py_rmsprop(ARGUMENTS) {
    return applied(args, n_args, (Rule){kernels->rmsprop, NULL, 3, 1, 3, 0.4});
}

static PyObject *py_lion(ARGUMENTS) {
    return applied(args, n_args, (Rule){kernels->lion, NULL, 1, 1, 2, 0.3});
}

static int condition(PyObject *const *args, Held *held) {
    UpdateArgs a = {0};
    const Array *value = read_update(args[0], &a, held);
    double clip_norm = 0;
    a.settings[2] = INFINITY;
    if (!value || !number_of(args[1], &a.settings[0]) || !number_of(args[2], &a.settings[1]) ||
        (args[3] != Py_None && !number_of(args[3], &a.settings[2])) ||
        (args[4] != Py_None && !number_of(args[4], &clip_norm)))
        return 0;
    const int64_t blocks = (a.size + SQUARES - 1) / SQUARES;
    const Array *scale = NULL;
    if (args[4] != Py_None) {
        const Array *squares = array_of(args[6], WRITE);
        scale = array_of(args[5], WRITE);
        if (!scale || !squares || dtype_of(squares) != F64 || size_of(squares) < a.models * blocks ||
            dtype_of(scale) != dtype_of(value) || size_of(scale) != a.models)
            return 0;
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
    return 1;
}

static PyObject *py_condition(ARGUMENTS) {
    Held held = {0};
    const int done = n_args == 7 && condition(args, &held);
    return release(&held, Py_NewRef(done ? Py_True : Py_False));
}

PyMethodDef optimizers_methods[] = {
    METHOD(sgd, "sgd(update, (momentum, nesterov))"),
    METHOD(adam, "adam(update, (beta1, beta2, eps))"),
    METHOD(adagrad, "adagrad(update, (initial, eps, lr_decay))"),
    METHOD(rmsprop, "rmsprop(update, (alpha, eps, momentum))"),
    METHOD(lion, "lion(update, (beta1, beta2))"),
    METHOD(condition, "condition(update, l1, l2, clip_value, clip_norm, scale, squares)"),
    {NULL, NULL, 0, NULL},
};
