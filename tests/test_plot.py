"""nnx.plot: what is drawn, how the lines are told apart, and that nothing global is touched."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnx import History
from nnx.plot import learning_curves

pytest.importorskip("matplotlib")

VALUES = {
    "loss": [2.0, 1.0, 0.5],
    "accuracy": [0.2, 0.6, 0.9],
    "validation_loss": [1.8, 1.1, 0.7],
    "validation_accuracy": [0.3, 0.5, 0.8],
}


@pytest.fixture
def history() -> History:
    """Three epochs, the first of which is epoch 4."""
    history = History()
    for i in range(3):
        history.append({"epoch": 4 + i} | {name: values[i] for name, values in VALUES.items()})
    return history


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_loss_and_metric_stand_side_by_side(history: History) -> None:
    loss, accuracy = learning_curves(history).axes
    assert [axes.get_ylabel() for axes in (loss, accuracy)] == ["Loss", "Accuracy"]
    assert [axes.get_xlabel() for axes in (loss, accuracy)] == ["Epoch", "Epoch"]
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        shown = lines(axes)
        assert list(shown) == ["training", "validation"]
        for label, key in (("training", name), ("validation", f"validation_{name}")):
            np.testing.assert_array_equal(shown[label].get_xdata(), [4, 5, 6])
            np.testing.assert_array_equal(shown[label].get_ydata(), VALUES[key])


def test_training_and_validation_differ_in_style_and_not_in_color_alone(history: History) -> None:
    for axes in learning_curves(history).axes:
        shown = lines(axes)
        assert shown["training"].get_linestyle() == "-"
        assert shown["validation"].get_linestyle() == "--"
        assert shown["training"].get_color() == "#0072B2"  # Okabe and Ito's blue
        assert shown["validation"].get_color() == "#D55E00"  # and their vermilion
        assert legend(axes) == list(shown)


def test_without_validation_there_is_one_line(history: History) -> None:
    for axes in learning_curves({name: history[name] for name in ("epoch", "loss")}).axes:
        assert list(lines(axes)) == ["training"]


def test_a_regression_has_one_panel_and_epochs_count_from_1() -> None:
    (axes,) = learning_curves({"loss": [3.0, 2.0]}).axes
    np.testing.assert_array_equal(lines(axes)["training"].get_xdata(), [1, 2])


@pytest.mark.parametrize(("n", "marker"), [(1, "o"), (20, "o"), (21, "")])
def test_few_epochs_are_marked_so_that_one_can_be_seen(n: int, marker: str) -> None:
    (axes,) = learning_curves({"loss": [1.0] * n}).axes
    assert lines(axes)["training"].get_marker() == marker


def test_models_side_by_side_are_a_line_each_and_one_entry_in_the_legend() -> None:
    losses = [np.array([3.0, 4.0]), np.array([1.0, 2.0])]
    (axes,) = learning_curves({"loss": losses}).axes
    np.testing.assert_array_equal([line.get_ydata() for line in axes.get_lines()], [[3, 1], [4, 2]])
    assert legend(axes) == ["training"]


def test_the_file_is_800_pixels_wide(history: History, tmp_path: Path) -> None:
    learning_curves(history, tmp_path / "curves.png")
    data = (tmp_path / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (800, 360)


def test_the_suffix_chooses_the_format(history: History, tmp_path: Path) -> None:
    learning_curves(history, str(tmp_path / "curves.svg"))
    assert "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("empty", [{}, {"epoch": []}, {"epoch": [], "loss": []}])
def test_no_epoch_is_an_error(empty: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="at least 1 epoch"):
        learning_curves(empty)


def test_a_missing_matplotlib_is_named(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'nnx-xp\[plot\]'"):
        learning_curves(history)


def test_pyplot_stays_out() -> None:
    code = (
        "import sys, nnx.plot; assert 'matplotlib' not in sys.modules; "
        "nnx.plot.learning_curves({'loss': [1.0]}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)
