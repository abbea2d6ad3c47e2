// Optimizers: one launch over the flat parameter vector (n_models rows of `size` elements, a
// multiple of 64), and one before it where the gradient is penalized or clipped.
//
// counters[0] is the number of updates done, counters[1] the position in this plan; the learning
// rate is rates[counters[1]]. groups[c / 64] is a row of table: factors of the learning rate and of
// the weight decay. The last block to finish enters the losses in the log and counts up.
//
// A block takes a tile of a row at a time. What the groups say about each 64 elements of it is
// worked out once and shared, so that the loop over the elements divides nothing and reads the
// arrays only, 16 bytes at a time where all are aligned.
#define TILE 2048
#define RUN 64 // elements of one group

// What every optimizer is given first; see `Update` in base.py. Arrays may be null where it says
// so.
template <typename T> struct Flat {
    T *value, *log;
    i64* counters;
    u32* ticket;
    const T *grad, *scale, *loss; // scale: factor of each model's gradient, or null; loss or null
    const double *rates;
    const u8* groups;
    const double* table;
    double decay, shrink;
    i64 n_models, size;
};

struct Tile {
    i64 model, start, run; // start: first element; run: index of its group in `groups`
    int count;
};

__device__ inline Tile tile_at(i64 index, i64 size)
{
    i64 tiles = ceil_div(size, TILE), model = quotient(index, tiles);
    i64 column = (index - model * tiles) * TILE;
    return {model, model * size + column, column / RUN, (int)min(size - column, (i64)TILE)};
}

// What the groups say about each run of a tile: f(factor of the learning rate, of the weight
// decay).
template <class F>
__device__ inline auto settings_of(const Tile& tile, const u8* groups, const double* table, F f)
{
    __shared__ decltype(f(0.0, 0.0)) settings[TILE / RUN];
    __syncthreads(); // those of the tile before have been read
    if (threadIdx.x < tile.count / RUN) {
        const double* factors = table + 2 * groups[tile.run + threadIdx.x];
        settings[threadIdx.x] = f(factors[0], factors[1]);
    }
    __syncthreads();
    return settings;
}

// What every optimizer does at its end: log[position, :] = loss; both counters + 1.
template <typename T> __device__ void advance(const Flat<T>& flat)
{
    if (!last_block(flat.ticket)) return;
    i64 position = flat.counters[1];
    if (flat.loss) {
        for (i64 k = threadIdx.x; k < flat.n_models; k += THREADS)
            flat.log[position * flat.n_models + k] = flat.loss[k];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        flat.counters[0] += 1;
        flat.counters[1] = position + 1;
    }
}

// Applies a rule, `rule(w, g, s, lr)` for the element w with gradient g and state s[0], s[1], ...:
// the gradient is scaled, w shrunk to 1 - lr * shrink of itself, `decay` of it added to g; the
// rule's lr is `factor` times the learning rate. A slot of the state may be null.
template <int V, typename T, int N, typename Rule>
__device__ void walk(const Flat<T>& flat, T* const (&slots)[N], double factor, const Rule& rule)
{
    struct Settings {
        T lr, decay, keep;
        bool frozen;
    };
    i64 tiles = flat.n_models * ceil_div(flat.size, TILE);
    for (i64 index = blockIdx.x; index < tiles; index += gridDim.x) {
        Tile tile = tile_at(index, flat.size);
        auto settings = settings_of(tile, flat.groups, flat.table, [&](double lr, double decay) {
            double rate = flat.rates[flat.counters[1]] * lr;
            return Settings{T(rate * factor), T(flat.decay * decay),
                            T(1 - rate * flat.shrink * decay), lr == 0};
        });
        T scale = flat.scale ? flat.scale[tile.model] : T(1);
        for (int i = threadIdx.x * V; i < tile.count; i += THREADS * V) {
            Settings here = settings[i / RUN];
            if (here.frozen) continue; // 0 * NaN would change it
            i64 place = tile.start + i;
            Pack<T, V> w = load_pack<V>(flat.value + place), grad = load_pack<V>(flat.grad + place);
            Pack<T, V> state[N] = {};
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (slots[j]) state[j] = load_pack<V>(slots[j] + place);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                T s[N], g = grad.at[k] * scale;
#pragma unroll
                for (int j = 0; j < N; ++j) s[j] = state[j].at[k];
                w.at[k] *= here.keep;
                if (here.decay != 0) g += here.decay * w.at[k]; // 0 * inf must not reach g
                rule(w.at[k], g, s, here.lr);
#pragma unroll
                for (int j = 0; j < N; ++j) state[j].at[k] = s[j];
            }
            store_pack(flat.value + place, w);
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (slots[j]) store_pack(slots[j] + place, state[j]);
        }
    }
}

