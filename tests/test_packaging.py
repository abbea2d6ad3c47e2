"""What is shipped: the wheel's content and metadata, and what must stay out of the repository."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import nnx

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {".py", ".typed", ".npz", ".md", ".cu", ".cuh"}


WARNING = re.compile(r"^.*backends/cpu/.*(?:warning:|\[-Werror).*$", re.MULTILINE)
KERNELS = re.compile(r"nnx/backends/_cpu\.(abi3\.so|pyd)")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because setuptools leaves `build/` behind and would ship what it held.

    Tests, benchmarks and kernels built in place are copied too, to see that they stay out.
    """
    source = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("nnx", "backends", "tests", "bench"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("sdist", checkout, tmp_path_factory.mktemp("sdist"))[0]


@pytest.fixture(scope="module")
def built(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel, built from the source archive alone, and what the build has printed."""
    source = _unpacked(sdist, tmp_path_factory.mktemp("source"))
    return _build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, str]) -> Path:
    return built[0]


def _build(kind: str, source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """A wheel or source archive, built without a network, and what the build has printed."""
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = out.iterdir()
    return archive, done.stdout + done.stderr


def _unpacked(archive: Path, folder: Path) -> Path:
    """The folder with the content of a source archive or a wheel."""
    shutil.unpack_archive(archive, folder, "zip" if archive.suffix == ".whl" else None)
    return folder if archive.suffix == ".whl" else next(folder.iterdir())


def _run(wheel: Path, folder: Path, *command: str) -> str:
    """What Python prints in a process that sees the wheel's content and not this checkout."""
    _unpacked(wheel, folder / "installed")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NNX_")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(folder / "installed")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _sources() -> set[str]:
    """Every file that belongs into the wheel, by its name there."""
    return {
        str(Path(package, path.relative_to(folder)))
        for package, folder in (("nnx", ROOT / "nnx"), ("nnx/backends", ROOT / "backends"))
        for path in folder.rglob("*")
        if path.suffix in SHIPPED and path.is_file() and path.name != "build.py"
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    dist_info = f"nnx_xp-{nnx.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"nnx", dist_info}
    found = {name for name in names if not name.startswith(dist_info)}
    assert {name for name in found if not KERNELS.fullmatch(name)} == _sources()


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


def test_the_source_archive_holds_what_the_wheel_is_built_from(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    from_backends = {name.removeprefix("nnx/") for name in _sources() if "/backends/" in name}
    assert from_backends | {n for n in _sources() if "/backends/" not in n} <= names
    kernels = {f"backends/cpu/{path.name}" for path in (ROOT / "backends/cpu").glob("*.*")}
    assert "backends/cpu/build.py" in kernels
    assert {name for name in names if name.startswith("backends/cpu/")} == kernels
    assert not [name for name in names if KERNELS.search(name)]


# ---- the C kernels -----------------------------------------------------------------------------


@pytest.mark.kernels  # where they are, they could be built
def test_the_kernels_are_in_the_wheel_for_every_python_from_3_11_on(wheel: Path) -> None:
    assert re.fullmatch(r"nnx_xp-[\d.]+-cp311-abi3-(linux|macosx|win)_?\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert len([name for name in archive.namelist() if KERNELS.fullmatch(name)]) == 1


def test_the_kernels_compile_without_a_warning(built: tuple[Path, str]) -> None:
    assert "-Wall -Wextra" in built[1]
    assert not WARNING.findall(built[1])


def test_without_a_compiler_numpy_does_the_work(checkout: Path, tmp_path: Path) -> None:
    no_compiler = shutil.which("false")
    if no_compiler is None:
        pytest.skip("no program that fails")
    (tmp_path / "out").mkdir()
    wheel, _ = _build("wheel", checkout, tmp_path / "out", CC=no_compiler)
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
    code = "import nnx.cli as n; n.main(['info']); n.main(['train', '--epochs', '1'])"
    text = _run(wheel, tmp_path, "-c", code)
    assert re.search(r"^C kernels +not built$", text, re.MULTILINE)
    assert "test accuracy" in text


@pytest.mark.kernels
@pytest.mark.skipif(os.name != "posix", reason="stands in for the compiler by a shell script")
def test_a_compiler_without_openmp_builds_for_one_thread(sdist: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    real = os.environ.get("CC") or sysconfig.get_config_var("CC")
    # -O0, as the last one said, for nobody waits for this build
    compiler.write_text(
        f'#!/bin/sh\nfor a; do [ "$a" != -fopenmp ] || exit 1; done\nexec {real} "$@" -O0\n'
    )
    compiler.chmod(0o755)
    (tmp_path / "out").mkdir()
    source = _unpacked(sdist, tmp_path / "source")
    wheel, log = _build("wheel", source, tmp_path / "out", CC=str(compiler))
    assert not WARNING.findall(log)
    code = """if True:
        from nnx.cli import main
        import numpy as np
        from nnx.backends import numpy_backend as n
        assert n.CPU.set_num_threads(2) == 1
        x = np.linspace(-1, 1, 1 << 20)
        assert (n.NUMPY.relu(x)[0] == x * (x > 0)).all()
        main(["info"])
    """
    text = _run(wheel, tmp_path, "-c", code)
    assert re.search(r"^C kernels +\w+, no OpenMP$", text, re.MULTILINE)


# ---- the repository ----------------------------------------------------------------------------


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
