"""`model`: a model of yours, checked layer by layer and step by step."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nnx.backends import Array, Backend, backend_of, resolve
from nnx.check.gradients import WrongGradient, check_gradients
from nnx.check.report import Divergence, Report, Row, collected, progress_bar
from nnx.check.sides import (
    FLOOR,
    MARGIN,
    Gap,
    Rounding,
    Side,
    active,
    batches_of,
    converted,
    differing,
    gap_of,
    growth,
    other,
    pairing,
    parts_of,
    paths_of,
    units_of,
)
from nnx.data import check_features
from nnx.layers import Layer
from nnx.losses import Loss
from nnx.optimizers import Optimizer
from nnx.trainer import _to_host

_SEEDS = (4, 32)
"""How many times a step is repeated with other roundings where an array differs: at first, and
before it is called a divergence. Near a kink, rounding alone decides whether ReLU lets a gradient
through; one of the many repetitions falls on the other side, too."""


def _step_by_step(
    make: Callable[[Backend], Side],
    actual: Backend,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    report: Report,
    dtype: Any,
    bar: Any,
) -> bool:
    """Train on `actual`; repeat each of its steps from the same state on NumPy, and compare.

    Adds a row for each group of arrays, and the first divergence. Returns whether there was none.
    """
    here, there, noisy = make(other(actual)), make(actual), make(Rounding(0))
    compared, failed = pairing(actual, dtype), ""
    floor = FLOOR * float(np.finfo(dtype).eps)
    bounds: dict[_Key, float] = {}
    worst: dict[str, tuple[float, Row]] = {}
    undecided: dict[str, None] = {}  # in order
    for number, batch in enumerate(batches):
        before = there.state()
        here.restore(before)
        expected = here.step(*batch)
        if not all(np.isfinite(e.value).all() for e in expected if e.group == "loss"):
            report.warnings.append(f"the loss isn't finite in step {number}; nothing came after it")
            break
        try:
            got = there.step(*batch)
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", ()))
            failed = f"step {number}: {type(error).__name__}: {error} {notes}".strip()
            break
        keys = [(e.group, e.layer, e.array) for e in expected]
        if keys != [(e.group, e.layer, e.array) for e in got]:
            failed = f"step {number} computed other arrays"
            break
        gaps = [gap_of(e.value, a.value) for e, a in zip(expected, got, strict=True)]
        limits = dict.fromkeys(keys, floor) | bounds

        for n_seeds in _SEEDS:
            if _first_beyond(keys, gaps, limits) is None:
                break
            for _ in range(n_seeds):
                noisy.restore(before)
                for key, e, a in zip(keys, expected, noisy.step(*batch), strict=True):
                    limits[key] = max(limits[key], MARGIN * gap_of(e.value, a.value).error)
            if n_seeds == _SEEDS[0]:
                bounds = dict(limits)  # what more seeds find is of this step alone
        for key, gap in zip(keys, gaps, strict=True):
            group, layer, array = key
            ratio = gap.error / limits[key] if math.isfinite(gap.error) else math.inf
            if limits[key] >= 1 and gap.error <= limits[key]:
                undecided.setdefault(f"{array} of {layer}")
                continue
            if group not in worst or not ratio <= worst[group][0]:
                detail = f"step {number}, {layer}, {array}"
                passed = gap.error <= limits[key]
                row = Row(group, compared, gap.error, limits[key], passed, gap.ulp, detail)
                worst[group] = ratio, row
        first = _first_beyond(keys, gaps, limits)
        if first is not None:
            key, gap = first
            where = (gap.index, gap.expected, gap.actual, gap.ulp, gap.error, limits[key])
            report.first_divergence = Divergence(number, key[1], key[2], *where)
            break
        if bar is not None:
            bar.update()
    report.rows += [row for _, row in worst.values()]
    report.warnings += [
        f"{array} is decided by rounding, as where it should be 0, or at a kink; not compared"
        for array in undecided
    ]
    if failed:
        report.fail("a step", compared, 0, failed)
    return not failed and report.first_divergence is None


_Key = tuple[str, str, str]  # group, layer, array


def _first_beyond(
    keys: Sequence[_Key], gaps: Sequence[Gap], limits: dict[_Key, float]
) -> tuple[_Key, Gap] | None:
    """The first array that differs by more than its bound."""
    pairs = zip(keys, gaps, strict=True)
    return next((pair for pair in pairs if not pair[1].error <= limits[pair[0]]), None)


def _apart(
    make: Callable[[Backend], Side],
    actual: Backend,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    report: Report,
    dtype: Any,
) -> None:
    """Train on both from one state and never look back: do they grow apart as rounding does?"""
    here = make(other(actual))
    (errors,) = growth(here, [make(actual)], batches)
    limits = np.full_like(errors, FLOOR * float(np.finfo(dtype).eps))
    for first, last in ((0, 8), (8, 40)):  # more only if a kink may have been met
        if (errors <= limits).all():
            break
        noisy = [make(Rounding(seed)) for seed in range(first, last)]
        found = growth(make(other(actual)), noisy, batches).max(axis=0)
        limits = np.maximum(limits, MARGIN * np.maximum.accumulate(found, axis=0))
    names = ["loss", *(name for name, _ in here.trainer.model.parameters())]
    add_growth(report, pairing(actual, dtype), names, errors, limits)


def add_growth(
    report: Report,
    compared: str,
    names: Sequence[str],
    errors: np.ndarray,
    limits: np.ndarray,
    prefix: str = "",
) -> None:
    """A row for the loss and one for the weights, each for its worst array and step.

    Args:
        report: Gets the rows.
        compared: What with what.
        names: Of the arrays, the loss first.
        errors: `(steps, len(names))`.
        limits: The same for their bounds.
        prefix: Of the rows' names.
    """
    with np.errstate(invalid="ignore"):
        ratio = np.where(errors <= limits, errors / limits, np.inf)
    ratio[(errors <= limits) & (limits >= 1)] = 0  # rounding alone decides these
    for what, columns in (("loss", slice(0, 1)), ("weights", slice(1, None))):
        part = ratio[:, columns]
        step, i = (int(k) for k in np.unravel_index(int(part.argmax()), part.shape))
        i += columns.start
        report.add(
            f"{prefix}{what} over {len(errors)} steps",
            compared,
            errors[step, i],
            limits[step, i],
            detail=f"step {step}, {names[i]}",
        )


DIFFERENCES = "central differences, float64"
"""What gradients are compared with, for a row."""


def model(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    x: Any,
    t: Any,
    *,
    backend: str | Backend | None = None,
    steps: int = 50,
    batch_size: int = 32,
    dtype: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Check a model, its loss and its optimizer: gradients, and training on two backends.

    Three things, on copies; what is passed in stays as it is.

    1. The gradients of each layer and of the loss by `check_gradients`, in float64, at the layer's
       own weights, slightly shaken, and the input that reaches it.
    2. Each step of a training on `backend` is repeated on NumPy from the same state, and everything
       it computes is compared: the output of each layer, the loss, each gradient, the weights after
       the update, the optimizer's state. The first array that differs by more than its bound is
       the first divergence: all that went into it agreed.
    3. The same training runs on both without being brought together, and loss and weights must not
       grow apart more than rounding explains.

    The bounds are found on the spot: the same is done on NumPy with sums in another order and the
    last bits changed, several times; the bound is four times the largest difference that makes.

    Args:
        model: Any layer with parameters.
        loss: Compares its output with `t`.
        optimizer: Of the class and settings to check; its state, if it has any, is the start.
        x: Samples along the first axis.
        t: A target for each.
        backend: What to check against NumPy; by default `NNX_BACKEND`, else where the parameters
            are. NumPy itself is compared with the definitions of its operations in plain xp.
        steps: How many steps to train.
        batch_size: Samples in a step.
        dtype: float32 or float64; by default that of the model.
        seed: Of order, dropout and everything else that is random.
        progress: Whether to show a progress bar on the standard error.

    Returns:
        The report.

    Raises:
        ValueError: The model has no parameters, or the data don't fit.
    """
    parameters = [p for _, p in model.parameters()]
    if not parameters:
        raise ValueError("check.model: expected a model with parameters, got none")
    if steps < 1 or batch_size < 1:
        raise ValueError(
            f"check.model: expected steps and batch_size of at least 1, got {steps}, {batch_size}"
        )
    actual = resolve(backend, default=backend_of(*(p.value for p in parameters)))
    dtype = np.dtype(dtype or parameters[0].value.dtype)
    x = check_features(_to_host(x), who="check.model").astype(dtype)
    n_outputs = converted(model, dtype)(x[:1]).shape[-1]
    t = loss.check_target(_to_host(t), len(x), n_outputs, dtype, "check.model")
    start = _started(optimizer)
    report = Report(f"{type(model).__name__}, {type(loss).__name__}, {optimizer!r}", actual)

    def make(side: Backend) -> Side:
        return Side(side, model, loss, optimizer, seed=seed, dtype=dtype, start=start)

    with collected(report), progress_bar(steps, "step", progress) as bar:
        few = min(batch_size, 8)
        for row in _gradients_of(model, loss, x[:few], t[:few], actual, seed):
            report.rows.append(row)
        before = [make(side).state()[0] for side in (other(actual), actual)]
        arrays = [list(state.values()) for state in before]
        compared = pairing(actual, dtype)
        report.add("initial weights", compared, differing(*arrays), 0)
        batches = batches_of(x, t, batch_size, steps, seed)
        if _step_by_step(make, actual, batches, report, dtype, bar):
            _apart(make, actual, batches, report, dtype)
    return report


