"""`Layer`: a pair of passes written by hand, and `Step`: what a training step tells every layer."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any, ClassVar, Self, TypeAlias

from nnx.backends import Array, Backend, StepState, backend_of
from nnx.parameter import Parameter

Saved: TypeAlias = Any
"""Whatever a layer's backward needs from its forward; opaque to everybody else."""


class Step:
    """One training step, as the layers see it: where the random numbers come from.

    Args:
        seed: The run's seed.
        state: Number of the step, on the host and on the device.
        layers: The model's layers in traversal order; a layer's random stream is its index.
    """

    __slots__ = ("_streams", "_uses", "seed", "state")

    def __init__(self, seed: int, state: StepState, layers: list[Layer]) -> None:
        self.seed = seed
        self.state = state
        self._streams = {layer: i for i, layer in enumerate(layers)}
        self._uses: dict[Layer, int] = {}

    def begin(self) -> Self:
        """Forget how often each layer was used in the last step."""
        self._uses.clear()
        return self

    def draw(self, layer: Layer) -> tuple[int, int]:
        """`(stream, use)` of the layer's next draw: its index, and a count within the step."""
        try:
            stream = self._streams[layer]
        except KeyError:
            raise ValueError(
                f"{layer!r}: not one of the layers this step was made for; layers of a model are "
                "fixed when its Trainer is built"
            ) from None
        use = self._uses[layer] = self._uses.get(layer, -1) + 1
        return stream, use


