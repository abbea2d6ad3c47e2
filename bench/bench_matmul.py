"""Matrix products: `Backend.gemm` beside the bare library call, and batched beside a Python loop.

`gemm` is the one door to BLAS and cuBLAS, so what it costs beyond the call shows here.
"""

from collections.abc import Callable

import pytest

from nnx.backends import Array, Backend

Run = Callable[..., None]


@pytest.mark.parametrize("door", ["gemm", "matmul"])
@pytest.mark.parametrize("form", ["forward", "dweight", "dx"])
@pytest.mark.parametrize("batch", [128, 1024])
def bench_linear(
    run: Run,
    backend: Backend,
    random: Callable[..., Array],
    shrink: Callable[[int], int],
    batch: int,
    form: str,
    door: str,
) -> None:
    """The three products of a 512-512 affine layer, transposes by strides."""
    n, width = shrink(batch), shrink(512)
    x, dy, weight = random(n, width), random(n, width), random(width, width)
    a, b = {"forward": (x, weight), "dweight": (x.T, dy), "dx": (dy, weight.T)}[form]
    out = backend.empty((a.shape[0], b.shape[1]), a.dtype)
    matmul = backend.xp.matmul
    call = (lambda: backend.gemm(a, b, out)) if door == "gemm" else (lambda: matmul(a, b, out=out))
    run(
        call,
        group=f"matmul, {form}, batch {batch}",
        samples=n,
        flops=2 * a.shape[0] * a.shape[1] * b.shape[1],
    )


@pytest.mark.parametrize("way", ["batched", "loop"])
@pytest.mark.parametrize(("models", "batch", "width"), [(16, 4, 8), (16, 32, 64), (16, 128, 256)])
def bench_models(
    run: Run,
    backend: Backend,
    random: Callable[..., Array],
    shrink: Callable[[int], int],
    models: int,
    batch: int,
    width: int,
    way: str,
) -> None:
    """One affine layer of K models side by side, and the same in a Python loop over the models."""
    n, m = shrink(batch), shrink(width)
    x, weight = random(models, n, m), random(models, m, m)
    out = backend.empty(x.shape, x.dtype)

    def loop() -> None:
        for k in range(models):
            backend.gemm(x[k], weight[k], out[k])

    run(
        (lambda: backend.gemm(x, weight, out)) if way == "batched" else loop,
        group=f"matmul, {models} models, batch {batch}, width {width}",
        samples=models * n,
        flops=2 * models * n * m * m,
    )
