"""Can the network learn at all? 100 digits, 30 epochs of the full batch, until all are right.

The accuracy is that on the training images, on purpose: a network that can't learn 100 images by
heart has a bug. A text does this with a learning rate of 0.01, which works there only because its
gradient is the sum over the 100 images. Here loss and gradient are means, so the learning rate
doesn't depend on the batch, and the same step is 0.01 * 100 = 1.0.
"""

from collections.abc import Sequence

from _common import parser, picture

import nnx
import nnx.plot

SAMPLES, EPOCHS = 100, 30


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = parser(__doc__, backend=True).parse_args(argv)

    train, _ = nnx.data.load_digits()
    x, labels = train.x[:SAMPLES], train.t[:SAMPLES]
    x = nnx.data.Standardizer.fit(x).transform(x)
    histories = {}
    for lr in (0.01, 1.0):
        model = nnx.mlp([64, 50, 10], seed=args.seed)
        trainer = nnx.Trainer(
            model, nnx.SoftmaxNLL(), nnx.SGD(lr=lr), seed=args.seed, backend=args.backend
        )
        history = histories[f"learning rate {lr:g}"] = trainer.fit(
            x, labels, epochs=EPOCHS, batch_size=SAMPLES
        )
        scores = trainer.evaluate(x, labels)
        print(
            f"lr {lr:4}: loss {history['loss'][0]:.3f} -> {scores['loss']:.4f}, "
            f"training accuracy {scores['accuracy']:.2f}"
        )

    lines = {name: (h["epoch"], h["accuracy"]) for name, h in histories.items()}
    picture(
        nnx.plot.curves,
        lines,
        x_label="Epoch",
        y_label="Training accuracy",
        out=args.out,
        name="overfit_small.png",
    )
    fast = histories["learning rate 1"]
    picture(nnx.plot.learning_curves, fast, out=args.out, name="overfit_small_curves.png")


if __name__ == "__main__":
    main()
