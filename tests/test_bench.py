"""`nnx.bench`: what it measures and what it makes of the clocks. No test goes by a time."""

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import nnx
from nnx import bench
from nnx.backends import Backend, get_backend
from nnx.backends.numpy_backend import KernelBackend
from nnx.bench import Case, Place, Reading, Row, Summary, Table, Variant, cases, measure


def case(*variants: Variant, baseline: str | None = None) -> Case:
    """A row of these variants."""
    return Case("kernels", "a row", lambda place: list(variants), baseline)


def failing(error: BaseException) -> Case:
    """A row that can't be prepared."""

    def prepare(place: Place) -> list[Variant]:
        raise error

    return Case("kernels", "a row", prepare)


@pytest.fixture
def place(backend: Backend) -> Place:
    """Small sizes in float32, on each backend in turn."""
    return Place(backend, np.dtype(np.float32), smoke=True)


HOST = Place(get_backend("numpy"), np.dtype(np.float32), smoke=True)


class Clock:
    """`time.perf_counter` where only calls take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, *seconds: float) -> Callable[[], None]:
        """A call that takes these times in turn, the last one from then on."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes by calls alone."""
    clock = Clock()
    monkeypatch.setattr("nnx.bench.time.perf_counter", clock)
    return clock


# ---- every case ----------------------------------------------------------------------------------


@pytest.mark.parametrize("full", cases(), ids=lambda c: c.name)
def test_every_case_can_be_measured(full: Case, place: Place) -> None:
    row = measure(full, place, 0, strict=True)
    assert (row.problem, row.failed, row.warnings) == (None, False, ())
    assert (row.section, row.name) == (full.section, full.name)
    for reading in row.readings:
        assert reading.time.n == reading.calls == 1
        assert reading.rate > 0
        assert reading.device is None or place.backend.xp is not np
        compared = full.baseline not in (None, reading.name)
        assert (reading.ratio is not None) == compared
    assert full.baseline in [None, *(r.name for r in row.readings)]
    json.dumps(row.to_json(), allow_nan=False)


def test_every_case_can_be_measured_in_float64() -> None:
    double = Place(get_backend("numpy"), np.dtype(np.float64), smoke=True)
    for full in cases():
        assert measure(full, double, 0, strict=True).readings


def test_sections_can_be_chosen() -> None:
    assert {c.section for c in cases()} == set(bench.SECTIONS)
    assert {c.section for c in cases(["kernels", "predict"])} == {"kernels", "predict"}
    assert len({c.name for c in cases()}) == len(cases())


def test_a_step_is_that_of_a_trainer_and_its_products_are_those_of_its_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = next(c for c in cases(["steps"]) if c.name == "784-512-512-10 batch 128, Adam")
    asked: list[tuple[tuple[int, ...], ...]] = []
    gemm = HOST.backend.gemm

    def noted(a: Any, b: Any, out: Any, **options: Any) -> Any:
        asked.append((a.shape, b.shape))
        return gemm(a, b, out, **options)

    affine = HOST.backend.affine

    def noted_affine(a: Any, b: Any, *rest: Any, **options: Any) -> Any:
        before = len(asked)
        made = affine(a, b, *rest, **options)
        asked[before:] = [(a.shape, b.shape)]  # whether or not it was by way of gemm
        return made

    monkeypatch.setattr(HOST.backend, "gemm", noted)
    monkeypatch.setattr(HOST.backend, "affine", noted_affine)
    train, *_, products = step.prepare(HOST)
    train.call()
    in_step = sorted(asked)
    asked.clear()
    products.call()
    assert sorted(asked) == in_step
    assert len(asked) == 8
    assert products.amount == sum(2 * math.prod(a) * b[1] for a, b in asked)
    assert (train.amount, train.unit) == (16, "samples")


def test_sizes_are_those_of_the_name_unless_they_are_to_be_small() -> None:
    full = Place(HOST.backend, np.dtype(np.float64))
    (copy,) = next(c for c in cases() if c.name == "copy 64 MiB").prepare(full)
    assert (copy.amount, copy.unit) == (2 * 2**26, "bytes")
    (adam,) = next(c for c in cases() if c.name == "Adam, 670k parameters").prepare(full)
    n = nnx.mlp((784, 512, 512, 10)).n_parameters  # each starts on a block of 64
    np.testing.assert_allclose(n, 670_000, rtol=1e-3)
    np.testing.assert_allclose(adam.amount, 7 * 8 * n, rtol=5e-3)


def test_bytes_of_operations_count_what_is_read_and_what_is_written(place: Place) -> None:
    found = {c.name.split()[0]: c.prepare(place)[0].amount for c in cases(["kernels"])}
    size = 16 * 16 * 4
    assert found["softmax-NLL"] == 2 * size + 16 * 8
    assert found["gather"] == 2 * (size + 16 * 8) + 16 * 8
    mask = 16 * 16 if place.backend.xp is np else 16 * 16 // 8
    if isinstance(place.backend, KernelBackend):
        mask = 0  # it is the output
    plain = next(c for c in cases() if c.name == "bias+ReLU 16384 x 1024").prepare(place)[0]
    assert plain.amount == 2 * size + 16 * 4 + mask


