"""Checks that need no test suite: gradients, and one backend against another.

`check_gradients` proves that a backward pass is the derivative of its forward pass. `library`
checks everything in nnx that way and compares two backends, `model` does so with a model of yours;
both return a `Report`. They are what the command `nnx check` runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnx.check.gradients import WrongGradient, check_gradients

if TYPE_CHECKING:
    from nnx.check.catalogue import ENVELOPE, MOST_STEPS, library
    from nnx.check.report import Divergence, Report, Row
    from nnx.check.training import model
else:  # imported when first used: `import nnx` needs none of it

    def __getattr__(name: str) -> Any:
        module = _MODULES.get(name)
        if module is None:
            raise AttributeError(f"module 'nnx.check' has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(f"nnx.check.{module}"), name)


_MODULES = {
    **dict.fromkeys(("ENVELOPE", "MOST_STEPS", "library"), "catalogue"),
    **dict.fromkeys(("Divergence", "Report", "Row"), "report"),
    "model": "training",
}

__all__ = [
    "ENVELOPE",
    "MOST_STEPS",
    "Divergence",
    "Report",
    "Row",
    "WrongGradient",
    "check_gradients",
    "library",
    "model",
]
