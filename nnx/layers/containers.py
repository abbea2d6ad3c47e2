"""Layers made of layers, and `Flatten`, which only changes the shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from nnx.backends import Array
from nnx.layers.activations import ReLU
from nnx.layers.base import Layer, Saved, Step
from nnx.layers.linear import Linear, LinearReLU


class Sequential(Layer):
    """Layers one after the other: `y = layers[-1](... layers[0](x))`.

    A `Linear` with bias directly followed by a `ReLU` runs as one operation; results and parameters
    are those of the two layers.

    Args:
        *layers: At least one. Those with parameters must agree on the number of models.

    Saved: what the layers saved, in order.
    Gradient: the layers' backward passes in reverse. With `need_dx=False` they end at the first
    layer that has parameters.
    """

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            raise ValueError("Sequential: expected at least one layer, got none")
        for layer in layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"Sequential: expected layers, got {layer!r}")
        models = {layer.n_models for layer in layers if any(layer.parameters())}
        if len(models) > 1:
            raise ValueError(f"Sequential: expected one number of models, got n_models in {models}")
        self.n_models = models.pop() if models else None
        self.sequence = layers
        self._units = list(_fuse(layers))
        learns = [any(unit.parameters()) for unit in self._units]
        self._first = learns.index(True) if True in learns else len(learns)

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, i: int) -> Layer:
        return self.sequence[i]

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.sequence))})"

    @classmethod
    def from_config(cls, config: dict[str, Any], children: dict[str, Layer]) -> Self:  # noqa: D102
        return cls(*children.values(), **config)

    def children(self) -> Iterator[tuple[str, Layer]]:  # noqa: D102
        for i, layer in enumerate(self.sequence):
            yield str(i), layer

    def _replicate(self, n_models: int, made: dict[int, Any]) -> Self:
        if id(self) not in made:
            layers = [layer._replicate(n_models, made) for layer in self.sequence]
            made[id(self)] = type(self)(*layers)
        known: Self = made[id(self)]
        return known

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        saved = []
        for unit in self._units:
            x, s = unit.forward(x, step=step)
            saved.append(s)
        return x, saved

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        units, last = self._units, 0 if need_dx else self._first
        for i in range(len(units) - 1, last - 1, -1):
            dy = units[i].backward(dy, saved[i], need_dx=need_dx or i > last)
        return dy if need_dx else None

    def activations(self, x: Array) -> Iterator[tuple[str, Array]]:
        """Each layer's name and output in turn, in evaluation mode."""
        for name, layer in self.children():
            x = layer(x)
            yield name, x


class Flatten(Layer):
    """Joins all axes but the first (with K models, the first two) into one.

    Args:
        n_models: K for K models side by side.

    Shape: x `(N, ...)` -> y `(N, n)`, with K models `(K, N, ...)` -> `(K, N, n)`.

    Saved: the input's shape. Gradient: dy in that shape.
    """

    def __init__(self, n_models: int | None = None) -> None:
        self.n_models = n_models

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {"n_models": self.n_models}

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:  # noqa: D102
        kept = 1 if self.n_models is None else 2
        if x.ndim < kept:
            raise ValueError(
                f"Flatten: expected at least {kept} axes, got input of shape {x.shape}"
            )
        n = 1
        for width in x.shape[kept:]:
            n *= width
        return x.reshape(*x.shape[:kept], n), x.shape

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:  # noqa: D102
        return dy.reshape(saved) if need_dx else None


def _fuse(layers: tuple[Layer, ...]) -> Iterator[Layer | LinearReLU]:
    """The layers, each `Linear` with bias and the `ReLU` behind it joined."""
    i = 0
    while i < len(layers):
        layer, after = layers[i], layers[i + 1] if i + 1 < len(layers) else None
        if type(layer) is Linear and layer.bias is not None and type(after) is ReLU:
            yield LinearReLU(layer, after)
            i += 2
        else:
            yield layer
            i += 1