@pytest.mark.gpu
def test_on_a_device_steps_run_eagerly_and_as_graphs_and_have_times_of_both_sides() -> None:
    small = Place(get_backend("cupy"), np.dtype(np.float32), smoke=True)
    row = measure(cases(["steps"])[0], small, 0, strict=True)
    assert [r.name for r in row.readings] == ["nnx", "nnx graph", "products"]
    for reading in row.readings:
        assert reading.host is not None
        assert reading.device is not None
        assert reading.bound in ("host", "device")
    assert all(r.ratio and r.device_ratio for r in row.readings[:2])
    graph = cases(["steps"])[0].prepare(small)[1]
    for _ in range(3):
        graph.call()
    (captured,) = graph.call.func.__self__._graphs._captured.values()  # type: ignore[attr-defined]
    assert captured is not None


# ---- the clocks ----------------------------------------------------------------------------------


def test_variants_take_turns_and_ratios_are_within_a_turn(clock: Clock) -> None:
    turns: list[str] = []

    def variant(name: str, *seconds: float) -> Variant:
        take = clock.call(*seconds)

        def run() -> None:
            turns.append(name)
            take()

        return Variant(name, run, 10, "samples")

    # three calls to warm up and one to see how long it takes; then the machine gets slower
    a = variant("a", *4 * [2.0], 2.0, 4.0, 20.0)
    b = variant("b", *4 * [1.0], 1.0, 2.0, 8.0)
    row = measure(case(a, b, baseline="b"), HOST, 10.0)
    assert turns == [*4 * "a", *4 * "b", *3 * "ab"]
    first, second = row.readings
    assert first.time == Summary(4.0, 2.0, 3.0, 12.0, 2.0, 20.0, 3)
    assert first.ratio == Summary(2.0, 0.0, 2.0, 2.25, 2.0, 2.5, 3)
    assert second.ratio is None
    assert (first.rate, first.calls) == (2.5, 1)


def test_blocks_are_as_long_as_the_time_allows(clock: Clock) -> None:
    quick = Variant("a", clock.call(2.0**-12), 1, "samples")
    (reading,) = measure(case(quick), HOST, 20.0).readings
    assert reading.calls == 2**12
    assert reading.time.n == bench.ROUNDS
    assert reading.time.median == 2.0**-12


@pytest.mark.parametrize(("seconds", "turns"), [(0, 1), (1e-9, 3)])
def test_whatever_the_time_there_is_something_to_tell(
    clock: Clock, seconds: float, turns: int
) -> None:
    (reading,) = measure(case(Variant("a", clock.call(5.0), 1, "bytes")), HOST, seconds).readings
    assert (reading.time.n, reading.calls) == (turns, 1)


def test_a_block_ends_when_the_device_is_done(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued = [0]

    def enqueue() -> None:
        queued[0] += 1

    def wait() -> None:
        clock.now += 3.0 * queued[0]
        queued[0] = 0

    monkeypatch.setattr(HOST.backend, "synchronize", wait)
    (reading,) = measure(case(Variant("a", enqueue, 1, "samples")), HOST, 0).readings
    assert reading.time.median == 3.0


def test_summary_of_a_sample() -> None:
    found = Summary.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found == Summary(3.0, 1.0, 2.0, 4.0, 1.0, 100.0, 5)
    assert found.spread == pytest.approx(1 / 3)
    assert Summary.of([0.0]).spread == 0


def _reading(host: float | None, device: float | None) -> Reading:
    one, two = (None if t is None else Summary.of([t]) for t in (host, device))
    return Reading("nnx", 7, Summary.of([2e-3]), one, two, 4e6, "bytes", None, None)


@pytest.mark.parametrize(("unit", "rate"), [("samples", 2.5), ("bytes", 5.0), ("FLOP", 5.0)])
def test_bytes_and_flops_go_by_the_clock_of_the_device_and_samples_by_ours(
    unit: str, rate: float
) -> None:
    times, clocks = [[4.0], [3.0]], [[(1.0, 2.0)], [(6.0, 8.0)]]
    ratios = bench._ratios(0, 1, times, clocks)
    assert [r and r.median for r in ratios] == [4 / 3, 2 / 8]
    assert bench._ratios(1, 1, times, clocks) == bench._ratios(0, None, times, clocks)
    wall, device = bench._ratios(0, 1, times, [clocks[0], []])  # a baseline that waits
    assert (wall, device) == (ratios[0], None)
    variant = Variant("a", int, 10, unit)
    found = bench._reading(variant, 7, times[0], clocks[0], *ratios)
    assert found.host == Summary.of([1.0])
    assert found.device == Summary.of([2.0])
    assert (found.rate, found.calls, found.unit) == (rate, 7, unit)


def test_the_longer_side_bounds_a_call() -> None:
    assert _reading(2.0, 1.0).bound == "host"
    assert _reading(1.0, 2.0).bound == "device"
    assert _reading(None, None).bound is None


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (MemoryError("no room for 3 TiB"), "no room for 3 TiB"),
        (MemoryError(), "out of memory"),
        (nnx.OutOfMemory("train_step: out of device memory"), "train_step: out of device memory"),
    ],
)
def test_a_row_that_does_not_fit_says_so(error: MemoryError, problem: str) -> None:
    assert measure(failing(error), HOST) == Row("kernels", "a row", None, problem=problem)
    assert measure(failing(error), HOST, strict=True).problem == problem


