"""Every system of the texts the library grew from: layers, activations and losses.

A row is one thing that a text A to E (docs/texts) describes. Each has a test here or in one of the
other `test_seed_texts_*.py`, which opens its docstring with the row's name; the first test below
fails if a row has none. The oracles are loops, plain NumPy and numbers worked by hand.
"""

import ast
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import assert_close

import nnx
from nnx.backends import Backend
from nnx.backends.base import Array
from nnx.initializers import zeros

ROWS = (
    "Linear, rows",
    "Linear, columns",
    "dh_k/dW_ij Jacobian",
    "Neuron equation, layers",
    "Parameter count",
    "Linear-collapse theorem",
    "ReLU",
    "ReLU in place",
    "Sigmoid",
    "tanh",
    "Softmax",
    "Softmax Jacobian",
    "NLL / cross-entropy",
    "dL/dS = -y/S",
    "Fused softmax-CE",
    "General targets",
    "CE examples",
    "Binary CE",
    "MSE",
    "MAE, hinge",
    "MSES",
    "ReLU before softmax",
    "Binary decision",
    "Forward batch",
    "BP1",
    "BP1 example",
    "BP2",
    "BP3, BP4",
    "Flatten of W",
    "Numeric gradient",
    "Update rule",
    "Average-gradient step",
    "GD demo",
    "Steps per epoch",
    "Dense class",
    "Activation class",
    "Training loop",
    "AND gate",
    "Boundary plots",
    "Inference",
    "Data loading",
    "One-hot",
    "Normalise",
    "Naive matmul",
    "Variance rules",
    "Depth exp. 1: N(0,1), 152x512, linear",
    "Depth exp. 2: /sqrt(512)",
    "Depth exp. 3: + ReLU",
    "Depth exp. 4: sqrt(2/512)+ReLU",
    "Init in Linear",
    "BatchNorm",
    "Untrained baseline",
    "Short run",
    "Model class",
    "dW by broadcasting",
    "Accuracy",
    "Tests vs PyTorch",
    "Loss comparison",
    "Regularised cost",
    "Library comparison",
    "Combining, batch backward, tanh, losses, optimisers, init",
)
F64: Any = np.float64


