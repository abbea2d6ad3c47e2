"""Figures. Needs matplotlib, imported when a figure is made: `pip install 'nnx-xp[plot]'`.

Every function returns a `matplotlib.figure.Figure`, which belongs to no window and no global state,
and writes it to `path` if that is given; the suffix chooses the format. Figures are 800 pixels wide
at 100 dots per inch where nothing else is said. Colors are those of Okabe and Ito or from the maps
viridis and cividis, and no meaning rests on color alone: lines differ in dashes and markers,
points in markers, cells carry their numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nnx.backends import Array, backend_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VALIDATION = "validation_"
_BLUE, _VERMILION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_PURPLE, _SKY, _BLACK = "#CC79A7", "#56B4E9", "#000000"
_COLORS = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY, _BLACK)
"""Okabe and Ito's, yellow left out: it can't be seen on white."""
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES: dict[str, Any] = {
    "training": {"color": _BLUE, "linestyle": "-"},
    "validation": {"color": _VERMILION, "linestyle": "--"},
}
_FEW = 20
"""Up to this many points of a line each is marked, so that a single one can be seen."""


def learning_curves(history: Mapping[str, Sequence[Any]], path: str | Path | None = None) -> Figure:
    """Draw loss and metrics against the epoch, training and validation in one panel each.

    Args:
        history: What `Trainer.fit` returns. With K models there are K lines of each kind. A metric
            of more axes in an epoch, such as a confusion matrix, has no panel.
        path: Where to save the figure, 4 inches by panel at 100 dots per inch; the suffix chooses
            the format.

    Returns:
        The figure, which belongs to no window and no global state.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: The history holds no epoch.
    """
    # where a value was missing the history has one NaN, whatever the shape of the others
    series = {n: np.stack(np.broadcast_arrays(*v)) for n, v in history.items() if len(v)}
    series = {n: v for n, v in series.items() if v.ndim <= 2}
    names = [n for n in series if n != "epoch" and not n.startswith(_VALIDATION)]
    n_epochs = len(series[names[0]]) if names else 0
    if not n_epochs:
        raise ValueError("learning_curves: expected a history of at least 1 epoch, got none")
    figure = _new_figure("learning_curves", width=4 * len(names))
    epochs = series.get("epoch", np.arange(1, n_epochs + 1))
    for name, axes in zip(names, _panels(figure, len(names)), strict=True):
        _whole_numbers(axes.xaxis)
        curves = {"training": series[name], "validation": series.get(_VALIDATION + name)}
        for label, values in curves.items():
            if values is not None:
                lines = axes.plot(epochs, values, **_STYLES[label], markersize=4)
                lines[0].set_label(label)
                for line in lines:
                    line.set_marker("o" if len(epochs) <= _FEW else "")
        axes.set(xlabel="Epoch", ylabel=name.capitalize())
        axes.legend(frameon=False)
    return _saved(figure, path)


def curves(
    lines: Mapping[str, tuple[Any, Any]],
    path: str | Path | None = None,
    *,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
) -> Figure:
    """Draw up to seven named lines, each of a color, a dash and a marker of its own.

    Args:
        lines: `(x, y)` of each line by its name in the legend.
        path: Where to save the figure.
        x_label: What the horizontal axis shows.
        y_label: What the vertical axis shows.
        x_log: Whether the horizontal axis is logarithmic.
        y_log: Whether the vertical axis is.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: There are no lines, or more than seven.
    """
    if not 1 <= len(lines) <= len(_COLORS):
        raise ValueError(
            f"curves: expected 1 to {len(_COLORS)} lines, got {len(lines)}; "
            "more can't be told apart in one panel"
        )
    figure = _new_figure("curves", height=4.5)
    (axes,) = _panels(figure, 1)
    for i, (name, (x, y)) in enumerate(lines.items()):
        _line(axes, i, name, x, y)
    axes.set(xlabel=x_label, ylabel=y_label)
    if x_log:
        axes.set_xscale("log")
    elif all(np.asarray(x).dtype.kind in "iu" for x, _ in lines.values()):
        _whole_numbers(axes.xaxis)
    if y_log:
        axes.set_yscale("log")
    axes.legend(frameon=False)
    return _saved(figure, path)


def decision_boundary(
    predict: Callable[[np.ndarray], Any],
    x: Any = None,
    labels: Any = None,
    path: str | Path | None = None,
    *,
    extent: tuple[float, float, float, float] | None = None,
    n: int = 20,
    threshold: float = 0.5,
    names: tuple[str, str] = ("x1", "x2"),
) -> Figure:
    """Draw one output over a plane of two inputs: as filled contours, and as a surface in 3-D.

    `predict` is called once, with all points of the grid.

    Args:
        predict: From points `(n * n, 2)`, float32, to one number each, `(n * n,)` or `(n * n, 1)`.
            Of several classes choose one: `lambda points: trainer.predict(points)[:, 1]`.
        x: Samples `(N, 2)` to draw on top.
        labels: The class of each, 0 or 1: a circle or a square.
        path: Where to save the figure.
        extent: `(left, right, bottom, top)`; by default that of the samples and a tenth more on
            each side, without samples the unit square.
        n: Points in each direction.
        threshold: The output on the boundary, a line of dashes.
        names: Labels of the two axes.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: `predict` doesn't return one finite number per point.
    """
    figure = _new_figure("decision_boundary", height=4.8)
    samples = np.empty((0, 2)) if x is None else _host(x)
    if extent is None:
        extent = _extent(samples)
    u, v = np.meshgrid(np.linspace(*extent[:2], n), np.linspace(*extent[2:], n))
    z = _host(predict(np.stack([u.ravel(), v.ravel()], axis=1).astype(np.float32)))
    if z.shape not in ((n * n,), (n * n, 1)) or not np.isfinite(z).all():
        raise ValueError(
            f"decision_boundary: expected one finite number for each of {n * n} points, got "
            f"shape {z.shape}; choose one output, as in lambda points: predict(points)[:, 1]"
        )
    z = z.reshape(n, n)
    flat, solid = (
        figure.add_subplot(1, 2, 1),
        figure.add_subplot(1, 2, 2, projection="3d", computed_zorder=False),
    )
    filled = flat.contourf(u, v, z, levels=20, cmap="viridis")
    figure.colorbar(filled, ax=flat, label="Output", format="%.2g", location="bottom", aspect=30)
    crossed = z.min() < threshold < z.max()
    if crossed:
        flat.contour(u, v, z, levels=[threshold], colors="white", linestyles="--", linewidths=2)
        flat.plot([], [], "--", color="white", linewidth=2, label=f"output {threshold:g}")
    kinds = np.zeros(len(samples), int) if labels is None else _host(labels)
    for kind, marker in ((0, "o"), (1, "s")):
        points = samples[kinds == kind]
        if len(points):
            name = "sample" if labels is None else f"class {kind}"
            flat.scatter(
                points[:, 0], points[:, 1], s=70, marker=marker, c="white", edgecolors="black",
                label=name, zorder=3, clip_on=False,
            )  # fmt: skip
    if crossed or len(samples):
        flat.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=True, facecolor="0.75",
            handletextpad=0.4, columnspacing=1.0, fontsize=9,
        )  # fmt: skip
    flat.set(xlabel=names[0], ylabel=names[1])
    solid.plot_surface(u, v, z, cmap="viridis", edgecolor="0.3", linewidth=0.2)
    solid.set(xlabel=names[0], ylabel=names[1], zlabel="Output")
    solid.view_init(elev=25, azim=-60)
    solid.set_box_aspect(None, zoom=0.8)
    for axis in ("x", "y"):
        solid.locator_params(axis=axis, nbins=4)
    return _saved(figure, path)


def confusion_matrix(
    counts: Any, path: str | Path | None = None, *, classes: Sequence[Any] | None = None
) -> Figure:
    """Draw how often each class was taken for each, the number written in its cell.

    The color shows the share of the true class's samples, so that rare classes count as much.

    Args:
        counts: `(C, C)` whole numbers; row the true class, column the predicted one.
        path: Where to save the figure, 800 by 720 pixels.
        classes: The names of the classes; by default 0 to C - 1.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: The matrix isn't square, or the names aren't as many.
    """
    counts = _host(counts)
    n = len(counts)
    names: list[Any] = list(range(n) if classes is None else classes)
    if counts.shape != (n, n) or not n or len(names) != n:
        raise ValueError(
            "confusion_matrix: expected counts (C, C) and C class names, got "
            f"{counts.shape} and {len(names)}"
        )
    figure = _new_figure("confusion_matrix", height=7.2, layout="compressed")
    axes = figure.add_subplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="Share of the true class", fraction=0.046)
    axes.set_xticks(range(n), names, rotation=0 if n <= 10 else 90)
    axes.set_yticks(range(n), names)
    axes.set(xlabel="Predicted class", ylabel="True class")
    if n <= _FEW:
        for i, j in itertools.product(range(n), range(n)):
            axes.text(
                j, i, f"{counts[i, j]}", ha="center", va="center", fontsize=12 if n <= 10 else 8,
                color="white" if share[i, j] < 0.5 else "black",
            )  # fmt: skip
    return _saved(figure, path)


def activation_statistics(
    activations: Mapping[str, Iterable[Array]], path: str | Path | None = None
) -> Figure:
    """Draw the size of the activations, and how many are zero, against the depth.

    Size is the root of the mean square, as its decimal logarithm: it is measured after division by
    the largest entry, so that squares can't overflow. A line ends where a value isn't finite any
    more.

    Args:
        activations: The outputs of the layers in order, for up to seven networks by name:
            `{"He": [y for _, y in model.activations(x)]}`.
        path: Where to save the figure.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: There are no networks, or more than seven.
    """
    if not 1 <= len(activations) <= len(_COLORS):
        raise ValueError(
            f"activation_statistics: expected 1 to {len(_COLORS)} networks, got {len(activations)}"
        )
    figure = _new_figure("activation_statistics", height=4.4)
    size, zeros = _panels(figure, 2)
    for i, (name, outputs) in enumerate(activations.items()):
        arrays = [_host(y) for y in outputs]
        depth = np.arange(1, len(arrays) + 1)
        _line(size, i, name, depth, [log10_rms(y) for y in arrays])
        _line(zeros, i, name, depth, [np.mean(y == 0) if y.size else math.nan for y in arrays])
    size.set(xlabel="Layer", ylabel="log10 of the root mean square")
    zeros.set(xlabel="Layer", ylabel="Share of zeros", ylim=(-0.03, 1.03))
    for axes in (size, zeros):
        _whole_numbers(axes.xaxis)
    handles, names = size.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper center", ncols=min(len(names), 3), frameon=False
    )
    return _saved(figure, path)


def log10_rms(x: Array) -> float:
    """The decimal logarithm of the root mean square: -inf for zeros, NaN if one isn't finite.

    `log10(m) + log10(rms(x / m))` with `m = max |x|`: nothing overflows.
    """
    values = _host(x).astype(np.float64)
    if not np.isfinite(values).all() or not values.size:
        return math.nan
    m = float(np.abs(values).max())
    return math.log10(m) + math.log10(np.mean((values / m) ** 2)) / 2 if m else -math.inf


def gradient_descent_path(
    function: Callable[..., Any], points: Any, path: str | Path | None = None
) -> Figure:
    """Draw the points a descent went through on its function, and its value step by step.

    Args:
        function: Of one number, or of two, which is then drawn by its contours. It is called with
            arrays and works entry by entry.
        points: `(n,)` or `(n, 2)`: the start, and where each step led.
        path: Where to save the figure.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: The points have another shape, or there are none.
    """
    points = _host(points).astype(np.float64)
    if not points.size or points.shape[1:] not in ((), (2,)):
        raise ValueError(
            f"gradient_descent_path: expected points (n,) or (n, 2), got {points.shape}"
        )
    figure = _new_figure("gradient_descent_path", height=4.0)
    where, value = _panels(figure, 2)
    steps: dict[str, Any] = {"color": _VERMILION, "marker": "o", "markersize": 6, "label": "steps"}
    if points.ndim == 1:
        heights = function(points)
        margin = 0.4 * np.ptp(points) or 1.0
        x = np.linspace(points.min() - margin, points.max() + margin, 200)
        where.plot(x, function(x), color=_BLUE, label="f(x)")
        where.plot(points, heights, linestyle="--", **steps)
        where.annotate(
            "start", (points[0], heights[0]), (-10, 0), textcoords="offset points", ha="right"
        )
        where.set(xlabel="x", ylabel="f(x)")
        where.legend(frameon=False)
    else:
        heights = function(*points.T)
        left, right, bottom, top = _extent(points)
        u, v = np.meshgrid(np.linspace(left, right, 100), np.linspace(bottom, top, 100))
        filled = where.contourf(u, v, function(u, v), levels=20, cmap="cividis")
        figure.colorbar(filled, ax=where, label="f(x1, x2)", format="%.2g")
        where.plot(*points.T, **(steps | {"color": "white"}), markeredgecolor="black")
        where.set(xlabel="x1", ylabel="x2")
    _line(value, 0, None, np.arange(len(points)), heights)
    _whole_numbers(value.xaxis)
    value.set(xlabel="Step", ylabel="Value of f")
    return _saved(figure, path)


def misclassified_images(
    images: Any,
    labels: Any,
    predictions: Any,
    path: str | Path | None = None,
    *,
    classes: Sequence[Any] | None = None,
    n_shown: int = 20,
) -> Figure:
    """Draw the first images that were taken for another class, with both classes above each.

    Args:
        images: `(N, H, W)`, or `(N, H * H)` for square ones.
        labels: The true class of each, `(N,)`.
        predictions: The predicted class of each.
        path: Where to save the figure.
        classes: The names of the classes; by default their indices.
        n_shown: How many at most.

    Raises:
        ImportError: matplotlib isn't installed.
        ValueError: The shapes don't belong together.
    """
    images, labels, predictions = _host(images), _host(labels), _host(predictions)
    if images.ndim == 2 and math.isqrt(images.shape[1]) ** 2 == images.shape[1]:
        images = images.reshape(len(images), math.isqrt(images.shape[1]), -1)
    n = len(images)
    if images.ndim != 3 or labels.shape != (n,) or predictions.shape != (n,):
        raise ValueError(
            "misclassified_images: expected images (N, H, W) or (N, H * H), and a label and a "
            f"prediction for each, got {images.shape}, {labels.shape} and {predictions.shape}"
        )
    wrong = np.flatnonzero(labels != predictions)
    shown = wrong[:n_shown]
    n_columns = 5
    n_rows = max(1, -(-len(shown) // n_columns))
    figure = _new_figure("misclassified_images", height=0.5 + 1.75 * n_rows)
    figure.suptitle(
        f"{len(wrong)} of {n} misclassified" + f", {len(shown)} shown" * (shown.size > 0)
    )
    for axes, i in itertools.zip_longest(
        figure.subplots(n_rows, n_columns, squeeze=False).ravel(), shown
    ):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("0.7")
        if i is None:
            axes.set_axis_off()
        else:
            axes.imshow(images[i], cmap="gray_r")
            pair = [k if classes is None else classes[k] for k in (labels[i], predictions[i])]
            axes.set_title(f"{pair[0]}, taken for {pair[1]}", fontsize=11)
    return _saved(figure, path)


def _new_figure(
    who: str,
    *,
    width: float = 8.0,
    height: float = 3.6,
    layout: Literal["constrained", "compressed"] = "constrained",
) -> Figure:
    """An empty figure, in inches at 100 dots each."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{who}: expected matplotlib to be installed, got {error}; pip install 'nnx-xp[plot]'"
        ) from error
    return Figure(figsize=(width, height), dpi=100, layout=layout)


