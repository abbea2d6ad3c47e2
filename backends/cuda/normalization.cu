// Normalization over the features (layer_norm, also for RMSNorm) and over the samples (batch_norm).
//
// x and y are n_models batches (n, n_columns), one after the other; n_x is the number of rows of x,
// which is n where one batch is for all models. Weight, bias and their gradients are vectors of
// n_columns, that of model k at k * stride: they may be views of the flat vector. Statistics are
// packed. A null weight is 1, a null bias 0, and without a mean nothing is subtracted.
//
// How a sum is divided among lanes, warps and blocks follows from shape and dtype alone. Squares
// are those of differences, summed in a second pass over registers: E[x^2] - E[x]^2 would cancel.
//
// Registers hold what a block works on, so that memory is read once; no architecture spills. Of the
// forward kernels two blocks fit on a multiprocessor, of layer_norm since it is bounded to 128
// registers. Of the backward kernels, with up to 228, one has to be enough: with 128 they spill,
// and with smaller tiles more batches are higher than one and are read twice. Their grids are
// short, a block for WIDTH columns or for 24 rows or more, and each thread has 32 loads under way
// at once.

#define FAN 32  // partial sums that one block adds up
#define WIDTH 8 // columns of a block: at least one sector of 32 bytes

// ---- over the features: `lanes` threads share a row, a warp or the whole block ------------------

template <typename T> __device__ inline T row_sum(T v, int lanes)
{
    return lanes == 32 ? Lanes{32}.reduce(v, Plus()) : WholeBlock().reduce(v, Plus());
}

// The columns of a row that belong to a thread: packs of 16 bytes if the row is a multiple of that,
// else single ones `lanes` apart. Those that come first have a slot in registers.
template <typename T> struct Columns {
    static constexpr int PACK = pack_size<T>, SLOTS = 64 / sizeof(T);
    i64 n;
    int lanes, lane, start, apart;
    u32 mine; // bit s is set if slot s has a column

    __device__ Columns(i64 n, int lanes) : n(n), lanes(lanes), lane(threadIdx.x % lanes), mine(0)
    {
        apart = n % PACK ? lanes : 1;
        start = n % PACK ? lane : lane * PACK;
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) mine |= (u32)(column(s) < n) << s;
    }
    __device__ int column(int s) const
    {
        return start + s / PACK * PACK * lanes + s % PACK * apart;
    }
    // f(slot) for the columns that have one.
    template <typename F> __device__ void each(F f) const
    {
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            if (mine >> s & 1) f(s);
        }
    }
    // f(column) for the others, which every pass reads again.
    template <typename F> __device__ void rest(F f) const
    {
        for (i64 c = SLOTS * lanes + lane; c < n; c += lanes) f(c);
    }
    __device__ bool packed(const T* row) const { return apart == 1 && aligned16(row); }

    // f(slot, row[column]). Not by load_pack: here it takes 20 registers more.
    template <typename F> __device__ void read(const T* row, F f) const
    {
        bool whole = packed(row);
#pragma unroll
        for (int s = 0; s < SLOTS; s += PACK) {
            Pack<T> v;
            if (whole) {
                if (mine >> s & 1) v = *(const Pack<T>*)(row + column(s));
            } else {
#pragma unroll
                for (int e = 0; e < PACK; ++e) {
                    if (mine >> (s + e) & 1) v.at[e] = row[column(s + e)];
                }
            }
#pragma unroll
            for (int e = 0; e < PACK; ++e) {
                if (mine >> (s + e) & 1) f(s + e, v.at[e]);
            }
        }
    }
    // row[column] = at[slot]
    __device__ void write(T* row, const T* at) const
    {
        bool whole = packed(row);
#pragma unroll
        for (int s = 0; s < SLOTS; s += PACK) {
            Pack<T> v;
#pragma unroll
            for (int e = 0; e < PACK; ++e) v.at[e] = at[s + e];
            if (whole) {
                if (mine >> s & 1) *(Pack<T>*)(row + column(s)) = v;
            } else {
#pragma unroll
                for (int e = 0; e < PACK; ++e) {
                    if (mine >> (s + e) & 1) row[column(s + e)] = v.at[e];
                }
            }
        }
    }
};