def _started(optimizer: Optimizer) -> dict[str, Any] | None:
    """The state of an optimizer that has been used, on the host."""
    try:
        to_numpy = optimizer.vector.backend.to_numpy
    except RuntimeError:  # not bound to parameters
        return None
    state = optimizer.state()
    return {name: a if name == "step" else to_numpy(a).copy() for name, a in state.items()}


def _gradients_of(
    model: Layer, loss: Loss, x: np.ndarray, t: np.ndarray, backend: Backend, seed: int
) -> Iterator[Row]:
    """`check_gradients` of each layer at the input that reaches it, of the whole, of the loss."""
    rng = np.random.default_rng(seed)
    with active(backend):
        whole = converted(model, np.float64)
        for _, p in whole.parameters():  # off the kinks, where biases of 0 are; signs stay
            shift = 0.1 * rng.standard_normal(p.value.shape)
            p.value[...] = np.where(p.value == 0, shift, p.value * (1 + shift))
        whole.to(backend)
        paths, inputs = paths_of(whole), _inputs(whole, backend.asarray(x, np.float64))
        layers = [(layer, reached) for layer, reached in inputs.items() if layer is not whole]
        for layer, reached in [*layers, (whole, backend.asarray(x, np.float64))]:
            yield gradient_row(
                f"gradients of {paths[layer]}", backend, layer, reached, seed=seed, randomize=False
            )
        target = t.astype(np.float64) if t.dtype.kind == "f" else t
        prediction = whole(backend.asarray(x, np.float64))
        name = f"gradients of loss ({type(loss).__name__})"
        yield gradient_row(name, backend, copy.deepcopy(loss), prediction, target, seed=seed)


