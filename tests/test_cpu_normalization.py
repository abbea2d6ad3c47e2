"""The C kernels of the normalizations; what they must give is what XpBackend gives in float64."""

import itertools
from typing import Any

import numpy as np
import pytest
from kernel_cases import REFERENCE, peak_of_a_step
from oracles import assert_same_bits
from test_kernels_normalization import EPS, KINDS, SMALL, agree, case, each, on, run

from nnx.backends import get_backend, numpy_backend
from nnx.backends.base import Array

pytestmark = pytest.mark.kernels

# A row is added up in 16 lanes and stretches of 256; dweight in chunks of 16 rows or more, at most
# 32 of them; of a batch 128 columns are taken at a time, and stretches of 64 rows.
FEATURES = [*SMALL, (3, 15), (3, 16), (3, 17), (16, 255), (17, 273), (2, 4100), (800, 5), (33, 128)]
SAMPLES = [*SMALL, (3, 127), (3, 128), (63, 129), (64, 300), (65, 5), (1030, 9)]
MODELS = [(3, 6, 33), (2, 0, 5), (2, 40, 130), (1, 7, 5)]


def check(backend: Any, kind: str, a: Any, there: Any = None, **options: Any) -> None:
    """The kernels on `there`, by default a copy of the case, against the definition in float64."""
    there = on(backend, a) if there is None else there
    expected = run(REFERENCE, kind, on(REFERENCE, a, np.float64), **options)
    agree(run(backend, kind, there, **options), expected, a)
    for name in ("x", "dy", "weight", "bias"):
        if a[name] is not None:
            assert_same_bits(there[name], a[name])


@each([*FEATURES, *MODELS], [*SAMPLES, *MODELS])
def test_kernels_agree_with_the_definition(
    kernels: Any, kind: str, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator
) -> None:
    if kind == "batch" and shape[-2] == 0:
        pytest.skip("there are no statistics of no samples")
    check(kernels, kind, case(kind, shape, rng, dtype))


@each([(0, 5), (2, 0, 5)], [(0, 5), (2, 0, 5)], ["layer", "rms", "batch, evaluated"])
def test_no_rows(
    kernels: Any, kind: str, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator
) -> None:
    for accumulate in ((False, False), (True, True)):
        check(kernels, kind, case(kind, shape, rng, dtype), accumulate=accumulate)