template <typename T, int N, typename Rule>
__device__ void update(const Flat<T>& flat, T* const (&slots)[N], double factor, const Rule& rule)
{
    bool packed = aligned16(flat.value, flat.grad);
    for (T* slot : slots) packed = packed && aligned16(slot);
    by_width<T>(packed, [&](auto V) { walk<V>(flat, slots, factor, rule); });
    advance(flat);
}

// u = momentum * u + g; w -= lr * u, or with Nesterov lr * (g + momentum * u).
template <typename T> struct Sgd {
    T momentum;
    bool heavy, nesterov; // heavy: there is a velocity

    __device__ void operator()(T& w, T g, T* s, T lr) const
    {
        T step = g;
        if (heavy) {
            s[0] = momentum * s[0] + g;
            step = nesterov ? g + momentum * s[0] : s[0];
        }
        w -= lr * step;
    }
};

// m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; w -= lr * m / (sqrt(v) / root + eps)
// with lr / (1 - beta1^t) and root = sqrt(1 - beta2^t), t = counters[0] + 1; AMSGrad keeps the
// largest v and takes its root.
template <typename T> struct Adam {
    T beta1, rest1, beta2, rest2, root, eps;
    bool amsgrad;

    __device__ void operator()(T& w, T g, T* s, T lr) const
    {
        s[0] = beta1 * s[0] + rest1 * g;
        s[1] = beta2 * s[1] + rest2 * (g * g);
        if (amsgrad && (s[1] > s[2] || s[1] != s[1])) s[2] = s[1];
        T v = amsgrad ? s[2] : s[1];
        w -= lr * (s[0] / (sqrt(v) / root + eps));
    }
};

template <typename T>
__device__ void adam(const Flat<T>& flat, T* m, T* v, T* v_max, double beta1, double beta2,
                     double eps)
{
    __shared__ double correction[2]; // 1 - beta1^t and sqrt(1 - beta2^t)
    if (threadIdx.x < 2) {
        double left = 1 - pow(threadIdx.x ? beta2 : beta1, (double)(flat.counters[0] + 1));
        correction[threadIdx.x] = threadIdx.x ? sqrt(left) : 1 / left;
    }
    __syncthreads();
    Adam<T> rule = {T(beta1), T(1 - beta1), T(beta2), T(1 - beta2), T(correction[1]), T(eps),
                    v_max != 0};
    update(flat, {m, v, v_max}, correction[0], rule);
}

// s = s + g^2; w -= lr / (1 + t lr_decay) * g / (sqrt(s + initial) + eps), t = counters[0].
template <typename T> struct AdaGrad {
    T initial, eps;

    __device__ void operator()(T& w, T g, T* s, T lr) const
    {
        s[0] += g * g;
        w -= lr * (g / (sqrt(s[0] + initial) + eps));
    }
};

// v = alpha v + (1 - alpha) g^2; d = g / (sqrt(v) + eps); w -= lr * d. Centered,
// m = alpha m + (1 - alpha) g, and max(v - m^2, 0) is under the root. With momentum,
// u = momentum * u + d and w -= lr * u. The state is (v, m, u).
template <typename T> struct RmsProp {
    T alpha, rest, eps, momentum;
    bool centered, heavy;

    __device__ void operator()(T& w, T g, T* s, T lr) const
    {
        s[0] = alpha * s[0] + rest * (g * g);
        T square = s[0];
        if (centered) {
            s[1] = alpha * s[1] + rest * g;
            square -= s[1] * s[1];
            if (square < 0) square = 0; // NaN stays
        }
        T step = g / (sqrt(square) + eps);
        if (heavy) step = s[2] = momentum * s[2] + step;
        w -= lr * step;
    }
};

template <typename T> __device__ inline T sign(T x) { return x != x ? x : T((x > 0) - (x < 0)); }

// w -= lr * sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g.
template <typename T> struct Lion {
    T beta1, rest1, beta2, rest2;

    __device__ void operator()(T& w, T g, T* s, T lr) const
    {
        w -= lr * sign(beta1 * s[0] + rest1 * g);
        s[0] = beta2 * s[0] + rest2 * g;
    }
};

