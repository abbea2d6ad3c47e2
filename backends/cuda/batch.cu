// What happens to a batch besides the model: its rows are gathered, its right answers are counted.

// Row i of each y is row order[counters[1] * batch_size + i] of its x, for i < n. Rows are copied as
// 32-bit words, so one kernel serves every dtype; `w` is the row's width in words, 0 where unused.
extern "C" __global__ void gather_rows(u32* y0, u32* y1, u32* y2, const u32* x0, const u32* x1,
                                       const u32* x2, const i64* order, const i64* counters, i64 w0,
                                       i64 w1, i64 w2, i64 batch_size, i64 n)
{
    const i64* rows = order + counters[1] * batch_size;
    i64 width = w0 + w1 + w2, step = (i64)gridDim.x * THREADS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n * width; i += step) {
        i64 row = i / width, c = i - row * width, source = rows[row];
        if (c < w0)
            y0[row * w0 + c] = x0[source * w0 + c];
        else if ((c -= w0) < w1)
            y1[row * w1 + c] = x1[source * w1 + c];
        else
            y2[row * w2 + (c - w1)] = x2[source * w2 + (c - w1)];
    }
}

// Adds to total[k] how many of model k's n rows have their maximum at the label. The first of equal
// maxima counts, and NaN counts as the largest, as in NumPy. One warp per row. Integer atomics only.
template <typename T>
__device__ void count_correct(u64* total, const T* scores, const i64* labels, i64 n_models, i64 n,
                              i64 n_classes, i64 n_labels)
{
    int lane = threadIdx.x % 32;
    i64 step = (i64)gridDim.x * WARPS;
    for (i64 r = (i64)blockIdx.x * WARPS + threadIdx.x / 32; r < n_models * n; r += step) {
        const T* z = scores + r * n_classes;
        i64 best = lane < n_classes ? lane : 0;
        T top = z[best];
        for (i64 j = lane + 32; j < n_classes; j += 32) {
            T v = z[j];
            if (v > top || (v != v && top == top)) { top = v; best = j; }
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            T v = __shfl_xor_sync(ALL, top, distance);
            i64 j = __shfl_xor_sync(ALL, best, distance);
            bool equal = v == top || (v != v && top != top);
            if (equal ? j < best : v > top || v != v) { top = v; best = j; }
        }
        i64 model = r / n;
        if (lane == 0 && best == labels[n_labels == n ? r - model * n : r]) atomicAdd(total + model, 1ull);
    }
}

extern "C" __global__ void count_correct_f32(u64* total, const float* scores, const i64* labels,
                                             i64 n_models, i64 n, i64 n_classes, i64 n_labels)
{
    count_correct(total, scores, labels, n_models, n, n_classes, n_labels);
}

extern "C" __global__ void count_correct_f64(u64* total, const double* scores, const i64* labels,
                                             i64 n_models, i64 n, i64 n_classes, i64 n_labels)
{
    count_correct(total, scores, labels, n_models, n, n_classes, n_labels);
}
