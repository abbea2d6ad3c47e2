"""Why no ReLU belongs between the last layer and the softmax.

Two classic texts build the network Linear-ReLU-Softmax. Where all logits of a sample are negative
the ReLU makes them zero: the softmax is uniform whatever the logits said, and no gradient comes
back, so the sample can't teach. Without the ReLU the same logits give an answer and a gradient.

The second half trains 64-50-10 on the digits from five starts. With the ReLU some networks never
learn a class or two: its logit is zero for every sample, and stays so.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot

NETWORKS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__, backend=True)
    options.add_argument("--epochs", type=int, default=20)
    args = options.parse_args(argv)

    logits, label = np.array([[-1.0, -3.0, -5.0]]), np.array([1])
    print(f"logits {logits[0].tolist()}, true class {label[0]}")
    for name, last in (("without ReLU", []), ("with ReLU", [nnx.ReLU()])):
        end = nnx.Sequential(nnx.Flatten(), *last)
        output, saved = end.forward(logits)
        _, doutput = nnx.SoftmaxNLL()(output, label)
        gradient: Any = end.backward(doutput, saved)
        with np.printoptions(precision=3, suppress=True):
            print(f"{name:12}  probabilities {nnx.Softmax()(output)[0]}, gradient {gradient[0]}")

    train, test = nnx.data.load_digits()
    scale = nnx.data.Standardizer.fit(train.x)
    x, x_test = scale.transform(train.x), scale.transform(test.x)
    lines = {}
    for name, last in (("without ReLU", []), ("with ReLU", [nnx.ReLU()])):
        model = nnx.mlp([64, 50, 10], seed=args.seed, n_models=NETWORKS)
        trainer = nnx.Trainer(
            nnx.Sequential(*model.sequence, *last),
            nnx.SoftmaxNLL(n_models=NETWORKS),
            nnx.SGD(lr=0.1),
            seed=args.seed,
            backend=args.backend,
        )
        history = trainer.fit(x, train.t, epochs=args.epochs, validation=(x_test, test.t))
        lines[name] = (history["epoch"], np.mean(history["validation_accuracy"], axis=1))
        each = history["validation_accuracy"][-1]
        print(
            f"{name:12}  test accuracy {each.mean():.3f} "
            f"(each network: {' '.join(f'{a:.3f}' for a in each)})"
        )
    picture(
        nnx.plot.curves,
        lines,
        x_label="Epoch",
        y_label="Test accuracy, mean of 5 networks",
        out=args.out,
        name="relu_before_softmax.png",
    )


if __name__ == "__main__":
    main()
