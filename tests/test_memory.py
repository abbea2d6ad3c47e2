"""Exhausted device memory: one clear error, the model as after its last whole step, and on it goes.

Failures are injected at every request to CuPy's pool, in this process; and at every `cudaMalloc`
of a process of its own, where the simulated device does it.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import nnx
from nnx.backends import OutOfMemory, get_backend

pytestmark = [pytest.mark.gpu, pytest.mark.unpoisoned]


@contextlib.contextmanager
def scarce(n: int) -> Iterator[list[int]]:
    """The `n`-th request to CuPy's pool and all later ones fail; counts them."""
    import cupy

    pool, sizes = cupy.get_default_memory_pool(), list[int]()

    def allocate(size: int) -> Any:
        sizes.append(size)
        if len(sizes) >= n:
            raise cupy.cuda.memory.OutOfMemoryError(size, pool.total_bytes(), 0)
        return pool.malloc(size)

    with cupy.cuda.using_allocator(allocate):
        yield sizes


def build() -> nnx.Layer:
    rng = np.random.default_rng(3)
    return nnx.Sequential(
        *(nnx.Linear(20, 24, rng=rng), nnx.BatchNorm(24), nnx.ReLU(), nnx.Dropout(0.2)),
        *(nnx.Linear(24, 16, rng=rng), nnx.LayerNorm(16), nnx.GELU(), nnx.Linear(16, 5, rng=rng)),
    )


def weights(model: nnx.Layer) -> list[np.ndarray]:
    """Parameters and running statistics."""
    return [nnx.backend_of(a).to_numpy(a).copy() for a in model.state().values()]


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.standard_normal((80, 20)), rng.integers(0, 5, 80)


def trainer_of(model: nnx.Layer, graph: bool) -> nnx.Trainer:
    return nnx.Trainer(
        model, nnx.SoftmaxNLL(), nnx.Adam(0.01, clip_norm=1.0), backend="cupy", graph=graph
    )


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.filterwarnings("ignore:Trainer. the step can't be captured:RuntimeWarning")
def test_every_request_may_fail(graph: bool) -> None:
    """80 samples in batches of 32, so with a short last one, twice: 6 steps."""
    x, t = data()

    class Keep(nnx.Callback):
        def __init__(self) -> None:
            self.after: list[list[np.ndarray]] = []

        def on_step_end(self, trainer: nnx.Trainer) -> None:
            self.after.append(weights(trainer.model))

    keep = Keep()
    reference = trainer_of(build(), graph)
    keep.after.append(weights(reference.model))
    reference.fit(x, t, epochs=2, batch_size=32, callbacks=[keep])
    places, n = set(), 0
    while True:
        n += 1
        trainer: nnx.Trainer | None = None
        model = build()
        try:
            with scarce(n) as sizes:
                trainer = trainer_of(model, graph)
                trainer.fit(x, t, epochs=2, batch_size=32)
        except OutOfMemory as error:
            message = str(error)
            assert re.search(
                r"[\d.]+ \w+ more were needed, [\d.]+ \w+ of [\d.]+ \w+ are free", message
            )
            assert "dtype='float32'" not in message  # it is already
            places.add(message.partition(":")[0])
            if trainer is None:
                steps = 0
                assert nnx.backend_of(model.state()["0.weight"]).name == "numpy"
            else:
                assert "the batch size is 32: choose a smaller one" in message
                steps = trainer.optimizer.state()["step"]
            for actual, expected in zip(weights(model), keep.after[steps], strict=True):
                np.testing.assert_array_equal(actual, expected)
            trainer = trainer or trainer_of(model, graph)
            trainer.fit(x, t, epochs=1, batch_size=16)  # there is room again
            assert np.isfinite(trainer.history["loss"]).all()
        else:
            break
    assert n > 20  # it did fail, in many places
    assert len(sizes) < n
    assert places == {"Trainer", "fit"}


def test_other_methods_say_who_too() -> None:
    x, t = data()
    cuda = get_backend("cupy")
    trainer = trainer_of(build(), graph=False)
    there = cuda.asarray(x, np.float32), cuda.asarray(t)
    calls: list[tuple[str, int, Callable[[], Any]]] = [
        ("evaluate", 40, lambda: trainer.evaluate(x, t, batch_size=40)),
        ("predict", 40, lambda: trainer.predict(x, batch_size=40)),
        ("train_step", 80, lambda: trainer.train_step(*there)),
    ]
    for name, size, call in calls:
        with scarce(1), pytest.raises(OutOfMemory, match=f"^{name}: .*batch size is {size}:"):
            call()
        call()


def test_a_model_that_finds_no_room_stays_where_it_is() -> None:
    for n in range(1, 100):
        model = nnx.Sequential(
            nnx.Linear(3, 4, rng=np.random.default_rng(0)), nnx.BatchNorm(4), nnx.ReLU()
        )
        before = {name: a.copy() for name, a in model.state().items()}
        failure = None
        try:
            with scarce(n):
                model.to("cupy")
        except Exception as error:
            failure = error
        if failure is None:
            break
        assert get_backend("cupy").out_of_memory(failure)
        for name, array in model.state().items():
            np.testing.assert_array_equal(array, before[name])
    assert n > 5


SCRIPT = """
import sys, numpy as np, nnx
rng = np.random.default_rng(0)
x, t = rng.standard_normal((64, 20)), rng.integers(0, 5, 64)
model = nnx.mlp([20, 33, 5], dropout=0.2)
try:
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.Adam(), backend="cupy")
    trainer.fit(x, t, epochs=2, batch_size=32)
except (nnx.OutOfMemory, nnx.BackendUnavailable) as error:
    sys.exit(f"{type(error).__name__}: {error}")
print("done")
"""


def test_every_cudamalloc_may_fail() -> None:
    pytest.importorskip("cudasim", reason="only the simulator refuses memory on request")
    for n in range(1, 40):
        environment = os.environ | {"CUDASIM_FAIL_MALLOC": f"{n}+", "CUDASIM_QUIET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
        )
        if done.stdout == "done\n":
            break
        assert done.returncode == 1, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert re.match(r"(OutOfMemory|BackendUnavailable): .*[Mm]emory", lines[0]), lines
    assert n > 2


def test_the_command_line_ends_with_one_line(tmp_path: Any, capsys: Any, monkeypatch: Any) -> None:
    from nnx.cli import main

    monkeypatch.chdir(tmp_path)
    with scarce(30):
        status = main(["train", "--backend", "cupy", "--epochs", "1", "--quiet"])
    said = capsys.readouterr().err
    assert status == 1
    assert re.fullmatch(r"nnx train: error: \w+: out of device memory: .*\n", said), said
