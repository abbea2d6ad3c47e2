"""A training step takes no memory: promise 3 on the CPU, by tracemalloc and by address."""

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import nnx
from nnx.layers import (
    GELU,
    BatchNorm,
    Dropout,
    LayerNorm,
    Linear,
    ReLU,
    Sequential,
    Sigmoid,
    Tanh,
)

pytestmark = pytest.mark.kernels

RNG = np.random.default_rng(0)
N, WIDTH = 200, 96  # of the arrays, the smallest that matters has 200 x 10 x 4 bytes
BATCH = 64
LIMIT = 2048
"""Bytes: frames, tuples and views of arrays come and go, buffers don't."""


def linear(n_in: int, n_out: int) -> Linear:
    return Linear(n_in, n_out, rng=RNG)


MODELS: dict[str, Callable[[], nnx.Layer]] = {
    "ReLU": lambda: nnx.mlp([WIDTH, 128, 128, 10]),
    "tanh": lambda: Sequential(linear(WIDTH, 64), Tanh(), linear(64, 10)),
    "GELU, sigmoid": lambda: Sequential(
        linear(WIDTH, 64), GELU(), linear(64, 64), Sigmoid(), linear(64, 10)
    ),
    "dropout": lambda: nnx.mlp([WIDTH, 64, 10], dropout=0.3),
    "LayerNorm": lambda: Sequential(linear(WIDTH, 64), LayerNorm(64), ReLU(), linear(64, 10)),
    "BatchNorm, dropout": lambda: Sequential(
        linear(WIDTH, 64), BatchNorm(64), ReLU(), Dropout(0.5), linear(64, 10)
    ),
}
OPTIMIZERS: dict[str, Callable[[], nnx.Optimizer]] = {
    "SGD": lambda: nnx.SGD(0.01, momentum=0.9),
    "Adam": lambda: nnx.Adam(0.001),
    "AdamW, clipped": lambda: nnx.AdamW(0.001, weight_decay=0.01, clip_norm=1.0),
}
LOSSES: dict[str, Callable[[], nnx.Loss]] = {
    "SoftmaxNLL": lambda: nnx.SoftmaxNLL(),
    "smoothed": lambda: nnx.SoftmaxNLL(label_smoothing=0.1, class_weight=np.ones(10)),
    "MSE": lambda: nnx.MeanSquaredError(),
    "Huber": lambda: nnx.Huber(),
}


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def taken(step: Callable[[], Any]) -> int:
    """Bytes that a step holds at its peak beyond what was there before."""
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    step()
    return tracemalloc.get_traced_memory()[1] - before


def trainer_of(model: nnx.Layer, loss: nnx.Loss, optimizer: nnx.Optimizer) -> Any:
    x = RNG.standard_normal((N, WIDTH), np.float32)
    t: Any = RNG.integers(0, 10, N)
    if not isinstance(loss, nnx.SoftmaxNLL):
        t = RNG.standard_normal((N, 10), np.float32)
    return nnx.Trainer(model, loss, optimizer), x, t


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_takes_no_memory(model: str, optimizer: str) -> None:
    trainer, x, t = trainer_of(MODELS[model](), nnx.SoftmaxNLL(), OPTIMIZERS[optimizer]())
    x, t = x[:BATCH], t[:BATCH]
    for _ in range(3):
        trainer.train_step(x, t)
    assert max(taken(lambda: trainer.train_step(x, t)) for _ in range(5)) < LIMIT


@pytest.mark.parametrize("loss", LOSSES)
def test_nor_does_its_loss(loss: str) -> None:
    trainer, x, t = trainer_of(MODELS["ReLU"](), LOSSES[loss](), nnx.SGD(0.01))
    for _ in range(3):
        trainer.train_step(x, t)
    assert max(taken(lambda: trainer.train_step(x, t)) for _ in range(5)) < LIMIT


class Watch(nnx.Callback):
    """The peak of each step of a fit, from the end of the step before."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self.addresses: list[list[int]] = []
        self.before = 0

    def on_step_end(self, trainer: Any) -> None:
        self.peaks.append(tracemalloc.get_traced_memory()[1] - self.before)
        tape = trainer._arena._tape
        self.addresses.append([array.ctypes.data for _, _, array, _ in tape])
        self.before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()


def test_in_a_fit_steps_take_none_and_work_where_the_last_one_did() -> None:
    trainer, x, t = trainer_of(MODELS["BatchNorm, dropout"](), nnx.SoftmaxNLL(), nnx.Adam())
    watch = Watch()
    trainer.fit(x, t, epochs=4, batch_size=50, callbacks=[watch], metrics=[nnx.Accuracy()])
    within = [i for i in range(8, 16) if i % 4]  # the first step of an epoch ends the one before
    assert max(watch.peaks[i] for i in within) < LIMIT
    for i in range(8, 16):
        assert watch.addresses[i] == watch.addresses[7]
    assert len(watch.addresses[7]) > 10


def test_a_buffer_would_be_seen() -> None:
    assert taken(lambda: np.empty(BATCH * 8, np.float32)) >= LIMIT
