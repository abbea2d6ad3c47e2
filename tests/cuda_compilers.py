"""NVRTC and ptxas as the tests use them. Both run on any machine: neither asks for a device."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nnx.backends.cupy_backend import source

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FILES = sorted(p.name for p in (Path(__file__).parent.parent / "backends/cuda").glob("*.cu"))
OPTIONS = ("-std=c++17", "-ftz=true")  # the second is what CuPy adds


class Compiled(NamedTuple):
    """What NVRTC makes of a text: PTX, and all that it complains about."""

    ptx: str
    log: str


def compile_text(text: str, arch: int, name: str = "test.cu") -> Compiled:
    """Compile for `sm_<arch>`; no PTX where there are errors."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text, name, (), ())
    try:
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture=compute_{arch}"))
            ptx = nvrtc.getPTX(program)
        except nvrtc.NVRTCError:
            ptx = b""
        return Compiled(ptx.decode(), nvrtc.getProgramLog(program).strip())
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def compiled(file: str, arch: int) -> Compiled:
    """Compile a file of `backends/cuda` for `sm_<arch>`."""
    return compile_text(source(file), arch, file)


def entries(ptx: str) -> set[str]:
    """Names of the kernels in PTX."""
    return set(re.findall(r"\.entry (\w+)", ptx))


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor, as ptxas reports it; bytes but for the registers."""

    registers: int
    shared: int
    stack: int
    spilled: int


def assemble(ptx: str, arch: int, program: str | None = None) -> dict[str, Usage]:
    """What each kernel and each function that isn't inlined takes, by `ptxas -v`.

    Raises:
        RuntimeError: ptxas fails, or warns.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.ptx")
        path.write_text(ptx)
        program = program or ptxas()[0]
        assert program is not None
        command = [program, "-v", f"-arch=sm_{arch}", "-o", os.devnull, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    if done.returncode or "warning" in report:
        raise RuntimeError(f"{program}: {report.strip()}")
    usage = {}
    for block in report.split("Function properties for ")[1:]:
        number = {
            key: int((re.search(rf"(\d+) {text}", block) or "00")[1])
            for key, text in {
                "registers": "registers",
                "shared": "bytes smem",
                "stack": "bytes stack frame",
                "stores": "bytes spill stores",
                "loads": "bytes spill loads",
            }.items()
        }
        spilled = number.pop("stores") + number.pop("loads")
        usage[block.split()[0]] = Usage(**number, spilled=spilled)
    return usage


@functools.cache
def ptxas() -> tuple[str | None, str]:
    """The first ptxas that reads the PTX of this NVRTC; or None, and why there is none.

    An older ptxas than NVRTC doesn't. Looked for in the variable `NNX_PTXAS`, in the package
    `nvidia-cuda-nvcc`, on the path and in CUDA's folders.
    """
    ptx = compile_text('extern "C" __global__ void nothing() {}', min(ARCHITECTURES)).ptx
    reasons = []
    for candidate in _candidates():
        try:
            assemble(ptx, min(ARCHITECTURES), candidate)
        except (OSError, RuntimeError) as error:
            reasons.append(str(error).partition("\n")[0])
        else:
            return candidate, ""
    return None, "; ".join(reasons) or (
        "no ptxas in nvidia-cuda-nvcc, on the path or in CUDA's folders"
    )


def _candidates() -> Iterator[str]:
    if named := os.environ.get("NNX_PTXAS"):
        yield named
        return
    package = importlib.util.find_spec("nvidia")
    for folder in (package and package.submodule_search_locations) or ():
        yield from map(str, sorted(Path(folder).glob("*/bin/ptxas"), reverse=True))
    if on_path := shutil.which("ptxas"):
        yield on_path
    for root in (os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root and (program := Path(root, "bin/ptxas")).exists():
            yield str(program)
