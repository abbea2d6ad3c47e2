// Softmax and negative log-likelihood, value and gradient in one launch.
//
// Rows are those of n_models models one after the other, n each; targets and weights hold n rows
// for all models, or n * n_models. A row's terms q are one-hot at its label, or its soft target,
// smoothed, each times its class weight; with factor[r] = w[r] / denominator (0 where that is 0):
//
//     loss[k]        = sum over model k's rows of factor * (sum(q) log(sum exp(s)) - sum(q s))
//     gradient[r, j] = (sum(q) exp(s[j]) / sum exp(s) - q[j]) * factor * grad_scale
//
// with s = logits - max of the row, so that small losses keep their digits. A label out of range
// makes its row NaN, unless its factor is 0.
//
// A team of threads has a row: maximum and sums in one pass, then the gradient. Narrow rows have
// lanes of a warp each, and a block stages a tile of as many as it has teams in shared memory, so
// that global memory is read once and in order whatever the width. A wide row has a block; it is
// staged too if it fits, else (long) read twice.

// Elements x[j] to x[j + V - 1] of a row of n, 0 before and beyond it: unlike load_pack's they may
// begin before the row, and anywhere in memory.
template <int V, typename T> __device__ inline bool whole(const T* x, i64 j, i64 n)
{
    return j >= 0 && j + V <= n && aligned16(x + j);
}

template <int V, typename T> __device__ inline Pack<T, V> load_part(const T* x, i64 j, i64 n)
{
    if (whole<V>(x, j, n)) return load_pack<V>(x + j);
    Pack<T, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.at[i] = (u64)(j + i) < n ? x[j + i] : T(0);
    return v;
}

template <int V, typename T>
__device__ inline void store_part(T* x, const Pack<T, V>& v, i64 j, i64 n)
{
    if (whole<V>(x, j, n)) return store_pack(x + j, v);
#pragma unroll
    for (int i = 0; i < V; ++i)
        if ((u64)(j + i) < n) x[j + i] = v.at[i];
}

// out[j] = f(j, x[j], y[j]) for the thread's share of a row of n; out and y may be null. In shared
// memory element by element; else in parts of 16 bytes, counted from the boundary before x, so that
// all but the first and the last are aligned.
template <bool staged, class Team, typename T, class F>
__device__ inline void map(Team team, T* out, const T* x, const T* y, i64 n, F f)
{
    if (staged) {
        for (int j = team.rank(); j < (int)n; j += team.size) {
            T value = f(j, x[j], y ? y[j] : T(0));
            if (out) out[j] = value;
        }
        return;
    }
    constexpr int V = pack_size<T>;
    i64 shift = (u64)x / sizeof(T) % V;
#pragma unroll 1
    for (i64 j = team.rank() * V - shift; j < n; j += team.size * V) {
        Pack<T, V> a = load_part<V>(x, j, n), b = {}, c = {};
        if (y) b = load_part<V>(y, j, n);
#pragma unroll
        for (int i = 0; i < V; ++i)
            if ((u64)(j + i) < n) c.at[i] = f(j + i, a.at[i], b.at[i]);
        if (out) store_part(out, c, j, n);
    }
}

// out[k] = sum over model k's n rows of what f(k, i, m) returns in each thread for rows i..i+m-1,
// at most `tile` of them. A block takes `part` rows and enters their sum in `partial`; the last
// block adds up in order. `tile` and `part` depend on the shape alone, hence so does the order of
// the sum.
template <typename T, class F>
__device__ void sum_tiles(T* out, T* partial, u32* ticket, i64 n_models, i64 n, i64 part, i64 tile,
                          F f)
{
    i64 parts = ceil_div(n, part);
    for (i64 p = blockIdx.x; p < n_models * parts; p += gridDim.x) {
        i64 k = p / parts, first = (p - k * parts) * part, stop = min(first + part, n);
        T sum = T(0);
        for (i64 i = first; i < stop; i += tile) sum += f(k, i, min(tile, stop - i));
        sum = WholeBlock().reduce(sum, Plus());
        if (threadIdx.x == 0) partial[p] = sum;
    }
    if (!last_block(ticket)) return;
    auto add_up = [&](auto team) {
        for (i64 k = threadIdx.x / team.size; k < n_models; k += THREADS / team.size) {
            T sum = T(0);
            for (i64 p = team.rank(); p < parts; p += team.size)
                sum += read_shared(partial + k * parts + p);
            sum = team.reduce(sum, Plus());
            if (team.rank() == 0) out[k] = sum;
        }
    };
    if (parts <= 32)
        add_up(Lanes{32});
    else
        add_up(WholeBlock());
}

