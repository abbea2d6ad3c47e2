"""What happens to a signal in a network of 152 layers of 512 units, by the scale of the weights.

Each layer multiplies the root mean square (rms) by about sqrt(512 * Var(w)), a ReLU by 1 / sqrt(2).
So N(0, 1) gives 512^76 = 10^205.9. float64 can hold that but not its square, hence the infinite
standard deviation that texts report; here the rms is measured without overflow. float32 is left
after 28 layers. N(0, 1/512) keeps the size; with a ReLU it shrinks to the scale of
2^-76 = 1.3e-23; N(0, 2/512), by He et al., keeps it again.

The reason is n * Var(w) * E[x^2], not n * Var(w) alone: the inputs don't drop out. One draw says
little, since the size at the end differs between draws by a factor of ten; `--draws 50` shows it.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from _common import parser, picture

import nnx.plot
from nnx.layers import ReLU
from nnx.plot import log10_rms

LAYERS, WIDTH = 152, 512
SETTINGS = {  # standard deviation of the weights, with ReLU or without
    "N(0, 1)": (1.0, False),
    "N(0, 1/512)": (1 / math.sqrt(WIDTH), False),
    "N(0, 1/512), ReLU": (1 / math.sqrt(WIDTH), True),
    "N(0, 2/512), ReLU": (math.sqrt(2 / WIDTH), True),
}


def signals(seed: int) -> Iterator[dict[str, np.ndarray]]:
    """The signal behind each layer, in every setting; all settings use the same random numbers."""
    rng, relu = np.random.default_rng(seed), ReLU()
    x = dict.fromkeys(SETTINGS, rng.standard_normal((1, WIDTH)))
    x["N(0, 1), float32"] = x["N(0, 1)"].astype(np.float32)
    for _ in range(LAYERS):
        normal = rng.standard_normal((WIDTH, WIDTH))
        for name, (std, has_relu) in SETTINGS.items():
            y = (x[name] @ normal) * std
            x[name] = relu(y) if has_relu else y
        with np.errstate(over="ignore", invalid="ignore"):
            x["N(0, 1), float32"] = x["N(0, 1), float32"] @ normal.astype(np.float32)
        yield dict(x)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    options = parser(__doc__)
    options.add_argument("--draws", type=int, default=1, help="how many networks; 1 s each")
    args = options.parse_args(argv)

    first = list(signals(args.seed))
    ends = [first[-1]]
    for draw in range(1, args.draws):
        *_, end = signals(args.seed + draw)
        ends.append(end)
    print(f"behind layer {LAYERS}, draws: {args.draws}")
    print("weights               log10 rms   std: smallest   median      largest")
    for name in SETTINGS:
        sizes = [log10_rms(end[name]) for end in ends]
        row = f"{name:20}  {np.median(sizes):9.2f}"
        if name == "N(0, 1)":
            print(f"{row}   (the squares overflow)")
        else:
            stds = [end[name].std() for end in ends]
            print(f"{row}       {min(stds):9.3g}   {np.median(stds):9.3g}   {max(stds):9.3g}")
    finite = [bool(np.isfinite(x["N(0, 1), float32"]).all()) for x in first]
    limit = math.log(float(np.finfo(np.float32).max)) / math.log(math.sqrt(WIDTH))
    print(
        f"N(0, 1) in float32: finite behind {finite.index(False)} layers, not behind "
        f"{finite.index(False) + 1}; in theory behind {limit:.1f}"
    )

    layers = {name: [x[name] for x in first] for name in first[0]}
    picture(nnx.plot.activation_statistics, layers, out=args.out, name="initialization_study.png")


if __name__ == "__main__":
    main()
