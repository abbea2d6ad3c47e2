"""`library`: every layer, loss and optimizer of nnx, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nnx import backends, layers
from nnx.backends import Array, Backend, backend_of, resolve
from nnx.check.report import Divergence, Report, collected, progress_bar
from nnx.check.sides import (
    FLOOR,
    MARGIN,
    Rounding,
    Side,
    active,
    batches_of,
    differing,
    gap_of,
    growth,
    other,
    pairing,
)
from nnx.check.training import DIFFERENCES, add_growth, gradient_row
from nnx.data import load_digits
from nnx.layers import Layer, Sequential, Step
from nnx.losses import (
    NLL,
    BCEWithLogits,
    Hinge,
    Huber,
    Loss,
    MeanAbsoluteError,
    MeanSquaredError,
    SoftmaxMSE,
    SoftmaxNLL,
    SquaredHinge,
)
from nnx.models import mlp
from nnx.optimizers import SGD, AdaGrad, Adam, AdamW, AMSGrad, Lion, Optimizer, RMSProp
from nnx.parameter import Parameter, ParameterVector
from nnx.trainer import Trainer

_OPERATION = 32
"""Times the machine epsilon: what one layer, one loss or a few steps of an optimizer may be off,
relative to an array's largest element. Elementary functions are good to 4 ulp on either side, a sum
of n terms in another order differs by about sqrt(n) / 2, here at most 9 ulp, and two or three of
these follow each other. What was seen is 5."""

_ROWS, _WIDE = (33, 65), (3, 5, 257)


def _plain_layer(name: str, *arguments: Any) -> Callable[..., Layer]:
    return lambda rng, dtype: getattr(layers, name)(*arguments)


def _sized(name: str, *sizes: int, **options: Any) -> Callable[..., Layer]:
    kind = getattr(layers, name)
    if name == "Linear":
        return lambda rng, dtype: kind(*sizes, rng=rng, dtype=dtype, **options)
    return lambda rng, dtype: kind(*sizes, dtype=dtype, **options)


LAYERS: dict[str, tuple[Callable[..., Layer], tuple[int, ...]]] = {
    "Linear": (_sized("Linear", 65, 33), _ROWS),
    "Linear, without bias": (_sized("Linear", 65, 1, bias=False), _ROWS),
    "Linear, 3 models": (_sized("Linear", 65, 33, n_models=3), (3, *_ROWS)),
    **{
        name: (_plain_layer(name), shape)
        for shape, names in (
            (_WIDE, ("ELU", "GELU", "HardSigmoid", "HardSwish", "HardTanh", "Identity")),
            (_WIDE, ("LeakyReLU", "Mish", "ReLU", "SELU", "SiLU", "Sigmoid", "Softplus", "Tanh")),
            (_ROWS, ("Softmax", "LogSoftmax", "Dropout")),
            ((33, 5, 13), ("Flatten",)),
        )
        for name in names
    },
    "GELU, tanh": (_plain_layer("GELU", "tanh"), _WIDE),
    "BatchNorm": (_sized("BatchNorm", 65), _ROWS),
    "BatchNorm, 3 models": (_sized("BatchNorm", 65, n_models=3), (3, *_ROWS)),
    "LayerNorm": (_sized("LayerNorm", 65), _ROWS),
    "LayerNorm, 3 models": (_sized("LayerNorm", 65, n_models=3), (3, *_ROWS)),
    "RMSNorm": (_sized("RMSNorm", 65), _ROWS),
    "Sequential": (
        lambda rng, dtype: mlp([65, 33, 10], dropout=0.3, seed=1, dtype=dtype),
        _ROWS,
    ),
}
"""What `library` checks of the layers: how to make one, and the shape of its input."""

_CLASS_WEIGHTS = (1.0, 2.0, 0.5, 1.5, 1.0)

LOSSES: dict[str, tuple[Callable[[], Loss], str]] = {
    "SoftmaxNLL": (SoftmaxNLL, "labels"),
    "SoftmaxNLL, soft targets": (SoftmaxNLL, "soft"),
    "SoftmaxNLL, class weights": (lambda: SoftmaxNLL(_CLASS_WEIGHTS), "labels"),
    "SoftmaxNLL, label smoothing": (lambda: SoftmaxNLL(label_smoothing=0.1), "labels"),
    "SoftmaxNLL, ignored labels": (lambda: SoftmaxNLL(ignore_index=1), "labels"),
    "SoftmaxNLL, all of them": (lambda: SoftmaxNLL(_CLASS_WEIGHTS, 0.1, 1), "labels"),
    "SoftmaxNLL, all, soft targets": (lambda: SoftmaxNLL(_CLASS_WEIGHTS, 0.1, 1), "soft"),
    "SoftmaxNLL, 3 models": (lambda: SoftmaxNLL(n_models=3), "labels"),
    "NLL": (NLL, "labels"),
    "NLL, soft targets": (NLL, "soft"),
    "SoftmaxMSE": (SoftmaxMSE, "labels"),
    "SoftmaxMSE, soft targets": (SoftmaxMSE, "soft"),
    "BCEWithLogits": (BCEWithLogits, "soft"),
    "BCEWithLogits, weights": (lambda: BCEWithLogits(_CLASS_WEIGHTS), "soft"),
    "MeanSquaredError": (MeanSquaredError, "numbers"),
    "MeanSquaredError, 3 models": (lambda: MeanSquaredError(n_models=3), "numbers"),
    "MeanAbsoluteError": (MeanAbsoluteError, "numbers"),
    "Huber": (Huber, "numbers"),
    "Hinge": (Hinge, "signs"),
    "SquaredHinge": (SquaredHinge, "signs"),
}
"""What `library` checks of the losses: how to make one, and what its targets are."""

OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "SGD": lambda: SGD(0.1),
    "SGD, momentum": lambda: SGD(0.1, momentum=0.9, weight_decay=0.01),
    "SGD, Nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, penalties": lambda: SGD(0.1, l1=0.01, l2=0.1),
    "SGD, clipped": lambda: SGD(0.1, momentum=0.9, clip_value=1.5, clip_norm=2.0),
    "SGD, a schedule": lambda: SGD(lambda step: 0.1 / (1 + step)),
    "Adam": lambda: Adam(0.01),
    "Adam, all options": lambda: Adam(
        0.01, weight_decay=0.1, l1=0.01, l2=0.01, clip_value=1.5, clip_norm=2.0
    ),
    "AdamW": lambda: AdamW(0.01, weight_decay=0.1),
    "AMSGrad": lambda: AMSGrad(0.01, beta2=0.5, weight_decay=0.1),
    "AdaGrad": lambda: AdaGrad(0.1, lr_decay=0.1, initial=0.1, weight_decay=0.1),
    "RMSProp": lambda: RMSProp(0.01, weight_decay=0.1),
    "RMSProp, centered": lambda: RMSProp(0.01, centered=True, momentum=0.5),
    "Lion": lambda: Lion(0.01, weight_decay=0.1),
}
"""What `library` checks of the optimizers."""

DTYPES = ("float32", "float64")

_Arrays = dict[str, np.ndarray]


def library(
    backend: str | Backend | None = None,
    *,
    dtype: Any = None,
    steps: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Check all layers, losses and optimizers on a backend.

    Every gradient against central differences; then everything against NumPy: outputs and
    gradients, several steps of each optimizer, and bit for bit the initial weights, the dropout
    masks and the order of the samples. Last a network learns the bundled digits on both, once by
    SGD and once by Adam, and the two runs must stay together as `envelope` says.

    Args:
        backend: What to check; by default `NNX_BACKEND`, else NumPy, which is compared with the
            definitions of its operations in plain xp.
        dtype: Compare in float32 or float64 alone; by default in both. Gradients are checked in
            float64.
        steps: Of the training on digits, at most `MOST_STEPS`.
        seed: Of all random numbers.
        progress: Whether to show a progress bar on the standard error.

    Returns:
        The report. A check that raises an error is a row that failed.

    Raises:
        ValueError: The number of steps is out of range.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"check.library: expected 1 to {MOST_STEPS} steps, got {steps}")
    actual = resolve(backend)
    dtypes = DTYPES if dtype is None else (np.dtype(dtype).name,)
    report = Report(f"nnx's layers, losses and optimizers on {actual.name}", actual)
    checks = list(_checks(actual, dtypes, steps, seed))
    with collected(report), progress_bar(len(checks), "check", progress) as bar:
        for name, compared, check in checks:
            try:
                check(report, name, compared)
            except Exception as error:
                report.fail(name, compared, 0, f"{type(error).__name__}: {error}")
            if bar is not None:
                bar.update()
    return report


_Check = Callable[[Report, str, str], None]


def _checks(
    actual: Backend, dtypes: Sequence[str], steps: int, seed: int
) -> Iterator[tuple[str, str, _Check]]:
    """Name, what it is compared with, and the check."""

    def gradients(name: str) -> _Check:
        def check(report: Report, name: str, compared: str) -> None:
            rng = np.random.default_rng(seed)
            arrays: tuple[Any, ...]
            with active(actual):
                if name in LAYERS:
                    factory, shape = LAYERS[name]
                    function: Layer | Loss = factory(rng, np.float64).to(actual)
                    arrays = (3 * rng.standard_normal(shape),)
                else:
                    function, arrays = _loss_case(name, rng)
                report.rows.append(gradient_row(name, actual, function, *arrays, seed=seed))

        return check

    def same(body: Callable[..., _Arrays], dtype: str, bound: float) -> _Check:
        def check(report: Report, name: str, compared: str) -> None:
            found = []
            for side in (other(actual), actual):
                with active(side):
                    found.append(body(side, name, np.dtype(dtype), seed))
            _compare_arrays(report, name, compared, found[0], found[1], bound)

        return check

    def training(dtype: str) -> _Check:
        def check(report: Report, name: str, compared: str) -> None:
            sides = [reference(name, dtype, side) for side in (other(actual), actual)]
            (here, batches), (there, _) = sides
            (errors,) = growth(here, [there], batches[:steps])
            bounds = envelope(name, dtype, steps)
            limits = np.hstack([bounds[:, :1], *[bounds[:, 1:]] * (errors.shape[1] - 1)])
            names = ["loss", *(n for n, _ in here.trainer.model.parameters())]
            add_growth(report, compared, names, errors, limits, f"{name}: ")

        return check

    def replayed(dtype: str) -> _Check:
        def check(report: Report, name: str, compared: str) -> None:
            with active(actual):
                runs = [_trained(actual, np.dtype(dtype), seed, graph) for graph in (False, True)]
            _compare_arrays(report, name, compared, runs[0], runs[1], 0)

        return check

    for name in (*LAYERS, *LOSSES):
        yield name, DIFFERENCES, gradients(name)
    for dtype in dtypes:
        compared = pairing(actual, dtype)
        bound = _OPERATION * float(np.finfo(dtype).eps)
        for name in LAYERS:
            yield name, compared, same(_run_layer, dtype, bound)
        for name in LOSSES:
            yield name, compared, same(_run_loss, dtype, bound)
        for name in OPTIMIZERS:
            yield name, compared, same(_run_optimizer, dtype, bound)
        for name, body in _EXACT.items():
            yield name, compared, same(body, dtype, 0)
        for name in ENVELOPE:
            yield name, compared, training(dtype)
        if actual.graphs:
            yield "steps from a graph", f"graph to eager, {dtype}", replayed(dtype)


def _compare_arrays(
    report: Report, name: str, compared: str, expected: _Arrays, actual: _Arrays, bound: float
) -> None:
    """A row for the array that differs most; the first divergence of the report if it is that."""
    if expected.keys() != actual.keys():
        report.fail(name, compared, bound, f"expected {list(expected)}, got {list(actual)}")
        return
    if bound == 0:
        n = differing(list(expected.values()), list(actual.values()))
        report.add(name, compared, n, 0)
        return
    gaps = {key: gap_of(expected[key], actual[key]) for key in expected}
    worst = max(gaps, key=lambda key: gaps[key].error)
    gap = gaps[worst]
    row = report.add(name, compared, gap.error, bound, ulp=gap.ulp, detail=worst)
    if not row.passed:
        where = (gap.index, gap.expected, gap.actual, gap.ulp, gap.error, bound)
        found = Divergence(None, name, worst, *where)
        report.rows[-1] = row._replace(detail=str(found))
        report.first_divergence = report.first_divergence or found


def _run_layer(backend: Backend, name: str, dtype: Any, seed: int) -> _Arrays:
    """What a layer returns in evaluation and in training, and its gradients and buffers."""
    rng = np.random.default_rng(seed)
    factory, shape = LAYERS[name]
    layer = factory(rng, dtype).to(backend)
    for _, p in layer.parameters():
        p.value[...] = backend.asarray(rng.standard_normal(p.value.shape), dtype)
    x = backend.asarray(3 * rng.standard_normal(shape), dtype)
    state = backend.step_state()
    state.number = 8
    state.plan(np.zeros(1), dtype=dtype)
    results = {"output in evaluation": layer(x)}
    y, saved = layer.forward(x, step=Step(seed, state, list(layer.layers())))
    dy = backend.asarray(rng.standard_normal(y.shape), dtype)
    results |= {"output": y, "gradient of the input": layer.backward(dy, saved)}
    results |= {f"gradient of {name}": p.grad for name, p in layer.parameters()}
    return {key: backend.to_numpy(a).copy() for key, a in (results | dict(layer.buffers())).items()}


def _loss_case(name: str, rng: np.random.Generator) -> tuple[Loss, tuple[np.ndarray, ...]]:
    """A loss, and prediction, target and sample weights for it."""
    factory, kind = LOSSES[name]
    loss = factory()
    shape = (33, 5) if loss.n_models is None else (loss.n_models, 33, 5)
    prediction = 3 * rng.standard_normal(shape)
    if isinstance(loss, NLL):
        prediction = rng.uniform(0.1, 1, shape)
    target = {
        "labels": rng.integers(0, 5, shape[:-1]),
        "soft": rng.uniform(0, 1, shape),
        "signs": rng.choice([-1.0, 1.0], shape),
        "numbers": rng.standard_normal(shape),
    }[kind]
    return loss, (prediction, target, rng.uniform(0, 1, 33) * (rng.random(33) < 0.7))


def _run_loss(backend: Backend, name: str, dtype: Any, seed: int) -> _Arrays:
    """Value and gradient, with and without sample weights, normalizer and factor."""
    loss, arrays = _loss_case(name, np.random.default_rng(seed))
    x, t, w = (backend.asarray(a, dtype if a.dtype.kind == "f" else None) for a in arrays)
    results: dict[str, Any] = {}
    for what, (value, gradient) in {
        "": loss(x, t),
        ", weighted": loss(x, t, w),
        ", scaled": loss(x, t, w, normalizer=4.0, grad_scale=128.0),
    }.items():
        results |= {f"value{what}": value, f"gradient{what}": gradient}
    return {key: backend.to_numpy(a).copy() for key, a in results.items()}


def _run_optimizer(backend: Backend, name: str, dtype: Any, seed: int) -> _Arrays:
    """Weights and state after five steps on given gradients."""
    rng = np.random.default_rng(seed)
    optimizer = OPTIMIZERS[name]()
    scales = ((1.0, 1.0), (0.5, 0.0), (1.0, 1.0), (0.0, 1.0))
    parameters = [
        Parameter(
            backend.asarray(rng.standard_normal(shape), dtype), lr_scale=rate, decay_scale=decay
        )
        for shape, (rate, decay) in zip(((65, 33), (33,), (33, 10), (10,)), scales, strict=True)
    ]
    optimizer.bind(ParameterVector(parameters))
    for number in range(5):
        optimizer.begin_step()
        for i, p in enumerate(parameters):
            gradient = backend.asarray(rng.standard_normal(p.value.shape), dtype)
            if (number, i) != (2, 1) and not p.accumulate():  # one counts as 0, once
                p.grad[...] = gradient
        optimizer.step(backend.asarray(0.5, dtype))
    results = {f"parameter {i}": p.value for i, p in enumerate(parameters)}
    results |= {key: a for key, a in optimizer.state().items() if key != "step"}
    return {key: backend.to_numpy(a).copy() for key, a in results.items()}


def _initial_weights(backend: Backend, name: str, dtype: Any, seed: int) -> _Arrays:
    model = mlp([65, 33, 10], seed=seed, dtype=dtype)
    state = Trainer(model, SoftmaxNLL(), SGD(), backend=backend).model.state()
    return {key: backend.to_numpy(a).copy() for key, a in state.items()}


def _dropout_masks(backend: Backend, name: str, dtype: Any, seed: int) -> _Arrays:
    layer, x = layers.Dropout(0.3), backend.asarray(np.ones(_WIDE), dtype)
    state, results = backend.step_state(), {}
    for number in (0, 1, 2**33):
        state.number = number
        state.plan(np.zeros(1), dtype=dtype)
        step = Step(seed, state, [layer])
        for use in range(2):
            y, _ = layer.forward(x, step=step)
            results[f"step {number}, use {use}"] = backend.to_numpy(y) != 0
    return results


class _Seen(Layer):
    """Passes on its input, and keeps it."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Any]:
        self.rows.append(backend_of(x).to_numpy(x).copy())
        return x, None

    def backward(self, dy: Array, saved: Any, *, need_dx: bool = True) -> Array | None:
        return dy if need_dx else None


