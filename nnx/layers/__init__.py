"""Layers: the building blocks of models."""

from nnx.layers.activations import (
    ELU,
    GELU,
    SELU,
    HardSigmoid,
    HardSwish,
    HardTanh,
    Identity,
    LeakyReLU,
    LogSoftmax,
    Mish,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from nnx.layers.base import Layer, Step
from nnx.layers.containers import Flatten, Sequential
from nnx.layers.dropout import Dropout
from nnx.layers.linear import Linear
from nnx.layers.normalization import BatchNorm, LayerNorm, RMSNorm

__all__ = [
    "ELU",
    "GELU",
    "SELU",
    "BatchNorm",
    "Dropout",
    "Flatten",
    "HardSigmoid",
    "HardSwish",
    "HardTanh",
    "Identity",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "Mish",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Step",
    "Tanh",
]
