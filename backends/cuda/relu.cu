// ReLU with a bit-packed mask: bit i % 32 of word i / 32 says whether x[i] > 0.
// The derivative at 0 is 0, NaN stays NaN in forward and selects 0 in backward.
//
// A lane takes V elements side by side: 16 bytes of them where pointers and shapes allow, else one.

// The V bits of a mask that begin at element i, lowest first, and what lies above them.
__device__ inline u32 bits_at(const u32* mask, i64 i) { return mask[i / 32] >> (i % 32); }

template <typename T, int V> __device__ inline void select(Pack<T, V>& v, u32 bits)
{
    for (int j = 0; j < V; ++j) v.at[j] = bits >> j & 1 ? v.at[j] : T(0);
}

// y[i] to y[i + V - 1] = max(v, 0), and their bits: 32 / V lanes make a word, the first stores it.
// Called by whole warps, with i >= n too.
template <typename T, int V>
__device__ inline void rectify(T* y, u32* mask, Pack<T, V> v, i64 i, i64 n)
{
    u32 bits = 0;
    for (int j = 0; j < V; ++j) {
        T a = v.at[j];
        bits |= (u32)(a > T(0)) << j;
        v.at[j] = a > T(0) ? a : a == a ? T(0) : a;
    }
    store_pack(y + i, v, n - i);
    if (V == 1) {
        bits = __ballot_sync(ALL, bits);
    } else {
        bits <<= i % 32;
        bits = Lanes{32 / V}.reduce(bits, [](u32 a, u32 b) { return a | b; });
    }
    if (i % 32 == 0 && i < n) mask[i / 32] = bits;
}

// y[i] = max(x[i], 0). mask holds ceil(n / 32) words; y may be x.
template <int V, typename T> __device__ void relu(T* y, u32* mask, const T* x, i64 n)
{
    i64 step = (i64)gridDim.x * THREADS * V;
    for (i64 first = (i64)blockIdx.x * THREADS * V; first < n; first += step) { // same in a block
        i64 i = first + threadIdx.x * V;
        rectify(y, mask, load_pack<V>(x + i, n - i), i, n);
    }
}

// dx[i] = dy[i] where the mask is set, else 0: a selection. dx may be dy.
template <int V, typename T>
__device__ void relu_backward(T* dx, const T* dy, const u32* mask, i64 n)
{
    i64 step = (i64)gridDim.x * THREADS * V;
    for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * V; i < n; i += step) {
        Pack<T, V> v = load_pack<V>(dy + i, n - i);
        select(v, bits_at(mask, i));
        store_pack(dx + i, v, n - i);
    }
}

// z[k, r, c] = max(z[k, r, c] + bias[k, c], 0) in place, n elements; bias[k] begins at k * stride.
// If V > 1 it divides n_columns.
template <int V, typename T>
__device__ void bias_relu(T* z, u32* mask, const T* bias, i64 stride, i64 n_rows, i64 n_columns,
                          i64 n)
{
    i64 step = (i64)gridDim.x * THREADS * V;
    for (i64 first = (i64)blockIdx.x * THREADS * V; first < n; first += step) {
        i64 i = first + threadIdx.x * V;
        Pack<T, V> v = load_pack<V>(z + i, n - i);
        if (i < n) {
            i64 row = quotient(i, n_columns), model = stride ? quotient(row, n_rows) : 0;
            Pack<T, V> b = load_pack<V>(bias + model * stride + (i - row * n_columns));
            for (int j = 0; j < V; ++j) v.at[j] += b.at[j];
        }
        rectify(z, mask, v, i, n);
    }
}

