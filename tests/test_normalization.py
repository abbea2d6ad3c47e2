"""Normalization: statistics, running statistics, buffers on all their ways, and what is refused.

That forward and backward agree with explicit Jacobians is the contract's business
(`test_layers.py`); here it is done with running statistics that aren't 0 and 1.
"""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layer_oracles
import numpy as np
import pytest
from oracles import assert_close, assert_same_bits
from test_gpu_step import counted, quiet

import nnx
from nnx import BatchNorm, Layer, LayerNorm, Linear, RMSNorm, Sequential
from nnx.backends import Backend, backend_of, get_backend
from nnx.layers import Step


def a_step(backend: Backend, layer: Layer, dtype: Any = np.float64) -> Step:
    state = backend.step_state()
    state.plan(np.zeros(1), dtype=dtype)
    return Step(0, state, list(layer.layers()))


def randomize(layer: Layer, rng: np.random.Generator) -> None:
    """Random parameters, and buffers that could be a mean and a variance."""
    for p in (p for _, p in layer.parameters()):
        backend = backend_of(p.value)
        p.value[...] = backend.asarray(rng.standard_normal(p.value.shape), p.value.dtype)
    for _, a in layer.buffers():
        a[...] = backend_of(a).asarray(rng.uniform(0.5, 2, a.shape), a.dtype)


def host(a: Any) -> np.ndarray:
    return backend_of(a).to_numpy(a).copy()


# ---- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 33, 257])
def test_batch_norm_gives_every_feature_mean_0_and_variance_1(
    backend: Backend, dtype: Any, rng: np.random.Generator, n: int
) -> None:
    layer = BatchNorm(5, eps=0, dtype=dtype).to(backend)
    x = backend.asarray(7 + 3 * rng.standard_normal((n, 5)), dtype)
    y = host(layer.forward(x, step=a_step(backend, layer, dtype))[0]).astype(np.float64)
    tolerance = {"float32": 2e-5, "float64": 1e-12}[dtype.name]
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=tolerance)
    np.testing.assert_allclose(y.var(axis=0), 1, rtol=tolerance)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_layer_and_rms_norm_give_every_sample_the_size_1(
    make: Any, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    layer = make(33, eps=0.0, dtype=dtype).to(backend)
    x = backend.asarray(7 + 3 * rng.standard_normal((5, 33)), dtype)
    y = host(layer(x)).astype(np.float64)
    np.testing.assert_allclose((y**2).mean(axis=-1), 1, rtol=2e-5)
    if make is LayerNorm:
        np.testing.assert_allclose(y.mean(axis=-1), 0, atol=2e-6)


def test_a_large_mean_does_not_swallow_the_variance(backend: Backend, dtype: Any) -> None:
    """E[x^2] - E[x]^2 would be rounding alone here: 1e8 in float32."""
    x = np.array([[1e4 - 1], [1e4 + 1]] * 8, dtype)
    layer = BatchNorm(1, dtype=dtype).to(backend)
    y = host(layer.forward(backend.asarray(x), step=a_step(backend, layer, dtype))[0])
    np.testing.assert_allclose(y, np.array([[-1.0], [1.0]] * 8), rtol=1e-4)


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm, RMSNorm])
def test_constant_and_extreme_inputs_stay_finite(make: Any, backend: Backend, dtype: Any) -> None:
    layer = make(4, dtype=dtype).to(backend)
    for row in ([0.0] * 4, [1e4] * 4, [1e4, -1e4, 0.0, 1e-30], [-1e4] * 4):
        x = backend.asarray([row] * 3, dtype)
        y, saved = layer.forward(x, step=a_step(backend, layer, dtype))
        dx = layer.backward(x, saved)
        assert np.isfinite(host(y)).all()
        assert np.isfinite(host(dx)).all()
        assert y.dtype == dx.dtype == dtype


def test_a_nan_stays_with_its_feature_or_its_sample(backend: Backend, dtype: Any) -> None:
    x = np.arange(12.0).reshape(4, 3).astype(dtype) ** 2
    x[2, 1] = np.nan
    for make, hit in ((BatchNorm, np.s_[:, 1]), (LayerNorm, np.s_[2]), (RMSNorm, np.s_[2])):
        layer = make(3, dtype=dtype).to(backend)
        y = host(layer.forward(backend.asarray(x), step=a_step(backend, layer, dtype))[0])
        expected = np.zeros(x.shape, bool)
        expected[hit] = True
        np.testing.assert_array_equal(np.isnan(y), expected)


# ---- running statistics ------------------------------------------------------------------------


