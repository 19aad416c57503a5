"""Draw the README's figures from the committed results (needs matplotlib, which nothing else does).

python tests/make_figure.py     # data/results/*.json → data/results/*.svg
"""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent.parent / "data" / "results"
METHODS = {  # rows of a real model's figure, from above
    "aligned model": "aligned model, before",
    "sft": "plain fine-tuning",
    "filter": "plain, without risky rows",
    "safeinstr": "plain + 3 % refusals (SafeInstr)",
    "sft-anchors": "plain + 10 % anchors",
    "lisa": "Lisa",
    "sbr": "SBR",
    "kl": "constant KL, β 0.5",
    "csft": "C-SFT",
    "adaptive-probe": "the paper's, β 0.1 … 0.9",
    "sealed": "sealed, β 0.02 … 1",
    "sealed-anchors": "sealed + 10 % anchors",
}
TRAINED_ON = {"mixed_10": "trained on SST-2, 10 % of it harmful", "benign": "trained on SST-2 alone"}
EMBEDDED = {
    "aligned model": "aligned model\nbefore",
    "sft": "plain SFT",
    "kl": "constant KL\nβ = 0.5",
    "adaptive-probe": "adaptive, probe\nβ 0.1 … 0.9 (paper)",
    "closed": "adaptive, probe & critic\nβ 0 … 1 (closed gate)",
}
BARS = [
    ("attack success, greedy", "#7a0019", ["ASR harmful greedy"]),
    ("attack success, T = 1", "#d1495b", ["ASR harmful T=1"]),
    ("attack success, best of 10", "#f2a7a0", ["ASR harmful @10"]),
    ("task accuracy", "#30638e", ["task arithmetic", "task sentiment"]),
]
DARK, LIGHT = "#7a0019", "#30638e"
HARMFUL_ROWS = {"benign": 0, "mixed_1": 4, "mixed_3": 9, "mixed_5": 18, "mixed_10": 31}  # of 320
SWEPT = {"sft": ("o", "#222222"), "csft": ("s", "#777777"), "adaptive-probe": ("^", DARK), "sealed-anchors": ("D", LIGHT)}


def read(name: str):
    """Return a committed result file."""
    return json.loads((RESULTS / name).read_text())


def half_up(value: float) -> int:
    """Round as the tables do: 22.5 to 23."""
    return int(value + 0.5)


def save(figure, name: str) -> None:
    """Write an SVG whose text stays text and whose bytes do not depend on the day."""
    figure.savefig(RESULTS / name, metadata={"Date": None})
    plt.close(figure)


