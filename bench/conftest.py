"""What every benchmark shares: the backends, the sizes, the clock, and what is written down.

`NNX_BENCH_SMOKE=1` shrinks the sizes until a run takes seconds: it proves that the benchmarks work,
not how fast anything is. Nothing that names the machine or its user gets into a saved file.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest

import nnx
from nnx.backends import Array, Backend, BackendUnavailable, get_backend
from nnx.backends.arena import Arena

Benchmark: TypeAlias = Any  # pytest-benchmark's fixture; the package has no types
Run: TypeAlias = Callable[..., None]

SMOKE = os.environ.get("NNX_BENCH_SMOKE") == "1"


@functools.cache
def _missing_device() -> str | None:
    """Why CuPy's benchmarks can't run here, or None."""
    try:
        get_backend("cupy")
    except BackendUnavailable as error:
        return str(error)
    return None


@pytest.hookimpl(tryfirst=True)  # before any fixture: one made and not used is a warning
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without a device CuPy's benchmarks are skipped; with NNX_REQUIRE_GPU=1 they fail."""
    if item.get_closest_marker("gpu") is None:
        return
    reason = _missing_device()
    if reason is not None:
        if os.environ.get("NNX_REQUIRE_GPU") == "1":
            pytest.fail(f"NNX_REQUIRE_GPU=1, but {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn."""
    return get_backend(request.param)


@pytest.fixture
def shrink() -> Callable[[int], int]:
    """Makes a size small in a smoke run and leaves it alone otherwise."""
    return lambda n: min(n, 16) if SMOKE else n


@pytest.fixture
def random(backend: Backend) -> Callable[..., Array]:
    """Draws float32 arrays N(0, 1) on the host, the same on every backend, and sends them there."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return backend.asarray(rng.standard_normal(shape, dtype=np.float32))

    return draw


@pytest.fixture
def run(benchmark: Benchmark, backend: Backend) -> Run:
    """Times a call to its end on the device, and writes down what the figure means.

    The first call, which compiles kernels and allocates, isn't timed. Every call runs as in a
    training step: the backend takes its memory from an arena. Rates follow from the median.
    """

    def run(
        call: Callable[[], object],
        *,
        group: str,
        samples: int | None = None,
        flops: int | None = None,
        nbytes: int | None = None,
    ) -> None:
        """Time `call`.

        Args:
            call: What to time.
            group: Rows of one group stand side by side in the report; the backend is appended.
            samples: Samples that a call processes.
            flops: Floating-point operations of a call.
            nbytes: Bytes that a call has to move: each distinct input once, each output once.
        """
        arena = Arena(backend.xp, backend.device)

        def timed() -> None:
            with arena.step("bench"):
                call()
            backend.synchronize()

        with backend.activate():
            for _ in range(2):  # the second one finds the arena grown
                timed()
            benchmark.group = f"{group}, {backend.name}"
            benchmark.extra_info.update(_environment(backend))
            benchmark(timed)
        if benchmark.stats is None:  # --benchmark-disable
            return
        median = benchmark.stats.stats.median
        rates = {
            "samples_per_second": (samples, 1.0),
            "GFLOP_per_second": (flops, 1e-9),
            "GB_per_second": (nbytes, 1e-9),
        }
        for name, (amount, unit) in rates.items():
            if amount is not None:
                benchmark.extra_info[name] = float(f"{amount * unit / median:.4g}")

    return run


def _environment(backend: Backend) -> dict[str, Any]:
    """Device, versions and threads: without them a figure means nothing."""
    found: dict[str, Any] = {"nnx": nnx.__version__, "numpy": np.__version__, "smoke": SMOKE}
    if backend.xp is np:
        build = np.show_config(mode="dicts")
        blas = build["Build Dependencies"]["blas"]
        threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
        return found | {
            "device": "CPU",
            "blas": f"{blas['name']} {blas['version']}",
            "threads": int(threads or os.cpu_count() or 1),
        }
    cupy = backend.xp
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return found | {
        "device": properties["name"].decode(),
        "cupy": cupy.__version__,
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
    }


# ---- what pytest-benchmark saves --------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Keep what explains a figure, and drop what names the machine or changes by the minute."""
    cpu = machine_info["cpu"]
    kept = ("brand_raw", "count", "l1_data_cache_size", "l2_cache_size", "l3_cache_size")
    explains = ("machine", "system", "python_implementation", "python_version")
    machine_info["cpu"] = {name: cpu[name] for name in kept if name in cpu}
    for name in set(machine_info) - {"cpu", *explains}:
        del machine_info[name]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Leave out the commit, which a file that is part of it can't know, and the single timings."""
    output_json["commit_info"] = {}
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