def test_running_statistics_by_hand(backend: Backend, dtype: Any) -> None:
    """Of 1, 2, 3, 6: mean 3, sum of squares 14, so 14/4 to normalize by and 14/3 to keep."""
    layer = BatchNorm(1, momentum=0.25, dtype=dtype).to(backend)
    step = a_step(backend, layer, dtype)
    x = backend.asarray([[1.0], [2.0], [3.0], [6.0]], dtype)
    y, _ = layer.forward(x, step=step)
    assert_close(host(y)[0, 0], np.float64(-2 / math.sqrt(3.5 + 1e-5)), dtype=dtype)
    assert_close(host(layer.running_mean), np.array([0.75]), dtype=dtype)
    assert_close(host(layer.running_var), np.array([0.75 + 0.25 * 14 / 3]), dtype=dtype)
    layer.forward(x, step=step)
    assert_close(host(layer.running_mean), np.array([0.75 * 0.75 + 0.75]), dtype=dtype)


def test_running_statistics_change_in_training_only(backend: Backend, rng: Any) -> None:
    layer = BatchNorm(3, dtype=np.float64).to(backend)
    randomize(layer, rng)
    x = backend.asarray(rng.standard_normal((5, 3)))
    before = {name: host(a) for name, a in layer.buffers()}
    _, saved = layer.forward(x)
    layer.backward(x, saved)
    layer(x)
    empty = backend.asarray(np.ones((0, 3)))
    layer.forward(empty, step=a_step(backend, layer))
    for name, a in layer.buffers():
        assert_same_bits(host(a), before[name])
    layer.forward(x, step=a_step(backend, layer))
    for name, a in layer.buffers():
        assert not np.array_equal(host(a), before[name]), name