// y = (x - mean) * rstd * weight + bias; mean and rstd of each row are written.
template <typename T>
__device__ void layer_norm(T* y, T* mean, T* rstd, const T* x, const T* weight, const T* bias,
                           double eps, i64 stride, i64 n_models, i64 n, i64 n_x, i64 n_columns,
                           int lanes)
{
    Columns<T> own(n_columns, lanes);
    int at_once = THREADS / lanes;
    for (i64 r = (i64)blockIdx.x * at_once + threadIdx.x / lanes; r < n_models * n;
         r += (i64)gridDim.x * at_once) {
        i64 k = quotient(r, n);
        const T* from = x + row_of(k, r - k * n, n, n_x) * n_columns;
        T v[own.SLOTS] = {}, shift = T(0), squares = T(0);
        own.read(from, [&](int s, T a) { v[s] = a; });
        if (mean) {
            T sum = T(0);
            own.each([&](int s) { sum += v[s]; });
            own.rest([&](i64 c) { sum += from[c]; });
            shift = row_sum(sum, lanes) / T(n_columns);
        }
        own.each([&](int s) {
            v[s] -= shift;
            squares += v[s] * v[s];
        });
        own.rest([&](i64 c) { squares += (from[c] - shift) * (from[c] - shift); });
        T scale = T(1) / sqrt(row_sum(squares, lanes) / T(n_columns) + T(eps));
        if (own.lane == 0) {
            if (mean) mean[r] = shift;
            rstd[r] = scale;
        }
        const T* w = weight ? weight + k * stride : nullptr;
        const T* b = bias ? bias + k * stride : nullptr;
        T* to = y + r * n_columns;
        own.each([&](int s) { v[s] *= scale; });
        if (w) own.read(w, [&](int s, T a) { v[s] *= a; });
        if (b) own.read(b, [&](int s, T a) { v[s] += a; });
        own.write(to, v);
        own.rest([&](i64 c) {
            T a = (from[c] - shift) * scale;
            if (w) a *= w[c];
            to[c] = b ? a + b[c] : a;
        });
    }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dy * weight, unless dx is null; and
// dweight = sum(dy * xhat), dbias = sum(dy) over rows, unless they are null: only where all columns
// have a slot. A block sums up `group` rows at a time into a row of partial, which holds one for
// each of the n_groups of a model; the last of FAN blocks to finish adds up theirs, and the last
// of those all of the model. tickets: ceil(n_groups / FAN) + 1 for each model.
template <typename T>
__device__ void layer_norm_backward(T* dx, T* dweight, T* dbias, T* partial, u32* tickets,
                                    const T* dy, const T* x, const T* mean, const T* rstd,
                                    const T* weight, i64 stride, i64 n_models, i64 n, i64 n_x,
                                    i64 n_columns, int lanes, i64 group, i64 n_groups,
                                    i64 add_weight, i64 add_bias)
{
    Columns<T> own(n_columns, lanes);
    i64 nodes = ceil_div(n_groups, FAN);
    i64 before = dweight ? n_columns : 0, width = before + (dbias ? n_columns : 0);
    for (i64 item = blockIdx.x; item < n_models * n_groups; item += gridDim.x) {
        i64 k = item / n_groups, g = item % n_groups, end = min((g + 1) * group, n);
        const T* w = weight ? weight + k * stride : nullptr;
        T dw[own.SLOTS] = {}, db[own.SLOTS] = {};
        for (i64 i = g * group + threadIdx.x / lanes; i < end; i += THREADS / lanes) {
            i64 r = k * n + i;
            const T *from = x + row_of(k, i, n, n_x) * n_columns, *above = dy + r * n_columns;
            T shift = mean ? mean[r] : T(0), scale = rstd[r];
            T xhat[own.SLOTS] = {}, d[own.SLOTS] = {}, along = T(0), level = T(0);
            own.read(from, [&](int s, T a) { xhat[s] = (a - shift) * scale; });
            own.read(above, [&](int s, T a) { d[s] = a; });
            own.each([&](int s) {
                dw[s] += d[s] * xhat[s];
                db[s] += d[s];
            });
            if (!dx) continue;
            if (w) own.read(w, [&](int s, T a) { d[s] *= a; });
            own.each([&](int s) {
                along += d[s] * xhat[s];
                level += d[s];
            });
            own.rest([&](i64 c) {
                T a = w ? above[c] * w[c] : above[c];
                along += a * ((from[c] - shift) * scale);
                level += a;
            });
            along = row_sum(along, lanes) / T(n_columns);
            level = mean ? row_sum(level, lanes) / T(n_columns) : T(0);
            own.each([&](int s) { d[s] = (d[s] - level - xhat[s] * along) * scale; });
            own.write(dx + r * n_columns, d);
            own.rest([&](i64 c) {
                T a = w ? above[c] * w[c] : above[c];
                dx[r * n_columns + c] = (a - level - (from[c] - shift) * scale * along) * scale;
            });
        }
        if (!width) continue;

        T *of_model = partial + k * n_groups * width, *mine = of_model + g * width;
        if (lanes == 32) { // the warps add their sums one after the other
            __shared__ T total[2][32 * own.SLOTS];
            for (int warp = 0; warp < WARPS; ++warp) {
                if (threadIdx.x / 32 == warp) {
                    own.each([&](int s) {
                        int c = own.column(s);
                        total[0][c] = warp ? total[0][c] + dw[s] : dw[s];
                        total[1][c] = warp ? total[1][c] + db[s] : db[s];
                    });
                }
                __syncthreads();
            }
            for (i64 c = threadIdx.x; c < width; c += THREADS)
                mine[c] = c < before ? total[0][c] : total[1][c - before];
        } else {
            if (dweight) own.write(mine, dw);
            if (dbias) own.write(mine + before, db);
        }

        i64 node = g / FAN, members = min(n_groups - node * FAN, (i64)FAN), apart = width;
        u32* ticket = tickets + k * (nodes + 1);
        if (!last_block(ticket + node, members)) continue;
        if (nodes > 1) {
            T* at = of_model + node * FAN * width;
            for (i64 c = threadIdx.x; c < width; c += THREADS)
                at[c] = sum_shared(at + c, members, apart);
            if (!last_block(ticket + nodes, nodes)) continue;
            apart = FAN * width;
            members = nodes;
        }
        for (i64 c = threadIdx.x; c < width; c += THREADS) {
            T* out = (c < before ? dweight + c : dbias + (c - before)) + k * stride;
            T sum = sum_shared(of_model + c, members, apart);
            *out = (c < before ? add_weight : add_bias) ? *out + sum : sum;
        }
    }
}

// ---- over the samples: a block has WIDTH columns and SLOTS rows per thread ----------------------

// Sum over the threads of a column, the same in all of them.
template <typename T> __device__ inline T column_sum(T v)
{
    __shared__ T partial[WARPS][WIDTH];
    for (int lane = WIDTH; lane < 32; lane *= 2) v += __shfl_xor_sync(ALL, v, lane);
    if (threadIdx.x % 32 < WIDTH) partial[threadIdx.x / 32][threadIdx.x % 32] = v;
    __syncthreads();
    T total = partial[0][threadIdx.x % WIDTH];
    for (int w = 1; w < WARPS; ++w) total += partial[w][threadIdx.x % WIDTH];
    __syncthreads();
    return total;
}

// One of the pieces into which the batches are cut: WIDTH columns, and as many rows as have a slot
// in the registers of the block's threads.
template <typename T> struct Tile {
    static constexpr int ROWS = THREADS / WIDTH, SLOTS = 128 / sizeof(T), HEIGHT = ROWS * SLOTS;
    i64 n, n_columns;       // of a batch
    i64 across, down;       // tiles of a batch
    i64 k, tile, chunk;     // model, place in the batch
    i64 c, row;             // this thread's column and first row
    u32 mine;               // bit s is set if slot s has a row
    i64 batch, vector, one; // where x and dy, the statistics and the only batch of x begin

    __device__ Tile(i64 n, i64 n_columns)
        : n(n), n_columns(n_columns), across(ceil_div(n_columns, WIDTH)),
          down(max(ceil_div(n, HEIGHT), (i64)1))
    {
    }
    __device__ void at(i64 item)
    {
        tile = item % across;
        chunk = item / across % down;
        k = item / (across * down);
        c = tile * WIDTH + threadIdx.x % WIDTH;
        row = chunk * HEIGHT + threadIdx.x / WIDTH;
        i64 rows = c < n_columns && row < n ? min(ceil_div(n - row, ROWS), (i64)SLOTS) : 0;
        mine = (u32)((1ull << rows) - 1);
        vector = k * n_columns + c;
        one = row * n_columns + c;
        batch = k * n * n_columns + one;
    }
    __device__ bool first() const { return threadIdx.x < WIDTH && c < n_columns; } // of a column
    __device__ i64 height(i64 chunk) const { return min(n - chunk * HEIGHT, (i64)HEIGHT); }
    // Where this column keeps number `which` of two for each chunk.
    __device__ i64 place(i64 chunk, int which) const
    {
        return (((k * across + tile) * down + chunk) * 2 + which) * WIDTH + threadIdx.x % WIDTH;
    }
    // f(slot, elements from its first row) for the rows of this thread.
    template <typename F> __device__ void each(F f) const
    {
        i64 step = ROWS * n_columns;
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            if (mine >> s & 1) f(s, s * step);
        }
    }
    // f(elements from its first row), where nothing has to stay in registers
    template <typename F> __device__ void walk(F f) const
    {
        int rows = __popc(mine);
#pragma unroll 4
        for (int s = 0; s < rows; ++s) f(s * (ROWS * n_columns));
    }
    // f(chunk) for every ROWS-th chunk.
    template <typename F> __device__ void chunks(F f) const
    {
        for (i64 j = threadIdx.x / WIDTH; j < down; j += ROWS) f(j);
    }
};