def test_every_row_of_the_texts_has_a_test() -> None:
    assert len(set(ROWS)) == len(ROWS) == 61
    named: set[str] = set()
    for path in sorted(Path(__file__).parent.glob("test_seed_texts*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                named.update(re.findall(r'^Row "(.+?)" \(', ast.get_docstring(node) or ""))
    assert named == set(ROWS)


def softmax(z: Any) -> np.ndarray:
    """Rows of probabilities, by loops."""
    rows = []
    for row in np.asarray(z, F64).tolist():
        exponentials = [math.exp(a - max(row)) for a in row]
        rows.append([e / math.fsum(exponentials) for e in exponentials])
    return np.array(rows)


def cross_entropy(z: Any, labels: Any) -> float:
    """The mean of log(sum(exp(z))) - z[label], by loops."""
    terms = []
    for row, label in zip(np.asarray(z, F64).tolist(), labels, strict=True):
        top = max(row)
        terms.append(math.log(math.fsum(math.exp(a - top) for a in row)) + top - row[label])
    return math.fsum(terms) / len(terms)


def run(layer: nnx.Layer, x: Any, dy: Any, backend: Backend) -> tuple[Array, Array]:
    """`(y, dx)` on the host."""
    y, saved = layer.forward(backend.asarray(x))
    dx = layer.backward(backend.asarray(dy), saved)
    return backend.to_numpy(y), backend.to_numpy(dx)


def score(loss: nnx.Loss, z: Any, t: Any, backend: Backend) -> tuple[float, Any]:
    """Loss and gradient on the host."""
    value, gradient = loss(backend.asarray(z), backend.asarray(t))
    return float(backend.to_numpy(value)), backend.to_numpy(gradient)


def linear(n_in: int, n_out: int, rng: np.random.Generator, backend: Backend) -> nnx.Linear:
    """A float64 layer with a random bias, on the backend."""
    layer = nnx.Linear(n_in, n_out, rng=rng, dtype=F64)
    assert layer.bias is not None
    layer.bias.value[...] = rng.standard_normal(n_out)
    return layer.to(backend)


# ---- layers ---------------------------------------------------------------------------------


def test_linear_rows(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Linear, rows" (texts A, C, D, B): h = xW + b, and b is one vector for all rows."""
    layer = linear(3, 4, rng, backend)
    assert layer.bias is not None
    x, g = rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    w, b = backend.to_numpy(layer.weight.value), backend.to_numpy(layer.bias.value)
    y, dx = run(layer, x, g, backend)
    tiled = np.array([[b[j] for j in range(4)] for _ in range(5)])
    looped = [[sum(x[n, i] * w[i, j] for i in range(3)) for j in range(4)] for n in range(5)]
    assert_close(y, np.array(looped) + tiled)
    back = [[sum(g[n, j] * w[i, j] for j in range(4)) for i in range(3)] for n in range(5)]
    assert_close(dx, np.array(back))
    dw = [[sum(x[n, i] * g[n, j] for n in range(5)) for j in range(4)] for i in range(3)]
    assert_close(backend.to_numpy(layer.weight.grad), np.array(dw))
    assert_close(backend.to_numpy(layer.bias.grad), np.array([sum(g[:, j]) for j in range(4)]))
    assert nnx.check_gradients(layer, x, rng=rng) < 1e-7


def test_linear_columns(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Linear, columns" (texts B, E): the same net in both layouts.

    Samples are columns, y = Wx + b, dW = g x^T, dx = W^T g, db the sum of g over the batch.
    """
    w1, b1 = rng.standard_normal((4, 3)), rng.standard_normal((4, 1))
    w2, b2 = rng.standard_normal((2, 4)), rng.standard_normal((2, 1))
    x, t = rng.standard_normal((3, 6)), rng.standard_normal((2, 6))
    a = np.tanh(w1 @ x + b1)
    y = w2 @ a + b2
    loss = np.mean((y - t) ** 2)
    g2 = 2 * (y - t) / y.size
    g1 = (w2.T @ g2) * (1 - a**2)

    one, two = nnx.Linear.from_columns(w1, b1), nnx.Linear.from_columns(w2, b2)
    net = nnx.Sequential(one, nnx.Tanh(), two).to(backend)
    out, saved = net.forward(backend.asarray(x.T))
    value, gradient = nnx.MeanSquaredError()(out, backend.asarray(t.T))
    dx = net.backward(gradient, saved)
    assert float(backend.to_numpy(value)) == pytest.approx(loss, rel=1e-12)
    assert_close(backend.to_numpy(dx), (w1.T @ g1).T)
    for layer, dw, db in ((one, g1 @ x.T, g1.sum(axis=1)), (two, g2 @ a.T, g2.sum(axis=1))):
        assert layer.bias is not None
        assert_close(backend.to_numpy(layer.weight.grad), dw.T)
        assert_close(backend.to_numpy(layer.bias.grad), db)
    weight, bias = one.to_columns()
    np.testing.assert_array_equal(backend.to_numpy(weight), w1)
    np.testing.assert_array_equal(backend.to_numpy(bias), b1[:, 0])


def test_jacobian_of_the_weights(backend: Backend, rng: np.random.Generator) -> None:
    """Row "dh_k/dW_ij Jacobian" (text A): x_i where j = k, of 3 inputs and 4 outputs."""
    layer = linear(3, 4, rng, backend)
    x, g = rng.standard_normal((1, 3)), rng.standard_normal((1, 4))
    jacobian = np.zeros((3, 4, 4))  # i, j, k
    printed = np.zeros((3, 4, 4))
    for i, j, k in np.ndindex(3, 4, 4):
        jacobian[i, j, k] = x[0, i] if j == k else 0.0
        printed[i, j, k] = x[0, i] if i == k else 0.0
    h, _ = run(layer, x, g, backend)
    dw = backend.to_numpy(layer.weight.grad).copy()
    for i, j in np.ndindex(3, 4):  # h is linear in W: a step of 1 shows the derivative
        layer.weight.value[i, j] += 1.0
        moved = backend.to_numpy(layer(backend.asarray(x)))
        layer.weight.value[i, j] -= 1.0
        np.testing.assert_allclose((moved - h)[0], jacobian[i, j], rtol=1e-12, atol=1e-14)
    assert_close(dw, (jacobian * g[0]).sum(axis=2))
    assert_close(dw, x.T @ g)
    assert not np.allclose(dw, (printed * g[0]).sum(axis=2))


@pytest.mark.parametrize("activation", [nnx.Tanh, nnx.Sigmoid])
def test_a_loop_over_neurons_is_the_layer(activation: Any, backend: Backend) -> None:
    """Row "Neuron equation, layers" (texts B, E): y_j = f(sum_i w_ij x_i + b_j)."""
    w = [[0.5, -0.25, 1.5], [-2.0, 0.125, 0.75]]  # eighths, so that the sums are exact
    b, x = [0.5, -1.0, 0.25], [[1.0, -0.5], [0.25, 3.0], [-1.5, 0.125]]
    layer = nnx.Linear(2, 3, initializer=zeros, dtype=F64)
    assert layer.bias is not None
    layer.weight.value[...], layer.bias.value[...] = w, b
    net = nnx.Sequential(layer, activation()).to(backend)
    f = math.tanh if activation is nnx.Tanh else lambda z: 1 / (1 + math.exp(-z))

    def neuron(j: int, inputs: list[float]) -> float:
        z = b[j]
        for i in range(2):
            z += w[i][j] * inputs[i]
        return f(z)

    looped = np.array([[neuron(j, inputs) for j in range(3)] for inputs in x])
    y = backend.to_numpy(net(backend.asarray(x, F64)))
    np.testing.assert_allclose(y, looped, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("sizes", "count"), [((2, 3, 1), 13), ((3, 2, 1), 11), ((784, 50, 10), 39_760)]
)
def test_parameter_count(sizes: tuple[int, ...], count: int) -> None:
    """Row "Parameter count" (text B): the sum of n_i n_{i+1} + n_{i+1} ends at L - 1."""
    model = nnx.mlp(list(sizes))
    parameters = [p for _, p in model.parameters()]
    assert sum(p.value.size for p in parameters) == count
    assert model.n_parameters == nnx.ParameterVector(parameters).size == count
    assert model.summary().splitlines()[-1].split()[:2] == ["parameters", f"{count:,}"]
    formula = 0
    for i in range(len(sizes) - 1):
        formula += sizes[i] * sizes[i + 1] + sizes[i + 1]
    assert formula == count


def test_linear_layers_collapse(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Linear-collapse theorem" (texts B, A, D): five linear layers are one; ReLU isn't."""
    sizes = [4, 6, 5, 3, 7, 2]
    layers = [linear(sizes[i], sizes[i + 1], rng, backend) for i in range(5)]
    x = rng.standard_normal((8, 4))
    weight, bias = np.eye(4), np.zeros(4)
    for layer in layers:
        assert layer.bias is not None
        w = backend.to_numpy(layer.weight.value)
        weight, bias = weight @ w, bias @ w + backend.to_numpy(layer.bias.value)

    def stacked(activation: type[nnx.Layer]) -> Any:
        net = nnx.Sequential(*(part for layer in layers for part in (layer, activation())))
        return backend.to_numpy(net(backend.asarray(x)))

    folded = x @ weight + bias
    np.testing.assert_allclose(stacked(nnx.Identity), folded, rtol=1e-12, atol=1e-12)
    assert not np.allclose(stacked(nnx.ReLU), folded, rtol=0.1)
    relu = nnx.ReLU()  # nor does ReLU go through a sum: max(0, -1 + 2) isn't max(0, -1) + max(0, 2)
    one, two = backend.asarray([[-1.0]], F64), backend.asarray([[2.0]], F64)
    assert float(backend.to_numpy(relu(one + two))[0, 0]) == 1.0
    assert float(backend.to_numpy(relu(one) + relu(two))[0, 0]) == 2.0


# ---- activations ----------------------------------------------------------------------------


def test_relu(backend: Backend, rng: np.random.Generator) -> None:
    """Row "ReLU" (texts A, B, C, D, E): derivative 1 above 0, and 0 at 0; dead units."""
    x = rng.uniform(0.1, 2, (6, 5)) * rng.choice([-1.0, 1.0], (6, 5))
    assert nnx.check_gradients(nnx.ReLU(), x, backend=backend) < 1e-7
    y, dx = run(nnx.ReLU(), np.array([[-2.0, 0.0, 3.0]]), np.array([[5.0, 7.0, 11.0]]), backend)
    assert y.tolist() == [[0.0, 0.0, 3.0]]
    assert dx.tolist() == [[0.0, 0.0, 11.0]]  # not 3 * 11, which f' = z would give

    layer = linear(3, 4, rng, backend)
    assert layer.bias is not None
    layer.bias.value[2] = -100.0  # unit 2 is dead: z <= 0 for all samples
    net = nnx.Sequential(nnx.Flatten(), layer, nnx.ReLU())
    run(net, rng.standard_normal((9, 3)), rng.standard_normal((9, 4)), backend)
    dw, db = backend.to_numpy(layer.weight.grad), backend.to_numpy(layer.bias.grad)
    assert not dw[:, 2].any()
    assert db[2] == 0
    assert dw[:, [0, 1, 3]].any()


def test_relu_leaves_the_callers_gradient_alone(backend: Backend, rng: np.random.Generator) -> None:
    """Row "ReLU in place" (text D): no array of the caller is written, there is no such option."""
    x, dy = rng.standard_normal((2, 7, 3))
    here, gradient = backend.asarray(x.copy()), backend.asarray(dy.copy())
    y, saved = nnx.ReLU().forward(here)
    kept = backend.to_numpy(y).copy()
    dx = nnx.ReLU().backward(gradient, saved)
    np.testing.assert_array_equal(backend.to_numpy(gradient), dy)
    np.testing.assert_array_equal(backend.to_numpy(here), x)
    np.testing.assert_array_equal(backend.to_numpy(y), kept)
    expected = [
        [d if a > 0 else 0.0 for a, d in zip(*rows, strict=True)]
        for rows in zip(x, dy, strict=True)
    ]
    np.testing.assert_array_equal(backend.to_numpy(dx), np.array(expected))


def test_sigmoid(backend: Backend, dtype: Any, rng: np.random.Generator) -> None:
    """Row "Sigmoid" (texts B, D, E): s'(0) = 0.25, gradients shrink to a quarter, no overflow."""
    y, dx = run(nnx.Sigmoid(), np.zeros((1, 1), dtype), np.ones((1, 1), dtype), backend)
    assert (y[0, 0], dx[0, 0]) == (0.5, 0.25)
    far = np.array([[-1e4, -100.0, 100.0, 1e4]], dtype)
    y, dx = run(nnx.Sigmoid(), far, np.ones_like(far), backend)  # warnings are errors
    assert y.dtype == dx.dtype == dtype
    np.testing.assert_allclose(y, [[0, math.exp(-100), 1, 1]], rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(dx[0, [0, 3]], 0, atol=1e-37)
    x, dy = rng.standard_normal((2, 50, 3)) * 4
    y, dx = run(nnx.Sigmoid(), x, dy, backend)
    assert ((y > 0) & (y < 1)).all()
    assert (np.abs(dx) <= np.abs(dy) / 4).all()
    assert nnx.check_gradients(nnx.Sigmoid(), x, backend=backend) < 1e-7


def test_tanh(backend: Backend, rng: np.random.Generator) -> None:
    """Row "tanh" (texts B, E): the derivative is 1 - tanh^2."""
    x, dy = rng.standard_normal((2, 6, 3))
    y, dx = run(nnx.Tanh(), x, dy, backend)
    assert_close(y, np.array([[math.tanh(a) for a in row] for row in x]))
    assert_close(
        dx,
        np.array([d / math.cosh(a) ** 2 for a, d in zip(x.flat, dy.flat, strict=True)]).reshape(
            6, 3
        ),
    )
    assert nnx.check_gradients(nnx.Tanh(), x, backend=backend) < 1e-7


def test_softmax(backend: Backend, dtype: Any, rng: np.random.Generator) -> None:
    """Row "Softmax" (texts A, B, C, D, E): shift invariance, rows of sum 1, finite at 1e4."""
    layer = nnx.Softmax()
    far = np.array([[1000, 0, -1000], [1e4, -1e4, 1e4]], dtype)
    y = backend.to_numpy(layer(backend.asarray(far)))
    assert y.tolist() == [[1, 0, 0], [0.5, 0, 0.5]]
    x = (rng.integers(-64, 64, (5, 4)) / 16).astype(dtype)  # so that adding 512 is exact
    y = backend.to_numpy(layer(backend.asarray(x)))
    np.testing.assert_array_equal(backend.to_numpy(layer(backend.asarray(x + dtype.type(512)))), y)
    assert_close(y, softmax(x), dtype=dtype)
    np.testing.assert_allclose(y.sum(axis=1), 1, rtol=1e-6)
    assert nnx.check_gradients(layer, x, backend=backend) < 1e-7


def test_softmax_jacobian(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Softmax Jacobian" (texts A, D, E): S_j (1 - S_j) and -S_i S_j, never built."""
    x, u = rng.standard_normal((2, 4, 5))
    s = softmax(x)
    expected = np.zeros((4, 5))
    for n in range(4):
        for i, j in np.ndindex(5, 5):
            expected[n, i] += u[n, j] * (s[n, j] * (1 - s[n, j]) if i == j else -s[n, i] * s[n, j])
    _, dx = run(nnx.Softmax(), x, u, backend)
    assert_close(dx, expected)


# ---- losses ---------------------------------------------------------------------------------


def test_nll(backend: Backend) -> None:
    """Row "NLL / cross-entropy" (texts A, C, D, E, B): 0.22314, N terms, and 0 log 0 = 0."""
    p = np.array([[0.8, 0.15, 0.05]])
    value, _ = score(nnx.NLL(), p, np.array([0]), backend)
    assert value == pytest.approx(0.22314, abs=5e-6)
    two = np.array([[0.8, 0.15, 0.05], [0.25, 0.5, 0.25]])
    value, _ = score(nnx.NLL(), two, np.array([0, 2]), backend)
    assert value == pytest.approx(-(math.log(0.8) + math.log(0.25)) / 2, rel=1e-14)
    value, _ = score(nnx.NLL(), np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]), backend)
    assert value == 0
    value, _ = score(nnx.SoftmaxNLL(), np.log(two), np.array([0, 2]), backend)
    assert value == pytest.approx(cross_entropy(np.log(two), [0, 2]), rel=1e-14)


def test_gradient_of_the_probabilities(backend: Backend, rng: np.random.Generator) -> None:
    """Row "dL/dS = -y/S" (texts A, E): divided by N, and through the softmax the fused form."""
    z, labels = rng.standard_normal((6, 4)) * 3, rng.integers(0, 4, 6)
    p, saved = nnx.Softmax().forward(backend.asarray(z))
    value, dp = nnx.NLL()(p, backend.asarray(labels))
    s = softmax(z)
    assert s.min() > 1e-12
    expected = [[-float(j == labels[n]) / s[n, j] / 6 for j in range(4)] for n in range(6)]
    assert_close(backend.to_numpy(dp), np.array(expected))
    fused, dz = score(nnx.SoftmaxNLL(), z, labels, backend)
    assert float(backend.to_numpy(value)) == pytest.approx(fused, rel=1e-12)
    assert_close(backend.to_numpy(nnx.Softmax().backward(dp, saved)), dz)


def test_fused_softmax_cross_entropy(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Fused softmax-CE" (texts D, E): s - y over N, a mean; a sum is 3 times it at N = 3."""
    z, labels = rng.standard_normal((3, 5)), np.array([1, 0, 4])
    value, dz = score(nnx.SoftmaxNLL(), z, labels, backend)
    assert value == pytest.approx(cross_entropy(z, labels), rel=1e-14)
    summed = softmax(z)
    summed[range(3), labels] -= 1
    np.testing.assert_allclose(summed / dz, 3.0, rtol=1e-12)
    assert nnx.check_gradients(nnx.SoftmaxNLL(), z, labels, backend=backend) < 1e-7
    value, dz = score(nnx.SoftmaxNLL(), np.array([[1000.0, -1000.0]]), np.array([1]), backend)
    assert value == 2000.0
    assert dz.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"class_weight": [0.5, 2.0, 1.0, 3.0]},
        {"ignore_index": 2},
        {"class_weight": [0.5, 2.0, 1.0, 3.0], "label_smoothing": 0.1, "ignore_index": 2},
    ],
    ids=["plain", "smoothed", "weighted", "ignored", "all"],
)
@pytest.mark.parametrize("soft", [False, True])
def test_general_targets(
    options: dict[str, Any], soft: bool, backend: Backend, rng: np.random.Generator
) -> None:
    """Row "General targets" (text E): a sum(y) - y where y needn't sum to 1, and every option."""
    z, labels = rng.standard_normal((5, 4)), np.array([0, 2, 1, 3, 2])
    target = rng.uniform(0, 2, (5, 4)) if soft else labels
    loss = nnx.SoftmaxNLL(**options)
    assert nnx.check_gradients(loss, z, target, rng.uniform(0.5, 2, 5), backend=backend) < 1e-7
    if soft and not options:
        _, dz = score(loss, z, target, backend)
        s = softmax(z)
        right = [[s[n, j] * sum(target[n]) - target[n, j] for j in range(4)] for n in range(5)]
        assert_close(dz, np.array(right) / 5)
        assert np.abs(dz - (s - target) / 5).max() > 0.1


def test_examples_of_cross_entropy(backend: Backend) -> None:
    """Row "CE examples" (text E): four cases; two aren't one-hot and belong to binary CE."""
    loss, right = nnx.NLL(), np.array([[1.0, 0.0]])
    assert score(loss, right, np.array([0]), backend)[0] == 0
    assert score(loss, right, np.array([1]), backend)[0] == math.inf
    assert score(loss, right[:, ::-1].copy(), np.array([0]), backend)[0] == math.inf
    for target in ([1, 1], [0, 0]):
        rows = np.array([target, [0, 1], [1, 0]])
        model = nnx.Linear(2, 2, rng=np.random.default_rng(0))
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(lr=0.1), backend=backend)
        with pytest.raises(ValueError, match="one-hot"):
            trainer.fit(np.ones((3, 2)), rows)
        model = nnx.Linear(2, 2, rng=np.random.default_rng(0))
        trainer = nnx.Trainer(model, nnx.BCEWithLogits(), nnx.SGD(lr=0.1), backend=backend)
        assert len(trainer.fit(np.ones((3, 2)), rows)["loss"]) == 1


def test_binary_cross_entropy(backend: Backend, dtype: Any, rng: np.random.Generator) -> None:
    """Row "Binary CE" (texts B, D): from logits, stable to 1e4, gradient sigmoid(x) - y."""
    loss = nnx.BCEWithLogits()
    z, y = rng.standard_normal((6, 2)) * 3, rng.integers(0, 2, (6, 2)).astype(F64)
    terms, slopes = [], []
    for a, t in zip(z.ravel(), y.ravel(), strict=True):
        p = 1 / (1 + math.exp(-a))
        terms.append(-(t * math.log(p) + (1 - t) * math.log(1 - p)))
        slopes.append((p - t) / 12)
    value, dz = score(loss, z, y, backend)
    assert value == pytest.approx(math.fsum(terms) / 12, rel=1e-12)
    assert_close(dz, np.array(slopes).reshape(6, 2))
    assert nnx.check_gradients(loss, z, y, backend=backend) < 1e-7
    far, labels = np.array([[1e4, -1e4, 1e4, -1e4]], dtype), np.array([[0, 1, 1, 0]], dtype)
    value, dz = score(loss, far, labels, backend)
    assert value == 5000.0  # two of the four answers are wrong, and cost 1e4 each
    assert dz.tolist() == [[0.25, -0.25, 0, 0]]


@pytest.mark.parametrize("shape", [(6,), (4, 3), (2, 3, 4)], ids=["1-D", "2-D", "3-D"])
def test_mean_squared_error(
    shape: tuple[int, ...], backend: Backend, rng: np.random.Generator
) -> None:
    """Row "MSE" (texts B, D): the mean of (y - t)^2, gradient 2 (y - t) / n in any shape."""
    y, t = rng.standard_normal((2, *shape))
    value, dy = score(nnx.MeanSquaredError(), y, t, backend)
    pairs = list(zip(y.ravel().tolist(), t.ravel().tolist(), strict=True))
    assert value == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / len(pairs), rel=1e-13)
    assert_close(dy, np.array([2 * (a - b) / len(pairs) for a, b in pairs]).reshape(shape))
    assert nnx.check_gradients(nnx.MeanSquaredError(), y, t, backend=backend) < 1e-7


