// ReLU with a bit-packed mask: bit i % 32 of word i / 32 says whether x[i] > 0.
// The derivative at 0 is 0, NaN stays NaN in forward and selects 0 in backward.

template <typename T> __device__ inline T rectify(T v) { return v > T(0) ? v : v == v ? T(0) : v; }

// y[i] = max(x[i], 0). mask holds ceil(n / 32) words; y may be x.
template <typename T> __device__ void relu(T* y, u32* mask, const T* x, i64 n)
{
    i64 step = (i64)gridDim.x * THREADS;
    for (i64 first = (i64)blockIdx.x * THREADS; first < n; first += step) { // same count in a block
        i64 i = first + threadIdx.x;
        T v = i < n ? x[i] : T(0);
        u32 word = __ballot_sync(ALL, v > T(0));
        if (i < n) {
            y[i] = rectify(v);
            if (i % 32 == 0) mask[i / 32] = word;
        }
    }
}

__device__ inline bool bit(const u32* mask, i64 i) { return mask[i / 32] >> (i % 32) & 1; }

// dx[i] = dy[i] where the mask is set, else 0: a selection. dx may be dy.
template <typename T> __device__ void relu_backward(T* dx, const T* dy, const u32* mask, i64 n)
{
    i64 step = (i64)gridDim.x * THREADS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += step)
        dx[i] = bit(mask, i) ? dy[i] : T(0);
}

// z[r, c] = max(z[r, c] + bias[c], 0) in place; z is (n_rows, n_columns) with n elements.
template <typename T>
__device__ void bias_relu(T* z, u32* mask, const T* bias, i64 n_columns, i64 n)
{
    i64 step = (i64)gridDim.x * THREADS;
    for (i64 first = (i64)blockIdx.x * THREADS; first < n; first += step) {
        i64 i = first + threadIdx.x;
        // a 32-bit remainder is several times cheaper
        i64 c = n >> 31 ? i % n_columns : (i64)((u32)i % (u32)n_columns);
        T v = i < n ? z[i] + bias[c] : T(0);
        u32 word = __ballot_sync(ALL, v > T(0));
        if (i < n) {
            z[i] = rectify(v);
            if (i % 32 == 0) mask[i / 32] = word;
        }
    }
}

// Sum of dy (n_rows, n_columns) over rows into dbias, added to it if accumulate. With a mask, dy
// goes through the ReLU first: the selected values are summed, and written to dz.
// A block takes 32 columns; its 8 warps take every 8th row. That order never changes, so the sum
// has the same bits with and without a mask.
template <typename T>
__device__ void bias_backward(T* dbias, T* dz, const T* dy, const u32* mask, i64 n_rows,
                              i64 n_columns, i64 accumulate)
{
    __shared__ T partial[WARPS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (i64 first = (i64)blockIdx.x * 32; first < n_columns; first += (i64)gridDim.x * 32) {
        i64 c = first + lane;
        T sum = T(0);
        if (c < n_columns) {
            for (i64 r = warp; r < n_rows; r += WARPS) {
                i64 i = r * n_columns + c;
                T v = dy[i];
                if (mask) {
                    v = bit(mask, i) ? v : T(0);
                    dz[i] = v;
                }
                sum += v;
            }
        }
        partial[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && c < n_columns) {
            T total = accumulate ? dbias[c] : T(0);
            T column = partial[0][lane];
            for (int w = 1; w < WARPS; ++w) column += partial[w][lane];
            dbias[c] = total + column;
        }
        __syncthreads();
    }
}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void relu_##S(T* y, u32* mask, const T* x, i64 n)                       \
    {                                                                                             \
        relu(y, mask, x, n);                                                                      \
    }                                                                                             \
    extern "C" __global__ void relu_backward_##S(T* dx, const T* dy, const u32* mask, i64 n)      \
    {                                                                                             \
        relu_backward(dx, dy, mask, n);                                                           \
    }                                                                                             \
    extern "C" __global__ void bias_relu_##S(T* z, u32* mask, const T* bias, i64 columns, i64 n)  \
    {                                                                                             \
        bias_relu(z, mask, bias, columns, n);                                                     \
    }                                                                                             \
    extern "C" __global__ void bias_backward_##S(T* dbias, T* dz, const T* dy, const u32* mask,   \
                                                 i64 rows, i64 columns, i64 accumulate)           \
    {                                                                                             \
        bias_backward(dbias, dz, dy, mask, rows, columns, accumulate);                            \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
