// Softmax and negative log-likelihood, value and gradient in one launch: one warp per row.
//
// Rows are those of n_models models one after the other, n each; targets and weights hold n rows
// for all models, or n * n_models. A row's terms q are one-hot at its label, or its soft target,
// smoothed, each times its class weight; with factor[r] = w[r] / denominator (0 where that is 0):
//
//     loss[k]        = sum over model k's rows of factor * (sum(q) log(sum exp(s)) - sum(q s))
//     gradient[r, j] = (sum(q) exp(s[j]) / sum exp(s) - q[j]) * factor * grad_scale
//
// with s = logits - max of the row, shifted first so that small losses keep their digits. A label
// out of range makes its row NaN, unless its factor is 0. The last block to finish adds up the rows.

// What the rows should be and how much each counts. Every lane of a warp asks for the same row.
template <typename T> struct Targets {
    const i64* labels;  // or
    const T* soft;
    const T* class_weight;
    const T* weight;
    i64 n, n_classes, n_targets, n_weights, ignore, ignores;

    __device__ i64 label(i64 r) const { return labels[n_targets == n ? r % n : r]; }
    __device__ const T* row(i64 r) const
    {
        return soft + (n_targets == n ? r % n : r) * n_classes;
    }
    __device__ bool valid(i64 label) const { return label >= 0 && label < n_classes; }

    // The sample weight, 0 if the target is to be ignored.
    __device__ T sample(i64 r) const
    {
        T w = weight ? weight[n_weights == n ? r % n : r] : T(1);
        if (!ignores) return w;
        if (!soft) return label(r) == ignore ? T(0) : w;
        if (!valid(ignore)) return w;
        bool other = false;
        for (i64 j = threadIdx.x % 32; j < n_classes; j += 32) {
            if (j != ignore && row(r)[j] != T(0)) other = true;
        }
        return !__any_sync(ALL, other) && row(r)[ignore] != T(0) ? T(0) : w;
    }

    // The class weight of the label; of a soft target the mean under it.
    __device__ T of_class(i64 r) const
    {
        if (!class_weight) return T(1);
        if (!soft) return class_weight[valid(label(r)) ? label(r) : 0];
        T mass = T(0), total = T(0);
        for (i64 j = threadIdx.x % 32; j < n_classes; j += 32) {
            mass += row(r)[j];
            total += row(r)[j] * class_weight[j];
        }
        mass = warp_sum(mass);
        return warp_sum(total) / (mass == T(0) ? T(1) : mass);
    }
};

// out[k] = sum of the n numbers of model k, by one block.
template <typename T>
__device__ void sum_rows(T* out, const T* rows, i64 n_models, i64 n)
{
    for (i64 k = 0; k < n_models; ++k) {
        T sum = T(0);
        for (i64 i = threadIdx.x; i < n; i += THREADS) sum += read_shared(rows + k * n + i);
        sum = block_sum(sum);
        if (threadIdx.x == 0) out[k] = sum;
    }
}

