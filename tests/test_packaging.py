"""What is shipped: the wheel's content and metadata, and what must stay out of the repository."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import nnx

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {".py", ".typed", ".npz", ".md", ".cu", ".cuh"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source archive, built from a copy of the sources and without a network.

    A copy, because setuptools leaves `build/` behind and would ship what an earlier build left.
    Tests and benchmarks are copied too, to see that they stay out.
    """
    folder = tmp_path_factory.mktemp("build")
    source, out = folder / "source", folder / "out"
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("nnx", "backends", "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out.mkdir()
    for kind in ("wheel", "sdist"):
        call = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        done = subprocess.run(
            [sys.executable, "-c", call], cwd=source, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def wheel(archives: tuple[Path, Path]) -> Path:
    return archives[0]


@pytest.fixture(scope="module")
def sdist(archives: tuple[Path, Path]) -> Path:
    return archives[1]


def _sources() -> set[str]:
    """Every file that belongs into the wheel, by its name there."""
    return {
        str(Path(package, path.relative_to(folder)))
        for package, folder in (("nnx", ROOT / "nnx"), ("nnx/backends", ROOT / "backends"))
        for path in folder.rglob("*")
        if path.suffix in SHIPPED and path.is_file()
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    dist_info = f"nnx_xp-{nnx.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"nnx", dist_info}
    assert {name for name in names if not name.startswith(dist_info)} == _sources()


def test_the_wheel_holds_the_data_files_and_every_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "nnx/__init__.py",
        "nnx/py.typed",
        "nnx/backends/__init__.py",
        "nnx/backends/cupy_backend.py",
        "nnx/data/digits.npz",
        "nnx/data/DIGITS.md",
        "nnx/layers/__init__.py",
    } <= names
    assert any(re.fullmatch(r"nnx/backends/cuda/\w+\.cu", name) for name in names)


def test_the_wheel_says_what_it_is_and_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        (scripts,) = (n for n in archive.namelist() if n.endswith("/entry_points.txt"))
        metadata = email.message_from_bytes(archive.read(name))
        assert "nnx = nnx.__main__:main" in archive.read(scripts).decode()
    assert metadata["Name"] == "nnx-xp"
    assert metadata["Version"] == nnx.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    requirements = metadata.get_all("Requires-Dist") or []
    needed = {re.split(r"[^\w-]", r)[0] for r in requirements if "extra ==" not in r}
    assert needed == {"numpy", "safetensors", "tqdm"}


def test_neither_pytorch_nor_jax_is_ever_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(r for extra in extras for r in extra)]
    assert not [r for r in listed if re.match(r"(torch|jax)\b", r)]


def test_the_source_archive_is_enough_to_build_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    from_backends = {name.removeprefix("nnx/") for name in _sources() if "/backends/" in name}
    assert from_backends | {n for n in _sources() if "/backends/" not in n} <= names


def test_backends_can_be_imported_under_one_name_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import backends"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "ImportError: import this package as `nnx.backends`" in done.stderr


# Written so that this file doesn't match: a bracket or a backslash stands inside each.
ELSEWHERE = re.compile(
    r"\.[.]/shared"  # what lies beside the checkout
    r"|(?<![\w.<-])/(?:root|home|Users|work|tmp)/\w"  # somebody's folders
    r"|(?:index|find|trusted)-(?:url|links|host)\b|extra-inde[x]"  # where packages come from
)
ALLOWED = {".ci/run": re.compile(r"\.[.]/shared")}


def test_no_file_depends_on_the_machine_it_was_written_on() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing tells its files from those that lie about")
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run(
        [*git, "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or path.suffix in {".npz", ".png", ".gz", ".safetensors"}:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if name in ALLOWED:
                line = ALLOWED[name].sub("", line)
            if ELSEWHERE.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found
