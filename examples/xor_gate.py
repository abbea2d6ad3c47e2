"""The XOR gate, which no single layer can learn and a layer of three hidden units can.

One affine layer divides the plane by a straight line, and no line has (0, 1) and (1, 0) on one side
and (0, 0) and (1, 1) on the other: at most three of the four rows come out right. The classic texts
stop at AND, which a line can do. Twenty networks of each kind train side by side from different
starts; a start may still end in a local minimum.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot
from nnx.initializers import glorot_normal

NETWORKS = 20


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__, backend=True)
    options.add_argument("--lr", type=float, default=0.1)
    options.add_argument("--epochs", type=int, default=1000)
    args = options.parse_args(argv)

    gate = nnx.data.logic_gate("xor")
    target = gate.t[:, None].astype(np.float32)
    for name, sizes in (("no hidden layer", [2, 1]), ("3 hidden units", [2, 3, 1])):
        rng = np.random.default_rng(args.seed)
        layers: list[nnx.Layer] = []
        for n_in, n_out in itertools.pairwise(sizes):
            linear = nnx.Linear(n_in, n_out, initializer=glorot_normal, rng=rng, n_models=NETWORKS)
            layers += [linear, nnx.Tanh()]
        trainer = nnx.Trainer(
            nnx.Sequential(*layers),
            nnx.MeanSquaredError(n_models=NETWORKS),
            nnx.SGD(lr=args.lr),
            seed=args.seed,
            backend=args.backend,
        )
        history = trainer.fit(gate.x, target, epochs=args.epochs, batch_size=1)
        output = trainer.predict(gate.x)  # (networks, rows of the truth table, 1)
        right = ((output > 0.5) == (target > 0.5)).sum(axis=(1, 2))
        error = ((output - target) ** 2).mean(axis=(1, 2))
        print(
            f"{name}: learned XOR {(right == 4).sum()} of {NETWORKS} networks, best {right.max()} "
            f"of 4 rows, mean squared error: median {np.median(error):.1e}, "
            f"smallest {error.min():.1e}"
        )

    best = int(error.argmin())
    print("x1 x2  XOR  output of the best network")
    for x, t, y in zip(gate.x, target[:, 0], output[best, :, 0], strict=True):
        print(f"{x[0]:2.0f} {x[1]:2.0f} {t:4.0f}  {y:.3f}")
    picture(nnx.plot.learning_curves, history, out=args.out, name="xor_gate_curves.png")
    picture(
        nnx.plot.decision_boundary,
        lambda points: trainer.predict(points)[best],
        gate.x,
        gate.t,
        extent=(0, 1, 0, 1),
        out=args.out,
        name="xor_gate_boundary.png",
    )


if __name__ == "__main__":
    main()
