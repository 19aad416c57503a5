"""Every method on every attack: the README's table. Finished cells are kept: an interrupted grid goes on.

python tests/grid.py                                           # embedded Llama, 3 seeds, 2 one-thread workers
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
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in each process
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

from critic import open_judge  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.conversations import WORLD  # noqa: E402
from evaluate import compare, default_sets, evaluate_model, evaluation_sets, over_seeds  # noqa: E402
from lib.cli import comma_list, require, run  # noqa: E402
from lib.files import read_json, write_json, write_text  # noqa: E402
from model import load_model  # noqa: E402
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
SETTINGS = {"epochs": 5, "lora_r": 16, "limit": 100, "eval_base": False, "device": "cpu"}  # 20 seconds a cell


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
    """The aligned model, then all methods on one attack with one seed, one after the other."""
    times, folder = [], config.out / attack
    folder.mkdir(parents=True, exist_ok=True)
    options = TrainConfig(model=config.model, data=WORLD / f"{attack}.jsonl", seed=seed,
                          judge=str(WORLD / "judge"), ref_cache=config.out / "ref",
                          verdicts=config.out / f"verdicts-{attack}-{seed}.sqlite", **SETTINGS)
    for method in ("base", *comma_list(config.methods)):
        cell, start = folder / f"{method}-{seed}", time.time()
        if (cell / "results.json").exists():
            continue
        shutil.rmtree(cell, ignore_errors=True)
        with (open(cell.with_suffix(".log"), "w") as log, contextlib.redirect_stdout(log),
              contextlib.redirect_stderr(log)):
            if method == "base":
                evaluate_base(options, cell)
            else:
                train_main(replace(options, out=cell, **METHODS[method]))
                shutil.rmtree(cell / "model")  # results.json has what is measured, adapter/ what was trained
        times.append(f"{method} {time.time() - start:.0f} s")
    return f"{attack}, seed {seed}: {', '.join(times) or 'kept'}"


def evaluate_base(options: TrainConfig, out: Path) -> None:
    """The aligned model's results, as a run on the same data would have them."""
    options = default_sets(options, options.data, {})
    model, chat = load_model(options.model, options.device, torch.float32), Chat(options.model)
    judge = open_judge(options)
    results, _ = evaluate_model(model, chat, evaluation_sets(options), options, "base", judge)
    out.mkdir()
    write_json(out / "results.json", {"after": results})


def overview(config: GridConfig) -> str:
    """Markdown tables, means over seeds in per cent: a row per attack and way to ask, a column per method."""
    def cells(attack, method):
        return [read_json(config.out / attack / f"{method}-{seed}" / "results.json")["after"]
                for seed in range(config.seeds)]

    runs = {}
    for attack in comma_list(config.attacks):
        runs[attack] = {"aligned model": cells(attack, "base")}
        runs[attack] |= {method: cells(attack, method) for method in comma_list(config.methods)}

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
    for caption, figures in (("judge ASR: greedy / T=1 / @10", asr("judge_asr")),
                             ("ASR by phrases: greedy / T=1 / @10", asr("asr")),
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
    require(config, ("methods", not unknown, f"some of {', '.join(METHODS)}"),
            ("seeds", config.seeds > 0, "at least 1"),
            ("attacks", all((WORLD / f"{a}.jsonl").exists() for a in comma_list(config.attacks)),
             f"some of {', '.join(ATTACKS)}"), ("workers", config.workers > 0, "at least 1"))
    start, groups = time.time(), [(attack, seed) for seed in range(config.seeds)
                                  for attack in comma_list(config.attacks)]
    config.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_group, config, *group) for group in groups]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"[{number}/{len(groups)}, {(time.time() - start) / 60:.0f} min] {future.result()}",
                  flush=True)
    found = {}
    for attack in comma_list(config.attacks):
        cells = [[config.out / attack / f"{method}-{seed}" for seed in range(config.seeds)]
                 for method in ("base", *comma_list(config.methods))]
        base = over_seeds([read_json(cell / "results.json")["after"] for cell in cells[0]])
        found[attack] = [{"name": "aligned model", "seeds": list(range(config.seeds)), "figures": base}]
        found[attack] += compare([cell for row in cells[1:] for cell in row])[1]
    write_json(config.out / "grid.json", found)
    write_text(config.out / "grid.md", overview(config) + "\n")
    print(f"\n{overview(config)}\n\nper cent, means over seeds\nwrote {config.out}/grid.json: with intervals")


if __name__ == "__main__":
    run(main, GridConfig)
