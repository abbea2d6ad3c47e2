// How a batch is gathered from the data set.

struct Rows {
    u8* y;
    const u8* x;
    i64 words; // of a row
    int size;  // of a word: the largest power of 2 up to 16 that divides width and addresses
};

__device__ inline Rows make_rows(void* y, const void* x, i64 width)
{
    u64 common = (u64)y | (u64)x | (u64)width | 16;
    int size = (int)(common & -common);
    return {(u8*)y, (const u8*)x, width / size, size};
}

template <typename Word> __device__ inline void copy_word(const Rows& a, const i64* order, i64 i)
{
    i64 row = quotient(i, a.words);
    ((Word*)a.y)[i] = ((const Word*)a.x)[order[row] * a.words + (i - row * a.words)];
}

__device__ inline void copy_word(const Rows& a, const i64* order, i64 i)
{
    switch (a.size) {
    case 16: return copy_word<uint4>(a, order, i);
    case 8: return copy_word<u64>(a, order, i);
    case 4: return copy_word<u32>(a, order, i);
    case 2: return copy_word<unsigned short>(a, order, i);
    default: return copy_word<u8>(a, order, i);
    }
}

// Row i of each y is row order[counters[1] * batch_size + i] of its x, for i < n. Rows are copied
// as bytes, so one kernel serves every dtype; w is a row's width in bytes, 0 where there is no x.
extern "C" __global__ void gather_rows(void* y0, void* y1, void* y2, const void* x0, const void* x1,
                                       const void* x2, const i64* order, const i64* counters,
                                       i64 w0, i64 w1, i64 w2, i64 batch_size, i64 n)
{
    order += counters[1] * batch_size;
    Rows a = make_rows(y0, x0, w0), b = make_rows(y1, x1, w1), c = make_rows(y2, x2, w2);
    i64 to_a = n * a.words, to_b = to_a + n * b.words, to_c = to_b + n * c.words;
    i64 step = (i64)gridDim.x * THREADS;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < to_c; i += step) {
        Rows from = i < to_a ? a : i < to_b ? b : c;
        copy_word(from, order, i - (i < to_a ? 0 : i < to_b ? to_a : to_b));
    }
}
