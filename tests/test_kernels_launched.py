"""Every kernel is launched once, without data races; and what happens if a file doesn't compile."""

import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cuda_compilers import FILES
from kernel_calls import CALLS
from kernel_cases import REFERENCE

import nnx
from nnx.backends import Backend, BackendUnavailable, cupy_backend, get_backend
from nnx.backends.cupy_backend import _KERNELS, _SUFFIX, CupyBackend

pytestmark = pytest.mark.gpu
F32 = np.dtype(np.float32)
KERNELS = {
    name + suffix
    for name, (_, signature) in _KERNELS.items()
    for suffix in (_SUFFIX.values() if "T" in signature else [""])
}


def run(b: Backend, name: str, dtype: Any) -> list[np.ndarray]:
    results = CALLS[name](b, dtype, np.random.default_rng(4))
    return [b.to_numpy(a) for a in results]


def assert_agrees(results: list[np.ndarray], name: str, dtype: Any) -> None:
    """Compare with the definition of the operation, computed by NumPy in the same dtype.

    Sums of either sign end near 0 at times: what is off by rounding is small beside the largest.
    """
    expected = run(REFERENCE, name, dtype)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.dtype == wanted.dtype
        size = np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
        np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=rtol * size, err_msg=name)


# ---- races -------------------------------------------------------------------------------------


@functools.cache
def raced(name: str, dtype: Any) -> tuple[list[np.ndarray], frozenset[str]]:
    """Results of a call under the race check, which raises if it finds one; and its kernels."""
    import cudasim

    cuda = get_backend("cupy")
    run(cuda, name, dtype)  # compiled, and its tickets made
    cudasim.reset()
    try:
        with cudasim.option("racecheck", 1):
            results = run(cuda, name, dtype)
            cuda.synchronize()
        return results, frozenset(cudasim.stats()["kernels"])
    finally:
        cudasim.clear_fault()


@pytest.mark.parametrize("name", CALLS)
def test_no_kernel_has_a_data_race(name: str, dtype: Any) -> None:
    pytest.importorskip("cudasim", reason="the race check is the simulator's")
    results, _ = raced(name, dtype)
    assert_agrees(results, name, dtype)


def test_every_kernel_of_the_table_is_launched() -> None:
    pytest.importorskip("cudasim", reason="only the simulator tells what was launched")
    launched = {k for name in CALLS for dtype in _SUFFIX for k in raced(name, dtype)[1]}
    missing = KERNELS - launched
    assert not missing, f"extend tests/kernel_calls.py by calls that launch {sorted(missing)}"


# ---- a file that doesn't compile ---------------------------------------------------------------


@pytest.fixture(params=FILES)
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Break each file in turn, until the test's end."""
    source = cupy_backend.source

    def text(name: str) -> str:
        return source(name) + ("\nbroken on purpose;" if name == request.param else "")

    def forget() -> None:
        cupy_backend._load.cache_clear()
        cupy_backend._compiles.cache_clear()

    monkeypatch.setattr(cupy_backend, "source", text)
    monkeypatch.delenv("NNX_STRICT", raising=False)
    forget()
    yield request.param
    forget()


def assert_one_warning(caught: list[warnings.WarningMessage], file: str) -> None:
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert re.search(rf"kernels of {file} .*\({file}\(\d+\): error: .*", str(warning.message))
    assert "\n" not in str(warning.message)


def test_operations_of_a_file_that_does_not_compile_run_as_plain_cupy(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    launch = CupyBackend._launch

    def recorded(self: CupyBackend, name: str, *args: Any, **options: Any) -> None:
        launched.append(name)
        launch(self, name, *args, **options)

    monkeypatch.setattr(CupyBackend, "_launch", recorded)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = {name: run(get_backend("cupy"), name, F32) for name in CALLS}
    assert_one_warning(caught, broken)
    for name, result in results.items():
        assert_agrees(result, name, F32)
    assert launched
    assert not [name for name in launched if _KERNELS[name][0] == broken]


def test_training_goes_on_where_a_file_does_not_compile(broken: str) -> None:
    rng = np.random.default_rng(8)
    x, labels = rng.standard_normal((14, 5)).astype(np.float32), rng.integers(0, 3, 14)

    def losses(backend: str) -> list[float]:
        rng = np.random.default_rng(9)
        model = nnx.Sequential(
            *(nnx.Linear(5, 8, rng=rng), nnx.ReLU(), nnx.Dropout(0.5), nnx.LayerNorm(8)),
            *(nnx.Linear(8, 8, rng=rng), nnx.BatchNorm(8), nnx.ReLU(), nnx.Linear(8, 3, rng=rng)),
        )
        trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(0.01), seed=1, backend=backend)
        return trainer.fit(x, labels, epochs=3, batch_size=4, metrics=[nnx.Accuracy()])["loss"]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = losses("cupy")
    if caught:  # this network doesn't need every file
        assert_one_warning(caught, broken)
    np.testing.assert_allclose(found, losses("numpy"), rtol=1e-4)


def test_with_nnx_strict_that_is_an_error(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNX_STRICT", "1")
    failed = []
    for name in CALLS:
        try:
            run(get_backend("cupy"), name, F32)
        except BackendUnavailable as error:
            failed.append(str(error))
    assert failed
    assert all(broken in message and "broken" in message for message in failed)


def test_an_expression_that_does_not_compile_runs_as_plain_cupy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda: Any = get_backend("cupy")
    x = np.array([-1.0, 0.5, 2.0], np.float32)
    monkeypatch.setattr(cuda, "_plain", set())
    monkeypatch.setattr(cupy_backend, "_ELEMENTWISE_PREAMBLE", "broken on purpose;")
    monkeypatch.delenv("NNX_STRICT", raising=False)
    cupy_backend._elementwise.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                out = cuda.xp.empty(3, np.float32)
                cuda.elementwise("where(x > a, x, 3 * x)", out, x=cuda.asarray(x), a=0.0)
                np.testing.assert_array_equal(cuda.to_numpy(out), [-3.0, 0.5, 2.0])
        (warning,) = caught
        assert re.search(r"where\(x > a, x, 3 \* x\).*error: ", str(warning.message))
        monkeypatch.setenv("NNX_STRICT", "1")
        with pytest.raises(BackendUnavailable, match="x \\+ 2"):
            cuda.elementwise("x + 2", out, x=cuda.asarray(x))
    finally:
        cupy_backend._elementwise.cache_clear()


@pytest.mark.parametrize("status", [2, 700])  # out of memory, illegal address
def test_a_fault_of_the_device_is_not_taken_for_one_of_the_file(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cupy.cuda.runtime import CUDARuntimeError

    def fail(*args: Any) -> None:
        raise CUDARuntimeError(status)

    cupy_backend._compiles.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(cupy_backend, "_load", fail)
        with pytest.raises(CUDARuntimeError):
            run(get_backend("cupy"), "relu", F32)
    run(get_backend("cupy"), "relu", F32)  # and isn't remembered