@each([(7, 33), (40, 300)], [(7, 33), (70, 300)])
def test_gradients_are_added_or_not_made(
    kernels: Any, kind: str, shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    for accumulate in ((True, True), (True, False), (False, True)):
        check(kernels, kind, case(kind, shape, rng, dtype), accumulate=accumulate)
    a = case(kind, shape, rng, dtype)
    check(kernels, kind, a, need_dx=False)
    for missing in (
        *(("dweight",), ("dbias",), ("weight",), ("bias",)),
        ("dweight", "dbias"),
        ("weight", "bias", "dweight", "dbias"),
    ):
        b = a | dict.fromkeys(missing)
        check(kernels, kind, b)
        check(kernels, kind, b, need_dx=False)


@each([(3, 6, 33), (2, 40, 130)], [(3, 6, 33), (2, 40, 130)])
def test_models_in_views_of_the_flat_vector(
    kernels: Any, kind: str, shape: tuple[int, int, int], dtype: Any, rng: np.random.Generator
) -> None:
    """A row of the flat vector holds other parameters too; nobody may touch them."""
    n_models, _, c = shape
    a = case(kind, shape, rng, dtype)
    names = [n for n in a if n not in ("x", "dy") and a[n] is not None]
    for accumulate in ((False, False), (True, True)):
        there = on(kernels, a)
        flat = np.full((n_models, len(names), c + 7), 7, dtype)
        for i, name in enumerate(names):
            flat[:, i, :c] = a[name]
            there[name] = flat[:, i, :c]
        check(kernels, kind, a, there, accumulate=accumulate)
        np.testing.assert_array_equal(flat[..., c:], 7)
    one = a | {n: None if a[n] is None else a[n][0] for n in ("weight", "bias")}  # for all models
    check(kernels, kind, one)


def normalized(a: Any, mean: Any, rstd: Any, axis: int) -> Array:
    """The definition's `y`, from statistics that are given."""
    y = a["x"] * np.expand_dims(rstd, axis)
    if mean is not None:
        y = (a["x"] - np.expand_dims(mean, axis)) * np.expand_dims(rstd, axis)
    y = y if a["weight"] is None else y * a["weight"]
    return y if a["bias"] is None else y + a["bias"]


@each([(7, 33), (3, 513)], [(7, 33), (66, 131)])
def test_what_is_no_sum_has_the_bits_of_the_definition(
    kernels: Any, kind: str, shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    for missing in ((), ("weight",), ("bias",), ("weight", "bias")):
        a: Any = case(kind, shape, rng, dtype) | dict.fromkeys(missing)
        a["x"][1, 0] = 0
        before = on(kernels, a)
        found = run(kernels, kind, a)
        mean, rstd = found.get("mean"), found["rstd"]
        y = normalized(a, mean, rstd, -2 if kind.startswith("batch") else -1)
        assert_same_bits(found["y"], y)
        if kind == "batch, evaluated":
            expected = run(REFERENCE, kind, before)
            for name in ("y", "mean", "rstd", "dx"):
                assert_same_bits(found[name], expected[name])
        if kind == "batch":
            new = before["running_mean"] * dtype.type(1 - 0.3) + mean * dtype.type(0.3)
            assert_same_bits(found["running_mean"], new)


@pytest.mark.parametrize("offset", [0, 1e4])
@each([(64, 64), (3, 4100), (2000, 7)], [(64, 64), (5001, 3)], ["layer", "rms", "batch"])
def test_errors_are_no_larger_than_those_of_the_definition(
    kernels: Any, kind: str, shape: tuple[int, int], offset: float, rng: np.random.Generator
) -> None:
    """In float32; E[x^2] - E[x]^2 would have errors of 1e8 ulp in the place of a variance of 1."""
    dtype = np.dtype(np.float32)
    a = case(kind, shape, rng, dtype)
    a["x"] = (offset + rng.standard_normal(shape)).astype(dtype)
    exact = run(REFERENCE, kind, on(REFERENCE, a, np.float64))
    of_numpy = run(REFERENCE, kind, on(REFERENCE, a))
    found = run(kernels, kind, on(kernels, a))
    for name, wanted in exact.items():
        error, of_definition = (np.abs(b[name] - wanted).max() for b in (found, of_numpy))
        ulp = np.spacing(np.abs(wanted).max().astype(dtype))
        assert error <= 1.1 * of_definition + 2 * ulp, name


@each([(6, 5), (3, 300)], [(6, 5), (300, 3)])
def test_what_is_not_finite_stays_where_the_definition_leaves_it(
    kernels: Any, kind: str, shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    for name, value in itertools.product(("x", "dy", "weight"), (np.nan, np.inf, -np.inf)):
        a = case(kind, shape, rng, dtype)
        a[name][-1 if name == "weight" else (1, 1)] = value
        with np.errstate(all="ignore"):
            expected = run(REFERENCE, kind, on(REFERENCE, a, np.float64))
        actual = run(kernels, kind, on(kernels, a))
        for key, wanted in expected.items():
            finite = np.isfinite(wanted)
            np.testing.assert_array_equal(np.isfinite(actual[key]), finite, err_msg=key)
            np.testing.assert_array_equal(actual[key][~finite], wanted[~finite], err_msg=key)


@each([(300, 520), (2, 700, 33)], [(300, 520), (2, 900, 130)])
def test_two_threads_give_the_bits_of_one(
    kernels: Any, kind: str, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator
) -> None:
    cpu: Any = numpy_backend.CPU
    a = case(kind, shape, rng, dtype)
    found = []
    threads = cpu.info()["threads"]
    for n in (1, 2):
        cpu.set_num_threads(n)
        try:
            found.append(run(kernels, kind, on(kernels, a)))
        finally:
            cpu.set_num_threads(threads)
    for name, b in found[0].items():
        assert_same_bits(found[1][name], b)


# ---- what no kernel takes ------------------------------------------------------------------------


def unaligned(a: Array) -> Array:
    """A copy that begins one byte behind an address fit for its elements."""
    space = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    space[...] = a
    return space


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_that_no_kernel_takes_are_left_to_numpy(
    kind: str, dtype: Any, rng: np.random.Generator
) -> None:
    backend = get_backend("numpy")
    a = case(kind, (6, 7), rng, dtype)
    for layout in (np.asfortranarray, unaligned, lambda b: np.repeat(b, 2, axis=0)[::2]):
        for name in ("x", "dy", "weight"):
            check(backend, kind, a, on(backend, a) | {name: layout(a[name])})
    wide = on(backend, a) | {"weight": a["weight"].astype(np.float64)}
    if dtype == np.float64:
        check(backend, kind, a, wide)


def _calls(kind: str, dtype: Any, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """Names of functions of the extension, and their arguments, for K = 2 models."""
    a = case(kind, (2, 5, 4), rng, dtype)
    out, rows = np.full((2, 5, 4), 7, dtype), np.full((2, 2, 5), 7, dtype)
    columns, partial = np.full((2, 2, 4), 7, dtype), np.full((2, 1, 2, 4), 7, dtype)
    vectors, gradients = (a["weight"], a["weight"]), (a["dweight"], a["dweight"].copy())
    running = (a["running_mean"], a["running_var"])
    if kind == "batch":
        return out, {
            "batch_norm": (a["x"], *vectors, *running, out, *columns, EPS, 0.1, True),
            "batch_norm_backward": (
                *(a["dy"], a["x"], *columns, vectors[0], out),
                *(*gradients, False, False, True),
            ),
        }
    return out, {
        "layer_norm": (a["x"], *vectors, out, *rows, EPS),
        "layer_norm_backward": (
            *(a["dy"], a["x"], *rows, vectors[0], out),
            *(*gradients, False, False, partial),
        ),
    }


@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_arrays_that_do_not_fit_are_declined_untouched(
    kind: str, dtype: Any, rng: np.random.Generator
) -> None:
    cpu: Any = numpy_backend.CPU
    other = np.dtype({4: np.float64, 8: np.float32}[dtype.itemsize])
    names = list(_calls(kind, dtype, rng)[1])
    for name in names:
        n_arguments = len(_calls(kind, dtype, rng)[1][name])
        for i in range(n_arguments):
            argument = _calls(kind, dtype, rng)[1][name][i]
            if not isinstance(argument, np.ndarray):
                continue
            wrong: list[Any] = [
                *(argument[..., :-1].copy(), argument[:1].copy(), argument[None], argument[0, 0]),
                *(argument.astype(other), argument.astype(dtype.newbyteorder(">")), 3, "text"),
                *(unaligned(argument), np.concatenate([argument, argument]), argument[::-1, ::-1]),
                np.broadcast_to(argument[..., :1], argument.shape),
            ]
            if argument.ndim > 2:
                wrong.append(argument[:, :-1].copy())
            for bad in wrong:
                out, calls = _calls(kind, dtype, rng)
                arguments = list(calls[name])
                gradient = arguments[6] if name.endswith("backward") else None
                arguments[i] = bad
                before = None if gradient is None else gradient.copy()
                assert getattr(cpu, name)(*arguments) is False, (name, i)
                np.testing.assert_array_equal(out, 7)
                if before is not None and gradient is not None:
                    assert_same_bits(gradient, before)
        assert getattr(cpu, name)(*_calls(kind, dtype, rng)[1][name][:-1]) is False
        assert getattr(cpu, name)(*_calls(kind, dtype, rng)[1][name]) is True


def test_one_sample_is_refused_as_the_definition_does(rng: np.random.Generator) -> None:
    backend = get_backend("numpy")
    with pytest.raises(ZeroDivisionError):
        run(backend, "batch", on(backend, case("batch", (1, 4), rng, np.float32)))
    a = case("layer", (5, 4), rng, np.float32)
    with pytest.raises(ValueError, match="could not be broadcast"):
        run(backend, "layer", on(backend, a | {"weight": a["weight"][:3]}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_allocates_nothing(kernels: Any, kind: str, rng: np.random.Generator) -> None:
    a = on(kernels, case(kind, (64, 200), rng, np.float32))
    gradients = (a["weight"], a["dweight"], a["dbias"])

    def step() -> None:
        if kind.startswith("batch"):
            running, training = (a["running_mean"], a["running_var"]), kind == "batch"
            options: dict[str, Any] = {"eps": EPS, "momentum": 0.1, "training": training}
            _, *saved = kernels.batch_norm(a["x"], a["weight"], a["bias"], *running, **options)
            kernels.batch_norm_backward(a["dy"], a["x"], *saved, *gradients, training=training)
        else:
            options = {"eps": EPS, "centered": kind == "layer"}
            _, *saved = kernels.layer_norm(a["x"], a["weight"], a["bias"], **options)
            kernels.layer_norm_backward(a["dy"], a["x"], *saved, *gradients)

    assert peak_of_a_step(step) < 2048  # no array of 64 rows' statistics but the arena's