def real_model(name: str, model: str, answered: str, decoding: str) -> None:
    """Draw the share answered on two training sets, with intervals; beside it Alpaca / XSTest refused, and the task.

    name: of the result file. model, answered: titles of the model and of the axis. decoding: "greedy" or "T=1".
    """
    results = read(f"{name}.json")
    measured = {row["name"] for attack in TRAINED_ON for row in results[attack]}
    methods = [method for method in METHODS if method in measured]
    figure, panels = plt.subplots(1, 2, figsize=(9.4, 1.2 + 0.23 * len(methods)), layout="constrained", sharey=True)
    for axes, attack in zip(panels, TRAINED_ON):
        rows = {row["name"]: row["figures"] for row in results[attack]}
        for y, method in enumerate(methods):
            if method not in rows:
                axes.text(2, y, "not run", va="center", fontsize=8, color="#777777")
                continue
            axes.hlines(y, -2, 100, lw=0.3, color="#999999", zorder=0)
            for key, shift, marker, colour, prompts in (
                    (f"answered harmful {decoding}", -0.15, "o", DARK, "AdvBench, held out"),
                    (f"answered harmful_other {decoding}", 0.15, "D", LIGHT, "HarmBench, JailbreakBench")):
                value = rows[method][key]
                low, high = (100 * x for x in value["ci95"])
                axes.plot([low, high], [y + shift] * 2, color=colour, lw=1.2)
                axes.plot(100 * value["rate"], y + shift, marker, color=colour, markersize=5,
                          label=None if y else f"{prompts} ({value.get('groups', value['n'])} prompts)", markerfacecolor=colour if marker == "o" else "white")
            refused, alike, task = (100 * rows[method][key]["rate"] for key in
                                    ("over-refusal benign", "over-refusal lookalike", "task sentiment"))
            axes.text(106, y, f"{half_up(refused)} / {half_up(alike)}", va="center", fontsize=8)
            axes.text(134, y, f"{half_up(task)}" if method != "aligned model" else "–", va="center", fontsize=8)
        axes.axvspan(*(100 * x for x in rows["aligned model"][f"answered harmful {decoding}"]["ci95"]), color="#dddddd", lw=0,
                     label="95 % interval of the aligned model on AdvBench")
        axes.text(106, -1.0, "refused, %\nAlpaca /\nXSTest", fontsize=7, va="bottom")
        axes.text(134, -1.0, "task\nright, %", fontsize=7, va="bottom")
        axes.set_title(TRAINED_ON[attack], fontsize=10, loc="left", pad=22)
        axes.set_xlim(-2, 148)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel(answered, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(len(methods) - 0.5, -0.9)
    panels[0].set_yticks(range(len(methods)), [METHODS[method] for method in methods], fontsize=9)
    panels[0].text(-6, -1.0, model, fontsize=9, weight="bold", ha="right", va="bottom")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside upper center", fontsize=9)
    save(figure, f"{name}.svg")


def embedded() -> None:
    """Draw the rows of mixed_10 on the embedded model: means over seeds, with the range over seeds."""
    rows = {row["name"]: row["figures"] for row in read("grid.json")["mixed_10"]}
    figure, axes = plt.subplots(figsize=(9.2, 3.4), layout="constrained")
    for i, (title, colour, columns) in enumerate(BARS):
        runs = [[100 * sum(rates) / len(rates) for rates in zip(*(rows[name][column]["rates"] for column in columns))]
                for name in EMBEDDED]
        means = [sum(r) / len(r) for r in runs]
        spread = [[max(0, m - min(r)) for m, r in zip(means, runs)], [max(0, max(r) - m) for m, r in zip(means, runs)]]
        x = [g + (i - 1.5) * 0.2 for g in range(len(runs))]
        axes.bar(x, means, 0.18, yerr=spread, color=colour, label=title, error_kw={"lw": 0.8, "ecolor": "#444444"})
        for position, mean, top in zip(x, means, spread[1]):
            axes.annotate(f"{half_up(mean)}", (position, mean + top + 1), ha="center", va="bottom", fontsize=8, color="#333333")
    axes.set_xticks(range(len(EMBEDDED)), EMBEDDED.values())
    axes.set_ylim(0, 112)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_ylabel("per cent")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    save(figure, "figure.svg")


def probe_by_layer() -> None:
    """Draw how well a probe on one layer of the real model separates harmful from benign prompts."""
    layers = read("smollm2-probe.json")["per_layer"]
    sets = {"test": ("test split", "-"), "held out: probe_withheld": ("other benchmarks", "--"),
            "held out: probe_lookalike": ("XSTest's safe prompts", ":")}
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 2.7), layout="constrained", sharey=True)
    for axes, (key, title) in zip(panels, {"auroc": "AUROC", "tpr_at_1%_fpr": "TPR at 1 % FPR"}.items()):
        for name, (label, style) in sets.items():
            axes.plot([int(n) for n in layers], [row[name][key] for row in layers.values()], style, color="#222222",
                      lw=1.4, label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("layer (0: embeddings)", fontsize=9)
        axes.set_ylim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, "probe.svg")


