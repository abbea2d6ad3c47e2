"""Two backends side by side: how far apart arrays are, and a NumPy that rounds otherwise."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from nnx import backends
from nnx.backends import Array, Backend, XpBackend
from nnx.backends.philox import SHUFFLE, generator
from nnx.layers import Layer, Sequential
from nnx.losses import Loss
from nnx.optimizers import Optimizer
from nnx.parameter import Parameter
from nnx.trainer import Trainer

# ---- how far two arrays are apart ----------------------------------------------------------------


class Gap(NamedTuple):
    """The largest difference of two arrays."""

    error: float  # relative to the largest magnitude; inf where one alone isn't finite
    index: tuple[int, ...] = ()  # type: ignore[assignment]  # not the method of a tuple
    expected: Any = None
    actual: Any = None
    ulp: int | None = None


def gap_of(expected: np.ndarray, actual: np.ndarray) -> Gap:
    """Where and how far two arrays differ most, relative to the largest magnitude expected."""
    if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
        one, other = (f"an array of {a.dtype} {a.shape}" for a in (expected, actual))
        return Gap(math.inf, (), one, other)
    if not expected.size:
        return Gap(0.0)
    with np.errstate(all="ignore"):
        e, a = expected.astype(np.float64), actual.astype(np.float64)
        difference = np.asarray(np.abs(e - a))
        difference[(e == a) | (np.isnan(e) & np.isnan(a))] = 0
        difference[np.isnan(difference)] = np.inf
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    scale = float(np.abs(e[np.isfinite(e)]).max(initial=0.0))
    d = float(difference[worst])
    error = 0.0 if d == 0 else d / scale if scale else math.inf
    index = tuple(map(int, worst))
    return Gap(error, index, expected[worst], actual[worst], _ulps(expected[worst], actual[worst]))


def _ulps(a: Any, b: Any) -> int | None:
    """How many floating-point numbers lie between two of them, one end counted."""
    if a.dtype.kind != "f" or not (np.isfinite(a) and np.isfinite(b)):
        return None
    kind: Any = {4: np.int32, 8: np.int64}[a.dtype.itemsize]

    def place(x: Any) -> int:
        bits = int(np.asarray(x).view(kind))
        return bits if bits >= 0 else int(np.iinfo(kind).min) - bits

    return abs(place(a) - place(b))


def differing(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """How many elements aren't the same bits; inf if shapes or dtypes differ."""
    total = 0
    for e, a in zip(expected, actual, strict=True):
        if (e.shape, e.dtype) != (a.shape, a.dtype):
            return math.inf
        width = max(e.dtype.itemsize, 1)
        both = (np.frombuffer(x.tobytes(), np.uint8).reshape(-1, width) for x in (e, a))
        total += int(np.not_equal(*both).any(axis=1).sum())
    return float(total)


# ---- another NumPy -------------------------------------------------------------------------------


class Rounding(XpBackend):
    """A NumPy that rounds otherwise: as correct as the real one, and never the same bits.

    Sums, of products and of bias gradients, are taken in a random order and in two parts. With
    `last_bits` each number that goes from layer to layer changes in its last bit, too: other
    libraries' elementary functions, and products with fused additions, round otherwise where there
    is no sum at all.
    """

    def __init__(self, seed: int, *, last_bits: bool = True) -> None:
        super().__init__(np, "numpy, rounding otherwise")
        self.rng = np.random.default_rng(seed)
        self.last_bits = last_bits

    def gemm(self, a: Array, b: Array, out: Array, *, accumulate: bool = False) -> Array:
        """As in `XpBackend`, the sums in another order and two parts."""
        order, half = self._order(a.shape[-1])
        a, b = a[..., order], b[..., order, :]
        product = a[..., :half] @ b[..., :half, :] + a[..., half:] @ b[..., half:, :]
        return np.add(out, product, out=out) if accumulate else _write(out, product)

    def bias_grad(self, dy: Array, out: Array, *, accumulate: bool = False) -> Array:
        """As in `XpBackend`, the sums in another order and two parts."""
        order, half = self._order(dy.shape[-2])
        dy = dy[..., order, :]
        total = dy[..., :half, :].sum(axis=-2) + dy[..., half:, :].sum(axis=-2)
        return np.add(out, total, out=out) if accumulate else _write(out, total)

    def _order(self, n: int) -> tuple[np.ndarray, int]:
        return self.rng.permutation(n), int(self.rng.integers(n + 1))

    def last_bit(self, a: Array) -> Array:
        """`a` with each element one unit in the last place up or down, or as it was; a copy."""
        if a.dtype.kind != "f" or not self.last_bits:
            return a
        factor = 1 + np.finfo(a.dtype).eps * self.rng.integers(-1, 2, a.shape)
        return a * factor.astype(a.dtype)


def _write(out: Array, value: Array) -> Array:
    out[...] = value
    return out


