"""nnx.plot: what is drawn, how the lines are told apart, and that nothing global is touched."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnx
from nnx import History
from nnx.backends import Backend
from nnx.plot import (
    activation_statistics,
    confusion_matrix,
    curves,
    decision_boundary,
    gradient_descent_path,
    learning_curves,
    log10_rms,
    misclassified_images,
)

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


def trained(n_models: int | None = None) -> nnx.Trainer:
    """A trainer of one small network or of several side by side, and nothing done yet."""
    model = nnx.Sequential(
        nnx.Linear(2, 2, n_models=n_models, rng=np.random.default_rng(0)), nnx.Tanh()
    )
    return nnx.Trainer(model, nnx.SoftmaxNLL(n_models=n_models), nnx.SGD(lr=0.1), seed=0)


def test_a_metric_that_is_a_matrix_has_no_panel() -> None:
    x, t = np.array([[0, 1], [1, 0], [1, 1], [0, 0]], np.float32), np.array([0, 1, 1, 0])
    trainer = trained()
    trainer.fit(x, t, epochs=2, metrics=[nnx.ConfusionMatrix(2), nnx.Accuracy()], validation=(x, t))
    assert np.shape(trainer.history["confusion_matrix"]) == (2, 2, 2)
    figure = learning_curves(trainer.history)
    assert [axes.get_ylabel() for axes in figure.axes] == ["Loss", "Accuracy"]
    assert figure.get_figwidth() == 8


def test_a_validation_that_began_later_is_drawn_from_there(tmp_path: Path) -> None:
    x, t = np.array([[0, 1], [1, 0], [1, 1], [0, 0]], np.float32), np.array([0, 1, 1, 0])
    trainer = trained(n_models=3)
    trainer.fit(x, t, epochs=40, metrics=[nnx.Accuracy()])
    trainer.fit(x, t, epochs=2, metrics=[nnx.Accuracy()], validation=(x, t))
    axes = learning_curves(trainer.history, tmp_path / "curves.png").axes[0]
    shown = np.array([line.get_ydata() for line in axes.get_lines()])
    assert shown.shape == (6, 42)  # 3 of the training, 3 of the validation
    np.testing.assert_array_equal(shown[:3].T, trainer.history["loss"])
    assert np.isnan(shown[3:, :40]).all()
    np.testing.assert_array_equal(shown[3:, 40:].T, trainer.history["validation_loss"][40:])
    assert legend(axes) == ["training", "validation"]


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


# ---- decision boundary ---------------------------------------------------------------------------


def plane(points: Any) -> Any:
    """An output that tells x1 from x2."""
    return points[:, 0] + 10 * points[:, 1]


def test_one_predict_of_the_whole_grid_draws_contour_and_surface() -> None:
    calls: list[np.ndarray] = []

    def predict(points: np.ndarray) -> Any:
        calls.append(points)
        return plane(points)[:, None]

    axes: list[Any] = decision_boundary(predict, threshold=5).axes
    flat, solid = axes[:2]
    (points,) = calls
    assert points.shape == (400, 2)
    assert points.dtype == np.float32
    loop = [(x1, x2) for x2 in np.linspace(0, 1, 20) for x1 in np.linspace(0, 1, 20)]
    np.testing.assert_allclose(points, loop, rtol=1e-6)
    assert (flat.get_xlabel(), flat.get_ylabel()) == ("x1", "x2")
    assert (solid.get_xlabel(), solid.get_ylabel(), solid.get_zlabel()) == ("x1", "x2", "Output")
    assert solid.name == "3d"
    np.testing.assert_allclose(solid.get_zlim(), (0, 11), atol=0.6)


def test_the_boundary_is_where_the_output_is_the_threshold() -> None:
    flat = decision_boundary(plane, threshold=5, n=30).axes[0]
    boundary = flat.collections[-1]
    assert boundary.get_linestyle()[0][1] is not None  # dashes
    (path,) = boundary.get_paths()
    np.testing.assert_allclose(plane(path.vertices), 5, rtol=1e-5)
    assert len(decision_boundary(plane, threshold=99).axes[0].collections) == 1  # no boundary


def test_samples_are_marked_by_class_and_span_the_plane() -> None:
    x, labels = np.array([[0, 2], [4, 2], [1, 7.0]]), np.array([0, 1, 1])
    flat = decision_boundary(plane, x, labels, threshold=0.5).axes[0]
    circles: Any = flat.collections[-2]
    squares: Any = flat.collections[-1]
    np.testing.assert_array_equal(circles.get_offsets(), x[:1])
    np.testing.assert_array_equal(squares.get_offsets(), x[1:])
    assert len(circles.get_paths()[0].vertices) != len(squares.get_paths()[0].vertices)
    assert legend(flat)[-2:] == ["class 0", "class 1"]
    np.testing.assert_allclose((*flat.get_xlim(), *flat.get_ylim()), (-0.4, 4.4, 1.5, 7.5))


@pytest.mark.parametrize("bad", [np.zeros((400, 2)), np.zeros(399), np.full(400, np.nan)])
def test_an_output_per_point_is_expected(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one finite number for each of 400 points"):
        decision_boundary(lambda points: bad)


# ---- confusion matrix ----------------------------------------------------------------------------


def test_cells_carry_the_counts_and_colors_the_share_of_the_true_class() -> None:
    counts = np.array([[3, 1], [0, 0]])
    axes = confusion_matrix(counts, classes=["cat", "dog"]).axes[0]
    texts = {t.get_position(): (t.get_text(), t.get_color()) for t in axes.texts}
    # x is the predicted class, y the true one; white on dark, black on light
    assert texts[0, 0] == ("3", "black")
    assert texts[1, 0] == ("1", "white")
    assert texts[0, 1] == texts[1, 1] == ("0", "white")
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert axes.images[0].get_cmap().name == "cividis"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cat", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted class", "True class")


def test_labels_of_the_confusion_matrix_are_inside_the_picture(tmp_path: Path) -> None:
    figure = confusion_matrix(np.eye(10, dtype=int), tmp_path / "m.png")
    for axes in figure.axes:
        for label in (axes.xaxis.label, axes.yaxis.label):
            box = label.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= 800


def test_many_classes_have_no_numbers() -> None:
    assert not confusion_matrix(np.eye(21, dtype=int)).axes[0].texts


@pytest.mark.parametrize(
    ("counts", "classes"), [(np.zeros((2, 3)), None), (np.eye(2), "abc"), (np.empty((0, 0)), None)]
)
def test_a_confusion_matrix_is_square(counts: np.ndarray, classes: str | None) -> None:
    with pytest.raises(ValueError, match=r"expected counts \(C, C\) and C class names"):
        confusion_matrix(counts, classes=classes)


# ---- activation statistics -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([3, -4], np.log10(np.sqrt(12.5))),
        ([1e206, -1e206], 206),  # the square overflows
        ([1e-200, 0, 0, 0], -200 + np.log10(0.5)),  # the square is zero
        ([0, 0], -np.inf),
        ([1, np.inf], np.nan),
        ([], np.nan),
    ],
)
def test_log10_rms(x: list[float], expected: float) -> None:
    np.testing.assert_allclose(log10_rms(np.array(x, np.float64)), expected, rtol=1e-12)


def test_size_and_zeros_by_depth(backend: Backend) -> None:
    deep = [np.array([[10.0, -10.0]]), np.array([[0, 0, 0, 2.0]]), np.array([[np.inf, 1.0]])]
    figure = activation_statistics(
        {"deep": [backend.asarray(y) for y in deep], "flat": [np.ones((2, 3))] * 2}
    )
    size, zeros = figure.axes
    np.testing.assert_allclose(lines(size)["deep"].get_ydata(), [1, 0, np.nan], atol=1e-12)
    np.testing.assert_allclose(lines(zeros)["deep"].get_ydata(), [0, 0.75, 0])
    np.testing.assert_array_equal(lines(size)["deep"].get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(lines(size)["flat"].get_xdata(), [1, 2])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["deep", "flat"]
    for axes in (size, zeros):
        assert axes.get_xlabel() == "Layer"
        deep_line, flat_line = lines(axes).values()
        assert deep_line.get_linestyle() != flat_line.get_linestyle()
        assert deep_line.get_marker() != flat_line.get_marker()


# ---- the other figures ---------------------------------------------------------------------------


def test_seven_lines_differ_in_color_dash_and_marker() -> None:
    x = np.linspace(1, 100, 300)
    figure = curves(
        {f"{i}": (x, i + x) for i in range(7)}, x_label="a", y_label="b", x_log=True, y_log=True
    )
    (axes,) = figure.axes
    drawn = axes.get_lines()
    for kind in ("get_color", "_dash_pattern", "get_marker"):
        values = [getattr(line, kind) for line in drawn]
        assert len({repr(v() if callable(v) else v) for v in values}) == 7, kind
    assert legend(axes) == list("0123456")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("a", "b")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


@pytest.mark.parametrize("n", [0, 8])
def test_a_panel_holds_one_to_seven_lines(n: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 7 lines, got {n}"):
        curves({f"{i}": ([0], [0]) for i in range(n)}, x_label="", y_label="")
    with pytest.raises(ValueError, match=f"expected 1 to 7 networks, got {n}"):
        activation_statistics({f"{i}": [] for i in range(n)})


def test_a_descent_of_one_variable_lies_on_its_curve() -> None:
    points = [5.0, 4.4, 3.92]
    axes: list[Any] = gradient_descent_path(lambda x: (x - 2) ** 2 + 1, points).axes
    where, value = axes
    np.testing.assert_array_equal(lines(where)["steps"].get_xdata(), points)
    np.testing.assert_allclose(lines(where)["steps"].get_ydata(), [10, 6.76, 4.6864])
    x, y = lines(where)["f(x)"].get_data()
    np.testing.assert_allclose(y, (x - 2) ** 2 + 1)
    assert x.min() < 3.92 < 5 < x.max()
    np.testing.assert_allclose(value.get_lines()[0].get_ydata(), [10, 6.76, 4.6864])
    np.testing.assert_array_equal(value.get_lines()[0].get_xdata(), [0, 1, 2])


def test_a_descent_of_two_variables_lies_on_contours() -> None:
    points = np.array([[4, 2], [2, -1], [1, 0.5]])
    figure = gradient_descent_path(lambda u, v: u**2 + 3 * v, points)
    where: Any = figure.axes[0]
    value: Any = figure.axes[1]
    np.testing.assert_array_equal(np.transpose(lines(where)["steps"].get_data()), points)
    assert (where.get_xlabel(), where.get_ylabel()) == ("x1", "x2")
    np.testing.assert_allclose(value.get_lines()[0].get_ydata(), [22, 1, 2.5])


@pytest.mark.parametrize("points", [[], np.zeros((3, 3)), np.zeros((0, 2))])
def test_a_descent_has_points(points: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected points \(n,\) or \(n, 2\)"):
        gradient_descent_path(lambda x: x, points)


@pytest.mark.parametrize("flat", [False, True])
def test_wrong_images_in_order_with_both_classes(flat: bool, rng: np.random.Generator) -> None:
    images = rng.random((8, 5, 5))
    labels, predictions = np.arange(8) % 3, np.array([0, 1, 2, 0, 2, 1, 0, 0])
    figure = misclassified_images(
        images.reshape(8, -1) if flat else images, labels, predictions, classes="xyz", n_shown=2
    )
    assert figure.get_suptitle() == "3 of 8 misclassified, 2 shown"
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["y, taken for z", "z, taken for y"]
    for axes, i in zip(shown, (4, 5), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), images[i])


def test_nothing_wrong_is_said(tmp_path: Path) -> None:
    figure = misclassified_images(np.zeros((2, 4)), [0, 1], [0, 1], tmp_path / "none.png")
    assert figure.get_suptitle() == "0 of 2 misclassified"
    assert not any(axes.images for axes in figure.axes)


def test_images_that_are_not_square_need_their_shape() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 6\), \(2,\) and \(2,\)"):
        misclassified_images(np.zeros((2, 6)), [0, 1], [0, 1])


FIGURES = {
    "curves": lambda path: curves({"a": ([1, 2], [3, 4])}, path, x_label="x", y_label="y"),
    "decision_boundary": lambda path: decision_boundary(plane, path=path),
    "confusion_matrix": lambda path: confusion_matrix(np.eye(3, dtype=int), path),
    "activation_statistics": lambda path: activation_statistics({"a": [np.ones(3)]}, path),
    "gradient_descent_path": lambda path: gradient_descent_path(np.square, [1.0, 2.0], path),
    "misclassified_images": lambda path: misclassified_images(np.ones((1, 2, 3)), [0], [1], path),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_returned_and_written_800_pixels_wide(name: str, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = FIGURES[name](tmp_path / "figure.png")
    assert type(figure) is Figure
    data = (tmp_path / "figure.png").read_bytes()
    assert int.from_bytes(data[16:20], "big") == 800
    assert "matplotlib.pyplot" not in sys.modules
    for axes in figure.axes:
        if axes.axison and axes.get_label() != "<colorbar>" and name != "misclassified_images":
            assert axes.get_xlabel()
            assert axes.get_ylabel()


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_names_a_missing_matplotlib(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=rf"^{name}: .*pip install 'nnx-xp\[plot\]'"):
        FIGURES[name](None)
