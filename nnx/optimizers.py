"""Optimizers: one operation over the flat parameter vector per step.

Formulas and defaults are PyTorch's. The learning rate is a number, or a schedule: a function of
the step number (0, 1, ...), such as those of `nnx.schedules`. Hyper-parameters are checked when the
optimizer is made.

A step goes: penalties of the objective (`l1`, `l2`) are added to the gradient, the gradient is
clipped (`clip_value`, then `clip_norm`), and the optimizer's own rule follows, its `weight_decay`
included. That is the order of PyTorch, where a penalty is part of the loss, `clip_grad_norm_` comes
after `backward`, and the weight decay is in the optimizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Self, TypeAlias, TypedDict, Unpack

import numpy as np

from nnx._checks import check_range
from nnx.backends import Array, Backend, StepState
from nnx.backends.base import Update
from nnx.parameter import ParameterVector

Schedule: TypeAlias = Callable[[int], float]


class Limits(TypedDict, total=False):
    """Penalties and clipping; see `Optimizer`."""

    l1: float
    l2: float
    clip_value: float | None
    clip_norm: float | None


class Options(Limits, total=False):
    """What every optimizer takes; see `Optimizer`."""

    weight_decay: float


class Optimizer:
    """Changes the parameters against their gradients.

    Penalties. The objective is `loss + decay_scale * (l1 sum|w| + l2/2 sum w^2)`; both at once is
    the elastic net (Zou and Hastie 2005, "Regularization and variable selection via the elastic
    net", without its rescaling). So `l1 * sign(w) + l2 * w` is added to the gradient, whatever the
    batch size, and `sign(0) = 0`. The reported loss doesn't contain it; `penalty()` computes it.
    Everything is penalized, as in PyTorch. To leave out the biases, before the Trainer is made:

        for name, p in model.parameters():
            if name.endswith("bias"):
                p.decay_scale = 0.0

    Clipping. `clip_value` limits each element of the gradient to `[-clip_value, clip_value]`.
    `clip_norm` multiplies the gradient by `min(1, clip_norm / (norm + 1e-6))`, with the Euclidean
    norm over all parameters of one model (Pascanu et al. 2013, "On the difficulty of training
    recurrent neural networks", algorithm 1, as `torch.nn.utils.clip_grad_norm_`). Nobody waits for
    the norm; if it is NaN, so is every gradient. Frozen parameters count as having no gradient.
    After `step` the gradients are penalized and clipped by value; the factor of `clip_norm` goes
    into the step alone, and so does the weight decay.

    On CuPy a step is one launch, whatever the rule and the groups of parameters; penalties and
    clipping are together one more. Both read what changes from step to step on the device.

    Args:
        lr: Learning rate, or a function from the step number to it.
        weight_decay: `weight_decay * decay_scale * value` is added to the gradient after clipping
            (L2 penalty); `AdamW` and `Lion` instead shrink the parameters.
        l1: Factor of the L1 penalty, at least 0.
        l2: Factor of the L2 penalty, at least 0. Differs from `weight_decay` where the gradient is
            clipped, or the weight decay decoupled.
        clip_value: Limit of a gradient's elements, above 0.
        clip_norm: Limit of the gradient's norm, above 0.

    Raises:
        ValueError: A hyper-parameter is out of its range.
    """

    PLAN = 1024
    """Steps planned at a time where nobody says how many there will be."""

    decoupled = False
    """Whether the weight decay shrinks the parameters instead of adding to the gradient."""

    def __init__(
        self,
        lr: float | Schedule,
        weight_decay: float = 0.0,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        clip_value: float | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self._vector: ParameterVector | None = None
        self._steps: StepState | None = None
        self._slots: dict[str, Array] = {}
        self._named: tuple[str | None, ...] | None = None  # what of them the last step used,
        self._used: tuple[Array | None, ...] = ()  # and these are they
        self.lr = lr
        self._check("weight_decay", weight_decay)
        self._check("l1", l1)
        self._check("l2", l2)
        for name, limit in (("clip_value", clip_value), ("clip_norm", clip_norm)):
            if limit is not None:
                check_range(type(self).__name__, name, limit, 0, math.inf)
        self.weight_decay = weight_decay
        self.l1, self.l2 = l1, l2
        self.clip_value, self.clip_norm = clip_value, clip_norm

    @property
    def lr(self) -> float | Schedule:
        """Learning rate or schedule. A new one holds from the next step on."""
        return self._lr

    @lr.setter
    def lr(self, lr: float | Schedule) -> None:
        if not callable(lr):
            self._check("lr", lr)
        self._lr = lr
        self._set_rates()

    def _set_rates(self) -> None:
        """Give the steps that are planned and not done their learning rates anew."""
        steps = self._steps
        if steps is not None and not steps.exhausted:
            done, left = steps.rates[: steps.position], len(steps.rates) - steps.position
            steps.set_rates(np.concatenate([done, self._rates(steps.number, left)]))

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
                self._named, self._used = None, ()
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

    def rehearsal(self, vector: ParameterVector) -> Self:
        """One like this for other parameters, without state and of learning rate 0."""
        twin = copy.copy(self)
        twin._vector, twin._steps, twin._slots, twin._lr = vector, None, {}, 0.0
        twin._named = None
        return twin

    def plan(
        self,
        n_steps: int,
        order: np.ndarray | None = None,
        *,
        at_most: bool = False,
        fresh_log: bool = True,
    ) -> None:
        """Lay out the next `n_steps`: learning rates, loss log, order of the samples.

        With `at_most` a schedule that ends sooner ends the plan; its error is that of its own step.
        `fresh_log` is that of `StepState.plan`.

        Raises:
            ValueError: The schedule gives a rate that is negative or not finite.
        """
        steps, vector = self.steps, self.vector
        rates = self._rates(steps.number, n_steps, at_most=at_most)
        dtype, n_models = vector.value.dtype, vector.n_models
        steps.plan(rates, dtype=dtype, n_models=n_models, order=order, fresh_log=fresh_log)

    def _rates(self, first: int, n_steps: int, *, at_most: bool = False) -> np.ndarray:
        """Learning rates of the steps from `first` on, float64."""
        if not callable(self._lr):
            return np.full(n_steps, self._lr, np.float64)
        rates: list[float] = []
        for step in range(first, first + n_steps):
            try:
                rate = float(self._lr(step))
                if not 0 <= rate < math.inf:
                    raise ValueError(
                        f"{type(self).__name__}: expected the schedule to give a finite learning "
                        f"rate of at least 0, got {rate} for step {step}"
                    )
            except Exception:
                if at_most and rates:
                    break
                raise
            rates.append(rate)
        return np.array(rates, np.float64)

    def begin_step(self) -> StepState:
        """Make the next gradients the first of a step, and see to it that the step is planned.

        Gradients that somebody left behind, or an interrupted step, don't count in the next.
        """
        self.vector.begin_step()
        return self.planned()

    def planned(self) -> StepState:
        """`steps`, with a learning rate and a place in the loss log for the next one."""
        steps = self.steps
        if steps.exhausted:
            self.plan(self.PLAN, at_most=True)
        return steps

    def step(self, loss: Array | None = None) -> None:
        """Update the parameters from their gradients; a gradient nobody wrote counts as 0.

        Args:
            loss: The step's loss, entered in the loss log by the same operation.
        """
        steps, vector = self.planned(), self.vector
        vector.clear_unwritten()
        names = self._names()
        if names != self._named:  # their settings may change between steps, but seldom do
            self._used = tuple([name and self.slot(name) for name in names])
            self._named = names
        decay, shrink = self.weight_decay, 0.0
        if self.decoupled:
            decay, shrink = shrink, decay
        value, grad, groups = vector.value, vector.grad, vector.groups
        update = Update(value, grad, self._used, groups, steps, loss, None, decay, shrink)
        if self.l1 or self.l2 or self.clip_value is not None or self.clip_norm is not None:
            update = vector.backend.condition(
                update,
                l1=self.l1,
                l2=self.l2,
                clip_value=self.clip_value,
                clip_norm=self.clip_norm,
            )
        self._update(vector.backend, update)
        vector.begin_step()

    def penalty(self) -> Array:
        """`decay_scale * (l1 sum|w| + l2/2 sum w^2)`, `()` or `(K,)`, on the device."""
        vector = self.vector
        xp = vector.backend.xp
        with vector.backend.activate():
            total = xp.zeros(len(vector.value), vector.value.dtype)
            for (w,), _, scale in vector.backend.pieces(vector.groups, vector.value):
                total += scale * self.l1 * xp.abs(w).sum(axis=-1)
                total += scale * self.l2 / 2 * (w * w).sum(axis=-1)
        return total[0, ...] if vector.n_models is None else total

    def _names(self) -> tuple[str | None, ...]:
        """The rule's slots, in the order of its operation; None for one not in use."""
        raise NotImplementedError

    def _update(self, backend: Backend, update: Update) -> None:
        """The optimizer's rule: one operation of the backend."""
        raise NotImplementedError

    def _check(self, name: str, value: float, high: float = math.inf) -> None:
        """Check that a hyper-parameter is in [0, high)."""
        check_range(type(self).__name__, name, value, 0, high, closed="[")

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on: `step`, and the slots by name."""
        return {"step": self.steps.number, **self._slots}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`; slots that it doesn't hold are zero again."""
        vector, steps = self.vector, self.steps
        if "step" not in state:
            raise ValueError(f"load_state: expected a state with 'step', got {sorted(state)}")
        slots = {name: array for name, array in state.items() if name != "step"}
        for name, array in slots.items():
            if array.shape != vector.value.shape or array.dtype != vector.value.dtype:
                raise ValueError(
                    f"load_state: expected {name} of shape {vector.value.shape} and dtype "
                    f"{vector.value.dtype}, got {array.shape} and {array.dtype}"
                )
        with vector.backend.activate():
            for name in self._slots.keys() - slots.keys():
                self._slots[name].fill(0)
            for name, array in slots.items():
                self.slot(name)[...] = vector.backend.asarray(array)
        steps.number = int(state["step"])
        if steps.order is None:
            steps.rewind()
        else:  # an epoch goes on with its samples
            self._set_rates()

    def config(self) -> dict[str, Any]:
        """Arguments that build this optimizer again; options that are off are left out."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        return {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            **{name: value for name, value in options.items() if value},
        }

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{type(self).__name__}({arguments})"


_OPTIONS = ("l1", "l2", "clip_value", "clip_norm")


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov's variant of it.

    `g = grad + weight_decay * value`; `u = momentum * u + g`; then `value -= lr * u`, with Nesterov
    `value -= lr * (g + momentum * u)`. This is PyTorch's form (Sutskever et al. 2013, "On the
    importance of initialization and momentum in deep learning", with the learning rate outside u).

    Args:
        lr: Learning rate or schedule.
        momentum: In [0, 1).
        nesterov: Needs momentum.
        options: Penalties and clipping, see `Optimizer`.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, **options)
        self._check("momentum", momentum, 1)
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs momentum above 0, got momentum=0")
        self.momentum, self.nesterov = momentum, nesterov

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().config(), "momentum": self.momentum, "nesterov": self.nesterov}

    def _names(self) -> tuple[str | None, ...]:
        return ("velocity" if self.momentum else None,)

    def _update(self, backend: Backend, update: Update) -> None:
        backend.sgd(update, momentum=self.momentum, nesterov=self.nesterov)


class Adam(Optimizer):
    """Adam: steps of about the learning rate, whatever the gradient's scale.

    `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`, and in step t = 1, 2, ...
    `value -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)`, with
    `g = grad + weight_decay * value`. Kingma and Ba 2015, "Adam: a method for stochastic
    optimization", algorithm 1. With `amsgrad` the largest `v` so far takes the place of `v` in the
    last formula (Reddi et al. 2018, "On the convergence of Adam and beyond", algorithm 2; the bias
    correction follows the maximum, as in PyTorch).

    Args:
        lr: Learning rate or schedule.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Above 0; keeps the denominator from 0.
        amsgrad: Whether the largest `v` so far is used.
        options: Weight decay, penalties and clipping, see `Optimizer`.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, **options)
        self._check("beta1", beta1, 1)
        self._check("beta2", beta2, 1)
        check_range(type(self).__name__, "eps", eps, 0, math.inf)
        self.beta1, self.beta2, self.eps, self.amsgrad = beta1, beta2, eps, amsgrad

    def config(self) -> dict[str, Any]:  # noqa: D102
        config = {**super().config(), "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        return config | ({"amsgrad": True} if self.amsgrad else {})

    def _names(self) -> tuple[str | None, ...]:
        return "m", "v", "v_max" if self.amsgrad else None

    def _update(self, backend: Backend, update: Update) -> None:
        backend.adam(update, beta1=self.beta1, beta2=self.beta2, eps=self.eps)


class AdamW(Adam):
    """Adam with decoupled weight decay: `value *= 1 - lr * weight_decay` before Adam's own step.

    Parameters shrink at the same rate whatever their gradients are, where Adam divides the decay by
    `sqrt(v)` with the rest. Loshchilov and Hutter 2019, "Decoupled weight decay regularization",
    algorithm 2, with the learning rate in the decay as in PyTorch.

    Args:
        lr: Learning rate or schedule.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Above 0; keeps the denominator from 0.
        amsgrad: As in `Adam`.
        weight_decay: At least 0; the default is PyTorch's.
        options: Penalties and clipping, see `Optimizer`; `l2` is not decoupled.
    """

    decoupled = True

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        amsgrad: bool = False,
        weight_decay: float = 0.01,
        **options: Unpack[Limits],
    ) -> None:
        super().__init__(
            lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            amsgrad=amsgrad,
            weight_decay=weight_decay,
            **options,
        )


class AMSGrad(Adam):
    """`Adam(amsgrad=True)` by its own name; arguments as in `Adam`."""

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, beta1=beta1, beta2=beta2, eps=eps, amsgrad=True, **options)

    def config(self) -> dict[str, Any]:  # noqa: D102
        return {name: value for name, value in super().config().items() if name != "amsgrad"}


