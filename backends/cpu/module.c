/* The module nnx.backends._cpu: what NumPy's arrays are, threads, and which kernels run. */
#include "nnx_cpu.h"

#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

const Kernels *kernels = &kernels_baseline;

/* ---- arrays ---------------------------------------------------------------------------------- */

static PyTypeObject *ndarray;

enum { C_CONTIGUOUS = 0x1, ALIGNED = 0x100, WRITEABLE = 0x400 }; /* NumPy's flags */

static const Array *with_flags(PyObject *object, int needed) {
    if (Py_TYPE(object) != ndarray)
        return NULL;
    const Array *a = (const Array *)object;
    return (a->flags & needed) == needed && a->descr->byteorder != '>' ? a : NULL;
}

const Array *array_of(PyObject *object, int access) {
    return with_flags(object, C_CONTIGUOUS | ALIGNED | (access == WRITE ? WRITEABLE : 0));
}

const Array *any_array_of(PyObject *object) { return with_flags(object, ALIGNED); }

const Array *rows_of(PyObject *object, int access, int64_t *step) {
    const Array *a = with_flags(object, ALIGNED | (access == WRITE ? WRITEABLE : 0));
    if (!a || !is_floating(a) || a->nd < 1 || a->nd > 2)
        return NULL;
    const int64_t size = dtype_of(a) == F32 ? 4 : 8, n = last(a);
    if (n > 1 && a->strides[a->nd - 1] != size)
        return NULL;
    *step = a->nd == 2 && a->shape[0] > 1 ? a->strides[0] / size : 0;
    if (*step && (*step * size != a->strides[0] || (access == WRITE && *step < n)))
        return NULL;
    return *step || access == READ || a->nd < 2 || a->shape[0] < 2 ? a : NULL;
}

int dtype_of(const Array *a) {
    switch (a->descr->number) { /* NumPy's type numbers */
    case 0: return BOOL;
    case 7: return sizeof(long) == 8 ? I64 : OTHER;
    case 9: return I64;
    case 11: return F32;
    case 12: return F64;
    default: return OTHER;
    }
}

int64_t leading(const Array *a, int n) {
    int64_t product = 1;
    for (int i = 0; i < a->nd - n; i++)
        product *= a->shape[i];
    return product;
}

int64_t size_of(const Array *a) { return leading(a, 0); }

int same_shape(const Array *a, const Array *b) {
    return a->nd == b->nd &&
           (a->nd == 0 || memcmp(a->shape, b->shape, a->nd * sizeof *a->shape) == 0); /* else NULL */
}

