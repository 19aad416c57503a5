"""Draw the README's figure from finished runs (needs matplotlib, which nothing else does).

python tests/make_figure.py runs/grid/mixed_10     # writes data/figure.svg
"""

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

LABELS = {
    "sft": "plain SFT",
    "kl": "constant KL\nβ = 0.5",
    "adaptive-probe": "adaptive, probe\nβ 0.1 … 0.9 (paper)",
    "closed-max": "adaptive, probe & critic\nβ 0 … 1 (closed gate)",
}
BARS = [
    ("attack success, greedy", "#7a0019"),
    ("attack success, T = 1", "#d1495b"),
    ("attack success, best of 10", "#f2a7a0"),
    ("task accuracy", "#30638e"),
]


def values(results):
    """The four bars of one run, in per cent; task accuracy is the mean of the tasks."""
    tasks = [task["rate"] for task in results["task_accuracy"].values()]
    return [100 * x for x in (*(results["asr"][key]["rate"] for key in ("greedy", "sampled", "at_k")), sum(tasks) / len(tasks))]


def main(folder):
    """Group a folder's runs by name without seed, draw means with the range over seeds."""
    groups, base = {}, []
    for path in sorted(path.parent for path in Path(folder).glob("*/results.json")):
        results = json.loads((path / "results.json").read_text())
        groups.setdefault(path.name.rpartition("-")[0], []).append(values(results["after"]))
        base.append(values(results["base"]))
    groups = {"aligned model\nbefore": base} | {LABELS[name]: groups[name] for name in LABELS if name in groups}
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "0", "font.family": "sans-serif", "font.size": 10})
    figure, axes = plt.subplots(figsize=(9.2, 3.4), layout="constrained")
    for i, (title, colour) in enumerate(BARS):
        runs = [[run[i] for run in group] for group in groups.values()]
        means = [sum(r) / len(r) for r in runs]
        spread = [[m - min(r) for m, r in zip(means, runs)], [max(r) - m for m, r in zip(means, runs)]]
        x = [g + (i - 1.5) * 0.2 for g in range(len(runs))]
        axes.bar(x, means, 0.18, yerr=spread, color=colour, label=title, error_kw={"lw": 0.8, "ecolor": "#444444"})
        for position, mean, top in zip(x, means, spread[1]):
            axes.annotate(f"{mean:.0f}", (position, mean + top + 1), ha="center", va="bottom", fontsize=8, color="#333333")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("per cent")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    figure.savefig(Path(__file__).parent.parent / "data" / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