// grad += l1 * sign(value) + l2 * value, each times the group's factor; grad limited to
// [-clip_value, clip_value]; scale[k] = min(1, clip_norm / (|grad of model k| + 1e-6)). A number
// that is 0 is off. The block that finishes the last tile of a model adds up its squares, from
// `partial`, a double per tile; each model has a ticket.
template <int V, typename T>
__device__ void condition(T* grad, T* scale, double* partial, u32* tickets, const T* value,
                          const u8* groups, const double* table, double l1, double l2,
                          double clip_value, double clip_norm, i64 n_models, i64 size)
{
    struct Settings {
        T l1, l2;
        bool frozen;
    };
    bool penalized = l1 != 0 || l2 != 0;
    T limit = T(clip_value);
    i64 per_model = ceil_div(size, TILE);
    for (i64 index = blockIdx.x; index < n_models * per_model; index += gridDim.x) {
        Tile tile = tile_at(index, size);
        auto settings = settings_of(tile, groups, table, [&](double lr, double decay) {
            return Settings{T(l1 * decay), T(l2 * decay), lr == 0};
        });
        double sum = 0;
        for (int i = threadIdx.x * V; i < tile.count; i += THREADS * V) {
            Settings here = settings[i / RUN];
            if (here.frozen) continue;
            i64 place = tile.start + i;
            Pack<T, V> g = load_pack<V>(grad + place), w = {};
            if (penalized) w = load_pack<V>(value + place);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                T x = g.at[k];
                if (here.l1 != 0) x += here.l1 * sign(w.at[k]); // 0 * inf is NaN
                if (here.l2 != 0) x += here.l2 * w.at[k];
                if (limit != 0) x = x > limit ? limit : x < -limit ? -limit : x; // NaN stays
                sum += double(x) * double(x);
                g.at[k] = x;
            }
            if (penalized || limit != 0) store_pack(grad + place, g);
        }
        if (clip_norm == 0) continue;
        sum = WholeBlock().reduce(sum, Plus());
        if (threadIdx.x == 0) partial[index] = sum;
        if (!last_block(tickets + tile.model, per_model)) continue;
        sum = 0;
        for (i64 j = threadIdx.x; j < per_model; j += THREADS)
            sum += read_shared(partial + tile.model * per_model + j);
        sum = WholeBlock().reduce(sum, Plus());
        double factor = clip_norm / (sqrt(sum) + 1e-6);
        if (threadIdx.x == 0) scale[tile.model] = T(factor > 1 ? 1 : factor); // NaN stays
    }
}

#define FLAT(T)                                                                                   \
    T *value, T *log, i64 *counters, u32 *ticket, const T *grad, const T *scale, const T *loss,   \
        const double *rates, const u8 *groups, const double *table, double decay, double shrink,  \
        i64 n_models, i64 size
#define FLAT_ARGUMENTS                                                                            \
    {value, log, counters, ticket, grad, scale, loss, rates, groups, table, decay, shrink,        \
     n_models, size}

#define INSTANTIATE(T, S)                                                                         \
    extern "C" __global__ void sgd_##S(FLAT(T), T* velocity, double momentum, i64 nesterov)       \
    {                                                                                             \
        Flat<T> flat = FLAT_ARGUMENTS;                                                            \
        Sgd<T> rule = {T(momentum), velocity != 0, nesterov != 0};                                \
        update(flat, {velocity}, 1, rule);                                                        \
    }                                                                                             \
    extern "C" __global__ void adam_##S(FLAT(T), T* m, T* v, T* v_max, double beta1,              \
                                        double beta2, double eps)                                 \
    {                                                                                             \
        Flat<T> flat = FLAT_ARGUMENTS;                                                            \
        adam(flat, m, v, v_max, beta1, beta2, eps);                                               \
    }                                                                                             \
    extern "C" __global__ void adagrad_##S(FLAT(T), T* sum, double lr_decay, double initial,      \
                                           double eps)                                            \
    {                                                                                             \
        Flat<T> flat = FLAT_ARGUMENTS;                                                            \
        AdaGrad<T> rule = {T(initial), T(eps)};                                                   \
        update(flat, {sum}, 1 / (1 + counters[0] * lr_decay), rule);                              \
    }                                                                                             \
    extern "C" __global__ void rmsprop_##S(FLAT(T), T* v, T* m, T* velocity, double alpha,        \
                                           double eps, double momentum)                           \
    {                                                                                             \
        Flat<T> flat = FLAT_ARGUMENTS;                                                            \
        RmsProp<T> rule = {T(alpha), T(1 - alpha), T(eps), T(momentum), m != 0, velocity != 0};   \
        update(flat, {v, m, velocity}, 1, rule);                                                  \
    }                                                                                             \
    extern "C" __global__ void lion_##S(FLAT(T), T* m, double beta1, double beta2)                \
    {                                                                                             \
        Flat<T> flat = FLAT_ARGUMENTS;                                                            \
        Lion<T> rule = {T(beta1), T(1 - beta1), T(beta2), T(1 - beta2)};                          \
        update(flat, {m}, 1, rule);                                                               \
    }                                                                                             \
    extern "C" __global__ void condition_##S(                                                     \
        T* grad, T* scale, double* partial, u32* tickets, const T* value, const u8* groups,       \
        const double* table, double l1, double l2, double clip_value, double clip_norm,           \
        i64 n_models, i64 size)                                                                   \
    {                                                                                             \
        by_width<T>(aligned16(grad, value), [&](auto V) {                                         \
            condition<V>(grad, scale, partial, tickets, value, groups, table, l1, l2, clip_value, \
                         clip_norm, n_models, size);                                              \
        });                                                                                       \
    }
INSTANTIATE(float, f32)
INSTANTIATE(double, f64)
