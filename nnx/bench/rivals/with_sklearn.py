"""scikit-learn: `MLPClassifier.partial_fit`, which takes one step on a batch of `batch_size`."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor

Call = Callable[[], object]


def versions() -> dict[str, str]:
    """Of scikit-learn and of what it computes with."""
    return {"scikit-learn": sklearn.__version__, "numpy": np.__version__}


def limit(threads: int) -> None:
    """Nothing: the environment says it."""


def wait(result: Any) -> None:
    """Nothing: a call returns when it is done."""


def _model(sizes: list[int], batch: int, optimizer: str, lr: float) -> Any:
    kind, activation = (MLPRegressor, "tanh") if sizes[-1] == 1 else (MLPClassifier, "relu")
    return kind(
        hidden_layer_sizes=sizes[1:-1],
        activation=activation,
        solver=optimizer.lower(),
        alpha=0.0,
        batch_size=batch,
        learning_rate_init=lr,
        momentum=0.0,
        nesterovs_momentum=False,
        random_state=0,
    )


def step(sizes: list[int], x: Any, t: Any, optimizer: str, lr: float) -> Call:
    """A step on one batch."""
    model = _model(sizes, len(x), optimizer, lr)
    if sizes[-1] == 1:
        return lambda: model.partial_fit(x, t[:, 0])
    classes = np.arange(sizes[-1])
    return lambda: model.partial_fit(x, t, classes=classes)


def predict(sizes: list[int], x: Any) -> Call:
    """Probabilities of samples, which is what it has for scores."""
    model = _model(sizes, 1, "Adam", 1e-6)
    model.partial_fit(x[:1], np.zeros(1, int), classes=np.arange(sizes[-1]))
    return lambda: model.predict_proba(x)


def epoch(
    sizes: list[int], batch: int, lr: float, x: Any, t: Any
) -> tuple[Call, Callable[[Any], Any]]:
    """An epoch, and the class of samples; its Adam keeps its learning rate, so the usual 0.001."""
    model, classes = _model(sizes, batch, "Adam", 1e-3), np.arange(sizes[-1])
    warnings.simplefilter("ignore", ConvergenceWarning)
    return lambda: model.partial_fit(x, t, classes=classes), model.predict
