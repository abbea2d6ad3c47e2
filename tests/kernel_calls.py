"""A call of every operation that has kernels, at the smallest shape that reaches each of them.

The same calls run on the device and on `kernel_cases.REFERENCE`, so they return what both must
agree on; masks are each backend's own and only handed on. A kernel that none of them launches
fails `test_every_kernel_of_the_table_is_launched`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from kernel_cases import special

from nnx.backends.base import Array, Backend, Groups, StepState, Update

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
def _affine(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    x, weight, bias = (_normal(b, dtype, rng, *shape) for shape in ((9, 4), (4, 33), (33,)))
    plain, rectified = b.empty((9, 33), dtype), b.empty((9, 33), dtype)
    b.affine(x, weight, bias, plain)
    mask = b.affine(x, weight, bias, rectified, relu=True)
    return [plain, rectified, b.relu_backward(_normal(b, dtype, rng, 9, 33), mask)]


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


@_call
def _softmax_nll_of_wide_rows(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    labels = b.asarray(rng.integers(0, 1030, 3))
    return [*b.softmax_nll(_normal(b, dtype, rng, 3, 1030), labels)]


@_call
def _softmax_nll_of_long_rows(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    n_classes = 12_100 if dtype == np.float32 else 6_100  # more than shared memory holds
    labels = b.asarray(rng.integers(0, n_classes, 3))
    return [*b.softmax_nll(_normal(b, dtype, rng, 3, n_classes), labels)]


@_call
def _count_among_the_largest(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    total = b.asarray(np.array([3, 4]))
    scores, labels = _normal(b, dtype, rng, 9, 5), b.asarray(rng.integers(0, 5, 9))
    b.count_correct(scores, labels, total, k=2, ignore_index=1)
    return [total]


@_call
def _confusion(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    total, labels = b.asarray(rng.integers(0, 3, (5, 5))), b.asarray(rng.integers(0, 5, 9))
    b.confusion(_normal(b, dtype, rng, 9, 5), labels, total)
    return [total]


@_call
def _add_sums(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    total = _normal(b, np.float64, rng, 5)
    b.add_sums(_normal(b, dtype, rng, 40, 5), total)
    return [total]


# ---- normalization -----------------------------------------------------------------------------


def _layer_norm_of(b: Backend, dtype: Any, rng: np.random.Generator, *shape: int) -> list[Array]:
    x, dy = _normal(b, dtype, rng, *shape), _normal(b, dtype, rng, *shape)
    weight, bias, dweight, dbias = (_normal(b, dtype, rng, shape[1]) for _ in range(4))
    y, mean, rstd = b.layer_norm(x, weight, bias, eps=1e-5, centered=True)
    adds = (True, False)
    dx = b.layer_norm_backward(dy, x, mean, rstd, weight, dweight, dbias, accumulate=adds)
    return [y, mean, rstd, dx, dweight, dbias]


@_call
def _layer_norm(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    return _layer_norm_of(b, dtype, rng, 30, 33)  # more rows than a block adds up


@_call
def _layer_norm_of_long_rows(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    return _layer_norm_of(b, dtype, rng, 3, 4_100)  # more than registers hold


@_call
def _batch_norm(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    results = []
    for n, training in ((9, True), (1_030, True), (9, False)):  # 1,030: more than a tile
        x, dy = _normal(b, dtype, rng, n, 33), _normal(b, dtype, rng, n, 33)
        weight, bias, dweight, dbias, at = (_normal(b, dtype, rng, 33) for _ in range(5))
        spread = b.asarray(rng.uniform(1, 2, 33), dtype)
        y, mean, rstd = b.batch_norm(
            x, weight, bias, at, spread, eps=1e-5, momentum=0.1, training=training
        )
        dx = b.batch_norm_backward(
            *(dy, x, mean, rstd, weight, dweight, dbias),
            training=training,
            accumulate=(False, True),
        )
        results += [y, mean, rstd, at, spread, dx, dweight, dbias]
    return results


# ---- optimizers and data -----------------------------------------------------------------------


def _update(b: Backend, dtype: Any, rng: np.random.Generator, slots: int, **options: Any) -> Update:
    """An update of 640 parameters, some frozen, some without weight decay."""
    groups = Groups([(0, 128, 1.0, 1.0), (128, 256, 0.0, 1.0), (256, 640, 0.5, 0.0)], b)
    value, grad = _normal(b, dtype, rng, 1, 640), _normal(b, dtype, rng, 1, 640)
    memory = tuple(b.asarray(rng.uniform(0.5, 1, (1, 640)), dtype) for _ in range(slots))
    loss = b.asarray(np.array(0.25), dtype)
    return Update(value, grad, memory, groups, _planned(b, dtype), loss, **options)


def _updated(update: Update) -> list[Array]:
    return [update.value, update.grad, *update.slots, update.state.log]


@_call
def _condition(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    update = _update(b, dtype, rng, 0)._replace(slots=(None,))
    update = b.condition(update, l1=0.01, l2=0.02, clip_value=0.9, clip_norm=3.0)
    b.sgd(update, momentum=0.0, nesterov=False)
    return [update.scale, update.value, update.grad, update.state.log]


@_call
def _sgd(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    update = _update(b, dtype, rng, 1, decay=0.01)
    b.sgd(update, momentum=0.9, nesterov=True)
    return _updated(update)


@_call
def _adam(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    update = _update(b, dtype, rng, 3, shrink=0.01)
    b.adam(update, beta1=0.9, beta2=0.999, eps=1e-8)
    return _updated(update)


@_call
def _adagrad(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    update = _update(b, dtype, rng, 1, decay=0.01)
    b.adagrad(update, lr_decay=0.1, initial=0.2, eps=1e-10)
    return _updated(update)


@_call
def _rmsprop(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    update = _update(b, dtype, rng, 3, decay=0.01)
    v: Array = update.slots[0]
    v += 2  # the variance stays positive
    b.rmsprop(update, alpha=0.9, eps=1e-8, momentum=0.9)
    return _updated(update)


@_call
def _lion(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    update = _update(b, dtype, rng, 1, shrink=0.01)
    b.lion(update, beta1=0.9, beta2=0.99)
    return _updated(update)


@_call
def _gather_rows(b: Backend, dtype: Any, rng: np.random.Generator) -> list[Array]:
    sources = [_normal(b, dtype, rng, 9, 5), b.asarray(rng.integers(0, 5, 9))]
    return b.gather_rows(sources, _planned(b, dtype), 3, 3)
