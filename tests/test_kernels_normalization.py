"""Kernels of the normalizations, over the features (`layer_norm`) and the samples (`batch_norm`).

What they must give is what `XpBackend` gives in float64, which in turn is compared with explicit
Jacobians in loops.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import layer_oracles
import numpy as np
import pytest
from kernel_cases import REFERENCE, TOLERANCE, same_bits_on_every_grid, send, traffic
from oracles import assert_same_bits
from test_gpu_step import counted, quiet

import nnx
from nnx.backends import Backend, XpBackend, get_backend
from nnx.backends.base import Array

gpu = pytest.mark.gpu
EPS = 1e-5
KINDS = ["layer", "rms", "batch", "batch, evaluated"]
SMALL = [(1, 1), (2, 3), (3, 31), (2, 32), (7, 33), (9, 257), (130, 10), (5, 1000)]
# A warp's registers hold a row of 2 KiB and a block's one of 16 KiB; of more than 32 * 24 rows the
# sums are added up in two stages. Of a batch a block holds 1024 rows, 512 in float64.
WIDE, BEYOND, MANY = (17, 1032), (2, 4100), (800, 5)
TALL = (1030, 9)

Case = dict[str, Any]


def each(
    features: Sequence[Any], samples: Sequence[Any], kinds: Sequence[str] = KINDS
) -> pytest.MarkDecorator:
    """Shapes for normalizations over the features, and for those over the samples.

    One sample alone is for the others: its variance says nothing.
    """
    pairs = [
        (kind, shape)
        for kind in kinds
        for shape in (samples if kind.startswith("batch") else features)
        if kind != "batch" or shape[-2] > 1
    ]
    return pytest.mark.parametrize(("kind", "shape"), pairs, ids=str)


def case(kind: str, shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> Case:
    """Random arrays on the host: x and dy `(N, C)` or `(K, N, C)`, vectors `(C,)` or `(K, C)`."""
    vector = (*shape[:-2], shape[-1])
    arrays = {
        "x": 2 + 3 * rng.standard_normal(shape),
        "dy": rng.standard_normal(shape),
        "weight": rng.standard_normal(vector),
        "bias": rng.standard_normal(vector),
        "dweight": rng.standard_normal(vector),
        "dbias": rng.standard_normal(vector),
        "running_mean": rng.standard_normal(vector),
        "running_var": rng.uniform(0.5, 2, vector),
    }
    if kind == "rms":
        arrays["bias"] = arrays["dbias"] = None  # type: ignore[assignment]
    return {name: None if a is None else a.astype(dtype) for name, a in arrays.items()}


def on(backend: Backend, arrays: Case, dtype: Any = None) -> Case:
    """Copies of the arrays on a backend."""
    return {
        name: None if a is None else backend.asarray(a.copy(), dtype) for name, a in arrays.items()
    }


def run(
    backend: Backend,
    kind: str,
    a: Case,
    *,
    accumulate: tuple[bool, bool] = (False, False),
    need_dx: bool = True,
    eps: float = EPS,
) -> dict[str, np.ndarray]:
    """Forward and backward; everything that comes out, on the host."""
    training = kind == "batch"
    if kind.startswith("batch"):
        running = (a["running_mean"], a["running_var"])
        options: dict[str, Any] = {"eps": eps, "momentum": 0.3, "training": training}
        y, mean, rstd = backend.batch_norm(a["x"], a["weight"], a["bias"], *running, **options)
    else:
        y, mean, rstd = backend.layer_norm(
            a["x"], a["weight"], a["bias"], eps=eps, centered=kind == "layer"
        )
    gradients = (a["dweight"], a["dbias"])
    arguments = (a["dy"], a["x"], mean, rstd, a["weight"], *gradients)
    options = {"accumulate": accumulate, "need_dx": need_dx}
    if kind.startswith("batch"):
        dx = backend.batch_norm_backward(*arguments, training=training, **options)
    else:
        dx = backend.layer_norm_backward(*arguments, **options)
    found = {"y": y, "mean": mean, "rstd": rstd, "dx": dx}
    names = ["dweight", "dbias", *(["running_mean", "running_var"] if training else [])]
    found |= {name: a[name] for name in names}
    return {name: backend.to_numpy(v).copy() for name, v in found.items() if v is not None}


def agree(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], a: Case) -> None:
    """Equal up to the rounding of sums of n terms, of the size of what is added up in each."""
    dtype = a["x"].dtype

    def largest(b: np.ndarray | None) -> float:
        return 1.0 if b is None else float(np.max(np.abs(b), initial=1))

    # xhat is a difference times rstd, and dx one of terms of this size; either may cancel
    xhat = largest(expected["rstd"]) * largest(a["x"])
    size = {"y": xhat * largest(a["weight"]), "dweight": xhat}
    size["dx"] = xhat * largest(expected["rstd"]) * largest(a["dy"]) * largest(a["weight"])
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].dtype == dtype, name
        rtol, atol = (4 * math.sqrt(max(a["x"].shape)) * t for t in TOLERANCE[dtype])
        atol *= size.get(name, largest(wanted))
        np.testing.assert_allclose(actual[name], wanted, rtol=rtol, atol=atol, err_msg=name)


def check(kind: str, a: Case, there: Case | None = None, **options: Any) -> None:
    """The kernels on `there`, by default a copy of the case, against float64 on the host."""
    cuda = get_backend("cupy")
    there = on(cuda, a) if there is None else there
    before = {name: cuda.to_numpy(there[name]).copy() for name in ("x", "dy")}
    expected = run(REFERENCE, kind, on(REFERENCE, a, np.float64), **options)
    agree(run(cuda, kind, there, **options), expected, a)
    for name, copy in before.items():
        assert_same_bits(cuda.to_numpy(there[name]), copy)


# ---- values --------------------------------------------------------------------------------------


@each([*SMALL, (33, 4), (2, 5, 4)], [*SMALL, (33, 4), (2, 5, 4)])
def test_the_definition_agrees_with_jacobians_in_loops(
    kind: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    a = case(kind, shape, rng, np.float64)
    old = on(REFERENCE, a)
    found = run(REFERENCE, kind, a)
    for k in np.ndindex(shape[:-2]):
        statistics = (old["running_mean"][k], old["running_var"][k])
        wanted = layer_oracles.normalization(
            *(old["x"][k], old["dy"][k], old["weight"][k]),
            None if old["bias"] is None else old["bias"][k],
            EPS,
            over_samples=kind == "batch",
            centered=kind != "rms",
            statistics=statistics if kind == "batch, evaluated" else None,
        )
        for name, w in zip(("y", "dx", "dweight", "dbias"), wanted, strict=True):
            if name in found:
                np.testing.assert_allclose(found[name][k], w, rtol=1e-11, atol=1e-11, err_msg=name)
        if kind == "batch":
            unbiased = np.array([np.var(column, ddof=1) for column in old["x"][k].T])
            new = {"running_mean": old["x"][k].mean(axis=0), "running_var": unbiased}
            for name, value in new.items():
                np.testing.assert_allclose(found[name][k], 0.7 * old[name][k] + 0.3 * value)


@gpu
@each([*SMALL, WIDE, (3, 4096), BEYOND, MANY], [*SMALL, TALL, (2100, 3)])
def test_kernels_agree_with_the_definition(
    kind: str, shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    check(kind, case(kind, shape, rng, dtype))


@gpu
@each([(7, 33), (2, 5, 4)], [(7, 33), (2, 5, 4)])
def test_the_definition_runs_on_the_device_too(
    kind: str, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator
) -> None:
    """It takes over where the kernels don't compile."""
    plain, a = XpBackend(get_backend("cupy").xp), case(kind, shape, rng, dtype)
    plain.to_numpy = get_backend("cupy").to_numpy  # type: ignore[method-assign]
    agree(run(plain, kind, on(plain, a)), run(REFERENCE, kind, on(REFERENCE, a, np.float64)), a)


