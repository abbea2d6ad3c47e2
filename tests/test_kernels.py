"""The CUDA kernels as a whole: compiled for every architecture, launched with checked arguments.

`test_kernels_*.py` compare each kernel with its definition, `XpBackend` on NumPy in float64; the
loops in `oracles` check that one in turn.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnx.backends import XpBackend, get_backend
from nnx.backends.base import Groups
from nnx.initializers import zeros
from nnx.layers import Linear

gpu = pytest.mark.gpu
FILES = sorted(p.name for p in (Path(__file__).parent.parent / "backends/cuda").glob("*.cu"))


@gpu
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("file", FILES)
def test_nvrtc_compiles(file: str, arch: int) -> None:
    from cupy.cuda import nvrtc

    from nnx.backends.cupy_backend import source

    program = nvrtc.createProgram(source(file), file, (), ())
    try:
        nvrtc.compileProgram(program, ("-std=c++17", f"--gpu-architecture=compute_{arch}"))
        assert nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.unpoisoned
def test_overrides_have_the_signature_of_their_definition() -> None:
    from nnx.backends.base import Backend
    from nnx.backends.cupy_backend import CupyBackend
    from nnx.backends.numpy_backend import NumpyBackend

    names = [n for n, f in vars(XpBackend).items() if inspect.isfunction(f) and n[0] != "_"]
    assert "softmax_nll" in names
    for name in names:
        expected = inspect.signature(getattr(XpBackend, name))
        for other in (Backend, NumpyBackend, CupyBackend):
            assert inspect.signature(getattr(other, name)) == expected, (other, name)


# ---- the launch helper -------------------------------------------------------------------------


@gpu
def test_the_launch_helper_refuses_what_a_kernel_would_misread() -> None:
    cuda: Any = get_backend("cupy")
    xp = cuda.xp
    f32, f64 = np.dtype(np.float32), np.dtype(np.float64)
    x, mask = xp.zeros(64, f32), xp.zeros(2, np.uint32)
    wide = xp.zeros(64, f64)

    def launch(y: Any, m: Any, x: Any, n: int = 64) -> Callable[[], None]:
        return lambda: cuda._launch("relu", f32, n, (y, n), (m, 2), (x, n), n)

    for call, error, message in [
        (launch(x, mask, wide), TypeError, "float32, got float64"),
        (launch(x, mask.astype(np.int32), x), TypeError, "uint32, got int32"),
        (launch(x, mask, x[:63]), ValueError, "64 elements, got .63,"),
        (launch(xp.zeros(128, f32)[::2], mask, x), ValueError, "contiguous output"),
    ]:
        with pytest.raises(error, match=message):
            call()
    launch(x, mask, x)()


@gpu
def test_no_kernel_is_compiled_before_it_is_used() -> None:
    import subprocess
    import sys

    code = (
        "import nnx, nnx.backends.cupy_backend as c; nnx.get_backend('cupy');"
        "assert c._load.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@gpu
def test_the_whole_step_is_free_of_data_races(rng: np.random.Generator) -> None:
    cudasim = pytest.importorskip("cudasim", reason="the race check is the simulator's")
    cuda = get_backend("cupy")
    layer = Linear(5, 33, initializer=zeros).to(cuda)
    logits = cuda.asarray(rng.standard_normal((9, 5)), np.float32)
    labels = cuda.asarray(rng.integers(0, 5, 9))
    assert layer.bias is not None
    state = cuda.step_state()
    state.plan(np.full(4, 0.1), dtype=np.dtype(np.float32), order=np.arange(9))
    flat = cuda.xp.zeros((1, 640), np.float32)
    groups = Groups([(0, 640, 1.0, 1.0)], cuda)
    total = cuda.xp.zeros((), np.int64)
    cuda.softmax_nll(logits, labels)  # compiled, and its ticket made
    with cudasim.option("racecheck", 1):
        z = cuda.asarray(rng.standard_normal((9, 33)), np.float32)
        y, mask = cuda.bias_relu(z, layer.bias.value)
        cuda.bias_relu_backward(y, mask, layer.bias.grad)
        loss, _ = cuda.softmax_nll(logits, labels)
        soft = cuda.asarray(rng.uniform(0, 1, logits.shape), np.float32)
        for target in (labels, soft):
            cuda.softmax_nll(
                logits, target, class_weight=soft[0], label_smoothing=0.1, ignore_index=1
            )
        cuda.dropout(y, 0.5, seed=0, stream=0, use=0, state=state)
        cuda.gather_rows([logits, labels], state, 3, 3)
        cuda.count_correct(logits, labels, total)
        m, v = cuda.xp.zeros_like(flat), cuda.xp.zeros_like(flat)
        options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        cuda.adam(flat, flat, m, v, groups, state, loss[None], **options)
        cuda.synchronize()