@pytest.mark.parametrize("affine", [False, True])
def test_evaluation_uses_the_running_statistics(
    affine: bool, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    layer = BatchNorm(3, affine=affine, dtype=dtype).to(backend)
    randomize(layer, rng)
    x, dy = (rng.standard_normal((1, 7, 3)).astype(dtype) for _ in range(2))
    y, saved = layer.forward(backend.asarray(x))
    dx = layer.backward(backend.asarray(dy), saved)
    state = {name: host(a) for name, a in layer.state().items()}
    wanted = layer_oracles.normalization(
        x,
        dy,
        state.get("weight"),
        state.get("bias"),
        1e-5,
        statistics=(state["running_mean"], state["running_var"]),
    )
    assert_close(host(y), wanted[0], dtype=dtype)
    assert_close(host(dx), wanted[1], dtype=dtype)
    if layer.weight is not None and layer.bias is not None:
        assert_close(host(layer.weight.grad), wanted[2], depth=7, dtype=dtype)
        assert_close(host(layer.bias.grad), wanted[3], depth=7, dtype=dtype)


class Evaluated(Layer):
    """A layer in evaluation mode even in training, to check that gradient too."""

    def __init__(self, inner: Layer) -> None:
        self.inner = inner

    def forward(self, x: Any, *, step: Step | None = None) -> tuple[Any, Any]:
        return self.inner.forward(x)

    def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
        return self.inner.backward(dy, saved, need_dx=need_dx)


@pytest.mark.parametrize("shape", [(2, 4), (33, 4), (3, 5, 4)])
@pytest.mark.parametrize("affine", [False, True])
def test_gradients_in_both_modes_and_buffers_as_they_were(
    affine: bool, shape: tuple[int, ...], backend: Backend, rng: np.random.Generator
) -> None:
    x = 2 + 3 * rng.standard_normal(shape)
    layers: list[Layer] = [
        kind(4, affine=affine, dtype=np.float64) for kind in (LayerNorm, RMSNorm)
    ]
    batch = BatchNorm(4, affine=affine, dtype=np.float64)
    layers += [batch, Evaluated(batch)]
    for layer in layers:
        layer.to(backend)
        randomize(layer, rng)
        before = {name: host(a) for name, a in layer.buffers()}
        rtol = 1e-6 if shape == (2, 4) else 1e-7  # of two samples xhat is +-1, whatever x is
        assert nnx.check_gradients(layer, x, rng=rng, backend=backend, rtol=rtol) <= rtol
        for name, a in layer.buffers():
            assert_same_bits(host(a), before[name])


def test_a_batch_of_one_sample_is_refused_in_training(backend: Backend) -> None:
    layer = BatchNorm(3).to(backend)
    x = backend.asarray(np.ones((1, 3)), np.float32)
    layer(x)
    before = host(layer.running_mean)
    with pytest.raises(ValueError, match=r"BatchNorm: expected more than one sample.*\(1, 3\)"):
        layer.forward(x, step=a_step(backend, layer))
    assert_same_bits(host(layer.running_mean), before)


# ---- buffers -----------------------------------------------------------------------------------


def network(dtype: Any = np.float64, models: int | None = None, **options: Any) -> Sequential:
    rng = np.random.default_rng(0)
    return Sequential(
        Linear(4, 6, rng=rng, dtype=dtype, n_models=models),
        BatchNorm(6, dtype=dtype, n_models=models, **options),
        nnx.GELU(),
        LayerNorm(6, dtype=dtype, n_models=models),
        Linear(6, 3, rng=rng, dtype=dtype, n_models=models),
    )


def test_buffers_are_named_and_part_of_the_state() -> None:
    model = Sequential(network(), BatchNorm(3, affine=False, dtype=np.float64))
    names = ["0.1.running_mean", "0.1.running_var", "1.running_mean", "1.running_var"]
    assert [name for name, _ in model.buffers()] == names
    assert set(names) <= set(model.state())
    assert not set(names) & {name for name, _ in model.parameters()}
    shared = BatchNorm(4)
    assert [name for name, _ in Sequential(shared, shared).buffers()] == [
        "0.running_mean",
        "0.running_var",
    ]
    assert list(Linear(2, 3, initializer=nnx.initializers.zeros).buffers()) == []


def test_load_state_takes_buffers_along(rng: np.random.Generator) -> None:
    model, other = network(), network()
    randomize(model, rng)
    state = model.state()
    other.load_state(state)
    x = rng.standard_normal((5, 4))
    assert_same_bits(other(x), model(x))
    assert other.state()["1.running_var"] is not state["1.running_var"]
    with pytest.raises(ValueError, match=r"missing \['1\.running_mean'\]"):
        other.load_state({k: v for k, v in state.items() if k != "1.running_mean"})


@pytest.mark.parametrize("models", [None, 3])
def test_a_file_keeps_buffers(
    backend: Backend, models: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = network(models=models, momentum=0.3, eps=1e-3).to(backend)
    randomize(model, rng)
    nnx.save(model, tmp_path / "model")
    again = nnx.load(tmp_path / "model", backend=backend)
    assert repr(again) == repr(model)
    for name, a in model.state().items():
        assert_same_bits(host(again.state()[name]), host(a))


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
def test_buffers_move_with_the_layer(trained: bool, rng: np.random.Generator) -> None:
    model = network()
    if trained:  # then the parameters are views of a flat vector
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(0.1))
        trainer.train_step(rng.standard_normal((8, 4)), rng.integers(0, 3, 8))
    x = rng.standard_normal((5, 4))
    expected = model(x)
    cuda = get_backend("cupy")
    assert model.to(cuda) is model
    assert all(backend_of(a) is cuda for _, a in model.buffers())
    assert_close(host(model(cuda.asarray(x))), expected)
    model.to("numpy")
    assert_same_bits(model(x), expected)


def test_replicate_stacks_buffers(backend: Backend, rng: np.random.Generator) -> None:
    model = network().to(backend)
    randomize(model, rng)
    copies = model.replicate(3)
    assert [tuple(a.shape) for _, a in copies.buffers()] == [(3, 6)] * 2
    x = backend.asarray(rng.standard_normal((5, 4)))
    for y in host(copies(x)):
        assert_close(y, host(model(x)))
    copies.forward(x, step=a_step(backend, copies))
    before = dict(model.buffers())["1.running_mean"]
    assert not np.array_equal(host(dict(copies.buffers())["1.running_mean"])[0], host(before))
    assert repr(copies[1]) == repr(network(models=3)[1])


def test_a_copy_of_a_model_has_buffers_of_its_own(rng: np.random.Generator) -> None:
    model = network()
    twin = copy.deepcopy(model)
    twin.forward(rng.standard_normal((5, 4)), step=a_step(get_backend("numpy"), twin))
    assert_same_bits(dict(model.buffers())["1.running_mean"], np.zeros(6))


# ---- the model axis ----------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("make", [BatchNorm, LayerNorm, RMSNorm])
def test_k_models_are_k_layers(
    make: Any, shared: bool, backend: Backend, dtype: Any, rng: np.random.Generator
) -> None:
    together = make(4, dtype=dtype, n_models=3).to(backend)
    randomize(together, rng)
    x = rng.standard_normal((9, 4) if shared else (3, 9, 4)).astype(dtype)
    dy = rng.standard_normal((3, 9, 4)).astype(dtype)
    for training in (False, True):
        dxs = []
        state = {name: host(a) for name, a in together.state().items()}
        step = a_step(backend, together, dtype) if training else None
        for p in (p for _, p in together.parameters()):
            p.fresh = True
        y, saved = together.forward(backend.asarray(x), step=step)
        dx = together.backward(backend.asarray(dy), saved)
        for k in range(3):
            alone = make(4, dtype=dtype).to(backend)
            alone.load_state({name: a[k] for name, a in state.items()})
            step = a_step(backend, alone, dtype) if training else None
            wanted, saved = alone.forward(backend.asarray(x if shared else x[k]), step=step)
            assert_close(host(y)[k], host(wanted), depth=9)
            dxs.append(host(alone.backward(backend.asarray(dy[k]), saved)))
            for (_, p), (_, q) in zip(alone.parameters(), together.parameters(), strict=True):
                assert_close(host(q.grad)[k], host(p.grad), depth=9)
            for (_, a), (_, b) in zip(alone.buffers(), together.buffers(), strict=True):
                assert_close(host(b)[k], host(a), depth=9)
        expected = np.sum(dxs, axis=0) if shared else np.stack(dxs)
        assert_close(host(dx), expected, depth=27)


# ---- training ----------------------------------------------------------------------------------


def test_a_network_with_all_of_them_learns(backend: Backend, rng: np.random.Generator) -> None:
    x = 5 + 3 * rng.standard_normal((120, 4))
    t = (x[:, 0] > x[:, 1]).astype(int) + (x[:, 2] > 5)
    model = network(np.float32)
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(0.02), backend=backend, seed=1)
    trainer.fit(x, t, epochs=25, batch_size=24)
    assert trainer.evaluate(x, t)["accuracy"] > 0.9
    # the linear layer's outputs have the statistics that were kept
    z = host(model[0](backend.asarray(x, np.float32)))
    running = host(dict(model.buffers())["1.running_mean"])
    np.testing.assert_allclose(running, z.mean(axis=0), atol=0.5 * float(z.std()))


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_a_step_through_normalizations_is_quiet() -> None:
    cuda, rng = get_backend("cupy"), np.random.default_rng(0)
    x = cuda.asarray(rng.standard_normal((32, 4)), np.float32)
    t = cuda.asarray(rng.integers(0, 3, 32))
    model = Sequential(network(np.float32), RMSNorm(3))
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(0.1), backend="cupy")
    trainer.train_step(x, t)
    for _ in range(2):
        with counted() as counts:
            trainer.train_step(x, t)
        quiet(counts)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BatchNorm(0), ValueError, "BatchNorm: expected n_features of at least 1, got 0"),
        (lambda: LayerNorm(3, eps=-1.0), ValueError, r"LayerNorm: expected eps in \[0, inf\)"),
        (lambda: BatchNorm(3, momentum=1.5), ValueError, r"momentum in \[0, 1\], got 1\.5"),
        (lambda: RMSNorm(3, dtype=np.float16), TypeError, "RMSNorm: .* got float16"),
        (
            lambda: LayerNorm(3)(np.ones((2, 4), np.float32)),
            ValueError,
            r"LayerNorm: expected last axis 3, got input of shape \(2, 4\)",
        ),
        (lambda: BatchNorm(3)(np.ones((2, 3))), TypeError, "expected float32 input, got float64"),
        (
            lambda: RMSNorm(3, n_models=2)(np.ones((5, 2, 3), np.float32)),
            ValueError,
            r"shape \(2, N, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm, RMSNorm])
def test_a_gradient_that_does_not_fit_is_named(make: Any, backend: Backend) -> None:
    layer = make(3).to(backend)
    x = backend.asarray(np.ones((2, 5, 3)), np.float32)
    _, saved = layer.forward(x)
    layer.backward(backend.asarray(np.ones((5, 2, 3)), np.float32), saved)  # 10 rows, as well
    who = rf"{make.__name__}: expected a float32 gradient of shape \(10, 3\)"
    for shape, dtype, error in (
        ((2, 5, 3), np.float64, TypeError),
        ((2, 4, 3), np.float32, ValueError),
        ((1, 3), np.float32, ValueError),
        ((3, 10), np.float32, ValueError),
    ):
        with pytest.raises(error, match=who):
            layer.backward(backend.asarray(np.ones(shape), dtype), saved)
    layer = make(3, n_models=2).to(backend)
    _, saved = layer.forward(x[0])
    with pytest.raises(ValueError, match=r"gradient of shape \(2, 5, 3\), got float32 \(5, 3\)"):
        layer.backward(x[0], saved)


@pytest.mark.parametrize("make", [BatchNorm, LayerNorm, RMSNorm])
def test_the_integers_of_numpy_will_do(make: Any, tmp_path: Path) -> None:
    layer = make(np.int64(3), n_models=np.int32(2))
    assert json.dumps(layer.config())
    nnx.save(Sequential(layer), tmp_path / "model")
    assert repr(nnx.load(tmp_path / "model")) == repr(Sequential(make(3, n_models=2)))
    with pytest.raises(TypeError, match="integer"):
        make(3.0)
