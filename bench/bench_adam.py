"""Adam's update of a flat vector of 670,000 parameters, the size of 784-512-512-10."""

from collections.abc import Callable

import numpy as np

from nnx import Parameter, ParameterVector
from nnx.backends import Array, Backend
from nnx.bench import Place, adam_update

Run = Callable[..., None]


def bench_adam(
    run: Run, backend: Backend, random: Callable[..., Array], shrink: Callable[[int], int]
) -> None:
    vector = ParameterVector([Parameter(random(shrink(670_000)))])
    vector.grad.fill(1e-3)
    update, slots = adam_update(Place(backend, np.dtype(np.float32)), vector)
    moved = [vector.grad, *2 * (vector.value, *slots)]
    run(update, group="Adam, 670k parameters", nbytes=sum(int(a.nbytes) for a in moved))
