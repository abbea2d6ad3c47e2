/* Expressions, as Python calls them. */
#include "nnx_cpu.h"
#include "elementwise.h"

#include <string.h>

static const double cost[] = {
#define COST(name, result, ns) ns,
    OPERATIONS(COST)
#undef COST
};

/* A Python float or int, and no array, boolean or NumPy scalar. */
static int plain_number(PyObject *object, double *number) {
    return (PyFloat_CheckExact(object) || PyLong_CheckExact(object)) && number_of(object, number);
}

/* Checks the operands, in the order of their names, against what the program expects of each. */
static int read_operands(PyObject *names, PyObject *operands, const uint8_t *kinds, int n,
                         const Array *out, ElementwiseArgs *a) {
    if (!PyTuple_Check(names) || PyTuple_Size(names) != n || PyDict_Size(operands) != n)
        return 0;
    const char *first = out->data, *end = first + size_of(out) * (dtype_of(out) == F32 ? 4 : 8);
    for (int s = 0; s < n; s++) {
        PyObject *operand = PyDict_GetItem(operands, PyTuple_GetItem(names, s));
        a->kind[s] = kinds[s];
        if (!operand || kinds[s] > NUMBER || (kinds[s] == NUMBER && !plain_number(operand, &a->number[s])))
            return 0;
        if (kinds[s] == ARRAY) {
            const Array *array = array_of(operand, READ);
            if (!array || dtype_of(array) != dtype_of(out) || !same_shape(array, out))
                return 0;
            a->array[s] = array->data;
            if (array->data != first && array->data < end && first < array->data + (end - first))
                return 0; /* they overlap, and a block may be written before it is read */
        }
    }
    return 1;
}

/* Does what a program does with numbers only, in float64 as Python does. */
static int calculate(const Instruction *x, int n, ElementwiseArgs *a) {
    for (int k = 0; k < n; k++, x++) {
        if (x->a >= a->n_slots || x->b >= a->n_slots || a->kind[x->a] != NUMBER ||
            a->kind[x->b] != NUMBER)
            return 0;
        const double p = a->number[x->a], q = a->number[x->b];
        switch (x->operation) {
        case OP_neg: a->number[a->n_slots] = -p; break;
        case OP_add: a->number[a->n_slots] = p + q; break;
        case OP_sub: a->number[a->n_slots] = p - q; break;
        case OP_mul: a->number[a->n_slots] = p * q; break;
        case OP_div:
            if (q == 0)
                return 0; /* an error, which Python words */
            a->number[a->n_slots] = p / q;
            break;
        default: return 0;
        }
        a->kind[a->n_slots++] = NUMBER;
    }
    return 1;
}

/* elementwise(program, out, operands): the program is (names, code), of which the code is
 * the numbers of operands, constants, operations on numbers, blank slots, and operations; the kind
 * of each operand; the constants, float64; the operations on numbers; the operations. Slots are
 * operands, constants, results on numbers, and blank ones, in this order. */
static PyObject *py_elementwise(ARGUMENTS) {
    enum { HEAD = 5 };
    const Array *out;
    char *code;
    Py_ssize_t size;
    if (n_args != 3 || !PyTuple_Check(args[0]) || PyTuple_Size(args[0]) != 2 ||
        !PyDict_Check(args[2]) || !(out = array_of(args[1], WRITE)) || !is_floating(out) ||
        PyBytes_AsStringAndSize(PyTuple_GetItem(args[0], 1), &code, &size) < 0)
        return PyErr_Occurred() ? NULL : (Py_INCREF(Py_False), Py_False);
    const uint8_t *head = (const uint8_t *)code, *kinds = head + HEAD;
    if (size < HEAD)
        NOT_MINE;
    const int n_operands = head[0], n_constants = head[1], n_results = head[2], n_blank = head[3];
    const int fixed = n_operands + n_constants + n_results;
    const uint8_t *constants = kinds + n_operands;
    ElementwiseArgs a;
    a.out = out->data;
    a.n_instructions = head[4];
    if (fixed + n_blank > SLOTS || size != HEAD + n_operands + 8 * n_constants +
                                               (Py_ssize_t)sizeof(Instruction) *
                                                   (n_results + a.n_instructions) ||
        !read_operands(PyTuple_GetItem(args[0], 0), args[2], kinds, n_operands, out, &a))
        NOT_MINE;
    memcpy(a.number + n_operands, constants, 8 * n_constants);
    memset(a.kind + n_operands, NUMBER, n_constants);
    a.n_slots = n_operands + n_constants;
    const Instruction *numbers = (const Instruction *)(constants + 8 * n_constants);
    a.instructions = numbers + n_results;
    if (!calculate(numbers, n_results, &a))
        NOT_MINE;
    memset(a.kind + fixed, BLANK, n_blank);
    a.n_slots += n_blank;

    uint8_t read[SLOTS] = {0};
    double ns = 0;
    for (int k = 0; k < a.n_instructions; k++) {
        const Instruction *x = a.instructions + k;
        if (x->operation >= N_OPERATIONS || x->a >= a.n_slots || x->b >= a.n_slots ||
            x->c >= a.n_slots || (x->to != OUT && (x->to < fixed || x->to >= a.n_slots)))
            NOT_MINE;
        read[x->a] = read[x->b] = read[x->c] = 1;
        ns += cost[x->operation];
    }
    int blocks = n_blank;
    for (int s = 0; s < fixed; s++) {
        if (!read[s])
            a.kind[s] = UNUSED;
        blocks += a.kind[s] == NUMBER;
    }
    if (blocks > BLOCKS)
        NOT_MINE;
    run(kernels->elementwise[dtype_of(out)], &a, size_of(out), dtype_of(out) == F32 ? ns : 2.5 * ns);
    DONE;
}

static PyObject *py_operations(ARGUMENTS) {
    (void)args, (void)n_args;
    PyObject *names = PyTuple_New(N_OPERATIONS);
    if (!names)
        return NULL;
#define ADD(name, result, ns) PyTuple_SetItem(names, OP_##name, PyUnicode_FromString(#name));
    OPERATIONS(ADD)
#undef ADD
    return names;
}

PyMethodDef elementwise_methods[] = {
    METHOD(elementwise, "elementwise(program, out, operands): out = expression"),
    METHOD(operations, "operations(): their names, in the order of their codes"),
    {NULL, NULL, 0, NULL},
};