def _order_of_samples(backend: Backend, name: str, dtype: Any, seed: int) -> _Arrays:
    seen = _Seen()
    model = Sequential(seen, mlp([1, 1], dtype=dtype))
    trainer = Trainer(model, MeanSquaredError(), SGD(0.0), seed=seed, backend=backend)
    x = np.arange(50.0).reshape(50, 1)
    trainer.fit(x, x, epochs=2, batch_size=16)  # the last batch is short
    return {f"batch {i}": rows for i, rows in enumerate(seen.rows)}


def _trained(backend: Backend, dtype: Any, seed: int, graph: bool) -> _Arrays:
    """Losses and weights of two epochs with dropout, a schedule and a short last batch."""
    rng = np.random.default_rng(seed)
    x, t = rng.standard_normal((50, 12)), rng.integers(0, 5, 50)
    net = mlp([12, 33, 5], dropout=0.3, seed=seed, dtype=dtype)
    optimizer = Adam(lambda step: 0.01 / (1 + step))
    trainer = Trainer(net, SoftmaxNLL(), optimizer, seed=seed, backend=backend, graph=graph)
    losses = trainer.fit(x, t, epochs=2, batch_size=16)["loss"]
    state = {name: backend.to_numpy(a).copy() for name, a in net.state().items()}
    return {"loss": np.array(losses)} | state


