"""Every system of the texts the library grew from: backpropagation and training.

The rows are listed in `test_seed_texts.py`.
"""

import importlib
import importlib.util
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import assert_close, assert_same_bits

import nnx
from nnx.backends import Backend

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


def network(*sizes: int, backend: Backend, seed: int = 0) -> nnx.Sequential:
    """Tanh between affine layers, in float64, with random biases."""
    rng = np.random.default_rng(seed)
    layers: list[nnx.Layer] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layer = nnx.Linear(n_in, n_out, rng=rng, dtype=F64)
        assert layer.bias is not None
        layer.bias.value[...] = rng.standard_normal(n_out)
        layers += [layer, nnx.Tanh()]
    return nnx.Sequential(*layers[:-1]).to(backend)


def state(model: nnx.Layer, backend: Backend, what: str = "value") -> dict[str, np.ndarray]:
    """Copies on the host of the parameters' values or gradients."""
    return {n: backend.to_numpy(getattr(p, what)).copy() for n, p in model.parameters()}


def derive(model: nnx.Layer, x: Any, t: Any, backend: Backend) -> tuple[float, Any]:
    """The loss of a classifier, and the gradients of its parameters by name."""
    for _, p in model.parameters():
        p.fresh = True
    y, saved = model.forward(backend.asarray(x))
    loss, dy = nnx.SoftmaxNLL()(y, backend.asarray(t))
    model.backward(dy, saved)
    return float(backend.to_numpy(loss)), state(model, backend, "grad")


