"""Whole training steps: forward, loss, backward, update, with the data on the device.

Beside each step stand its bare matrix products: what is left between the two is the library's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

import nnx
from nnx.backends import Array, Backend

Run = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """A network and its batch."""

    sizes: tuple[int, ...]
    batch: int

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.sizes))} batch {self.batch}"

    @property
    def flops(self) -> int:
        """Of the matrix products: one forward, two backward, without the input's gradient."""
        pairs = [n * m for n, m in zip(self.sizes, self.sizes[1:], strict=False)]
        return 2 * self.batch * (3 * sum(pairs) - pairs[0])


CASES = (
    Case((2, 3, 1), 4),
    Case((20, 32, 10), 32),
    Case((784, 50, 10), 100),
    Case((784, 512, 512, 10), 128),
    Case((784, 512, 512, 10), 1024),
)
OPTIMIZERS: dict[str, Callable[[], nnx.Optimizer]] = {
    "SGD": lambda: nnx.SGD(0.01),
    "Adam": lambda: nnx.Adam(0.001),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest, shrink: Callable[[int], int]) -> tuple[str, Case]:
    """Each network in turn: its full name, and its sizes as they are run."""
    full: Case = request.param
    return str(full), Case(tuple(map(shrink, full.sizes)), shrink(full.batch))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def bench_step(
    run: Run,
    backend: Backend,
    random: Callable[..., Array],
    case: tuple[str, Case],
    optimizer: str,
) -> None:
    name, sized = case
    n_in, n_out = sized.sizes[0], sized.sizes[-1]
    loss: nnx.Loss
    if n_out == 1:  # AND, as the texts have it: one output, squared error
        gate = nnx.data.logic_gate("and")
        x, t = backend.asarray(gate.x), backend.asarray(gate.t[:, None], np.float32)
        model, loss = nnx.mlp(sized.sizes, activation="tanh"), nnx.MeanSquaredError()
    else:
        x = random(sized.batch, n_in)
        t = backend.asarray(np.random.default_rng(1).integers(0, n_out, sized.batch))
        model, loss = nnx.mlp(sized.sizes), nnx.SoftmaxNLL()
    trainer = nnx.Trainer(model, loss, OPTIMIZERS[optimizer](), backend=backend)
    run(
        lambda: trainer.train_step(x, t),
        group=f"training step, {name}",
        samples=sized.batch,
        flops=sized.flops,
    )


def bench_bare_products(
    run: Run, backend: Backend, random: Callable[..., Array], case: tuple[str, Case]
) -> None:
    """The matrix products of the step and nothing else."""
    name, sized = case
    products = []
    for i, (n, m) in enumerate(zip(sized.sizes, sized.sizes[1:], strict=False)):
        x, weight, dy = random(sized.batch, n), random(n, m), random(sized.batch, m)
        pairs = [(x, weight), (x.T, dy)] + ([(dy, weight.T)] if i else [])
        products += [(a, b, backend.empty((a.shape[0], b.shape[1]), a.dtype)) for a, b in pairs]
    matmul = backend.xp.matmul

    def call() -> None:
        for a, b, out in products:
            matmul(a, b, out=out)

    run(call, group=f"training step, {name}", samples=sized.batch, flops=sized.flops)
