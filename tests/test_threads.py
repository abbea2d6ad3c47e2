"""Threads chosen by the size of the work, and put back."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import nnx
from nnx.backends.numpy_backend import CPU, THREADS
from nnx.backends.threads import SMALL, TINY, Threads

needs_openblas = pytest.mark.skipif(not THREADS.blas, reason="this NumPy has another BLAS")


class Fake(Threads):
    """Threads of a BLAS that is a number."""

    def __init__(self, n: int, most: int = 1 << 30) -> None:
        super().__init__()
        self.n, self._most = n, most
        self._get, self._set = lambda: self.n, lambda n: setattr(self, "n", n)


def test_small_work_has_one_thread_and_large_work_those_that_were_set() -> None:
    threads = Fake(4)
    with threads.of(SMALL):
        assert threads.n == 1
        with threads.of(SMALL + 1):
            assert threads.n == 4
        assert threads.n == 1
    assert threads.n == 4


def test_nothing_is_raised_above_the_limit_and_all_is_put_back_on_errors() -> None:
    threads = Fake(4, most=2)
    seen = []

    def work() -> None:
        with threads.of(SMALL + 1):
            seen.append(threads.n)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert seen == [2]
    assert threads.n == 4
    threads = Fake(1, most=8)
    with threads.of(SMALL + 1):
        assert threads.n == 1


def test_blocks_that_overlap_in_two_threads_end_where_they_began() -> None:
    threads = Fake(4)
    first, second = threads.of(1), threads.of(1)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert threads.n == 1
    second.__exit__()
    assert threads.n == 4


def _trainer(width: int) -> tuple[nnx.Trainer, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((64, 16), np.float32), rng.integers(0, 10, 64)
    trainer = nnx.Trainer(nnx.mlp([16, width, 10]), nnx.SoftmaxNLL(), nnx.SGD(0.01))
    return trainer, x, t


@needs_openblas
def test_the_trainer_sets_them_and_puts_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    n = [3]
    monkeypatch.setattr(THREADS, "_get", lambda: n[-1])
    monkeypatch.setattr(THREADS, "_set", n.append)
    monkeypatch.setattr(THREADS, "_most", 1 << 30)
    small, x, t = _trainer(8)
    calls: list[Callable[[], Any]] = [
        lambda: small.fit(x, t, epochs=1),
        lambda: small.train_step(x, t),
        lambda: small.evaluate(x, t),
        lambda: small.predict(x),
    ]
    for call in calls:
        del n[1:]
        call()
        assert n == [3, 1, 3]
    with pytest.raises(ValueError, match="expected"):
        small.fit(x[:, :5], t, epochs=1)
    assert n[-1] == 3
    wide, x, t = _trainer(SMALL // 1024)
    del n[1:]
    wide.train_step(x, t)
    assert n == ([3, 1, 3] if THREADS._cuts else [3])
    tiny, x, t = _trainer(1)  # of which nothing would take a second thread
    assert tiny.vector.value.size * 16 <= TINY
    del n[1:]
    tiny.train_step(x[:16], t[:16])
    assert n == [3]


@needs_openblas
def test_they_are_the_threads_of_numpys_openblas() -> None:
    def found() -> list[int]:
        return [
            pool["num_threads"]
            for pool in threadpoolctl.threadpool_info()
            if "numpy.libs" in pool["filepath"] or ".dylibs" in pool["filepath"]
        ]

    before = found()
    with THREADS.of(1):
        assert found() == [1]
    assert found() == before


def _child(code: str, **environment: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-c", f"import json, nnx\n{code}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return json.loads(run.stdout) if run.returncode == 0 else run.stderr


def test_nnx_num_threads_limits_both() -> None:
    code = (
        "from nnx.backends.numpy_backend import THREADS as t\n"
        "with t.of(1 << 40): inside = t._get()\n"
        "print(json.dumps([t.limit, inside, t._kernels_now[0], t.blas and not t._cuts]))"
    )
    limit, inside, _, several = _child(code, NNX_NUM_THREADS="1")
    assert (limit, inside) == (1, 1)
    found = _child(code, NNX_NUM_THREADS="3", OPENBLAS_NUM_THREADS="2")
    assert found[:2] == [3, 2 if several else 1]
    assert "NNX_NUM_THREADS: expected an integer" in _child(code, NNX_NUM_THREADS="two")


@needs_openblas
@pytest.mark.kernels
def test_products_are_cut_within_a_block_and_nowhere_else() -> None:
    code = (
        "import numpy as np\n"
        "from nnx.backends import get_backend\n"
        "from nnx.backends.numpy_backend import CPU, THREADS as t\n"
        "a = np.random.default_rng(0).standard_normal((300, 300)).astype('f')\n"
        "cut = lambda: CPU.gemm(a, a, np.empty_like(a), False, None, False)\n"
        "found = [cut()]\n"
        "with t.of(1 << 40): found += [cut(), t._get()]\n"
        "with t.of(1): found += [cut(), t._get()]\n"
        "print(json.dumps([*found, cut(), t._get()]))"
    )
    found = _child(code, NNX_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2")
    assert found == [False, True, 1, True, 1, False, 2]


@pytest.mark.kernels
def test_the_kernels_follow() -> None:
    cpu: Any = CPU
    with THREADS.of(1):
        assert cpu.info()["threads"] == 1
    if cpu.info()["openmp"]:
        assert cpu.info()["threads"] == THREADS.limit


def test_two_trainers_in_two_threads_leave_them_as_they_were() -> None:
    before = THREADS._get()

    def train(width: int) -> list[float]:
        trainer, x, t = _trainer(width)
        return [float(trainer.train_step(x, t)) for _ in range(50)]

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(train, [4, 5, 4, 5]))
    assert runs[0] == runs[2]
    assert runs[1] == runs[3]
    assert THREADS._get() == before