def _inputs(model: Layer, x: Array) -> dict[Layer, Array]:
    """The first input of each layer in evaluation mode."""
    inputs: dict[Layer, Array] = {}

    def note(unit: Any, forward: Any, x: Array, **options: Any) -> Any:
        if isinstance(unit, Layer):
            inputs.setdefault(unit, x.copy())
        else:
            z = x
            for part in parts_of(unit):
                inputs.setdefault(part, z.copy())
                z = part(z)
        return forward(x, **options)

    units = [unit for _, unit, _ in units_of(model)]
    for unit in units:
        unit.forward = functools.partial(note, unit, unit.forward)
    try:
        model(x)
    finally:
        for unit in units:
            del unit.forward
    return inputs


def gradient_row(
    name: str, backend: Backend, function: Layer | Loss, *arrays: Any, seed: int, **options: Any
) -> Row:
    """`check_gradients` as a row. What is wrong in one direction only is a kink on the way."""
    compared, rtol = DIFFERENCES, 1e-7
    failed: WrongGradient | None = None
    for attempt in range(3):
        rng = np.random.default_rng((seed, attempt))
        try:
            error = check_gradients(
                function, *arrays, rng=rng, backend=backend, rtol=rtol, **options
            )
        except WrongGradient as wrong:
            failed = wrong
        else:
            return Row(name, compared, error, rtol, True)
    assert failed is not None
    return Row(name, compared, failed.error, rtol, False, None, str(failed))
