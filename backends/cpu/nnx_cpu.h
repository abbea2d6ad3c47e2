/* What all files of the extension share: NumPy's arrays, threads, and the table of kernels.
 *
 * What each kernel computes is defined by the body of its operation in XpBackend (base.py). A
 * function of the module returns whether it has done its work: False means that an array isn't of
 * the form it takes (dtype, contiguity, shape), nothing is written then, and the caller runs the
 * NumPy body, which also words the error where there is one.
 */
#ifndef NNX_CPU_H
#define NNX_CPU_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ---- arrays ---------------------------------------------------------------------------------- */

/* The beginning of NumPy's array object, as its ABI has it since 1.7 (its own headers read these
 * fields inline, so they can't move); `layout` lets Python check it once. */
typedef struct {
    PyObject_HEAD
    char *data;
    int nd;
    Py_ssize_t *shape, *strides;
    PyObject *base;
    struct Descr *descr;
    int flags;
} Array;

struct Descr {
    PyObject_HEAD
    PyTypeObject *type;
    char kind, letter, byteorder, former_flags;
    int number;
};

enum { F32, F64, I64, BOOL, OTHER };
enum { READ, WRITE };

/* The array, if it is C-contiguous, aligned, in native byte order, and writable where asked. */
const Array *array_of(PyObject *object, int access);
/* The array of any strides, if it is aligned and in native byte order. */
const Array *any_array_of(PyObject *object);
/* The same of float32 or float64 rows `(n,)` or `(K, n)`, of which only each need be contiguous:
 * views of the flat vector. `step` elements lie from one row to the next, 0 where there is one. */
const Array *rows_of(PyObject *object, int access, int64_t *step);
int dtype_of(const Array *a);
int64_t size_of(const Array *a);
/* Product of all axes but the last `n`. */
int64_t leading(const Array *a, int n);
static inline int64_t last(const Array *a) { return a->nd ? a->shape[a->nd - 1] : 1; }
int same_shape(const Array *a, const Array *b);
static inline int is_floating(const Array *a) { return dtype_of(a) == F32 || dtype_of(a) == F64; }
/* Reads a Python number; 0 and no error if it isn't one. */
int number_of(PyObject *object, double *number);
/* Attributes that kernels ask for, by their names in Python. */
enum { NAME_NUMBER, NAME_POSITION, NAME_ORDER, NAME_RATES, NAME_LOG, NAME_STRETCHES, NAMES };
/* An attribute, a new reference, or NULL and no error. */
PyObject *attribute_of(PyObject *object, int name);
/* The same of one that is an integer; 0 if there is none. A call that is to be done again in another
 * step is given the step's `StepState`, which it asks for the step's numbers. */
int integer_of(PyObject *object, int name, int64_t *integer);
/* Sets it; -1 and an error where that fails. */
int set_integer(PyObject *object, int name, int64_t integer);

/* To be raised with every change of what Python finds here; INTERFACE of numpy_backend.py. */
enum { INTERFACE = 4 };

#define DONE Py_RETURN_TRUE
#define NOT_MINE Py_RETURN_FALSE
#define METHOD(name, doc) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, doc}
#define ARGUMENTS PyObject *Py_UNUSED(self), PyObject *const *args, Py_ssize_t n_args

/* ---- threads --------------------------------------------------------------------------------- */

/* A kernel does items begin..end-1 of its work. Which items there are depends on shapes only, never
 * on the number of threads, so results don't either; only products by BLAS are cut by it (gemm.c). */
typedef void (*Kernel)(const void *args, int64_t begin, int64_t end);

/* Runs a kernel on n items: on one thread where all of them take less than some 30 us together, as
 * `ns` for each says; and without the GIL where they take longer than it takes to release it. */
void run(Kernel kernel, const void *args, int64_t n, double ns);

/* Runs a kernel on n long items, each on the thread that is free next; without the GIL. */
void run_parts(Kernel kernel, const void *args, int64_t n);
int thread_limit(void);

/* ---- kernels --------------------------------------------------------------------------------- */

/* Every kernel, once for each dtype and instruction set: the template is NAME in a file *.inc. */
#define KERNELS(X) \
    X(relu) X(relu_backward) X(bias_relu) X(bias_relu_backward) X(bias_grad) X(add_bias) X(gemm) \
    X(all_finite) X(total) \
    X(sgd) X(adam) X(adagrad) X(rmsprop) X(lion) X(condition) \
    X(dropout) X(dropout_backward) \
    X(layer_norm) X(layer_norm_backward) X(norm_gradients) X(batch_norm) X(batch_norm_backward) \
    X(elementwise) \
    X(nll_weights) X(nll_factors) X(softmax_nll) X(softmax_nll_few) X(nll_loss) X(count_correct) \
    X(softmax) X(softmax_backward)

typedef struct {
    const char *name;
#define FIELD(kernel) Kernel kernel[2];
    KERNELS(FIELD)
#undef FIELD
} Kernels;

extern const Kernels *kernels; /* those of the best instruction set here */
extern const Kernels kernels_baseline;
#if defined(__x86_64__) && defined(__GNUC__)
#define NNX_X86
extern const Kernels kernels_avx2, kernels_avx512;
#endif

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* ---- the files of the module ------------------------------------------------------------------ */

extern PyMethodDef dropout_methods[];
extern PyMethodDef elementwise_methods[];
extern PyMethodDef gather_methods[];
extern PyMethodDef gemm_methods[];
extern PyMethodDef normalization_methods[];
extern PyMethodDef optimizers_methods[];
extern PyMethodDef relu_methods[];
extern PyMethodDef softmax_methods[];
extern PyMethodDef sums_methods[];

#endif
