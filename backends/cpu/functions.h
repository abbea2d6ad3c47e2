/* Constants of functions.inc, by dtype. Polynomials are in Horner's order, highest power first. */
#ifndef NNX_FUNCTIONS_H
#define NNX_FUNCTIONS_H

/* HORNERn(f, x, ...): a polynomial of degree n with f(a, b, c) = a * b + c. */
#define HORNER1(f, x, a, b) f(a, x, b)
#define HORNER2(f, x, a, b, ...) HORNER1(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER3(f, x, a, b, ...) HORNER2(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER4(f, x, a, b, ...) HORNER3(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER5(f, x, a, b, ...) HORNER4(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER6(f, x, a, b, ...) HORNER5(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER7(f, x, a, b, ...) HORNER6(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER8(f, x, a, b, ...) HORNER7(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER9(f, x, a, b, ...) HORNER8(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER10(f, x, a, b, ...) HORNER9(f, x, f(a, x, b), __VA_ARGS__)
#define HORNER11(f, x, a, b, ...) HORNER10(f, x, f(a, x, b), __VA_ARGS__)

typedef uint32_t bits_f32;
typedef uint64_t bits_f64;

#define MANTISSA_f32 23 /* bits of it */
#define MANTISSA_f64 52
#define BIAS_f32 127 /* of the exponent */
#define BIAS_f64 1023
#define SMALLEST_f32 0x1p-126f /* normal number */
#define SMALLEST_f64 0x1p-1022
#define ABS_f32 fabsf
#define ABS_f64 fabs
#define COPYSIGN_f32 copysignf
#define COPYSIGN_f64 copysign
#define SQRT_f32 sqrtf
#define SQRT_f64 sqrt
#define FMA_f32 fmaf
#define FMA_f64 fma

/* Adding it rounds to an integer, whose low bits, plus 2 (BIAS + 1), are those of the sum. */
#define ROUND_f32 (0x1.8p23f + 256)
#define ROUND_f64 (0x1.8p52 + 2048)
#define LOG2_E_f32 1.44269504f
#define LOG2_E_f64 1.4426950408889634
/* log(2) in two: n times the first is exact for every n there is (Cody and Waite; Cephes's). */
#define LN2_HIGH_f32 0.693359375f
#define LN2_LOW_f32 -2.12194440e-4f
#define LN2_HIGH_f64 0.693145751953125
#define LN2_LOW_f64 1.42860682030941723212e-6
/* Beyond these exp is 0 or infinite, and expm1 -1. */
#define EXP_MIN_f32 -104
#define EXP_MAX_f32 89
#define EXP_MIN_f64 -746
#define EXP_MAX_f64 710
#define EXPM1_MIN_f32 -18
#define EXPM1_MIN_f64 -38

/* (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2: minimax (Remez's exchange in 60 digits), the error
 * in exp(r) at most 2^-28.2 and 2^-57.5 of it. */
#define EXP_TAIL_f32(r)                                                                            \
    HORNER4(muladd_f32, r, 0.00138158879f, 0.00836857328f, 0.0416683485f, 0.166665222f, 0.499999937f)
#define EXP_TAIL_f64(r)                                                                            \
    HORNER9(muladd_f64, r, 2.4990172376649589655e-8, 2.7627264087598567173e-7,                     \
            2.7557607711689635155e-6, 2.4801502272447530074e-5, 1.9841269497448391909e-4,          \
            1.3888888933747399614e-3, 8.3333333334892054563e-3, 4.1666666666573271259e-2,          \
            0.16666666666666442587, 0.50000000000000044808)

/* (log((1 + s) / (1 - s)) - 2 s) / s, of z = s^2 for |s| <= 3 - 2 sqrt(2): fdlibm's, error 2^-58
 * (and its logf's, 2^-34) of the logarithm. */
