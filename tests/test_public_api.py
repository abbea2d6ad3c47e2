"""What the library promises from outside: names, docstrings, a light import, a small core."""

import ast
import importlib
import importlib.metadata
import io
import re
import subprocess
import sys
import tokenize
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import nnx

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["nnx", "nnx.backends", "nnx.check", "nnx.data", "nnx.layers"]
MODULES = sorted([*(ROOT / "nnx").rglob("*.py"), *(ROOT / "backends").glob("*.py")])
# check, bench and memory: tools that watch the core from outside
NOT_CORE = {"bench", "check", "cli.py", "cuda_versions.py", "data", "memory.py", "plot.py"}

# Lines of code without comments and docstrings. The spine is what somebody must read who wants to
# know how it works, in one sitting: arrays, layers and containers, parameters, the step, files. A
# catalogue is many entries of one kind, of which one reads the one at hand: an entry more is no
# harder to read, a spine that grows is. The device is what a GPU and the C kernels add, for a
# second sitting: nobody needs it to understand what is computed, since every body in it has its
# definition in the spine.
CATALOGUES = {
    *("activations.py", "normalization.py", "initializers.py", "losses.py", "optimizers.py"),
    *("schedules.py", "callbacks.py", "metrics.py"),
}
DEVICE = {
    *("_graphs.py", "cublas.py", "cupy_backend.py", "cupy_step.py"),
    *("expressions.py", "numpy_backend.py", "threads.py"),
}
SPINE_BUDGET = 2_700
CATALOGUE_BUDGET = 2_200
DEVICE_BUDGET = 1_900

# Everything that is imported when it is first used, and not before.
ON_DEMAND = {
    *("cupy", "matplotlib", "mpi4py", "onnx", "pooch", "pyarrow"),
    *("safetensors", "scipy", "sklearn", "torch", "tqdm"),
}


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_all_lists_what_is_public(package: str) -> None:
    module = importlib.import_module(package)
    listed = module.__all__
    assert len(listed) == len(set(listed))
    assert listed == sorted(listed, key=_isort_key)
    for name in listed:
        assert hasattr(module, name), name
    ours = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and str(getattr(value, "__module__", "")).partition(".")[0] == "nnx"
    }
    assert ours <= set(listed)


def _isort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest: the order of Ruff's RUF022."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2, name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, definitions)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not bare
    assert ast.get_docstring(tree) is not None


def test_the_version_is_that_of_the_installed_distribution() -> None:
    try:
        installed = importlib.metadata.version("nnx-xp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nnx runs from a checkout that isn't installed")
    assert nnx.__version__ == installed


# ---- a light import --------------------------------------------------------------------------


def _imported_by(statement: str, *, whole: bool = False) -> set[str]:
    """Names of the modules `statement` loads in a fresh interpreter, `whole` or top-level ones."""
    code = f"{statement}; import sys; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    return loaded if whole else {name.partition(".")[0] for name in loaded}


def test_import_needs_numpy_and_the_standard_library_only() -> None:
    # NumPy's own parts bring helpers along, and `site` may load hooks of other packages
    before = _imported_by("import numpy, numpy.random")
    loaded = _imported_by("import nnx")
    assert loaded - before - set(sys.stdlib_module_names) == {"nnx"}
    assert not loaded & ON_DEMAND


def test_import_leaves_alone_what_only_reading_and_writing_need() -> None:
    on_demand = {"gzip", "importlib.resources", "json", "tempfile", "zipfile"}
    before = _imported_by("import numpy, numpy.random", whole=True)
    assert not (_imported_by("import nnx", whole=True) - before) & on_demand


# ---- a small core ----------------------------------------------------------------------------


def _code_lines(path: Path) -> int:
    """Lines that hold code: neither blank nor only a comment or a docstring."""
    text = path.read_text()
    silent = {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
        *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_lines_of_code_are_counted_right(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Two\nlines."""\n\n# a comment\nx = """a\nb"""  # two lines\n\n\ny = (\n    1\n)\n'
    )
    assert _code_lines(path) == 5


def test_a_reader_finishes_the_core_in_one_sitting() -> None:
    core = [path for path in MODULES if not NOT_CORE & set(path.relative_to(ROOT).parts)]
    lines = {str(path.relative_to(ROOT)): _code_lines(path) for path in core}
    assert "nnx/trainer.py" in lines
    assert "backends/base.py" in lines
    rest = dict(lines)
    for names, budget in ((CATALOGUES, CATALOGUE_BUDGET), (DEVICE, DEVICE_BUDGET)):
        part = {name: rest.pop(name) for name in lines if Path(name).name in names}
        assert len(part) == len(names)
        assert sum(part.values()) <= budget, part
    assert sum(rest.values()) <= SPINE_BUDGET, rest


# ---- the README ------------------------------------------------------------------------------


def _readme_blocks(language: str) -> Iterator[str]:
    text = (ROOT / "README.md").read_text()
    return (m[1] for m in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S))


@pytest.mark.parametrize("flag", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_the_example_in_the_readme_runs(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NNX_BACKEND", flag)
    (example,) = _readme_blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    accuracy = float(capsys.readouterr().out.split()[-1])
    assert accuracy > 0.95


def test_the_readme_names_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert rows
    assert set(rows) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "bench/README.md"])
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]
