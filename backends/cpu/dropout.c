/* Dropout, as Python calls it, and its random numbers: those of nnx/backends/philox.py.
 *
 * Philox4x64-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
 */
#include "nnx_cpu.h"
#include "dropout.h"

#include <math.h>

/* The high and the low word of a product. */
static inline void multiply(uint64_t a, uint64_t b, uint64_t *high, uint64_t *low) {
#ifdef __SIZEOF_INT128__
    __extension__ typedef unsigned __int128 Product;
    const Product product = (Product)a * b;
    *high = (uint64_t)(product >> 64), *low = (uint64_t)product;
#else
    const uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    const uint64_t middle = a1 * b0 + (a0 * b0 >> 32); /* fits, and so does the next sum */
    const uint64_t other = a0 * b1 + (uint32_t)middle;
    *high = a1 * b1 + (middle >> 32) + (other >> 32), *low = a * b;
#endif
}

void random_words(const DropoutArgs *a, int64_t item, uint32_t *words, int64_t n) {
    const uint64_t first = (uint64_t)item * (WORDS / 8) + 1; /* NumPy's first block is at 1 */
    for (uint64_t block = 0; block * 8 < (uint64_t)n; block++) {
        uint64_t c0 = first + block, c1 = a->use, c2 = 0, c3 = a->step;
        for (int round = 0; round < 10; round++) {
            uint64_t high0, low0, high1, low1;
            multiply(0xD2E7470EE14C6C93u, c0, &high0, &low0);
            multiply(0xCA5A826395121157u, c2, &high1, &low1);
            c0 = high1 ^ c1 ^ a->key[round][0];
            c1 = low1;
            c2 = high0 ^ c3 ^ a->key[round][1];
            c3 = low0;
        }
        const uint64_t result[4] = {c0, c1, c2, c3};
        for (int i = 0; i < 4; i++) { /* low half first */
            words[block * 8 + 2 * i] = (uint32_t)result[i];
            words[block * 8 + 2 * i + 1] = (uint32_t)(result[i] >> 32);
        }
    }
}

static int word_of(PyObject *object, uint64_t *word) {
    PyObject *number = PyNumber_Index(object);
    *word = number ? PyLong_AsUnsignedLongLong(number) : 0;
    Py_XDECREF(number);
    if (!PyErr_Occurred())
        return 1;
    PyErr_Clear();
    return 0;
}

/* Reads `x`, `out`, `mask` and p; whether they fit. */
static int arguments(PyObject *const *args, int mask_access, DropoutArgs *a, const Array **x_of) {
    const Array *x = array_of(args[0], READ), *out = array_of(args[1], WRITE);
    const Array *mask = array_of(args[2], mask_access);
    double p;
    if (!x || !out || !mask || !is_floating(x) || dtype_of(x) != dtype_of(out) ||
        dtype_of(mask) != BOOL || !same_shape(x, out) || !same_shape(x, mask) ||
        !number_of(args[3], &p) || !(p >= 0 && p <= 1))
        return 0;
    a->x = x->data, a->out = out->data, a->mask = (unsigned char *)mask->data;
    a->n = size_of(x);
    a->threshold = (uint32_t)ceil(p * 0x1p24); /* as `drop_threshold` has it, without the shift */
    a->scale = p < 1 ? 1 / (1 - p) : 1;        /* at p = 1 nothing is kept */
    *x_of = x;
    return 1;
}

static PyObject *py_dropout(ARGUMENTS) {
    DropoutArgs a = {0};
    const Array *x;
    uint64_t key[2];
    int64_t step;
    if (n_args != 8 || !arguments(args, WRITE, &a, &x) || !word_of(args[4], &key[0]) ||
        !word_of(args[5], &key[1]) || !word_of(args[6], &a.use) ||
        !integer_of(args[7], NAME_NUMBER, &step) || step < 0)
        NOT_MINE;
    a.step = (uint64_t)step;
    for (int round = 0; round < 10; round++) {
        a.key[round][0] = key[0] + (uint64_t)round * 0x9E3779B97F4A7C15u; /* the golden ratio */
        a.key[round][1] = key[1] + (uint64_t)round * 0xBB67AE8584CAA73Bu; /* sqrt(3) - 1 */
    }
    run(kernels->dropout[dtype_of(x)], &a, (a.n + WORDS - 1) / WORDS, 1.2 * WORDS);
    DONE;
}

static PyObject *py_dropout_backward(ARGUMENTS) {
    DropoutArgs a = {0};
    const Array *dy;
    if (n_args != 4 || !arguments(args, READ, &a, &dy))
        NOT_MINE;
    run(kernels->dropout_backward[dtype_of(dy)], &a, (a.n + WORDS - 1) / WORDS, 0.4 * WORDS);
    DONE;
}

PyMethodDef dropout_methods[] = {
    METHOD(dropout, "dropout(x, out, mask, p, seed, stream, use, step)"),
    METHOD(dropout_backward, "dropout_backward(dy, out, mask, p)"),
    {NULL, NULL, 0, NULL},
};
