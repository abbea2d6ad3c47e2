"""What a network scores before training: 784-50-10 on 1000 inputs with random labels.

A guess among ten classes is right one time in ten and costs ln 10 = 2.303 nats; random weights cost
somewhat more, since they are sure of wrong answers. A loss near this says that all is well at the
start. The loss is the mean over samples: a text that reports 2592.46 printed the sum of 1000.
"""

import math
from collections.abc import Sequence

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot

SAMPLES, CLASSES = 1000, 10


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = parser(__doc__, backend=True).parse_args(argv)

    rng = np.random.default_rng(args.seed)
    x = rng.standard_normal((SAMPLES, 784), np.float32)  # as standardized images are
    labels = rng.integers(0, CLASSES, SAMPLES)
    model = nnx.mlp([784, 50, CLASSES], seed=args.seed)
    trainer = nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(), backend=args.backend)
    scores = trainer.evaluate(x, labels)

    print(f"parameters: {sum(p.value.size for _, p in model.parameters())}")
    print(f"accuracy:   {scores['accuracy']:.3f} (a guess: {1 / CLASSES:.3f})")
    print(f"mean loss:  {scores['loss']:.3f} (a guess: ln {CLASSES} = {math.log(CLASSES):.3f})")
    print(f"summed loss: {SAMPLES * scores['loss']:.1f}")

    predicted = trainer.predict(x).argmax(axis=1)
    counts = nnx.metrics.confusion_matrix(predicted, labels, CLASSES)
    picture(nnx.plot.confusion_matrix, counts, out=args.out, name="untrained_baseline.png")


if __name__ == "__main__":
    main()
