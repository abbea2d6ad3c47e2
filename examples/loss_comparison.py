"""Three losses for the same classification: 100 digits, 50 epochs of the full batch, lr 0.5.

- CE: cross-entropy of the softmax, from logits.
- MSE: mean squared error of the raw outputs against one-hot targets.
- MSES: mean squared error of the softmax. Where the softmax is sure its derivative is almost zero,
  sure and wrong included, so this one learns slowest.

CE > MSE > MSES, for each of five starts; how far MSE stays behind depends on the scale of the
inputs, here 0 to 1. All three losses are means over the samples: with a
cross-entropy that is summed over the batch, as in a text that prints this comparison, the same
learning rate diverges.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot

NETWORKS, SAMPLES = 5, 100


class TrainingAccuracy(nnx.Callback):
    """The share of right answers of each network, after each epoch."""

    def __init__(self, x: np.ndarray, labels: np.ndarray) -> None:
        self.x, self.labels = x, labels
        self.values: list[np.ndarray] = []

    def on_epoch_end(self, trainer: nnx.Trainer, record: dict[str, Any]) -> None:
        """Measure."""
        predicted = trainer.predict(self.x).argmax(axis=-1)
        self.values.append((predicted == self.labels).mean(axis=-1))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__, backend=True)
    options.add_argument("--lr", type=float, default=0.5)
    options.add_argument("--epochs", type=int, default=50)
    args = options.parse_args(argv)

    train, _ = nnx.data.load_digits()
    x, labels = train.x[:SAMPLES] / 16, train.t[:SAMPLES]
    one_hot = np.eye(10, dtype=np.float32)[labels]
    lines, final = {}, {}
    for name, loss, target in (
        ("CE", nnx.SoftmaxNLL(n_models=NETWORKS), labels),
        ("MSE", nnx.MeanSquaredError(n_models=NETWORKS), one_hot),
        ("MSES", nnx.SoftmaxMSE(n_models=NETWORKS), labels),
    ):
        model = nnx.mlp([64, 50, 10], seed=args.seed, n_models=NETWORKS)
        trainer = nnx.Trainer(
            model,
            loss,
            nnx.SGD(lr=args.lr),
            seed=args.seed,
            backend=args.backend,
        )
        curve = TrainingAccuracy(x, labels)
        trainer.fit(x, target, epochs=args.epochs, batch_size=SAMPLES, callbacks=[curve])
        final[name] = curve.values[-1]
        lines[name] = (range(1, args.epochs + 1), np.mean(curve.values, axis=1))
        each = " ".join(f"{a:.2f}" for a in final[name])
        print(f"{name:4}  training accuracy {final[name].mean():.2f}  (each network: {each})")
    ordered = (final["CE"] > final["MSE"]) & (final["MSE"] > final["MSES"])
    print(f"CE > MSE > MSES: {ordered.sum()} of {NETWORKS} networks")

    picture(
        nnx.plot.curves,
        lines,
        x_label="Epoch",
        y_label="Training accuracy, mean of 5 networks",
        out=args.out,
        name="loss_comparison.png",
    )


if __name__ == "__main__":
    main()