// Mean and rstd of each column, and the running statistics. If the batch is one tile high y is
// written too; else each tile leaves its mean and its sum of squares in partial, and the last of
// those below each other joins them. tickets: one for each model and tile across.
template <typename T>
__device__ void batch_norm(T* y, T* mean, T* rstd, T* running_mean, T* running_var, T* partial,
                           u32* tickets, const T* x, const T* weight, const T* bias, double eps,
                           double momentum, i64 stride, i64 n_models, i64 n, i64 n_x,
                           i64 n_columns)
{
    Tile<T> own(n, n_columns);
    for (i64 item = blockIdx.x; item < n_models * own.across * own.down; item += gridDim.x) {
        own.at(item);
        const T* from = x + (n_x == n ? own.one : own.batch);
        T v[own.SLOTS] = {}, sum = T(0), squares = T(0);
        own.each([&](int s, i64 i) { v[s] = from[i]; });
        own.each([&](int s, i64) { sum += v[s]; });
        T average = column_sum(sum) / T(own.height(own.chunk));
        own.each([&](int s, i64) { squares += (v[s] - average) * (v[s] - average); });
        squares = column_sum(squares);
        if (own.down > 1) {
            if (threadIdx.x < WIDTH) {
                partial[own.place(own.chunk, 0)] = average;
                partial[own.place(own.chunk, 1)] = squares;
            }
            if (!last_block(tickets + own.k * own.across + own.tile, own.down)) continue;
            T total = T(0);
            own.chunks([&](i64 j) {
                total += T(own.height(j)) * read_shared(partial + own.place(j, 0));
            });
            average = column_sum(total) / T(n);
            total = T(0);
            own.chunks([&](i64 j) {
                T d = read_shared(partial + own.place(j, 0)) - average;
                total += read_shared(partial + own.place(j, 1)) + T(own.height(j)) * (d * d);
            });
            squares = column_sum(total);
        }
        T variance = squares / T(n), scale = T(1) / sqrt(variance + T(eps));
        if (own.first()) {
            i64 j = own.vector;
            mean[j] = average;
            rstd[j] = scale;
            T keep = T(1 - momentum), unbiased = T(momentum * n / (n - 1));
            running_mean[j] = keep * running_mean[j] + T(momentum) * average;
            running_var[j] = keep * running_var[j] + unbiased * variance;
        }
        if (own.down > 1) continue;
        T w = weight && own.mine ? weight[own.k * stride + own.c] : T(1);
        T b = bias && own.mine ? bias[own.k * stride + own.c] : T(0);
        T* to = y + own.batch;
        own.each([&](int s, i64 i) { to[i] = (v[s] - average) * scale * w + b; });
    }
}