class AdaGrad(Optimizer):
    """AdaGrad: every parameter's rate falls with the squares of its gradients so far.

    `s = s + g^2` and `value -= lr / (1 + t lr_decay) * g / (sqrt(s + initial) + eps)` in step
    t = 0, 1, ..., with `g = grad + weight_decay * value`. Duchi et al. 2011, "Adaptive subgradient
    methods for online learning and stochastic optimization", figure 1 with a diagonal matrix and
    PyTorch's defaults; its `initial_accumulator_value` is `initial` here.

    Args:
        lr: Learning rate or schedule.
        lr_decay: At least 0.
        initial: What the sum of squares begins with, at least 0.
        eps: Above 0; keeps the denominator from 0.
        options: Weight decay, penalties and clipping, see `Optimizer`.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-2,
        *,
        lr_decay: float = 0.0,
        initial: float = 0.0,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, **options)
        self._check("lr_decay", lr_decay)
        self._check("initial", initial)
        check_range(type(self).__name__, "eps", eps, 0, math.inf)
        self.lr_decay, self.initial, self.eps = lr_decay, initial, eps

    def config(self) -> dict[str, Any]:  # noqa: D102
        own = {"lr_decay": self.lr_decay, "initial": self.initial, "eps": self.eps}
        return super().config() | own

    def _names(self) -> tuple[str | None, ...]:
        return ("sum",)

    def _update(self, backend: Backend, update: Update) -> None:
        backend.adagrad(update, lr_decay=self.lr_decay, initial=self.initial, eps=self.eps)


class RMSProp(Optimizer):
    """RMSProp: the gradient over a running root mean square of itself.

    `v = alpha v + (1 - alpha) g^2`, `d = g / (sqrt(v) + eps)` and `value -= lr * d`, with
    `g = grad + weight_decay * value`; centered, `m = alpha m + (1 - alpha) g` and
    `sqrt(v - m^2)` in place of `sqrt(v)` (0 where rounding makes it negative); with momentum
    `u = momentum u + d` and `value -= lr * u`. Tieleman and Hinton 2012, "Lecture 6.5: RMSprop",
    COURSERA: Neural networks for machine learning; centered after Graves 2013, "Generating
    sequences with recurrent neural networks", eq. 38-41. `eps` is outside the root, as in PyTorch.

    Args:
        lr: Learning rate or schedule.
        alpha: Decay of the mean square, in [0, 1).
        eps: Above 0; keeps the denominator from 0.
        momentum: In [0, 1).
        centered: Whether to divide by the standard deviation.
        options: Weight decay, penalties and clipping, see `Optimizer`.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-2,
        *,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, **options)
        self._check("alpha", alpha, 1)
        check_range(type(self).__name__, "eps", eps, 0, math.inf)
        self._check("momentum", momentum, 1)
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered

    def config(self) -> dict[str, Any]:  # noqa: D102
        own = {"alpha": self.alpha, "eps": self.eps}
        own |= {"momentum": self.momentum, "centered": self.centered}
        return super().config() | own

    def _names(self) -> tuple[str | None, ...]:
        return "v", "m" if self.centered else None, "velocity" if self.momentum else None

    def _update(self, backend: Backend, update: Update) -> None:
        backend.rmsprop(update, alpha=self.alpha, eps=self.eps, momentum=self.momentum)


