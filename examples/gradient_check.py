"""The gradient by differences and by backpropagation, and how many passes each of them takes.

For P parameters, forward differences (f(w + eps) - f(w)) / eps take P + 1 forward passes, and
central ones, (f(w + eps) - f(w - eps)) / (2 eps), take 2 P; backpropagation takes one forward and
one backward pass. The texts count 1,000,001 passes for a million parameters but don't name eps: too
large and the curve bends (an error of eps, or of eps^2), too small and rounding wins. The picture
shows both ends. In float64 central differences are best near eps = 1e-5.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot


class Counted(nnx.Sequential):
    """A network that counts its passes."""

    forwards = backwards = 0

    def forward(self, x: Any, *, step: Any = None) -> Any:
        """Count and compute."""
        self.forwards += 1
        return super().forward(x, step=step)

    def backward(self, dy: Any, saved: Any, *, need_dx: bool = True) -> Any:
        """Count and compute."""
        self.backwards += 1
        return super().backward(dy, saved, need_dx=need_dx)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = parser(__doc__).parse_args(argv)
    rng = np.random.default_rng(args.seed)
    x, labels = rng.standard_normal((8, 6)), rng.integers(0, 3, 8)
    draw: dict[str, Any] = {"rng": rng, "dtype": np.float64}
    model = Counted(nnx.Linear(6, 5, **draw), nnx.Tanh(), nnx.Linear(5, 3, **draw))
    loss = nnx.SoftmaxNLL()
    vector = nnx.ParameterVector([p for _, p in model.parameters()])
    values = [p.value for p in vector.parameters]  # views of the vector
    n = sum(value.size for value in values)

    def f() -> float:
        return float(loss(model(x), labels, need_gradient=False)[0])

    def differences(eps: float, *, central: bool) -> np.ndarray:
        gradient, here = [], 0.0 if central else f()
        for value in values:
            for i in np.ndindex(value.shape):
                kept = value[i]
                value[i] = kept + eps
                ahead = f()
                if central:
                    value[i] = kept - eps
                    gradient.append((ahead - f()) / (2 * eps))
                else:
                    gradient.append((ahead - here) / eps)
                value[i] = kept
        return np.array(gradient)

    y, saved = model.forward(x)
    _, dy = loss(y, labels)
    model.backward(dy, saved, need_dx=False)
    exact = np.concatenate([p.grad.ravel() for p in vector.parameters])
    print(f"parameters: {n}")
    print(f"backpropagation:     {model.forwards} forward and {model.backwards} backward pass")

    steps = 10.0 ** -np.arange(1, 13)
    lines = {}
    for name, central in (("forward differences", False), ("central differences", True)):
        errors = []
        for eps in steps:
            before = model.forwards
            numeric = differences(float(eps), central=central)
            passes = model.forwards - before
            errors.append(float(np.linalg.norm(numeric - exact) / np.linalg.norm(exact)))
        best = int(np.argmin(errors))
        formula = "2 P" if central else "P + 1"
        print(
            f"{name}: {passes} forward passes ({formula}), relative error "
            f"{errors[best]:.1e} at eps {steps[best]:.0e}"
        )
        lines[name] = (steps, errors)
    print(f"library's own check: relative error {nnx.check_gradients(model, x):.1e}")
    picture(
        nnx.plot.curves,
        lines,
        x_label="eps",
        y_label="Relative error of the gradient",
        x_log=True,
        y_log=True,
        out=args.out,
        name="gradient_check.png",
    )


if __name__ == "__main__":
    main()
