"""Kernels of the optimizers, over the flat vector of parameters."""

from typing import Any

import numpy as np
import pytest
from kernel_cases import (
    REFERENCE,
    TOLERANCE,
    close,
    limit_grid,
    same_bits_on_every_grid,
    special,
    traffic,
)
from optimizer_cases import CASES, CONDITIONS, RATES, SHAPES, Run

from nnx.backends import get_backend
from nnx.backends.arena import Arena
from nnx.backends.base import Array, Groups, Update

gpu = pytest.mark.gpu

each = pytest.mark.parametrize("name", CASES)
every_condition = pytest.mark.parametrize("condition", CONDITIONS)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def pair(shape: tuple[int, int, int], dtype: Any, name: str) -> tuple[Run, Run]:
    """A run of the definition in float64, and one of the kernel, of equal numbers."""
    reference, device = (
        Run(REFERENCE, dtype, shape, name),
        Run(get_backend("cupy"), dtype, shape, name),
    )
    reference.dtype = np.dtype(np.float64)
    reference.value = reference.value.astype(np.float64)
    reference.slots = [None if a is None else a.astype(np.float64) for a in reference.slots]
    reference.state.plan(RATES, dtype=np.float64, n_models=shape[0])
    for run in (reference, device):
        run.gradients = run.gradients.astype(dtype)
    return reference, device


def agree(device: Run, reference: Run) -> None:
    """Three steps of some roundings each, where small numbers are divided."""
    rtol, atol = TOLERANCE[device.dtype]
    for actual, expected in zip(device.arrays(), reference.arrays(), strict=True):
        assert actual.dtype == device.dtype
        np.testing.assert_allclose(actual, expected, rtol=20 * rtol, atol=4 * atol)


@gpu
@pytest.mark.usefixtures("grids")
@each
@each_shape
def test_optimizers(name: str, shape: tuple[int, int, int], dtype: Any) -> None:
    reference, device = pair(shape, dtype, name)
    start = device.arrays()
    for run in (reference, device):
        run.gradients[:, :, 64:128] = np.nan  # frozen
        for step in range(len(RATES)):
            run.apply(run.update(step))
    agree(device, reference)
    for actual, before in zip(device.arrays(), start, strict=True):
        np.testing.assert_array_equal(actual[:, 64:128], before[:, 64:128])
    close(device.state.log, device.losses.astype(dtype), dtype, exact=True)
    assert device.backend.to_numpy(device.state.counters).tolist() == [3, 3]
    assert (device.state.number, device.state.position) == (3, 3)


@gpu
@each
@pytest.mark.parametrize("scaled", [False, True])
def test_optimizers_pass_on_what_is_not_finite(name: str, scaled: bool, dtype: Any) -> None:
    reference, device = pair((2, 448, 0), dtype, name)
    rng = np.random.default_rng(3)
    gradient = special(rng, (2, 448), dtype)
    scale = np.array([np.nan, 0.5])
    with np.errstate(all="ignore"):
        for run in (reference, device):
            run.gradients[0] = gradient
            update = run.update(0)
            factor = run.backend.asarray(scale.astype(run.dtype)) if scaled else None
            run.apply(update._replace(scale=factor))
    agree(device, reference)


@gpu
def test_an_infinite_parameter_does_not_reach_a_gradient_without_decay(dtype: Any) -> None:
    device = Run(get_backend("cupy"), dtype, (1, 448, 0), "momentum")
    device.value[...] = np.inf
    device.apply(device.update(0))
    velocity = device.arrays()[1]
    assert not np.isfinite(velocity[0, :64]).any()
    assert np.isfinite(velocity[0, 128:]).all()  # decay_scale is 0 there


@gpu
def test_a_vector_of_nothing_counts_its_step(dtype: Any) -> None:
    cuda: Any = get_backend("cupy")
    state, nothing = cuda.step_state(), cuda.xp.zeros((1, 0), dtype)
    state.plan(RATES, dtype=dtype)
    loss = cuda.asarray(np.array(5, dtype))
    update = Update(nothing, nothing, (None,), Groups([], cuda), state, loss)
    cuda.sgd(cuda.condition(update, **CONDITIONS["all"]), momentum=0.0, nesterov=False)
    close(state.log, np.array([5, np.nan, np.nan], dtype), dtype, exact=True)
    assert cuda.to_numpy(state.counters).tolist() == [1, 1]


