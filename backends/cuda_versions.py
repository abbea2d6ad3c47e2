"""Which CuPy, CUDA and driver are here, and which of them doesn't fit: one message for the user."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
"""Distributions that install a module `cupy`; two of them overwrite each other's files."""
DRIVERS = {13: 580, 12: 525}
"""The oldest driver of each CUDA version that there is an extra for; the newest version first."""
INSTALL = "pip install 'nnx-xp[cuda{}]'"


@dataclass(frozen=True)
class CudaVersions:
    """What is installed here. A number is as CUDA has it, 12040 for 12.4; None if unknown.

    Attributes:
        packages: Distributions of CuPy and their versions.
        cupy: Version of the CuPy that was imported; None if none can be.
        built: The CUDA version CuPy was built for.
        runtime: CUDA's runtime library, part of CuPy.
        driver: The newest CUDA version that the driver runs; 0 without a driver.
        nvrtc: The compiler of kernels.
        headers: CUDA's headers, which CuPy's own kernels include.
        architectures: Compute capabilities that NVRTC compiles for, 80 for 8.0.
        capability: Compute capability of the device.
    """

    packages: dict[str, str]
    cupy: str | None = None
    built: int | None = None
    runtime: int | None = None
    driver: int | None = None
    nvrtc: int | None = None
    headers: int | None = None
    architectures: tuple[int, ...] = ()
    capability: int | None = None

    def __str__(self) -> str:
        packages = [f"{name} {version}" for name, version in self.packages.items()]
        facts = {
            "built for CUDA": self.built,
            "runtime": self.runtime,
            "driver for CUDA": self.driver,
            "NVRTC": self.nvrtc,
            "headers": self.headers,
        }
        known = [f"{what} {shown(n)}" for what, n in facts.items() if n]
        if self.capability:
            known.append(f"compute capability {self.capability // 10}.{self.capability % 10}")
        return ", ".join([" and ".join(packages) or f"CuPy {self.cupy or 'not installed'}", *known])


def shown(version: int | None) -> str:
    """`"12.4"` for 12040."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else "unknown"


def cuda_versions(device: int = 0) -> CudaVersions:
    """What can be found out without using the device; nothing here raises."""
    packages = {}
    for name in PACKAGES:
        version = _ask(functools.partial(importlib.metadata.version, name))
        if version is not None:
            packages[name] = version
    try:
        import cupy
        from cupy.cuda import driver, nvrtc, runtime
    except Exception:  # however its import fails
        return CudaVersions(packages)
    compiler = _ask(nvrtc.getVersion)
    return CudaVersions(
        packages,
        cupy=_ask(lambda: str(cupy.__version__)),
        built=_ask(lambda: int(driver.get_build_version())),
        runtime=_ask(lambda: int(runtime.runtimeGetVersion())),
        driver=_ask(lambda: int(runtime.driverGetVersion())),
        nvrtc=compiler and 1000 * compiler[0] + 10 * compiler[1],
        headers=_ask(_headers),
        architectures=_ask(lambda: tuple(nvrtc.getSupportedArchs())) or (),
        capability=_ask(lambda: int(cupy.cuda.Device(device).compute_capability)),
    )


def explain(error: object, versions: CudaVersions) -> str:
    """Why CuPy fails with `error`: what doesn't fit, what to do, what was found, the error."""
    reason = _mismatch(str(error), versions)
    text = " ".join(str(error).split())
    if not versions.packages and text == "No module named 'cupy'":
        return reason  # that is all there is to say
    return f"{reason}. Found: {versions}. The error: {text or type(error).__name__}"


def _mismatch(error: str, v: CudaVersions) -> str:
    """What doesn't fit, and what to do."""
    extra = v.built // 1000 if v.built and v.built // 1000 in DRIVERS else max(DRIVERS)
    fits = next((major for major in DRIVERS if (v.driver or 0) >= 1000 * major), None)
    any_extra = " or ".join(
        f"{INSTALL.format(m)} (driver {n} or later)" for m, n in DRIVERS.items()
    )
    if len(v.packages) > 1:
        return (
            f"{' and '.join(v.packages)} are installed together and overwrite each other's files; "
            f"pip uninstall {' '.join(v.packages)}, then {INSTALL.format(fits or extra)}"
        )
    if v.cupy is None:
        return (
            f"CuPy is installed, but its import fails; {any_extra}"
            if v.packages
            else f"CuPy isn't installed; {any_extra}"
        )
    if v.driver == 0:
        return (
            "there is no NVIDIA driver here; check it with nvidia-smi (a container needs "
            "--gpus all), or use backend='numpy'"
        )
    if v.driver and v.built and v.driver // 1000 < v.built // 1000:
        update = f"update the driver to {DRIVERS.get(v.built // 1000, 'a newer one')} or later"
        other = fits and f", or pip uninstall {' '.join(v.packages)} and {INSTALL.format(fits)}"
        return (
            f"the driver runs CUDA up to {shown(v.driver)}, but this CuPy is built for "
            f"CUDA {shown(v.built)}; {update}{other or ''}"
        )
    if "NoDevice" in error:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "the driver finds no device" + (
            "; check it with nvidia-smi"
            if hidden is None
            else f"; CUDA_VISIBLE_DEVICES={hidden!r} may hide it"
        )
    if v.nvrtc is None:
        return (
            "NVRTC, the compiler of kernels, isn't found or can't be loaded; "
            f"{INSTALL.format(extra)} brings it"
        )
    if v.built and v.nvrtc // 1000 != v.built // 1000:
        return (
            f"this CuPy is built for CUDA {shown(v.built)}, but finds NVRTC {shown(v.nvrtc)}; "
            f"{INSTALL.format(extra)} brings the one that fits"
        )
    if v.capability and v.architectures and v.capability < min(v.architectures):
        return (
            f"CUDA {shown(v.nvrtc)} no longer supports this device's compute capability; "
            f"pip uninstall {' '.join(v.packages)} and {INSTALL.format(min(DRIVERS))}"
        )
    if v.capability and v.architectures and v.capability > max(v.architectures):
        return (
            f"NVRTC {shown(v.nvrtc)} is older than this device; "
            f"{INSTALL.format(fits or extra)} --upgrade --upgrade-strategy eager"
        )
    where = os.environ.get("CUDA_PATH")
    unset = f", after unsetting CUDA_PATH={where}" if where else ""
    if v.headers is None and "header" in error:
        return f"CUDA's headers aren't found; {INSTALL.format(extra)} brings them{unset}"
    if v.headers is not None and v.headers // 1000 != v.nvrtc // 1000:
        return (
            f"NVRTC {shown(v.nvrtc)} gets CUDA's headers {shown(v.headers)}; "
            f"{INSTALL.format(extra)} brings those that fit{unset}"
        )
    return "the versions fit each other; check the device with nvidia-smi"


def _headers() -> int | None:
    """Version of the headers that CuPy gives to NVRTC; found the way it finds them."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    text = Path(folder, "cuda_runtime_api.h").read_text(errors="replace") if folder else ""
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text)
    return int(found[1]) if found else None


def _ask(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception:  # whatever is broken is what the message is about
        return None
