"""The documentation: its code runs, its links lead somewhere, nothing public is missing from it.

A block that starts with three backticks and `python` is executed, all of a page in one namespace
and in order; one that starts with `py` is only shown, for what needs a GPU or the reader's files.
"""

import importlib.util
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nnx
from nnx import layers, losses

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Public, and no function to derive: base classes and what a step is made of.
WITHOUT_DERIVATION = {"Layer", "Loss", "Step"}
# Public, and no modules to import: their page is guide/command-line.md.
WITHOUT_REFERENCE = {"bench", "cli"}
# Pages that may do without code that runs.
WITHOUT_CODE = re.compile(
    r"api/|changelog|index\.md|guide/(install|command-line)\.md|gpu\.md|benchmarks\.md"
)


def _blocks(page: str) -> Iterator[tuple[int, str, str]]:
    """Line, language and code of each fenced block."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        yield text.count("\n", 0, match.start(2)) + 1, match[1], match[2]


def _run(page: str) -> int:
    """Execute the Python blocks of a page in order; returns how many there are."""
    namespace = {"__name__": "__main__"}
    count = 0
    for line, language, code in _blocks(page):
        if language == "python":
            source = "\n" * (line - 1) + code  # so that a traceback names the page's own lines
            exec(compile(source, str(DOCS / page), "exec"), namespace)
            count += 1
    return count


def _prose(page: str) -> str:
    return BLOCK.sub("", (DOCS / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_the_code_on_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNX_BACKEND", raising=False)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    ran = _run(page)
    assert ran or WITHOUT_CODE.match(page) or page.endswith("index.md")


def test_an_equation_that_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / "derivations/softmax.md").read_text(encoding="utf-8")
    right = "returned = dy - softmax(x) * dy.sum(axis=-1, keepdims=True)"
    assert right in page
    (tmp_path / "page.md").write_text(page.replace(right, right.replace("dy.sum", "dy.mean")))
    monkeypatch.setitem(globals(), "DOCS", tmp_path)
    with pytest.raises(AssertionError):
        _run("page.md")


def test_every_layer_and_every_loss_is_derived() -> None:
    headings = {
        name
        for page in PAGES
        if page.startswith("derivations/")
        for heading in re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
        for name in re.findall(r"`(\w+)`", heading)
    }
    public = set(layers.__all__) | {
        name
        for name, value in vars(losses).items()
        if isinstance(value, type) and issubclass(value, losses.Loss) and name[0] != "_"
    }
    assert public - headings - WITHOUT_DERIVATION == set()
    assert not WITHOUT_DERIVATION & headings


def test_every_page_is_in_the_navigation_and_the_navigation_has_no_other() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = text.partition("\nnav:\n")[2].partition("\n\n")[0]
    listed = re.findall(r"[\w./-]+\.md", nav)
    assert sorted(listed) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if not re.match(r"https?://|#", target):
            path = (DOCS / page).parent / target.partition("#")[0]
            assert path.exists(), target


def test_files_of_the_repository_that_pages_name_exist() -> None:
    named = {
        name
        for page in PAGES
        for name in re.findall(r"`((?:examples|tests)/[\w./]+\.py)`", _prose(page))
    }
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_public_module_has_a_page_of_reference() -> None:
    modules = {
        match
        for page in PAGES
        if page.startswith("api/")
        for match in re.findall(r"^::: ([\w.]+)$", _prose(page), re.MULTILINE)
    }
    for name in nnx.__all__:
        value = getattr(nnx, name)
        home = getattr(value, "__module__", None) or value.__name__
        assert any(home == m or home.startswith(f"{m}.") for m in modules), name
    public = {m.name for m in pkgutil.iter_modules(nnx.__path__) if m.name[0] != "_"}
    assert {f"nnx.{name}" for name in public - WITHOUT_REFERENCE} <= modules


def test_equations_are_closed_on_every_page() -> None:
    for page in PAGES:
        prose = re.sub(r"`[^`\n]*`", "", _prose(page))
        for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
            assert prose.count(opening) == prose.count(closing), page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as `mkdocs build --strict` makes them, built in a process of its own.

    Not with `--quiet`, which hides the warnings before `--strict` can count them.
    """
    for module in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module} to build the pages: pip install 'nnx-xp[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_without_a_warning_and_needs_no_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES) - 1
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?://[^\"]+)", page.read_text()
        )
        assert not loaded, page


def test_the_command_line_page_holds_every_command_s_help(site: Path) -> None:
    page = (site / "guide/command-line.html").read_text(encoding="utf-8")
    for command in ("", " train", " evaluate", " predict", " check", " bench", " info"):
        assert f"usage: nnx{command} [-h]" in page
    assert "help of every command" not in page


def test_reference_pages_show_every_public_class_and_its_sections(site: Path) -> None:
    page = (site / "api/layers.html").read_text(encoding="utf-8")
    for name in layers.__all__:
        assert f'id="nnx.layers.{name}"' in page or f"{name}</code>" in page, name
    assert "<strong>Saved:</strong>" in page
    assert "<strong>Gradient:</strong>" in page


def test_sections_of_our_docstrings_become_paragraphs_and_lists() -> None:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("_sections", DOCS / "_sections.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Sum.\n\nShape:\n    x: `(N, n)`\n        or.\n    y: `(N,)`\n\nSaved: y. Gradient: z."
    assert module.rewrite(text) == (
        "Sum.\n\n\n**Shape:**\n\n- x: `(N, n)`\n        or.\n- y: `(N,)`\n\n\n"
        "**Saved:** y.\n\n**Gradient:** z."
    )
