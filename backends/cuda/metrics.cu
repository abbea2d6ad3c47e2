// What metrics count and add up. Integers are added by atomics, floating-point numbers in order.

// Whether a of class i comes before b of class j: larger, or equal and of the lower class. NaN is
// larger than any number, as in NumPy.
template <typename T> __device__ inline bool before(T a, i64 i, T b, i64 j)
{
    bool equal = a == b || (a != a && b != b);
    return equal ? i < j : a > b || a != a;
}

template <typename T> struct Best {
    T score;
    i64 j;
};

template <typename T> __device__ inline Best<T> shuffle(Best<T> best, int distance)
{
    return {shuffle(best.score, distance), shuffle(best.j, distance)};
}

// Where a thread begins with a row z: in global memory so that a warp reads from a boundary on,
// which may be before the row.
template <typename T> __device__ inline i64 begin(Lanes team, const T* z) { return team.rank(); }
template <typename T> __device__ inline i64 begin(WholeBlock team, const T* z)
{
    return team.rank() - (i64)((u64)z / sizeof(T) % 32);
}

// Calls f(team, k, i, z, there) in all threads of a block for rows i of model k, whose `width`
// scores are z; a thread for which `there` is false has another's row. A row has `lanes` threads:
// up to 32, and a block takes a tile of rows by way of shared memory; or a block.
template <typename T, class F>
__device__ inline void each_row(const T* scores, i64 n_models, i64 n, i64 width, i64 lanes, F f)
{
    extern __shared__ int4 space[];
    if (lanes > 32) {
        for (i64 r = blockIdx.x; r < n_models * n; r += gridDim.x)
            f(WholeBlock(), r / n, r % n, scores + r * width, true);
        return;
    }
    i64 tile = THREADS / lanes, tiles = ceil_div(n, tile), mine = threadIdx.x / lanes;
    for (i64 t = blockIdx.x; t < n_models * tiles; t += gridDim.x) {
        i64 k = t / tiles, i = (t - k * tiles) * tile, m = min(tile, n - i);
        const T* z = scores + (k * n + i) * width;
        T* kept = (T*)space + (u64)z / sizeof(T) % pack_size<T>;
        block_copy(kept, z, m * width);
        __syncthreads();
        i64 row = min(mine, m - 1);
        f(Lanes{(int)lanes}, k, i + row, kept + row * width, mine < m);
        __syncthreads();
    }
}

// Adds to total[k] how many of model k's n rows have their label among the `top` first classes.
// With `ignores`, rows of label `ignore` are left out, and total[n_models + k] gets how many are
// not.
template <typename T>
__device__ void count_correct(i64* total, const T* scores, const i64* labels, i64 lanes,
                              i64 n_models, i64 n, i64 n_classes, i64 n_labels, i64 top, i64 ignore,
                              i64 ignores)
{
    each_row(scores, n_models, n, n_classes, lanes,
             [&](auto team, i64 k, i64 i, const T* z, bool there) {
                 i64 label = labels[row_of(k, i, n, n_labels)];
                 bool valid = label >= 0 && label < n_classes;
                 T score = z[valid ? label : 0];
                 i64 rank = 0;
                 for (i64 j = begin(team, z); j < n_classes; j += team.size)
                     if (j >= 0) rank += before(z[j], j, score, label);
                 rank = team.reduce(rank, Plus());
                 bool counts = there && team.rank() == 0 && !(ignores && label == ignore);
                 int right = __syncthreads_count(counts && valid && rank < top);
                 int counted = __syncthreads_count(counts);
                 if (threadIdx.x != 0) return;
                 atomicAdd((u64*)total + k, (u64)right);
                 if (ignores) atomicAdd((u64*)total + n_models + k, (u64)counted);
             });
}