def test_absolute_error_and_hinge(backend: Backend, rng: np.random.Generator) -> None:
    """Row "MAE, hinge" (text B): 1/N in both, labels -1 and +1, gradients off the kinks."""
    y = rng.standard_normal((5, 2))
    t = y + rng.uniform(0.2, 1, (5, 2)) * rng.choice([-1.0, 1.0], (5, 2))
    assert nnx.check_gradients(nnx.MeanAbsoluteError(), y, t, backend=backend) < 1e-7
    value, _ = score(nnx.MeanAbsoluteError(), y, t, backend)
    assert value == pytest.approx(
        sum(abs(a - b) for a, b in zip(y.flat, t.flat, strict=True)) / 10, rel=1e-13
    )

    labels = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    scores = np.array([[0.5], [0.5], [2.0], [-3.0]])  # 1 - t s: 0.5, 1.5, -1, -2
    value, ds = score(nnx.Hinge(), scores, labels, backend)
    assert value == (0.5 + 1.5) / 4
    assert ds.tolist() == [[-0.25], [0.25], [0], [0]]
    value, _ = score(nnx.SquaredHinge(), scores, labels, backend)
    assert value == (0.25 + 2.25) / 4
    for loss in (nnx.Hinge(), nnx.SquaredHinge()):
        assert nnx.check_gradients(loss, scores, labels, backend=backend) < 1e-7
        trainer = nnx.Trainer(nnx.Linear(1, 1, rng=rng), loss, nnx.SGD(lr=0.1), backend=backend)
        with pytest.raises(ValueError, match=r"2 \* t - 1"):
            trainer.fit(scores, (labels + 1) / 2)
        trainer.fit(scores, labels)


