"""The matrix product by its definition, three loops, and by the library that every layer calls.

Both give the same numbers; the loops take thousands of times as long. The times are of this
machine, the best of several repetitions, and the ratio grows with the size.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from _common import parser, picture

import nnx.plot


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c_ij = sum over k of a_ik b_kj."""
    (n_rows, n_inner), n_columns = a.shape, b.shape[1]
    c = np.zeros((n_rows, n_columns), a.dtype)
    for i in range(n_rows):
        for j in range(n_columns):
            for k in range(n_inner):
                c[i, j] += a[i, k] * b[k, j]
    return c


def seconds(function: Callable[[], object], repetitions: int) -> float:
    """The shortest time that a call takes."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64])
    args = options.parse_args(argv)

    a = np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]])
    b = np.array([[1, 1], [2, 2], [3, 3]])
    print(f"three loops: {product(a, b).tolist()}")
    print(f"a @ b:       {(a @ b).tolist()}")
    print(f"c_31 = 3*1 + 3*2 + 3*3 = {product(a, b)[2, 0]}")

    rng = np.random.default_rng(args.seed)
    print("   n  loops (ms)  a @ b (ms)   ratio")
    loops, library = [], []
    for n in args.sizes:
        a, b = rng.standard_normal((2, n, n))
        np.testing.assert_allclose(product(a, b), a @ b, rtol=1e-10, atol=1e-10)
        loops.append(1e3 * seconds(partial(product, a, b), 2))
        library.append(1e3 * seconds(partial(np.matmul, a, b), 20))
        print(f"{n:4}  {loops[-1]:10.3f}  {library[-1]:10.4f}  {loops[-1] / library[-1]:6.0f}")

    picture(
        nnx.plot.curves,
        {"three loops": (args.sizes, loops), "a @ b": (args.sizes, library)},
        x_label="Rows and columns",
        y_label="Milliseconds",
        y_log=True,
        out=args.out,
        name="matrix_product.png",
    )


if __name__ == "__main__":
    main()
