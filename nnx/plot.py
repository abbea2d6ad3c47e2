"""Figures. Needs matplotlib, imported when a figure is made: `pip install 'nnx-xp[plot]'`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VALIDATION = "validation_"
_STYLES: dict[
    str, Any
] = {  # Okabe-Ito blue and vermilion; the dashes tell them apart in black and white
    "training": {"color": "#0072B2", "linestyle": "-"},
    "validation": {"color": "#D55E00", "linestyle": "--"},
}
_FEW = 20
"""Up to this many epochs each is marked, so that a single one can be seen."""


def learning_curves(history: Mapping[str, Sequence[Any]], path: str | Path | None = None) -> Figure:
    """Draw loss and metrics against the epoch, training and validation in one panel each.

    Args:
        history: What `Trainer.fit` returns. With K models there are K lines of each kind.
        path: Where to save the figure, 4 inches by panel at 100 dots per inch; the suffix chooses
            the format.

    Returns:
        The figure, which belongs to no window and no global state.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: The history holds no epoch.
    """
    names = [n for n in history if n != "epoch" and not n.startswith(_VALIDATION)]
    n_epochs = len(history[names[0]]) if names else 0
    if not n_epochs:
        raise ValueError("learning_curves: expected a history of at least 1 epoch, got none")
    figure = _new_figure(len(names))
    epochs = history.get("epoch", range(1, n_epochs + 1))
    for axes, name in zip(figure.axes, names, strict=True):
        _draw(
            axes, epochs, {"training": history[name], "validation": history.get(_VALIDATION + name)}
        )
        axes.set_ylabel(name.capitalize())
    if path is not None:
        figure.savefig(path)
    return figure


def _new_figure(n_panels: int) -> Figure:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            f"learning_curves: expected matplotlib to be installed, got {error}; "
            "pip install 'nnx-xp[plot]'"
        ) from error
    figure = Figure(figsize=(4 * n_panels, 3.6), dpi=100, layout="constrained")
    for axes in figure.subplots(1, n_panels, squeeze=False)[0]:
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw(axes: Axes, epochs: Sequence[int], curves: dict[str, Sequence[Any] | None]) -> None:
    """Draw the curves that there are, one line per model."""
    for label, values in curves.items():
        if values is not None:
            lines = axes.plot(epochs, np.array(values), **_STYLES[label])
            lines[0].set_label(label)
            for line in lines:
                line.set_marker("o" if len(epochs) <= _FEW else "")
                line.set_markersize(4)
    axes.legend(frameon=False)