@gpu
@each([(7, 33), BEYOND], [(7, 33), TALL])
def test_gradients_are_added_or_not_made(
    kind: str, shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    for accumulate in ((True, True), (True, False), (False, True)):
        check(kind, case(kind, shape, rng, dtype), accumulate=accumulate)
    a = case(kind, shape, rng, dtype)
    check(kind, a, need_dx=False)
    for missing in (("dweight",), ("dbias",), ("weight", "bias", "dweight", "dbias")):
        b = a | dict.fromkeys(missing)
        check(kind, b)
        check(kind, b, need_dx=False)


@gpu
@each([(0, 5), (2, 0, 5)], [(0, 5), (2, 0, 5)])
def test_no_rows(kind: str, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> None:
    for accumulate in ((False, False), (True, True)):
        check(kind, case(kind, shape, rng, dtype), accumulate=accumulate)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_any_layout(kind: str, dtype: Any, rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    xp = cuda.xp

    def strided(b: Array) -> Array:
        wide = xp.full((2 * len(b), *b.shape[1:]), np.nan, b.dtype)
        wide[::2] = b
        return wide[::2]

    layouts: list[Callable[[Array], Array]] = [
        lambda b: send(b, 1),
        strided,
        lambda b: xp.asfortranarray(b),
        lambda b: cuda.asarray(b[::-1])[::-1],
        lambda b: xp.broadcast_to(b[:1], b.shape),
    ]
    for shape in ((5, 32), (6, 7)):
        a = case(kind, shape, rng, dtype)
        for layout in layouts:
            there = on(cuda, a)
            there |= {name: layout(there[name]) for name in ("x", "dy")}
            check(kind, a | {n: cuda.to_numpy(there[n]) for n in ("x", "dy")}, there)
        there = on(cuda, a)
        check(kind, a, {n: None if b is None else send(b, 1) for n, b in there.items()})


@gpu
@pytest.mark.parametrize("offset", [1e4, -1e4])
@each([(64, 64), BEYOND], [(64, 64), (5001, 3)], ["layer", "batch"])
def test_a_large_mean_leaves_the_digits_there_are(
    kind: str, shape: tuple[int, int], offset: float, dtype: Any, rng: np.random.Generator
) -> None:
    """The mean is known to a few ulp of 1e4, and so is each difference of deviation 1.

    E[x^2] - E[x]^2 would have errors of 1e8 ulp in the place of a variance of 1.
    """
    a = case(kind, shape, rng, dtype)
    a["x"] = (offset + rng.standard_normal(shape)).astype(dtype)
    cuda = get_backend("cupy")
    expected = run(REFERENCE, kind, on(REFERENCE, a, np.float64))
    actual = run(cuda, kind, on(cuda, a))
    ulp = float(np.spacing(dtype.type(1e4)))
    np.testing.assert_allclose(actual["mean"], expected["mean"], atol=4 * ulp)
    np.testing.assert_allclose(actual["rstd"], expected["rstd"], rtol=ulp)
    atol = 16 * ulp * float(np.max(np.abs(a["weight"])))
    np.testing.assert_allclose(actual["y"], expected["y"], atol=atol, rtol=16 * ulp)
    np.testing.assert_allclose(actual["dx"], expected["dx"], atol=atol, rtol=16 * ulp)


@gpu
@each([(6, 5), (3, 1030)], [(6, 5), (1030, 3)])
def test_what_is_not_finite_stays_where_the_definition_leaves_it(
    kind: str, shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    cuda = get_backend("cupy")
    for name, value in itertools.product(("x", "dy", "weight"), (np.nan, np.inf, -np.inf)):
        a = case(kind, shape, rng, dtype)
        a[name][-1 if name == "weight" else (1, 1)] = value
        with np.errstate(all="ignore"):
            expected = run(REFERENCE, kind, on(REFERENCE, a, np.float64))
        actual = run(cuda, kind, on(cuda, a))
        for key, wanted in expected.items():
            finite = np.isfinite(wanted)
            np.testing.assert_array_equal(np.isfinite(actual[key]), finite, err_msg=key)
            np.testing.assert_array_equal(actual[key][~finite], wanted[~finite], err_msg=key)


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_negative_zeros_and_constant_rows(kind: str, dtype: Any, rng: np.random.Generator) -> None:
    for value in (0.0, -0.0, 3.5):
        a = case(kind, (6, 33), rng, dtype)
        a["x"] = np.full_like(a["x"], value)
        check(kind, a)


@gpu
@pytest.mark.parametrize("shared", [False, True])
@each([(3, 6, 33), (2, *BEYOND), (2, *MANY)], [(3, 6, 33), (2, *TALL)])
def test_models_in_views_of_the_flat_vector(
    kind: str, shape: tuple[int, int, int], shared: bool, dtype: Any, rng: np.random.Generator
) -> None:
    """A row of the flat vector holds other parameters too; nobody may touch them."""
    cuda = get_backend("cupy")
    n_models, _, c = shape
    a = case(kind, shape, rng, dtype)
    if shared:
        a["x"] = np.broadcast_to(a["x"][0], shape)
    there = on(cuda, a)
    if shared:
        there["x"] = cuda.xp.broadcast_to(cuda.asarray(a["x"][0]), shape)
    flat = {}
    for i, name in enumerate(("weight", "bias", "dweight", "dbias")):
        if there[name] is None:
            continue
        flat[name] = cuda.xp.full((n_models, 4 * c + 64), 7, dtype)
        view = flat[name][:, i * c : (i + 1) * c]
        view[...] = there[name]
        there[name] = view
    for accumulate in ((False, False), (True, True)):
        check(kind, a, there, accumulate=accumulate)
        for i, name in enumerate(("weight", "bias", "dweight", "dbias")):
            if name in flat:
                rest = cuda.to_numpy(flat[name]).copy()
                rest[:, i * c : (i + 1) * c] = 7
                np.testing.assert_array_equal(rest, 7, err_msg=name)
                if name[0] == "d":
                    there[name][...] = cuda.asarray(a[name])
        for name in ("running_mean", "running_var"):
            there[name][...] = cuda.asarray(a[name])


@gpu
def test_vectors_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    cuda = get_backend("cupy")
    for kind in KINDS:
        there = on(cuda, case(kind, (5, 4), rng, np.float32))
        for name in ("weight", "dweight"):
            with pytest.raises(ValueError, match=r"vectors of shape \(4,\), got .*\(3,\)"):
                run(cuda, kind, there | {name: there[name][:3]})
        if kind.startswith("batch"):
            with pytest.raises(ValueError, match="expected an array of 4 elements"):
                run(cuda, kind, there | {"running_var": there["running_var"][:3]})
        there = on(cuda, case(kind, (2, 5, 4), rng, np.float32))
        there["dweight"] = cuda.xp.zeros((2, 9), np.float32)[:, :4]
        with pytest.raises(ValueError, match=r"rows \d elements apart|contiguous output"):
            run(cuda, kind, there)


@gpu
def test_evaluation_keeps_the_mean_it_used(rng: np.random.Generator) -> None:
    """Training between forward and backward changes the buffers, not what was saved."""
    for name in ("numpy", "cupy"):
        backend = get_backend(name)
        a = on(backend, case("batch", (5, 4), rng, np.float64))
        running = (a["running_mean"], a["running_var"])
        vectors = (a["weight"], a["bias"])
        options: dict[str, Any] = {"eps": EPS, "momentum": 0.3}
        _, mean, rstd = backend.batch_norm(a["x"], *vectors, *running, training=False, **options)
        kept = [backend.to_numpy(b).copy() for b in (mean, rstd)]
        np.testing.assert_array_equal(kept[0], backend.to_numpy(running[0]))
        backend.batch_norm(a["x"], *vectors, *running, training=True, **options)
        for b, copy in zip((mean, rstd), kept, strict=True):
            assert_same_bits(backend.to_numpy(b), copy)


# ---- order of sums -------------------------------------------------------------------------------


@gpu
@each([MANY, (26, 1032)], [(1030, 140)])
def test_sums_depend_on_the_shape_alone(
    kind: str,
    shape: tuple[int, int],
    dtype: Any,
    rng: np.random.Generator,
) -> None:
    """The same bits from run to run, from unaligned memory, and from a grid of other size."""
    cuda = get_backend("cupy")
    a = case(kind, shape, rng, dtype)
    first = run(cuda, kind, on(cuda, a))
    elsewhere = {n: None if b is None else send(b, 1) for n, b in a.items()}
    for found in (run(cuda, kind, on(cuda, a)), run(cuda, kind, elsewhere)):
        for name, b in first.items():
            assert_same_bits(found[name], b)
    same_bits_on_every_grid(lambda: list(run(cuda, kind, on(cuda, a)).values()))


@gpu
@each([(3, 5), (49, 12), (2, 1032), (800, 2)], [(3, 5), (70, 12), (1030, 2)])
def test_kernels_are_free_of_data_races(
    kind: str, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    cudasim = pytest.importorskip("cudasim", reason="the race check is the simulator's")
    cuda = get_backend("cupy")
    a = case(kind, shape, rng, np.float32)
    run(cuda, kind, on(cuda, a))  # compiled, and its tickets made
    with cudasim.option("racecheck", 1):
        run(cuda, kind, on(cuda, a))
        cuda.synchronize()


# ---- what they ask of the device -----------------------------------------------------------------


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("shape", [(512, 256), (128, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_moved(
    kind: str, shape: tuple[int, int], dtype: Any, rng: np.random.Generator
) -> None:
    """At most 1.1 times what there is to read and to write.

    Forward reads x and writes y; backward reads dy and x and writes dx: 2 and 3 times n C elements.
    With them go the statistics of each row, two vectors of n, written forward and read backward.
    Vectors no longer than a row don't count. In `layer_norm` every row reads those anew, bias and
    weight forward, weight backward, and in `batch_norm` each of the 8 warps of a block, which has
    all rows of its columns: weight, bias and, in evaluation, two statistics forward, and three
    backward. If n <= C the statistics of the rows are such vectors too; a warp that reads a number
    of one moves a sector, and up to 8 warps share a row.
    """
    pytest.importorskip("cudasim", reason="bytes are counted by the simulated device only")
    cuda = get_backend("cupy")
    n, c = shape
    there = on(cuda, case(kind, shape, rng, dtype))
    name = "batch_norm" if kind.startswith("batch") else "layer_norm"
    moved = traffic(lambda: run(cuda, kind, there), name)
    element, suffix = dtype.itemsize, {4: "f32", 8: "f64"}[dtype.itemsize]
    forward = f"{name}_apply_{suffix}" if kind == "batch, evaluated" else f"{name}_{suffix}"
    backward = f"{name}_backward_{suffix}"
    assert set(moved) == {forward, backward}
    statistics = {"layer": 2 * n, "rms": n}.get(kind, 0)
    vectors = {"layer": (2 * n, n), "rms": (n, n), "batch": (2 * 8, 3 * 8)}.get(
        kind, (4 * 8, 3 * 8)
    )
    warps = 1 if c * element <= 2048 else 8
    for kernel, passes, again in ((forward, 2, vectors[0]), (backward, 3, vectors[1])):
        minimum = element * (passes * n * c + (statistics if n > c else 0))
        counted_ = moved[kernel] - element * c * again
        if n <= c:
            counted_ -= 32 * statistics * (warps if passes == 3 else 1)
        assert counted_ <= 1.1 * minimum, (kernel, counted_ / minimum)


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("n_models", [None, 2])
@pytest.mark.parametrize(
    ("make", "n", "launches"),
    [
        (nnx.LayerNorm, 32, {"layer_norm_f32": 1, "layer_norm_backward_f32": 1}),
        (nnx.RMSNorm, 32, {"layer_norm_f32": 1, "layer_norm_backward_f32": 1}),
        (nnx.BatchNorm, 32, {"batch_norm_f32": 1, "batch_norm_backward_f32": 1}),
        (
            nnx.BatchNorm,
            1100,
            {
                "batch_norm_f32": 1,
                "batch_norm_apply_f32": 1,
                "batch_norm_backward_f32": 1,
                "batch_norm_backward_apply_f32": 1,
            },
        ),
    ],
)
def test_launches_of_a_step(
    make: Any, n: int, launches: dict[str, int], n_models: int | None
) -> None:
    """No allocation, no wait, no copy; and of the normalization's kernels no more than promised."""
    pytest.importorskip("cudasim", reason="launches are counted by the simulated device only")
    cuda, rng = get_backend("cupy"), np.random.default_rng(0)
    x = cuda.asarray(rng.standard_normal((n, 4)), np.float32)
    t = cuda.asarray(rng.integers(0, 3, n))
    options: dict[str, Any] = {"n_models": n_models}
    model = nnx.Sequential(
        nnx.Linear(4, 6, rng=rng, **options),
        make(6, **options),
        nnx.Linear(6, 3, rng=rng, **options),
    )
    loss = nnx.SoftmaxNLL(n_models=n_models)
    trainer = nnx.Trainer(model, loss, nnx.SGD(0.1), backend="cupy")
    trainer.train_step(x, t)
    with counted() as counts:
        trainer.train_step(x, t)
    found = {name: k for name, k in counts.launches.items() if "_norm_" in name}
    assert found == launches
    if n_models is None:  # batched products copy
        quiet(counts)
