// Optimizers: one launch over the flat parameter vector (n_models rows of `size` elements).
//
// counters[0] is the number of updates done, counters[1] the position in this plan; the learning
// rate is rates[counters[1]]. groups[c / 64] is a row of table: factors of the learning rate and of
// the weight decay. The last block to finish enters the losses in the log and counts up.

// What every optimizer does at its end: log[position, :] = loss; both counters + 1.
template <typename T>
__device__ void advance(T* log, const T* loss, i64* counters, u32* ticket, i64 n_models)
{
    if (!last_block(ticket)) return;
    i64 position = counters[1];
    if (loss) {
        for (i64 k = threadIdx.x; k < n_models; k += THREADS) log[position * n_models + k] = loss[k];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        counters[0] += 1;
        counters[1] = position + 1;
    }
}

template <typename T> __device__ inline T decayed(T grad, T value, double decay)
{
    return decay == 0 ? grad : grad + T(decay) * value; // 0 * inf must not reach the gradient
}

// g = grad + decay * value; u = momentum * u + g; value -= lr * u, or with Nesterov
// lr * (g + momentum * u). Without momentum `velocity` is null and u = g.
template <typename T>
__device__ void sgd(T* value, T* velocity, T* log, i64* counters, u32* ticket, const T* grad,
                    const T* loss, const double* rates, const u8* groups, const double* table,
                    double momentum, i64 nesterov, double decay, i64 n_models, i64 size)
{
    double rate = rates[counters[1]];
    T mu = T(momentum);
    i64 n = n_models * size, step = (i64)gridDim.x * THREADS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
        i64 row = 2 * groups[i % size / 64];
        if (table[row] == 0) continue; // frozen: 0 * NaN would change it
        T w = value[i], g = decayed(grad[i], w, decay * table[row + 1]), update = g;
        if (velocity) {
            T u = mu * velocity[i] + g;
            velocity[i] = u;
            update = nesterov ? g + mu * u : u;
        }
        value[i] = w - T(rate * table[row]) * update;
    }
    advance(log, loss, counters, ticket, n_models);
}

// g = grad + decay * value; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
// value -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps), t = counters[0] + 1.
template <typename T>
__device__ void adam(T* value, T* m, T* v, T* log, i64* counters, u32* ticket, const T* grad,
                     const T* loss, const double* rates, const u8* groups, const double* table,
                     double beta1, double beta2, double eps, double decay, i64 n_models, i64 size)
{
    __shared__ double rate;
    __shared__ T root; // sqrt(1 - beta2^t)
    if (threadIdx.x == 0) {
        double t = (double)(counters[0] + 1);
        rate = rates[counters[1]] / (1 - pow(beta1, t));
        root = T(sqrt(1 - pow(beta2, t)));
    }
    __syncthreads();
    T b1 = T(beta1), b2 = T(beta2), c1 = T(1 - beta1), c2 = T(1 - beta2);
    i64 n = n_models * size, step = (i64)gridDim.x * THREADS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
        i64 row = 2 * groups[i % size / 64];
        if (table[row] == 0) continue; // frozen: 0 * NaN would change it
        T w = value[i], g = decayed(grad[i], w, decay * table[row + 1]);
        T mi = b1 * m[i] + c1 * g, vi = b2 * v[i] + c2 * (g * g);
        m[i] = mi;
        v[i] = vi;
        value[i] = w - T(rate * table[row]) * (mi / (sqrt(vi) / root + T(eps)));
    }
    advance(log, loss, counters, ticket, n_models);
}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void sgd_##S(T* value, T* velocity, T* log, i64* counters, u32* ticket, \
                                       const T* grad, const T* loss, const double* rates,         \
                                       const u8* groups, const double* table, double momentum,    \
                                       i64 nesterov, double decay, i64 n_models, i64 size)        \
    {                                                                                             \
        sgd(value, velocity, log, counters, ticket, grad, loss, rates, groups, table, momentum,   \
            nesterov, decay, n_models, size);                                                     \
    }                                                                                             \
    extern "C" __global__ void adam_##S(T* value, T* m, T* v, T* log, i64* counters, u32* ticket, \
                                        const T* grad, const T* loss, const double* rates,        \
                                        const u8* groups, const double* table, double beta1,      \
                                        double beta2, double eps, double decay, i64 n_models,     \
                                        i64 size)                                                 \
    {                                                                                             \
        adam(value, m, v, log, counters, ticket, grad, loss, rates, groups, table, beta1, beta2,  \
             eps, decay, n_models, size);                                                         \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
