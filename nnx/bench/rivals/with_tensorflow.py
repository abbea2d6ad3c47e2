"""TensorFlow, as its documentation has it: a Keras model, its own step in a `tf.function`."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

Call = Callable[[], object]
OPTIMIZERS: dict[str, Any] = {"SGD": keras.optimizers.SGD, "Adam": keras.optimizers.Adam}


def versions() -> dict[str, str]:
    """Of TensorFlow and Keras."""
    return {"tensorflow": tf.__version__, "keras": keras.__version__}


def limit(threads: int) -> None:
    """Of one operation, and of operations side by side."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def wait(result: Any) -> None:
    """Nothing: a call returns when it is done."""


def _network(sizes: list[int]) -> Any:
    keras.backend.clear_session()
    activation = "tanh" if sizes[-1] == 1 else "relu"
    hidden = [keras.layers.Dense(n, activation=activation) for n in sizes[1:-1]]
    return keras.Sequential([keras.Input(sizes[:1]), *hidden, keras.layers.Dense(sizes[-1])])


def step(sizes: list[int], x: Any, t: Any, optimizer: str, lr: float) -> Call:
    """A step on one batch."""
    x, t = tf.constant(x), tf.constant(t)
    model, update = _network(sizes), OPTIMIZERS[optimizer](lr)
    if sizes[-1] == 1:
        loss_of = keras.losses.MeanSquaredError()
    else:
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(jit_compile=True)  # type: ignore[untyped-decorator]
    def train(x: Any, t: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(t, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        update.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return lambda: train(x, t)


def predict(sizes: list[int], x: Any) -> Call:
    """Scores of samples."""
    model = _network(sizes)
    scores = tf.function(lambda x: model(x, training=False), jit_compile=True)
    return lambda: scores(tf.constant(x)).numpy()


def softmax_nll(logits: Any, labels: Any) -> Call:
    """The loss and its gradient."""
    logits, labels = tf.constant(logits), tf.constant(labels)

    @tf.function(jit_compile=True)  # type: ignore[untyped-decorator]
    def both(logits: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(logits)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        return loss, tape.gradient(loss, logits)

    return lambda: both(logits, labels)


def adam(values: Any, gradient: Any, lr: float) -> Call:
    """An update of a single parameter."""
    variable, gradient = tf.Variable(values), tf.constant(gradient)
    optimizer = keras.optimizers.Adam(lr)
    optimizer.build([variable])

    @tf.function(jit_compile=True)  # type: ignore[untyped-decorator]
    def update(gradient: Any) -> None:
        optimizer.apply_gradients([(gradient, variable)])

    return lambda: update(gradient)


def epoch(
    sizes: list[int], batch: int, lr: float, x: Any, t: Any
) -> tuple[Call, Callable[[Any], Any]]:
    """An epoch with a learning rate that falls to 0 in it, and the class of samples."""
    falling = keras.optimizers.schedules.PolynomialDecay(lr, -(-len(x) // batch), 0.0)
    model = _network(sizes)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(falling), loss)
    return (
        lambda: model.fit(x, t, batch_size=batch, verbose=0),
        lambda samples: model.predict(samples, verbose=0).argmax(axis=1),
    )
