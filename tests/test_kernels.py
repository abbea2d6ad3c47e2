"""The CUDA kernels as a whole: launched with checked arguments, compiled when used.

`test_kernels_*.py` compare each kernel with its definition, `XpBackend` on NumPy in float64; the
loops in `oracles` check that one in turn.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnx.backends import XpBackend, get_backend

gpu = pytest.mark.gpu


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
