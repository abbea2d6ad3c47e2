"""What the tests of the C kernels share. Their definition is `kernel_cases.REFERENCE`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nnx.backends import get_backend, numpy_backend
from nnx.backends.numpy_backend import KernelBackend, NumpyBackend


def instructions() -> list[str]:
    """The instruction sets whose kernels run on this processor, worst first."""
    cpu: Any = numpy_backend.CPU
    if cpu is None:
        return ["baseline"]
    best = cpu.info()["instructions"]
    found = [name for name in ("baseline", "avx2", "avx512") if cpu.use(name)]
    cpu.use(best)
    return found


def operations() -> list[str]:
    """Names of the operations that have C kernels."""
    named = [(name, value) for name, value in vars(KernelBackend).items() if callable(value)]
    return [name for name, _ in named if not name.startswith("_")]


@contextmanager
def only_kernels(name: str) -> Iterator[Any]:
    """The backend on the kernels of an instruction set; falling back on NumPy's bodies fails."""
    cpu: Any = numpy_backend.CPU
    best = cpu.info()["instructions"]
    assert cpu.use(name)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            for operation in operations():
                monkeypatch.setattr(NumpyBackend, operation, _declined(operation), raising=False)
            yield get_backend("numpy")
    finally:
        cpu.use(best)


def _declined(name: str) -> Any:
    def fail(*args: Any, **options: Any) -> None:
        pytest.fail(f"{name}: the kernel declined its arguments")

    return fail
