"""C kernels of the optimizers against the XpBackend bodies: the same bits."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cpu_kernels import instructions, only_kernels
from kernel_cases import REFERENCE, special
from optimizer_cases import CASES, CONDITIONS, RATES, SHAPES, Run
from oracles import assert_same_bits

from nnx.backends import get_backend, numpy_backend
from nnx.backends.base import Groups, Update

pytestmark = pytest.mark.kernels
each = pytest.mark.parametrize("name", CASES)
each_shape = pytest.mark.parametrize("shape", [*SHAPES, (2, 199, 0), (2, 8256, 3)])
ODD = np.array([5e-324, -1e-310, 1e-40, -1e-45, 1e30, -1e38, 1e300, 0.0, -0.0], np.float64)


def pair(kernels: Any, shape: tuple[int, int, int], dtype: Any, name: str) -> tuple[Run, Run]:
    """A run of the kernel and one of the definition, of equal numbers."""
    return Run(kernels, dtype, shape, name), Run(REFERENCE, dtype, shape, name)


def same(actual: Any, expected: Any) -> None:
    """The same bits, but whose NaN it is doesn't matter."""
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    assert_same_bits(*(np.where(np.isnan(a), a.dtype.type(0), a) for a in (actual, expected)))


def agree(run: Run, reference: Run) -> None:
    for actual, expected in zip(run.arrays(), reference.arrays(), strict=True):
        same(actual, expected)
    assert_same_bits(run.state.log, reference.state.log)
    counts = run.state.number, run.state.position
    assert counts == (reference.state.number, reference.state.position)


@each
@each_shape
def test_a_rule_has_the_bits_of_its_definition(
    kernels: Any, name: str, shape: tuple[int, int, int], dtype: Any
) -> None:
    run, reference = pair(kernels, shape, dtype, name)
    start = [a.copy() for a in run.arrays()]
    scale = np.linspace(0.1, 0.9, shape[0]).astype(dtype)
    for r in (run, reference):
        r.gradients[:, :, 64:128] = np.nan  # frozen
        for step in range(len(RATES)):
            update = r.update(step)._replace(scale=scale if step == 1 else None)
            before = update.grad.copy()
            r.apply(update)
            assert_same_bits(update.grad, before)
    agree(run, reference)
    assert (run.state.number, run.state.position) == (3, 3)
    if shape[1] > 64:
        for actual, before in zip(run.arrays(), start, strict=True):
            assert_same_bits(actual[:, 64:128], before[:, 64:128])
            assert (actual[:, 128:] != before[:, 128:]).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflow and inf - inf
@each
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_rule_passes_on_what_is_not_finite_or_not_normal(
    kernels: Any, name: str, everywhere: bool, dtype: Any
) -> None:
    run, reference = pair(kernels, (3, 448, 0), dtype, name)
    rng = np.random.default_rng(3)
    gradient = special(rng, (3, 448), dtype)
    gradient[:, 0] = -0.0
    gradient[:, 6::11] = np.resize(ODD.astype(dtype), gradient[:, 6::11].shape)
    numbers = [np.roll(special(rng, (3, 448), dtype), i, axis=1) for i in range(1, 5)]
    scale = np.array([np.nan, 0.5, 1], dtype)
    for r in (run, reference):
        r.gradients[:] = gradient
        if everywhere:
            for a, odd in zip([r.value, *r.slots], numbers, strict=False):
                if a is not None:
                    a[...] = np.where(np.abs(odd) > 2, odd, np.abs(odd))
                    a[:, 3::13] = np.resize(np.abs(ODD).astype(dtype), a[:, 3::13].shape)
            for a in (r.value, r.slots[0]):
                if a is not None:
                    a[:, 0] = -0.0
        r.apply(r.update(0))
        r.apply(r.update(1)._replace(scale=scale))
    agree(run, reference)


def test_an_infinite_parameter_does_not_reach_a_gradient_without_decay(
    kernels: Any, dtype: Any
) -> None:
    run = Run(kernels, dtype, (1, 448, 0), "momentum")
    run.value[...] = np.inf
    run.apply(run.update(0))
    assert not np.isfinite(run.arrays()[1][0, :64]).any()
    assert np.isfinite(run.arrays()[1][0, 128:]).all()  # decay_scale is 0 there


def test_one_group_of_everything(kernels: Any, dtype: Any) -> None:
    run, reference = pair(kernels, (3, 192, 0), dtype, "adamw")
    for r in (run, reference):
        r.groups = Groups([(0, 192, 1.0, 1.0)], r.backend)
    for shrink in np.linspace(0, 9, 20).tolist():  # 1 - lr * shrink is rounded once
        for r in (run, reference):
            r.shrink = shrink
            r.state.plan(RATES, dtype=dtype, n_models=3)
            r.apply(r.update(0))
        agree(run, reference)


