"""Neural networks with hand-written forward and backward passes, on NumPy or CuPy by one flag."""

from nnx import backends, data, initializers, layers, losses, metrics, optimizers
from nnx.backends import BackendUnavailable, backend_of, get_backend
from nnx.check import check_gradients
from nnx.checkpoint import load, save
from nnx.layers import (
    Dropout,
    Flatten,
    Layer,
    Linear,
    ReLU,
    Sequential,
    Sigmoid,
    Softmax,
    Tanh,
)
from nnx.losses import Loss, MeanSquaredError, SoftmaxNLL
from nnx.metrics import Accuracy, accuracy
from nnx.models import mlp
from nnx.optimizers import SGD, Adam, Optimizer
from nnx.parameter import Parameter, ParameterVector
from nnx.trainer import Callback, History, Trainer

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Accuracy",
    "Adam",
    "BackendUnavailable",
    "Callback",
    "Dropout",
    "Flatten",
    "History",
    "Layer",
    "Linear",
    "Loss",
    "MeanSquaredError",
    "Optimizer",
    "Parameter",
    "ParameterVector",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "SoftmaxNLL",
    "Tanh",
    "Trainer",
    "accuracy",
    "backend_of",
    "backends",
    "check_gradients",
    "data",
    "get_backend",
    "initializers",
    "layers",
    "load",
    "losses",
    "metrics",
    "mlp",
    "optimizers",
    "save",
]
