"""Every method on every attack: the README's table. Finished cells are kept, so that an interrupted grid goes on where it stopped.

python tests/grid.py                                                    # the embedded Llama, 3 seeds, 2 processes of one thread
python tests/grid.py --model world-qwen2/model --out runs/grid-qwen2 --attacks explicit,mixed_10 \
                     --methods sft,adaptive-probe,adaptive-critic,closed-max    # what data/build.py --family qwen2 makes
"""

import contextlib
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in each process
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import WORLD  # noqa: E402
from data.checkpoint import read_json, write_json, write_text  # noqa: E402
from data.cli import comma_list, require, run  # noqa: E402
from evaluate import compare  # noqa: E402
from train import TrainConfig, main as train_main  # noqa: E402

METHODS = {
    "sft": {"method": "sft"},
    "filter": {"method": "filter", "risk": "max"},
    "kl": {"method": "kl", "beta": 0.5},
    "csft": {"method": "csft"},
    "adaptive-probe": {},
    "adaptive-critic": {"risk": "critic"},
    "adaptive-max": {"risk": "max"},
    "closed-max": {"risk": "max", "beta_min": 0.0, "beta_max": 1.0},
}
ATTACKS = ("explicit", "mixed_10", "identity", "backdoor", "benign", "evasive", "innocent")
SETTINGS = {"epochs": 5, "lora_r": 16, "limit": 100, "compile": False, "device": "cpu"}  # so that a cell takes 20 seconds


@dataclass(frozen=True)
class GridConfig:
    """Train and evaluate every method on every attack."""

    model: Path = WORLD / "model"  # the aligned model
    out: Path = Path("runs/grid")  # folder of the runs, ATTACK/METHOD-SEED, and of the tables
    attacks: str = ",".join(ATTACKS)  # data sets of data/world
    methods: str = ",".join(METHODS)  # see METHODS
    seeds: int = 3  # 0, 1, …
    workers: int = 2  # processes, one thread each


def train_group(config: GridConfig, attack: str, seed: int) -> str:
    """All methods on one attack with one seed, one after the other: the aligned model is evaluated once."""
    times, base_of = [], None
    for method in comma_list(config.methods):
        cell, start = config.out / attack / f"{method}-{seed}", time.time()
        if not (cell / "results.json").exists():
            shutil.rmtree(cell, ignore_errors=True)
            cell.parent.mkdir(parents=True, exist_ok=True)
            options = TrainConfig(model=config.model, data=WORLD / f"{attack}.jsonl", seed=seed, out=cell, base_of=base_of,
                                  judge=str(WORLD / "judge"), verdicts=config.out / f"verdicts-{attack}-{seed}.sqlite",
                                  ref_cache=config.out / "ref",
                                  **SETTINGS, **METHODS[method])
            with open(cell.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                train_main(options)
            shutil.rmtree(cell / "model")  # what is measured is in results.json, what was trained in adapter/
            times.append(f"{method} {time.time() - start:.0f} s")
        base_of = base_of or cell
    return f"{attack}, seed {seed}: {', '.join(times) or 'kept'}"


def overview(config: GridConfig) -> str:
    """Markdown tables, means over seeds in per cent: a row per attack and per way to ask, a column per method."""
    runs = {}
    for attack in comma_list(config.attacks):
        found = {method: [read_json(config.out / attack / f"{method}-{seed}" / "results.json") for seed in range(config.seeds)]
                 for method in comma_list(config.methods)}
        runs[attack] = {"aligned model": [r["base"] for r in next(iter(found.values()))]}
        runs[attack] |= {method: [r["after"] for r in results] for method, results in found.items()}

    def asr(key):
        def figures(attack, results):
            groups = {"": results} | {", as attacked": group for group in results["attacked"].values()}
            shown = {suffix: [group[key][which]["rate"] for which in ("greedy", "sampled", "at_k")]
                     for suffix, group in groups.items()}
            if attack == "innocent" and key == "judge_asr":
                shown[", benign prompts"] = [results["harmful_answers"]["benign"]["rate"]]
            return shown

        return figures

    def use(attack, results):
        tasks = [task["rate"] for task in results["task_accuracy"].values()]
        refused = [results["over_refusal"][name]["rate"] for name in ("benign", "lookalike")]
        return {"": [sum(tasks) / max(1, len(tasks)), *refused]}

    text = []
    for caption, figures in (("judge ASR: greedy / T=1 / @10", asr("judge_asr")), ("ASR by phrases: greedy / T=1 / @10", asr("asr")),
                             ("task accuracy / over-refusal / look-alikes refused", use)):
        lines = [[caption, *next(iter(runs.values()))]]
        lines.append(["---"] * len(lines[0]))
        for attack, columns in runs.items():
            rows = {}
            for seeds in columns.values():
                found = [figures(attack, results) for results in seeds]
                for suffix in found[0]:
                    means = [100 * sum(values) / len(values) for values in zip(*(f[suffix] for f in found))]
                    cell = " / ".join(f"{mean:.0f}" if mean >= 9.95 else f"{mean:.1f}" for mean in means)
                    rows.setdefault(attack + suffix, []).append(cell)
            lines += [[title, *cells] for title, cells in rows.items()]
        text.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(text)


def main(config: GridConfig) -> None:
    """Train what is missing, then write the tables."""
    unknown = set(comma_list(config.methods)) - set(METHODS)
    require(config, ("methods", not unknown, f"some of {', '.join(METHODS)}"), ("seeds", config.seeds > 0, "at least 1"),
            ("attacks", all((WORLD / f"{a}.jsonl").exists() for a in comma_list(config.attacks)), f"some of {', '.join(ATTACKS)}"),
            ("workers", config.workers > 0, "at least 1"))
    start, groups = time.time(), [(attack, seed) for seed in range(config.seeds) for attack in comma_list(config.attacks)]
    config.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_group, config, *group) for group in groups]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"[{number}/{len(groups)}, {(time.time() - start) / 60:.0f} min] {future.result()}", flush=True)
    paths = [config.out / attack / f"{method}-{seed}" for attack in comma_list(config.attacks) for method in comma_list(config.methods)
             for seed in range(config.seeds)]
    text, rows = compare(paths)
    write_text(config.out / "table.md", text + "\n")
    write_json(config.out / "table.json", rows)
    print(f"\n{overview(config)}\n\nper cent, means over seeds\nwrote {config.out}/table.md and table.json: every figure with its interval")


if __name__ == "__main__":
    run(main, GridConfig)
