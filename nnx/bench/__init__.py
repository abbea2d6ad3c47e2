"""What `nnx bench` measures, and how: steps, operations, products and predictions, where you are.

A row holds variants of one piece of work. They take turns, a block of calls each, A B A B, so that
whatever else the machine does meets all of them. A block ends when the device is done. Reported
is the median over blocks; its spread is the median absolute deviation. A ratio is the median of
the ratios within each turn.

A device is also timed by its own clock: a burst of calls, put into the queue behind copies that
keep the device busy until all of the burst is there. Host time is what the putting takes, device
time what the doing takes. The longer one bounds the step.

Nothing here knows what is right or wrong about a time. `NNX_BENCH_SMOKE=1` shrinks every size.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from nnx.backends import Array, Backend
from nnx.backends.arena import Arena
from nnx.backends.base import Update
from nnx.layers import LayerNorm
from nnx.losses import Loss, MeanSquaredError, SoftmaxNLL
from nnx.models import mlp
from nnx.optimizers import SGD, Adam, Optimizer
from nnx.parameter import ParameterVector
from nnx.trainer import Trainer

SECTIONS = {
    "steps": "training steps, beside their matrix products alone",
    "kernels": "operations; rates count each distinct byte read and each byte written once",
    "products": "matrix products",
    "predict": "predictions from host arrays, beside their matrix products alone",
}
"""What can be measured, with a heading for each."""

ROUNDS = 20  # turns that a row's time is meant for
BURST = 16  # calls: what they launch must fit the device's queue


# ---- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A sample of measurements: median, median absolute deviation, quartiles, extremes, size."""

    median: float
    mad: float
    q1: float
    q3: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least one value."""
        low, q1, median, q3, high = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
        mad = float(np.median(np.abs(np.asarray(values) - median)))
        return cls(median, mad, q1, q3, low, high, len(values))

    @property
    def spread(self) -> float:
        """The deviation as a share of the median."""
        return self.mad / self.median if self.median else 0.0


@dataclass(frozen=True)
class Reading:
    """What was measured of a variant; times in seconds of a call.

    Attributes:
        name: The variant's.
        calls: Calls of a block.
        time: Wall time.
        host: Time to enqueue a call, on a device.
        device: Time to do what was enqueued, on a device.
        rate: Amount of `unit` in a second; of bytes and FLOPs by the device's clock, if it has one.
        unit: "samples", "bytes" or "FLOP".
        ratio: Wall time over that of the row's baseline.
        device_ratio: Device time likewise.
    """

    name: str
    calls: int
    time: Summary
    host: Summary | None
    device: Summary | None
    rate: float
    unit: str
    ratio: Summary | None
    device_ratio: Summary | None

    @property
    def bound(self) -> str | None:
        """Which of "host" and "device" takes longer for a call; None where they are one."""
        if self.host is None or self.device is None:
            return None
        return "host" if self.host.median > self.device.median else "device"


@dataclass(frozen=True)
class Row:
    """A case and its readings, or what kept it from being measured.

    Attributes:
        failed: Whether the problem is something else than too little memory.
    """

    section: str
    name: str
    baseline: str | None
    readings: tuple[Reading, ...] = ()
    problem: str | None = None
    failed: bool = False
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        readings = [asdict(r) | {"bound": r.bound} for r in self.readings]
        return asdict(self) | {"readings": readings, "warnings": list(self.warnings)}


# ---- what to measure -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to do a row's work, in this process.

    Attributes:
        call: Does it once.
        amount: How much of `unit` that is.
        enqueues: Whether a call may return before the device is done.
    """

    name: str
    call: Callable[[], object]
    amount: int
    unit: str
    enqueues: bool = True