# ---- penalties and clipping --------------------------------------------------------------------


@gpu
@pytest.mark.usefixtures("grids")
@every_condition
@each_shape
def test_condition(condition: str, shape: tuple[int, int, int], dtype: Any) -> None:
    reference, device = pair(shape, dtype, "sgd")
    values = device.arrays()[0]
    updates = []
    for run in (reference, device):
        run.gradients[:, :, 64:128] = np.nan  # frozen
        updates.append(run.update(0, condition))
    expected, actual = updates
    gradient = device.backend.to_numpy(actual.grad)
    np.testing.assert_array_equal(gradient[:, 64:128], np.nan)
    close(actual.grad, expected.grad, dtype)
    np.testing.assert_array_equal(device.arrays()[0], values)
    if expected.scale is None:
        assert actual.scale is None
    else:
        assert (expected.scale < 1).all() == (condition != "large norm")
        close(actual.scale, expected.scale, dtype)


@gpu
@every_condition
@each
def test_condition_and_optimizer_together(name: str, condition: str) -> None:
    reference, device = pair((3, 448, 0), np.dtype(np.float64), name)
    for run in (reference, device):
        for step in range(len(RATES)):
            run.apply(run.update(step, condition))
    agree(device, reference)


@gpu
def test_condition_of_gradients_that_are_not_finite(dtype: Any) -> None:
    reference, device = pair((4, 448, 0), dtype, "sgd")
    updates = []
    with np.errstate(all="ignore"):
        for run in (reference, device):
            run.gradients[0, 0, 5] = np.nan
            run.gradients[0, 1, 5] = -np.inf
            run.gradients[0, 2, 200:] = 1e30  # its square isn't a float32
            updates.append(run.update(0, "norm"))
    scales = device.backend.to_numpy(updates[1].scale)
    expected_scales: Any = updates[0].scale
    np.testing.assert_allclose(scales, expected_scales, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(scales), [True, False, False, False])
    assert scales[1] == 0
    assert 0 < scales[2] < 1e-29
    values = np.roll(special(np.random.default_rng(1), 448, dtype), 1)  # other places than NaN's
    with np.errstate(all="ignore"):
        for run in (reference, device):
            run.gradients[0, 3] = special(np.random.default_rng(0), 448, dtype)
            run.value[3] = run.backend.asarray(values)
        expected, actual = (run.update(0, "all") for run in (reference, device))
    close(actual.grad, expected.grad, dtype)


@gpu
def test_norm_and_step_do_not_depend_on_the_grid(dtype: Any) -> None:
    def step() -> list[Array | None]:
        run = Run(get_backend("cupy"), dtype, (3, 8128, 0), "adam")
        update = run.update(0, "norm")
        run.apply(update)
        return [update.scale, run.value, *run.slots]

    same_bits_on_every_grid(step)


# ---- what the device does ----------------------------------------------------------------------


@gpu
@each
@pytest.mark.parametrize("condition", [None, "all"])
def test_a_step_is_captured_and_replayed(name: str, condition: str | None) -> None:
    """Nothing that the host knows and that changes from step to step goes into the launches."""
    cuda: Any = get_backend("cupy")
    xp, dtype, shape = cuda.xp, np.dtype(np.float32), (2, 448, 0)
    eager, replayed = (Run(cuda, dtype, shape, name) for _ in range(2))
    for run in (eager, replayed):
        run.gradients[:] = run.gradients[0]
    for step in range(len(RATES)):
        eager.apply(eager.update(step, condition))
    arena = Arena(xp)
    update = replayed.update(0)
    gradient = update.grad.copy()

    def train() -> None:
        with arena.step("step"):
            update.grad[...] = gradient
            ready = update
            if condition is not None:
                ready = cuda.condition(update, **CONDITIONS[condition])
            replayed.apply(ready)

    cuda.synchronize()
    stream = xp.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(2):  # the arena grows, and the stream gets its tickets
            train()
        # back to the start
        fresh = Run(cuda, dtype, shape, name)
        for a, b in zip(
            [replayed.value, *replayed.slots], [fresh.value, *fresh.slots], strict=True
        ):
            if a is not None:
                a[...] = b
        replayed.state.number = 0
        replayed.state.plan(RATES, dtype=dtype, n_models=2)
        stream.synchronize()
        stream.begin_capture()
        train()
        graph = stream.end_capture()
        for _ in RATES:
            graph.launch(stream)
        stream.synchronize()
    for a, b in zip(replayed.arrays(), eager.arrays(), strict=True):
        np.testing.assert_array_equal(a, b)
    close(replayed.state.counters, np.array([3, 3]), np.dtype(np.int64), exact=True)