int number_of(PyObject *object, double *number) {
    *number = PyFloat_AsDouble(object);
    if (*number == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return 1;
}

static PyObject *names[NAMES];

PyObject *attribute_of(PyObject *object, int name) {
    PyObject *found = PyObject_GetAttr(object, names[name]);
    if (!found)
        PyErr_Clear();
    return found;
}

int integer_of(PyObject *object, int name, int64_t *integer) {
    PyObject *found = attribute_of(object, name);
    *integer = found ? PyLong_AsLongLong(found) : 0;
    Py_XDECREF(found);
    if (!PyErr_Occurred())
        return found != NULL;
    PyErr_Clear();
    return 0;
}

int set_integer(PyObject *object, int name, int64_t integer) {
    PyObject *value = PyLong_FromLongLong(integer);
    const int error = value ? PyObject_SetAttr(object, names[name], value) : -1;
    Py_XDECREF(value);
    return error;
}

static PyObject *py_layout(ARGUMENTS) {
    if (n_args != 1 || Py_TYPE(args[0]) != ndarray)
        Py_RETURN_NONE;
    const Array *a = (const Array *)args[0];
    PyObject *shape = PyTuple_New(a->nd), *strides = PyTuple_New(a->nd);
    if (shape && strides)
        for (int i = 0; i < a->nd; i++) {
            PyTuple_SetItem(shape, i, PyLong_FromSsize_t(a->shape[i]));
            PyTuple_SetItem(strides, i, PyLong_FromSsize_t(a->strides[i]));
        }
    return Py_BuildValue("(KNNiii)", (unsigned long long)(uintptr_t)a->data, shape, strides,
                         a->flags, a->descr->number, dtype_of(a));
}

/* ---- threads --------------------------------------------------------------------------------- */

#ifdef _OPENMP
enum { has_openmp = 1 };
#else
enum { has_openmp = 0 };
#endif
static int max_threads = 1;

void run(Kernel kernel, const void *args, int64_t n, double ns) {
    const double total = ns * (double)n;
    if (n <= 1 || total < 20e3) { /* ns; below that two threads are hardly faster, or slower */
        PyThreadState *state = total > 5e3 ? PyEval_SaveThread() : NULL;
        kernel(args, 0, n);
        if (state)
            PyEval_RestoreThread(state);
        return;
    }
    PyThreadState *state = PyEval_SaveThread();
#ifdef _OPENMP
    const int64_t wanted = MIN((int64_t)(total / 10e3), n);
    const int n_threads = (int)MIN(wanted, max_threads);
    if (n_threads > 1) {
        /* parts begin at multiples of 64 items where there are many, so that none share a line */
        const int64_t unit = n >= 64 * 64 * n_threads ? 64 : 1;
        const int64_t units = (n + unit - 1) / unit;
#pragma omp parallel num_threads(n_threads)
        {
            const int64_t i = omp_get_thread_num(), parts = omp_get_num_threads();
            const int64_t begin = units * i / parts * unit;
            const int64_t end = MIN(units * (i + 1) / parts * unit, n);
            if (begin < end)
                kernel(args, begin, end);
        }
    } else
#endif
        kernel(args, 0, n);
    PyEval_RestoreThread(state);
}

void run_parts(Kernel kernel, const void *args, int64_t n) {
    PyThreadState *state = PyEval_SaveThread();
#ifdef _OPENMP
    const int n_threads = (int)MIN(n, max_threads);
    /* one by one: a thread that the system stops holds up the part it is at and no other */
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (n_threads > 1)
#endif
    for (int64_t i = 0; i < n; i++)
        kernel(args, i, i + 1);
    PyEval_RestoreThread(state);
}

int thread_limit(void) { return max_threads; }

static PyObject *py_set_num_threads(ARGUMENTS) {
    const long n = n_args == 1 ? PyLong_AsLong(args[0]) : 0;
    if (PyErr_Occurred())
        return NULL;
    max_threads = has_openmp ? (int)MAX(1, MIN(n, 1024)) : 1;
    return PyLong_FromLong(max_threads);
}

/* ---- which kernels ---------------------------------------------------------------------------- */

static const Kernels *supported(const char *name) {
    if (strcmp(name, "baseline") == 0)
        return &kernels_baseline;
#ifdef NNX_X86
    __builtin_cpu_init();
    if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &kernels_avx2;
    if (strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return &kernels_avx512;
#endif
    return NULL;
}

static const char *const instruction_sets[] = {"avx512", "avx2", "baseline"}; /* best first */

static PyObject *py_use(ARGUMENTS) {
    PyObject *bytes = n_args == 1 ? PyUnicode_AsUTF8String(args[0]) : NULL;
    if (!bytes)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "use(name): one name");
    const Kernels *found = supported(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    if (!found)
        NOT_MINE;
    kernels = found;
    DONE;
}

static PyObject *py_interface(ARGUMENTS) {
    (void)args, (void)n_args;
    return PyLong_FromLong(INTERFACE);
}

static PyObject *py_info(ARGUMENTS) {
    (void)args, (void)n_args;
    return Py_BuildValue("{s:s,s:O,s:i}", "instructions", kernels->name, "openmp",
                         has_openmp ? Py_True : Py_False, "threads", max_threads);
}

/* ---- the calls of a step, to be made again ----------------------------------------------------- */

#ifdef _MSC_VER
static __declspec(thread) PyObject *recorded;
#else
static _Thread_local PyObject *recorded; /* the list that this thread's calls are added to, or NULL */
#endif

typedef PyObject *Function(PyObject *, PyObject *const *, Py_ssize_t);
enum { MOST_ARGUMENTS = 16 };

static Function *function_of(PyObject *capsule) {
    const PyMethodDef *method = PyCapsule_GetPointer(capsule, NULL);
    return method ? (Function *)(void (*)(void))method->ml_meth : NULL;
}

/* Adds a call: its function, in a capsule, and its arguments, which stay alive with it. */
static int add(PyObject *capsule, PyObject *const *args, Py_ssize_t n_args) {
    PyObject *call = PyTuple_New(n_args + 1);
    if (!call)
        return -1;
    PyTuple_SetItem(call, 0, Py_NewRef(capsule));
    for (Py_ssize_t i = 0; i < n_args; i++)
        PyTuple_SetItem(call, i + 1, Py_NewRef(args[i]));
    const int error = PyList_Append(recorded, call);
    Py_DECREF(call);
    return error;
}

/* What Python calls for every kernel. */
static PyObject *call(PyObject *capsule, PyObject *const *args, Py_ssize_t n_args) {
    Function *function = function_of(capsule);
    PyObject *result = function ? function(NULL, args, n_args) : NULL;
    if (recorded && result == Py_True && add(capsule, args, n_args) < 0)
        Py_CLEAR(result);
    return result;
}

static PyObject *py_record(ARGUMENTS) {
    if (n_args != 1 || (args[0] != Py_None && !PyList_Check(args[0])))
        return PyErr_Format(PyExc_TypeError, "record(calls): a list, or None");
    Py_XDECREF(recorded);
    recorded = args[0] == Py_None ? NULL : Py_NewRef(args[0]);
    DONE;
}

static PyObject *py_recording(ARGUMENTS) {
    (void)args, (void)n_args;
    return Py_NewRef(recorded ? recorded : Py_None);
}

static PyObject *py_replay(ARGUMENTS) {
    if (n_args != 1 || !PyList_Check(args[0]))
        return PyErr_Format(PyExc_TypeError, "replay(calls): a list");
    for (Py_ssize_t i = 0; i < PyList_Size(args[0]); i++) {
        PyObject *given[MOST_ARGUMENTS], *entry = PyList_GetItem(args[0], i);
        const Py_ssize_t n = PyTuple_Size(entry) - 1;
        Function *function = n >= 0 ? function_of(PyTuple_GetItem(entry, 0)) : NULL;
        if (!function || n > MOST_ARGUMENTS)
            return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "replay(calls): what was recorded");
        for (Py_ssize_t j = 0; j < n; j++)
            given[j] = PyTuple_GetItem(entry, j + 1);
        PyObject *result = function(NULL, given, n);
        Py_XDECREF(result);
        if (result != Py_True)
            return result ? Py_NewRef(Py_False) : NULL;
    }
    DONE;
}

/* ---- the module ------------------------------------------------------------------------------- */

static PyMethodDef methods[] = {
    METHOD(layout, "layout(array): address, shape, strides, flags, type number, dtype as seen"),
    METHOD(set_num_threads, "set_num_threads(n): the most threads a kernel may use"),
    METHOD(use, "use(instructions): whether these kernels run here; from now on they do"),
    METHOD(interface, "interface(): number of what Python finds here"),
    METHOD(info, "info(): instruction set, OpenMP, threads"),
    METHOD(record, "record(calls): from now on this thread's kernels are added to the list; or None"),
    METHOD(recording, "recording(): the list, or None"),
    METHOD(replay, "replay(calls): call what was recorded again; False where one declines"),
    {NULL, NULL, 0, NULL},
};

/* What Python calls a kernel by: `call`, under its name. It lasts as long as the process. */
static PyMethodDef *door_of(const PyMethodDef *kernel) {
    static PyMethodDef doors[64];
    for (size_t i = 0; i < sizeof doors / sizeof *doors; i++) {
        if (!doors[i].ml_name) {
            doors[i] = *kernel;
            doors[i].ml_meth = (PyCFunction)(void (*)(void))call;
        }
        if (doors[i].ml_name == kernel->ml_name) /* the module may be loaded more than once */
            return &doors[i];
    }
    PyErr_SetString(PyExc_SystemError, "nnx.backends._cpu: too many kernels");
    return NULL;
}

static int add_kernel(PyObject *module, PyMethodDef *kernel) {
    PyMethodDef *door = door_of(kernel);
    PyObject *capsule = door ? PyCapsule_New(kernel, NULL, NULL) : NULL;
    PyObject *function = capsule ? PyCFunction_NewEx(door, capsule, NULL) : NULL;
    Py_XDECREF(capsule);
    const int error = function ? PyModule_AddObjectRef(module, kernel->ml_name, function) : -1;
    Py_XDECREF(function);
    return error;
}

static int execute(PyObject *module) {
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy)
        return -1;
    ndarray = (PyTypeObject *)PyObject_GetAttrString(numpy, "ndarray");
    Py_DECREF(numpy);
    if (!ndarray)
        return -1;
    static const char *const spelled[NAMES] = {
        [NAME_NUMBER] = "_number", [NAME_POSITION] = "_position", [NAME_ORDER] = "order",
        [NAME_RATES] = "rates",    [NAME_LOG] = "log",            [NAME_STRETCHES] = "stretches",
    };
    for (int i = 0; i < NAMES; i++)
        if (!(names[i] = PyUnicode_InternFromString(spelled[i])))
            return -1;
    for (size_t i = 0; i < sizeof instruction_sets / sizeof *instruction_sets; i++)
        if ((kernels = supported(instruction_sets[i])))
            break;
    PyMethodDef *files[] = {
        dropout_methods,
        elementwise_methods,
        gather_methods,
        gemm_methods,
        normalization_methods,
        optimizers_methods,
        relu_methods,
        softmax_methods,
        sums_methods,
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        for (PyMethodDef *kernel = files[i]; kernel->ml_name; kernel++)
            if (add_kernel(module, kernel) < 0)
                return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "nnx.backends._cpu",
    .m_doc = "Kernels for the CPU; see nnx.backends.numpy_backend.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModuleDef_Init(&definition); }