def _panels(figure: Figure, n: int) -> list[Axes]:
    """`n` panels side by side, with a pale grid."""
    panels = list(figure.subplots(1, n, squeeze=False)[0])
    for axes in panels:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return panels


def _line(axes: Axes, i: int, name: str | None, x: Any, y: Any) -> None:
    """The i-th line of a panel."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    where: Any = None  # each point
    if len(x) > _FEW:
        even = np.isfinite(y).all()  # spaced evenly in the picture
        where = (0.02 * i, 0.1) if even else (i * len(x) // 80, len(x) // 10)
    axes.plot(
        x, y, label=name, color=_COLORS[i], linestyle=_DASHES[i], marker=_MARKERS[i],
        markersize=5, markevery=where,
    )  # fmt: skip


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _extent(points: np.ndarray) -> tuple[float, float, float, float]:
    """`(left, right, bottom, top)` around points `(N, 2)`; the unit square without any."""
    if not len(points):
        return (0.0, 1.0, 0.0, 1.0)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.where(high > low, 0.1 * (high - low), 1.0)
    (left, bottom), (right, top) = low - margin, high + margin
    return (float(left), float(right), float(bottom), float(top))


def _host(a: Any) -> np.ndarray:
    """`a` as a NumPy array, wherever it is."""
    return backend_of(a).to_numpy(a) if hasattr(a, "__cuda_array_interface__") else np.asarray(a)


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