@contextlib.contextmanager
def active(backend: Backend) -> Iterator[None]:
    """Within it, NumPy arrays belong to `backend` if that is one on NumPy. One thread at a time."""
    kept = backends._NUMPY
    if backend.xp is np:
        backends._NUMPY = backend  # type: ignore[assignment]
    try:
        with backend.activate(), np.errstate(all="ignore"):
            yield
    finally:
        backends._NUMPY = kept


def other(backend: Backend) -> Backend:
    """What to compare a backend with: NumPy; for NumPy itself the definitions in plain xp."""
    return XpBackend(np, "plain xp") if backend.xp is np else backends.get_backend("numpy")


def pairing(actual: Backend, dtype: Any) -> str:
    """What is compared with what, for a row."""
    return f"{actual.name} to {other(actual).name}, {dtype}"


# ---- watching a step -----------------------------------------------------------------------------


class Event(NamedTuple):
    """An array that a training step has made, on the host."""

    group: str
    layer: str
    array: str
    value: np.ndarray


class _Watch:
    """Copies whatever passes between the layers of a trainer's model while it trains.

    Within the context the instances' `forward` and `backward` are replaced by ones that call them
    and copy what they return: a step's arrays don't outlive it. A pair that `Sequential` runs as
    one is watched as one. `Rounding` changes the last bits on the way.
    """

    def __init__(self, trainer: Trainer, *, keep: bool) -> None:
        self.trainer, self.keep = trainer, keep
        self.events: list[Event] = []
        self.running = "the loss"
        self._units = units_of(trainer.model)
        self._names = {p: name for name, p in trainer.model.parameters()}
        self._loss = trainer.loss

    def __enter__(self) -> Self:
        for layer, unit, own in self._units:
            unit.forward = functools.partial(self._forward, layer, unit.forward)
            unit.backward = functools.partial(self._backward, layer, unit.backward, own)
        self.trainer.loss = _WatchedLoss(self, self._loss)
        return self

    def __exit__(self, *_: object) -> None:
        for _label, unit, _own in self._units:
            del unit.forward, unit.backward
        self.trainer.loss = self._loss

    def _forward(self, layer: str, forward: Any, x: Array, **options: Any) -> tuple[Array, Any]:
        self.running = layer
        y, saved = forward(x, **options)
        return self.passed("activations", layer, "output", y), saved

    def _backward(
        self,
        layer: str,
        backward: Any,
        own: list[Parameter],
        dy: Array,
        saved: Any,
        **options: Any,
    ) -> Array | None:
        self.running = layer
        dx = backward(dy, saved, **options)
        for p in own:
            if not p.fresh:
                noisy = self.passed("gradients", layer, f"gradient of {self._names[p]}", p.grad)
                if noisy is not p.grad:
                    p.grad[...] = noisy
        if dx is None:
            return None
        return self.passed("gradients", layer, "gradient of the input", dx)

    def passed(self, group: str, layer: str, name: str, value: Array) -> Array:
        """Note an array; returns what goes on in its place."""
        backend = self.trainer.backend
        if isinstance(backend, Rounding):
            value = backend.last_bit(value)
        if self.keep:
            self.events.append(Event(group, layer, name, backend.to_numpy(value).copy()))
        return value

    def finish(self) -> list[Event]:
        """The events, with what the step has left behind: weights, buffers, the optimizer's state.

        Call it after the step.
        """
        trainer, to_numpy = self.trainer, self.trainer.backend.to_numpy
        optimizer = type(trainer.optimizer).__name__
        left = [("weights", optimizer, name, p.value) for name, p in trainer.model.parameters()]
        left += [("buffers", "buffers", name, a) for name, a in trainer.model.buffers()]
        left += [
            ("optimizer state", optimizer, name, a)
            for name, a in trainer.optimizer.state().items()
            if name != "step"
        ]
        self.events += [
            Event(group, layer, name, to_numpy(a).copy()) for group, layer, name, a in left
        ]
        return self.events


class _WatchedLoss(Loss):
    """A loss that shows its value and gradient to a watch."""

    def __init__(self, watch: _Watch, loss: Loss) -> None:
        super().__init__(loss.n_models)
        self.watch, self.loss = watch, loss

    def __call__(self, *arrays: Array, **options: Any) -> tuple[Array, Array | None]:
        self.watch.running = repr(self.loss)
        value, gradient = self.loss(*arrays, **options)
        name = f"loss ({type(self.loss).__name__})"
        self.watch.passed("loss", name, "value", value)
        if gradient is not None:
            gradient = self.watch.passed("gradients", name, "gradient of the prediction", gradient)
        return value, gradient


def paths_of(model: Layer) -> dict[Layer, str]:
    """Path and class of each layer: `"0.2 (Linear)"`."""
    found: dict[Layer, str] = {}

    def visit(layer: Layer, path: str) -> None:
        if layer not in found:
            found[layer] = f"{path or 'model'} ({type(layer).__name__})"
            for name, child in layer.children():
                visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