// What the rows should be and how much each counts. A row is number i of model k; y is its soft
// target or null, label its label.
template <typename T> struct Targets {
    const i64* labels; // or
    const T* soft;
    const T* class_weight;
    const T* weight;
    i64 n, n_classes, n_targets, n_weights, ignore, ignores;

    __device__ i64 row(i64 k, i64 i) const { return row_of(k, i, n, n_targets); }
    __device__ bool valid(i64 label) const { return label >= 0 && label < n_classes; }

    // The sample weight, 0 if the target is to be ignored.
    template <class Team> __device__ T sample(Team team, i64 k, i64 i, i64 label, const T* y) const
    {
        T w = weight ? weight[row_of(k, i, n, n_weights)] : T(1);
        if (!ignores) return w;
        if (!soft) return label == ignore ? T(0) : w;
        if (!valid(ignore)) return w;
        int others = 0;
#pragma unroll 1
        for (i64 j = team.rank(); j < n_classes; j += team.size)
            if (j != ignore && y[j] != T(0)) others = 1;
        return !team.reduce(others, Plus()) && y[ignore] != T(0) ? T(0) : w;
    }

    // The class weight of the label; of a soft target the mean under it.
    template <class Team> __device__ T of_class(Team team, i64 label, const T* y) const
    {
        if (!class_weight) return T(1);
        if (!soft) return class_weight[valid(label) ? label : 0];
        T mass = T(0), total = T(0);
#pragma unroll 1
        for (i64 j = team.rank(); j < n_classes; j += team.size) {
            mass += y[j];
            total += y[j] * class_weight[j];
        }
        mass = team.reduce(mass, Plus());
        return team.reduce(total, Plus()) / (mass == T(0) ? T(1) : mass);
    }
};

// What the mean is divided by, and the factor of the gradient.
template <typename T> struct Scales {
    const T* denominator; // if null, count
    const T* grad_scale;  // if null, scale
    double count, scale;
    i64 n_denominators, n_scales;

    __device__ T below(i64 k) const
    {
        return denominator ? denominator[n_denominators == 1 ? 0 : k] : T(count);
    }
    __device__ T of_gradient(i64 k) const
    {
        return grad_scale ? grad_scale[n_scales == 1 ? 0 : k] : T(scale);
    }
};

// Sums over a thread's share of a row relative to the maximum so far (Milakov and Gimelshein 2018).
template <typename T> struct Sums {
    T top, total, mass, picked; // max(z), sum exp(z - top), sum q, sum q (z - top)

    __device__ T add(T z) // returns exp(z - top) if z isn't above
    {
        T gap = z - top, e = z == top ? T(1) : exp(gap > T(0) ? -gap : gap); // inf - inf is NaN
        if (z > top) {
            total = total * e + T(1);
            if (mass != T(0)) picked -= mass * gap;
            top = z;
        } else {
            total += e;
        }
        return e;
    }
    __device__ void weigh(T z, T q) // after add(z)
    {
        mass += q;
        if (q != T(0) && z != top) picked += q * (z - top);
    }
    template <class Team> __device__ void merge(Team team)
    {
        T own = top;
        top = team.reduce(own, Larger());
        T gap = own == top ? T(0) : own - top;
        if (mass != T(0)) picked += mass * gap;
        total = team.reduce(total * exp(gap), Plus());
        total += top - top; // NaN if the maximum is infinite
    }
};

// Loss of the row z of n elements, in the team's first thread; its gradient goes to g, unless that
// is null. n is 0 for a team without a row. A staged z is overwritten by exponentials; g may be z.
template <bool staged, class Team, typename T>
__device__ inline T softmax_nll_row(Team team, T* g, T* z, const T* y, i64 n, i64 k, i64 i,
                                    const Targets<T>& target, const Scales<T>& scales,
                                    double smoothing)
{
    i64 label = target.soft ? -1 : target.labels[target.row(k, i)];
    bool dense = target.soft || smoothing != 0, valid = target.soft || target.valid(label);
    T keep = T(1 - smoothing), spread = T(smoothing / target.n_classes);
    T below = scales.below(k), factor = target.sample(team, k, i, label, y);
    T of_class = target.of_class(team, label, y);
    factor = below == T(0) || (valid && of_class == T(0)) ? T(0) : factor / below;
    if (!valid && factor != T(0)) not_a_number(factor);
    if (!dense) factor *= of_class;

    auto term = [&](i64 j, T t) {
        if (!dense) return T(j == label);
        T q = (target.soft ? t : T(j == label)) * keep + spread;
        return target.class_weight ? q * target.class_weight[j] : q;
    };
    Sums<T> sums = {};
    lowest(sums.top);
    if (staged) { // another look costs less than another exponential
        map<staged>(team, (T*)0, z, (T*)0, n, [&](i64 j, T v, T t) {
            sums.top = Larger()(sums.top, v);
            return T(0);
        });
        sums.top = team.reduce(sums.top, Larger());
    }
    T at_label = T(0);
    bool mine = false;
    map<staged>(team, staged ? z : 0, z, y, n, [&](i64 j, T v, T t) {
        T e = sums.add(v);
        if (dense) {
            sums.weigh(v, term(j, t));
        } else if (j == label) {
            at_label = v;
            mine = true;
        }
        return e;
    });
    sums.merge(team);
    T mass = dense ? team.reduce(sums.mass, Plus()) : T(1);
    T picked = team.reduce(dense ? sums.picked : mine ? at_label - sums.top : T(0), Plus());
    if (g) {
        T share = mass / sums.total, scale = factor * scales.of_gradient(k);
        map<staged>(team, g, z, y, n, [&](i64 j, T v, T t) {
            T e = staged ? v : exp(v - sums.top);
            return scale == T(0) ? T(0) : (e * share - term(j, t)) * scale;
        });
    }
    bool first = n > 0 && team.rank() == 0;
    return !first || factor == T(0) ? T(0) : (mass * log(sums.total) - picked) * factor;
}

