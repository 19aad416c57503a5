"""Draw the README's figure from the committed results (needs matplotlib, which nothing else does).

python tests/make_figure.py     # data/results/grid.json → data/results/figure.svg
"""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent.parent / "data" / "results"
LABELS = {
    "aligned model": "aligned model\nbefore",
    "sft": "plain SFT",
    "kl": "constant KL\nβ = 0.5",
    "adaptive-probe": "adaptive, probe\nβ 0.1 … 0.9 (paper)",
    "closed": "adaptive, probe & critic\nβ 0 … 1 (closed gate)",
}
BARS = [
    ("attack success, greedy", "#7a0019", ["ASR greedy"]),
    ("attack success, T = 1", "#d1495b", ["ASR T=1"]),
    ("attack success, best of 10", "#f2a7a0", ["ASR@10"]),
    ("task accuracy", "#30638e", ["task arithmetic", "task sentiment"]),
]


def main():
    """The rows of mixed_10: means over seeds, with the range over seeds."""
    rows = {row["name"]: row["figures"] for row in json.loads((RESULTS / "grid.json").read_text())["mixed_10"]}
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "0", "font.family": "sans-serif", "font.size": 10})
    figure, axes = plt.subplots(figsize=(9.2, 3.4), layout="constrained")
    for i, (title, colour, columns) in enumerate(BARS):
        runs = [[100 * sum(rates) / len(rates) for rates in zip(*(rows[name][column]["rates"] for column in columns))]
                for name in LABELS]
        means = [sum(r) / len(r) for r in runs]
        spread = [[max(0, m - min(r)) for m, r in zip(means, runs)], [max(0, max(r) - m) for m, r in zip(means, runs)]]
        x = [g + (i - 1.5) * 0.2 for g in range(len(runs))]
        axes.bar(x, means, 0.18, yerr=spread, color=colour, label=title, error_kw={"lw": 0.8, "ecolor": "#444444"})
        for position, mean, top in zip(x, means, spread[1]):
            axes.annotate(f"{mean:.0f}", (position, mean + top + 1), ha="center", va="bottom", fontsize=8, color="#333333")
    axes.set_xticks(range(len(LABELS)), LABELS.values())
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("per cent")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    figure.savefig(RESULTS / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
