"""examples/: every file runs, prints the figures its docstring claims and draws its pictures.

A new file is run without being named here; `CHECKS` adds what its figures must be.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
BACKENDS = [n for n in FILES if "backend=True" in (EXAMPLES / f"{n}.py").read_text()]
ARGUMENTS = {  # small settings, where the default takes longer than a second or two
    "initialization_study": ["--draws", "2"],
    "matrix_product": ["--sizes", "4", "8", "24"],
    "mnist": ["--data", "digits", "--epochs", "3", "--libraries", "nnx"],
}
GPU_ARGUMENTS = {  # the simulated device is slow; what is compared doesn't need long training
    "and_gate": ["--epochs", "20"],
    "xor_gate": ["--epochs", "20"],
    "loss_comparison": ["--epochs", "2"],
    "relu_before_softmax": ["--epochs", "1"],
    "thresholds": ["--epochs", "1"],
    "mnist": ["--data", "digits", "--epochs", "1", "--libraries", "nnx"],
}
NUMBER = r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)"


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the example's `main` in this process."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__
    module.main(arguments)


def numbers(pattern: str, output: str) -> list[float]:
    """The numbers in the one place where the output matches; `#` in the pattern is a number."""
    found = re.findall(pattern.replace("#", NUMBER), output)
    assert len(found) == 1, (pattern, output)
    groups = found[0] if isinstance(found[0], tuple) else (found[0],)
    return [float(group) for group in groups]


def check_and_gate(out: str) -> None:
    assert numbers("learned AND: # of #", out) == [20, 20]
    median, largest = numbers("error: median #, largest #", out)
    assert 0 < median <= largest < 0.01
    rows = re.findall(rf"^ (\d)  (\d)    (\d)  {NUMBER}$", out, re.MULTILINE)
    assert [row[:3] for row in rows] == [tuple("000"), tuple("010"), tuple("100"), tuple("111")]
    assert all(abs(float(t) - float(y)) < 0.1 for _, _, t, y in rows)


def check_xor_gate(out: str) -> None:
    learned, of, best, *_ = numbers(
        "no hidden layer: learned XOR # of # networks, best # of 4 rows", out
    )
    assert (learned, of, best) == (0, 20, 3)
    assert numbers("3 hidden units: learned XOR # of", out)[0] >= 18
    assert numbers("3 hidden units: .* smallest #", out)[0] < 1e-3
    rows = re.findall(rf"^ (\d)  (\d)    (\d)  {NUMBER}$", out, re.MULTILINE)
    assert [row[2] for row in rows] == ["0", "1", "1", "0"]
    assert all(abs(float(t) - float(y)) < 0.1 for _, _, t, y in rows)


def check_gradient_descent(out: str) -> None:
    rows = re.findall(rf"^ ?(\d+)  {NUMBER}  {NUMBER}$", out, re.MULTILINE)
    assert [int(n) for n, _, _ in rows] == list(range(11))
    for n, x, value in rows:
        assert float(x) == pytest.approx(2 + 3 * 0.8 ** int(n), abs=1e-10)
        assert float(value) == pytest.approx(1 + 9 * 0.64 ** int(n), abs=1e-5)
    assert rows[10][1:] == ("2.3221225472", "1.10376")
    assert rows[2][2] == "4.68640"
    assert numbers(r"largest distance from .*: #", out)[0] < 1e-14


def check_matrix_product(out: str) -> None:
    assert out.count("[[6, 6], [12, 12], [18, 18], [24, 24]]") == 2
    assert numbers(r"c_31 = .* = #", out) == [18]
    rows = re.findall(rf"^ *(\d+) +{NUMBER} +{NUMBER} +{NUMBER}$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["4", "8", "24"]
    assert all(float(value) >= 0 for row in rows for value in row)


def check_initialization_study(out: str) -> None:
    assert numbers(r"N\(0, 1\)  +#   \(the squares overflow\)", out)[0] == pytest.approx(
        205.9, abs=0.5
    )
    for name, median, low, high in (
        (r"N\(0, 1/512\)", 0.94, 0.2, 3),
        (r"N\(0, 1/512\), ReLU", 2.0**-76, 2.0**-76 / 100, 2.0**-76 * 100),
        (r"N\(0, 2/512\), ReLU", 0.57, 0.05, 10),
    ):
        _, *stds = numbers(rf"(?m)^{name} +# +# +# +#$", out)
        assert low < stds[0] <= stds[1] <= stds[2] < high, name
        assert median / 10 < stds[1] < median * 10, name
    finite, broken, theory = numbers("finite behind # layers, not behind #; .* behind #", out)
    assert (finite, broken, theory) == (28, 29, 28.4)


def check_untrained_baseline(out: str) -> None:
    assert numbers("parameters: #", out) == [784 * 50 + 50 + 50 * 10 + 10]
    assert numbers(r"accuracy: +# \(", out)[0] == pytest.approx(0.1, abs=0.03)
    (loss,) = numbers(r"mean loss: +# \(", out)
    assert 2.2 < loss < 3.5
    assert numbers(r"summed loss: #", out)[0] == pytest.approx(1000 * loss, abs=0.6)
    assert f"ln 10 = {math.log(10):.3f}" in out


def check_overfit_small(out: str) -> None:
    first, last, slow = numbers("lr 0.01: loss # -> #, training accuracy #", out)
    assert 1.5 < last < first
    assert slow < 0.5
    first, last, fast = numbers("lr  1.0: loss # -> #, training accuracy #", out)
    assert last < 0.05 < 2 < first
    assert fast == 1
    written = re.findall(r"^wrote .*?(\w+\.png)$", out, re.MULTILINE)
    assert written == ["overfit_small.png", "overfit_small_curves.png"]


def check_loss_comparison(out: str) -> None:
    means = [
        numbers(rf"(?m)^{name} +training accuracy #", out)[0] for name in ("CE", "MSE", "MSES")
    ]
    assert means[0] > 0.97 > means[1] > means[2] + 0.3
    assert numbers("CE > MSE > MSES: # of # networks", out) == [5, 5]


def check_relu_before_softmax(out: str) -> None:
    first, _, _ = numbers(r"without ReLU  probabilities \[# # #\]", out)
    assert first == 0.867
    row = numbers(r"with ReLU     probabilities \[# # #\]", out)
    assert row == [0.333, 0.333, 0.333]
    assert "with ReLU     probabilities [0.333 0.333 0.333], gradient [0. 0. 0.]" in out
    assert "without ReLU  probabilities [0.867 0.117 0.016], gradient [ 0.867 -0.883  0.016]" in out
    without, with_relu = (
        numbers(rf"{name} +test accuracy #", out)[0] for name in ("without ReLU", "with ReLU")
    )
    assert without > with_relu + 0.02
    assert without > 0.95


def check_thresholds(out: str) -> None:
    rows = re.findall(rf"^ +(0\.\d) +{NUMBER} +{NUMBER}$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    precisions, recalls = ([float(row[i]) for row in rows] for i in (1, 2))
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] > 0.9 > recalls[-1]
    assert precisions[0] < 0.5 < precisions[-1]
    falls, rises = numbers("precision falls: #, in which the recall rises: #", out)
    assert falls > 0
    assert rises == 0


def check_gradient_check(out: str) -> None:
    (n,) = numbers("parameters: #", out)
    assert n == 6 * 5 + 5 + 5 * 3 + 3
    assert numbers("backpropagation: +# forward and # backward pass", out) == [1, 1]
    passes, error, _ = numbers(r"forward differences: # forward .* error # at eps #", out)
    assert passes == n + 1
    assert error < 1e-6
    passes, error, eps = numbers(r"central differences: # forward .* error # at eps #", out)
    assert passes == 2 * n
    assert error < 1e-9
    assert 1e-6 <= eps <= 1e-4
    assert numbers("own check: relative error #", out)[0] < 1e-7


def check_mnist(out: str) -> None:
    assert "digits: 1438 images, 64-128-10, 3 epochs" in out
    accuracy, seconds = numbers(r"(?m)^nnx +# +#$", out)
    assert 0.8 < accuracy < 1
    assert seconds >= 0


CHECKS: dict[str, Callable[[str], None]] = {
    name.removeprefix("check_"): check
    for name, check in globals().items()
    if name.startswith("check_")
}


def test_every_check_belongs_to_an_example() -> None:
    assert set(CHECKS) <= set(FILES)
    assert set(ARGUMENTS) | set(GPU_ARGUMENTS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    run(name, [*ARGUMENTS.get(name, []), "--out", str(tmp_path)], monkeypatch)
    out = capsys.readouterr().out
    if name in CHECKS:
        CHECKS[name](out)
    pictures = sorted(tmp_path.iterdir())
    assert pictures
    assert sorted(re.findall(r"^wrote (.*)$", out, re.MULTILINE)) == [str(p) for p in pictures]
    for path in pictures:
        assert_shows_something(path)


def assert_shows_something(path: Path) -> None:
    """A PNG of at least 400 x 300 pixels with ink on it: more than one color, mostly finished."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    assert pixels.shape[0] >= 300, path
    assert pixels.shape[1] >= 400, path
    ink = (pixels < 0.95).any(axis=-1)
    assert ink.mean() > 0.01, path
    assert pixels.std() > 0.02, path


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_on_the_gpu_the_figures_are_those_of_numpy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed figures agree to the last digit but one; times and file names aside."""
    shown = []
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # pictures are tested above
    for backend in ("numpy", "cupy"):
        arguments = [*GPU_ARGUMENTS.get(name, []), "--backend", backend, "--out", str(tmp_path)]
        run(name, arguments, monkeypatch)
        lines = capsys.readouterr().out.splitlines()
        kept = [line for line in lines if not line.startswith(("no ", "wrote ", "nnx"))]
        shown.append("\n".join(kept))
    texts = [re.sub(NUMBER, "#", text) for text in shown]
    assert texts[0] == texts[1]
    values = [[float(value) for value in re.findall(NUMBER, text)] for text in shown]
    assert values[1] == pytest.approx(values[0], rel=0.02, abs=0.011)


def test_without_matplotlib_the_figures_are_printed_and_the_pictures_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run("gradient_descent", ["--out", str(tmp_path)], monkeypatch)
    out = capsys.readouterr().out
    check_gradient_descent(out)
    assert "no gradient_descent.png: " in out
    assert "pip install 'nnx-xp[plot]'" in out
    assert not list(tmp_path.iterdir())


def test_mnist_is_read_from_the_folder_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """784-128-10 on made files of MNIST's format: ten bars, each class its own."""
    import numpy as np

    labels = np.arange(200, dtype=np.uint8) % 10
    images = np.zeros((200, 28, 28), np.uint8)
    for i, label in enumerate(labels):
        images[i, 2 * label : 2 * label + 4] = 255
    folder = tmp_path / "mnist"
    folder.mkdir()
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    monkeypatch.setenv("NNX_DATA", str(folder))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--epochs", "5", "--limit", "150", "--libraries", "nnx", "--out", str(tmp_path)]
    run("mnist", arguments, monkeypatch)
    out = capsys.readouterr().out
    assert "mnist: 150 images, 784-128-10, 5 epochs" in out
    assert numbers(r"(?m)^nnx +# +#$", out)[0] == 1


@pytest.mark.torch
def test_pytorch_from_the_same_weights_is_as_accurate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--data", "digits", "--epochs", "5", "--libraries", "nnx", "PyTorch"]
    run("mnist", [*arguments, "--out", str(tmp_path)], monkeypatch)
    out = capsys.readouterr().out
    ours, theirs = (numbers(rf"(?m)^{n} +# +#$", out)[0] for n in ("nnx", "PyTorch"))
    assert ours == pytest.approx(theirs, abs=0.03)


def test_an_example_is_a_script(tmp_path: Path) -> None:
    """In a fresh process without a display, from another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "gradient_descent.py"), "--out", str(tmp_path / "new")],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    check_gradient_descent(done.stdout)
    assert not done.stderr
