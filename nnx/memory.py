"""How much memory training takes, told before it does: `Memory`, and how it is counted.

Nothing here knows what a layer, a loss or an optimizer asks for. The real ones run, on a copy, on a
few samples and on a few more, and each array they ask for grows with the samples as it did there.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnx.backends import Array, Backend, backend_of
from nnx.backends.arena import _ALIGNMENT, Arena
from nnx.backends.base import XpBackend, readable
from nnx.layers import Layer, Sequential, Step
from nnx.metrics import Metric
from nnx.parameter import Parameter, ParameterVector

if TYPE_CHECKING:
    from nnx.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that training takes at its peak, where the model is; printed as a table.

    Attributes:
        parameters: Their values, and the model's buffers.
        gradients: One of each value.
        optimizer: The state that it keeps.
        data: What is there of the data all the time: copies, and the order of the samples.
        step: A step, with all that forward saves, or an evaluation beside the memory of steps.
    """

    parameters: int
    gradients: int
    optimizer: int
    data: int
    step: int

    @property
    def total(self) -> int:
        """The predicted peak: all parts together."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        rows = [*dataclasses.asdict(self).items(), ("total", self.total)]
        return "\n".join(f"{name:10}  {readable(n):>11}" for name, n in rows)


class _Gauge(Arena):
    """An arena that notes each request, and the peak of what is allocated beside it in between."""

    def __init__(self, backend: Backend, read: Callable[[], tuple[int, int]]) -> None:
        super().__init__(backend.xp, backend.device)
        self.requests: list[float] = []
        self.beside: list[float] = []
        self._read = read
        self._held = read()[0]

    def note(self) -> int:
        """Note the peak since the last time; returns what is allocated now."""
        now, peak = self._read()
        self.beside.append(peak - self._held)
        return now

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        before = self.note()
        array = super().empty(shape, dtype)
        self.requests.append(array.nbytes)
        self._held += self._read()[0] - before
        return array


def few(parameters: Sequence[Parameter], sample: tuple[int, ...]) -> int:
    """Samples to extrapolate from: as many as make 512 KiB of the widest array.

    From 256 KiB on NumPy reuses the temporaries of an expression.
    """
    widths = [4 * math.prod(sample)]
    for p in parameters:
        widths.append(p.value.nbytes // (p.value.shape[-2] if p.value.ndim > 1 else 1))
    return max(2**19 // max(widths), 16)


def measured(
    backend: Backend,
    prepare: Callable[[int], Callable[[], Any]],
    n: int,
    few: int,
    *,
    step: bool = True,
) -> tuple[int, int]:
    """Bytes of the arena, and at most beside it, when the work of `prepare(n)` runs.

    Args:
        backend: Where it runs.
        prepare: From a number of samples to the work on them.
        n: The number to answer for.
        few: How many to run on, and twice as many, if those are fewer.
        step: Whether the work takes its memory from an arena.
    """

    def run(n: int) -> tuple[np.ndarray, np.ndarray]:
        work = prepare(n)
        with backend.watch_memory() as read:
            gauge = _Gauge(backend, read)
            with gauge.step(n) if step else contextlib.nullcontext():
                work()
                gauge.note()
        return np.array(gauge.requests), np.array(gauge.beside)

    with np.errstate(all="ignore"):  # samples of zeros
        prepare(min(few, n))()  # what is made once isn't part of it
        small = few
        while 2 * small < n:
            less, more = run(small), run(2 * small)
            if [a.shape for a in less] == [a.shape for a in more]:
                break
            small *= 2  # few samples may be dealt with in another way
        else:
            small = n
            less = more = run(n)
    large = min(2 * small, n)
    further = (n - large) / max(large - small, 1)
    requests, beside = (b + (b - a) * further for a, b in zip(less, more, strict=True))
    slab = np.ceil(requests / _ALIGNMENT).sum() * _ALIGNMENT
    return int(slab), int(beside.max())


def input_shape(model: Layer, who: str) -> tuple[int, ...]:
    """Shape of a sample, by the first layer that tells a width."""
    for layer in model.layers():
        for name in ("n_in", "n_features"):
            if hasattr(layer, name):
                return (getattr(layer, name),)
    raise ValueError(f"{who}: no layer tells the width of the input; say the shape of a sample")


def rehearsal(model: Layer) -> tuple[Layer, list[Parameter]]:
    """A copy of a model around the same values, and its parameters; one place for all gradients."""
    values = [p.value for _, p in model.parameters()]
    largest = max(values, key=lambda a: int(a.size), default=np.empty(0))
    place = backend_of(largest).xp.empty_like(largest).reshape(-1)
    twins = [Parameter(place[:0]) for _ in values]
    for twin, value in zip(twins, values, strict=True):
        twin.value, twin.grad = value, place[: value.size].reshape(value.shape)
    known = {id(p): twin for (_, p), twin in zip(model.parameters(), twins, strict=True)}
    return copy.deepcopy(model, known), twins


def of_training(
    trainer: Trainer,
    given: Sequence[Any],
    metrics: Sequence[Metric],
    *,
    batch_size: int,
    n_samples: int,
    n_validation: int,
) -> Memory:
    """What `Trainer.memory` says, from a few samples, their targets, and weights if there are."""
    backend, vector, optimizer = trainer.backend, trainer.vector, trainer.optimizer
    twin = copy.copy(trainer)
    twin.graph = False
    twin.model, parameters = rehearsal(trainer.model)
    rows, columns = vector.value.shape  # an optimizer's workspace ends at this many:
    part = backend.xp.zeros((rows, min(columns, XpBackend.piece // rows)), vector.value.dtype)
    only = Parameter(part if vector.n_models else part[0])
    twin.vector = ParameterVector([only], vector.n_models)
    only.vector = None  # no cycle: all of it goes when this is over
    twin.optimizer = optimizer.rehearsal(twin.vector)
    twin._step = Step(trainer.seed, twin.optimizer.steps, list(twin.model.layers()))
    data = twin._data("memory", *given)
    nbytes = sum(
        here.nbytes // data.n
        for here, a in zip(data.arrays or data.host, given, strict=True)
        if backend.device is not None
        or not (isinstance(a, np.ndarray) and np.may_share_memory(here, a))
    )

    def sized(n: int) -> Any:
        return twin._data("memory", *(np.resize(a, (n, *a.shape[1:])) for a in data.host))

    def step(n: int) -> Callable[[], Any]:
        batch, totals = sized(n), twin._start(metrics, captures=False)
        for p in parameters:
            p.fresh = True
        twin.optimizer.plan(1, np.arange(n))
        sent = list(map(backend.asarray, batch.host))
        if not n_samples:
            return functools.partial(twin._train, sent)
        resident = backend.fits(n_samples * nbytes)
        return functools.partial(twin._fit_step, batch, None if resident else sent, n, n, totals)

    def evaluation(n: int) -> Callable[[], Any]:
        several = 1 + (n_validation > size)  # a batch's output is there until the next has its own
        return functools.partial(twin._evaluate, sized(n * several), n, metrics)

    some, kept = few(parameters, data.shape), 8 * n_samples
    size = min(max(batch_size, 512), n_validation)
    for n, at_once in ((n_samples, batch_size), (n_validation, size)):  # all, or two batches
        kept += nbytes * (n if backend.fits(n * nbytes) else 2 * at_once)
    slab, beside = measured(backend, step, min(batch_size, n_samples or batch_size), some)
    if n_validation:
        beside = max(beside, measured(backend, evaluation, size, some, step=False)[1])
    if backend.device is None:  # from one epoch to the next: the order of both, and one sorted
        beside = max(beside, 16 * n_samples)
    value, slots = vector.value.nbytes, sum(name is not None for name in optimizer._names())
    return Memory(
        parameters=value + sum(a.nbytes for _, a in trainer.model.buffers()),
        gradients=value,
        optimizer=value * slots + vector.groups.ids.nbytes,
        data=kept,
        step=slab + beside,
    )


def summary(model: Layer, batch_size: int | None, sample: tuple[int, ...] | None) -> str:
    """What `Layer.summary` says."""
    leaves = list(model._leaves()) or [("", repr(model), model)]
    counts = [leaf.n_parameters for *_, leaf in leaves] + [model.n_parameters]
    itemsize = next((p.value.itemsize for _, p in model.parameters()), 4)
    values = counts[-1] * itemsize
    titles = [*((name, text) for name, text, _ in leaves), ("", "parameters")]
    columns = [[f"{n:,}" for n in counts], [readable(n * itemsize) for n in counts]]
    if batch_size is not None:
        shapes, step = _passes(model, batch_size, sample or input_shape(model, "summary"))
        columns.append([readable(math.prod(a) * itemsize) if a else "" for a in shapes] + [""])
        columns.insert(0, [str(a) if a else "" for a in shapes] + [""])
        totals = {"gradients": values, "forward and backward": step, "together": 2 * values + step}
        titles = [("", "layer"), *titles, *(("", title) for title in totals)]
        heads = ["output", "parameters", "", "activations"]
        for column, head, nbytes in zip(columns, heads, (None, None, 1, None), strict=True):
            below = [readable(n) if nbytes else "" for n in totals.values()]
            column[:] = [head, *column, *below]
    names, layers = zip(*titles, strict=True)
    wide = [max(map(len, column)) for column in (names, layers, *columns)]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i < 2 else '>'}{wide[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in zip(names, layers, *columns, strict=True)
    )


def _passes(
    model: Layer, batch_size: int, sample: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], int]:
    """Shape of each leaf's output, `()` where it isn't used, and bytes of both passes."""
    twin, parameters = rehearsal(model)
    value = parameters[0].value if parameters else np.empty(0, np.float32)
    backend, shapes = backend_of(value), list[dict[Layer, tuple[int, ...]]]()

    def passes(n: int) -> Callable[[], None]:
        x = backend.xp.zeros((n, *sample), value.dtype)
        step = Step(0, backend.step_state(), list(twin.layers()))
        for p in parameters:
            p.fresh = True

        def work() -> None:
            y, saved = twin.forward(x, step=step)
            dy = backend.empty(y.shape, y.dtype)
            dy.fill(0)
            twin.backward(dy, saved, need_dx=False)

        return work

    def noted(layer: Layer, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noting(x: Array, *, step: Step | None = None) -> tuple[Array, Any]:
            y, saved = forward(x, step=step)
            shapes[-1][layer] = y.shape
            return y, saved

        return noting

    with backend.activate():
        step = sum(measured(backend, passes, batch_size, few(parameters, sample)))
        leaves = [leaf for *_, leaf in twin._leaves()] or [twin]
        for layer in twin.layers():
            if isinstance(layer, Sequential):
                layer._units = list(layer.sequence)  # each on its own
            if layer in leaves:
                vars(layer)["forward"] = noted(layer, layer.forward)
        for n in (2, 3):
            shapes.append({})
            twin(backend.xp.zeros((n, *sample), value.dtype))
    ends = [[found.get(leaf, ()) for found in shapes] for leaf in leaves]
    return [
        tuple(a + (b - a) * (batch_size - 2) for a, b in zip(*both, strict=True)) for both in ends
    ], step