@gpu
@each
def test_optimizers_are_free_of_data_races(name: str) -> None:
    cudasim = pytest.importorskip("cudasim", reason="the race check is the simulator's")
    run = Run(get_backend("cupy"), np.dtype(np.float32), (3, 448, 0), name)
    run.apply(run.update(0, "all"))  # compiled, and its tickets made
    with cudasim.option("racecheck", 1):
        run.apply(run.update(1, "all"))
        run.backend.synchronize()


@gpu
def test_blocks_of_several_tiles_are_free_of_data_races(monkeypatch: pytest.MonkeyPatch) -> None:
    cudasim = pytest.importorskip("cudasim", reason="the race check is the simulator's")
    limit_grid(monkeypatch, 2)  # of 6 tiles; the last of each model has other settings
    run = Run(get_backend("cupy"), np.dtype(np.float32), (2, 4224, 0), "momentum")
    run.apply(run.update(0, "l2"))
    with cudasim.option("racecheck", 1):
        run.apply(run.update(1, "l2"))
        run.backend.synchronize()


@gpu
@each
def test_bytes_of_optimizers(name: str) -> None:
    cudasim = pytest.importorskip("cudasim", reason="sectors are counted by the simulator")
    n = 64 * 2000
    run = Run(get_backend("cupy"), np.dtype(np.float32), (1, n, 0), name)
    run.groups = Groups([(0, n, 1.0, 1.0)], run.backend)
    update = run.update(0)
    run.state.plan(np.full(9, 0.1), dtype=run.dtype, n_models=1)
    moved = traffic(lambda: run.apply(update), run.operation)
    # value and gradient are read, the value is written; each array of state is read and written;
    # and a byte for each 64 elements says in which group they are
    slots = len([slot for slot in run.slots if slot is not None])
    least = 4 * n * (3 + 2 * slots) + n // 64
    assert least <= moved[f"{run.operation}_f32"] <= 1.1 * least
    # a warp writes 32 times 16 bytes at once; the log and the counters are written, too
    stores = cudasim.stats()["kernels"][f"{run.operation}_f32"]["store_requests"]
    assert stores <= (1 + slots) * n // 128 + 4


@gpu
@every_condition
def test_bytes_of_condition(condition: str) -> None:
    cudasim = pytest.importorskip("cudasim", reason="sectors are counted by the simulator")
    n, options = 64 * 2000, CONDITIONS[condition]
    run = Run(get_backend("cupy"), np.dtype(np.float32), (1, n, 0), "sgd")
    run.groups = Groups([(0, n, 1.0, 1.0)], run.backend)
    update = run.update(0)
    moved = traffic(lambda: run.backend.condition(update, **options), "condition")
    # the gradient is read; if it changes it is written; a penalty reads the value
    penalty, value = bool(options["l1"] or options["l2"]), options["clip_value"] is not None
    least = 4 * n * (1 + (penalty or value) + penalty) + n // 64
    assert least <= moved["condition_f32"] <= 1.1 * least
    stores = cudasim.stats()["kernels"]["condition_f32"]["store_requests"]
    assert stores <= (penalty or value) * n // 128 + 1 + -(-n // 2048)  # scale, a sum per tile
