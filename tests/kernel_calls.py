"""A call of every operation that has kernels, at the smallest shape that reaches each of them.

The same calls run on the device and on `kernel_cases.REFERENCE`, so they return what both must
agree on; masks are each backend's own and only handed on. A kernel that none of them launches
fails `test_every_kernel_of_the_table_is_launched`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from kernel_cases import special

from nnx.backends.base import Array, Backend, Groups, StepState

Call = Callable[[Backend, Any, np.random.Generator], list[Array]]
CALLS: dict[str, Call] = {}


def _call(function: Call) -> Call:
    CALLS[function.__name__.strip("_")] = function
    return function


def _normal(b: Backend, dtype: Any, rng: np.random.Generator, *shape: int) -> Array:
    return b.asarray(rng.standard_normal(shape), dtype)


def _planned(b: Backend, dtype: Any) -> StepState:
    """A state of four planned steps, at the second."""
    state = b.step_state()
    state.plan(np.full(4, 0.1), dtype=dtype, order=np.array([5, 2, 8, 0, 3, 1, 4, 7, 6]))
    state.advance(None)
    return state


# ---- ReLU, bias, dropout -----------------------------------------------------------------------


@_call
def _relu(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    y, mask = b.relu(b.asarray(special(rng, (9, 33), dtype)))
    return [y, b.relu_backward(_normal(b, dtype, rng, 9, 33), mask)]


@_call
def _bias_relu(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    z, bias = _normal(b, dtype, rng, 9, 33), _normal(b, dtype, rng, 33)
    y, mask = b.bias_relu(z, bias)
    dy, dbias = _normal(b, dtype, rng, 9, 33), _normal(b, dtype, rng, 33)
    return [y, b.bias_relu_backward(dy, mask, dbias, accumulate=True), dbias]


@_call
def _bias_grad(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    return [b.bias_grad(_normal(b, dtype, rng, 9, 33), b.empty((33,), dtype))]


@_call
def _dropout(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    x, state = _normal(b, dtype, rng, 9, 33), _planned(b, dtype)
    y, mask = b.dropout(x, 0.3, seed=7, stream=2, use=1, state=state)
    return [y, b.dropout_backward(_normal(b, dtype, rng, 9, 33), mask, 0.3)]


# ---- losses and metrics ------------------------------------------------------------------------


@_call
def _softmax_nll(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    labels = b.asarray(rng.integers(0, 5, 9))
    return [*b.softmax_nll(_normal(b, dtype, rng, 9, 5), labels)]


@_call
def _softmax_nll_with_weights(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    logits, labels = _normal(b, dtype, rng, 9, 5), b.asarray(rng.integers(0, 5, 9))
    weight, of_class = rng.uniform(1, 2, 9), rng.uniform(1, 2, 5)
    options = {"label_smoothing": 0.1, "ignore_index": 1}
    return [
        *b.softmax_nll(
            logits,
            labels,
            b.asarray(weight, dtype),
            class_weight=b.asarray(of_class, dtype),
            **options,  # type: ignore[arg-type]
        )
    ]


@_call
def _softmax_nll_of_soft_targets(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    target = rng.dirichlet(np.ones(5), 9)
    logits = _normal(b, dtype, rng, 9, 5)
    of_class = b.asarray(rng.uniform(1, 2, 5), dtype)
    return [*b.softmax_nll(logits, b.asarray(target, dtype), class_weight=of_class)]


@_call
def _count_correct(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    total = b.asarray(np.array(3))
    scores, labels = _normal(b, dtype, rng, 9, 5), b.asarray(rng.integers(0, 5, 9))
    b.count_correct(scores, labels, total)
    return [total]


# ---- optimizers and data -----------------------------------------------------------------------


def _update(
    b: Backend, dtype: Any, rng: np.random.Generator, name: str, slots: int, **options: Any
) -> list[Array]:
    """Call an optimizer for 640 parameters, some frozen, some without weight decay."""
    groups = Groups([(0, 128, 1.0, 1.0), (128, 256, 0.0, 1.0), (256, 640, 0.5, 0.0)], b)
    value, grad = _normal(b, dtype, rng, 1, 640), _normal(b, dtype, rng, 1, 640)
    memory = [b.asarray(rng.uniform(0, 1, (1, 640)), dtype) for _ in range(slots)]
    state, loss = _planned(b, dtype), b.asarray(np.array(0.25), dtype)
    getattr(b, name)(value, grad, *memory, groups, state, loss, weight_decay=0.01, **options)
    return [value, *memory, state.log]


@_call
def _sgd(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    return _update(b, dtype, rng, "sgd", 1, momentum=0.9, nesterov=True)


@_call
def _adam(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    return _update(b, dtype, rng, "adam", 2, beta1=0.9, beta2=0.999, eps=1e-8)


@_call
def _gather_rows(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    sources = [_normal(b, dtype, rng, 9, 5), b.asarray(rng.integers(0, 5, 9))]
    return b.gather_rows(sources, _planned(b, dtype), 3, 3)