@dataclass(frozen=True)
class Place:
    """Where and in what to measure; makes the arrays for it.

    Attributes:
        smoke: Whether to shrink every size until a run proves that it works, and nothing else.
    """

    backend: Backend
    dtype: Any
    smoke: bool = False

    def size(self, n: int) -> int:
        """`n`, or less."""
        return min(n, 16) if self.smoke else n

    def random(self, *shape: int) -> Array:
        """N(0, 1), the same numbers again after a million."""
        n = math.prod(shape)
        block = np.random.default_rng(0).standard_normal(min(n, 2**20), dtype=self.dtype.type)
        return self.backend.asarray(np.resize(block, shape))

    def labels(self, n: int, n_classes: int) -> Array:
        """Any classes."""
        return self.backend.asarray(np.random.default_rng(1).integers(0, n_classes, n))

    def empty(self, *shape: int) -> Array:
        """An array that stays."""
        return self.backend.xp.empty(shape, self.dtype)

    def operation(self, call: Callable[[], object], *moved: Array) -> list[Variant]:
        """An operation that takes its memory from an arena, as in a step, and moves these bytes."""
        arena = Arena(self.backend.xp, self.backend.device)

        def run() -> None:
            with arena.step("bench"):
                call()

        return [Variant("nnx", run, sum(int(a.nbytes) for a in moved), "bytes")]

    def products(
        self, triples: Sequence[tuple[Array, Array, Array]], name: str = "products"
    ) -> Variant:
        """Matrix products `(a, b, out)` and nothing else."""
        gemm = self.backend.gemm

        def run() -> None:
            for a, b, out in triples:
                gemm(a, b, out)

        return Variant(name, run, sum(2 * a.shape[1] * out.size for a, _, out in triples), "FLOP")


@dataclass(frozen=True)
class Case:
    """A row to be: `prepare` makes the arrays and says what can be done with them."""

    section: str
    name: str
    prepare: Callable[[Place], list[Variant]]
    baseline: str | None = None


# The learning rates are next to nothing: a network that learns its one batch by heart ends up with
# gradients of 0 and moments below the smallest normal number, which a CPU is slow with.
_OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "SGD": lambda: SGD(1e-6),
    "Adam": lambda: Adam(1e-6),
}
_WIDE = (784, 512, 512, 10)


def cases(sections: Sequence[str] = tuple(SECTIONS)) -> list[Case]:
    """The rows of these sections, in order."""
    steps = [
        ((2, 3, 1), 4, "Adam"),
        ((20, 32, 10), 32, "Adam"),
        ((784, 50, 10), 100, "Adam"),
        *((_WIDE, batch, name) for batch in (128, 1024) for name in _OPTIMIZERS),
        ((784, 2048, 2048, 10), 1024, "Adam"),
    ]
    operations: dict[str, Callable[[Place], list[Variant]]] = {
        "copy 64 MiB": functools.partial(_copy, 2**26),
        **{
            f"softmax-NLL {n} x {c}": functools.partial(_softmax_nll, n, c)
            for n, c in ((512, 32768), (4096, 1000))
        },
        "Adam, 670k parameters": _adam,
        "bias+ReLU 16384 x 1024": functools.partial(_bias_relu, 16384, 1024),
        "bias+ReLU backward, same": functools.partial(_bias_relu_backward, 16384, 1024),
        "dropout 16384 x 1024": functools.partial(_dropout, 16384, 1024),
        "dropout backward, same": functools.partial(_dropout_backward, 16384, 1024),
        "LayerNorm 16384 x 1024": functools.partial(_layer_norm, 16384, 1024),
        "LayerNorm backward, same": functools.partial(_layer_norm_backward, 16384, 1024),
        "gather 16384 of 60000 x 784": functools.partial(_gather, 16384, 60000, 784),
    }
    found = [
        *(
            Case(
                "steps",
                f"{_named(sizes)} batch {batch}, {name}",
                functools.partial(_step, sizes, batch, name),
                "products",
            )
            for sizes, batch, name in steps
        ),
        *(Case("kernels", name, prepare) for name, prepare in operations.items()),
        *(
            Case("products", f"{n} to {n}, batch {batch}", functools.partial(_linear, n, batch))
            for n, batch in ((512, 128), (512, 1024), (2048, 1024))
        ),
        *(
            Case(
                "predict",
                f"{_named(_WIDE)}, {n} sample{'s' * (n > 1)}",
                functools.partial(_predict, n),
                "products",
            )
            for n in (1, 4096)
        ),
    ]
    return [case for case in found if case.section in sections]


