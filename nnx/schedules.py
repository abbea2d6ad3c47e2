"""Learning rates as functions of the step number 0, 1, ...: `Adam(lr=Cosine(1e-3, 10_000))`.

Formulas are those of `torch.optim.lr_scheduler` in closed form. A step here is an update, not an
epoch; with S updates in an epoch, `every=10 * S` is every ten epochs. A schedule is a callable
without state, so a run that is resumed reads on where it was. `config()` describes it by JSON
values, and `from_config` makes it again. Of nnx this imports the checks alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from nnx._checks import check_range


class Schedule:
    """A learning rate for each step; called with the step number it returns a float.

    A subclass keeps the constructor's arguments as attributes of the same names.

    Raises:
        ValueError: A rate, a factor or a number of steps is out of its range.
    """

    def __call__(self, step: int) -> float:
        """The learning rate of a step."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """`{"schedule": name of the class, argument: value, ...}`, for `from_config`."""
        values = {
            name: value.config() if isinstance(value, Schedule) else value
            for name, value in vars(self).items()
        }
        return {"schedule": type(self).__name__, **values}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def _check(self, **values: float) -> None:
        """Check that these are finite and at least 0."""
        for name, value in values.items():
            check_range(type(self).__name__, name, value, 0, math.inf, closed="[")

    def _check_steps(self, name: str, value: int) -> None:
        if value != int(value) or value < 1:
            raise ValueError(
                f"{type(self).__name__}: expected {name} to be an integer of at least 1, "
                f"got {value!r}"
            )


class Constant(Schedule):
    """`lr`."""

    def __init__(self, lr: float) -> None:
        self._check(lr=lr)
        self.lr = lr

    def __call__(self, step: int) -> float:  # noqa: D102
        return self.lr


class StepDecay(Schedule):
    """`lr * factor^floor(step / every)`; PyTorch's `StepLR`."""

    def __init__(self, lr: float, every: int, factor: float = 0.1) -> None:
        self._check(lr=lr, factor=factor)
        self._check_steps("every", every)
        self.lr, self.every, self.factor = lr, every, factor

    def __call__(self, step: int) -> float:  # noqa: D102
        return float(self.lr * self.factor ** (step // self.every))


class MultiStep(Schedule):
    """`lr * factor^n` when n of the `milestones` are at most `step`; PyTorch's `MultiStepLR`."""

    def __init__(self, lr: float, milestones: Sequence[int], factor: float = 0.1) -> None:
        self._check(lr=lr, factor=factor)
        self.lr, self.milestones, self.factor = lr, sorted(milestones), factor

    def __call__(self, step: int) -> float:  # noqa: D102
        return float(self.lr * self.factor ** bisect_right(self.milestones, step))


class Exponential(Schedule):
    """`lr * factor^step`; PyTorch's `ExponentialLR`."""

    def __init__(self, lr: float, factor: float) -> None:
        self._check(lr=lr, factor=factor)
        self.lr, self.factor = lr, factor

    def __call__(self, step: int) -> float:  # noqa: D102
        return float(self.lr * self.factor**step)


class Polynomial(Schedule):
    """`end + (lr - end) * (1 - step / steps)^power`, and `end` from step `steps` on.

    With `end=0` PyTorch's `PolynomialLR`; with `power=1` a straight line.
    """

    def __init__(self, lr: float, steps: int, power: float = 1.0, end: float = 0.0) -> None:
        self._check(lr=lr, power=power, end=end)
        self._check_steps("steps", steps)
        self.lr, self.steps, self.power, self.end = lr, steps, power, end

    def __call__(self, step: int) -> float:  # noqa: D102
        if step >= self.steps:
            return self.end
        return float(self.end + (self.lr - self.end) * (1 - step / self.steps) ** self.power)


class InverseTime(Schedule):
    """`lr / (1 + rate * step)`.

    Robbins and Monro 1951, "A stochastic approximation method": rates whose sum diverges and whose
    sum of squares doesn't.
    """

    def __init__(self, lr: float, rate: float) -> None:
        self._check(lr=lr, rate=rate)
        self.lr, self.rate = lr, rate

    def __call__(self, step: int) -> float:  # noqa: D102
        return self.lr / (1 + self.rate * step)


class Cosine(Schedule):
    """`end + (lr - end) * (1 + cos(pi * step / steps)) / 2`, down to `end` at step `steps`.

    Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts", eq. 5;
    PyTorch's `CosineAnnealingLR` up to step `steps`. There it rises again, and here it stays.
    With `restarts` it jumps back to `lr` at step `steps` and the next descent takes `growth` times
    as many steps; PyTorch's `CosineAnnealingWarmRestarts`.

    Args:
        lr: The highest rate.
        steps: Length of the (first) descent.
        end: The lowest rate.
        restarts: Whether to begin anew after each descent.
        growth: How many times longer each descent is than the one before; an integer.
    """

    def __init__(
        self, lr: float, steps: int, end: float = 0.0, *, restarts: bool = False, growth: int = 1
    ) -> None:
        self._check(lr=lr, end=end)
        self._check_steps("steps", steps)
        self._check_steps("growth", growth)
        self.lr, self.steps, self.end = lr, steps, end
        self.restarts, self.growth = restarts, growth

    def __call__(self, step: int) -> float:  # noqa: D102
        length = self.steps
        if not self.restarts:
            step = min(step, length)
        elif self.growth == 1:
            step %= length
        else:
            while step >= length:
                step -= length
                length *= self.growth
        return _between(self.lr, self.end, step / length, cosine=True)


class LinearWarmup(Schedule):
    """Rises in a straight line to the first rate of another schedule, then follows it.

    `after(0) * (start + (1 - start) * step / steps)` before step `steps`, then
    `after(step - steps)`: PyTorch's `SequentialLR` of a `LinearLR` and another. Goyal et al. 2017,
    "Accurate, large minibatch SGD", section 2.2.

    Args:
        after: A schedule, or the rate to stay at.
        steps: Length of the rise.
        start: Where the rise begins, as a fraction in [0, 1]; PyTorch's default is 1/3.
    """

    def __init__(self, after: Schedule | float, steps: int, start: float = 1 / 3) -> None:
        self._check_steps("steps", steps)
        check_range("LinearWarmup", "start", start, 0, 1, closed="[]")
        self.after = after if isinstance(after, Schedule) else Constant(after)
        self.steps, self.start = steps, start

    def __call__(self, step: int) -> float:  # noqa: D102
        if step >= self.steps:
            return self.after(step - self.steps)
        return self.after(0) * (self.start + (1 - self.start) * step / self.steps)


class OneCycle(Schedule):
    """From `lr / divisor` up to `lr`, then down to `lr / (divisor * final_divisor)`.

    The rise ends at step `rise * steps - 1`, the fall at step `steps - 1`; the last rate stays.
    With `three_phases` the rise is followed by a fall of the same length to where it began. Smith
    and Topin 2018, "Super-convergence: very fast training of neural networks using large learning
    rates"; PyTorch's `OneCycleLR`, whose cycle of the momentum has no counterpart here.

    Args:
        lr: The highest rate.
        steps: Length of the cycle.
        rise: The rise's fraction of it, in [0, 1]; with three phases below 1/2.
        divisor: The first rate is `lr / divisor`.
        final_divisor: The last rate is the first over this.
        cosine: Whether each phase is half a cosine wave; else a straight line.
        three_phases: Whether the fall is in two parts.
    """

    def __init__(
        self,
        lr: float,
        steps: int,
        rise: float = 0.3,
        *,
        divisor: float = 25.0,
        final_divisor: float = 1e4,
        cosine: bool = True,
        three_phases: bool = False,
    ) -> None:
        self._check(lr=lr)
        self._check_steps("steps", steps)
        check_range("OneCycle", "rise", rise, 0, 0.5 if three_phases else 1, closed="[]")
        check_range("OneCycle", "divisor", divisor, 0, math.inf)
        check_range("OneCycle", "final_divisor", final_divisor, 0, math.inf)
        self.lr, self.steps, self.rise = lr, steps, rise
        self.divisor, self.final_divisor = divisor, final_divisor
        self.cosine, self.three_phases = cosine, three_phases

    def __call__(self, step: int) -> float:  # noqa: D102
        first, top, last = self.lr / self.divisor, self.rise * self.steps - 1, self.steps - 1
        phases = [(top, first, self.lr)]
        if self.three_phases:
            phases.append((2 * top, self.lr, first))
            phases.append((last, first, first / self.final_divisor))
        else:
            phases.append((last, self.lr, first / self.final_divisor))
        begin, end = 0.0, first
        for stop, start, end in phases:
            if step <= stop:
                share = (step - begin) / (stop - begin) if stop > begin else 1.0
                return _between(start, end, share, cosine=self.cosine)
            begin = stop
        return end


def _between(start: float, end: float, share: float, *, cosine: bool) -> float:
    """From `start` at share 0 to `end` at share 1, along a line or half a cosine wave."""
    if cosine:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
    return start + (end - start) * share


_SCHEDULES = {kind.__name__: kind for kind in Schedule.__subclasses__()}


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule that a `Schedule.config()` describes; of those in this module only.

    Raises:
        ValueError: There is no schedule of this name.
    """
    name, arguments = config.get("schedule"), dict(config)
    if name not in _SCHEDULES:
        raise ValueError(
            f"from_config: expected a schedule among {', '.join(sorted(_SCHEDULES))}, got {name!r}"
        )
    del arguments["schedule"]
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            arguments[key] = from_config(value)
    made: Schedule = _SCHEDULES[name](**arguments)
    return made
