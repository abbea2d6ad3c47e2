"""What the tests of the optimizers' kernels share: every rule, with all kinds of settings."""

from typing import Any

import numpy as np

from nnx.backends.base import Array, Groups, Update

ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
RMS = {"alpha": 0.9, "eps": 1e-8, "momentum": 0.0}
# operation, its slots in order (positive ones in capitals, "-" for None), decay, shrink, options
CASES: dict[str, tuple[str, str, float, float, dict[str, Any]]] = {
    "sgd": ("sgd", "-", 0, 0, {"momentum": 0.0, "nesterov": False}),
    "sgd decay": ("sgd", "-", 0.3, 0, {"momentum": 0.0, "nesterov": False}),
    "momentum": ("sgd", "u", 0.1, 0, {"momentum": 0.9, "nesterov": False}),
    "nesterov": ("sgd", "u", 0.1, 0, {"momentum": 0.9, "nesterov": True}),
    "adam": ("adam", "mV-", 0.1, 0, ADAM),
    "adam settings": ("adam", "mV-", 0, 0, {"beta1": 0.0, "beta2": 0.5, "eps": 1e-3}),
    "adamw": ("adam", "mV-", 0, 0.1, ADAM),
    "amsgrad": ("adam", "mVX", 0.1, 0, ADAM),
    "adamw amsgrad": ("adam", "mVX", 0, 0.1, ADAM),
    "adagrad": ("adagrad", "S", 0.1, 0, {"lr_decay": 0.1, "initial": 0.2, "eps": 1e-10}),
    "rmsprop": ("rmsprop", "V--", 0.1, 0, RMS),
    "rmsprop centered": ("rmsprop", "Vm-", 0.1, 0, RMS),
    "rmsprop momentum": ("rmsprop", "V-u", 0.1, 0, RMS | {"momentum": 0.5}),
    "rmsprop both": ("rmsprop", "Vmu", 0, 0, RMS | {"momentum": 0.5}),
    "lion": ("lion", "m", 0, 0.1, {"beta1": 0.9, "beta2": 0.99}),
}
OFF: dict[str, Any] = {"l1": 0.0, "l2": 0.0, "clip_value": None, "clip_norm": None}
CONDITIONS: dict[str, dict[str, Any]] = {
    "l1": OFF | {"l1": 0.1},
    "l2": OFF | {"l2": 0.1},
    "value": OFF | {"clip_value": 0.5},
    "norm": OFF | {"clip_norm": 1.5},
    "large norm": OFF | {"clip_norm": 1e4},  # leaves the gradient alone
    "all": {"l1": 0.1, "l2": 0.2, "clip_value": 0.5, "clip_norm": 1.5},
}
# models, elements of each, elements before the first; a block takes 2048 elements of a model at a
# time
SHAPES = [(1, 64, 0), (3, 448, 0), (3, 448, 1), (40, 64, 0), (2, 2112, 0)]
RATES = np.array([0.1, 0.05, 0.2])


def runs(size: int) -> list[tuple[int, int, float, float]]:
    """Stretches with all kinds of settings; the second is frozen, the last two without decay."""
    settings = [(1.0, 1.0), (0.0, 1.0), (0.5, 0.0), (2.0, 0.5)]
    starts = [start for start in (0, 64, 128, 1984) if start < size]
    stops = [*starts[1:], size]
    return [(a, b, *s) for a, b, s in zip(starts, stops, settings, strict=False)]


class Run:
    """Steps of an optimizer on a backend; what it works on begins at `offset` of an array."""

    def __init__(self, backend: Any, dtype: Any, shape: tuple[int, int, int], name: str) -> None:
        n_models, size, self.offset = shape
        self.backend, self.dtype = backend, dtype
        self.operation, letters, self.decay, self.shrink, self.options = CASES[name]
        rng = np.random.default_rng(7)
        normal = rng.standard_normal((5, n_models, size))
        self.value = self.place(normal[0])
        self.slots: list[Array | None] = [
            # second moments are above squares of first ones
            self.place(np.abs(a) + 20 if letter.isupper() else a) if letter != "-" else None
            for letter, a in zip(letters, normal[1:], strict=False)
        ]
        self.gradients = rng.standard_normal((len(RATES), n_models, size))
        self.losses = rng.standard_normal((len(RATES), n_models))
        self.groups = Groups(runs(size), backend)
        self.state = backend.step_state()
        self.state.plan(RATES, dtype=dtype, n_models=n_models)

    def place(self, a: np.ndarray) -> Array:
        """`a` on the backend, rounded as the device's is."""
        flat = np.zeros(a.size + self.offset, self.dtype)
        flat[self.offset :] = a.ravel()
        return self.backend.asarray(flat)[self.offset :].reshape(a.shape)

    def update(self, step: int, condition: str | None = None) -> Update:
        update = Update(
            self.value,
            self.place(self.gradients[step]),
            tuple(self.slots),
            self.groups,
            self.state,
            self.backend.asarray(self.losses[step].astype(self.dtype)),
            decay=self.decay,
            shrink=self.shrink,
        )
        if condition is not None:
            update = self.backend.condition(update, **CONDITIONS[condition])
        return update

    def apply(self, update: Update) -> None:
        getattr(self.backend, self.operation)(update, **self.options)

    def arrays(self) -> list[np.ndarray]:
        there = [a for a in (self.value, *self.slots) if a is not None]
        return [self.backend.to_numpy(a) for a in there]
