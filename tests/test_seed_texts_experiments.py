"""Every system of the texts the library grew from: data, experiments and comparisons.

The rows are listed in `test_seed_texts.py`. Where `examples/` has the experiment, it is run from
there. A simulated device is slow, so on a device long trainings are cut short and compared with
those on NumPy.
"""

import importlib
import importlib.util
import itertools
import math
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import assert_close

import nnx
import nnx.plot
from nnx.backends import Backend
from nnx.initializers import glorot_uniform, he_normal, zeros

F64: Any = np.float64
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `examples/name.py`."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_numpy(backend: Backend) -> bool:
    return backend.name == "numpy"


# ---- the AND gate ---------------------------------------------------------------------------


def train_gates(
    gate: str, lr: float, epochs: int, backend: Any, *, normal: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Of 20 networks 2-3-1 of tanh, how many rows each has right, and its mean squared error.

    They start from Glorot's weights, or as in the text from N(0, 1), biases too.
    """
    data = nnx.data.logic_gate(gate)
    rng = np.random.default_rng(0)
    glorot: dict[str, Any] = {"initializer": glorot_uniform, "rng": rng, "n_models": 20}
    model = nnx.Sequential(
        nnx.Linear(2, 3, **glorot), nnx.Tanh(), nnx.Linear(3, 1, **glorot), nnx.Tanh()
    )
    if normal:
        for _, p in model.parameters():
            p.value[...] = rng.standard_normal(p.value.shape)
    loss = nnx.MeanSquaredError(n_models=20)
    trainer = nnx.Trainer(model, loss, nnx.SGD(lr=lr), backend=backend)
    target = data.t[:, None].astype(np.float32)
    trainer.fit(data.x, target, epochs=epochs, batch_size=1)
    y = trainer.predict(data.x)
    right = ((y > 0.5) == (target > 0.5)).sum(axis=(1, 2))
    return right, ((y - target) ** 2).mean(axis=(1, 2))


def test_and_gate(backend: Backend) -> None:
    """Row "AND gate" (text B): at lr 0.1 twenty of twenty starts learn it; XOR is there too.

    On a device 10 epochs, which must give NumPy's networks.
    """
    if not on_numpy(backend):
        right, error = train_gates("and", 0.1, 10, backend)
        expected = train_gates("and", 0.1, 10, "numpy")
        np.testing.assert_array_equal(right, expected[0])
        np.testing.assert_allclose(error, expected[1], rtol=1e-4)
        return
    right, error = train_gates("and", 0.1, 1000, backend)
    assert (right == 4).sum() == 20
    assert error.max() < 0.01
    assert np.median(error) < 1e-3
    right, error = train_gates("and", 0.001, 1000, backend, normal=True)  # the text's settings
    assert (right == 4).sum() < 15
    assert np.median(error) > 0.05
    assert nnx.data.logic_gate("xor").t.tolist() == [0, 1, 1, 0]
    right, _ = train_gates("xor", 0.1, 1000, backend)
    assert (right == 4).any()


def test_decision_boundary(backend: Backend, tmp_path: Path) -> None:
    """Row "Boundary plots" (text B): one prediction of 400 points is the loop over them."""
    pytest.importorskip("matplotlib")
    trainer = nnx.Trainer(
        nnx.mlp([2, 3, 1], activation="tanh"), nnx.MeanSquaredError(), nnx.SGD(lr=0.1),
        backend=backend,
    )  # fmt: skip
    gate = nnx.data.logic_gate("and")
    asked: list[np.ndarray] = []

    def predict(points: np.ndarray) -> np.ndarray:
        asked.append(points)
        return trainer.predict(points)

    path = tmp_path / "boundary.svg"
    nnx.plot.decision_boundary(predict, gate.x, gate.t, path, extent=(0, 1, 0, 1))
    assert [len(points) for points in asked] == [400]
    steps = [i / 19 for i in range(20)]
    grid = np.array([(a, b) for b in steps for a in steps], np.float32)
    np.testing.assert_allclose(asked[0], grid, atol=1e-7)
    together = trainer.predict(asked[0])
    some = range(400) if on_numpy(backend) else range(0, 400, 20)
    for i in some:
        np.testing.assert_allclose(
            trainer.predict(asked[0][i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6
        )
    assert "<svg" in path.read_text()


# ---- data -----------------------------------------------------------------------------------


def test_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row "Data loading" (text D): four IDX files of 28 x 28 images, and no network."""
    import socket

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    rng = np.random.default_rng(0)
    sets = {}
    for part, n in (("train", 6), ("t10k", 3)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        sets[part] = images, labels
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, n, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">BBBBI", 0, 0, 8, 1, n)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    np.testing.assert_array_equal(
        nnx.data.read_idx(tmp_path / "train-images-idx3-ubyte"), sets["train"][0]
    )
    train, test = nnx.data.load_mnist(tmp_path)
    for data, part in ((train, "train"), (test, "t10k")):
        assert data.x.shape == (len(sets[part][0]), 784)
        np.testing.assert_array_equal(data.x, sets[part][0].reshape(-1, 784))
        np.testing.assert_array_equal(data.t, sets[part][1])


def test_one_hot(backend: Backend) -> None:
    """Row "One-hot" (text D): classes are declared; labels [1, 2, 3] work, an unseen one fails."""
    t, classes = nnx.data.encode_labels([1, 2, 3, 2])
    assert (t.tolist(), classes) == ([0, 1, 2, 1], (1, 2, 3))
    t, classes = nnx.data.encode_labels([1, 3, 3], classes=(1, 2, 3))  # 2 is absent
    assert (t.tolist(), classes) == ([0, 2, 2], (1, 2, 3))
    with pytest.raises(ValueError, match="4 at index 1"):
        nnx.data.encode_labels([1, 4], classes=(1, 2, 3))
    trainer = nnx.Trainer(nnx.mlp([2, 3]), nnx.SoftmaxNLL(), nnx.SGD(lr=0.0), backend=backend)
    x = np.eye(3, 2)
    rows = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 1]])
    trainer.fit(x, rows, shuffle=False)
    trainer.fit(x, t, shuffle=False)
    assert trainer.history["loss"][0] == trainer.history["loss"][1]
    with pytest.raises(ValueError, match=r"labels in 0\.\.2, got 3"):
        trainer.fit(x, [0, 1, 3])