#define LOG_TAIL_f32(z) ((z)*HORNER3(muladd_f32, z, 0.24279079f, 0.28498787f, 0.40000972f, 0.66666663f))
#define LOG_TAIL_f64(z)                                                                            \
    ((z)*HORNER6(muladd_f64, z, 1.479819860511658591e-1, 1.531383769920937332e-1,                  \
                 1.818357216161805012e-1, 2.222219843214978396e-1, 2.857142874366239149e-1,        \
                 3.999999999940941908e-1, 6.666666666666735130e-1))
/* log(2) in two for the exponent of log (fdlibm's). */
#define LOG2_HIGH_f32 0.69313812256f
#define LOG2_LOW_f32 9.0580006145e-6f
#define LOG2_HIGH_f64 0.693147180369123816490
#define LOG2_LOW_f64 1.90821492927058770002e-10

/* tanh(a) and erf(a) for a >= 0 with z = a^2. Up to SPLIT both are a (1 + p(z)), p minimax as above
 * (tanh's is z times that), with errors of 2^-28 and 2^-29 in float32, 2^-59 and 2^-61 in float64.
 * Beyond it erf is 1 - q(a - 2)^4, minimax too, the error 2^-31, and in float64 Cody's (1969), as
 * in XpBackend.erf. From MAX on both are 1. */
#define TANH_MAX_f32 9.1f
#define TANH_MAX_f64 19.1
#define TANH_SPLIT_f32 0.5625f
#define TANH_SPLIT_f64 0.5625
#define TANH_NEAR_f32(z)                                                                           \
    ((z)*HORNER4(muladd_f32, z, -6.3080648e-3f, 0.021111932f, -0.053867305f, 0.13332799f,          \
                 -0.33333327f))
#define TANH_NEAR_f64(z)                                                                           \
    ((z)*HORNER10(muladd_f64, z, -1.9346487214542797e-5, 8.3144851267850959e-5,                    \
                  -2.3331680653852656e-4, 5.8844408106412087e-4, -1.4555498695206470e-3,           \
                  3.5920944287692666e-3, -8.8632329936418025e-3, 0.021869488421216209,             \
                  -0.053968253965482392, 0.13333333333330599, -0.33333333333333329))

#define ERF_MAX_f32 4
#define ERF_MAX_f64 6
#define ERF_SPLIT_f32 1
#define ERF_SPLIT_f64 0.875
#define ERF_NEAR_f32(z)                                                                            \
    HORNER6(muladd_f32, z, 7.853877532e-5f, -8.010198262e-4f, 5.188328186e-3f, -0.02685381219f,    \
            0.1128358515f, -0.3761262582f, 0.1283791657f)
#define ERF_NEAR_f64(z)                                                                            \
    HORNER11(muladd_f64, z, -8.6551115806486937e-10, 1.4118057121574029e-8,                        \
             -1.6288380393838041e-7, 1.6456518557068443e-6, -1.4925381488807904e-5,                \
             1.2055324326083403e-4, -8.5483268394442028e-4, 5.2239776229561140e-3,                 \
             -0.026866170644932609, 0.11283791670954304, -0.37612638903183739,                     \
             0.12837916709551257)
#define ERF_FAR_f32(a, z)                                                                          \
    (1 - fourth_f32(HORNER9(muladd_f32, (a - 2), 1.158100366e-5f, -2.022195606e-5f,                \
                            -2.163165514e-4f, 7.546083959e-4f, 1.563883488e-3f, -0.01222810784f,   \
                            6.896687638e-3f, 0.09913470071f, -0.2888619657f, 0.2615224042f)))
#define ERF_FAR_f64(a, z)                                                                          \
    (1 - v_exp_f64(-z) *                                                                           \
             (HORNER8(muladd_f64, a, 2.15311535474403846e-8, 5.64188496988670089e-1,               \
                      8.88314979438837594e0, 6.61191906371416295e1, 2.98635138197400131e2,         \
                      8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,         \
                      1.23033935479799725e3) /                                                     \
              HORNER8(muladd_f64, a, 1.0, 1.57449261107098347e1, 1.17693950891312499e2,            \
                      5.37181101862009858e2, 1.62138957456669019e3, 3.29079923573345963e3,         \
                      4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3)))

#endif
