"""What a user reads where CuPy, CUDA and the driver don't fit each other. Versions are made up."""

import importlib.metadata
import sys
from dataclasses import replace
from typing import Any

import pytest

import nnx
from nnx.backends import cupy_backend
from nnx.backends.cuda_versions import CudaVersions, cuda_versions, explain, shown

FITTING = CudaVersions(
    {"cupy-cuda13x": "14.2.0"},
    cupy="14.2.0",
    built=13020,
    runtime=13020,
    driver=13000,
    nvrtc=13050,
    headers=13000,
    architectures=(75, 80, 86, 89, 90, 100, 120),
    capability=86,
)
TWELVE = replace(
    FITTING, packages={"cupy-cuda12x": "14.2.0"}, built=12090, runtime=12090, nvrtc=12090
)
CASES: dict[str, tuple[CudaVersions, str, list[str]]] = {
    "not installed": (
        CudaVersions({}),
        "No module named 'cupy'",
        ["isn't installed", "nnx-xp[cuda13]", "580", "nnx-xp[cuda12]", "525 or later)"],
    ),
    "import fails": (
        CudaVersions({"cupy-cuda13x": "14.2.0"}),
        "libfoo.so.1: cannot open",
        ["import fails", "cupy-cuda13x 14.2.0", "libfoo.so.1"],
    ),
    "two CuPys": (
        replace(FITTING, packages={"cupy-cuda12x": "13.6.0", "cupy-cuda13x": "14.2.0"}),
        "undefined symbol",
        [
            "cupy-cuda12x and cupy-cuda13x are installed together",
            "pip uninstall cupy-cuda12x cupy-cuda13x, then pip install 'nnx-xp[cuda13]'",
            "cupy-cuda12x 13.6.0 and cupy-cuda13x 14.2.0",
        ],
    ),
    "two CuPys, a driver for CUDA 12": (
        CudaVersions({"cupy": "14.0.0", "cupy-cuda12x": "14.2.0"}, cupy="14.2.0", driver=12080),
        "undefined symbol",
        ["then pip install 'nnx-xp[cuda12]'"],
    ),
    "no driver": (
        replace(FITTING, driver=0, capability=None),
        "cudaErrorInsufficientDriver",
        ["no NVIDIA driver", "nvidia-smi", "--gpus all", "NVRTC 13.5", "InsufficientDriver"],
    ),
    "the driver is older than CuPy's CUDA": (
        replace(FITTING, driver=12040, capability=None),
        "cudaErrorInsufficientDriver",
        [
            "the driver runs CUDA up to 12.4",
            "built for CUDA 13.2",
            "driver to 580 or later",
            "pip uninstall cupy-cuda13x and pip install 'nnx-xp[cuda12]'",
        ],
    ),
    "the driver is older than any CuPy's CUDA": (
        replace(TWELVE, driver=11080, capability=None),
        "cudaErrorInsufficientDriver",
        ["up to 11.8", "built for CUDA 12.9", "driver to 525 or later. Found"],
    ),
    "no device": (
        replace(FITTING, capability=None),
        "cudaErrorNoDevice: no CUDA-capable device is detected",
        ["finds no device; CUDA_VISIBLE_DEVICES='7' may hide it"],
    ),
    "no NVRTC": (
        replace(FITTING, nvrtc=None, architectures=()),
        'Failure finding "nvrtc"',
        ["NVRTC", "isn't found", "pip install 'nnx-xp[cuda13]' brings it"],
    ),
    "NVRTC of another CUDA": (
        replace(TWELVE, nvrtc=13050),
        "invalid device function",
        ["built for CUDA 12.9, but finds NVRTC 13.5", "'nnx-xp[cuda12]'"],
    ),
    "the device is older than the toolkit": (
        replace(FITTING, capability=61),
        "nvrtc: error: invalid value for --gpu-architecture",
        ["CUDA 13.5 no longer supports", "compute capability 6.1", "'nnx-xp[cuda12]'"],
    ),
    "the device is newer than the toolkit": (
        replace(TWELVE, driver=13000, nvrtc=12060, architectures=(50, 90), capability=120),
        "cudaErrorNoKernelImageForDevice",
        ["NVRTC 12.6 is older than this device", "--upgrade", "compute capability 12.0"],
    ),
    "no headers": (
        replace(FITTING, headers=None),
        "Failed to find CUDA headers",
        ["headers aren't found", "'nnx-xp[cuda13]'", "unsetting CUDA_PATH=/opt/cuda"],
    ),
    "headers of another CUDA": (
        replace(FITTING, headers=12040),
        'cuda_fp16.h(12): error: identifier "x" is undefined',
        ["NVRTC 13.5 gets CUDA's headers 12.4", "unsetting CUDA_PATH=/opt/cuda"],
    ),
    "nothing known": (
        FITTING,
        "out of\n  memory",
        ["fit each other", "nvidia-smi", "out of memory"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mismatch_is_explained_in_one_message(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda")
    versions, error, expected = CASES[case]
    message = explain(error, versions)
    assert "\n" not in message
    assert "None" not in message
    for part in expected:
        assert part in message


def test_without_cupy_there_is_no_more_to_say_unless_something_of_it_is_there() -> None:
    assert explain("No module named 'cupy'", CudaVersions({})).endswith("(driver 525 or later)")
    assert explain("No module named 'cupy._core'", CudaVersions({})).endswith("'cupy._core'")


def test_each_case_is_explained_in_words_of_its_own() -> None:
    messages = {
        explain(error, versions).split(". Found:")[0] for versions, error, _ in CASES.values()
    }
    assert len(messages) == len(CASES)


def test_what_was_found_names_every_version() -> None:
    assert str(FITTING) == (
        "cupy-cuda13x 14.2.0, built for CUDA 13.2, runtime 13.2, driver for CUDA 13.0, NVRTC 13.5, "
        "headers 13.0, compute capability 8.6"
    )
    assert str(CudaVersions({})) == "CuPy not installed"
    assert [shown(n) for n in (12040, 13000, None)] == ["12.4", "13.0", "unknown"]


def test_a_missing_cupy_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(importlib.metadata, "version", nothing)
    assert cuda_versions() == CudaVersions({})
    with pytest.raises(nnx.BackendUnavailable, match=r"CuPy isn't installed; .*\[cuda13\]"):
        cupy_backend.device_count()


def test_two_cupys_are_found_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"cupy-cuda12x": "13.6.0", "cupy-cuda13x": "14.2.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(nnx.BackendUnavailable, match="cupy-cuda12x and cupy-cuda13x"):
        cupy_backend.device_count()


@pytest.mark.nvrtc
def test_versions_are_found_without_a_device() -> None:
    versions = cuda_versions()
    assert versions.packages
    assert versions.cupy in versions.packages.values()
    for version in (versions.built, versions.runtime, versions.nvrtc):
        assert version is not None
        assert 12000 <= version < 20000
    assert 80 in versions.architectures


@pytest.mark.gpu
def test_versions_of_a_working_device_fit() -> None:
    versions = cuda_versions()
    assert versions.driver
    assert versions.headers
    assert (versions.capability or 0) >= 75
    assert "fit each other" in explain("", versions)


@pytest.mark.gpu
def test_a_device_that_runs_no_kernel_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image")

    import cupy

    monkeypatch.setattr(cupy, "ones", broken)
    monkeypatch.setattr(cupy_backend, "_backends", {})
    cupy_backend.probe.cache_clear()
    with pytest.raises(nnx.BackendUnavailable, match=r"NVRTC \d+\.\d.*RuntimeError: no kernel im"):
        nnx.get_backend("cupy")
    cupy_backend.probe.cache_clear()
