// Dropout. Element i, in row-major order, is dropped where the 32-bit word i of a Philox4x64-10
// stream is below the threshold; word for word what nnx/backends/philox.py takes from NumPy.
// Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.

struct Block { u64 word[4]; };

// The block at counter (index, use, 0, step), lowest word first, under the key (seed, stream).
__device__ inline Block philox(u64 index, u64 use, u64 step, u64 seed, u64 stream)
{
    u64 c0 = index, c1 = use, c2 = 0, c3 = step, k0 = seed, k1 = stream;
    for (int round = 0; round < 10; ++round) {
        u64 high0 = __umul64hi(0xD2E7470EE14C6C93ull, c0), low0 = 0xD2E7470EE14C6C93ull * c0;
        u64 high1 = __umul64hi(0xCA5A826395121157ull, c2), low1 = 0xCA5A826395121157ull * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B97F4A7C15ull; // the golden ratio
        k1 += 0xBB67AE8584CAA73Bull; // sqrt(3) - 1
    }
    return {{c0, c1, c2, c3}};
}

template <typename T, int V> __device__ inline void drop(Pack<T, V>& v, u32 kept, T factor)
{
    for (int j = 0; j < V; ++j) v.at[j] = kept >> j & 1 ? v.at[j] * factor : T(0);
}

// y[i] = kept ? x[i] * scale : 0. A lane makes one Philox block, eight 32-bit words, and with them
// one byte of the mask: bit i % 8 of byte i / 8 is set where x[i] is kept. Then the warp goes
// through its 256 elements, V to a lane, so that neighbors load from neighboring addresses. NumPy's
// first block is at counter 1. counters[0] is the number of the step.
template <int V, typename T>
__device__ void dropout(T* y, u8* mask, const T* x, const i64* counters, u64 seed, u64 stream,
                        u64 use, u64 threshold, double scale, i64 n)
{
    u64 number = (u64)counters[0];
    T factor = T(scale);
    int lane = threadIdx.x % 32;
    i64 step = (i64)gridDim.x * THREADS, n_blocks = ceil_div(n, 8);
    for (i64 b = (i64)blockIdx.x * THREADS + threadIdx.x; b - lane < n_blocks; b += step) {
        Block random = philox((u64)b + 1, use, number, seed, stream);
        u32 kept = 0;
        for (int j = 0; j < 8; ++j) {
            u64 word = random.word[j / 2] >> (j % 2 * 32) & ALL; // low half first
            if (word >= threshold) kept |= 1u << j;
        }
        if (b < n_blocks) mask[b] = (u8)kept;
        for (int e = lane * V; e < 256; e += 32 * V) { // element of the warp
            u32 bits = __shfl_sync(ALL, kept, e / 8) >> e % 8;
            i64 i = (b - lane) * 8 + e;
            Pack<T, V> v = load_pack<V>(x + i, n - i);
            drop(v, bits, factor);
            store_pack(y + i, v, n - i);
        }
    }
}

// dx[i] = kept ? dy[i] * scale : 0.
template <int V, typename T>
__device__ void dropout_backward(T* dx, const T* dy, const u8* mask, double scale, i64 n)
{
    T factor = T(scale);
    i64 step = (i64)gridDim.x * THREADS * V;
    for (i64 i = ((i64)blockIdx.x * THREADS + threadIdx.x) * V; i < n; i += step) {
        Pack<T, V> v = load_pack<V>(dy + i, n - i);
        drop(v, (u32)mask[i / 8] >> i % 8, factor);
        store_pack(dx + i, v, n - i);
    }
}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void dropout_##S(T* y, u8* mask, const T* x, const i64* counters,       \
                                           u64 seed, u64 stream, u64 use, u64 threshold,          \
                                           double scale, i64 n)                                   \
    {                                                                                             \
        by_width<T>(aligned16(y, x), [&](auto V) {                                                \
            dropout<V>(y, mask, x, counters, seed, stream, use, threshold, scale, n);             \
        });                                                                                       \
    }                                                                                             \
    extern "C" __global__ void dropout_backward_##S(T* dx, const T* dy, const u8* mask,           \
                                                    double scale, i64 n)                          \
    {                                                                                             \
        by_width<T>(aligned16(dx, dy), [&](auto V) {                                              \
            dropout_backward<V>(dx, dy, mask, scale, n);                                          \
        });                                                                                       \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