_EXACT: dict[str, Callable[..., _Arrays]] = {
    "initial weights": _initial_weights,
    "dropout masks": _dropout_masks,
    "order of the samples": _order_of_samples,
}
"""What must be the same bits."""


# ---- the envelope --------------------------------------------------------------------------------

STEPS = (1, 2, 5, 10, 20, 50, 100, 200)
"""The steps after which `ENVELOPE` holds a value."""

MOST_STEPS = STEPS[-1]
"""How long `library` can train."""

_OPTIMIZERS_OF_REFERENCE: dict[str, Callable[[], Optimizer]] = {
    "digits by SGD": lambda: SGD(0.1, momentum=0.9),
    "digits by Adam": lambda: Adam(0.001),
}

# Made by `python bench/envelope.py`; docs/equivalence.md shows the curves.
ENVELOPE: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    # begin
    "digits by SGD": {
        "float32": {
            "loss": (8.5e-08, 1.0e-07, 1.1e-07, 1.1e-07, 2.3e-07, 1.2e-06, 2.1e-06, 8.5e-06),
            "weights": (2.9e-07, 3.2e-07, 4.3e-07, 4.3e-07, 4.9e-07, 8.8e-07, 1.3e-06, 2.9e-06),
        },
        "float64": {
            "loss": (1.6e-16, 1.8e-16, 1.8e-16, 1.8e-16, 4.4e-16, 2.1e-15, 5.0e-15, 1.6e-14),
            "weights": (4.6e-16, 4.6e-16, 5.1e-16, 5.6e-16, 5.6e-16, 1.3e-15, 2.2e-15, 5.5e-15),
        },
    },
    "digits by Adam": {
        "float32": {
            "loss": (8.5e-08, 9.7e-08, 1.0e-07, 1.1e-07, 1.2e-07, 1.4e-07, 1.8e-07, 2.2e-07),
            "weights": (2.4e-07, 8.6e-07, 1.1e-06, 1.1e-06, 1.1e-06, 1.1e-06, 1.1e-06, 1.1e-06),
        },
        "float64": {
            "loss": (1.6e-16, 1.6e-16, 1.9e-16, 2.1e-16, 2.2e-16, 2.5e-16, 4.2e-16, 5.3e-16),
            "weights": (4.6e-16, 1.2e-15, 1.2e-15, 1.2e-15, 1.2e-15, 1.2e-15, 1.2e-15, 1.2e-15),
        },
    },
    # end
}
"""How far runs of the reference network on NumPy grow apart when sums are taken in another order:
the largest difference of 20 seeds up to each of `STEPS`, relative as `growth` says."""


