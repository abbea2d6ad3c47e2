// Put before each .cu file when it is compiled. NVRTC: no host headers, no INFINITY.
//
// Conventions: extern "C" kernels `<op>_f32` and `<op>_f64` around one template; scalars are
// `long long` and `double`; every index is 64-bit; blocks are 256 threads, the grid is 1-D and any
// size; arrays are C-contiguous. No floating-point atomics: every sum has one fixed order, so
// results repeat bit for bit.
#pragma once

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

#define THREADS 256
#define WARPS (THREADS / 32)
#define ALL 0xffffffffu

// V elements side by side: pack_size<T>, moved by one instruction of 16 bytes, or 1.
template <typename T> constexpr int pack_size = 16 / sizeof(T);
template <typename T, int V = pack_size<T>> struct alignas(V * sizeof(T)) Pack { T at[V]; };

template <typename... T> __device__ inline bool aligned16(const T*... p)
{
    return ((... | (u64)p) & 15) == 0;
}

// With these the compiler doesn't take a pack apart, as it does now and then.
__device__ inline float4 vector_of(const Pack<float>& v)
{
    return make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
}
__device__ inline double2 vector_of(const Pack<double>& v)
{
    return make_double2(v.at[0], v.at[1]);
}
__device__ inline Pack<float> pack_of(const float4& w) { return {{w.x, w.y, w.z, w.w}}; }
__device__ inline Pack<double> pack_of(const double2& w) { return {{w.x, w.y}}; }

// Elements p[0] to p[V - 1] in global memory, of which `left` exist; the others are 0. p is aligned
// to 16 bytes unless V is 1.
template <int V, typename T> __device__ inline Pack<T, V> load_pack(const T* p, i64 left = V)
{
    Pack<T, V> v;
    if constexpr (V > 1) {
        if (left >= V) return pack_of(__ldca((const decltype(vector_of(v))*)p));
    }
    for (int j = 0; j < V; ++j) v.at[j] = j < left ? p[j] : T(0);
    return v;
}

template <int V, typename T>
__device__ inline void store_pack(T* p, const Pack<T, V>& v, i64 left = V)
{
    if constexpr (V > 1) {
        if (left >= V) return __stwb((decltype(vector_of(v))*)p, vector_of(v));
    }
    for (int j = 0; j < V; ++j)
        if (j < left) p[j] = v.at[j];
}

template <int V> struct Width {
    __device__ constexpr operator int() const { return V; }
};

// Calls f(width) where width is how many T to take at a time: a pack, or one.
template <typename T, class F> __device__ inline void by_width(bool packed, F f)
{
    if (packed)
        f(Width<pack_size<T>>());
    else
        f(Width<1>());
}

// a / b, neither negative: a 32-bit division where that is enough is several times cheaper.
__device__ inline i64 quotient(i64 a, i64 b)
{
    return (a | b) >> 31 ? a / b : (i64)((u32)a / (u32)b);
}

__device__ inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// The place of row i of model k, which has n, in an array with rows of its own for each model, or
// with n that are for all.
__device__ inline i64 row_of(i64 k, i64 i, i64 n, i64 n_rows)
{
    return n_rows == n ? i : k * n + i;
}

__device__ inline void lowest(float& x) { x = __int_as_float(0xff800000); }
__device__ inline void lowest(double& x) { x = __longlong_as_double(0xfff0000000000000ll); }
__device__ inline void not_a_number(float& x) { x = __int_as_float(0x7fffffff); }
__device__ inline void not_a_number(double& x) { x = __longlong_as_double(0x7fffffffffffffffll); }

// True in every thread of the block that comes last of n, by default of the grid; it then sees what
// all others have written. The ticket is an integer, 0 before and 0 after.
__device__ inline bool last_block(u32* ticket, u32 n = gridDim.x)
{
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicInc(ticket, n - 1) == n - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// A value another block has written during this kernel: read past this block's own cache.
template <typename T> __device__ inline T read_shared(const T* p)
{
    return *(const volatile T*)p;
}

// The sum of such values, `apart` from each other, in order; there is one at least.
template <typename T> __device__ inline T sum_shared(const T* p, i64 count, i64 apart)
{
    T sum = read_shared(p);
#pragma unroll 8
    for (i64 i = 1; i < count; ++i) sum += read_shared(p + i * apart);
    return sum;
}

// ---- teams: the threads that share a row, and what they find out together -----------------------

template <typename T> __device__ inline T shuffle(T v, int distance)
{
    return __shfl_xor_sync(ALL, v, distance);
}

// `size` neighbors of a warp; a power of two up to 32. All lanes of the warp must call `reduce`.
struct Lanes {
    int size;
    __device__ int rank() const { return threadIdx.x & (size - 1); }

    // f over the values of all, in every thread and in one order; f(a, b) must be f(b, a).
    template <typename T, class F> __device__ T reduce(T v, F f) const
    {
        for (int d = size / 2; d > 0; d /= 2) v = f(v, shuffle(v, d));
        return v;
    }
};

struct WholeBlock {
    static constexpr int size = THREADS;
    __device__ int rank() const { return threadIdx.x; }

    template <typename T, class F> __device__ T reduce(T v, F f) const
    {
        __shared__ T partial[WARPS];
        v = Lanes{32}.reduce(v, f);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
        __syncthreads();
        v = partial[0];
        for (int w = 1; w < WARPS; ++w) v = f(v, partial[w]);
        __syncthreads();
        return v;
    }
};

struct Plus {
    template <typename T> __device__ T operator()(T a, T b) const { return a + b; }
};

struct Larger {
    template <typename T> __device__ T operator()(T a, T b) const { return b > a ? b : a; }
};

// to[i] = from[i] for i < n, by the block; 16 bytes at a time if both are as far from a boundary.
template <typename T> __device__ inline void block_copy(T* to, const T* from, int n)
{
    const int width = pack_size<T>;
    int head = min(n, (int)(-(u64)from / sizeof(T) % width));
    if (((u64)to - (u64)from) % 16) head = n;
    int packs = (n - head) / width, tail = head + packs * width;
#pragma unroll 1
    for (int i = threadIdx.x; i < head; i += THREADS) to[i] = from[i];
    for (int i = threadIdx.x; i < packs; i += THREADS)
        ((int4*)(to + head))[i] = ((const int4*)(from + head))[i];
    if (tail + threadIdx.x < n) to[tail + threadIdx.x] = from[tail + threadIdx.x];
}
