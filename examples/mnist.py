"""One network, 784-128-10, trained by nnx and by the other libraries that are installed here.

A table with test accuracy and seconds per epoch, which a text on networks from scratch promises
and doesn't give. All train with SGD on the same images in batches of 128, from the same initial
weights where the library takes any (scikit-learn draws its own), shuffled each in its own way.
Seconds are the median over the epochs, on this machine as busy as it is.

MNIST is read from the folder that the environment variable NNX_DATA names, or downloaded (with
the extra `data`). `--data digits` takes the bundled 8 x 8 digits instead.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from _common import parser, picture

import nnx
import nnx.plot

LR, BATCH, HIDDEN = 0.1, 128, 128
Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x, t, x_test, t_test
Training = tuple[Callable[[], Any], Callable[[], np.ndarray]]  # one epoch; classes of x_test


def with_nnx(model: nnx.Sequential, data: Data, args: argparse.Namespace) -> Training:
    """This library."""
    x, t, x_test, _ = data
    trainer = nnx.Trainer(
        model, nnx.SoftmaxNLL(), nnx.SGD(lr=LR), seed=args.seed, backend=args.backend
    )
    return (
        lambda: trainer.fit(x, t, batch_size=BATCH),
        lambda: trainer.predict(x_test).argmax(axis=1),
    )


def with_torch(model: nnx.Sequential, data: Data, args: argparse.Namespace) -> Training:
    """PyTorch on the CPU."""
    import torch

    torch.manual_seed(args.seed)
    x, t, x_test, _ = map(torch.from_numpy, data)
    first, last = model.state()["0.weight"], model.state()["2.weight"]
    net = torch.nn.Sequential(
        torch.nn.Linear(*first.shape), torch.nn.ReLU(), torch.nn.Linear(*last.shape)
    )
    with torch.no_grad():
        for layer, weight in ((net[0], first), (net[2], last)):
            layer.weight.copy_(torch.from_numpy(weight.T.copy()))
            layer.bias.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)

    def epoch() -> None:
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), t[batch]).backward()
            optimizer.step()

    return epoch, lambda: net(x_test).argmax(dim=1).numpy()


def with_sklearn(model: nnx.Sequential, data: Data, args: argparse.Namespace) -> Training:
    """scikit-learn, from initial weights of its own."""
    from sklearn.neural_network import MLPClassifier

    x, t, x_test, _ = data
    net = MLPClassifier(
        HIDDEN, solver="sgd", learning_rate_init=LR, momentum=0, alpha=0,
        batch_size=min(BATCH, len(x)), random_state=args.seed,
    )  # fmt: skip
    return lambda: net.partial_fit(x, t, classes=np.arange(10)), lambda: net.predict(x_test)


def with_tensorflow(model: nnx.Sequential, data: Data, args: argparse.Namespace) -> Training:
    """TensorFlow's Keras on the CPU."""
    import tensorflow as tf

    tf.keras.utils.set_random_seed(args.seed)
    x, t, x_test, _ = data
    net = tf.keras.Sequential(
        [
            tf.keras.Input(x.shape[1:]),
            tf.keras.layers.Dense(HIDDEN, activation="relu"),
            tf.keras.layers.Dense(10),
        ]
    )
    net.set_weights(list(model.state().values()))
    net.compile(
        tf.keras.optimizers.SGD(LR),
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return (
        lambda: net.fit(x, t, batch_size=BATCH, verbose=0),
        lambda: net.predict(x_test, batch_size=512, verbose=0).argmax(axis=1),
    )


LIBRARIES: dict[str, tuple[str, Callable[..., Training]]] = {
    "nnx": ("nnx", with_nnx),
    "PyTorch": ("torch", with_torch),
    "scikit-learn": ("sklearn", with_sklearn),
    "TensorFlow": ("tensorflow", with_tensorflow),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__, backend=True)
    options.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--limit", type=int, help="train on this many images only")
    options.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    args = options.parse_args(argv)

    train, test = nnx.data.load(args.data)
    scale = nnx.data.Standardizer.fit(train.x, per_feature=False)
    data = (
        scale.transform(train.x)[: args.limit],
        train.t[: args.limit],
        scale.transform(test.x),
        test.t,
    )
    sizes = [train.x.shape[1], HIDDEN, 10]
    print(f"{args.data}: {len(data[0])} images, {'-'.join(map(str, sizes))}, {args.epochs} epochs")
    print("library       test accuracy  seconds per epoch")
    lines, final = {}, {}
    for name in args.libraries:
        module, prepare = LIBRARIES[name]
        if importlib.util.find_spec(module) is None:
            print(f"{name:12}  not installed")
            continue
        model = nnx.mlp(sizes, seed=args.seed)
        epoch, predict = prepare(model, data, args)
        accuracies, seconds = [], []
        for _ in range(args.epochs):
            start = time.perf_counter()
            epoch()
            seconds.append(time.perf_counter() - start)
            predicted = predict()
            accuracies.append(float((predicted == test.t).mean()))
        final[name] = predicted
        lines[name] = (range(1, args.epochs + 1), accuracies)
        print(f"{name:12}  {accuracies[-1]:13.4f}  {np.median(seconds):17.2f}")

    picture(
        nnx.plot.curves,
        lines,
        x_label="Epoch",
        y_label="Test accuracy",
        out=args.out,
        name="mnist_accuracy.png",
    )
    predicted = next(iter(final.values()))
    counts = nnx.metrics.confusion_matrix(predicted, test.t, 10)
    picture(nnx.plot.confusion_matrix, counts, out=args.out, name="mnist_confusion.png")
    picture(
        nnx.plot.misclassified_images,
        test.x,
        test.t,
        predicted,
        out=args.out,
        name="mnist_misclassified.png",
    )


if __name__ == "__main__":
    main()