template <typename T>
__device__ void softmax_nll(T* loss, T* gradient, T* row_loss, u32* ticket, const T* logits,
                            Targets<T> target, const T* denominator, const T* grad_scale,
                            double count, double scale, double smoothing, i64 n_models,
                            i64 n_denominators, i64 n_scales)
{
    int lane = threadIdx.x % 32;
    i64 n = target.n, n_classes = target.n_classes, step = (i64)gridDim.x * WARPS;
    bool dense = target.soft || smoothing != 0;
    T keep = T(1 - smoothing), spread = T(smoothing / n_classes);
    for (i64 r = (i64)blockIdx.x * WARPS + threadIdx.x / 32; r < n_models * n; r += step) {
        const T* z = logits + r * n_classes;
        T top;
        lowest(top);
        for (i64 j = lane; j < n_classes; j += 32) top = z[j] > top ? z[j] : top;
        top = warp_max(top);
        T total = T(0);
        for (i64 j = lane; j < n_classes; j += 32) total += exp(z[j] - top);
        total = warp_sum(total);

        i64 model = r / n, label = target.soft ? -1 : target.label(r);
        bool valid = target.soft || target.valid(label);
        T below = denominator ? denominator[n_denominators == 1 ? 0 : model] : T(count);
        T factor = target.sample(r);
        T of_class = target.of_class(r);
        factor = below == T(0) || (valid && of_class == T(0)) ? T(0) : factor / below;
        if (!valid && factor != T(0)) not_a_number(factor);

        auto term = [&](i64 j) {
            if (!dense) return T(j == label);
            T y = (target.soft ? target.row(r)[j] : T(j == label)) * keep + spread;
            return target.class_weight ? y * target.class_weight[j] : y;
        };
        T mass = T(1), picked = T(0);
        if (dense) {
            mass = T(0);
            for (i64 j = lane; j < n_classes; j += 32) {
                T q = term(j);
                mass += q;
                if (q != T(0)) picked += q * (z[j] - top);  // 0 * -inf is NaN
            }
            mass = warp_sum(mass);
            picked = warp_sum(picked);
        } else {
            factor *= of_class;
            if (valid) picked = z[label] - top;
        }
        if (lane == 0) {
            row_loss[r] = factor == T(0) ? T(0) : (mass * log(total) - picked) * factor;
        }
        if (gradient) {
            T s = factor * T(scale);
            if (grad_scale) s = factor * grad_scale[n_scales == 1 ? 0 : model];
            for (i64 j = lane; j < n_classes; j += 32) {
                T p = exp(z[j] - top) / total;
                gradient[r * n_classes + j] = s == T(0) ? T(0) : (p * mass - term(j)) * s;
            }
        }
    }
    if (last_block(ticket)) sum_rows(loss, row_loss, n_models, n);
}

// The denominator of the mean: total[k] = sum over model k's rows of sample times class weight.
template <typename T>
__device__ void softmax_nll_weight(T* total, T* row_weight, u32* ticket, Targets<T> target,
                                   i64 n_models)
{
    i64 n = target.n, step = (i64)gridDim.x * WARPS;
    for (i64 r = (i64)blockIdx.x * WARPS + threadIdx.x / 32; r < n_models * n; r += step) {
        T w = target.sample(r) * target.of_class(r);
        if (threadIdx.x % 32 == 0) row_weight[r] = w;
    }
    if (last_block(ticket)) sum_rows(total, row_weight, n_models, n);
}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void softmax_nll_##S(                                                   \
        T* loss, T* gradient, T* row_loss, u32* ticket, const T* logits, const i64* labels,       \
        const T* soft, const T* class_weight, const T* weight, const T* denominator,              \
        const T* grad_scale, double count, double scale, double smoothing, i64 n_models, i64 n,   \
        i64 n_classes, i64 n_targets, i64 n_weights, i64 ignore, i64 ignores, i64 n_denominators, \
        i64 n_scales)                                                                             \
    {                                                                                             \
        Targets<T> target = {labels,    soft,      class_weight, weight, n,                       \
                             n_classes, n_targets, n_weights,    ignore, ignores};                \
        softmax_nll(loss, gradient, row_loss, ticket, logits, target, denominator, grad_scale,    \
                    count, scale, smoothing, n_models, n_denominators, n_scales);                 \
    }                                                                                             \
    extern "C" __global__ void softmax_nll_weight_##S(                                            \
        T* total, T* row_weight, u32* ticket, const i64* labels, const T* soft,                   \
        const T* class_weight, const T* weight, i64 n_models, i64 n, i64 n_classes,               \
        i64 n_targets, i64 n_weights, i64 ignore, i64 ignores)                                    \
    {                                                                                             \
        Targets<T> target = {labels,    soft,      class_weight, weight, n,                       \
                             n_classes, n_targets, n_weights,    ignore, ignores};                \
        softmax_nll_weight(total, row_weight, ticket, target, n_models);                          \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
