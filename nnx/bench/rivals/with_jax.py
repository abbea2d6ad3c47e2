"""JAX, as its documentation has it: one jitted function, whose state is donated to it."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Call = Callable[[], object]


def versions() -> dict[str, str]:
    """Of JAX."""
    return {"jax": jax.__version__}


def limit(threads: int) -> None:
    """Nothing: the environment says it."""


def wait(result: Any) -> None:
    """Come back when a call's result is there."""
    jax.block_until_ready(result)


def _network(sizes: list[int]) -> Any:
    rng = np.random.default_rng(0)
    return [
        (jnp.asarray(rng.normal(0, (2 / n) ** 0.5, (n, m)), jnp.float32), jnp.zeros(m))
        for n, m in itertools.pairwise(sizes)
    ]


def _scores(layers: Any, x: Any) -> Any:
    activation = jnp.tanh if layers[-1][1].shape == (1,) else jax.nn.relu
    for weight, bias in layers[:-1]:
        x = activation(x @ weight + bias)
    weight, bias = layers[-1]
    return x @ weight + bias


def _nll(logits: Any, labels: Any) -> Any:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()


def _loss(layers: Any, x: Any, t: Any) -> Any:
    scores = _scores(layers, x)
    return jnp.mean((scores - t) ** 2) if scores.shape[1] == 1 else _nll(scores, t)


def _sgd(state: Any, gradient: Any, lr: Any) -> Any:
    w, m, v, n = state
    return jax.tree.map(lambda w, g: w - lr * g, w, gradient), m, v, n + 1


def _adam(state: Any, gradient: Any, lr: Any) -> Any:
    w, m, v, n = state
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradient)
    one, two = 1 - 0.9 ** (n + 1), jnp.sqrt(1 - 0.999 ** (n + 1))
    w = jax.tree.map(lambda w, m, v: w - lr / one * m / (jnp.sqrt(v) / two + 1e-8), w, m, v)
    return w, m, v, n + 1


OPTIMIZERS: dict[str, Any] = {"SGD": _sgd, "Adam": _adam}


def _state(w: Any, optimizer: str = "Adam") -> Any:
    slots = [jax.tree.map(jnp.zeros_like, w) if optimizer == "Adam" else None for _ in range(2)]
    return w, *slots, jnp.float32(0)


def step(sizes: list[int], x: Any, t: Any, optimizer: str, lr: float) -> Call:
    """A step on one batch."""
    x, t, update = jnp.asarray(x), jnp.asarray(t), OPTIMIZERS[optimizer]

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state: Any, x: Any, t: Any) -> Any:
        loss, gradient = jax.value_and_grad(_loss)(state[0], x, t)
        return update(state, gradient, lr), loss

    state = _state(_network(sizes), optimizer)

    def call() -> Any:
        nonlocal state
        state, loss = train(state, x, t)
        return loss

    return call


def predict(sizes: list[int], x: Any) -> Call:
    """Scores of samples."""
    layers, scores = _network(sizes), jax.jit(_scores)
    return lambda: np.asarray(scores(layers, x))


def softmax_nll(logits: Any, labels: Any) -> Call:
    """The loss and its gradient."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    both = jax.jit(jax.value_and_grad(_nll))
    return lambda: both(logits, labels)


def adam(values: Any, gradient: Any, lr: float) -> Call:
    """An update of a single parameter."""
    state, gradient = _state(jnp.asarray(values)), jnp.asarray(gradient)
    update = jax.jit(_adam, donate_argnums=0)

    def call() -> Any:
        nonlocal state
        state = update(state, gradient, lr)
        return state

    return call


def epoch(
    sizes: list[int], batch: int, lr: float, x: Any, t: Any
) -> tuple[Call, Callable[[Any], Any]]:
    """An epoch with a learning rate that falls to 0 in it, and the class of samples."""
    x, t, steps = jnp.asarray(x), jnp.asarray(t), -(-len(x) // batch)
    state, scores, rng = _state(_network(sizes)), jax.jit(_scores), np.random.default_rng(0)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state: Any, x: Any, t: Any, index: Any) -> Any:
        rate = lr * jnp.maximum(1 - state[3] / steps, 0)
        _, gradient = jax.value_and_grad(_loss)(state[0], x[index], t[index])
        return _adam(state, gradient, rate)

    def call() -> Any:
        nonlocal state
        order = rng.permutation(len(x))
        for i in range(0, len(x), batch):
            state = train(state, x, t, order[i : i + batch])
        return state

    return call, lambda samples: np.asarray(scores(state[0], samples).argmax(axis=1))
