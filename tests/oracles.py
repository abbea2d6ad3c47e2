"""What every operation must return, computed in another style: Python loops and `math`, in float64.

Nothing is imported from nnx, so that no mistake of the library can hide in its own oracle. Arrays
come in as anything NumPy reads and go out as float64 arrays.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TOLERANCES = {"float64": (1e-12, 1e-12), "float32": (1.3e-6, 1e-5)}
"""(rtol, atol) of every comparison of numbers that needn't agree bit for bit."""

MASK64 = 2**64 - 1


def assert_close(actual: Any, expected: Any, depth: int = 1, dtype: Any = None) -> None:
    """Assert equal values up to rounding, equal shapes, and the dtype; NaN only where expected.

    Args:
        actual: An array on the host.
        expected: What it should be; in float64 where an oracle made it.
        depth: Number of terms summed into each element, if they are many.
        dtype: What `actual` must have; by default that of `expected`.
    """
    expected = np.asarray(expected)
    assert isinstance(actual, (np.ndarray, np.generic)), type(actual)
    array = np.asarray(actual)
    assert array.dtype == np.dtype(dtype or expected.dtype)
    assert array.shape == expected.shape
    if array.dtype.kind != "f":
        np.testing.assert_array_equal(array, expected)
        return
    rtol, atol = TOLERANCES[array.dtype.name]
    scale = math.sqrt(max(depth, 1))
    np.testing.assert_allclose(array, expected, rtol=rtol * scale, atol=atol * scale)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Assert equal shapes, dtypes and bits: NaN equals itself, and -0.0 isn't 0.0."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = np.dtype(f"u{actual.dtype.itemsize}") if actual.dtype.kind == "f" else actual.dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits)
    )


def elementwise(function: Callable[..., float], *arrays: Any) -> np.ndarray:
    """`function` of the Python floats at each place."""
    first = np.asarray(arrays[0])
    flat = [np.asarray(a, np.float64).ravel().tolist() for a in arrays]
    values = [function(*numbers) for numbers in zip(*flat, strict=True)]
    return np.array(values, np.float64).reshape(first.shape)


# ---- layers: each returns (y, dx), Linear its parameters' gradients too ----------------------


