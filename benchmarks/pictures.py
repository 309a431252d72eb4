"""Draw the pictures of the documents into docs/img.

python -m benchmarks.pictures                  from benchmarks/results: loss against bytes, forgetting
python -m benchmarks.pictures --run runs/demo  and those of a run, after `mixkabrn report functions` and `… experts`
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.forgetting_results import draw_forgetting, read_ways
from benchmarks.quality_recipes import MODELS
from benchmarks.results import ModelQuality, Results
from benchmarks.tables import ROOT
from kabrn_dist.plots.figure import COLORS, make_figure, to_png

IMAGES = ROOT / "docs" / "img"
# By name in docs/img: the report's picture.
OF_RUN = {"functions.png": "functions_layer_3_routed.png", "experts.png": "load_layer_3.png"}
PALETTE = 64
# The height of a label.
LABEL_NATS = 0.003
DENSE, OURS = COLORS[0], COLORS[1]


def spread_labels(heights: list[float], gap: float) -> list[float]:
    """Return heights near the given ones, in the same order and at least `gap` apart."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    spread = list(heights)
    for below, above in itertools.pairwise(order):
        spread[above] = max(spread[above], spread[below] + gap)
    return spread


def draw_quality(models: list[ModelQuality]) -> Figure:
    """Draw validation loss against the bytes of the weights, a point a model."""
    figure = make_figure(8.0, 3.6)
    axes = figure.add_subplot()
    for one in models:
        axes.plot(one.megabytes, one.nats, "o", color=DENSE if MODELS[one.model].model is None else OURS, markersize=8)
    for left in (False, True):
        # Labels of points on the right half would leave the picture.
        side = [one for one in models if (one.megabytes > 1) == left]
        for one, height in zip(side, spread_labels([one.nats for one in side], LABEL_NATS), strict=True):
            axes.annotate(
                f"({one.model}) {MODELS[one.model].what}",
                (one.megabytes + (-0.03 if left else 0.03), height),
                ha="right" if left else "left",
                va="center",
                fontsize=8,
            )
    axes.set_xlim(0, 1.1 * max(one.megabytes for one in models))
    axes.margins(y=0.15)
    axes.set_xlabel("MB of weights: 2 bits a ternary weight, 2 bytes any other")
    axes.set_ylabel("nats a character")
    axes.set_title("Validation loss against bytes, equal active parameters", fontsize=10)
    axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="RUN", help="a trained run with its reports")
    options = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    results = ROOT / "benchmarks" / "results"
    (IMAGES / "quality.png").write_bytes(to_png(draw_quality(list(Results(results).quality.values()))))
    (IMAGES / "forgetting.png").write_bytes(to_png(draw_forgetting(read_ways(results))))
    for name, source in OF_RUN.items() if options.run else ():
        # A palette is enough for lines, and a third of the bytes.
        picture = Image.open(options.run / "report" / source).convert("RGB").quantize(PALETTE)
        picture.save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