def units_of(model: Layer) -> list[tuple[str, Any, list[Parameter]]]:
    """Label, object and own parameters of what runs: layers, and what `Sequential` has joined."""
    paths = paths_of(model)
    units: list[tuple[str, Any, list[Parameter]]] = []
    for layer, path in paths.items():
        if type(layer).forward is not Sequential.forward:  # whose output is its last unit's
            own = [value for value in vars(layer).values() if isinstance(value, Parameter)]
            units.append((path, layer, own))
        for unit in getattr(layer, "_units", ()):
            if not isinstance(unit, Layer):
                label = " and ".join(paths[part] for part in parts_of(unit))
                units.append((label, unit, [p for _, p in unit.parameters()]))
    return units


def parts_of(unit: Any) -> list[Layer]:
    """The layers that a unit joins, in order."""
    return [value for value in vars(unit).values() if isinstance(value, Layer)]


# ---- training side by side -----------------------------------------------------------------------

FLOOR = 16
"""Times the machine epsilon: what a tensor of a single step may always be off, relative to its
largest element. Elementary functions of either library are good to 4 ulp or better."""

MARGIN = 4
"""Bound over the largest difference between NumPy and NumPy rounding otherwise."""


class Side:
    """A copy of a model in training on one backend."""

    def __init__(
        self,
        backend: Backend,
        model: Layer,
        loss: Loss,
        optimizer: Optimizer,
        *,
        seed: int,
        dtype: Any,
        start: dict[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        with active(backend):
            self.trainer = Trainer(
                converted(model, dtype),
                copy.deepcopy(loss),
                type(optimizer)(**optimizer.config()),
                seed=seed,
                backend=backend,
            )
            if start is not None:
                self.trainer.optimizer.load_state(start)

    def step(self, x: np.ndarray, t: np.ndarray) -> list[Event]:
        """Take a step; returns everything it computed, in that order."""
        with active(self.backend), _Watch(self.trainer, keep=True) as watch:
            asarray = self.backend.asarray
            try:
                self.trainer.train_step(asarray(x), asarray(t))
            except Exception as error:
                error.add_note(f"while training {watch.running} on {self.backend.name}")
                raise
            return watch.finish()

    def go(self, x: np.ndarray, t: np.ndarray) -> list[np.ndarray]:
        """Take a step; returns the loss and the weights after it."""
        with active(self.backend), _Watch(self.trainer, keep=False):
            asarray, to_numpy = self.backend.asarray, self.backend.to_numpy
            loss = self.trainer.train_step(asarray(x), asarray(t))
            weights = [p.value for _, p in self.trainer.model.parameters()]
            return [to_numpy(a).copy() for a in (loss, *weights)]

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Copies of the arrays of model and optimizer, on the host."""
        with active(self.backend):
            model, optimizer = self.trainer.model.state(), self.trainer.optimizer.state()
            to_numpy = self.backend.to_numpy
            step = {"step": optimizer.pop("step")}
            return (
                {name: to_numpy(a).copy() for name, a in model.items()},
                step | {name: to_numpy(a).copy() for name, a in optimizer.items()},
            )

    def restore(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Go on from another side's state."""
        with active(self.backend):
            self.trainer.model.load_state(state[0])
            self.trainer.optimizer.load_state(state[1])


def converted(model: Layer, dtype: Any) -> Layer:
    """A copy of a model on the host, in this dtype."""
    new = copy.deepcopy(model).to("numpy")
    for layer in new.layers():
        for name, value in vars(layer).items():
            if isinstance(value, np.dtype) and value.kind == "f":
                setattr(layer, name, np.dtype(dtype))
        for name in layer.buffer_names:
            buffer = getattr(layer, name)
            if buffer.dtype.kind == "f":
                setattr(layer, name, buffer.astype(dtype))
    for _, p in new.parameters():
        p.value, p.grad = p.value.astype(dtype), np.zeros(p.value.shape, dtype)
    return new


def batches_of(
    x: np.ndarray, t: np.ndarray, batch_size: int, steps: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The batches of the first steps of `fit`."""
    batches: list[tuple[np.ndarray, np.ndarray]] = []
    for epoch in itertools.count():
        order = generator(seed, SHUFFLE, step=epoch).permutation(len(x))
        for start in range(0, len(x), batch_size):
            if len(batches) == steps:
                return batches
            rows = order[start : start + batch_size]
            batches.append((x[rows], t[rows]))
    raise AssertionError  # count never ends


def growth(
    here: Side, others: Sequence[Side], batches: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """How far runs are apart after each step: `(len(others), steps, 1 + number of weights)`.

    First the loss, relative to itself, then each array of weights, relative to its largest element.
    """
    errors = []
    for batch in batches:
        arrays = here.go(*batch)
        pairs = (zip(arrays, other.go(*batch), strict=True) for other in others)
        errors.append([[gap_of(*pair).error for pair in each] for each in pairs])
    return np.array(errors).swapaxes(0, 1)