class Layer:
    """A differentiable function of one array, with parameters or without.

    A subclass writes `forward` and `backward`, keeps its `Parameter`s and inner layers in
    attributes (inner layers elsewhere if it overrides `children`), and returns its constructor's
    arguments from `config`. What backward needs travels
    in `saved`, never in `self`, so a layer may be used twice, or by two threads. Arrays that belong
    to the layer but aren't trained, such as running statistics, are buffers: attributes whose names
    stand in `buffer_names`. They are saved, moved and replicated with the layer.
    """

    buffer_names: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that hold buffers."""

    n_models: int | None = None
    """Number of models K if arrays have a leading model axis. Declared, never guessed."""

    def forward(self, x: Array, *, step: Step | None = None) -> tuple[Array, Saved]:
        """The output, and what `backward` needs.

        Args:
            x: The input; never written.
            step: The running training step; None means evaluation.
        """
        raise NotImplementedError

    def backward(self, dy: Array, saved: Saved, *, need_dx: bool = True) -> Array | None:
        """Add to the parameters' gradients and return the gradient of the input.

        Each parameter's contribution replaces `p.grad` if `p.accumulate()` is False, else adds.

        Args:
            dy: Gradient with respect to the output; never written.
            saved: What `forward` returned beside the output.
            need_dx: If False, the input's gradient isn't computed and None is returned.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Arguments that build this layer again, JSON values only; weights are not among them."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any], children: dict[str, Layer]) -> Self:
        """The layer of this `config` around these inner layers, its own weights any."""
        return cls(**config, **children)

    def __call__(self, x: Array) -> Array:
        """The output in evaluation mode."""
        with backend_of(x).activate():
            return self.forward(x)[0]

    def __repr__(self) -> str:
        given = {name: value for name, value in self.config().items() if value is not None}
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{type(self).__name__}({arguments})"

    def children(self) -> Iterator[tuple[str, Layer]]:
        """The inner layers by name, in attribute order."""
        for name, value in vars(self).items():
            if isinstance(value, Layer):
                yield name, value

    def layers(self) -> Iterator[Layer]:
        """This layer and all inner ones, each once, outermost first."""
        seen: set[Layer] = set()
        pending: list[Layer] = [self]
        while pending:
            layer = pending.pop(0)
            if layer not in seen:
                seen.add(layer)
                yield layer
                pending[:0] = [child for _, child in layer.children()]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The parameters by name ("weight", nested "0.weight"), shared ones once.

        Raises:
            TypeError: A list, tuple, set or dict attribute holds a parameter or an inner layer that
                would be neither trained nor saved.
        """
        found: dict[Parameter, str] = {}
        for name, p in self._named_parameters():
            found.setdefault(p, name)
        self._check_nothing_hidden(found)
        for p, name in found.items():
            yield name, p

    def _check_nothing_hidden(self, parameters: dict[Parameter, str]) -> None:
        layers = dict.fromkeys(self.layers())
        for layer in layers:
            chosen = type(layer).children is not Layer.children  # it says which are its layers
            for name, value in vars(layer).items():
                if not isinstance(value, _CONTAINERS):
                    continue
                for item in _contents(value):
                    if isinstance(item, Parameter) and item not in parameters:
                        what, remedy = "Parameter", ""
                    elif isinstance(item, Layer) and not chosen and item not in layers:
                        what, remedy = "Layer", ", or override children()"
                    else:
                        continue
                    raise TypeError(
                        f"{type(layer).__name__}: attribute {name!r} holds a {what} inside a "
                        f"{type(value).__name__}; keep it in an attribute of its own{remedy}"
                    )

    def _named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield name, value
        for name, child in self.children():
            for inner, p in child._named_parameters():
                yield f"{name}.{inner}", p

    @property
    def n_parameters(self) -> int:
        """Number of parameters, of all models together; shared ones count once."""
        return sum(int(p.value.size) for _, p in self.parameters())

    def summary(
        self, batch_size: int | None = None, *, input_shape: tuple[int, ...] | None = None
    ) -> str:
        """A table of the innermost layers: name, layer, number of parameters and their bytes.

        Args:
            batch_size: Adds the shape and bytes of each layer's output for so many samples, and
                what a forward and a backward pass in training take, as `Trainer.memory` counts it.
            input_shape: Shape of a sample, where no layer tells its width.
        """
        from nnx.memory import summary

        return summary(self, batch_size, input_shape)

    def _leaves(self, path: str = "") -> Iterator[tuple[str, str, Layer]]:
        """Name, description and layer of each inner layer that has no inner layers."""
        for name, child in self.children():
            if any(child.children()):
                yield from child._leaves(f"{path}{name}.")
            else:
                yield path + name, repr(child), child

    def buffers(self) -> Iterator[tuple[str, Array]]:
        """The buffers by name ("running_mean", nested "1.running_mean"), shared ones once."""
        seen: set[int] = set()
        for name, array in self._named_buffers():
            if id(array) not in seen:
                seen.add(id(array))
                yield name, array

    def _named_buffers(self) -> Iterator[tuple[str, Array]]:
        for name in self.buffer_names:
            yield name, getattr(self, name)
        for name, child in self.children():
            for inner, array in child._named_buffers():
                yield f"{name}.{inner}", array

    def state(self) -> dict[str, Array]:
        """All arrays that make up the layer, parameters and buffers, by name."""
        return {name: p.value for name, p in self.parameters()} | dict(self.buffers())

    def load_state(self, state: dict[str, Any]) -> None:
        """Copy arrays into the layer.

        Raises:
            ValueError: A name is missing or unknown, or a shape differs.
            TypeError: A dtype differs.
        """
        own = self.state()
        if own.keys() != state.keys():
            missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ValueError(
                f"load_state: expected the arrays {sorted(own)}, got {sorted(state)}; "
                f"missing {missing}, unknown {unknown}"
            )
        for name, array in own.items():
            new = state[name]
            if array.shape != new.shape:
                raise ValueError(
                    f"load_state: expected {name} of shape {array.shape}, got {new.shape}"
                )
            if array.dtype != new.dtype:
                raise TypeError(
                    f"load_state: expected {name} of dtype {array.dtype}, got {new.dtype}"
                )
        for name, array in own.items():
            backend = backend_of(array)
            with backend.activate():
                array[...] = backend.asarray(state[name])

    def to(self, backend: str | Backend) -> Self:
        """Move parameters, gradients, buffers and the optimizer's state; returns the layer.

        If there is no room for them, nothing has moved.
        """
        from nnx.backends import get_backend

        target = get_backend(backend) if isinstance(backend, str) else backend

        def moved(array: Array) -> Array:
            return target.asarray(backend_of(array).to_numpy(array))

        parameters = [p for _, p in self.parameters()]
        vectors = {p.vector: None for p in parameters if p.vector is not None}
        loose = [(p, moved(p.value), moved(p.grad)) for p in parameters if p.vector is None]
        buffers = [
            (layer, name, moved(getattr(layer, name)))
            for layer in self.layers()
            for name in layer.buffer_names
            if backend_of(getattr(layer, name)) is not target
        ]
        for vector in vectors:
            vector.to(target)
        for p, value, grad in loose:
            p.value, p.grad = value, grad
        for layer, name, array in buffers:
            setattr(layer, name, array)
        return self

    def replicate(self, n_models: int) -> Self:
        """A copy with a leading model axis: `n_models` models of the same weights, in one.

        Arrays become `(K, N, ...)`, parameters `(K, ...)` and losses `(K,)`; the products run
        batched. Give the models different weights by `load_state` or `p.value[k] = ...`. What is
        shared, layers, parameters and buffers, is shared in the copy.
        """
        return self._replicate(operator.index(n_models), {})

    def _replicate(self, n_models: int, made: dict[int, Any]) -> Self:
        """`replicate` within a larger one; `made` holds what was copied so far, by `id`."""
        if id(self) in made:
            known: Self = made[id(self)]
            return known
        if self.n_models is not None:
            raise ValueError(f"replicate: {self!r} already holds {self.n_models} models")
        new = made[id(self)] = copy.copy(self)
        for name, value in vars(self).items():
            if name in self.buffer_names:
                if id(value) not in made:
                    made[id(value)] = backend_of(value).xp.repeat(value[None], n_models, axis=0)
                setattr(new, name, made[id(value)])
            else:
                setattr(new, name, _replicated(value, n_models, made))
        new.n_models = n_models
        return new


_CONTAINERS = (list, tuple, set, frozenset, dict)


def _contents(container: Any) -> Iterator[Any]:
    """What is inside a container, and inside those in it."""
    pending, seen = [container], set()
    while pending:
        item = pending.pop()
        if not isinstance(item, _CONTAINERS):
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            pending += item.values() if isinstance(item, dict) else item


def _replicated(value: Any, n_models: int, made: dict[int, Any]) -> Any:
    """An attribute's value in the replicated layer, the layers in a list or the like included."""
    if isinstance(value, Layer):
        return value._replicate(n_models, made)
    if isinstance(value, Parameter):
        if id(value) not in made:
            stacked = backend_of(value.value).xp.repeat(value.value[None], n_models, axis=0)
            scales = {"lr_scale": value.lr_scale, "decay_scale": value.decay_scale}
            made[id(value)] = Parameter(stacked, **scales)
        return made[id(value)]
    if not any(isinstance(item, (Layer, Parameter)) for item in _contents(value)):
        return value
    if type(value) is dict:
        return {key: _replicated(item, n_models, made) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replicated(item, n_models, made) for item in value)
    return value
