"""Fixtures for the whole suite, and the rule for tests that need a GPU, a compiler or PyTorch.

A test marked `gpu` is skipped with a reason where no device works, and fails there if
`NNX_REQUIRE_GPU=1`: a suite that skips in silence is green and proves nothing. `torch`, `nvrtc`,
`ptxas` and `kernels` likewise, with `NNX_REQUIRE_TORCH=1` and so on. CuPy is asked for a device
only when a test that needs one is about to run.
"""

import functools
import importlib
import os
from collections.abc import Iterator
from typing import Any

import cpu_kernels
import cuda_compilers
import numpy as np
import pytest
from kernel_cases import limit_grid

from nnx.backends import Backend, BackendUnavailable, available, get_backend, numpy_backend
from nnx.backends.base import Array, XpBackend


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "unpoisoned: leave new arrays as they come; for tests that count launches"
    )


@functools.cache
def _missing(marker: str) -> str | None:
    """Why tests with this marker can't run here, or None."""
    if marker == "torch":
        try:
            importlib.import_module("torch")
        except ImportError as error:
            return f"PyTorch can't be imported: {error}"
        return None
    if marker == "kernels":
        return None if numpy_backend.CPU is not None else "nnx.backends._cpu isn't built, or is off"
    if marker in ("nvrtc", "ptxas"):
        try:
            from cupy.cuda import nvrtc

            nvrtc.getVersion()
        except Exception as error:  # CuPy raises various types where NVRTC is missing
            return f"no NVRTC: {error}"
        program, reason = cuda_compilers.ptxas() if marker == "ptxas" else ("", "")
        return f"no ptxas: {reason}" if program is None else None
    try:
        if any(name.startswith("cupy") for name in available()):
            return None
        get_backend("cupy")
    except BackendUnavailable as error:
        return f"no CUDA device: {error}"
    return "no CUDA device: nnx.backends.available() names none"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in ("gpu", "torch", "nvrtc", "ptxas", "kernels"):
        variable = f"NNX_REQUIRE_{marker.upper()}"
        if item.get_closest_marker(marker) is None:
            continue
        reason = _missing(marker)
        if reason is None:
            continue
        if os.environ.get(variable) == "1":
            pytest.fail(f"{variable}=1, but {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn. Inputs go in by `backend.asarray`, results out by `to_numpy`."""
    return get_backend(request.param)


@pytest.fixture(params=cpu_kernels.instructions())
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The NumPy backend, on each set of C kernels that runs here and on nothing else."""
    with cpu_kernels.only_kernels(request.param) as backend:
        yield backend


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Any:
    """float32 and float64."""
    return np.dtype(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20240229)


@pytest.fixture(params=[None, 2], ids=["whole grid", "two blocks"])
def grids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid that a kernel asks for, and one that takes several passes."""
    if request.param:
        limit_grid(monkeypatch, request.param)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand out every new array full of NaN, extreme integers or True: nobody may rely on zeros."""
    if request.node.get_closest_marker("unpoisoned") is not None:
        return
    empty = XpBackend.empty

    def poisoned(self: XpBackend, shape: tuple[int, ...], dtype: Any) -> Array:
        array = empty(self, shape, dtype)
        kind = array.dtype.kind
        if kind == "f":
            array.fill(np.nan)
        elif kind == "b":
            array.fill(True)
        else:
            limits = np.iinfo(array.dtype)
            array.fill(limits.min if kind == "i" else limits.max)
        return array

    monkeypatch.setattr(XpBackend, "empty", poisoned)
