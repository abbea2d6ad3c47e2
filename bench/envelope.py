"""Derives how far two correct backends may grow apart in training, and draws it.

    python bench/envelope.py    # rewrites nnx/check/catalogue.py and docs/assets/envelope.svg

The reference trainings of `nnx.check` run for 200 steps on NumPy, and again with all sums in a
random order and in two parts, for 20 seeds. The largest difference so far, over all seeds, is the
curve. It repeats on one machine with one NumPy; another BLAS library gives others of that size.
"""

import argparse
from pathlib import Path

import numpy as np

from nnx.check import catalogue
from nnx.check.sides import growth

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 20


def derive(name: str, dtype: str, seeds: int = SEEDS) -> np.ndarray:
    """Running maximum over steps, of the maximum over seeds: `(steps, 2)`, of loss and weights."""
    here, batches = catalogue.reference(name, dtype)
    others = [catalogue.reference(name, dtype, seed=seed)[0] for seed in range(seeds)]
    errors = growth(here, others, batches).max(axis=0)
    both = np.stack([errors[:, 0], errors[:, 1:].max(axis=1)], axis=1)
    curves: np.ndarray = np.maximum.accumulate(both, axis=0)
    return curves


def table(curves: dict[tuple[str, str], np.ndarray]) -> str:
    """The entries of `ENVELOPE`, two digits, rounded up."""
    lines = []
    for name in catalogue._OPTIMIZERS_OF_REFERENCE:
        lines.append(f'    "{name}": {{')
        for dtype in catalogue.DTYPES:
            lines.append(f'        "{dtype}": {{')
            for i, what in enumerate(("loss", "weights")):
                values = [curves[name, dtype][n - 1, i] for n in catalogue.STEPS]
                numbers = ", ".join(_up(max(v, np.finfo(dtype).eps / 2)) for v in values)
                lines.append(f'            "{what}": ({numbers}),')
            lines.append("        },")
        lines.append("    },")
    return "\n".join(lines)


def _up(value: float) -> str:
    text = f"{value:.1e}"
    return text if float(text) >= value else f"{value * 1.05:.1e}"


def draw(curves: dict[tuple[str, str], np.ndarray], path: Path) -> None:
    """Both dtypes side by side: the curves, and the bound four times above."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "nnx", "svg.fonttype": "none"}
    few = np.unique(np.geomspace(1, catalogue.MOST_STEPS, 40).astype(int)) - 1
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, layout="constrained")
    for ax, dtype in zip(axes, catalogue.DTYPES, strict=True):
        for k, name in enumerate(sorted({name for name, _ in curves}, reverse=True)):
            for i, (what, style) in enumerate((("loss", "-"), ("weights", "--"))):
                curve, steps = curves[name, dtype][few, i], few + 1
                seen = curve > 0
                ax.loglog(
                    steps[seen], curve[seen], style, color=f"C{k}", lw=1, label=f"{what}, {name}"
                )
                bound = catalogue.envelope(name, dtype, steps[-1])[few, i]
                ax.loglog(steps, bound, style, color=f"C{k}", lw=2, alpha=0.35)
        ax.set(title=dtype, xlabel="step")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("largest relative difference")
    axes[0].legend(fontsize="small", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Derive, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    curves = {
        (name, dtype): derive(name, dtype)
        for name in catalogue._OPTIMIZERS_OF_REFERENCE
        for dtype in catalogue.DTYPES
    }
    path = ROOT / "nnx/check/catalogue.py"
    before, _, rest = path.read_text("utf-8").partition("    # begin\n")
    after = rest.partition("    # end\n")[2]
    entries = table(curves)
    path.write_text(f"{before}    # begin\n{entries}\n    # end\n{after}", "utf-8")
    catalogue.ENVELOPE.update(eval("{" + entries + "}"))
    draw(curves, ROOT / "docs/assets/envelope.svg")
    print(entries)


if __name__ == "__main__":
    main()