def linear(
    x: Any, weight: Any, bias: Any, dy: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`(y, dx, dweight, dbias)` of `y = x @ weight + bias` over the last axis."""
    n_in, n_out = np.shape(weight)
    rows = np.asarray(x, np.float64).reshape(math.prod(np.shape(x)[:-1]), n_in).tolist()
    dys = np.asarray(dy, np.float64).reshape(len(rows), n_out).tolist()
    w = np.asarray(weight, np.float64).tolist()
    b = [0.0] * n_out if bias is None else np.asarray(bias, np.float64).tolist()
    y = [
        [b[j] + math.fsum(r[i] * w[i][j] for i in range(n_in)) for j in range(n_out)] for r in rows
    ]
    dx = [[math.fsum(d[j] * w[i][j] for j in range(n_out)) for i in range(n_in)] for d in dys]
    pairs = list(zip(rows, dys, strict=True))
    dweight = [
        [math.fsum(r[i] * d[j] for r, d in pairs) for j in range(n_out)] for i in range(n_in)
    ]
    dbias = [math.fsum(d[j] for d in dys) for j in range(n_out)]
    lead = np.shape(x)[:-1]
    return (
        np.array(y, np.float64).reshape(*lead, n_out),
        np.array(dx, np.float64).reshape(*lead, n_in),
        np.array(dweight, np.float64),
        np.array(dbias, np.float64),
    )


def relu(x: Any, dy: Any) -> tuple[np.ndarray, np.ndarray]:
    """NaN stays NaN; the gradient passes where x > 0 and nowhere else."""

    def value(a: float) -> float:
        if math.isnan(a):
            return a
        return a if a > 0.0 else 0.0

    return elementwise(value, x), elementwise(lambda a, d: d if a > 0.0 else 0.0, x, dy)


def _sigmoid(a: float) -> float:
    if a >= 0.0:
        return 1.0 / (1.0 + math.exp(-a))
    return math.exp(a) / (1.0 + math.exp(a))


def sigmoid(x: Any, dy: Any) -> tuple[np.ndarray, np.ndarray]:
    """Each sign by the form that can't overflow; the derivative is y(a) times y(-a)."""
    return elementwise(_sigmoid, x), elementwise(lambda a, d: d * _sigmoid(a) * _sigmoid(-a), x, dy)


def tanh(x: Any, dy: Any) -> tuple[np.ndarray, np.ndarray]:
    """The derivative is written as 1 / cosh^2, which isn't how the library has it."""

    def derivative(a: float, d: float) -> float:
        return d / math.cosh(a) ** 2 if abs(a) < 300.0 else 0.0

    return elementwise(math.tanh, x), elementwise(derivative, x, dy)


def _probabilities(row: Sequence[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(a - top) for a in row]
    total = math.fsum(powers)
    return [p / total for p in powers]


def softmax(x: Any, dy: Any) -> tuple[np.ndarray, np.ndarray]:
    """Over the last axis; the gradient by the full Jacobian, element by element."""
    x = np.asarray(x, np.float64)
    n = x.shape[-1]
    ys, dxs = [], []
    for row, d in zip(x.reshape(-1, n).tolist(), np.reshape(dy, (-1, n)).tolist(), strict=True):
        y = _probabilities(row)
        ys.append(y)
        dxs.append(
            [
                math.fsum(d[i] * y[i] * ((1.0 if i == j else 0.0) - y[j]) for i in range(n))
                for j in range(n)
            ]
        )
    return np.array(ys).reshape(x.shape), np.array(dxs).reshape(x.shape)


# ---- losses: (loss, gradient) ----------------------------------------------------------------


def softmax_nll(
    logits: Any,
    labels: Any,
    weight: Any = None,
    normalizer: float | None = None,
    grad_scale: float = 1.0,
) -> tuple[float, np.ndarray]:
    """Weighted mean of `-log softmax(row)[label]`; NaN for a label out of range with a weight."""
    logits = np.asarray(logits, np.float64)
    rows = logits.reshape(-1, logits.shape[-1]).tolist()
    targets = np.asarray(labels).ravel().tolist()
    weights = [1.0] * len(rows) if weight is None else np.ravel(weight).astype(float).tolist()
    denominator = math.fsum(weights) if normalizer is None else float(normalizer)
    losses, gradient = [], []
    for row, label, w in zip(rows, targets, weights, strict=True):
        share = w / denominator if denominator else 0.0
        if share == 0.0:
            losses.append(0.0)
            gradient.append([0.0] * len(row))
        elif not 0 <= label < len(row):
            losses.append(math.nan)
            gradient.append([math.nan] * len(row))
        else:
            # log(1 + rest) keeps the digits of a loss near 0
            top = max(range(len(row)), key=row.__getitem__)
            rest = math.fsum(math.exp(a - row[top]) for i, a in enumerate(row) if i != top)
            losses.append(share * (math.log1p(rest) + (row[top] - row[label])))
            p = _probabilities(row)
            p[label] -= 1.0
            gradient.append([grad_scale * share * a for a in p])
    return math.fsum(losses), np.array(gradient, np.float64).reshape(logits.shape)


def mean_squared_error(
    prediction: Any,
    target: Any,
    weight: Any = None,
    normalizer: float | None = None,
    grad_scale: float = 1.0,
) -> tuple[float, np.ndarray]:
    """Weighted mean over samples of the mean squared difference of each."""
    prediction = np.asarray(prediction, np.float64)
    width = 1 if prediction.ndim == 1 else prediction.shape[-1]
    rows = prediction.reshape(-1, width).tolist()
    targets = np.asarray(target, np.float64).reshape(-1, width).tolist()
    weights = [1.0] * len(rows) if weight is None else np.ravel(weight).astype(float).tolist()
    denominator = math.fsum(weights) if normalizer is None else float(normalizer)
    losses, gradient = [], []
    for row, wanted, w in zip(rows, targets, weights, strict=True):
        share = w / denominator if denominator else 0.0
        gaps = [a - b for a, b in zip(row, wanted, strict=True)]
        losses.append(share * math.fsum(g**2 for g in gaps) / width)
        gradient.append([grad_scale * share * 2.0 * g / width for g in gaps])
    return math.fsum(losses), np.array(gradient, np.float64).reshape(prediction.shape)


Slopes = tuple[float, list[float]]


def mean_over_rows(each: Callable[[list[float], Any], Slopes]) -> Callable[..., Any]:
    """The oracle of a loss, given the value and the slopes of one row and its target."""

    def oracle(
        prediction: Any,
        target: Any,
        weight: Any = None,
        normalizer: float | None = None,
        grad_scale: float = 1.0,
    ) -> tuple[float, np.ndarray]:
        prediction = np.asarray(prediction, np.float64)
        width = prediction.shape[-1]
        rows = prediction.reshape(-1, width).tolist()
        soft = np.asarray(target).dtype.kind == "f"
        targets = np.reshape(target, (-1, width) if soft else -1).tolist()
        weights = [1.0] * len(rows) if weight is None else np.ravel(weight).astype(float).tolist()
        denominator = math.fsum(weights) if normalizer is None else float(normalizer)
        losses, gradient = [], []
        for row, wanted, w in zip(rows, targets, weights, strict=True):
            share = w / denominator if denominator else 0.0
            value, slopes = each(row, wanted) if share else (0.0, [0.0] * width)
            losses.append(share * value)
            gradient.append([grad_scale * share * a for a in slopes])
        return math.fsum(losses), np.array(gradient, np.float64).reshape(prediction.shape)

    return oracle


def mean_over_numbers(each: Callable[[float, float], tuple[float, float]]) -> Callable[..., Any]:
    """The oracle of a loss that is a mean of a function of prediction and target."""

    def of_row(row: list[float], wanted: list[float]) -> Slopes:
        pairs = [each(p, t) for p, t in zip(row, wanted, strict=True)]
        return math.fsum(v for v, _ in pairs) / len(row), [d / len(row) for _, d in pairs]

    oracle = mean_over_rows(of_row)

    def of_numbers(prediction: Any, target: Any, *arguments: Any) -> Any:
        if np.ndim(prediction) > 1:
            return oracle(prediction, target, *arguments)
        loss, gradient = oracle(np.reshape(prediction, (-1, 1)), target, *arguments)
        return loss, gradient.reshape(-1)

    return of_numbers


def _huber(p: float, t: float, delta: float = 1.0) -> tuple[float, float]:
    gap = p - t
    if abs(gap) <= delta:
        return gap**2 / 2, gap
    return delta * (abs(gap) - delta / 2), math.copysign(delta, gap)


def _binary(x: float, t: float, pos_weight: float = 1.0) -> tuple[float, float]:
    """Minus the logarithms of the two probabilities, each by the form that keeps its digits."""
    yes = math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x
    no = math.log1p(math.exp(-x)) + x if x > 0 else math.log1p(math.exp(x))
    value = pos_weight * t * yes + (1 - t) * no
    return value, (1 - t) * _sigmoid(x) - pos_weight * t * _sigmoid(-x)


mean_absolute_error = mean_over_numbers(lambda p, t: (abs(p - t), float(p > t) - float(p < t)))
huber = mean_over_numbers(_huber)
binary_cross_entropy = mean_over_numbers(_binary)
hinge = mean_over_numbers(lambda p, t: (1 - p * t, -t) if p * t < 1 else (0.0, 0.0))
squared_hinge = mean_over_numbers(
    lambda p, t: ((1 - p * t) ** 2, -2 * t * (1 - p * t)) if p * t < 1 else (0.0, 0.0)
)


def _one_hot(target: Any, n: int) -> list[float]:
    if isinstance(target, list):
        return target
    return [float(j == target) for j in range(n)] if 0 <= target < n else [math.nan] * n


def _nll(p: list[float], target: Any) -> Slopes:
    y = _one_hot(target, len(p))
    terms = [
        0.0 if b == 0 else -b * (math.log(a) if a else -math.inf) for a, b in zip(p, y, strict=True)
    ]
    return math.fsum(terms), [0.0 if b == 0 else -b / a for a, b in zip(p, y, strict=True)]


def _softmax_mse(row: list[float], target: Any) -> Slopes:
    """The gradient by the full Jacobian of softmax, element by element."""
    n, y, s = len(row), _one_hot(target, len(row)), _probabilities(row)
    value = math.fsum((a - b) ** 2 for a, b in zip(s, y, strict=True)) / n
    slopes = [
        math.fsum(
            2 / n * (s[i] - y[i]) * s[i] * ((1.0 if i == j else 0.0) - s[j]) for i in range(n)
        )
        for j in range(n)
    ]
    return value, slopes


nll = mean_over_rows(_nll)
softmax_mse = mean_over_rows(_softmax_mse)


def cross_entropy(
    logits: Any,
    targets: Any,
    weight: Any = None,
    normalizer: float | None = None,
    grad_scale: float = 1.0,
    *,
    class_weight: Any = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> tuple[float, np.ndarray]:
    """The table in the docstring of `SoftmaxNLL`, sample by sample; logits `(N, C)`."""
    rows = np.asarray(logits, np.float64).tolist()
    n_classes = np.shape(logits)[1]
    c = [1.0] * n_classes if class_weight is None else np.asarray(class_weight, float).tolist()
    weights = [1.0] * len(rows) if weight is None else np.asarray(weight, float).tolist()
    kept, denominator = [], 0.0
    for wanted, v in zip(np.asarray(targets).tolist(), weights, strict=True):
        if isinstance(wanted, list):
            held = [j for j in range(n_classes) if wanted[j] != 0]
            ignored = held == [ignore_index]
            total = math.fsum(wanted)
            d = math.fsum(a * b for a, b in zip(c, wanted, strict=True)) / total if total else 0.0
            if class_weight is None:
                d = 1.0
            y = wanted
        else:
            ignored = wanted == ignore_index
            d = 0.0 if ignored else c[wanted]
            y = [float(j == wanted) for j in range(n_classes)]
        kept.append((y, 0.0 if ignored or d == 0 else v))
        denominator += 0.0 if ignored else v * d
    if normalizer is not None:
        denominator = normalizer
    loss, gradient = 0.0, []
    for row, (y, v) in zip(rows, kept, strict=True):
        share = v / denominator if denominator else 0.0
        q = [
            c[j] * ((1 - label_smoothing) * y[j] + label_smoothing / n_classes)
            for j in range(n_classes)
        ]
        top = max(row)
        log_total = math.log(math.fsum(math.exp(a - top) for a in row))
        for j in range(n_classes):
            if q[j] and share:
                loss += share * q[j] * (log_total - (row[j] - top))
        p, mass = _probabilities(row), math.fsum(q)
        slopes = [mass * p[j] - q[j] for j in range(n_classes)]
        gradient.append([grad_scale * share * a if share else 0.0 for a in slopes])
    return loss, np.array(gradient, np.float64).reshape(np.shape(logits))


# ---- optimizers: the value after one step for each of the gradients --------------------------


def sgd(
    value: Any,
    gradients: Sequence[Any],
    lr: Callable[[int], float],
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> np.ndarray:
    """`u = momentum u + g` and `w -= lr u`, or with Nesterov `w -= lr (g + momentum u)`."""
    values = np.asarray(value, np.float64).ravel().tolist()
    velocity = [0.0] * len(values)
    for step, gradient in enumerate(gradients):
        for i, grad in enumerate(np.asarray(gradient, np.float64).ravel().tolist()):
            g = grad + weight_decay * values[i]
            velocity[i] = momentum * velocity[i] + g
            values[i] -= lr(step) * (g + momentum * velocity[i] if nesterov else velocity[i])
    return np.array(values).reshape(np.shape(value))


def adam(
    value: Any,
    gradients: Sequence[Any],
    lr: Callable[[int], float],
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> np.ndarray:
    """Kingma and Ba 2015, algorithm 1, moments unbiased before they are divided."""
    values = np.asarray(value, np.float64).ravel().tolist()
    m, v = [0.0] * len(values), [0.0] * len(values)
    for step, gradient in enumerate(gradients):
        t = step + 1
        for i, grad in enumerate(np.asarray(gradient, np.float64).ravel().tolist()):
            g = grad + weight_decay * values[i]
            m[i] = beta1 * m[i] + (1.0 - beta1) * g
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g
            unbiased_m, unbiased_v = m[i] / (1.0 - beta1**t), v[i] / (1.0 - beta2**t)
            values[i] -= lr(step) * unbiased_m / (math.sqrt(unbiased_v) + eps)
    return np.array(values).reshape(np.shape(value))


# ---- random numbers --------------------------------------------------------------------------


def philox_block(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Four 64-bit words of Philox4x64-10 (Salmon et al. 2011, section 3.3), in Python integers."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (
            (product1 >> 64) ^ c1 ^ k0,
            product1 & MASK64,
            (product0 >> 64) ^ c3 ^ k1,
            product0 & MASK64,
        )
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK64, (k1 + 0xBB67AE8584CAA73B) & MASK64
    return [c0, c1, c2, c3]


def words32(seed: int, stream: int, n: int, use: int = 0, step: int = 0) -> list[int]:
    """The first n 32-bit words of a stream, from NumPy's Philox.

    The key is (seed, stream), the counter (0, use, 0, step); of each 64-bit word the low half
    comes first.
    """
    key = np.array([seed, stream], np.uint64)
    counter = np.array([0, use, 0, step], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw((n + 1) // 2).tolist()
    return [half for word in raw for half in (word & 0xFFFFFFFF, word >> 32)][:n]


def dropped(
    p: float, shape: tuple[int, ...], seed: int, stream: int, use: int = 0, step: int = 0
) -> np.ndarray:
    """True where dropout zeroes the unit: word >> 8, as a fraction of 2^24, is below p."""
    words = words32(seed, stream, math.prod(shape), use, step)
    return np.array([math.ldexp(w >> 8, -24) < p for w in words], bool).reshape(shape)
