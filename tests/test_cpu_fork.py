"""The C kernels in a forked child, and in two Python threads at once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from kernel_cases import REFERENCE

from nnx.backends import get_backend, numpy_backend

pytestmark = pytest.mark.kernels

LARGE = 1 << 20
"""Elements that are split among threads."""

CHILD = f"""if True:
    import multiprocessing, os, signal, sys
    import numpy as np
    import nnx
    from nnx.backends import numpy_backend

    cpu, backend = numpy_backend.CPU, numpy_backend.NUMPY
    x = np.linspace(-1, 1, {LARGE}, dtype=np.float32)
    t = np.arange(128) % 10

    def work():
        np.testing.assert_array_equal(backend.relu(x)[0], np.maximum(x, 0))
        model = nnx.mlp([512, 512, 10], seed=0)
        nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(lr=0.1), seed=0).fit(
            x[: 128 * 512].reshape(128, 512), t, epochs=1, batch_size=64
        )

    def child():
        signal.alarm(120)  # ends a child that hangs
        work()
        assert cpu.info()["threads"] == 1, cpu.info()

    cpu.set_num_threads(2)
    work()  # wakes OpenMP's threads, which a fork doesn't take along
    cpu.set_num_threads(2)
    backend.relu(x)
    if sys.argv[1] == "fork":
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child()
                status = 0
            finally:
                os._exit(status)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    else:
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        ended = process.exitcode
    work()  # the parent goes on as before
    sys.exit("the child hung" if ended == -signal.SIGALRM else ended)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("way", ["fork", "multiprocessing"])
def test_a_forked_child_does_not_wait_for_the_threads_of_its_parent(way: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, way]  # 3.12 warns of forks with threads
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("n_threads", [1, 2])
def test_python_threads_do_not_disturb_each_other(n_threads: int, dtype: Any) -> None:
    cpu: Any = numpy_backend.CPU
    backend = get_backend("numpy")

    def calls(seed: int) -> None:
        rng = np.random.default_rng(seed)
        shapes = [(3, 5), (200, 300), (512, 512)]
        cases = [[rng.standard_normal(s, dtype=dtype) for s in (s, s, s[1])] for s in shapes]
        for z, dy, bias in 20 * cases:
            results = []
            for side in (backend, REFERENCE):
                dbias = np.full_like(bias, np.nan)
                y, mask = side.bias_relu(z.copy(), bias)
                results.append([y, side.bias_relu_backward(dy, mask, dbias), dbias])
            for a, b in zip(*results, strict=True):
                np.testing.assert_array_equal(a, b)

    before = cpu.info()["threads"]
    cpu.set_num_threads(n_threads)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(calls, [1, 2]))
    finally:
        cpu.set_num_threads(before)
