/* Matrix products, as Python calls them. */
#include "nnx_cpu.h"
#include "gemm.h"
#include "relu.h"

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
static const double SMALL = 1 << 18, FEW_ROWS = 1 << 13;

/* OpenBLAS's functions, with 64-bit integers. */
typedef void Sgemm(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t,
                   const float *, int64_t, float, float *, int64_t);
typedef void Dgemm(int, int, int, int64_t, int64_t, int64_t, double, const double *, int64_t,
                   const double *, int64_t, double, double *, int64_t);
static Sgemm *sgemm;
static Dgemm *dgemm;
static int alone; /* whether BLAS runs on one thread, so that several may call it at once */

enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 }; /* CBLAS's */

/* Whether BLAS takes a matrix of these strides, and which it tells it. */
static int layout_of(int64_t rows, int64_t columns, int64_t row, int64_t column, int *how,
                     int64_t *ld) {
    if ((column == 1 || columns == 1) && (row >= columns || rows == 1)) {
        *how = AS_IT_IS, *ld = rows == 1 ? MAX(columns, 1) : row;
        return *ld >= 1;
    }
    if ((row == 1 || rows == 1) && (column >= rows || columns == 1)) {
        *how = TRANSPOSED, *ld = columns == 1 ? MAX(rows, 1) : column;
        return *ld >= 1;
    }
    return 0;
}

/* Items: blocks of C, each a product by BLAS, whose bias and ReLU follow while it is in the cache. */
static void by_blas(const void *args, int64_t begin, int64_t end) {
    const GemmArgs *g = args;
    int how_a = 0, how_b = 0;
    int64_t lda = 0, ldb = 0;
    layout_of(g->m, g->k, g->a_row, g->a_column, &how_a, &lda);
    layout_of(g->k, g->n, g->b_row, g->b_column, &how_b, &ldb);
    for (int64_t item = begin; item < end; item++) {
        const int64_t i0 = item / g->column_blocks * g->row_block;
        const int64_t j0 = item % g->column_blocks * g->column_block;
        const int64_t m = MIN(g->row_block, g->m - i0), n = MIN(g->column_block, g->n - j0);
        const int64_t at_a = i0 * g->a_row, at_b = j0 * g->b_column, at_c = i0 * g->n + j0;
        if (g->is_double) {
            double *c = (double *)g->c + at_c;
            dgemm(ROW_MAJOR, how_a, how_b, m, n, g->k, 1, (const double *)g->a + at_a, lda,
                  (const double *)g->b + at_b, ldb, g->accumulate, c, g->n);
        } else {
            float *c = (float *)g->c + at_c;
            sgemm(ROW_MAJOR, how_a, how_b, m, n, g->k, 1, (const float *)g->a + at_a, lda,
                  (const float *)g->b + at_b, ldb, (float)g->accumulate, c, g->n);
        }
        if (g->bias) {
            const int64_t size = g->is_double ? sizeof(double) : sizeof(float);
            const BiasArgs of_block = {
                .z = (char *)g->c + at_c * size,
                .bias = (const char *)g->bias + j0 * size,
                .rows = m,
                .n = n,
                .row = g->n,
            };
            (g->relu ? kernels->bias_relu : kernels->add_bias)[g->is_double ? F64 : F32](
                &of_block, 0, m);
        }
    }
}

/* Cuts C into two blocks for each thread along its longer side; large ones into one, since each packs
 * the whole of the other matrix anew. */
static int64_t cut(GemmArgs *g, double products) {
    const int64_t threads = thread_limit(), parts = threads * (products < 1 << 29 ? 2 : 1);
    const int64_t side = MAX(g->m, g->n), unit = 32;
    int64_t block = side;
    if (threads > 1 && products > 1 << 20)
        block = MAX(((side + parts - 1) / parts + unit - 1) / unit * unit, unit);
    g->row_block = g->m >= g->n ? block : g->m;
    g->column_block = g->m >= g->n ? g->n : block;
    g->column_blocks = (g->n + g->column_block - 1) / g->column_block;
    return (g->m + g->row_block - 1) / g->row_block * g->column_blocks;
}

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
    g.a = a->data, g.b = b->data, g.c = c->data, g.bias = bias ? bias->data : NULL;
    g.accumulate = args[3] == Py_True, g.relu = args[5] == Py_True;
    g.is_double = dtype_of(c) == F64;
    const double products = (double)g.m * g.n * g.k;
    /* few rows are done sooner than the other matrix is packed */
    if (products > SMALL || (g.m < 8 && products > FEW_ROWS)) {
        int how;
        int64_t ld;
        if (!alone || g.m == 1 || g.n == 1) /* for a vector NumPy calls gemv */
            NOT_MINE;
        if (!layout_of(g.m, g.k, g.a_row, g.a_column, &how, &ld) ||
            !layout_of(g.k, g.n, g.b_row, g.b_column, &how, &ld))
            NOT_MINE;
        const int64_t parts = cut(&g, products);
        run_parts(by_blas, &g, parts);
        DONE;
    }
#ifndef __GNUC__
    NOT_MINE; /* its vectors are an extension of GCC and Clang */
#endif
    const int64_t blocks = (g.m + GEMM_ROWS - 1) / GEMM_ROWS;
    g.row_block = blocks ? ((g.m + blocks - 1) / blocks + 11) / 12 * 12 : 1;
    g.column_blocks = (g.n + GEMM_COLUMNS - 1) / GEMM_COLUMNS;
    const int64_t items = (g.m + g.row_block - 1) / g.row_block * g.column_blocks;
    run(kernels->gemm[dtype_of(c)], &g, items, items ? products / items * 0.03 : 0);
    DONE;
}

static PyObject *py_set_blas(ARGUMENTS) {
    if (n_args != 2)
        NOT_MINE;
    sgemm = (Sgemm *)(uintptr_t)PyLong_AsVoidPtr(args[0]);
    dgemm = (Dgemm *)(uintptr_t)PyLong_AsVoidPtr(args[1]);
    if (PyErr_Occurred())
        return NULL;
    DONE;
}

static PyObject *py_set_alone(ARGUMENTS) {
    alone = n_args == 1 && args[0] == Py_True && sgemm && dgemm;
    DONE;
}

PyMethodDef gemm_methods[] = {
    METHOD(set_blas, "set_blas(sgemm, dgemm): addresses of CBLAS's functions"),
    METHOD(set_alone, "set_alone(flag): whether BLAS runs on one thread from now on"),
    METHOD(gemm, "gemm(a, b, out, accumulate, bias, relu)"),
    {NULL, NULL, 0, NULL},
};
