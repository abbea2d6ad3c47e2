/* Rows of a batch, gathered from every array of the data at once. */
#include "nnx_cpu.h"

#include <string.h>

enum { SOURCES = 8 };

typedef struct {
    const int64_t *index;
    int n_sources;
    struct {
        const char *from;
        char *to;
        size_t bytes; /* of a row */
    } source[SOURCES];
} GatherArgs;

static void gather(const void *args, int64_t begin, int64_t end) {
    const GatherArgs *a = args;
    for (int s = 0; s < a->n_sources; s++) {
        const size_t bytes = a->source[s].bytes;
        const char *restrict from = a->source[s].from;
        char *restrict to = a->source[s].to;
        if (bytes == 8) /* labels; a call for each would take longer than the copy */
            for (int64_t i = begin; i < end; i++)
                memcpy(to + i * 8, from + a->index[i] * 8, 8);
        else
            for (int64_t i = begin; i < end; i++)
                memcpy(to + i * bytes, from + a->index[i] * bytes, bytes);
    }
}

/* Bytes of an element; 0 if it may be more than its bytes, as an object is. */
static int64_t item_size(const Array *a) {
    static const char sizes[] = {1, 1, 1, 2, 2, 4, 4, sizeof(long), sizeof(long), 8, 8, 4, 8};
    const int number = a->descr->number; /* bool, integers, float32 and float64; float16 */
    return number >= 0 && number < (int)sizeof sizes ? sizes[number] : number == 23 ? 2 : 0;
}

/* Whether it has gathered rows order[start...] of the sources into the outputs, two lists. */
static int gather_all(PyObject *sources, const Array *order, int64_t start, PyObject *outs) {
    const Py_ssize_t n_sources = PyList_Size(sources);
    if (n_sources < 1 || n_sources > SOURCES || PyList_Size(outs) != n_sources)
        return 0;
    GatherArgs a = {.n_sources = (int)n_sources};
    int64_t n = 0, bytes = 0;
    uint64_t rows = UINT64_MAX; /* of the shortest source */
    for (int s = 0; s < n_sources; s++) {
        const Array *from = array_of(PyList_GetItem(sources, s), READ);
        const Array *to = array_of(PyList_GetItem(outs, s), WRITE);
        if (!from || !to || from->nd < 1 || from->nd != to->nd || !item_size(from) ||
            from->descr->number != to->descr->number ||
            memcmp(from->shape + 1, to->shape + 1, (from->nd - 1) * sizeof *from->shape) != 0)
            return 0;
        if (s > 0 && to->shape[0] != n)
            return 0;
        n = to->shape[0];
        rows = MIN(rows, (uint64_t)from->shape[0]);
        a.source[s].from = from->data, a.source[s].to = to->data;
        a.source[s].bytes = item_size(from);
        for (int i = 1; i < from->nd; i++)
            a.source[s].bytes *= from->shape[i];
        bytes += a.source[s].bytes;
    }
    if (start > order->shape[0] - n)
        return 0;
    a.index = (const int64_t *)order->data + start;
    int outside = 0;
    for (int64_t i = 0; i < n; i++)
        outside |= (uint64_t)a.index[i] >= rows;
    if (outside)
        return 0;
    run(gather, &a, n, 3.0 * n_sources + 0.1 * bytes);
    return 1;
}

static PyObject *py_gather_rows(ARGUMENTS) {
    int64_t position = 0, size = 0;
    if (n_args != 4 || !PyList_Check(args[0]) || !PyList_Check(args[3]) ||
        !integer_of(args[1], NAME_POSITION, &position) || position < 0)
        NOT_MINE;
    size = PyLong_AsLongLong(args[2]);
    if (size == -1 && PyErr_Occurred())
        return NULL;
    PyObject *held = attribute_of(args[1], NAME_ORDER);
    const Array *order = held ? array_of(held, READ) : NULL;
    const int done = order && order->nd == 1 && dtype_of(order) == I64 && size > 0 &&
                     position <= order->shape[0] / size &&
                     gather_all(args[0], order, position * size, args[3]);
    Py_XDECREF(held);
    return Py_NewRef(done ? Py_True : Py_False);
}

PyMethodDef gather_methods[] = {
    METHOD(gather_rows, "gather_rows(sources, state, batch_size, outs): the rows of the state's step"),
    {NULL, NULL, 0, NULL},
};