def reference(
    name: str, dtype: str, backend: Backend | None = None, *, seed: int | None = None
) -> tuple[Side, list[tuple[np.ndarray, np.ndarray]]]:
    """The training of which `ENVELOPE` is the envelope, and its batches.

    64-64-32-10 with ReLU and a dropout of 0.1, on the bundled digits in batches of 32.

    Args:
        name: A key of `ENVELOPE`.
        dtype: float32 or float64.
        backend: Where; by default NumPy.
        seed: Of the order in which NumPy takes sums; by default its own.
    """
    if backend is None:
        own = backends.get_backend("numpy")
        backend = own if seed is None else Rounding(seed, last_bits=False)
    train, _ = load_digits(seed=0)
    net = mlp([64, 64, 32, 10], dropout=0.1, seed=0, dtype=dtype)
    optimizer = _OPTIMIZERS_OF_REFERENCE[name]()
    side = Side(backend, net, SoftmaxNLL(), optimizer, seed=0, dtype=np.dtype(dtype))
    return side, batches_of((train.x / 16).astype(dtype), train.t, 32, STEPS[-1], seed=0)


def envelope(name: str, dtype: str, steps: int) -> np.ndarray:
    """The bounds of loss and weights after each of the first steps, `(steps, 2)`.

    Four times `ENVELOPE`, on logarithmic scales interpolated between the steps of its table, and at
    least 16 times the machine epsilon.
    """
    curves = ENVELOPE[name][dtype]
    at = np.log(np.arange(1, steps + 1))
    columns = [
        np.exp(np.interp(at, np.log(STEPS), np.log(curves[what]))) for what in ("loss", "weights")
    ]
    bounds: np.ndarray = MARGIN * np.stack(columns, axis=1)
    return bounds.clip(FLOOR * float(np.finfo(dtype).eps))
