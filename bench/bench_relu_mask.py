"""ReLU forward and backward: the backend's operation with its mask, and the naive product."""

from collections.abc import Callable
from typing import Any

import pytest

from nnx.backends import Array, Backend

Run = Callable[..., None]
WIDTH = 512


def _naive_forward(xp: Any, x: Array) -> tuple[Array, Array]:
    mask = x > 0
    return x * mask, mask


@pytest.mark.parametrize("body", ["relu", "naive"])
@pytest.mark.parametrize("batch", [128, 1024, 8192])
def bench_forward(
    run: Run,
    backend: Backend,
    random: Callable[..., Array],
    shrink: Callable[[int], int],
    batch: int,
    body: str,
) -> None:
    x, xp = random(shrink(batch), shrink(WIDTH)), backend.xp
    _, mask = backend.relu(x)
    run(
        (lambda: backend.relu(x)) if body == "relu" else (lambda: _naive_forward(xp, x)),
        group=f"ReLU forward, {batch} x {WIDTH}",
        samples=len(x),
        nbytes=2 * x.nbytes + mask.nbytes,
    )


@pytest.mark.parametrize("body", ["relu", "naive"])
@pytest.mark.parametrize("batch", [128, 1024, 8192])
def bench_backward(
    run: Run,
    backend: Backend,
    random: Callable[..., Array],
    shrink: Callable[[int], int],
    batch: int,
    body: str,
) -> None:
    """A selection, against the product that lets NaN through an inactive unit."""
    x, dy = random(shrink(batch), shrink(WIDTH)), random(shrink(batch), shrink(WIDTH))
    _, mask = backend.relu(x)
    plain = x > 0
    run(
        (lambda: backend.relu_backward(dy, mask)) if body == "relu" else (lambda: dy * plain),
        group=f"ReLU backward, {batch} x {WIDTH}",
        samples=len(x),
        nbytes=2 * x.nbytes + mask.nbytes,
    )