// y from given statistics: mean and rstd, or running mean and running variance (`evaluate`), which
// are then written to mean and rstd.
template <typename T>
__device__ void batch_norm_apply(T* y, T* mean, T* rstd, const T* x, const T* given_mean,
                                 const T* given, const T* weight, const T* bias, double eps,
                                 i64 evaluate, i64 stride, i64 n_models, i64 n, i64 n_x,
                                 i64 n_columns)
{
    Tile<T> own(n, n_columns);
    for (i64 item = blockIdx.x; item < n_models * own.across * own.down; item += gridDim.x) {
        own.at(item);
        if (own.c >= n_columns) continue;
        T average = given_mean[own.vector], scale = given[own.vector];
        if (evaluate) {
            scale = T(1) / sqrt(scale + T(eps));
            if (own.first() && own.chunk == 0) {
                mean[own.vector] = average;
                rstd[own.vector] = scale;
            }
        }
        const T* from = x + (n_x == n ? own.one : own.batch);
        T w = weight ? weight[own.k * stride + own.c] : T(1);
        T b = bias ? bias[own.k * stride + own.c] : T(0);
        T* to = y + own.batch;
        own.walk([&](i64 i) { to[i] = (from[i] - average) * scale * w + b; });
    }
}

// dweight = sum(dy * xhat) and dbias = sum(dy) over rows, unless they are null. In training dx =
// rstd * weight * (dy - dbias / n - xhat * dweight / n) takes both sums first: it is written if the
// batch is one tile high, else the sums are left in sums (n_models, 2, n_columns) for
// batch_norm_backward_apply. In evaluation dx = rstd * weight * dy. With by_row the statistics are
// those of layer_norm, one for each row. tickets and partial as in batch_norm.
template <typename T>
__device__ void batch_norm_backward(T* dx, T* dweight, T* dbias, T* sums, T* partial, u32* tickets,
                                    const T* dy, const T* x, const T* mean, const T* rstd,
                                    const T* weight, i64 training, i64 by_row, i64 stride,
                                    i64 n_models, i64 n, i64 n_x, i64 n_columns, i64 add_weight,
                                    i64 add_bias)
{
    Tile<T> own(n, n_columns);
    for (i64 item = blockIdx.x; item < n_models * own.across * own.down; item += gridDim.x) {
        own.at(item);
        const T *from = x + (n_x == n ? own.one : own.batch), *above = dy + own.batch;
        T* to = dx + own.batch;
        T xhat[own.SLOTS] = {}, d[own.SLOTS] = {}, along = T(0), level = T(0);
        own.each([&](int s, i64 i) {
            xhat[s] = from[i];
            d[s] = above[i];
        });
        T average = T(0), scale = T(1);
        if (!by_row && own.mine) {
            average = mean[own.vector];
            scale = rstd[own.vector];
        }
        own.each([&](int s, i64) {
            if (by_row) {
                i64 r = own.k * n + own.row + s * own.ROWS;
                average = mean ? mean[r] : T(0);
                scale = rstd[r];
            }
            xhat[s] = (xhat[s] - average) * scale;
            along += d[s] * xhat[s];
            level += d[s];
        });
        along = column_sum(along);
        level = column_sum(level);
        T factor = dx && weight && own.mine ? scale * weight[own.k * stride + own.c] : scale;
        if (dx && !training) own.each([&](int s, i64 i) { to[i] = d[s] * factor; });
        if (own.down > 1) {
            if (threadIdx.x < WIDTH) {
                partial[own.place(own.chunk, 0)] = along;
                partial[own.place(own.chunk, 1)] = level;
            }
            if (!last_block(tickets + own.k * own.across + own.tile, own.down)) continue;
            along = level = T(0);
            own.chunks([&](i64 j) {
                along += read_shared(partial + own.place(j, 0));
                level += read_shared(partial + own.place(j, 1));
            });
            along = column_sum(along);
            level = column_sum(level);
        }
        if (own.first()) {
            i64 at = own.k * stride + own.c;
            if (dweight) dweight[at] = add_weight ? dweight[at] + along : along;
            if (dbias) dbias[at] = add_bias ? dbias[at] + level : level;
        }
        if (!dx || !training) continue;
        if (own.down == 1) {
            along /= T(n);
            level /= T(n);
            own.each([&](int s, i64 i) { to[i] = (d[s] - level - xhat[s] * along) * factor; });
        } else if (own.first()) {
            sums[2 * own.k * n_columns + own.c] = along;
            sums[(2 * own.k + 1) * n_columns + own.c] = level;
        }
    }
}

