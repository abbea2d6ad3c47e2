"""Kernels of the optimizers, over the flat vector of parameters."""

from typing import Any

import numpy as np
import pytest
from kernel_cases import REFERENCE, TOLERANCE, close

from nnx.backends import get_backend
from nnx.backends.base import Array, Groups

gpu = pytest.mark.gpu


def _optimizer_calls() -> list[tuple[str, int, dict[str, Any]]]:
    return [
        ("sgd", 0, {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
        ("sgd", 1, {"momentum": 0.9, "nesterov": False, "weight_decay": 0.1}),
        ("sgd", 1, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("adam", 2, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}),
        ("adam", 2, {"beta1": 0.0, "beta2": 0.5, "eps": 1e-3, "weight_decay": 0.0}),
    ]


@gpu
@pytest.mark.parametrize(("name", "n_slots", "options"), _optimizer_calls())
@pytest.mark.parametrize("n_models", [1, 3])
def test_optimizers(
    name: str,
    n_slots: int,
    options: dict[str, Any],
    n_models: int,
    dtype: Any,
    rng: np.random.Generator,
) -> None:
    cuda = get_backend("cupy")
    size, n_steps = 64 * 7, 3
    runs = [(0, 128, 1.0, 1.0), (128, 192, 0.0, 1.0), (192, 448, 0.5, 0.0)]
    start = [rng.standard_normal((n_models, size)) for _ in range(1 + n_slots)]
    start[-1] = np.abs(start[-1])  # second moments are not negative
    gradients = rng.standard_normal((n_steps, n_models, size))
    losses = rng.standard_normal((n_steps, n_models))
    rates = np.array([0.1, 0.05, 0.2])

    def train(backend: Any, kind: Any) -> tuple[list[Array], Any]:
        arrays = [backend.asarray(a.copy(), kind) for a in start]
        slots = arrays[1:] or [None]
        state, groups = backend.step_state(), Groups(runs, backend)
        state.plan(rates, dtype=kind, n_models=n_models)
        for gradient, loss in zip(gradients, losses, strict=True):
            g, value = backend.asarray(gradient, kind), backend.asarray(loss, kind)
            getattr(backend, name)(arrays[0], g, *slots, groups, state, value, **options)
        return arrays, state

    expected, _ = train(REFERENCE, np.float64)
    actual, state = train(cuda, dtype)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(cuda.to_numpy(a), e, rtol=20 * TOLERANCE[dtype][0], atol=1e-6)
        assert a.dtype == dtype
    close(state.log, losses.astype(dtype), dtype, exact=True)
    assert cuda.to_numpy(state.counters).tolist() == [n_steps, n_steps]
    assert (state.number, state.position) == (n_steps, n_steps)
    frozen = cuda.to_numpy(actual[0])[:, 128:192]
    np.testing.assert_array_equal(frozen, start[0][:, 128:192].astype(dtype))