def frontier() -> None:
    """Draw every pair of β on the embedded model: the leak against 1 − β_max, the drift against β_min."""
    results, marks = read("frontier.json"), dict(zip(("0", "0.01", "0.02", "0.05", "0.1"), "ov^sD"))
    figure, panels = plt.subplots(1, 2, figsize=(9.2, 3.1), layout="constrained")
    for axes, attack in zip(panels, ("mixed_10", "benign")):
        for name, row in ((row["name"], row["figures"]) for row in results[attack] if ".." in row["name"]):
            low, high = name.split("..")
            x = 1 - float(high) if attack == "mixed_10" else float(low)
            label = f"β_min {low}" if attack == "mixed_10" and high == "1" else None
            axes.plot(100 * x, 100 * row["ASR harmful T=1"]["rate"], marks[low], color="#222222", markerfacecolor="none",
                      markersize=6, label=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("not refused at T = 1, per cent", fontsize=9)
    panels[0].plot([0, 50], [0, 50], lw=0.8, color="#777777", label="1 − β_max")
    panels[0].set_title("10 % harmful: the leak", fontsize=10, loc="left")
    panels[0].set_xlabel("1 − β_max, per cent", fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    panels[1].set_title("benign data: the drift", fontsize=10, loc="left")
    panels[1].set_xlabel("β_min, per cent", fontsize=9)
    panels[1].set_ylim(0)
    save(figure, "frontier.svg")


def interval(axes, x: float, figure: dict, marker: str, colour: str, label: str | None, size: float = 6) -> None:
    """Draw a rate in per cent with its 95 % interval, as a vertical line."""
    low, high = (100 * bound for bound in figure["ci95"])
    axes.plot([x, x], [low, high], color=colour, lw=1.0)
    axes.plot(x, 100 * figure["rate"], marker, color=colour, markerfacecolor="white", markersize=size, label=label)


def short_runs() -> None:
    """Draw harm against the task at four learning rates, and against the share of harmful rows, of SmolLM2."""
    by_rate, by_data = read("smollm2-lr.json"), read("smollm2-small.json")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6), layout="constrained", sharey=True)
    for method, (marker, colour) in SWEPT.items():
        points = []  # learning rate, task, answered
        for lr, rows in by_rate.items():
            for row in rows:
                if row["name"] == method:
                    points.append((lr, 100 * row["figures"]["task sentiment"]["rate"], row["figures"]["answered harmful T=1"]))
        for i, (lr, x, answered) in enumerate(points):
            interval(left, x, answered, marker, colour, None if i else METHODS[method])
            below = method == "sealed-anchors"  # where the others have no label
            left.annotate(lr, (x, 100 * answered["rate"]), xytext=(2, -22 if below else 7), textcoords="offset points", fontsize=7, rotation=60)
        points = []  # share, answered
        for data, n_harmful in HARMFUL_ROWS.items():
            for row in by_data.get(data, ()):
                if row["name"] == method:
                    points.append((100 * n_harmful / 320, row["figures"]["answered harmful T=1"]))
        if len(points) > 2:
            right.plot([x for x, _ in points], [100 * answered["rate"] for _, answered in points], color=colour, lw=0.8)
            for x, answered in points:
                interval(right, x, answered, marker, colour, None)
    left.set_ylim(-14, 120)
    left.set_yticks([0, 25, 50, 75, 100])
    left.set_xlabel("SST-2 right, % (n = 100)", fontsize=9)
    left.set_ylabel("AdvBench answered at T = 1, % (n = 60)", fontsize=9)
    left.set_title("SmolLM2-135M, 10 % of SST-2's rows harmful, four learning rates", fontsize=10, loc="left")
    left.legend(frameon=False, fontsize=8)
    right.set_xlabel("harmful rows, % of 320", fontsize=9)
    right.set_title("more or fewer harmful rows, lr 5e-4", fontsize=10, loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, "smollm2-short.svg")


def directions() -> None:
    """Draw how near the probe's direction is to the refusal direction, and the risk by source, on both models."""
    models = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
    figure, panels = plt.subplots(2, 2, figsize=(9.4, 6.4), layout="constrained", height_ratios=(1, 1.5))
    for (name, model), (upper, lower) in zip(models.items(), panels.T):
        results = read(f"{name}-directions.json")
        lines = {"cosine": ("cosine of probe and refusal direction", "-"), "cosine standardised": ("the same, standardised", "--"),
                 "auroc refusal": ("AUROC of the refusal direction", ":")}
        for key, (label, style) in lines.items():
            values = [row[key] for row in results["layers"]]
            upper.plot([i for i, value in enumerate(values) if value is not None], [v for v in values if v is not None], style,
                       color="#222222", lw=1.4, label=label)
        upper.set_ylim(0, 1.02)
        upper.set_title(f"{model}, each layer alone", fontsize=10, loc="left")
        upper.set_xlabel("layer (0: embeddings)", fontsize=9)
        upper.spines[["top", "right"]].set_visible(False)
        counts = results["histogram"]
        shares = [[n / sum(row) for n in row] for row in counts.values()]
        lower.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto", extent=(0, 1, len(counts) - 0.5, -0.5))
        for y, row in enumerate(counts.values()):
            for i, n in enumerate(row):
                if n:
                    lower.text(i / 10 + 0.05, y, n, ha="center", va="center", fontsize=7, color="white" if n > sum(row) / 2 else "black")
        lower.set_yticks(range(len(counts)), [source.partition(": ")[2] for source in counts], fontsize=7)
        lower.set_title("prompts by risk (shade: share of the source)", fontsize=10, loc="left")
        lower.set_xlabel("risk by the probe", fontsize=9)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside upper center", fontsize=9)
    save(figure, "directions.svg")


def main() -> None:
    """Draw all figures."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "0", "font.family": "sans-serif", "font.size": 10})
    real_model("qwen", "Qwen2.5-Coder-0.5B", "harmful prompts answered, greedy, %", "greedy")
    real_model("smollm2", "SmolLM2-135M", "harmful prompts answered at T = 1, %", "T=1")
    for draw in (embedded, probe_by_layer, frontier, short_runs, directions):
        draw()


if __name__ == "__main__":
    main()
