"""nnx, as its guide has it; its matrix products alone; and its training loop."""

from collections.abc import Callable
from typing import Any

import numpy as np

import nnx
from nnx import bench
from nnx.backends import get_backend

Call = Callable[[], object]
OPTIMIZERS: dict[str, Any] = {"SGD": nnx.SGD, "Adam": nnx.Adam}
PLACE = bench.Place(get_backend("numpy"), np.dtype(np.float32))


def versions() -> dict[str, str]:
    """Of nnx and of what it computes with."""
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    named = {blas.get("name", "BLAS"): blas.get("version", "unknown")}
    return {"nnx": nnx.__version__, "numpy": np.__version__} | named


def limit(threads: int) -> None:
    """Nothing: the environment says it."""


def wait(result: Any) -> None:
    """Nothing: a call returns when it is done."""


def _trainer(sizes: list[int], optimizer: nnx.Optimizer, graph: bool | None = None) -> nnx.Trainer:
    gate = sizes[-1] == 1
    model = nnx.mlp(sizes, activation="tanh" if gate else "relu")
    loss = nnx.MeanSquaredError() if gate else nnx.SoftmaxNLL()
    return nnx.Trainer(model, loss, optimizer, graph=graph)


def step(sizes: list[int], x: Any, t: Any, optimizer: str, lr: float) -> Call:
    """A step on one batch."""
    trainer = _trainer(sizes, OPTIMIZERS[optimizer](lr))
    return lambda: trainer.train_step(x, t)


def graph_step(sizes: list[int], x: Any, t: Any, optimizer: str, lr: float) -> Call:
    """The same, replayed."""
    trainer = _trainer(sizes, OPTIMIZERS[optimizer](lr), graph=True)
    return lambda: trainer.train_step(x, t)


def fit(sizes: list[int], x: Any, t: Any, optimizer: str, lr: float) -> tuple[Call, int]:
    """Steps within `Trainer.fit`, which shuffles and gathers, and how many of them a call takes."""
    trainer = _trainer(sizes, OPTIMIZERS[optimizer](lr))
    x, t, batch = np.concatenate([x] * 100), np.concatenate([t] * 100), len(x)
    return lambda: trainer.fit(x, t, epochs=2, batch_size=batch, metrics=()), 200


def predict(sizes: list[int], x: Any) -> Call:
    """Scores of samples."""
    trainer = _trainer(sizes, nnx.SGD(1.0))
    return lambda: trainer.predict(x)


def products(sizes: list[int], x: Any, backward: bool = True) -> Call:
    """The products of a step through the door that the layers use."""
    return PLACE.products(bench.network_products(PLACE, sizes, len(x), backward=backward)).call


def softmax_nll(logits: Any, labels: Any) -> Call:
    """The loss and its gradient, in memory that is used again as in a step."""
    loss = nnx.SoftmaxNLL()
    return PLACE.operation(lambda: loss(logits, labels))[0].call


def adam(values: Any, gradient: Any, lr: float) -> Call:
    """An update of a single parameter."""
    vector = nnx.ParameterVector([nnx.Parameter(values)])
    vector.grad[:, : len(gradient)] = gradient
    return PLACE.operation(bench.adam_update(PLACE, vector, lr)[0])[0].call


def epoch(
    sizes: list[int], batch: int, lr: float, x: Any, t: Any
) -> tuple[Call, Callable[[Any], Any]]:
    """An epoch with a learning rate that falls to 0 in it, and the class of samples."""
    falling = nnx.schedules.Polynomial(lr, -(-len(x) // batch))
    trainer = _trainer(sizes, nnx.Adam(falling))
    return (
        lambda: trainer.fit(x, t, batch_size=batch),
        lambda samples: trainer.predict(samples).argmax(axis=1),
    )