def test_a_vector_of_nothing_counts_its_step(kernels: Any, dtype: Any) -> None:
    state, nothing = kernels.step_state(), np.zeros((1, 0), dtype)
    state.plan(RATES, dtype=dtype)
    update = Update(nothing, nothing, (None,), Groups([], kernels), state, np.array(5, dtype))
    kernels.sgd(kernels.condition(update, **CONDITIONS["all"]), momentum=0.0, nesterov=False)
    np.testing.assert_array_equal(state.log, np.array([5, np.nan, np.nan], dtype))
    assert (state.number, state.position) == (1, 1)


@pytest.mark.parametrize(
    "loss",
    [None, np.float32(0.25), 0.25, np.array(0.25), np.array(0.25, np.float32), np.array(2)],
    ids=repr,
)
def test_every_kind_of_loss_is_entered_in_the_log(kernels: Any, loss: Any, dtype: Any) -> None:
    run = Run(kernels, dtype, (1, 64, 0), "sgd")
    run.state.plan(RATES, dtype=dtype)
    run.apply(run.update(0)._replace(loss=None))
    run.apply(run.update(1)._replace(loss=loss))
    expected = np.nan if loss is None else float(loss)
    np.testing.assert_array_equal(run.state.log, np.array([np.nan, expected, np.nan], dtype))


def test_a_loss_of_the_wrong_shape_is_numpys_error(kernels: Any, dtype: Any) -> None:
    for backend in (kernels, REFERENCE):
        run = Run(backend, dtype, (2, 64, 0), "sgd")
        with pytest.raises(ValueError, match="could not broadcast"):
            run.apply(run.update(0)._replace(loss=np.zeros(3, dtype)))
        assert run.state.number == 0


# ---- penalties and clipping --------------------------------------------------------------------


def norm(gradients: np.ndarray) -> list[float]:
    """Of each model, its frozen stretch left out, by exact sums."""
    there = np.delete(gradients.astype(np.float64), np.s_[64:128], axis=1)
    return [math.sqrt(math.fsum(x * x for x in row)) for row in there.tolist()]


@pytest.mark.parametrize("condition", CONDITIONS)
@each_shape
def test_condition(kernels: Any, condition: str, shape: tuple[int, int, int], dtype: Any) -> None:
    run, reference = pair(kernels, shape, dtype, "sgd")
    values = run.value.copy()
    for r in (run, reference):
        r.gradients[:, :, 64:128] = np.nan  # frozen
    update, expected = run.update(0, condition), reference.update(0, condition)
    assert_same_bits(update.grad, expected.grad)
    assert_same_bits(run.value, values)
    limit = CONDITIONS[condition]["clip_norm"]
    if limit is None:
        assert update.scale is None
        return
    scale: Any = update.scale
    factors = [min(1, limit / (n + 1e-6)) for n in norm(expected.grad)]
    assert (scale.dtype, scale.shape) == (dtype, (shape[0],))
    rtol = 2e-15 if dtype == np.float64 else 1e-7  # float32: the next number, where halfway
    np.testing.assert_allclose(scale, factors, rtol=rtol)
    assert (scale < 1).all() == (condition != "large norm")


@each
def test_condition_and_rule_together(kernels: Any, name: str, dtype: Any) -> None:
    run, reference = pair(kernels, (3, 448, 0), dtype, name)
    for condition in CONDITIONS:
        for r in (run, reference):
            r.state.plan(RATES, dtype=dtype, n_models=3)
        for step in range(len(RATES)):
            update, expected = run.update(step, condition), reference.update(step, condition)
            run.apply(update)
            reference.apply(expected._replace(scale=update.scale))
        agree(run, reference)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of overflow and inf - inf
def test_condition_of_what_is_not_finite(kernels: Any, dtype: Any) -> None:
    run, reference = pair(kernels, (4, 448, 0), dtype, "sgd")
    gradient = special(np.random.default_rng(0), 448, dtype)
    values = np.roll(special(np.random.default_rng(1), 448, dtype), 1)  # other places than NaN's
    gradient[0] = values[0] = -0.0
    for r in (run, reference):
        r.gradients[0, 0, 5] = np.nan
        r.gradients[0, 1, 5] = -np.inf
        r.gradients[0, 2, 200:] = 1e30  # its square isn't a float32
        r.gradients[0, 3] = gradient
    scale: Any = run.update(0, "norm").scale
    expected: Any = reference.update(0, "norm").scale
    np.testing.assert_allclose(scale, expected, rtol=1e-7)
    np.testing.assert_array_equal(np.isnan(scale), [True, False, False, True])
    for r in (run, reference):
        r.value[3] = values
    same(run.update(0, "all").grad, reference.update(0, "all").grad)