def _named(sizes: Sequence[int]) -> str:
    return "-".join(map(str, sizes))


def _trainer(
    place: Place, sizes: Sequence[int], optimizer: str = "Adam", *, graph: bool = False
) -> Trainer:
    """A network of one output is for AND as the texts have it: tanh and squared error."""
    gate = sizes[-1] == 1
    model = mlp(sizes, activation="tanh" if gate else "relu", dtype=place.dtype)
    loss: Loss = MeanSquaredError() if gate else SoftmaxNLL()
    made = _OPTIMIZERS[optimizer]()
    return Trainer(model, loss, made, backend=place.backend, graph=graph)


def network_products(
    place: Place, sizes: Sequence[int], batch: int, *, backward: bool = True
) -> list[tuple[Array, Array, Array]]:
    """`(a, b, out)` of each product of a network of affine layers, in a step or forward only."""
    products = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        h, dz, weight = place.random(batch, n), place.random(batch, m), place.random(n, m)
        products.append((h, weight, place.empty(batch, m)))
        if backward:
            products.append((h.T, dz, place.empty(n, m)))
        if backward and i:  # nobody asks for the gradient of the input
            products.append((dz, weight.T, place.empty(batch, n)))
    return products


def _step(sizes: Sequence[int], batch: int, optimizer: str, place: Place) -> list[Variant]:
    """`Trainer.train_step` on one batch that stays on the device, eager and as a graph."""
    sizes, batch = [*map(place.size, sizes[:-1]), sizes[-1]], place.size(batch)
    x = place.random(batch, sizes[0])
    t = place.random(batch, 1) if sizes[-1] == 1 else place.labels(batch, sizes[-1])
    products = network_products(place, sizes, batch)
    ways = {"nnx": False, "nnx graph": True} if place.backend.graphs else {"nnx": False}
    trainers = {name: _trainer(place, sizes, optimizer, graph=way) for name, way in ways.items()}
    return [
        *(
            Variant(name, functools.partial(trainer.train_step, x, t), batch, "samples")
            for name, trainer in trainers.items()
        ),
        place.products(products),
    ]


def _predict(n: int, place: Place) -> list[Variant]:
    """`Trainer.predict` as it is called: from the host and back, in batches of 512."""
    sizes, n = [*map(place.size, _WIDE[:-1]), _WIDE[-1]], place.size(n)
    x = place.random(n, sizes[0])
    host = place.backend.to_numpy(x)
    trainer = _trainer(place, sizes)
    products = network_products(place, sizes, n, backward=False)
    return [
        Variant("nnx", lambda: trainer.predict(host), n, "samples", enqueues=False),
        place.products(products),
    ]


def _linear(width: int, batch: int, place: Place) -> list[Variant]:
    """The three products of an affine layer, transposes by strides."""
    m, n = place.size(width), place.size(batch)
    x, dy, weight = place.random(n, m), place.random(n, m), place.random(m, m)
    return [
        place.products([(x, weight, place.empty(n, m))], "forward"),
        place.products([(x.T, dy, place.empty(m, m))], "dweight"),
        place.products([(dy, weight.T, place.empty(n, m))], "dx"),
    ]


