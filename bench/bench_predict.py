"""Predictions from a host array, a single sample and many: `Trainer.predict`."""

import itertools
from collections.abc import Callable

import pytest

import nnx
from nnx.backends import Array, Backend

Run = Callable[..., None]
SIZES = (784, 512, 512, 10)


@pytest.mark.parametrize("batch", [1, 4096])
def bench_predict(
    run: Run,
    backend: Backend,
    random: Callable[..., Array],
    shrink: Callable[[int], int],
    batch: int,
) -> None:
    sizes = [*map(shrink, SIZES)]
    x = backend.to_numpy(random(shrink(batch), sizes[0]))
    trainer = nnx.Trainer(nnx.mlp(sizes), nnx.SoftmaxNLL(), nnx.SGD(1.0), backend=backend)
    weights = sum(n * m for n, m in itertools.pairwise(sizes))
    run(
        lambda: trainer.predict(x),
        group=f"predict, {'-'.join(map(str, SIZES))}, {batch} samples",
        samples=len(x),
        flops=2 * len(x) * weights,
    )
