"""Optimizers: one operation over the flat parameter vector per step.

Formulas and defaults are PyTorch's. The learning rate is a number, or a schedule: a function of
the step number (0, 1, ...). Hyper-parameters are checked when the optimizer is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from nnx._checks import check_range
from nnx.backends import Array, StepState
from nnx.parameter import ParameterVector

Schedule: TypeAlias = Callable[[int], float]


class Optimizer:
    """Changes the parameters against their gradients.

    Args:
        lr: Learning rate, or a function from the step number to it.
        weight_decay: `weight_decay * value` is added to the gradient (L2 penalty).
    """

    PLAN = 1024
    """Steps planned at a time where nobody says how many there will be."""

    def __init__(self, lr: float | Schedule, weight_decay: float = 0.0) -> None:
        who = type(self).__name__
        if not callable(lr):
            check_range(who, "lr", lr, 0, math.inf, closed="[")
        check_range(who, "weight_decay", weight_decay, 0, math.inf, closed="[")
        self.lr = lr
        self.weight_decay = weight_decay
        self._vector: ParameterVector | None = None
        self._steps: StepState | None = None
        self._slots: dict[str, Array] = {}

    @property
    def vector(self) -> ParameterVector:
        """The parameters being optimized."""
        if self._vector is None:
            who = type(self).__name__
            raise RuntimeError(
                f"{who}: not bound to parameters yet; call bind(vector) or make a Trainer"
            )
        return self._vector

    @property
    def steps(self) -> StepState:
        """Step number, learning rates and loss log, where the parameters are."""
        here = self.vector.backend
        if self._steps is None or self._steps.backend is not here:
            fresh = here.step_state()
            if self._steps is not None:  # the model has moved, and the state follows
                fresh.number, there = self._steps.number, self._steps.backend
                self._slots = {
                    name: here.asarray(there.to_numpy(a)) for name, a in self._slots.items()
                }
            self._steps = fresh
        return self._steps

    def slot(self, name: str) -> Array:
        """The state `name`, `(K, P)` like the parameters; zeros when first asked for."""
        if name not in self._slots:
            vector = self.vector
            self._slots[name] = vector.backend.xp.zeros_like(vector.value)
        return self._slots[name]

    def bind(self, vector: ParameterVector) -> None:
        """Work on these parameters from now on. An optimizer belongs to one vector."""
        if self._vector is not None and self._vector is not vector:
            raise ValueError(
                f"{type(self).__name__}: already bound to other parameters; make a new optimizer"
            )
        self._vector = vector

    def plan(self, n_steps: int, order: np.ndarray | None = None) -> None:
        """Lay out the next `n_steps`: learning rates, loss log, order of the samples."""
        steps = self.steps
        if callable(self.lr):
            rates = np.array([self.lr(steps.number + i) for i in range(n_steps)], np.float64)
        else:
            rates = np.full(n_steps, self.lr, np.float64)
        vector = self.vector
        steps.plan(rates, dtype=vector.value.dtype, n_models=vector.n_models, order=order)

    def begin_step(self) -> StepState:
        """Make the next gradients the first of a step, and see to it that the step is planned."""
        steps = self.steps
        if steps.position >= len(steps.rates):
            self.plan(self.PLAN)
        return steps

    def step(self, loss: Array | None = None) -> None:
        """Update the parameters from their gradients; a gradient nobody wrote counts as 0.

        Args:
            loss: The step's loss, entered in the loss log by the same operation.
        """
        steps, vector = self.begin_step(), self.vector
        vector.clear_unwritten()
        self._update(vector, steps, loss)
        vector.begin_step()

    def _update(self, vector: ParameterVector, steps: StepState, loss: Array | None) -> None:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on: `step`, and the slots by name."""
        return {"step": self.steps.number, **self._slots}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`."""
        vector, steps = self.vector, self.steps
        slots = {name: array for name, array in state.items() if name != "step"}
        for name, array in slots.items():
            if array.shape != vector.value.shape or array.dtype != vector.value.dtype:
                raise ValueError(
                    f"load_state: expected {name} of shape {vector.value.shape} and dtype "
                    f"{vector.value.dtype}, got {array.shape} and {array.dtype}"
                )
        for name, array in slots.items():
            self.slot(name)[...] = vector.backend.asarray(array)
        steps.number, steps.position, steps.rates = int(state["step"]), 0, np.empty(0)

    def config(self) -> dict[str, Any]:
        """Arguments that build this optimizer again."""
        return {"lr": self.lr, "weight_decay": self.weight_decay}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{type(self).__name__}({arguments})"


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov's variant of it.

    `g = grad + weight_decay * value`; `u = momentum * u + g`; then `value -= lr * u`, with Nesterov
    `value -= lr * (g + momentum * u)`. This is PyTorch's form (Sutskever et al. 2013, "On the
    importance of initialization and momentum in deep learning", with the learning rate outside u).

    Args:
        lr: Learning rate or schedule.
        momentum: In [0, 1).
        nesterov: Needs momentum.
        weight_decay: L2 penalty, at least 0.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(lr, weight_decay)
        check_range("SGD", "momentum", momentum, 0, 1, closed="[")
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs momentum above 0, got momentum=0")
        self.momentum, self.nesterov = momentum, nesterov

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().config(), "momentum": self.momentum, "nesterov": self.nesterov}

    def _update(self, vector: ParameterVector, steps: StepState, loss: Array | None) -> None:
        vector.backend.sgd(
            vector.value,
            vector.grad,
            self.slot("velocity") if self.momentum else None,
            vector.groups,
            steps,
            loss,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


class Adam(Optimizer):
    """Adam: steps of about the learning rate, whatever the gradient's scale.

    `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`, and in step t = 1, 2, ...
    `value -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)`, with
    `g = grad + weight_decay * value`. Kingma and Ba 2015, "Adam: a method for stochastic
    optimization", algorithm 1.

    Args:
        lr: Learning rate or schedule.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: At least 0; keeps the denominator from 0.
        weight_decay: L2 penalty, at least 0.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(lr, weight_decay)
        check_range("Adam", "beta1", beta1, 0, 1, closed="[")
        check_range("Adam", "beta2", beta2, 0, 1, closed="[")
        check_range("Adam", "eps", eps, 0, math.inf, closed="[")
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().config(), "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}

    def _update(self, vector: ParameterVector, steps: StepState, loss: Array | None) -> None:
        vector.backend.adam(
            vector.value,
            vector.grad,
            self.slot("m"),
            self.slot("v"),
            vector.groups,
            steps,
            loss,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
