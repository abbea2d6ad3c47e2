"""The CUDA sources as NVRTC and ptxas see them, for every architecture; no device is needed."""

import re
from typing import Any

import numpy as np
import pytest
from cuda_compilers import ARCHITECTURES, FILES, assemble, compile_text, compiled, entries

from nnx.backends.cupy_backend import _DTYPES, _KERNELS, _SCALARS, _SUFFIX, source

C_NAMES = {
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
    np.dtype(np.int64): "i64",
    np.dtype(np.uint64): "u64",
    np.dtype(np.int32): "int",
    np.dtype(np.uint32): "u32",
    np.dtype(np.uint8): "u8",
}


def c_type(kind: str, dtype: Any) -> str:
    """What a parameter of `_KERNELS` is in C; behind rows ("*") their distance is handed over."""
    plain = kind.strip("=?*")
    if plain in _SCALARS:
        return {"int": "i64", "uint": "u64", "float": "double"}[plain]
    array = "void" if plain == "any" else C_NAMES[dtype if plain == "T" else _DTYPES[plain]]
    constant = "" if kind.startswith("=") else "const "
    return f"{constant}{array}*{', i64' if kind.endswith('*') else ''}"


def declarations(file: str) -> dict[str, str]:
    """The declaration of each kernel of a file, by name, as `_KERNELS` has it."""
    found = {}
    for name, (home, signature) in _KERNELS.items():
        variants = _SUFFIX if re.search(r"\bT\b", signature) else {None: ""}
        for dtype, suffix in variants.items() if home == file else ():
            types = ", ".join(c_type(kind, dtype) for kind in signature.split())
            found[name + suffix] = f'extern "C" __global__ void {name + suffix}({types});'
    return found


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_nvrtc_compiles_without_a_warning(file: str, arch: int) -> None:
    ptx, log = compiled(file, arch)
    assert not log
    assert f".target sm_{arch}" in ptx


@pytest.mark.nvrtc
@pytest.mark.parametrize("file", FILES)
def test_a_file_has_the_kernels_of_the_table_and_no_others(file: str) -> None:
    assert entries(compiled(file, 80).ptx) == set(declarations(file))


def test_the_table_names_files_that_exist() -> None:
    assert {file for file, _ in _KERNELS.values()} == set(FILES)


# Functions of the C language can't be overloaded: the compiler refuses a second declaration with
# other parameters. An output is a pointer, an input a pointer to const.
@pytest.mark.nvrtc
@pytest.mark.parametrize("file", FILES)
def test_kernels_take_the_parameters_that_the_table_says(file: str) -> None:
    ptx, log = compile_text("\n".join([source(file), *declarations(file).values()]), 80, file)
    assert ptx, log


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    "declaration",
    [
        "relu_f32(float*, u32*, const float*)",
        "relu_f32(float*, const u32*, const float*, i64)",
        "relu_f32(float*, u32*, const double*, i64)",
        "relu_f32(float*, u32*, const float*, double)",
        "relu_f32(float*, u32*, const float*, u64)",
        "relu_f32(float*, u8*, const float*, i64)",
    ],
)
def test_other_parameters_are_found(declaration: str) -> None:
    kernel = 'extern "C" __global__ void relu_f32(float*, u32*, const float*, i64) {}'
    types = "using i64 = long long; using u64 = unsigned long long;"
    types += "using u32 = unsigned; using u8 = unsigned char;"
    text = f'{types}\n{kernel}\nextern "C" __global__ void {declaration};'
    assert not compile_text(text, 80).ptx


# ---- ptxas -------------------------------------------------------------------------------------


# `pytest -m ptxas -rP` prints what each kernel takes. A stack is memory too: an array whose index
# isn't known at compile time lands there.
@pytest.mark.ptxas
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_no_kernel_spills_registers(file: str, arch: int) -> None:
    ptx, log = compiled(file, arch)
    assert ptx, log
    usage = assemble(ptx, arch)
    assert set(usage) >= entries(ptx)
    for name, u in usage.items():
        print(f"sm_{arch} {name:28} {u.registers:4} registers {u.shared:6} bytes shared")
    assert not {name: u for name, u in usage.items() if u.spilled or u.stack}


@pytest.mark.ptxas
def test_spills_and_stacks_are_seen() -> None:
    text = """
    extern "C" __global__ void __launch_bounds__(1024, 2) spills(double* x)
    {
        double v[64];
        for (int i = 0; i < 64; ++i) v[i] = x[i * 1024];
        __syncthreads();
        for (int i = 0; i < 64; ++i) x[i * 1024] = v[i] + v[63 - i];
    }
    extern "C" __global__ void stacks(int* x)
    {
        int v[16];
        for (int i = 0; i < 16; ++i) v[i] = x[i];
        for (int i = 0; i < 16; ++i) v[x[i + 16]] += v[x[i + 32]];
        x[0] = v[x[1]];
    }
    extern "C" __global__ void shares(int* x)
    {
        __shared__ int v[32];
        v[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = v[31 - threadIdx.x];
    }
    """
    usage = assemble(compile_text(text, 80).ptx, 80)
    assert usage["spills"].spilled > 0
    assert usage["spills"].registers == 32
    assert usage["stacks"].stack == 64
    assert usage["shares"][1:] == (128, 0, 0)
