"""Parameters, and the flat vector that holds them all. Of nnx this imports the backends alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnx.backends import Array, Backend, backend_of
from nnx.backends.base import Groups


class Parameter:
    """An array that training changes, and the gradient of the loss with respect to it.

    A copy (`copy.deepcopy`, `pickle`) has a value of its own and belongs to no `ParameterVector`;
    its gradient is 0.

    Args:
        value: The initial value; kept, not copied.
        lr_scale: Factor of the learning rate for this parameter; 0 freezes it.
        decay_scale: Factor of the weight decay for this parameter. Both are fixed once a
            `ParameterVector` holds the parameter.

    Attributes:
        value: The array. Change it in place (`p.value[...] = a`): it may be a view of a
            `ParameterVector`.
        grad: The gradient, always an array of the same shape; what it holds before the first
            backward pass is 0.
        fresh: True from the beginning of a step until the first contribution to `grad`. That one
            overwrites, the later ones add, and nobody needs to clear.
    """

    __slots__ = ("_decay_scale", "_lr_scale", "fresh", "grad", "value", "vector")

    def __init__(self, value: Array, *, lr_scale: float = 1.0, decay_scale: float = 1.0) -> None:
        self.value = value
        self.grad = backend_of(value).xp.zeros_like(value)
        self.fresh = True
        self._lr_scale = lr_scale
        self._decay_scale = decay_scale
        self.vector: ParameterVector | None = None

    def __repr__(self) -> str:
        return f"Parameter{tuple(self.value.shape)}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.value.copy(), self.lr_scale, self.decay_scale)

    @property
    def lr_scale(self) -> float:
        """Factor of the learning rate."""
        return self._lr_scale

    @lr_scale.setter
    def lr_scale(self, scale: float) -> None:
        self._check_unbound("lr_scale")
        self._lr_scale = scale

    @property
    def decay_scale(self) -> float:
        """Factor of the weight decay."""
        return self._decay_scale

    @decay_scale.setter
    def decay_scale(self, scale: float) -> None:
        self._check_unbound("decay_scale")
        self._decay_scale = scale

    def _check_unbound(self, name: str) -> None:
        if self.vector is not None:
            raise ValueError(
                f"Parameter: {name} is fixed once a Trainer holds the parameter; set it before"
            )

    def accumulate(self) -> bool:
        """Whether the contribution about to be written must add; it counts as written from here."""
        fresh, self.fresh = self.fresh, False
        return not fresh


class ParameterVector:
    """The values of all parameters in one flat buffer, and their gradients in another.

    An optimizer updates the whole model by one operation on it. The parameters follow each other in
    the order given, the elements of each in row-major (C) order. Each parameter starts at a
    multiple of 64 elements; the gaps hold zeros and stay zero.

    Args:
        parameters: All of one dtype, backend and number of models; their `value` and `grad` are
            copied in and then rebound to views. A parameter belongs to one vector.
        n_models: Number of models K if every parameter has a leading model axis.

    Attributes:
        value: `(K, P)`, one row per model; K is 1 without a model axis.
        grad: `(K, P)`.
        groups: Which elements have which learning rate scale and decay scale.

    Raises:
        ValueError: No parameters, one that belongs to another vector, or a leading axis not K.
        TypeError: Mixed dtypes or backends.
    """

    def __init__(self, parameters: Sequence[Parameter], n_models: int | None = None) -> None:
        if not parameters:
            raise ValueError("ParameterVector: expected at least one parameter, got none")
        for p in parameters:
            if p.vector is not None:
                raise ValueError(
                    f"ParameterVector: {p} already belongs to another vector; "
                    "train the model with the Trainer that holds it, or a deep copy of the model"
                )
            if n_models is not None and p.value.shape[:1] != (n_models,):
                raise ValueError(
                    f"ParameterVector: expected a leading axis of {n_models} models, got {p}"
                )
            if p.value.dtype != parameters[0].value.dtype:
                raise TypeError(
                    "ParameterVector: expected parameters of one dtype, got "
                    f"{parameters[0].value.dtype} and {p.value.dtype}"
                )
        backend = backend_of(*(p.value for p in parameters))
        self.parameters = tuple(parameters)
        self.n_models = n_models
        self._spans: list[tuple[int, int]] = []
        start = 0
        for p in parameters:
            size = p.value.size // (n_models or 1)
            self._spans.append((start, start + size))
            start += -(-size // Groups.BLOCK) * Groups.BLOCK
        shape = (n_models or 1, start)
        dtype = parameters[0].value.dtype
        self._place(
            backend, backend.xp.zeros(shape, dtype), backend.xp.zeros(shape, dtype), copy=True
        )
        for p in parameters:
            p.vector = self

    @property
    def size(self) -> int:
        """Number of parameters of one model, gaps not counted."""
        return sum(stop - start for start, stop in self._spans)

    def clear_unwritten(self) -> None:
        """Zero the gradients to which no backward pass of this step has contributed."""
        for p in self.parameters:
            if p.fresh:
                self.backend.xp.copyto(p.grad, 0)

    def begin_step(self) -> None:
        """Make the next contribution to every gradient the first."""
        for p in self.parameters:
            p.fresh = True

    def to(self, backend: Backend) -> None:
        """Move values and gradients to `backend`; an optimizer's state follows in its next step."""
        if backend is self.backend:
            return

        def move(a: Array) -> Array:
            return backend.asarray(self.backend.to_numpy(a))

        value, grad = move(self.value), move(self.grad)
        self._place(backend, value, grad, copy=False)

    def _place(self, backend: Backend, value: Array, grad: Array, *, copy: bool) -> None:
        """Make `value` and `grad` the buffers and rebind every parameter to its view.

        What may fail for want of memory comes first, so that it leaves everything as it was.
        """
        runs: list[tuple[int, int, float, float]] = []
        for p, (start, stop) in zip(self.parameters, self._spans, strict=True):
            end = -(-stop // Groups.BLOCK) * Groups.BLOCK
            runs.append((start, end, float(p.lr_scale), float(p.decay_scale)))
        self.groups = Groups(_merge(runs), backend)
        self.backend, self.value, self.grad = backend, value, grad
        for p, (start, stop) in zip(self.parameters, self._spans, strict=True):
            for name, flat in (("value", value), ("grad", grad)):
                old = getattr(p, name)
                new = self._view(flat, start, stop, old.shape)
                if copy:
                    new[...] = old
                setattr(p, name, new)

    def _view(self, flat: Array, start: int, stop: int, shape: tuple[int, ...]) -> Any:
        rows = flat[0, start:stop] if self.n_models is None else flat[:, start:stop]
        return rows.reshape(shape)


def _rebuild(value: Array, lr_scale: float, decay_scale: float) -> Parameter:
    """The copy of a parameter, in no vector."""
    return Parameter(value, lr_scale=lr_scale, decay_scale=decay_scale)


def _merge(runs: list[tuple[int, int, float, float]]) -> list[tuple[int, int, float, float]]:
    """Join neighbours of equal settings, so that a model without groups is one run."""
    merged: list[tuple[int, int, float, float]] = []
    for start, stop, lr_scale, decay_scale in runs:
        if merged and merged[-1][2:] == (lr_scale, decay_scale):
            start = merged.pop()[0]
        merged.append((start, stop, lr_scale, decay_scale))
    return merged
