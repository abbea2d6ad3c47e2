#ifndef NNX_ELEMENTWISE_H
#define NNX_ELEMENTWISE_H
#include <stdint.h>

/* Before a loop whose passes don't depend on each other, whatever its pointers are. */
#if defined(__clang__)
#define NO_DEPENDENCE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define NO_DEPENDENCE _Pragma("GCC ivdep")
#else
#define NO_DEPENDENCE
#endif

/* Operations of a program (backends/expressions.py reads their names from the module): NAME, the
 * result for a, b and c, and some nanoseconds per element. A condition is 1 or 0. */
#define OPERATIONS(X)                                                                              \
    X(copy, a, 0.1)                                                                                \
    X(neg, -a, 0.1)                                                                                \
    X(add, a + b, 0.1)                                                                             \
    X(sub, a - b, 0.1)                                                                             \
    X(mul, a *b, 0.1)                                                                              \
    X(div, a / b, 0.3)                                                                             \
    X(lt, a < b, 0.1)                                                                              \
    X(le, a <= b, 0.1)                                                                             \
    X(eq, a == b, 0.1)                                                                             \
    X(ne, a != b, 0.1)                                                                             \
    X(where, a != 0 ? b : c, 0.1)                                                                  \
    X(maximum, a > b ? a : (a != a ? a : b), 0.1)                                                  \
    X(minimum, a < b ? a : (a != a ? a : b), 0.1)                                                  \
    X(sign, a > 0 ? 1 : (a < 0 ? -1 : (a == 0 ? 0 : a)), 0.1)                                      \
    X(abs, F(ABS)(a), 0.1)                                                                         \
    X(sqrt, F(SQRT)(a), 0.4)                                                                       \
    X(exp, F(v_exp)(a), 0.7)                                                                       \
    X(expm1, F(v_expm1)(a), 0.8)                                                                   \
    X(log, F(v_log)(a), 1.0)                                                                       \
    X(log1p, F(v_log1p)(a), 1.0)                                                                   \
    X(tanh, F(v_tanh)(a), 1.0)                                                                     \
    X(erf, F(v_erf)(a), 1.5)

enum {
#define NAME(name, result, ns) OP_##name,
    OPERATIONS(NAME)
#undef NAME
    N_OPERATIONS,
    SLOTS = 64,   /* the most values of a program */
    BLOCKS = 24,  /* the most of them that are kept in blocks */
    BLOCK = 2048, /* bytes of one: all of them fit into the first-level cache, or nearly */
    OUT = 255     /* in place of a slot: the output */
};

typedef struct {
    uint8_t operation, to, a, b, c;
} Instruction;

/* What a slot is: an array, a number, or a block for what is computed. */
enum { ARRAY, NUMBER, BLANK, UNUSED };

typedef struct {
    const void *array[SLOTS];
    double number[SLOTS];
    uint8_t kind[SLOTS];
    void *out;
    int n_slots, n_instructions;
    const Instruction *instructions;
} ElementwiseArgs;
#endif