@pytest.mark.gpu
def test_a_row_that_the_device_has_no_room_for_says_so() -> None:
    device = Place(get_backend("cupy"), np.dtype(np.float32), smoke=True)
    huge = Case("kernels", "a row", lambda place: [place.backend.xp.empty(2**50)])
    row = measure(huge, device, strict=True)
    assert re.match(
        r"out of device memory: .* more were needed, .* are free on cupy$", row.problem or ""
    )
    assert not row.failed
    assert measure(cases(["kernels"])[0], device, 0).problem is None


def test_a_row_that_fails_lets_the_others_go_on_unless_the_cause_is_wanted() -> None:
    broken = failing(RuntimeError("the kernel\nis lost"))
    row = measure(broken, HOST)
    assert (row.problem, row.failed) == ("RuntimeError: the kernel is lost", True)
    with pytest.raises(RuntimeError, match="is lost"):
        measure(broken, HOST, strict=True)


def test_an_interruption_is_no_failure_of_a_row() -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(failing(KeyboardInterrupt()), HOST)


def test_warnings_stand_in_the_row_once() -> None:
    def call() -> None:
        warnings.warn("runs as\nit is", RuntimeWarning, stacklevel=1)

    row = measure(case(Variant("a", call, 1, "samples")), HOST, 0)
    assert row.warnings == ("runs as it is",)


# ---- as text -------------------------------------------------------------------------------------


def _table(rows: Sequence[Row], *, device: bool) -> list[str]:
    table = Table([Case(r.section, r.name, lambda place: []) for r in rows], device=device)
    return [line for row in rows for line in table.lines(row)]


def test_the_table_has_a_line_for_each_variant() -> None:
    ratio = Summary.of([1.234])
    one = Reading("nnx", 1, Summary.of([4.0, 5.0, 5.0]), None, None, 2e3, "samples", ratio, None)
    two = Reading("products", 1, Summary.of([6.5e-5]), None, None, 7.1e10, "FLOP", None, None)
    rows = [
        Row("steps", "wide", "products", (one, two)),
        Row("steps", "wider", "products", problem="out of memory"),
        Row("kernels", "k", None, (_reading(2e-3, 1e-6),)),
    ]
    assert _table(rows, device=False) == [
        "",
        bench.SECTIONS["steps"],
        "                      time    +-             rate   ratio",
        "wide   nnx          5.00 s    0%  2.00k samples/s    1.23",
        "       products    65.0 us    0%     71.0 GFLOP/s",
        "wider  out of memory",
        "",
        bench.SECTIONS["kernels"],
        "                      time    +-             rate   ratio",
        "k      nnx         2.00 ms    0%     0.00400 GB/s",
    ]


def test_the_table_of_a_device_has_both_sides() -> None:
    *_, head, line = _table([Row("kernels", "k", None, (_reading(2e-3, 1e-6),))], device=True)
    assert head.split() == ["time", "+-", "host", "device", "bound", "rate", "ratio", "dev.ratio"]
    assert " ".join(line.split()) == "k nnx 2.00 ms 0% 2.00 ms 1.00 us host 0.00400 GB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9.994e-10, "0.000999 us"), (1.0, "1.00 s"), (12.34, "12.3 s"), (9.994e-4, "999 us"),
     (9.996e-4, "1.00 ms"), (123.0, "123 s"), (0.0, "0 us")],
)  # fmt: skip
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert bench._time(Summary.of([seconds])) == text


def test_the_description_says_where(backend: Backend) -> None:
    found = bench.describe(backend)
    assert found["cpu"]
    assert ("device" in found) == (backend.xp is not np)
    if backend.xp is not np:
        assert found["device"]["tf32"] is False
        assert re.fullmatch(r"\d+\.\d", found["device"]["driver_cuda"])
    settings = {"dtype": "float32", "backend": "b", "seconds": 0.5, "smoke": False}
    blas = {"name": "blas", "version": "1", "threads": 3, "threads_by": "magic"}
    cpus = {"usable": 2, "all": 4}
    machine = {"versions": {"nnx": "1", "cupy": None}, "cpus": cpus, "blas": blas, **found}
    lines = list(bench.heading(settings, machine))
    assert lines[0] == "versions  nnx 1"
    assert "2 usable of 4" in lines[1]
    assert lines[2] == "BLAS      blas 1, threads: 3 (by magic)"
    assert lines[-1] == "measured  float32 on b, 0.5 s a row"
    assert len(lines) == 4 + 2 * (backend.xp is not np)
    assert "others are at work" not in list(bench.heading(settings, machine | {"load": 1.9}))[1]
    assert "others are at work" in list(bench.heading(settings, machine | {"load": 2.0}))[1]
