"""Precision and recall of "is this digit an 8?" as the threshold of the decision moves.

The network gives a probability p, and the answer is yes where p > threshold; p equal to the
threshold is a no. Of the yes answers the precision is the share that is right, and the recall is
the share of the eights that was found. A higher threshold says yes to fewer images: the recall
falls, never rises. The precision rises mostly but not always, which texts that speak of a trade-off
leave out: a step may take away a right yes. The usual 0.5 is a choice; make it on validation data.
"""

from collections.abc import Sequence

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot
from nnx.metrics import precision, recall

DIGIT = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__, backend=True)
    options.add_argument("--epochs", type=int, default=5)
    args = options.parse_args(argv)

    train, test = nnx.data.load_digits(test_fraction=0.5)
    scale = nnx.data.Standardizer.fit(train.x)
    model = nnx.mlp([64, 2], seed=args.seed)
    trainer = nnx.Trainer(
        model, nnx.SoftmaxNLL(), nnx.SGD(lr=0.05), seed=args.seed, backend=args.backend
    )
    trainer.fit(scale.transform(train.x), train.t == DIGIT, epochs=args.epochs)
    p = nnx.Softmax()(trainer.predict(scale.transform(test.x)))[:, 1]
    truth = test.t == DIGIT

    print(f"images: {len(p)}, of them an {DIGIT}: {truth.sum()}")
    print("threshold  precision  recall")
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        print(
            f"{threshold:9.1f}  {precision(p, truth, threshold):9.3f}  "
            f"{recall(p, truth, threshold):6.3f}"
        )
    thresholds = np.unique(p[p > 0])[:-1]  # above the largest p there is no yes
    precisions = [precision(p, truth, float(t)) for t in thresholds]
    recalls = [recall(p, truth, float(t)) for t in thresholds]
    falls, rises = (np.diff(precisions) < 0).sum(), (np.diff(recalls) > 0).sum()
    print(
        f"over all {len(thresholds)} thresholds, steps up in which the precision falls: {falls}, "
        f"in which the recall rises: {rises}"
    )
    picture(
        nnx.plot.curves,
        {"precision": (thresholds, precisions), "recall": (thresholds, recalls)},
        x_label="Threshold",
        y_label=f"Precision and recall of the {DIGIT}s",
        out=args.out,
        name="thresholds.png",
    )


if __name__ == "__main__":
    main()