def test_squared_error_of_the_softmax(backend: Backend, rng: np.random.Generator) -> None:
    """Row "MSES" (text D): the closed form is the sum over the B x C x C tensor."""
    z, labels = rng.standard_normal((4, 5)), rng.integers(0, 5, 4)
    s, y = softmax(z), np.eye(5)[labels]
    tensor = np.zeros((4, 5, 5))
    for b, i, j in np.ndindex(4, 5, 5):  # of ds_i / dz_j
        tensor[b, i, j] = 2 / 5 * (s[b, i] - y[b, i]) * s[b, i] * ((i == j) - s[b, j]) / 4
    value, dz = score(nnx.SoftmaxMSE(), z, labels, backend)
    np.testing.assert_allclose(dz, tensor.sum(axis=1), rtol=0, atol=1e-12)
    assert value == pytest.approx(np.mean((s - y) ** 2), rel=1e-12)
    assert nnx.check_gradients(nnx.SoftmaxMSE(), z, labels, backend=backend) < 1e-7


def test_relu_before_softmax(backend: Backend) -> None:
    """Row "ReLU before softmax" (texts A, C): negative logits become .333 each, and no gradient."""
    z, label = np.array([[-1.0, -3.0, -5.0]]), np.array([1])
    bare = backend.to_numpy(nnx.Softmax()(backend.asarray(z)))
    assert bare[0].round(3).tolist() == [0.867, 0.117, 0.016]
    relu = nnx.ReLU()
    y, saved = relu.forward(backend.asarray(z))
    assert_close(backend.to_numpy(nnx.Softmax()(y)), np.full((1, 3), 1 / 3))
    _, dy = nnx.SoftmaxNLL()(y, backend.asarray(label))
    assert not backend.to_numpy(relu.backward(dy, saved)).any()
    assert np.abs(score(nnx.SoftmaxNLL(), z, label, backend)[1]).min() > 0.01


def test_binary_decision(backend: Backend) -> None:
    """Row "Binary decision" (text E): p > threshold, so equality is a no; the trade-off."""
    p = np.array([0.1, 0.2, 0.35, 0.5, 0.6, 0.8, 0.9])
    truth = np.array([0, 0, 1, 0, 1, 1, 1])
    here = backend.asarray(p), backend.asarray(truth)
    precisions, recalls = [], []
    for threshold in (0.05, 0.15, 0.3, 0.5, 0.55, 0.7):
        yes = [a > threshold for a in p]
        hits = sum(1 for a, t in zip(yes, truth, strict=True) if a and t)
        precisions.append(nnx.metrics.precision(*here, threshold))
        recalls.append(nnx.metrics.recall(*here, threshold))
        assert precisions[-1] == pytest.approx(hits / sum(yes))
        assert recalls[-1] == pytest.approx(hits / 4)
    assert precisions == sorted(precisions)
    assert recalls == sorted(recalls, reverse=True)
    at = backend.asarray(np.array([0.5])), backend.asarray(np.array([1]))
    assert nnx.metrics.recall(*at, 0.5) == 0
    assert nnx.metrics.recall(*at, 0.49) == 1
