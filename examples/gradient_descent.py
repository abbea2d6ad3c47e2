"""Gradient descent on f(x) = (x - 2)^2 + 1, by the optimizer that also trains networks.

From x = 5 with a learning rate of 0.1, each step takes x a fifth of the way to the minimum at 2:
x_n = 2 + 3 * 0.8^n. After ten steps x is 2.322 and f is 1.104: near the minimum, and never at it. A
text writes f(x_2) = 1 for the minimum, which reads as the second step; there f is 4.686.
"""

from collections.abc import Sequence

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot


def f(x: np.ndarray) -> np.ndarray:
    """The function to make small."""
    return (x - 2) ** 2 + 1


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__)
    options.add_argument("--start", type=float, default=5.0)
    options.add_argument("--lr", type=float, default=0.1)
    options.add_argument("--steps", type=int, default=10)
    args = options.parse_args(argv)

    x = nnx.Parameter(np.array([args.start]))
    optimizer = nnx.SGD(lr=args.lr)
    optimizer.bind(nnx.ParameterVector([x]))
    path = [args.start]
    for _ in range(args.steps):
        x.grad[...] = 2 * (x.value - 2)  # f'(x)
        x.fresh = False  # the gradient has been written
        optimizer.step()
        path.append(float(x.value[0]))

    points = np.array(path)
    print(" n  x_n           f(x_n)")
    for n, (point, value) in enumerate(zip(points, f(points), strict=True)):
        print(f"{n:2}  {point:.10f}  {value:.5f}")
    closed = 2 + (args.start - 2) * (1 - 2 * args.lr) ** np.arange(len(points))
    print(
        f"largest distance from 2 + {args.start - 2:g} * {1 - 2 * args.lr:g}^n: "
        f"{np.abs(points - closed).max():.1e}"
    )

    picture(nnx.plot.gradient_descent_path, f, points, out=args.out, name="gradient_descent.png")


if __name__ == "__main__":
    main()
