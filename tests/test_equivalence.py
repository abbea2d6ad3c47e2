"""NumPy and CuPy are the same library: one test body runs on both, and everything is compared.

A body gets a backend and returns a list of arrays. Values, dtypes and shapes must agree, and where
one raises, the other must raise the same error with the same message.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nnx
from nnx.backends import Backend, get_backend
from nnx.backends.base import Array
from nnx.layers import Step

pytestmark = pytest.mark.gpu

Body = Callable[[Backend], list[Array]]
TOLERANCE: dict[Any, dict[str, Any]] = {
    np.dtype(np.float32): {"rtol": 1.3e-6, "atol": 1e-5},
    np.dtype(np.float64): {"rtol": 1e-12, "atol": 1e-12},
}


def outcome(body: Body, name: str) -> list[np.ndarray] | tuple[type, str]:
    """The arrays a body returns on a backend, on the host; or its error."""
    backend = get_backend(name)
    try:
        results = body(backend)
    except Exception as error:
        return type(error), str(error).replace("cupy", "numpy")
    assert all(nnx.backend_of(a) is backend for a in results), "a result left its backend"
    return [backend.to_numpy(a) for a in results]


def agree(body: Body) -> None:
    """Run a body on both backends and compare."""
    expected, actual = outcome(body, "numpy"), outcome(body, "cupy")
    if isinstance(expected, tuple) or isinstance(actual, tuple):
        assert actual == expected
        return
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        if e.dtype.kind == "f":
            np.testing.assert_allclose(a, e, **TOLERANCE[e.dtype])  # NaN equals NaN only
        else:
            np.testing.assert_array_equal(a, e)


def fails(body: Body, error: type[Exception], message: str) -> None:
    """The body raises this on both backends, in the same words."""
    expected = outcome(body, "numpy")
    assert isinstance(expected, tuple), "nothing was raised"
    assert expected[0] is error
    assert message in expected[1]
    assert outcome(body, "cupy") == expected


LAYERS: dict[str, tuple[Callable[[np.random.Generator, Any], nnx.Layer], list[tuple[int, ...]]]] = {
    "Linear": (
        lambda rng, dtype: nnx.Linear(7, 33, rng=rng, dtype=dtype),
        [(1, 7), (0, 7), (65, 7), (3, 5, 7), (7,)],
    ),
    "Linear without bias": (
        lambda rng, dtype: nnx.Linear(7, 1, bias=False, rng=rng, dtype=dtype),
        [(9, 7)],
    ),
    "Linear, 3 models": (
        lambda rng, dtype: nnx.Linear(7, 33, rng=rng, dtype=dtype, n_models=3),
        [(3, 9, 7), (9, 7), (3, 0, 7)],
    ),
    "ReLU": (lambda rng, dtype: nnx.ReLU(), [(0,), (1,), (33,), (5, 7), (3, 5, 7)]),
    "Sigmoid": (lambda rng, dtype: nnx.Sigmoid(), [(0, 3), (33,), (3, 5, 7)]),
    "Tanh": (lambda rng, dtype: nnx.Tanh(), [(0, 3), (33,), (3, 5, 7)]),
    "Softmax": (lambda rng, dtype: nnx.Softmax(), [(0, 3), (33,), (9, 1), (3, 5, 7)]),
    "Identity": (lambda rng, dtype: nnx.Identity(), [(0, 3), (33,)]),
    "LeakyReLU": (lambda rng, dtype: nnx.LeakyReLU(0.1), [(0, 3), (33,), (3, 5, 7)]),
    "ELU": (lambda rng, dtype: nnx.ELU(1.5), [(0, 3), (33,), (3, 5, 7)]),
    "SELU": (lambda rng, dtype: nnx.SELU(), [(0, 3), (33,), (3, 5, 7)]),
    "GELU": (lambda rng, dtype: nnx.GELU(), [(0, 3), (33,), (3, 5, 257)]),
    "GELU, tanh": (lambda rng, dtype: nnx.GELU("tanh"), [(0, 3), (33,), (3, 5, 7)]),
    "SiLU": (lambda rng, dtype: nnx.SiLU(), [(0, 3), (33,), (3, 5, 7)]),
    "Softplus": (lambda rng, dtype: nnx.Softplus(2, 1), [(0, 3), (33,), (3, 5, 7)]),
    "HardSigmoid": (lambda rng, dtype: nnx.HardSigmoid(), [(0, 3), (33,), (3, 5, 7)]),
    "HardTanh": (lambda rng, dtype: nnx.HardTanh(-2, 0.5), [(0, 3), (33,), (3, 5, 7)]),
    "HardSwish": (lambda rng, dtype: nnx.HardSwish(), [(0, 3), (33,), (3, 5, 7)]),
    "Mish": (lambda rng, dtype: nnx.Mish(), [(0, 3), (33,), (3, 5, 7)]),
    "LogSoftmax": (lambda rng, dtype: nnx.LogSoftmax(), [(0, 3), (33,), (9, 1), (3, 5, 7)]),
    "BatchNorm": (
        lambda rng, dtype: nnx.BatchNorm(7, dtype=dtype),
        [(33, 7), (0, 7), (65, 7), (3, 5, 7)],
    ),
    "BatchNorm, 3 models": (
        lambda rng, dtype: nnx.BatchNorm(7, dtype=dtype, n_models=3),
        [(3, 9, 7), (9, 7), (3, 0, 7)],
    ),
    "LayerNorm": (
        lambda rng, dtype: nnx.LayerNorm(33, dtype=dtype),
        [(1, 33), (0, 33), (65, 33), (3, 5, 33), (33,)],
    ),
    "LayerNorm, 3 models": (
        lambda rng, dtype: nnx.LayerNorm(33, dtype=dtype, n_models=3),
        [(3, 9, 33), (9, 33), (3, 0, 33)],
    ),
    "RMSNorm": (
        lambda rng, dtype: nnx.RMSNorm(33, dtype=dtype),
        [(1, 33), (0, 33), (65, 33), (3, 5, 33), (33,)],
    ),
    "Dropout": (lambda rng, dtype: nnx.Dropout(0.3), [(0, 3), (1,), (33,), (5, 257)]),
    "Dropout(0)": (lambda rng, dtype: nnx.Dropout(0), [(5, 7)]),
    "Dropout(1)": (lambda rng, dtype: nnx.Dropout(1), [(5, 7)]),
    "Flatten": (lambda rng, dtype: nnx.Flatten(), [(4, 3, 5), (4,), (0, 3)]),
    "Sequential": (
        lambda rng, dtype: nnx.Sequential(
            nnx.Flatten(),
            nnx.Linear(15, 33, rng=rng, dtype=dtype),
            nnx.ReLU(),
            nnx.Dropout(0.5),
            nnx.Linear(33, 4, rng=rng, dtype=dtype),
            nnx.Softmax(),
        ),
        [(9, 3, 5), (1, 15)],
    ),
    "mlp, 3 models": (
        lambda rng, dtype: nnx.mlp([7, 5, 4], seed=int(rng.integers(9)), dtype=dtype, n_models=3),
        [(9, 7), (3, 9, 7)],
    ),
}


def test_no_layer_is_missing() -> None:
    from nnx import layers

    made = {
        type(layer)
        for factory, _ in LAYERS.values()
        for layer in factory(np.random.default_rng(0), np.float32).layers()
    }
    kinds = {getattr(layers, name) for name in layers.__all__} - {nnx.Layer, Step}
    assert made == kinds


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: Any) -> None:
    factory, shapes = LAYERS[name]

    for shape in shapes:

        def body(backend: Backend, shape: tuple[int, ...] = shape) -> list[Array]:
            rng = np.random.default_rng(1)
            layer = factory(rng, dtype).to(backend)
            for _, p in layer.parameters():
                p.value[...] = backend.asarray(rng.standard_normal(p.value.shape), dtype)
            x = backend.asarray(3 * rng.standard_normal(shape), dtype)
            state = backend.step_state()
            state.number = 8
            state.plan(np.zeros(1), dtype=dtype)
            step = Step(5, state, list(layer.layers()))
            evaluated = layer(x)
            kept = x.copy()
            y, saved = layer.forward(x, step=step)
            dy = backend.asarray(rng.standard_normal(y.shape), dtype)
            dx = layer.backward(dy, saved)
            again = layer.backward(dy, saved, need_dx=False)  # adds to the gradients
            assert again is None
            assert (x == kept).all()
            gradients = [p.grad for _, p in layer.parameters()]
            return [evaluated, y, dx, *gradients, *(a for _, a in layer.buffers())]

        agree(body)
        assert not isinstance(outcome(body, "numpy"), tuple), "the case itself is wrong"


@pytest.mark.parametrize(
    "factory", [nnx.ReLU, nnx.Sigmoid, nnx.Tanh, nnx.Softmax], ids=lambda f: f.__name__
)
def test_activations_at_extreme_and_strided_values(factory: Any, dtype: Any) -> None:
    def body(backend: Backend) -> list[Array]:
        x = backend.asarray([[1e4, 0.0, -1e4, 3.0], [-0.0, 1e-30, -1e-30, 88.0]], dtype)
        layer, results = factory(), []
        for view in (x, x.T, x[:, ::2], x[::-1]):
            y, saved = layer.forward(view)
            results += [y, layer.backward(y + 1, saved)]
        return results

    agree(body)


def test_relu_of_what_is_not_a_number(dtype: Any) -> None:
    def body(backend: Backend) -> list[Array]:
        x = backend.asarray([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], dtype)
        y, saved = nnx.ReLU().forward(x)
        dx = nnx.ReLU().backward(backend.asarray([np.nan] * 3 + [np.inf] * 3, dtype), saved)
        assert dx is not None
        return [y, dx]

    agree(body)


# ---- losses ------------------------------------------------------------------------------------


LOSSES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "SoftmaxNLL": (nnx.SoftmaxNLL, (9, 5), (9,)),
    "SoftmaxNLL, leading axes": (nnx.SoftmaxNLL, (3, 4, 5), (3, 4)),
    "SoftmaxNLL, one row": (nnx.SoftmaxNLL, (1, 1), (1,)),
    "SoftmaxNLL, no rows": (nnx.SoftmaxNLL, (0, 5), (0,)),
    "SoftmaxNLL, wide": (nnx.SoftmaxNLL, (3, 1000), (3,)),
    "SoftmaxNLL, 4 models": (lambda: nnx.SoftmaxNLL(n_models=4), (4, 9, 5), (4, 9)),
    "SoftmaxNLL, 4 models, labels shared": (lambda: nnx.SoftmaxNLL(n_models=4), (4, 9, 5), (9,)),
    "SoftmaxNLL, soft targets": (nnx.SoftmaxNLL, (9, 5), (9, 5)),
    "SoftmaxNLL, 4 models, soft": (lambda: nnx.SoftmaxNLL(n_models=4), (4, 9, 5), (4, 9, 5)),
    "SoftmaxNLL, 4 models, soft shared": (lambda: nnx.SoftmaxNLL(n_models=4), (4, 9, 5), (9, 5)),
    "SoftmaxNLL, class weights": (lambda: nnx.SoftmaxNLL([1, 2, 0.5]), (9, 3), (9,)),
    "SoftmaxNLL, ignored": (lambda: nnx.SoftmaxNLL(ignore_index=1), (9, 3), (9,)),
    "SoftmaxNLL, all options": (lambda: nnx.SoftmaxNLL([1, 2, 0.5], 0.1, 1), (9, 3), (9,)),
    "SoftmaxNLL, all options, soft": (
        lambda: nnx.SoftmaxNLL([1, 2, 0.5], 0.1, 1),
        (9, 3),
        (9, 3),
    ),
    "SoftmaxNLL, all options, 4 models": (
        lambda: nnx.SoftmaxNLL([1, 2, 0.5], 0.1, 1, n_models=4),
        (4, 9, 3),
        (9,),
    ),
    "SoftmaxMSE": (nnx.SoftmaxMSE, (9, 5), (9,)),
    "SoftmaxMSE, soft targets": (nnx.SoftmaxMSE, (9, 5), (9, 5)),
    "SoftmaxMSE, 4 models": (lambda: nnx.SoftmaxMSE(n_models=4), (4, 9, 5), (9,)),
    "NLL": (nnx.NLL, (9, 5), (9,)),
    "NLL, soft targets": (nnx.NLL, (9, 5), (9, 5)),
    "NLL, no rows": (nnx.NLL, (0, 5), (0,)),
    "NLL, 4 models": (lambda: nnx.NLL(n_models=4), (4, 9, 5), (4, 9)),
    "MeanAbsoluteError": (nnx.MeanAbsoluteError, (9, 5), (9,)),
    "Huber": (lambda: nnx.Huber(2.0), (3, 4, 5), (3, 4)),
    "BCEWithLogits": (nnx.BCEWithLogits, (9, 5), (9,)),
    "BCEWithLogits, weights": (lambda: nnx.BCEWithLogits([1, 2, 0.5]), (9, 3), (9,)),
    "BCEWithLogits, 4 models": (lambda: nnx.BCEWithLogits(3, n_models=4), (4, 9, 5), (4, 9)),
    "Hinge": (nnx.Hinge, (9, 5), (9,)),
    "Hinge, 1-D": (nnx.Hinge, (9,), (9,)),
    "SquaredHinge": (nnx.SquaredHinge, (9, 5), (9,)),
    "SquaredHinge, 4 models": (lambda: nnx.SquaredHinge(n_models=4), (4, 9, 5), (4, 9)),
    "MeanSquaredError": (nnx.MeanSquaredError, (9, 5), (9,)),
    "MeanSquaredError, 1-D": (nnx.MeanSquaredError, (9,), (9,)),
    "MeanSquaredError, no rows": (nnx.MeanSquaredError, (0, 5), (0,)),
    "MeanSquaredError, 4 models": (lambda: nnx.MeanSquaredError(n_models=4), (4, 9, 5), (4, 9)),
}


def test_no_loss_is_missing() -> None:
    members = vars(nnx.losses).values()
    kinds = {k for k in members if isinstance(k, type) and issubclass(k, nnx.Loss)}
    public = {k for k in kinds if not k.__name__.startswith("_")}
    assert {type(factory()) for factory, _, _ in LOSSES.values()} == public - {nnx.Loss}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, dtype: Any) -> None:
    factory, shape, rows = LOSSES[name]

    def body(backend: Backend, option: str = "") -> list[Array]:
        rng = np.random.default_rng(2)
        loss = factory()
        prediction = backend.asarray(5 * rng.standard_normal(shape), dtype)
        if isinstance(loss, nnx.NLL):
            prediction = backend.asarray(rng.uniform(0.1, 1, shape), dtype)
        if loss.classifies and len(rows) > 1 and rows[-1] == shape[-1]:
            target = backend.asarray(rng.uniform(0, 1, rows), dtype)
        elif loss.classifies:
            target = backend.asarray(rng.integers(0, shape[-1], rows))
        else:
            target = backend.asarray(rng.standard_normal(shape), dtype)
        samples = shape[:-1] if loss.classifies else rows
        weight = backend.asarray(rng.uniform(0, 1, samples) * (rng.random(samples) < 0.7), dtype)
        array = backend.asarray(3.5, dtype)
        options: dict[str, dict[str, Any]] = {
            "": {},
            "weight": {"weight": weight},
            "zero weight": {"weight": 0 * weight},
            "scaled": {"weight": weight, "normalizer": 4.0, "grad_scale": 128.0},
            "scaled by arrays": {"normalizer": array, "grad_scale": array},
            "value only": {"need_gradient": False},
        }
        value, gradient = loss(prediction, target, **options[option])
        return [value] if gradient is None else [value, gradient]

    for option in ("", "weight", "zero weight", "scaled", "scaled by arrays", "value only"):
        agree(functools.partial(body, option=option))
        assert not isinstance(outcome(body, "numpy"), tuple), "the case itself is wrong"


def test_softmax_nll_at_extremes(dtype: Any) -> None:
    def body(backend: Backend) -> list[Array]:
        logits = backend.asarray([[1e4, 9992, -1e4], [-1e4, 1e4, 0], [-np.inf, 0, 1]], dtype)
        results = []
        for labels in ([0, 0, 1], [2, 1, 0], [0, 3, 1], [0, -1, 1]):
            results += list(nnx.SoftmaxNLL()(logits, backend.asarray(labels)))
            weight = backend.asarray([1, 0, 1], dtype)  # the label out of range has no weight
            results += list(nnx.SoftmaxNLL()(logits, backend.asarray(labels), weight))
        return results

    agree(body)


# ---- optimizers and training -------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[], nnx.Optimizer]] = {
    "SGD": lambda: nnx.SGD(0.1),
    "SGD, weight decay": lambda: nnx.SGD(0.1, weight_decay=0.01),
    "momentum": lambda: nnx.SGD(0.1, momentum=0.9, weight_decay=0.01),
    "Nesterov": lambda: nnx.SGD(0.1, momentum=0.9, nesterov=True),
    "Adam": lambda: nnx.Adam(0.01),
    "Adam, weight decay": lambda: nnx.Adam(0.01, weight_decay=0.1, beta1=0.5, eps=1e-3),
    "AdamW": lambda: nnx.AdamW(0.01, weight_decay=0.1),
    "AMSGrad": lambda: nnx.AMSGrad(0.01, beta2=0.5, weight_decay=0.1),
    "AdaGrad": lambda: nnx.AdaGrad(0.1, lr_decay=0.1, initial=0.1, weight_decay=0.1),
    "RMSProp": lambda: nnx.RMSProp(0.01, weight_decay=0.1, eps=1e-3),
    "RMSProp, centered": lambda: nnx.RMSProp(0.01, centered=True, momentum=0.5, eps=1e-3),
    "Lion": lambda: nnx.Lion(0.01, weight_decay=0.1),
    "penalties": lambda: nnx.SGD(0.1, l1=0.01, l2=0.1),
    "clipping": lambda: nnx.SGD(0.1, clip_value=0.05, clip_norm=0.1, momentum=0.9),
    "a schedule": lambda: nnx.SGD(lambda step: 0.1 / (1 + step)),
}


def test_no_optimizer_is_missing() -> None:
    from nnx import optimizers

    kinds = {
        k for k in vars(optimizers).values() if isinstance(k, type) and issubclass(k, nnx.Optimizer)
    }
    assert {type(make()) for make in OPTIMIZERS.values()} == kinds - {nnx.Optimizer}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("n_models", [None, 3])
def test_optimizers(name: str, n_models: int | None, dtype: Any) -> None:
    def body(backend: Backend) -> list[Array]:
        rng = np.random.default_rng(3)
        model = nnx.mlp([5, 33, 3], seed=1, dtype=dtype, n_models=n_models)
        parameters = [p for _, p in model.parameters()]
        parameters[0].lr_scale = 0.5
        parameters[1].decay_scale = 0.0
        parameters[3].lr_scale = 0.0  # frozen
        trainer = nnx.Trainer(
            model, nnx.SoftmaxNLL(n_models=n_models), OPTIMIZERS[name](), backend=backend
        )
        x = backend.asarray(rng.standard_normal((9, 5)), dtype)
        t = backend.asarray(rng.integers(0, 3, 9))
        losses = [trainer.train_step(x, t) for _ in range(3)]
        state = [a for key, a in trainer.optimizer.state().items() if key != "step"]
        return [*losses, trainer.vector.value, trainer.vector.grad, *state]

    agree(body)
    assert not isinstance(outcome(body, "numpy"), tuple), "the case itself is wrong"


def test_evaluate_and_predict(dtype: Any) -> None:
    def body(backend: Backend) -> list[Array]:
        rng = np.random.default_rng(4)
        x, t = rng.standard_normal((30, 5)), rng.integers(0, 3, 30)
        weight = rng.uniform(0, 1, 30)
        model = nnx.mlp([5, 33, 3], seed=1, dtype=dtype)
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(0.01), backend=backend)
        trainer.fit(x, t, epochs=2, batch_size=8, sample_weight=weight, validation=(x, t))
        scores = trainer.evaluate(x, t, batch_size=7, sample_weight=weight)
        history = [v for values in trainer.history.values() for v in values]
        outputs = trainer.predict(x, batch_size=7).astype(dtype)
        numbers = np.array([*history, scores["loss"], scores["accuracy"]], dtype)
        return [backend.asarray(outputs), backend.asarray(numbers)]

    agree(body)


# ---- errors ------------------------------------------------------------------------------------


def test_errors_are_the_same() -> None:
    f4, f8 = np.float32, np.float64
    linear = nnx.Linear(7, 3, rng=np.random.default_rng(0))

    def on(backend: Backend, *shape: int, dtype: Any = f4) -> Array:
        return backend.asarray(np.zeros(shape), dtype)

    fails(
        lambda b: [linear.to(b)(on(b, 4, 6))], ValueError, "last axis 7, got input of shape (4, 6"
    )
    fails(lambda b: [linear.to(b)(on(b, 4, 7, dtype=f8))], TypeError, "float32 input, got float64")
    fails(lambda b: [nnx.ReLU()(on(b, 4, dtype=np.int64))], TypeError, "got int64")
    fails(lambda b: [nnx.Softmax()(on(b, 4, dtype=np.float16))], TypeError, "got float16")
    nll, mse = nnx.SoftmaxNLL(), nnx.MeanSquaredError()
    labels = np.int64
    fails(lambda b: [nll(on(b, 4, 3), on(b, 4))[0]], TypeError, "integer labels, got float32")
    fails(lambda b: [nll(on(b, 4, 3), on(b, 5, dtype=labels))[0]], ValueError, "(4,), got (5,)")
    fails(lambda b: [mse(on(b, 4, 3), on(b, 4))[0]], ValueError, "(4, 3), got (4,)")
    fails(lambda b: [mse(on(b, 4, 3), on(b, 4, 3, dtype=f8))[0]], TypeError, "got float64")

    chain = nnx.Sequential(nnx.Linear(7, 3, rng=np.random.default_rng(0)), nnx.ReLU())
    three = nnx.Linear(7, 3, rng=np.random.default_rng(0), n_models=2)

    def back(layer: nnx.Layer, *dy: int, dtype: Any = f4, x: tuple[int, ...] = (4, 7)) -> Body:
        def body(b: Backend) -> list[Array]:
            _, saved = layer.to(b).forward(on(b, *x))
            return [layer.backward(on(b, *dy, dtype=dtype), saved)]

        return body

    for layer in (linear, chain):
        want = "Linear: expected a float32 gradient of shape (4, 3), got "
        fails(back(layer, 4, 3, dtype=f8), TypeError, want + "float64 (4, 3)")
        fails(back(layer, 5, 3), ValueError, want + "float32 (5, 3)")
        fails(back(layer, 0, 3), ValueError, want + "float32 (0, 3)")
        fails(back(layer, 3, 4), ValueError, want + "float32 (3, 4)")
        want = "Linear: expected a float32 gradient of shape (4, 3) in all, got "
        fails(back(layer, 3), ValueError, want + "float32 (3,)")
        fails(back(layer, 2, 2, 3, dtype=f8, x=(2, 2, 7)), TypeError, want + "float64 (2, 2, 3)")
        fails(back(layer, 2, 3, 3, x=(2, 2, 7)), ValueError, want + "float32 (2, 3, 3)")
        assert not any(p.grad.any() for _, p in layer.to("numpy").parameters())
        assert all(p.fresh for _, p in layer.parameters())
    want = "Linear: expected a float32 gradient of shape (2, 4, 3), got "
    for shape in ((4, 7), (2, 4, 7)):
        fails(back(three, 2, 4, 3, dtype=f8, x=shape), TypeError, want + "float64 (2, 4, 3)")
        fails(back(three, 4, 3, x=shape), ValueError, want + "float32 (4, 3)")
        fails(back(three, 2, 5, 3, x=shape), ValueError, want + "float32 (2, 5, 3)")

    def weighted(backend: Backend) -> list[Array]:
        x, t, weight = on(backend, 4, 3), on(backend, 4, dtype=labels), on(backend, 3)
        return [nll(x, t, weight)[0]]

    fails(weighted, ValueError, "sample weights of shape (4,), got (3,)")
    many = nnx.SoftmaxNLL(n_models=2)
    fails(lambda b: [many(on(b, 4, 3), on(b, 4, dtype=labels))[0]], ValueError, "of 2 models")
    loose = nnx.Dropout(0.5)

    def foreign(backend: Backend) -> list[Array]:
        return [loose.forward(on(backend, 3), step=Step(0, backend.step_state(), []))[0]]

    fails(foreign, ValueError, "not one of the layers")


def test_mixed_backends_are_a_type_error() -> None:
    cuda, host = get_backend("cupy"), get_backend("numpy")
    layer = nnx.Linear(3, 2, rng=np.random.default_rng(0))
    x = np.zeros((4, 3), np.float32)
    with pytest.raises(TypeError, match="got cupy and numpy"):
        layer(cuda.asarray(x))
    layer.to(cuda)
    with pytest.raises(TypeError, match="got numpy and cupy"):
        layer(x)
    for model in (layer, nnx.Sequential(layer, nnx.ReLU())):
        y, saved = model.forward(cuda.asarray(x))
        with pytest.raises(TypeError, match="got numpy and cupy"):
            model.backward(cuda.to_numpy(y), saved)
        assert all(p.fresh for _, p in layer.parameters())
    with pytest.raises(TypeError, match="one backend"):
        nnx.SoftmaxNLL()(cuda.asarray(x), np.zeros(4, np.int64))
    layer.to(host)
    assert layer(x).shape == (4, 2)
