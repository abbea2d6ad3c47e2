"""Ready-made callbacks for `Trainer.fit`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nnx._checks import check_range
from nnx.trainer import Callback, Trainer


class ReduceOnPlateau(Callback):
    """Lowers the learning rate when a measurement has stopped getting better.

    PyTorch's `ReduceLROnPlateau`: an epoch is better if the measurement is below
    `best * (1 - threshold)`, or with `threshold_mode="abs"` below `best - threshold` (for
    `mode="max"` above `best * (1 + threshold)` or `best + threshold`). After more than `patience`
    epochs in a row that weren't, the rate becomes `max(factor * rate, min_lr)`, from the next epoch
    on, and for `cooldown` epochs no bad epoch is counted. NaN is never better. With K models it
    goes by their mean.

    Args:
        monitor: A column of the history, such as `"validation_loss"` or `"loss"`.
        mode: `"min"` if less is better, `"max"` if more is.
        factor: In [0, 1).
        patience: Epochs without improvement that are let pass, at least 0.
        threshold: What an improvement must exceed, at least 0.
        threshold_mode: `"rel"` or `"abs"`.
        cooldown: Epochs to wait after a reduction, at least 0.
        min_lr: The lowest rate, at least 0.
        eps: A change of the rate no larger than this isn't made.

    Raises:
        ValueError: An argument is out of its range; in the first epoch, the history has no such
            column.
        TypeError: In the first epoch, the optimizer's rate is a schedule.
    """

    def __init__(
        self,
        monitor: str = "validation_loss",
        *,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        who = "ReduceOnPlateau"
        for name, value, choices in (
            ("mode", mode, ("min", "max")),
            ("threshold_mode", threshold_mode, ("rel", "abs")),
        ):
            if value not in choices:
                raise ValueError(f"{who}: expected {name} of {' or '.join(choices)}, got {value!r}")
        check_range(who, "factor", factor, 0, 1, closed="[")
        for name, least in (
            ("patience", patience),
            ("threshold", threshold),
            ("cooldown", cooldown),
            ("min_lr", min_lr),
            ("eps", eps),
        ):
            check_range(who, name, least, 0, math.inf, closed="[")
        self.monitor, self.mode, self.factor, self.patience = monitor, mode, factor, patience
        self.threshold, self.threshold_mode = threshold, threshold_mode
        self.cooldown, self.min_lr, self.eps = cooldown, min_lr, eps
        self.best = math.inf if mode == "min" else -math.inf
        self.bad = 0
        self.waiting = 0

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:  # noqa: D102
        lr = trainer.optimizer.lr
        if callable(lr):
            raise TypeError(
                f"ReduceOnPlateau: expected an optimizer whose lr is a number, got {lr!r}; "
                "use either the schedule or this callback"
            )
        if self.monitor not in record:
            raise ValueError(
                f"ReduceOnPlateau: expected monitor among {', '.join(record)}, "
                f"got {self.monitor!r}; validation_... needs fit(validation=...)"
            )
        trainer.optimizer.lr = self.next_rate(float(np.mean(record[self.monitor])), lr)

    def next_rate(self, value: float, lr: float) -> float:
        """Take in an epoch's measurement; the rate to go on with."""
        if self._better(value):
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        if self.waiting > 0:
            self.waiting -= 1
            self.bad = 0
        if self.bad <= self.patience:
            return lr
        self.waiting, self.bad = self.cooldown, 0
        lower = max(lr * self.factor, self.min_lr)
        return lower if lr - lower > self.eps else lr

    def _better(self, value: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        if self.threshold_mode == "abs":
            bar = self.best + sign * self.threshold
        else:
            bar = self.best * (1 + sign * self.threshold)
        return sign * value > sign * bar

    def state(self) -> dict[str, float | None]:
        """What it remembers, as JSON values."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "bad": self.bad, "waiting": self.waiting}

    def load_state(self, state: dict[str, float | None]) -> None:
        """Go on from a `state()`; the rate itself is the optimizer's `lr`."""
        worst = math.inf if self.mode == "min" else -math.inf
        self.best = worst if state["best"] is None else float(state["best"])
        self.bad, self.waiting = int(state["bad"] or 0), int(state["waiting"] or 0)