class Lion(Optimizer):
    """Lion: every parameter moves by the learning rate, up or down.

    `value -= lr * (sign(beta1 m + (1 - beta1) g) + weight_decay * value)`, then
    `m = beta2 m + (1 - beta2) g`; `sign(0) = 0`. Chen et al. 2023, "Symbolic discovery of
    optimization algorithms", algorithm 2. Its learning rates are 3 to 10 times smaller than Adam's,
    and its weight decay, which is decoupled, as much larger (section 5).

    Args:
        lr: Learning rate or schedule.
        beta1: Weight of the momentum in the step, in [0, 1).
        beta2: Decay of the momentum, in [0, 1).
        options: Weight decay, penalties and clipping, see `Optimizer`.
    """

    decoupled = True

    def __init__(
        self,
        lr: float | Schedule = 1e-4,
        *,
        beta1: float = 0.9,
        beta2: float = 0.99,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(lr, **options)
        self._check("beta1", beta1, 1)
        self._check("beta2", beta2, 1)
        self.beta1, self.beta2 = beta1, beta2

    def config(self) -> dict[str, Any]:  # noqa: D102
        return super().config() | {"beta1": self.beta1, "beta2": self.beta2}

    def _names(self) -> tuple[str | None, ...]:
        return ("m",)

    def _update(self, backend: Backend, update: Update) -> None:
        backend.lion(update, beta1=self.beta1, beta2=self.beta2)