def test_normalization_of_the_inputs() -> None:
    """Row "Normalise" (text D): the statistics of the training set, also for what comes later."""
    rng = np.random.default_rng(0)
    train = rng.standard_normal((50, 3)) * [1, 5, 0.1] + [0, -3, 7]
    train[:, 1] = 2.5  # constant: a deviation of 0
    scale = nnx.data.Standardizer.fit(train)
    z = scale.transform(train)
    for j in range(3):
        mean = math.fsum(train[:, j]) / 50
        std = math.sqrt(math.fsum((a - mean) ** 2 for a in train[:, j]) / 50)
        expected = [(a - mean) / (std if j != 1 else 1.0) for a in train[:, j]]
        np.testing.assert_allclose(z[:, j], expected, rtol=1e-10, atol=1e-12)
    assert not z[:, 1].any()
    test = np.full((4, 3), 100.0)
    expected = [[(100 - m) / s for m, s in zip(scale.mean, scale.scale, strict=True)]] * 4
    np.testing.assert_allclose(scale.transform(test), expected, rtol=1e-12)
    whole = nnx.data.Standardizer.fit(train, per_feature=False).transform(train)
    assert (abs(whole.mean()), whole.std()) == (pytest.approx(0, abs=1e-12), pytest.approx(1))


# ---- numbers --------------------------------------------------------------------------------