def _copy(nbytes: int, place: Place) -> list[Variant]:
    """What the memory can do."""
    a = place.random(place.size(nbytes // place.dtype.itemsize))
    b = place.empty(*a.shape)
    return place.operation(lambda: place.backend.xp.copyto(b, a), a, b)


def _softmax_nll(n: int, n_classes: int, place: Place) -> list[Variant]:
    n, n_classes = place.size(n), place.size(n_classes)
    logits, labels = place.random(n, n_classes), place.labels(n, n_classes)
    backend = place.backend
    return place.operation(lambda: backend.softmax_nll(logits, labels), logits, logits, labels)


def _adam(place: Place) -> list[Variant]:
    sizes = [*map(place.size, _WIDE)]
    model = mlp(sizes, dtype=place.dtype).to(place.backend)
    vector = ParameterVector([p for _, p in model.parameters()])
    vector.grad.fill(1e-3)
    update, slots = adam_update(place, vector)
    return place.operation(update, vector.grad, *2 * (vector.value, *slots), vector.groups.ids)


def adam_update(
    place: Place, vector: ParameterVector, lr: float = 1e-6
) -> tuple[Callable[[], None], tuple[Array, Array]]:
    """Adam's operation on a vector, and its slots."""
    optimizer = Adam(lr)
    optimizer.bind(vector)
    slots = optimizer.slot("m"), optimizer.slot("v")

    def update() -> None:
        state = optimizer.begin_step()  # plans the next thousand steps where need be
        step = Update(vector.value, vector.grad, (*slots, None), vector.groups, state)
        place.backend.adam(step, beta1=0.9, beta2=0.999, eps=1e-8)

    return update, slots


def _bias_relu(n: int, width: int, place: Place) -> list[Variant]:
    z, backend = place.random(place.size(n), place.size(width)), place.backend
    bias = place.random(z.shape[1]) * 1e-3  # it is added to the same z again and again
    y, mask = backend.bias_relu(z, bias)
    masks = () if mask is y else (mask,)
    return place.operation(lambda: backend.bias_relu(z, bias), z, z, bias, *masks)


def _bias_relu_backward(n: int, width: int, place: Place) -> list[Variant]:
    dy, backend = place.random(place.size(n), place.size(width)), place.backend
    dbias = place.empty(dy.shape[1])
    _, mask = backend.bias_relu(place.random(*dy.shape), backend.xp.zeros_like(dbias))
    return place.operation(lambda: backend.bias_relu_backward(dy, mask, dbias), dy, mask, dy, dbias)


def _dropout(n: int, width: int, place: Place) -> list[Variant]:
    x, backend = place.random(place.size(n), place.size(width)), place.backend
    state = backend.step_state()
    draw = functools.partial(backend.dropout, x, 0.5, seed=0, stream=0, use=0, state=state)
    return place.operation(draw, x, *draw())


def _dropout_backward(n: int, width: int, place: Place) -> list[Variant]:
    dy, backend = place.random(place.size(n), place.size(width)), place.backend
    _, mask = backend.dropout(dy, 0.5, seed=0, stream=0, use=0, state=backend.step_state())
    return place.operation(lambda: backend.dropout_backward(dy, mask, 0.5), dy, mask, dy)


def _layer_norm(n: int, width: int, place: Place) -> list[Variant]:
    x = place.random(place.size(n), place.size(width))
    layer = LayerNorm(x.shape[1], dtype=place.dtype).to(place.backend)
    weights = [p.value for _, p in layer.parameters()]
    return place.operation(lambda: layer.forward(x), x, x, *weights)


def _layer_norm_backward(n: int, width: int, place: Place) -> list[Variant]:
    x = place.random(place.size(n), place.size(width))
    dy = place.backend.asarray(x[::-1])
    layer = LayerNorm(x.shape[1], dtype=place.dtype).to(place.backend)
    vector = ParameterVector([p for _, p in layer.parameters()])
    _, saved = layer.forward(x)

    def backward() -> None:
        vector.begin_step()
        layer.backward(dy, saved)

    weights = [a for _, p in layer.parameters() for a in (p.value, p.grad)]
    return place.operation(backward, x, dy, dy, *weights)


def _gather(n: int, n_samples: int, width: int, place: Place) -> list[Variant]:
    n, n_samples, width = place.size(n), place.size(n_samples), place.size(width)
    sources = [place.random(n_samples, width), place.labels(n_samples, 10)]
    state = place.backend.step_state()
    order = np.random.default_rng(0).permutation(n_samples)
    state.plan(np.zeros(1), dtype=place.dtype, order=order)
    batch = place.backend.gather_rows(sources, state, n, n)
    return place.operation(
        lambda: place.backend.gather_rows(sources, state, n, n), *2 * batch, state.order[:n]
    )


# ---- measuring -----------------------------------------------------------------------------------


def measure(case: Case, place: Place, seconds: float = 1.0, *, strict: bool = False) -> Row:
    """Measure a case for about this long, at least a call of each variant.

    What goes wrong stands in the row, so that the others can go on.

    Args:
        case: What to measure.
        place: Where.
        seconds: For all variants together, beside their preparation.
        strict: Whether what isn't a lack of memory is raised instead.
    """
    row = functools.partial(Row, case.section, case.name, case.baseline)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with place.backend.activate():
                meter = _Meter(place, seconds)
                readings = meter.compare(case.prepare(place), case.baseline)
        except Exception as error:
            said = place.backend.out_of_memory(error)
            if said is not None:
                said = f"out of device memory: {said}"
            elif isinstance(error, MemoryError):  # the host's, or one that nnx has explained
                said = str(error) or "out of memory"
            elif strict:
                raise
            else:
                return row(problem=_one_line(error), failed=True, warnings=_texts(caught))
            return row(problem=said, warnings=_texts(caught))
    return row(tuple(readings), warnings=_texts(caught))


def _one_line(error: Exception) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _texts(caught: Sequence[warnings.WarningMessage]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught))


class _Meter:
    """The clocks."""

    def __init__(self, place: Place, seconds: float) -> None:
        self.backend, self.seconds = place.backend, seconds
        self._cuda: Any = getattr(place.backend.xp, "cuda", None)
        if self._cuda is not None:
            free, _ = self._cuda.runtime.memGetInfo()
            self._busy = place.backend.xp.zeros(place.size(min(2**26, free // 16)), np.uint8)
            self._more = self._busy.copy()
            self._keep_busy(1)
            self._copying = self._burst(self._keep_busy, 10)[1]

    def compare(self, variants: Sequence[Variant], baseline: str | None) -> list[Reading]:
        """Let them take turns until the time is over."""
        one = [self._warm_up(variant) for variant in variants]
        share = self.seconds / ROUNDS / len(variants)
        calls = [max(int(share / t), 1) for t in one]
        times: list[list[float]] = [[] for _ in variants]
        clocks: list[list[tuple[float, float]]] = [[] for _ in variants]
        end, least = time.perf_counter() + self.seconds, 3 if self.seconds else 1
        while len(times[0]) < least or time.perf_counter() < end:
            for i, variant in enumerate(variants):
                times[i].append(self._block(variant.call, calls[i]))
                if self._cuda is not None and variant.enqueues:
                    burst = min(max(int(share / one[i]), 1), BURST)
                    clocks[i].append(self._burst(variant.call, burst, times[i][-1]))
        names = [variant.name for variant in variants]
        base = names.index(baseline) if baseline is not None else None
        return [
            _reading(variant, calls[i], times[i], clocks[i], *_ratios(i, base, times, clocks))
            for i, variant in enumerate(variants)
        ]

    def _warm_up(self, variant: Variant) -> float:
        """Seconds of a call once everything is compiled, allocated, captured and awake."""
        for _ in range(3):
            variant.call()
        n, taken = 1, self._block(variant.call, 1)
        while n * taken < self.seconds / ROUNDS and n < 2**20:
            n *= 2
            taken = self._block(variant.call, n)
        return max(taken, 1e-9)

    def _block(self, call: Callable[[], object], n: int) -> float:
        """Seconds of each of `n` calls, to the end of the last."""
        self.backend.synchronize()
        begun = time.perf_counter()
        for _ in range(n):
            call()
        self.backend.synchronize()
        return (time.perf_counter() - begun) / n

    def _burst(
        self, call: Callable[[], object], n: int, expected: float = 0.0
    ) -> tuple[float, float]:
        """`(host, device)` seconds of each of `n` calls that the device finds in its queue."""
        event = self._cuda.Event
        start, stop = event(), event()
        self.backend.synchronize()
        if expected:
            self._keep_busy(min(math.ceil(1.5 * expected * n / self._copying), 256))
        start.record()
        begun = time.perf_counter()
        for _ in range(n):
            call()
        host = time.perf_counter() - begun
        stop.record()
        self.backend.synchronize()
        return host / n, self._cuda.get_elapsed_time(start, stop) / 1e3 / n

    def _keep_busy(self, copies: int = 1) -> None:
        for _ in range(copies):
            self.backend.xp.copyto(self._more, self._busy)


def _ratios(
    i: int,
    base: int | None,
    times: Sequence[Sequence[float]],
    clocks: Sequence[Sequence[tuple[float, float]]],
) -> tuple[Summary | None, Summary | None]:
    """Of wall time and of device time to those of the baseline, turn by turn."""
    if base is None or i == base:
        return None, None
    wall = Summary.of([a / b for a, b in zip(times[i], times[base], strict=True)])
    if not (clocks[i] and clocks[base]):
        return wall, None
    pairs = zip(clocks[i], clocks[base], strict=True)
    return wall, Summary.of([a / max(b, 1e-12) for (_, a), (_, b) in pairs])


def _reading(
    variant: Variant,
    calls: int,
    times: Sequence[float],
    clocks: Sequence[tuple[float, float]],
    ratio: Summary | None,
    device_ratio: Summary | None,
) -> Reading:
    wall, host, device = Summary.of(times), None, None
    if clocks:
        host, device = (Summary.of(values) for values in zip(*clocks, strict=True))
    clock = wall if device is None or variant.unit == "samples" else device
    rate = variant.amount / max(clock.median, 1e-12)
    return Reading(variant.name, calls, wall, host, device, rate, variant.unit, ratio, device_ratio)


# ---- where ---------------------------------------------------------------------------------------


def describe(backend: Backend) -> dict[str, Any]:
    """Processor, load, and the device with its driver: without them a time means nothing."""
    found: dict[str, Any] = {"cpu": _cpu()}
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    cuda = getattr(backend.xp, "cuda", None)
    if cuda is None:
        return found
    from nnx.backends.cublas import tf32

    runtime = cuda.runtime
    with backend.activate():
        device = runtime.getDevice()
        properties = runtime.getDeviceProperties(device)
        free, total = runtime.memGetInfo()
    return found | {
        "device": {
            "model": properties["name"].decode(),
            "compute_capability": f"{properties['major']}.{properties['minor']}",
            "multiprocessors": properties["multiProcessorCount"],
            "memory": total,
            "free_memory": free,
            "driver": _driver(),
            "driver_cuda": _cuda_version(runtime.driverGetVersion()),
            "runtime_cuda": _cuda_version(runtime.runtimeGetVersion()),
            "tf32": tf32(),
        }
    }


def _cpu() -> str:
    """The processor's model."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _driver() -> str | None:
    """The version of NVIDIA's kernel module, where it says."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text("utf-8", "replace").split()
    except OSError:
        return None
    return next((w for w in words if w.replace(".", "").isdecimal() and "." in w), None)


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# ---- as text -------------------------------------------------------------------------------------

NOTES = """\
time   wall time of a call, median over blocks of calls; +- is the median absolute deviation
ratio  of the time to that of the matrix products alone, turn by turn"""
DEVICE_NOTES = """\
host, device  what enqueuing a call takes, and doing it (by the device's clock; so are rates of
       bytes and FLOPs); the longer one bounds the call; dev.ratio is the ratio of device times"""

# Heading and width of each column behind the row's name, and whether it is a device's only.
_COLUMNS = (
    *(("", -9, False), ("time", 8, False), ("+-", 4, False)),
    *(("host", 8, True), ("device", 8, True), ("bound", 6, True)),
    *(("rate", 15, False), ("ratio", 6, False), ("dev.ratio", 9, True)),
)


def heading(settings: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    """What is measured and where, a line for each fact."""
    cpus, blas, device = machine["cpus"], machine["blas"], machine.get("device")
    versions = [f"{name} {version}" for name, version in machine["versions"].items() if version]
    yield f"versions  {', '.join(versions)}"
    load = f", load {machine['load']}" if "load" in machine else ""
    if machine.get("load", 0) >= cpus["usable"]:
        load += ": others are at work, so times are rough"
    yield f"CPU       {machine['cpu']}, {cpus['usable']} usable of {cpus['all']}{load}"
    threads = f"threads: {blas['threads']} (by {blas['threads_by']})"
    yield f"BLAS      {blas['name']} {blas['version']}, {threads}"
    if device is not None:
        kind = f"{device['model']}, compute capability {device['compute_capability']}"
        free, total = device["free_memory"] / 2**30, device["memory"] / 2**30
        cores = f"{device['multiprocessors']} multiprocessors"
        yield f"device    {kind}, {cores}, {free:.1f} of {total:.1f} GiB free"
        driver = f"driver {device['driver'] or 'unknown'} for {device['driver_cuda']}"
        tf32 = "on" if device["tf32"] else "off"
        yield f"CUDA      {device['runtime_cuda']}, {driver}, TF32 {tf32}"
    smoke = "; NNX_BENCH_SMOKE=1: sizes are shrunk, figures mean nothing" * settings["smoke"]
    what = f"{settings['dtype']} on {settings['backend']}, {settings['seconds']:g} s a row"
    yield f"measured  {what}{smoke}"


class Table:
    """Rows as lines of text, one for each variant, in columns known before the first."""

    def __init__(self, cases: Sequence[Case], *, device: bool) -> None:
        self._width = max((len(case.name) for case in cases), default=0)
        self._device = device
        self._section: str | None = None

    def lines(self, row: Row) -> Iterator[str]:
        """The row's lines, with a heading where a section begins."""
        if row.section != self._section:
            self._section = row.section
            yield from ("", SECTIONS[row.section], self._line("", [c[0] for c in _COLUMNS]))
        name = row.name
        if row.problem is not None:
            yield f"{name:{self._width}}  {row.problem}"
        for r in row.readings:
            times = _time(r.time), f"{r.time.spread:.0%}", _time(r.host), _time(r.device)
            rates = _rate(r.rate, r.unit), _ratio(r.ratio), _ratio(r.device_ratio)
            yield self._line(name, [r.name, *times, r.bound or "", *rates])
            name = ""

    def _line(self, name: str, cells: Sequence[str]) -> str:
        texts = [name.ljust(self._width)]
        for cell, (_, width, of_device) in zip(cells, _COLUMNS, strict=True):
            if self._device or not of_device:
                texts.append(cell.rjust(width) if width > 0 else cell.ljust(-width))
        return "  ".join(texts).rstrip()


def _digits(x: float) -> str:
    """Three digits."""
    x = float(f"{x:.3g}")
    return f"{x:.{max(2 - math.floor(math.log10(x)), 0)}f}" if x > 0 else "0"


def _time(summary: Summary | None) -> str:
    if summary is None:
        return ""
    factor, unit = next(
        ((f, u) for f, u in ((1e6, "us"), (1e3, "ms")) if summary.median * f < 999.5), (1, "s")
    )
    return f"{_digits(summary.median * factor)} {unit}"


def _rate(rate: float, unit: str) -> str:
    if unit != "samples":
        return f"{_digits(rate / 1e9)} {'GB/s' if unit == 'bytes' else 'GFLOP/s'}"
    factor, prefix = next(
        ((f, p) for f, p in ((1, ""), (1e3, "k")) if rate / f < 999.5), (1e6, "M")
    )
    return f"{_digits(rate / factor)}{prefix} samples/s"


def _ratio(summary: Summary | None) -> str:
    return "" if summary is None else f"{summary.median:.2f}"
