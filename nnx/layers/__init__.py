"""Layers: the building blocks of models."""

from nnx.layers.activations import ReLU, Sigmoid, Softmax, Tanh
from nnx.layers.base import Layer, Step
from nnx.layers.containers import Flatten, Sequential
from nnx.layers.dropout import Dropout
from nnx.layers.linear import Linear

__all__ = [
    "Dropout",
    "Flatten",
    "Layer",
    "Linear",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "Step",
    "Tanh",
]