def test_a_batch_is_a_loop_over_its_examples(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Forward batch" (text E): Z = WA + B, and the cost is the mean of M losses."""
    model = network(3, 5, 4, backend=backend)
    x, t = rng.standard_normal((6, 3)), rng.integers(0, 4, 6)
    z = backend.to_numpy(model(backend.asarray(x)))
    one = [backend.to_numpy(model(backend.asarray(x[i : i + 1]))) for i in range(6)]
    np.testing.assert_allclose(z, np.concatenate(one), rtol=1e-12, atol=1e-12)
    cost, _ = derive(model, x, t, backend)
    losses = [derive(model, x[i : i + 1], t[i : i + 1], backend)[0] for i in range(6)]
    assert cost == pytest.approx(math.fsum(losses) / 6, rel=1e-12)


def test_error_of_the_output_layer(backend: Backend, rng: np.random.Generator) -> None:
    """Row "BP1" (text E): grad L times the Jacobian; the Hadamard form is for elementwise f."""
    s = np.array([[0.2021, 0.1562, 0.3391, 0.1983, 0.1043]])
    a, saved = nnx.Softmax().forward(backend.asarray(np.log(s)))
    _, da = nnx.NLL()(a, backend.asarray(np.array([1])))
    delta = backend.to_numpy(nnx.Softmax().backward(da, saved))
    assert delta.round(3).tolist() == [[0.202, -0.844, 0.339, 0.198, 0.104]]
    hadamard = backend.to_numpy(da) * s * (1 - s)
    assert hadamard.round(3).tolist() == [[0, -0.844, 0, 0, 0]]
    _, fused = nnx.SoftmaxNLL()(backend.asarray(np.log(s)), backend.asarray(np.array([1])))
    assert_close(backend.to_numpy(fused), delta)

    z, da = rng.standard_normal((2, 3, 4))
    _, saved = nnx.Sigmoid().forward(backend.asarray(z))
    f = 1 / (1 + np.exp(-z))
    assert_close(
        backend.to_numpy(nnx.Sigmoid().backward(backend.asarray(da), saved)), da * f * (1 - f)
    )


def test_the_sign_of_the_error(backend: Backend, rng: np.random.Generator) -> None:
    """Row "BP1 example" (text E): A - Y lowers the loss; the printed Y - A raises it."""
    z, t = rng.standard_normal((4, 5)), np.array([3, 0, 2, 2])
    here, labels, loss = backend.asarray(z), backend.asarray(t), nnx.SoftmaxNLL()
    before, delta = loss(here, labels)
    assert delta is not None
    a = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert_close(backend.to_numpy(delta), (a - np.eye(5)[t]) / 4)
    down, up = (float(backend.to_numpy(loss(here - s * delta, labels)[0])) for s in (0.1, -0.1))
    assert down < float(backend.to_numpy(before)) < up


def test_error_of_the_hidden_layers(backend: Backend, rng: np.random.Generator) -> None:
    """Row "BP2" (text E): f'(z), not f(z), times W^T delta, through three hidden layers."""
    model = network(4, 6, 5, 3, 2, backend=backend)
    x, t = rng.standard_normal(4), np.array([1])
    _, gradients = derive(model, x[None], t, backend)
    values = state(model, backend)
    w = [values[f"{2 * i}.weight"].T for i in range(4)]  # columns, as the text writes it
    b = [values[f"{2 * i}.bias"] for i in range(4)]
    activations, zs = [x], []
    for i in range(4):
        zs.append(w[i] @ activations[i] + b[i])
        activations.append(np.tanh(zs[i]))
    delta = np.exp(zs[3]) / np.exp(zs[3]).sum() - np.eye(2)[1]
    for i in (3, 2, 1, 0):
        assert_close(gradients[f"{2 * i}.weight"].T, np.outer(delta, activations[i]))
        assert_close(gradients[f"{2 * i}.bias"], delta)
        if i:
            delta = (1 - np.tanh(zs[i - 1]) ** 2) * (w[i].T @ delta)
    assert nnx.check_gradients(model, rng.standard_normal((5, 4)), rng=rng) < 1e-7


def test_where_the_mean_is_taken(backend: Backend, rng: np.random.Generator) -> None:
    """Row "BP3, BP4" (text E): 1/M in delta, or in front of Delta A^T and the sum of delta."""
    model = network(3, 4, backend=backend)
    x, t = rng.standard_normal((7, 3)), rng.integers(0, 4, 7)
    _, inside = derive(model, x, t, backend)
    y, saved = model.forward(backend.asarray(x))
    for _, p in model.parameters():
        p.fresh = True
    _, delta = nnx.SoftmaxNLL()(y, backend.asarray(t), normalizer=1.0)  # the sum over the batch
    model.backward(delta, saved)
    outside = {name: g / 7 for name, g in state(model, backend, "grad").items()}
    host = backend.to_numpy(delta)
    looped = np.zeros((3, 4))
    for i, j in np.ndindex(3, 4):
        looped[i, j] = sum(host[m, j] * x[m, i] for m in range(7)) / 7
    for name, gradient in inside.items():
        assert_close(gradient, outside[name])
    assert_close(inside["0.weight"], looped)
    assert_close(inside["0.bias"], host.sum(axis=0) / 7)
    assert nnx.check_gradients(model, x, rng=rng) < 1e-7


def test_the_flat_vector_is_row_major(backend: Backend) -> None:
    """Row "Flatten of W" (text E): w_11, w_12, ..., and the parameter is a view of the vector."""
    weight = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    p = nnx.Parameter(backend.asarray(weight, F64))
    vector = nnx.ParameterVector([p])
    assert vector.size == 6
    flat = backend.to_numpy(vector.value)[0, :6]
    assert flat.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    vector.value[0, 4] = -5.0
    assert backend.to_numpy(p.value).tolist() == [[1.0, 2.0, 3.0], [4.0, -5.0, 6.0]]


def test_passes_of_a_numeric_gradient(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Row "Numeric gradient" (text E): P + 1 or 2 P forward passes, against 1 and 1."""
    rows = {"rng": rng, "dtype": F64}
    counted = example("gradient_check", monkeypatch).Counted
    model = counted(nnx.Linear(3, 4, **rows), nnx.Tanh(), nnx.Linear(4, 2, **rows))
    x, t, loss = rng.standard_normal((5, 3)), rng.integers(0, 2, 5), nnx.SoftmaxNLL()
    values = [p.value for _, p in model.parameters()]
    n = sum(v.size for v in values)
    assert n == 3 * 4 + 4 + 4 * 2 + 2

    y, saved = model.forward(x)
    model.backward(loss(y, t)[1], saved)
    assert (model.forwards, model.backwards) == (1, 1)
    exact = np.concatenate([p.grad.ravel() for _, p in model.parameters()])

    def shifted(value: Any, i: Any, eps: float) -> float:
        kept = value[i]
        value[i] = kept + eps
        result = float(loss(model(x), t)[0])
        value[i] = kept
        return result

    places = [(v, i) for v in values for i in np.ndindex(v.shape)]
    model.forwards = 0
    here = float(loss(model(x), t)[0])
    forward = np.array([(shifted(v, i, 1e-7) - here) / 1e-7 for v, i in places])
    assert model.forwards == n + 1
    model.forwards = 0
    central = np.array([(shifted(v, i, 1e-5) - shifted(v, i, -1e-5)) / 2e-5 for v, i in places])
    assert model.forwards == 2 * n
    error, better = (np.linalg.norm(g - exact) / np.linalg.norm(exact) for g in (forward, central))
    assert better < 1e-8 < error < 1e-5


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda lr: nnx.SGD(lr),
        lambda lr: nnx.SGD(lr, momentum=0.9),
        lambda lr: nnx.Adam(lr),
        lambda lr: nnx.AdamW(lr),
        lambda lr: nnx.AMSGrad(lr),
        lambda lr: nnx.AdaGrad(lr),
        lambda lr: nnx.RMSProp(lr),
        lambda lr: nnx.Lion(lr),
    ],
    ids=["SGD", "momentum", "Adam", "AdamW", "AMSGrad", "AdaGrad", "RMSProp", "Lion"],
)
def test_a_learning_rate_of_zero_changes_nothing(
    optimizer: Any, backend: Backend, rng: np.random.Generator
) -> None:
    """Row "Update rule" (texts A, C, B, D, E): w -= lr * grad, and lr = 0 keeps every bit."""
    x, t = rng.standard_normal((8, 3)), rng.integers(0, 2, 8)
    model = network(3, 4, 2, backend=backend)
    before = state(model, backend)
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), optimizer(0.0), backend=backend)
    trainer.fit(x, t, epochs=2, batch_size=3)
    for name, value in state(model, backend).items():
        assert_same_bits(value, before[name])


def test_update_rule(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Update rule" (texts A, C, B, D, E): with the learning rate that A and C leave out."""
    x, t = rng.standard_normal((8, 3)), rng.integers(0, 2, 8)
    model = network(3, 4, 2, backend=backend)
    before = state(model, backend)
    _, gradients = derive(network(3, 4, 2, backend=backend), x, t, backend)
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(lr=0.3), backend=backend)
    trainer.fit(x, t, batch_size=8)
    for name, value in state(model, backend).items():
        assert_close(value, before[name] - 0.3 * gradients[name])


def test_the_gradient_of_a_batch_is_the_average(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Average-gradient step" (text A): W -= (1/N) sum of the examples' gradients."""
    model = network(3, 4, 2, backend=backend)
    x, t = rng.standard_normal((5, 3)), rng.integers(0, 2, 5)
    _, batch = derive(model, x, t, backend)
    single = [derive(model, x[i : i + 1], t[i : i + 1], backend)[1] for i in range(5)]
    for name, gradient in batch.items():
        assert_close(gradient, sum(g[name] for g in single) / 5)


def test_gradient_descent_on_a_parabola(backend: Backend) -> None:
    """Row "GD demo" (text D): (x - 2)^2 + 1 from 5 by 0.1: after 10 steps near 2, not at it."""
    x = nnx.Parameter(backend.asarray([5.0], F64))
    optimizer = nnx.SGD(lr=0.1)
    optimizer.bind(nnx.ParameterVector([x]))
    for n in range(1, 11):
        x.grad[...] = 2 * (x.value - 2)
        x.fresh = False
        optimizer.step()
        here = float(backend.to_numpy(x.value)[0])
        assert here == pytest.approx(2 + 3 * 0.8**n, rel=1e-14)
    assert here == pytest.approx(2.3221225472, abs=1e-10)
    assert (here - 2) ** 2 + 1 == pytest.approx(1.10376, abs=5e-6)


def test_steps_of_an_epoch(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Steps per epoch" (text E): 10 samples in batches of 4 are 3 steps, the last of 2."""
    x, t = rng.standard_normal((10, 3)), rng.integers(0, 2, 10)

    class Sizes(nnx.Sequential):
        sizes: list[int] = []  # noqa: RUF012

        def forward(self, x: Any, *, step: Any = None) -> Any:
            if step is not None:
                self.sizes.append(len(x))
            return super().forward(x, step=step)

    model = Sizes(network(3, 2, backend=backend))
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(lr=0.0), backend=backend)
    history = trainer.fit(x, t, epochs=2, batch_size=4)
    assert model.sizes == [4, 4, 2, 4, 4, 2]
    z = x @ state(model, backend)["0.0.weight"] + state(model, backend)["0.0.bias"]
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(10), t]
    assert history["loss"] == pytest.approx([losses.mean()] * 2, rel=1e-12)  # by true sizes


def test_backward_is_pure(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Dense class" (text B): backward changes no weight, so dx is that of the forward."""
    layer = nnx.Linear(3, 2, rng=rng, dtype=F64).to(backend)
    before = state(layer, backend)
    x, dy = rng.standard_normal((1, 3)), rng.standard_normal((1, 2))
    _, saved = layer.forward(backend.asarray(x))
    dx = backend.to_numpy(layer.backward(backend.asarray(dy), saved)).copy()
    assert_close(dx, dy @ before["weight"].T)
    again = backend.to_numpy(layer.backward(backend.asarray(dy), saved))
    assert_same_bits(again, dx)
    for name, value in state(layer, backend).items():
        assert_same_bits(value, before[name])
    stale = dy @ (before["weight"] - 0.5 * x.T @ dy).T  # the text's order: update, then dx
    assert np.abs(stale - dx).max() > 1e-3
    optimizer = nnx.SGD(lr=0.5)
    optimizer.bind(nnx.ParameterVector([p for _, p in layer.parameters()]))
    optimizer.step()
    assert (state(layer, backend)["weight"] != before["weight"]).any()
    assert nnx.check_gradients(layer, rng.standard_normal((4, 3)), rng=rng) < 1e-7


PASSES = ("forward", "backward")


def test_layers_have_one_signature() -> None:
    """Row "Activation class" (text B): backward takes the same arguments in every layer."""
    contract = {n: list(inspect.signature(getattr(nnx.Layer, n)).parameters) for n in PASSES}
    assert contract == {
        "forward": ["self", "x", "step"],
        "backward": ["self", "dy", "saved", "need_dx"],
    }
    checked = 0
    for name in nnx.layers.__all__:
        layer = getattr(nnx.layers, name)
        if issubclass(layer, nnx.Layer):
            checked += 1
            for method, parameters in contract.items():
                found = inspect.signature(getattr(layer, method)).parameters
                assert list(found) == parameters, (name, method)
    assert checked >= 20


def test_elementwise_layers_multiply_by_the_slope(
    backend: Backend, rng: np.random.Generator
) -> None:
    """Row "Activation class" (text B): eq. (21), dx = dy f'(x), for every f with a number each."""
    x, dy, eps = rng.standard_normal((5, 4)), rng.standard_normal((5, 4)), 1e-6
    for layer in (nnx.Tanh(), nnx.Sigmoid(), nnx.SiLU(), nnx.Softplus(), nnx.ELU(), nnx.Identity()):
        _, saved = layer.forward(backend.asarray(x))
        dx = backend.to_numpy(layer.backward(backend.asarray(dy), saved))
        ahead, behind = (backend.to_numpy(layer(backend.asarray(x + h))) for h in (eps, -eps))
        np.testing.assert_allclose(dx, dy * (ahead - behind) / (2 * eps), rtol=1e-6, atol=1e-8)


def test_training_loop(backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    """Row "Training loop" (text B): one record per epoch, one sample per step, and no output."""
    gate = nnx.data.logic_gate("and")
    trainer = nnx.Trainer(
        nnx.mlp([2, 3, 1], activation="tanh"),
        nnx.MeanSquaredError(),
        nnx.SGD(lr=0.001),
        backend=backend,
    )
    epochs = 20
    capfd.readouterr()
    history = trainer.fit(gate.x, gate.t[:, None], epochs=epochs, batch_size=1)
    assert capfd.readouterr() == ("", "")
    assert len(history["loss"]) == trainer.epoch == epochs
    assert history["epoch"] == list(range(1, epochs + 1))
    assert history["loss"][-1] < history["loss"][0]


def test_probabilities_of_the_classes(backend: Backend, rng: np.random.Generator) -> None:
    """Row "Inference" (text B): the softmax of the predictions; rows of sum 1."""
    x, t = rng.standard_normal((20, 4)), rng.integers(0, 3, 20)
    trainer = nnx.Trainer(nnx.mlp([4, 5, 3]), nnx.SoftmaxNLL(), nnx.SGD(lr=0.1), backend=backend)
    trainer.fit(x, t, epochs=2)
    logits = trainer.predict(x)
    p = nnx.Softmax()(logits)
    assert p.shape == (20, 3)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
    assert (p.argmax(axis=1) == logits.argmax(axis=1)).all()