template <typename T>
__device__ void batch_norm_backward_apply(T* dx, const T* dy, const T* x, const T* mean,
                                          const T* rstd, const T* weight, const T* sums, i64 stride,
                                          i64 n_models, i64 n, i64 n_x, i64 n_columns)
{
    Tile<T> own(n, n_columns);
    for (i64 item = blockIdx.x; item < n_models * own.across * own.down; item += gridDim.x) {
        own.at(item);
        if (own.c >= n_columns) continue;
        const T *from = x + (n_x == n ? own.one : own.batch), *above = dy + own.batch;
        T* to = dx + own.batch;
        T along = sums[2 * own.k * n_columns + own.c] / T(n);
        T level = sums[(2 * own.k + 1) * n_columns + own.c] / T(n);
        T average = mean[own.vector], scale = rstd[own.vector];
        T factor = weight ? scale * weight[own.k * stride + own.c] : scale;
        own.walk([&](i64 i) {
            T xhat = (from[i] - average) * scale;
            to[i] = (above[i] - level - xhat * along) * factor;
        });
    }
}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) layer_norm_##S(                      \
        T* y, T* mean, T* rstd, const T* x, const T* weight, const T* bias, double eps,           \
        i64 stride, i64 n_models, i64 n, i64 n_x, i64 n_columns, i64 lanes)                       \
    {                                                                                             \
        layer_norm(y, mean, rstd, x, weight, bias, eps, stride, n_models, n, n_x, n_columns,      \
                   (int)lanes);                                                                   \
    }                                                                                             \
    extern "C" __global__ void layer_norm_backward_##S(                                           \
        T* dx, T* dweight, T* dbias, T* partial, u32* tickets, const T* dy, const T* x,           \
        const T* mean, const T* rstd, const T* weight, i64 stride, i64 n_models, i64 n, i64 n_x,  \
        i64 n_columns, i64 lanes, i64 group, i64 n_groups, i64 add_weight, i64 add_bias)          \
    {                                                                                             \
        layer_norm_backward(dx, dweight, dbias, partial, tickets, dy, x, mean, rstd, weight,      \
                            stride, n_models, n, n_x, n_columns, (int)lanes, group, n_groups,     \
                            add_weight, add_bias);                                                \
    }                                                                                             \
    extern "C" __global__ void batch_norm_##S(                                                    \
        T* y, T* mean, T* rstd, T* running_mean, T* running_var, T* partial, u32* tickets,        \
        const T* x, const T* weight, const T* bias, double eps, double momentum, i64 stride,      \
        i64 n_models, i64 n, i64 n_x, i64 n_columns)                                              \
    {                                                                                             \
        batch_norm(y, mean, rstd, running_mean, running_var, partial, tickets, x, weight, bias,   \
                   eps, momentum, stride, n_models, n, n_x, n_columns);                           \
    }                                                                                             \
    extern "C" __global__ void batch_norm_apply_##S(                                              \
        T* y, T* mean, T* rstd, const T* x, const T* given_mean, const T* given, const T* weight, \
        const T* bias, double eps, i64 evaluate, i64 stride, i64 n_models, i64 n, i64 n_x,        \
        i64 n_columns)                                                                            \
    {                                                                                             \
        batch_norm_apply(y, mean, rstd, x, given_mean, given, weight, bias, eps, evaluate,        \
                         stride, n_models, n, n_x, n_columns);                                    \
    }                                                                                             \
    extern "C" __global__ void batch_norm_backward_##S(                                           \
        T* dx, T* dweight, T* dbias, T* sums, T* partial, u32* tickets, const T* dy, const T* x,  \
        const T* mean, const T* rstd, const T* weight, i64 training, i64 by_row, i64 stride,      \
        i64 n_models, i64 n, i64 n_x, i64 n_columns, i64 add_weight, i64 add_bias)                \
    {                                                                                             \
        batch_norm_backward(dx, dweight, dbias, sums, partial, tickets, dy, x, mean, rstd,        \
                            weight, training, by_row, stride, n_models, n, n_x, n_columns,        \
                            add_weight, add_bias);                                                \
    }                                                                                             \
    extern "C" __global__ void batch_norm_backward_apply_##S(                                     \
        T* dx, const T* dy, const T* x, const T* mean, const T* rstd, const T* weight,            \
        const T* sums, i64 stride, i64 n_models, i64 n, i64 n_x, i64 n_columns)                   \
    {                                                                                             \
        batch_norm_backward_apply(dx, dy, x, mean, rstd, weight, sums, stride, n_models, n, n_x,  \
                                  n_columns);                                                     \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