// Adds 1 to total[k, label, prediction] for each of model k's n rows. The prediction is given, or
// whether the one score is above the threshold, or the class of the largest of the scores.
template <typename T>
__device__ void confusion(i64* total, const T* scores, const i64* predicted, const i64* labels,
                          double threshold, i64 lanes, i64 n_models, i64 n, i64 width,
                          i64 n_classes, i64 n_labels, i64 by_threshold)
{
    each_row(scores, n_models, n, width, lanes,
             [&](auto team, i64 k, i64 i, const T* z, bool there) {
                 i64 label = labels[row_of(k, i, n, n_labels)], p = 0;
                 if (predicted) {
                     p = predicted[k * n + i];
                 } else if (by_threshold) {
                     p = z[0] > T(threshold);
                 } else {
                     Best<T> best = {z[0], 0};
                     for (i64 j = begin(team, z); j < width; j += team.size)
                         if (j > 0 && before(z[j], j, best.score, best.j)) best = {z[j], j};
                     p = team.reduce(best, [](Best<T> a, Best<T> b) {
                                 return before(b.score, b.j, a.score, a.j) ? b : a;
                             }).j;
                 }
                 bool valid = label >= 0 && label < n_classes && p >= 0 && p < n_classes;
                 if (there && team.rank() == 0 && valid)
                     atomicAdd((u64*)total + (k * n_classes + label) * n_classes + p, 1ull);
             });
}

// Adds to total[k, c] the sum of model k's n terms of column c, in float64. A block takes `part`
// rows, the last block adds up in order.
template <typename T>
__device__ void add_sums(double* total, double* partial, u32* ticket, const T* terms, i64 n_models,
                         i64 n, i64 columns, i64 part)
{
    __shared__ double sums[THREADS];
    i64 parts = ceil_div(n, part);
    int t = threadIdx.x;
    for (i64 p = blockIdx.x; p < n_models * parts; p += gridDim.x) {
        i64 k = p / parts, first = (p - k * parts) * part, stop = min(first + part, n);
        for (i64 c = 0; c < columns; c += THREADS) {
            // as many rows at a time as fit beside each other, rounded down to a power of two
            int width = (int)min((i64)THREADS, columns - c), rows = 1;
            while (2 * rows * width <= THREADS) rows *= 2;
            double sum = 0;
            if (t < rows * width)
                for (i64 i = first + t / width; i < stop; i += rows)
                    sum += terms[(k * n + i) * columns + c + t % width];
            sums[t] = sum;
            __syncthreads();
            for (int half = rows / 2; half > 0; half /= 2) {
                if (t < half * width) sums[t] += sums[t + half * width];
                __syncthreads();
            }
            if (t < width) partial[p * columns + c + t] = sums[t];
            __syncthreads();
        }
    }
    if (!last_block(ticket)) return;
    for (i64 i = t; i < n_models * columns; i += THREADS) {
        i64 k = i / columns;
        total[i] += sum_shared(partial + k * (parts - 1) * columns + i, parts, columns);
    }
}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void count_correct_##S(i64* total, const T* scores, const i64* labels,  \
                                                 i64 lanes, i64 n_models, i64 n, i64 n_classes,   \
                                                 i64 n_labels, i64 top, i64 ignore, i64 ignores)  \
    {                                                                                             \
        count_correct(total, scores, labels, lanes, n_models, n, n_classes, n_labels, top,        \
                      ignore, ignores);                                                           \
    }                                                                                             \
    extern "C" __global__ void confusion_##S(                                                     \
        i64* total, const T* scores, const i64* predicted, const i64* labels, double threshold,   \
        i64 lanes, i64 n_models, i64 n, i64 width, i64 n_classes, i64 n_labels, i64 by_threshold) \
    {                                                                                             \
        confusion(total, scores, predicted, labels, threshold, lanes, n_models, n, width,         \
                  n_classes, n_labels, by_threshold);                                             \
    }                                                                                             \
    extern "C" __global__ void add_sums_##S(double* total, double* partial, u32* ticket,          \
                                            const T* terms, i64 n_models, i64 n, i64 columns,     \
                                            i64 part)                                             \
    {                                                                                             \
        add_sums(total, partial, ticket, terms, n_models, n, columns, part);                      \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
