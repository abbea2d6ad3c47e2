// Softmax and negative log-likelihood, value and gradient in one launch: one warp per row.
//
// Rows are those of n_models models one after the other, n each; labels and weights hold n entries
// for all models, or n * n_models. With factor[r] = w[r] / denominator (0 where that is 0):
//
//     loss[k]        = sum over model k's rows of factor * (log(sum exp(s)) - s[label])
//     gradient[r, j] = (exp(s[j]) / sum exp(s) - (j == label)) * factor * grad_scale
//
// with s = logits - max of the row, shifted first so that small losses keep their digits. A label
// out of range makes its row NaN, unless its factor is 0. The last block to finish adds up the rows.

template <typename T>
__device__ void softmax_nll(T* loss, T* gradient, T* row_loss, u32* ticket, const T* logits,
                            const i64* labels, const T* weight, const T* denominator,
                            const T* grad_scale, double count, double scale, i64 n_models, i64 n,
                            i64 n_classes, i64 n_labels, i64 n_weights, i64 n_denominators,
                            i64 n_scales)
{
    int lane = threadIdx.x % 32;
    i64 step = (i64)gridDim.x * WARPS;
    for (i64 r = (i64)blockIdx.x * WARPS + threadIdx.x / 32; r < n_models * n; r += step) {
        const T* z = logits + r * n_classes;
        T top;
        lowest(top);
        for (i64 j = lane; j < n_classes; j += 32) top = z[j] > top ? z[j] : top;
        top = warp_max(top);
        T total = T(0);
        for (i64 j = lane; j < n_classes; j += 32) total += exp(z[j] - top);
        total = warp_sum(total);

        i64 model = r / n, label = labels[n_labels == n ? r - model * n : r];
        T below = denominator ? denominator[n_denominators == 1 ? 0 : model] : T(count);
        T factor = weight ? weight[n_weights == n ? r - model * n : r] : T(1);
        factor = below == T(0) ? T(0) : factor / below;
        bool valid = label >= 0 && label < n_classes;
        if (!valid && factor != T(0)) not_a_number(factor);
        if (lane == 0) {
            T value = log(total) - (valid ? z[label] - top : T(0));
            row_loss[r] = factor == T(0) ? T(0) : value * factor;
        }
        if (gradient) {
            T s = factor * T(scale);
            if (grad_scale) s = factor * grad_scale[n_scales == 1 ? 0 : model];
            for (i64 j = lane; j < n_classes; j += 32) {
                T p = exp(z[j] - top) / total;
                gradient[r * n_classes + j] = s == T(0) ? T(0) : (j == label ? p - T(1) : p) * s;
            }
        }
    }
    if (last_block(ticket)) {
        for (i64 k = 0; k < n_models; ++k) {
            T sum = T(0);
            for (i64 i = threadIdx.x; i < n; i += THREADS) sum += read_shared(row_loss + k * n + i);
            sum = block_sum(sum);
            if (threadIdx.x == 0) loss[k] = sum;
        }
    }
}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void softmax_nll_##S(                                                   \
        T* loss, T* gradient, T* row_loss, u32* ticket, const T* logits, const i64* labels,       \
        const T* weight, const T* denominator, const T* grad_scale, double count, double scale,   \
        i64 n_models, i64 n, i64 n_classes, i64 n_labels, i64 n_weights, i64 n_denominators,      \
        i64 n_scales)                                                                             \
    {                                                                                             \
        softmax_nll(loss, gradient, row_loss, ticket, logits, labels, weight, denominator,        \
                    grad_scale, count, scale, n_models, n, n_classes, n_labels, n_weights,        \
                    n_denominators, n_scales);                                                    \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
