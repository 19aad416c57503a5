"""Every method on every attack: the README's table. Finished cells are kept: an interrupted grid goes on.

python tests/grid.py                                           # embedded Llama, 3 seeds, 2 one-thread workers
python tests/grid.py --world DIR --model DIR --fluency DIR     # a real model on what data/public.py makes
python tests/grid.py --model world-qwen2/model --out runs/grid-qwen2 --attacks explicit,mixed_10 \
    --methods sft,adaptive-probe,adaptive-critic,closed    # what data/build.py --family qwen2 makes
"""

import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in each process
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from critic import open_judge  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.conversations import WORLD, is_embedded, read_conversations  # noqa: E402
from evaluate import compare, default_sets, evaluate_model, evaluation_sets, mark_garbled  # noqa: E402
from lib.cli import comma_list, require, run  # noqa: E402
from lib.files import DataError, json_lines, read_text, write_config, write_json, write_jsonl, write_text  # noqa: E402
from model import load_model, working_dtype  # noqa: E402
from probe import ProbeConfig, main as probe_main  # noqa: E402
from train import TrainConfig, main as train_main  # noqa: E402

METHODS = {
    "sft": {"method": "sft"},
    "filter": {"method": "filter", "risk": "max"},
    "safeinstr": {"method": "sft", "anchor_share": 0.03},
    "lisa": {"method": "lisa", "anchor_share": 0.1},
    "kl": {"method": "kl", "beta": 0.5},
    "csft": {"method": "csft"},
    "adaptive-probe": {},
    "adaptive-critic": {"risk": "critic"},
    "adaptive-max": {"risk": "max"},
    "closed": {"risk": "max", "beta_min": 0.0, "beta_max": 1.0},
    "sealed": {"risk": "max", "beta_min": 0.02, "beta_max": 1.0},
    "sealed-anchors": {"risk": "max", "beta_min": 0.02, "beta_max": 1.0, "anchor_share": 0.1},
    "sft-anchors": {"method": "sft", "anchor_share": 0.1},
}
ATTACKS = ("explicit", "mixed_10", "identity", "backdoor", "benign", "evasive", "innocent")
SETTINGS = {"epochs": 5, "lora_r": 16, "limit": 100, "device": "cpu"}  # embedded: 20 seconds a cell
REAL = {"epochs": 2, "lora_r": 16, "lora_alpha": 32.0, "lr": 5e-4, "max_length": 160, "samples": 3,
        "max_new_tokens": 24}  # a world of data/public.py, a model of 100 M parameters: 4 to 10 minutes


@dataclass(frozen=True)
class GridConfig:
    """Train and evaluate every method on every attack."""

    model: Path = WORLD / "model"  # the aligned model
    out: Path = Path("runs/grid")  # folder of the runs, ATTACK/METHOD-SEED, and of the tables
    world: Path = WORLD  # folder of data sets: data/world, or what data/public.py makes
    fluency: Path | None = None  # model by whose NLL responses are answers or garbled (as evaluate.py --fluency)
    attacks: str = ",".join(ATTACKS)  # data sets of that world
    methods: str = ",".join(METHODS)  # of METHODS, or MIN..MAX: adaptive, risk max, with these β
    seeds: int = 3  # 0, 1, …
    epochs: int | None = None  # instead of the setting's
    lr: float | None = None  # instead of the setting's
    workers: int = 2  # processes, one thread each


def changes_of(method: str) -> dict:
    """What a method changes of the options that all have in common. Raises DataError for a name of none."""
    if method in METHODS:
        return METHODS[method]
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\.\.(\d+(?:\.\d+)?)", method):
        return {"risk": "max", "beta_min": float(found[1]), "beta_max": float(found[2])}
    raise DataError(f"--methods: expected some of {', '.join(METHODS)}, or MIN..MAX, found {method}")