# ---- threads, and what no kernel takes ---------------------------------------------------------


@each
def test_two_threads_have_the_bits_of_one(name: str, dtype: Any) -> None:
    cpu: Any = numpy_backend.CPU
    size = 670_016 if name == "adam" else 131_136
    before, results = cpu.info()["threads"], []
    try:
        for threads in (1, 2):
            cpu.set_num_threads(threads)
            with only_kernels(instructions()[-1]) as backend:
                run = Run(backend, dtype, (2, size // 2, 1), name)
                update = run.update(0, "all")
                run.apply(update)
                run.apply(run.update(1))
                results.append([update.grad, update.scale, *run.arrays()])
    finally:
        cpu.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_same_bits(two, one)


def _misaligned(a: np.ndarray) -> np.ndarray:
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


@pytest.mark.parametrize(
    "change",
    [
        lambda u: u._replace(grad=np.asfortranarray(u.grad)),
        lambda u: u._replace(grad=_misaligned(u.grad)),
        lambda u: u._replace(grad=u.grad.astype(np.float32)),
        lambda u: u._replace(grad=u.grad.astype(">f8")),
        lambda u: u._replace(scale=np.array([0.5, 0.25], np.float32)),
        lambda u: u._replace(decay=np.array([0.5])[0]),
        lambda u: u._replace(groups=Groups([(0, 64, 1.0, 1.0), (64, 256, 0.5, 0.5)], REFERENCE)),
        lambda u: u._replace(groups=Groups([(64, 128, 1.0, 1.0), (0, 64, 0.5, 0.5)], REFERENCE)),
    ],
)
def test_what_no_kernel_takes_is_left_to_numpy(change: Any) -> None:
    results = []
    for backend in (get_backend("numpy"), REFERENCE):
        run = Run(backend, np.dtype(np.float64), (2, 128, 0), "adam")
        update = change(run.update(0))
        update = backend.condition(update, **CONDITIONS["l2"])
        run.apply(update)
        results.append([*run.arrays(), update.grad, run.state.log])
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_kernels_write_nothing_where_an_argument_does_not_fit() -> None:
    cpu: Any = numpy_backend.CPU
    run = Run(get_backend("numpy"), np.dtype(np.float32), (2, 128, 0), "adam")
    update, state = run.update(0), run.state
    m, v = run.arrays()[1:]
    before = [a.copy() for a in (*run.arrays(), update.grad, state.log)]
    changes: list[dict[str, Any]] = [
        {"value": update.value[0]},
        {"grad": update.grad[:1]},
        {"slots": (m, v)},
        {"slots": (m, None, None)},
        {"slots": (m, v[:, :64].copy(), None)},
        {"slots": [m, v, None]},
        {"scale": np.ones(3, np.float32)},
        {"decay": None},
    ]
    settings = (0.9, 0.999, 1e-8)
    stretches = run.groups.stretches
    for other in (
        *(Groups([(0, 192, 1.0, 1.0)], REFERENCE).stretches, stretches.astype(np.float32)),
        *(stretches * np.nan, None),
    ):
        changes.append({"groups": SimpleNamespace(stretches=other)})
    good: dict[str, Any] = {"rates": state.rates, "log": state.log, "_position": 0, "_number": 0}
    for numbers in (
        *({"rates": state.rates[:0]}, {"_position": -1}, {"_position": 3}, {"_position": None}),
        *({"_number": 0.5}, {"rates": state.rates.astype(np.float32)}),
    ):
        changes.append({"state": SimpleNamespace(**good | numbers)})
    changes += [{"state": SimpleNamespace(rates=state.rates)}, {"state": None}, {"groups": None}]
    scale, squares = np.ones(2, np.float32), np.zeros(2)
    # place of an argument and what it can't be
    wrong: list[tuple[int, Any]] = [(0, update._replace(**change)) for change in changes]
    wrong += [(0, tuple(update)[:8]), (0, None)]
    wrong += [(1, settings[:2]), (1, list(settings)), (1, (None, *settings[1:]))]
    for i, what in wrong:
        args = [update, settings]
        args[i] = what
        assert not cpu.adam(*args), (i, what)
    wide = update._replace(groups=changes[8]["groups"])
    wrong = [(0, wide), (1, None), (3, "1"), (5, scale[:1]), (5, scale.astype(np.float64))]
    wrong += [(5, None), (6, squares[:1]), (6, squares.astype(np.float32)), (6, None)]
    for i, what in wrong:
        given: list[Any] = [update, 0.1, 0.1, 1.0, 1.0, scale, squares]
        given[i] = what
        assert not cpu.condition(*given), (i, what)
    assert not cpu.adam(update)
    assert not cpu.condition(update)
    for a, b in zip((*run.arrays(), update.grad, state.log), before, strict=True):
        assert_same_bits(a, b)
