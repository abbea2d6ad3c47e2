"""The AND gate, learned by a network of 2 inputs, 3 hidden units and 1 output, all tanh.

A classic text trains it with a learning rate of 0.001 for 1000 epochs, one sample per step, which
is far too few for so small a rate: try `--lr 0.001`, and some networks still have a row wrong and
all of them a large error. With 0.1 every one learns AND. Twenty networks train here side by side,
by one set of operations, from twenty different starts.

The text also calls the network once for each point of the plane to draw its decision boundary; here
all 400 points go through it as one batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot
from nnx.initializers import glorot_uniform

NETWORKS = 20


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__, backend=True)
    options.add_argument("--lr", type=float, default=0.1)
    options.add_argument("--epochs", type=int, default=1000)
    args = options.parse_args(argv)

    gate = nnx.data.logic_gate("and")
    target = gate.t[:, None].astype(np.float32)
    draw: dict[str, Any] = {"initializer": glorot_uniform, "rng": np.random.default_rng(args.seed)}
    model = nnx.Sequential(
        nnx.Linear(2, 3, n_models=NETWORKS, **draw),
        nnx.Tanh(),
        nnx.Linear(3, 1, n_models=NETWORKS, **draw),
        nnx.Tanh(),
    )
    trainer = nnx.Trainer(
        model,
        nnx.MeanSquaredError(n_models=NETWORKS),
        nnx.SGD(lr=args.lr),
        seed=args.seed,
        backend=args.backend,
    )
    history = trainer.fit(gate.x, target, epochs=args.epochs, batch_size=1)

    output = trainer.predict(gate.x)  # (networks, rows of the truth table, 1)
    learned = ((output > 0.5) == (target > 0.5)).all(axis=(1, 2))
    error = ((output - target) ** 2).mean(axis=(1, 2))
    print(f"learned AND: {learned.sum()} of {NETWORKS} networks")
    print(f"mean squared error: median {np.median(error):.1e}, largest {error.max():.1e}")
    print("x1 x2  AND  output of the first network")
    for x, t, y in zip(gate.x, target[:, 0], output[0, :, 0], strict=True):
        print(f"{x[0]:2.0f} {x[1]:2.0f} {t:4.0f}  {y:.3f}")

    picture(nnx.plot.learning_curves, history, out=args.out, name="and_gate_curves.png")
    picture(
        nnx.plot.decision_boundary,
        lambda points: trainer.predict(points)[0],
        gate.x,
        gate.t,
        extent=(0, 1, 0, 1),
        out=args.out,
        name="and_gate_boundary.png",
    )


if __name__ == "__main__":
    main()