template <bool staged, class Team, typename T>
__device__ void softmax_nll(Team team, T* loss, T* gradient, T* partial, u32* ticket,
                            const T* logits, Targets<T> target, Scales<T> scales, double smoothing,
                            i64 n_models, i64 part)
{
    extern __shared__ int4 space[];
    i64 n = target.n, n_classes = target.n_classes, tile = THREADS / team.size;
    sum_tiles(loss, partial, ticket, n_models, n, part, tile, [&](i64 k, i64 i, i64 m) {
        i64 row = threadIdx.x / team.size, start = (k * n + i) * n_classes;
        bool there = row < m;
        if (!there) row = 0; // its targets are read, no element is
        const T* z = logits + start;
        const T* y = target.soft ? target.soft + target.row(k, i) * n_classes : 0;
        T* g = gradient ? gradient + start : 0;
        i64 at = row * n_classes, width = there ? n_classes : 0;
        if (!staged)
            return softmax_nll_row<staged>(team, g ? g + at : g, (T*)z + at, y ? y + at : y, width,
                                           k, i + row, target, scales, smoothing);
        // each as far from a boundary of 16 bytes as where it comes from
        const int pad = pack_size<T>;
        T* kept = (T*)space + (u64)z / sizeof(T) % pad;
        T* wanted = (T*)space + (tile * n_classes / pad + 2) * pad + (u64)y / sizeof(T) % pad;
        block_copy(kept, z, m * n_classes);
        if (y) block_copy(wanted, y, m * n_classes);
        __syncthreads();
        T value = softmax_nll_row<staged>(team, g ? kept + at : g, kept + at, y ? wanted + at : y,
                                          width, k, i + row, target, scales, smoothing);
        __syncthreads();
        if (g) {
            block_copy(g, kept, m * n_classes);
            __syncthreads();
        }
        return value;
    });
}

// The denominator of the mean: total[k] = sum over model k's rows of sample times class weight.
template <typename T>
__device__ void softmax_nll_weight(Lanes team, T* total, T* partial, u32* ticket, Targets<T> target,
                                   i64 n_models, i64 part)
{
    i64 n = target.n, tile = THREADS / team.size;
    sum_tiles(total, partial, ticket, n_models, n, part, tile, [&](i64 k, i64 i, i64 m) {
        bool there = threadIdx.x / team.size < m, first = there && team.rank() == 0;
        if (there) i += threadIdx.x / team.size;
        i64 row = target.row(k, i), label = target.soft ? -1 : target.labels[row];
        const T* y = target.soft ? target.soft + row * target.n_classes : 0;
        T w = target.sample(team, k, i, label, y) * target.of_class(team, label, y);
        return first ? w : T(0);
    });
}

#define SOFTMAX_NLL(NAME, T, TEAM, STAGED)                                                        \
    extern "C" __global__ void NAME(                                                              \
        T* loss, T* gradient, T* partial, u32* ticket, const T* logits, const i64* labels,        \
        const T* soft, const T* class_weight, const T* weight, const T* denominator,              \
        const T* grad_scale, double count, double scale, double smoothing, i64 lanes, i64 part,   \
        i64 n_models, i64 n, i64 n_classes, i64 n_targets, i64 n_weights, i64 ignore,             \
        i64 ignores, i64 n_denominators, i64 n_scales)                                            \
    {                                                                                             \
        Targets<T> target = {labels,    soft,      class_weight, weight, n,                       \
                             n_classes, n_targets, n_weights,    ignore, ignores};                \
        Scales<T> scales = {denominator, grad_scale, count, scale, n_denominators, n_scales};     \
        softmax_nll<STAGED>(TEAM, loss, gradient, partial, ticket, logits, target, scales,        \
                               smoothing, n_models, part);                                        \
    }

#define INSTANTIATE(T, S)                                                                         \
    SOFTMAX_NLL(softmax_nll_##S, T, Lanes{(int)lanes}, true)                                      \
    SOFTMAX_NLL(softmax_nll_wide_##S, T, WholeBlock(), true)                                      \
    SOFTMAX_NLL(softmax_nll_long_##S, T, WholeBlock(), false)                                     \
    extern "C" __global__ void softmax_nll_weight_##S(                                            \
        T* total, T* partial, u32* ticket, const i64* labels, const T* soft,                      \
        const T* class_weight, const T* weight, i64 lanes, i64 part, i64 n_models, i64 n,         \
        i64 n_classes, i64 n_targets, i64 n_weights, i64 ignore, i64 ignores)                     \
    {                                                                                             \
        Targets<T> target = {labels,    soft,      class_weight, weight, n,                       \
                             n_classes, n_targets, n_weights,    ignore, ignores};                \
        softmax_nll_weight(Lanes{(int)lanes}, total, partial, ticket, target, n_models, part);    \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