// Column sums of dy (n_models, n_rows, n_columns) into dbias, added to it if accumulate; dbias[k]
// begins at k * stride. With a mask, dy goes through the ReLU first: the selected values are
// summed, and written to dz.
//
// Of a model's n elements, `width` count as a row: n_columns, or, if they are few, a multiple.
// A block takes 32 packs of columns of `chunk_rows` rows, its 8 warps every 8th row. If there are
// several chunks, each stores its sums in `partial`, and the last to do so adds them up. So a sum
// has one order, with and without a mask, aligned or not. If V > 1 it divides n and width.
template <int V, typename T>
__device__ void bias_backward(T* dbias, i64 stride, T* __restrict__ dz, T* partial, u32* tickets,
                              const T* __restrict__ dy, const u32* __restrict__ mask, i64 n_models,
                              i64 n, i64 n_columns, i64 width, i64 n_chunks, i64 chunk_rows,
                              bool accumulate)
{
    constexpr int packs = pack_size<T> / V; // of a lane
    constexpr int columns = 32 * V * packs; // of a block
    constexpr int ahead = 4 / packs;        // rows that are loaded before the first is added
    __shared__ T sums[WARPS][columns];
    int t = threadIdx.x, lane = t % 32, warp = t / 32;
    auto over_warps = [&] {
        __syncthreads();
        T total = T(0);
        for (int w = 0; w < WARPS && t < columns; ++w) total += sums[w][t];
        __syncthreads();
        return total;
    };
    i64 n_groups = ceil_div(width, columns), n_rows = ceil_div(n, width);
    for (i64 item = blockIdx.x; item < n_models * n_groups * n_chunks; item += gridDim.x) {
        i64 part = item / n_chunks, chunk = item - part * n_chunks;
        i64 model = part / n_groups, start = model * n, first = (part - model * n_groups) * columns;
        i64 stop = min(n_rows, (chunk + 1) * chunk_rows);
        Pack<T, V> sum[packs] = {};
        for (i64 r = chunk * chunk_rows + warp; r < stop; r += ahead * WARPS) {
            Pack<T, V> v[ahead][packs] = {};
            i64 at[ahead][packs];
            u32 bits[ahead][packs];
            for (int j = 0; j < ahead; ++j) {
                for (int k = 0; k < packs; ++k) {
                    i64 row = r + j * WARPS, c = first + (k * 32 + lane) * V, i = row * width + c;
                    at[j][k] = row < stop && c < width && i < n ? start + i : -1;
                    if (at[j][k] >= 0) v[j][k] = load_pack<V>(dy + at[j][k]);
                    bits[j][k] = mask && at[j][k] >= 0 ? bits_at(mask, at[j][k]) : ALL;
                }
            }
            for (int j = 0; j < ahead; ++j) {
                for (int k = 0; k < packs; ++k) {
                    select(v[j][k], bits[j][k]);
                    if (mask && at[j][k] >= 0) store_pack(dz + at[j][k], v[j][k]);
                    for (int e = 0; e < V; ++e) sum[k].at[e] += v[j][k].at[e];
                }
            }
        }
        for (int k = 0; k < packs; ++k)
            for (int e = 0; e < V; ++e) sums[warp][(k * 32 + lane) * V + e] = sum[k].at[e];
        T total = over_warps();
        bool mine = t < columns && first + t < width;
        if (n_chunks > 1) {
            T* chunks = partial + part * n_chunks * columns;
            if (mine) chunks[chunk * columns + t] = total;
            if (!last_block(tickets + part, (u32)n_chunks)) continue;
            T s[pack_size<T>] = {};
#pragma unroll 4
            for (i64 h = warp; h < n_chunks; h += WARPS)
                for (int k = 0; k < pack_size<T>; ++k)
                    if (first + k * 32 + lane < width)
                        s[k] += read_shared(chunks + h * columns + k * 32 + lane);
            for (int k = 0; k < pack_size<T>; ++k) sums[warp][k * 32 + lane] = s[k];
            total = over_warps();
        }
        if (mine) sums[0][t] = total;
        __syncthreads();
        if (mine && t < n_columns) {
            for (i64 c = t + n_columns; c < columns && first + c < width; c += n_columns)
                total += sums[0][c];
            T* out = dbias + model * stride + first + t;
            *out = accumulate ? *out + total : total;
        }
        __syncthreads();
    }
}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void relu_##S(T* y, u32* mask, const T* x, i64 n)                       \
    {                                                                                             \
        by_width<T>(aligned16(y, x), [&](auto V) { relu<V>(y, mask, x, n); });                    \
    }                                                                                             \
    extern "C" __global__ void relu_backward_##S(T* dx, const T* dy, const u32* mask, i64 n)      \
    {                                                                                             \
        by_width<T>(aligned16(dx, dy), [&](auto V) { relu_backward<V>(dx, dy, mask, n); });       \
    }                                                                                             \
    extern "C" __global__ void bias_relu_##S(T* z, u32* mask, const T* bias, i64 stride,          \
                                             i64 n_rows, i64 n_columns, i64 n)                    \
    {                                                                                             \
        bool packed = aligned16(z, bias, bias + stride) && n_columns % pack_size<T> == 0;         \
        by_width<T>(packed, [&](auto V) {                                                         \
            bias_relu<V>(z, mask, bias, stride, n_rows, n_columns, n);                            \
        });                                                                                       \
    }                                                                                             \
    extern "C" __global__ void bias_backward_##S(                                                 \
        T* dbias, i64 stride, T* dz, T* partial, u32* tickets, const T* dy, const u32* mask,      \
        i64 n_models, i64 n, i64 n_columns, i64 width, i64 n_chunks, i64 chunk_rows,              \
        i64 accumulate)                                                                           \
    {                                                                                             \
        bool packed = aligned16(dz, dy) && n % pack_size<T> == 0 && width % pack_size<T> == 0;    \
        by_width<T>(packed, [&](auto V) {                                                         \
            bias_backward<V>(dbias, stride, dz, partial, tickets, dy, mask, n_models, n,          \
                             n_columns, width, n_chunks, chunk_rows, accumulate);                 \
        });                                                                                       \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