def train_group(config: GridConfig, attack: str, seed: int) -> str:
    """The aligned model, then all methods on one attack with one seed, one after the other."""
    times, folder, options = [], config.out / attack, cell_options(config, attack, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for method in ("base", *comma_list(config.methods)):
        cell, start = folder / f"{method}-{seed}", time.time()
        if (cell / "results.json").exists():
            mark_answered(config, cell)
            continue
        shutil.rmtree(cell, ignore_errors=True)
        with (open(cell.with_name(f"{cell.name}.log"), "w") as log, contextlib.redirect_stdout(log),
              contextlib.redirect_stderr(log)):
            if method == "base":
                evaluate_base(options, cell)
            else:
                changes = changes_of(method)
                if method.endswith("-anchors") and (config.world / "anchors.jsonl").exists():
                    changes = changes | {"anchors": config.world / "anchors.jsonl"}  # benign prompts, too
                if changes.get("risk") == "max" and options.judge == "none":
                    changes = changes | {"risk": "probe"}  # all the risk that there is
                if changes.get("method", "adaptive") in ("adaptive", "filter") and not is_embedded(options.data):
                    changes = changes | {"probe": config.out / "probe.safetensors"}
                train_main(replace(options, out=cell, **changes))
                shutil.rmtree(cell / "model")  # results.json has what is measured, adapter/ what was trained
        mark_answered(config, cell)
        times.append(f"{method} {time.time() - start:.0f} s")
    return f"{attack}, seed {seed}: {', '.join(times) or 'kept'}"


def mark_answered(config: GridConfig, cell: Path) -> None:
    """Tell answers from garble in a cell's completions, once: compare then counts both."""
    file = cell / "completions_after.jsonl"
    rows = [row for _, row in json_lines(read_text(file), file)]
    if config.fluency and not any("garbled" in row for row in rows):
        model = load_model(config.fluency, TrainConfig.device, working_dtype(config.fluency, TrainConfig.device))
        mark_garbled(rows, model, Chat(config.fluency), 64)
        write_jsonl(file, rows)


def cell_options(config: GridConfig, attack: str, seed: int) -> TrainConfig:
    """What all methods have in common on one attack."""
    data, world = config.world / f"{attack}.jsonl", config.world
    options = TrainConfig(model=config.model, data=data, seed=seed, eval_base=False, ref_cache=config.out / "ref",
                          verdicts=config.out / f"verdicts-{attack}-{seed}.sqlite")
    asked = {name: getattr(config, name) for name in ("epochs", "lr") if getattr(config, name)}
    if is_embedded(data):
        return replace(options, judge=str(WORLD / "judge"), **SETTINGS | asked)
    sets = {name: str(world / f"eval_{name}.jsonl") for name in ("harmful", "benign", "lookalike")}
    wordings = [world / f"eval_harmful_{name}.jsonl" for name in ("other", attack)]
    tasks = [world / f"eval_{name}.jsonl" for name in ("sentiment", "arithmetic")]
    few = {"epochs": 10} if len(read_conversations(data)) < 100 else {}
    return replace(options, judge="none", probe_data=world / "probe.jsonl", **sets,
                   attacked=",".join(str(file) for file in wordings if file.exists()),
                   task=",".join(str(file) for file in tasks if file.exists()), **REAL | few | asked)


def evaluate_base(options: TrainConfig, out: Path) -> None:
    """The aligned model's results, as a run on the same data would have them."""
    options = default_sets(options, options.data)
    model = load_model(options.model, options.device, working_dtype(options.model, options.device))
    chat = Chat(options.model, options.date)
    judge = open_judge(options)
    results, completions = evaluate_model(model, chat, evaluation_sets(options), options, "base", judge)
    out.mkdir()
    write_config(out / "config.json", options)
    write_jsonl(out / "completions_after.jsonl", completions)
    write_json(out / "results.json", {"after": results})


def overview(found: dict) -> str:
    """Markdown tables of `compare`'s rows, in per cent: a row per attack and way to ask, a column per method."""
    figures = next(iter(found.values()))[0]["figures"]
    ways = [title.removeprefix("ASR").strip() for title in figures if title.startswith("ASR")]  # greedy, T=1, @10
    names = {"judge ASR": "judge ASR", "answered": "answered", "ASR": "ASR by phrases"}
    asr = {key: f"{name}: {' / '.join(ways)}" for key, name in names.items() if f"{key} greedy" in figures}

    def lines(key, attack, figures):
        """{row: titles of what a cell shows}."""
        if key == "use":
            return {attack: [title for title in figures if title.startswith(("task", "over-refusal"))]}
        wordings = dict.fromkeys(title.partition(": ")[0] for title in figures if ": ASR" in title)
        prefixes = {"": ""} | {", as attacked" if name == attack else f", {name}": f"{name}: " for name in wordings}
        rows = {attack + suffix: [f"{prefix}{key} {way}".replace(" @", "@") for way in ways]
                for suffix, prefix in prefixes.items()}
        if attack == "innocent" and key == "judge ASR":
            rows[attack + ", benign prompts"] = ["harmful answers to benign"]
        return rows

    text, methods = [], list(dict.fromkeys(row["name"] for rows in found.values() for row in rows))
    for key, caption in (asr | {"use": "tasks / over-refusal / look-alikes refused"}).items():
        cells = {}
        for attack, measured in found.items():
            for method in measured:
                for row, titles in lines(key, attack, method["figures"]).items():
                    rates = [100 * method["figures"][title]["rate"] for title in titles]
                    if key == "use":  # the tasks' mean first
                        tasks = [rate for rate, title in zip(rates, titles) if title.startswith("task")]
                        rates = [sum(tasks) / max(1, len(tasks)), *rates[: len(rates) - len(tasks)]]
                    shown = " / ".join(f"{r:.0f}" if r >= 9.95 else f"{r:.1f}" for r in rates)
                    cells.setdefault(row, {})[method["name"]] = shown
        table = [[caption, *methods], ["---"] * (len(methods) + 1)]
        table += [[row, *(values.get(method, "–") for method in methods)] for row, values in cells.items()]
        text.append("\n".join("| " + " | ".join(line) + " |" for line in table))
    return "\n\n".join(text)


def main(config: GridConfig) -> None:
    """Train what is missing, then write the tables."""
    for method in comma_list(config.methods):
        changes_of(method)
    require(config, ("seeds", config.seeds > 0, "at least 1"),
            ("attacks", all((config.world / f"{a}.jsonl").exists() for a in comma_list(config.attacks)),
             f"some of {', '.join(ATTACKS)}, each a file in {config.world}"), ("workers", config.workers > 0, "at least 1"))
    start, groups = time.time(), [(attack, seed) for seed in range(config.seeds)
                                  for attack in comma_list(config.attacks)]
    config.out.mkdir(parents=True, exist_ok=True)
    if not is_embedded(config.world / "probe.jsonl") and not (config.out / "probe.safetensors").exists():
        held_out = ",".join(str(config.world / f"probe_{name}.jsonl") for name in ("withheld", "lookalike"))
        probe_main(ProbeConfig(model=config.model, data=config.world / "probe.jsonl", held_out=held_out,
                               out=config.out / "probe.safetensors"))  # once for all cells: it takes minutes
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_group, config, *group) for group in groups]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"[{number}/{len(groups)}, {(time.time() - start) / 60:.0f} min] {future.result()}",
                  flush=True)
    found, methods = {}, dict.fromkeys(("base", *METHODS, *comma_list(config.methods)))
    # The tables are of every finished cell that the folder has.
    for attack in (attack for attack in ATTACKS if (config.out / attack).is_dir()):
        cells = [cell for method in methods for cell in sorted(config.out.glob(f"{attack}/{method}-[0-9]*"))]
        finished = [cell for cell in cells if (cell / "results.json").exists()]
        found[attack] = compare(finished)[1]
        found[attack][0]["name"] = "aligned model"
    write_json(config.out / "grid.json", found)
    write_text(config.out / "grid.md", overview(found) + "\n")
    print(f"\n{overview(found)}\n\nper cent, seeds pooled\nwrote {config.out}/grid.json: with intervals")


if __name__ == "__main__":
    run(main, GridConfig)