def test_naive_product(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row "Naive matmul" (text D): the three loops give what @ and a layer give, c_31 = 18."""
    a = np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]])
    b = np.array([[1, 1], [2, 2], [3, 3]])
    c = example("matrix_product", monkeypatch).product(a, b)
    assert c.tolist() == [[6, 6], [12, 12], [18, 18], [24, 24]]
    assert c[2, 0] == 18
    np.testing.assert_array_equal(c, a @ b)
    layer = nnx.Linear(3, 2, bias=False, initializer=zeros, dtype=F64)
    layer.weight.value[...] = b
    layer.to(backend)
    np.testing.assert_array_equal(backend.to_numpy(layer(backend.asarray(a, F64))), c)


def test_rules_of_the_variance() -> None:
    """Row "Variance rules" (text D): sums of normals, products with weights, and 68.27%."""
    rng, n = np.random.default_rng(0), 200_000
    (m1, s1), (m2, s2) = (0.5, 1.5), (-2.0, 0.7)
    one, two = rng.normal(m1, s1, n), rng.normal(m2, s2, n)
    for sample, mean, variance in (
        (one + two, m1 + m2, s1**2 + s2**2),
        (3 * one, 3 * m1, 9 * s1**2),
    ):
        assert abs(sample.mean() - mean) < 4 * math.sqrt(variance / n)
        assert abs(sample.var() - variance) < 4 * variance * math.sqrt(2 / n)
    product = one * two  # of independent variables: E[x^2 w^2] - (E[x] E[w])^2
    variance = (s1**2 + m1**2) * (s2**2 + m2**2) - (m1 * m2) ** 2
    spread = np.std((product - product.mean()) ** 2) / math.sqrt(n)
    assert abs(product.var() - variance) < 4 * spread
    share = math.erf(1 / math.sqrt(2))
    assert share == pytest.approx(0.6827, abs=5e-5)
    tolerance = 4 * math.sqrt(share * (1 - share) / n)
    assert abs((np.abs(one - m1) < s1).mean() - share) < tolerance
    assert abs((np.abs(one - m1) < s1**2).mean() - share) > 10 * tolerance  # not +-sigma^2


# ---- 152 layers -----------------------------------------------------------------------------

DRAWS = 50


@pytest.fixture(scope="module")
def depth() -> list[list[dict[str, np.ndarray]]]:
    """The signals behind each of 152 layers, of three draws, as the example computes them."""
    with pytest.MonkeyPatch.context() as patch:
        study = example("initialization_study", patch)
        return [list(study.signals(seed)) for seed in range(3)]


def depth_statistics(std: float, relu: bool) -> np.ndarray:
    """The standard deviation of the signal behind layer 152, of 50 draws.

    By the law of the experiment, not by its matrices: where W is normal and independent of x, so is
    x W, exactly, with deviation |x| std in each element. A layer then costs 512 random numbers
    instead of 262,144. The draws with matrices are in the fixture `depth`.
    """
    layers: list[nnx.Layer] = [nnx.ReLU()] if relu else []
    rng = np.random.default_rng(1)
    x = rng.standard_normal((DRAWS, 512))
    for _ in range(152):
        x = np.linalg.norm(x, axis=1, keepdims=True) * std * rng.standard_normal((DRAWS, 512))
        for layer in layers:
            x = layer(x)
    return np.asarray(x.std(axis=1))


def test_depth_1(depth: Any) -> None:
    """Row "Depth exp. 1: N(0,1), 152x512, linear" (text D): 10^205.9; float32 ends at layer 28."""
    assert nnx.plot.log10_rms(depth[0][-1]["N(0, 1)"]) == pytest.approx(205.9, abs=0.5)
    theory = math.log(float(np.finfo(np.float32).max)) / math.log(math.sqrt(512))
    assert theory == pytest.approx(28.4, abs=0.1)
    for signals in depth:
        assert len(signals) == 152
        last = signals[-1]["N(0, 1)"]
        assert np.isfinite(last).all()
        with np.errstate(over="ignore"):
            assert last.std() == math.inf  # the squares overflow, the signal doesn't
        finite = [bool(np.isfinite(x["N(0, 1), float32"]).all()) for x in signals]
        assert finite.index(False) + 1 in (28, 29)


def test_depth_2(depth: Any) -> None:
    """Row "Depth exp. 2: /sqrt(512)" (text D): the size stays, within a factor of five."""
    drawn = [signals[-1]["N(0, 1/512)"].std() for signals in depth]
    stds = depth_statistics(1 / math.sqrt(512), relu=False)
    assert 0.2 <= min(*drawn, *stds) <= max(*drawn, *stds) <= 3
    assert 0.7 <= np.median(stds) <= 1.1


def test_depth_3(depth: Any) -> None:
    """Row "Depth exp. 3: + ReLU" (text D): each layer halves the power, 2^-76 in the end."""
    drawn = [signals[-1]["N(0, 1/512), ReLU"].std() for signals in depth]
    for stds in (drawn, depth_statistics(1 / math.sqrt(512), relu=True)):
        assert 0.1 <= np.median(stds) / 2**-76 <= 10


def test_depth_4(depth: Any) -> None:
    """Row "Depth exp. 4: sqrt(2/512)+ReLU" (text D): He's factor, which `Linear` has, mends it."""
    drawn = []
    for signals in depth:
        he, lecun = signals[-1]["N(0, 2/512), ReLU"], signals[-1]["N(0, 1/512), ReLU"]
        np.testing.assert_allclose(he, lecun * 2.0**76, rtol=1e-10)  # ReLU(a x) = a ReLU(x)
        drawn.append(he.std())
    stds = depth_statistics(math.sqrt(2 / 512), relu=True)
    assert len(stds) == DRAWS
    assert 0.05 <= min(*drawn, *stds) <= max(*drawn, *stds) <= 10
    rng, relu = np.random.default_rng(2), nnx.ReLU()
    x = rng.standard_normal((1, 512), np.float32)
    for _ in range(152):
        x = relu(nnx.Linear(512, 512, rng=rng)(x))
    assert x.dtype == np.float32
    assert 0.05 <= x.std() <= 10


def test_initial_weights() -> None:
    """Row "Init in Linear" (text D): sqrt(2 / fan_in) of the layer's own fan-in, bias 0."""
    rng = np.random.default_rng(0)
    for n_in, n_out in ((784, 50), (50, 784)):
        layer = nnx.Linear(n_in, n_out, rng=rng)
        assert layer.bias is not None
        weights, std = layer.weight.value, math.sqrt(2 / n_in)
        assert abs(weights.mean()) < 4 * std / math.sqrt(weights.size)
        assert abs(weights.std() / std - 1) < 4 / math.sqrt(2 * weights.size)
        assert not layer.bias.value.any()
    again = nnx.Linear(784, 50, initializer=he_normal, rng=np.random.default_rng(0))
    first = nnx.Linear(784, 50, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(first.weight.value, again.weight.value)
    # Zero biases leave the units of a layer different, so random weights suffice.
    assert len(np.unique(first.weight.value[0])) == 50


def test_batch_normalization(backend: Backend, rng: np.random.Generator) -> None:
    """Row "BatchNorm" (text D): mean 0 and deviation 1 in training, running ones in evaluation."""
    layer = nnx.BatchNorm(4, dtype=F64)
    x = rng.standard_normal((16, 4)) * 3 + 5
    train = nnx.Sequential(nnx.Linear(4, 4, rng=rng, dtype=F64), layer)
    trainer = nnx.Trainer(train, nnx.MeanSquaredError(), nnx.SGD(lr=0.0), backend=backend)
    seen: list[np.ndarray] = []
    forward = layer.forward

    def watched(x: Any, *, step: Any = None) -> Any:
        y, saved = forward(x, step=step)
        if step is not None:
            seen.extend([backend.to_numpy(x).copy(), backend.to_numpy(y).copy()])
        return y, saved

    layer.forward = watched  # type: ignore[method-assign]
    trainer.fit(x, x, batch_size=16)
    del layer.forward
    given, y = seen
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(y.std(axis=0), 1, rtol=1e-4)
    mean = np.array([0.1 * math.fsum(given[:, j]) / 16 for j in range(4)])
    variance = [0.9 + 0.1 * given[:, j].var(ddof=1) for j in range(4)]
    assert_close(backend.to_numpy(layer.running_mean), mean)
    assert_close(backend.to_numpy(layer.running_var), np.array(variance))
    evaluated = backend.to_numpy(layer(backend.asarray(given)))
    assert_close(evaluated, (given - mean) / np.sqrt(np.array(variance) + 1e-5))
    assert nnx.check_gradients(nnx.BatchNorm(4, dtype=F64).to(backend), x, rng=rng) < 1e-7
    x, dy = rng.standard_normal((2, 5, 4))  # in evaluation: the statistics don't move with x
    _, saved = layer.forward(backend.asarray(x))
    dx = backend.to_numpy(layer.backward(backend.asarray(dy), saved))
    assert_close(dx, dy / np.sqrt(np.array(variance) + 1e-5))


# ---- classification -------------------------------------------------------------------------


def test_untrained_network(backend: Backend) -> None:
    """Row "Untrained baseline" (text D): 784-50-10 guesses: accuracy .1, mean loss near ln 10."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((1000, 784), np.float32), rng.integers(0, 10, 1000)
    trainer = nnx.Trainer(
        nnx.mlp([784, 50, 10]), nnx.SoftmaxNLL(), nnx.SGD(lr=0.1), backend=backend
    )
    scores = trainer.evaluate(x, labels)
    assert abs(scores["accuracy"] - 0.1) <= 0.03
    assert 2.2 <= scores["loss"] <= 3.5
    z = trainer.predict(x).astype(F64)
    z -= z.max(axis=1, keepdims=True)
    summed = float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(1000), labels]).sum())
    assert summed == pytest.approx(1000 * scores["loss"], rel=1e-4)  # what the text prints


def digits(samples: int) -> tuple[np.ndarray, np.ndarray]:
    train, _ = nnx.data.load_digits()
    x = train.x[:samples]
    return nnx.data.Standardizer.fit(x).transform(x), train.t[:samples]


def test_short_run(backend: Backend) -> None:
    """Row "Short run" (text D): 100 examples, 30 epochs: lr 1.0 of the mean is .01 of the sum."""
    x, t = digits(100)
    accuracy = {}
    for lr in (0.01, 1.0):
        model = nnx.mlp([64, 50, 10])
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(lr=lr), backend=backend)
        history = trainer.fit(x, t, epochs=30, batch_size=100)
        assert history["loss"][-1] < history["loss"][0]
        accuracy[lr] = trainer.evaluate(x, t)["accuracy"]
    assert accuracy[1.0] == 1.0
    assert accuracy[0.01] < 0.6


def test_every_layer_is_a_model() -> None:
    """Row "Model class" (text D): all layers can be called, differentiated and updated."""
    rng = np.random.default_rng(0)
    checked = set()
    for name in nnx.layers.__all__:
        cls = getattr(nnx.layers, name)
        if not issubclass(cls, nnx.Layer) or cls in (nnx.Layer, nnx.Sequential):
            continue
        if name == "Linear":
            layer: nnx.Layer = cls(4, 4, rng=rng)
        elif name in ("BatchNorm", "LayerNorm", "RMSNorm"):
            layer = cls(4)
        else:
            layer = cls()
        model = nnx.Sequential(nnx.Linear(4, 4, rng=rng), layer)
        x = rng.standard_normal((6, 4), np.float32)
        y, saved = model.forward(x)
        assert y.dtype == np.float32
        assert model.backward(np.ones_like(y), saved).shape == x.shape  # type: ignore[union-attr]
        assert model(x).shape == y.shape
        trainer = nnx.Trainer(model, nnx.MeanSquaredError(), nnx.SGD(lr=0.01))
        before = trainer.vector.value.copy()
        trainer.fit(x, rng.standard_normal(y.shape))
        assert (trainer.vector.value != before).any(), name
        assert type(layer).from_config(layer.config(), {}).config() == layer.config()
        checked.add(name)
    assert {"ReLU", "Softmax", "BatchNorm", "Dropout", "Linear"} <= checked


def test_weight_gradient_is_a_product(rng: np.random.Generator) -> None:
    """Row "dW by broadcasting" (text D): the sum of N outer products, without N matrices."""
    n, n_in, n_out = 256, 96, 64
    layer = nnx.Linear(n_in, n_out, rng=rng, dtype=F64)
    x, g = rng.standard_normal((n, n_in)), rng.standard_normal((n, n_out))
    _, saved = layer.forward(x)
    assert layer.backward(g, saved) is not None
    for _, p in layer.parameters():
        p.fresh = True
    tracemalloc.start()
    try:
        layer.backward(g, saved, need_dx=False)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        broadcast = np.sum(x[:, :, None] * g[:, None, :], axis=0)
        temporary = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(layer.weight.grad, x.T @ g, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.weight.grad, broadcast, rtol=1e-10, atol=1e-12)
    assert peak < 8 * n_in * n_out  # less than one weight matrix
    assert temporary >= 8 * n * n_in * n_out


def test_accuracy_of_labels_and_one_hot_rows(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Accuracy" (text D): integer labels and one-hot rows give the same."""
    scores, labels = rng.standard_normal((40, 5)), rng.integers(0, 5, 40)
    largest = [max(range(5), key=row.__getitem__) for row in scores.tolist()]
    hits = sum(j == t for j, t in zip(largest, labels.tolist(), strict=True))
    here = backend.asarray(scores)
    for target in (labels, np.eye(5)[labels]):
        assert nnx.accuracy(here, backend.asarray(target)) == hits / 40
    assert 0 < hits < 40


# ---- comparisons ----------------------------------------------------------------------------


def test_reference_vectors(backend: Backend) -> None:
    """Row "Tests vs PyTorch" (text D): 3 x 5 cross-entropy and Linear, to 1e-10.

    The vectors come from PyTorch in float64; the test below makes them again.
    """
    z = (np.arange(15).reshape(3, 5) % 7 - 3) / 2
    value, dz = nnx.SoftmaxNLL()(backend.asarray(z), backend.asarray(np.array([4, 0, 2])))
    assert float(backend.to_numpy(value)) == pytest.approx(CROSS_ENTROPY, rel=1e-10)
    np.testing.assert_allclose(backend.to_numpy(dz)[0], CROSS_ENTROPY_GRADIENT, rtol=1e-10)


CROSS_ENTROPY = 1.0949262246114884
CROSS_ENTROPY_GRADIENT = [
    0.019337405799332626,
    0.031881992261519713,
    0.05256451879386443,
    0.08666424021956093,
    -0.19044815707427767,
]


@pytest.mark.torch
def test_against_pytorch(rng: np.random.Generator) -> None:
    """Row "Tests vs PyTorch" (text D): the stored vectors, and Linear of 3 x 768 to 50."""
    import torch

    z = torch.tensor((np.arange(15).reshape(3, 5) % 7 - 3) / 2, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(z, torch.tensor([4, 0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(CROSS_ENTROPY, rel=1e-12)
    np.testing.assert_allclose(z.grad[0].numpy(), CROSS_ENTROPY_GRADIENT, rtol=1e-12)

    layer = nnx.Linear(768, 50, rng=rng, dtype=F64)
    weight, bias = layer.to_columns()
    theirs = torch.nn.Linear(768, 50, dtype=torch.float64)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(weight))
        theirs.bias.copy_(torch.from_numpy(bias))
    x, dy = rng.standard_normal((3, 768)), rng.standard_normal((3, 50))
    there = torch.tensor(x, requires_grad=True)
    out = theirs(there)
    out.backward(torch.from_numpy(dy))
    y, saved = layer.forward(x)
    dx = layer.backward(dy, saved)
    assert dx is not None
    assert layer.bias is not None
    for ours, reference in (
        (y, out.detach()),
        (dx, there.grad),
        (layer.weight.grad, theirs.weight.grad.T),
        (layer.bias.grad, theirs.bias.grad),
    ):
        np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-10, atol=1e-12)


NETWORKS = 5


def final_accuracy(loss: nnx.Loss, lr: float, backend: Any, epochs: int = 50) -> np.ndarray:
    """Training accuracy of five networks on 100 digits, after full-batch descent."""
    train, _ = nnx.data.load_digits()
    x, labels = train.x[:100] / 16, train.t[:100]
    target = np.eye(10)[labels] if isinstance(loss, nnx.MeanSquaredError) else labels
    trainer = nnx.Trainer(
        nnx.mlp([64, 50, 10], n_models=NETWORKS), loss, nnx.SGD(lr=lr), backend=backend
    )
    trainer.fit(x, target, epochs=epochs, batch_size=100)
    return np.asarray((trainer.predict(x).argmax(axis=-1) == labels).mean(axis=-1))


def test_comparison_of_losses(backend: Backend) -> None:
    """Row "Loss comparison" (text D): lr 0.5: CE > MSE > MSES; at ten times that MSES is best.

    On a device five epochs, which must give NumPy's accuracies.
    """
    losses = {
        "CE": nnx.SoftmaxNLL(n_models=NETWORKS),
        "MSE": nnx.MeanSquaredError(n_models=NETWORKS),
        "MSES": nnx.SoftmaxMSE(n_models=NETWORKS),
    }
    if not on_numpy(backend):
        for loss in losses.values():
            here, there = (final_accuracy(loss, 0.5, b, 5) for b in (backend, "numpy"))
            np.testing.assert_allclose(here, there, atol=0.011)
        return
    final = {name: final_accuracy(loss, 0.5, backend) for name, loss in losses.items()}
    assert (final["CE"] > final["MSE"]).all()
    assert (final["MSE"] > final["MSES"]).all()
    assert final["CE"].min() > 0.97
    assert final["MSES"].mean() < 0.4
    steep = {name: final_accuracy(loss, 5.0, backend) for name, loss in losses.items()}
    assert (steep["MSES"] > 0.8).all()
    assert max(steep["CE"].mean(), steep["MSE"].mean()) < 0.35
    summed = final_accuracy(losses["CE"], 0.5 * 100, backend)  # the printed sum over the batch
    assert summed.max() < 0.2


def test_regularized_cost(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Regularised cost" (text E): lambda W on the gradient, whatever the batch size."""
    x, t = rng.standard_normal((8, 3)), rng.integers(0, 2, 8)
    for batch in (8, 2):
        ends = []
        for l2 in (0.0, 0.1):
            model = nnx.mlp([3, 4, 2], dtype=F64, seed=3)
            trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(lr=0.5, l2=l2), backend=backend)
            before = backend.to_numpy(trainer.vector.value).copy()
            trainer.train_step(backend.asarray(x[:batch]), backend.asarray(t[:batch]))
            ends.append(backend.to_numpy(trainer.vector.value).copy())
        np.testing.assert_allclose(ends[0] - ends[1], 0.5 * 0.1 * before, rtol=1e-9, atol=1e-14)
    optimizer = nnx.SGD(lr=0.5, l2=0.1)
    w = nnx.Parameter(backend.asarray([1.0, -2.0], F64))
    optimizer.bind(nnx.ParameterVector([w]))
    assert float(backend.to_numpy(optimizer.penalty())) == pytest.approx(0.1 / 2 * 5)


def compare(
    libraries: list[str], monkeypatch: pytest.MonkeyPatch, out: Path, capsys: Any
) -> dict[str, float]:
    """Accuracies by library, of two epochs on the digits, by examples/mnist.py."""
    arguments = ["--data", "digits", "--epochs", "2", "--out", str(out), "--libraries", *libraries]
    module = example("mnist", monkeypatch)
    assert {"nnx", "PyTorch", "scikit-learn", "TensorFlow"} == set(module.LIBRARIES)
    module.main(arguments)
    lines = re.findall(r"^(\S+) +(0\.\d+) +\d+\.\d+$", capsys.readouterr().out, re.MULTILINE)
    return {name: float(accuracy) for name, accuracy in lines}


def test_library_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row "Library comparison" (text E): optional comparators; without them nnx runs alone."""
    assert compare(["nnx"], monkeypatch, tmp_path, capsys)["nnx"] > 0.8


@pytest.mark.torch
def test_library_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row "Library comparison" (text E): the same start and settings end at equal accuracies."""
    accuracy = compare(["nnx", "PyTorch"], monkeypatch, tmp_path, capsys)
    assert accuracy["nnx"] == pytest.approx(accuracy["PyTorch"], abs=0.05)


def test_what_the_texts_left_to_do(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Combining, batch backward, tanh, losses, optimisers, init" (texts A, C, E).

    Every loss under a deep net of mixed layers, every optimizer and every initializer, works and
    is described.
    """
    x = rng.standard_normal((6, 3))
    model = nnx.Sequential(
        nnx.Linear(3, 5, rng=rng, dtype=F64),
        nnx.Tanh(),
        nnx.BatchNorm(5, dtype=F64),
        nnx.Linear(5, 4, rng=rng, dtype=F64),
        nnx.Sigmoid(),
        nnx.Linear(4, 2, rng=rng, dtype=F64),
    ).to(backend)
    assert nnx.check_gradients(model, x, rng=rng) < 1e-7
    labels, numbers = rng.integers(0, 2, 6), rng.standard_normal((6, 2))
    losses: list[tuple[nnx.Loss, Any]] = [
        (nnx.SoftmaxNLL(), labels),
        (nnx.SoftmaxMSE(), labels),
        (nnx.MeanSquaredError(), numbers),
        (nnx.MeanAbsoluteError(), numbers + 5),
        (nnx.Huber(), numbers),
        (nnx.BCEWithLogits(), np.eye(2)[labels]),
        (nnx.Hinge(), 2 * np.eye(2)[labels] - 1),
        (nnx.SquaredHinge(), 2 * np.eye(2)[labels] - 1),
    ]
    for loss, target in losses:
        z = rng.standard_normal((6, 2))
        assert nnx.check_gradients(loss, z, target, backend=backend) < 1e-7
    p = rng.uniform(0.1, 0.9, (6, 2))
    assert nnx.check_gradients(nnx.NLL(), p, labels, backend=backend) < 1e-7

    optimizers: list[Any] = [c for c in vars(nnx.optimizers).values() if isinstance(c, type)]
    optimizers = [c for c in optimizers if issubclass(c, nnx.Optimizer) and c is not nnx.Optimizer]
    assert len(optimizers) >= 7
    for cls in optimizers:
        assert cls.__doc__
        weights = nnx.Parameter(backend.asarray([3.0, -2.0], F64))
        optimizer = cls(lr=0.01)
        optimizer.bind(nnx.ParameterVector([weights]))
        for _ in range(20):
            weights.grad[...] = weights.value  # of half the squared length
            weights.fresh = False
            optimizer.step()
        left = backend.to_numpy(weights.value)
        assert 0 < left[0] < 3
        assert -2 < left[1] < 0

    schemes = [n for n in dir(nnx.initializers) if re.fullmatch(r"(he|glorot|lecun)_\w+", n)]
    for family, kind in itertools.product(("he", "glorot", "lecun"), ("normal", "uniform")):
        assert f"{family}_{kind}" in schemes
    for name in schemes:
        initializer = getattr(nnx.initializers, name)
        assert initializer.__doc__
        weights = initializer((300, 100), rng)
        variance = {"he": 2 / 300, "glorot": 2 / 400, "lecun": 1 / 300}[name.split("_")[0]]
        assert weights.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / 30_000))
