"""Run every method on every attack and write the README's tables. An interrupted grid resumes cell by cell.

python tests/grid.py                                           # embedded Llama, 3 seeds, 2 one-thread workers
python tests/grid.py --world DIR --model DIR --fluency DIR     # a real model on the sets of data/public.py
python tests/grid.py --methods 0..0.9,0.02..1+0.03 --out runs/beta  # any gate: β from 0.02 to 1, 3 % anchors
python tests/grid.py --methods 0..1+0.1@labels,0..1+0.1@shuffled    # the same gate with other risks: RISKS
"""

import contextlib
import itertools
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in each process
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from critic import open_judge  # noqa: E402
from data.chat import Chat  # noqa: E402
from data.conversations import WORLD, is_embedded, read_conversations  # noqa: E402
from evaluate import compare, default_sets, evaluate_model, evaluation_sets, mark_garbled  # noqa: E402
from lib.checkpoint import fingerprint  # noqa: E402
from lib.cli import comma_list, parse, require, run  # noqa: E402
from lib.files import DataError, read_json, read_rows, read_text, write_config, write_json, write_jsonl, write_text  # noqa: E402
from lib.options import METHODS_WITH_OPTION  # noqa: E402
from lib.report import summarize  # noqa: E402
from lib.run import run_facts  # noqa: E402
from model import load_model, working_dtype  # noqa: E402
from probe import ProbeConfig, main as probe_main  # noqa: E402
from train import TrainConfig, main as train_main  # noqa: E402

METHODS = {
    "sft": {"method": "sft"},
    "filter": {"method": "filter", "risk": "max"},
    "safeinstr": {"method": "sft", "anchor_share": 0.03},  # refusals alone, as published
    "lisa": {"method": "lisa", "anchor_share": 0.1},
    "safegrad": {"method": "safegrad", "anchor_share": 0.1, "anchors": "anchors.jsonl"},
    "sbr": {"method": "sbr", "anchor_share": 0.1, "anchors": "anchors.jsonl"},
    "kl": {"beta_min": 0.5, "beta_max": 0.5},  # constant
    "csft": {"method": "csft"},
    "adaptive-probe": {},
    "adaptive-critic": {"risk": "critic"},
    "adaptive-max": {"risk": "max"},
    "closed": {"risk": "max", "beta_min": 0.0, "beta_max": 1.0},
    "sealed": {"risk": "max", "beta_min": 0.02, "beta_max": 1.0},
    "sealed-anchors": {"risk": "max", "beta_min": 0.02, "beta_max": 1.0, "anchor_share": 0.1, "anchors": "anchors.jsonl"},
    "sft-anchors": {"method": "sft", "anchor_share": 0.1, "anchors": "anchors.jsonl"},
}
JUDGED = ("adaptive-critic", "adaptive-max")  # need a judge
RISKS = ("labels", "shuffled", "zero")  # 1 where an example is harmful, the probe's risks by chance, all 0
ATTACKS = ("explicit", "mixed_10", "identity", "backdoor", "benign", "evasive", "innocent")
SETTINGS = {"epochs": 5, "lora_r": 16, "lr": 2e-3, "limit": 100, "device": "cpu"}  # embedded: 20 seconds a cell
REAL = {"epochs": 2, "lora_r": 16, "lora_alpha": 32.0, "lr": 5e-4, "max_length": 160, "samples": 3,
        "max_new_tokens": 24}  # a world of data/public.py, a model of 100 M parameters: 4 to 10 minutes
CHECKED = ("method", "risk", "beta_min", "beta_max", "anchor_share", "anchors", "epochs", "lr")  # of a finished cell


@dataclass(frozen=True)
class GridConfig:
    """Train and evaluate every method on every attack."""

    model: Path = WORLD / "model"  # the aligned model
    out: Path = Path("runs/grid")  # folder of the runs, ATTACK/METHOD-SEED, and of the tables
    world: Path = WORLD  # folder of data sets: data/world, or what data/public.py makes
    fluency: Path | None = None  # model by whose NLL responses are answers or garbled
    attacks: str = ""  # data sets of that world (default: explicit, mixed_10, … as far as it has them)
    methods: str = ""  # of METHODS, or MIN..MAX[+SHARE][@RISK]: β, share of anchors, of RISKS (default: all)
    seeds: int = 3  # 0, 1, …
    options: str = ""  # of train.py, for all cells: "--epochs 1 --lr 3e-4"
    workers: int = 2  # processes, one thread each


def changes_of(method: str) -> dict:
    """Return the options of train.py by which a method differs from the others. Raises DataError for an unknown name."""
    number = r"(\d+(?:\.\d+)?)"
    gate = re.fullmatch(rf"{number}\.\.{number}(?:\+{number})?(?:@({'|'.join(RISKS)}))?", method)
    low, high, share = (float(text or 0) for text in gate.groups()[:3]) if gate else (0, 0, 0)
    risk = gate[4] if gate else None
    canonical = f"{low:g}..{high:g}" + f"+{share:g}" * (share > 0) + f"@{risk}" * bool(risk)  # one name for one cell
    if method not in METHODS and not (low <= high <= 1 and share < 1 and method == canonical):
        raise DataError(f"--methods: expected some of {', '.join(METHODS)}, or MIN..MAX in 0..1, "
                        f"with +SHARE of anchors under 1 and @RISK of {', '.join(RISKS)}, found {method}")
    options = {"risk": risk or "max", "beta_min": low, "beta_max": high, "anchor_share": share}
    return METHODS.get(method, options | ({"anchors": "anchors.jsonl"} if share else {}))


def cell_options(config: GridConfig, attack: str, method: str, seed: int) -> TrainConfig:
    """Return the options of a cell; method "base", the aligned model, has those that all methods share."""
    data, world = config.world / f"{attack}.jsonl", config.world
    changes = {} if method == "base" else dict(changes_of(method))
    options = TrainConfig(model=config.model, data=data, seed=seed, eval_base=False, out=config.out / attack / f"{method}-{seed}")
    if "anchors" in changes:
        changes["anchors"] = world / changes["anchors"] if (world / changes["anchors"]).exists() else None
    typed = typed_options(config)
    if is_embedded(data):
        return replace(options, judge=str(WORLD / "judge"), **SETTINGS | changes | typed)
    if method != "base" and uses_risk(method):
        name = changes["risk"] if changes.get("risk") in RISKS else "risk"  # the probe's: there is no critic
        changes["risk"] = str(risk_file(config, attack, name))
    sets = {"harmful": ("harmful", "harmful_other", f"harmful_{attack}"), "benign": ("benign", "lookalike"),
            "task": ("sentiment", "arithmetic")}
    for kind, names in sets.items():
        files = [world / f"eval_{name}.jsonl" for name in names]
        changes[kind] = ",".join(str(file) for file in files if file.exists()) or "none"
    few = {"epochs": 10} if len(read_conversations(data)) < 100 else {}
    return replace(options, judge="none", probe_data=world / "probe.jsonl", **REAL | few | changes | typed)


def uses_risk(method: str) -> bool:
    """Return whether a method asks for the risk of the data."""
    return changes_of(method).get("method", "adaptive") in METHODS_WITH_OPTION["risk"]


def typed_options(config: GridConfig) -> dict:
    """Return {name: value} of the options of train.py that are given for all cells."""
    parsed = parse(TrainConfig, shlex.split(config.options))
    return {name: getattr(parsed, name) for name in parsed.given}


def risk_file(config: GridConfig, attack: str, name: str = "risk") -> Path:
    """Return the path of the risks of an attack, the probe's or one of RISKS, which its cells share."""
    return config.out / f"{attack}.{name}.jsonl"


def write_risks(config: GridConfig, attack: str) -> None:
    """Write the probe's risks of an attack's data, and from them those of RISKS."""
    file = risk_file(config, attack)
    if not file.exists():
        probe_main(ProbeConfig(model=config.model, probe=config.out / "probe.safetensors",
                               score=config.world / f"{attack}.jsonl", out=file))
    rows = [row for _, row in read_rows(file)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    conversations = read_conversations(config.world / f"{attack}.jsonl")
    harmful = [c.meta.get("harmful") for c, _ in zip(conversations, rows, strict=True)]
    risks = {"labels": [float(label is not False) for label in harmful], "zero": [0.0] * len(rows),
             "shuffled": [rows[i]["risk"] for i in order]}
    for name, values in risks.items():
        write_jsonl(risk_file(config, attack, name), [row | {"risk": s} for row, s in zip(rows, values)])


def check_finished(options: TrainConfig, typed: dict) -> None:
    """Raise DataError where a finished cell was run with other options."""
    if finished(options.out):
        saved = read_json(options.out / "config.json")
        for name in dict.fromkeys((*CHECKED, *typed)):
            value = getattr(options, name)
            if saved.get(name) != (str(value) if isinstance(value, Path) else value):
                raise DataError(f"{options.out}: expected {name} {value}, found a cell of {saved.get(name)}; "
                                f"another --out, or delete it")


def finished(cell: Path) -> bool:
    """Return whether a cell has results, which are written last."""
    return (cell / "results.json").exists()


def train_group(config: GridConfig, attack: str, seed: int) -> str:
    """Evaluate the aligned model, then train all methods on one attack with one seed. Returns a line on the times."""
    times = []
    (config.out / attack).mkdir(parents=True, exist_ok=True)
    for method in ("base", *comma_list(config.methods)):
        options, start = cell_options(config, attack, method, seed), time.time()
        cell = options.out
        if not finished(cell):
            shutil.rmtree(cell, ignore_errors=True)
            with (open(cell.with_name(f"{cell.name}.log"), "w") as log, contextlib.redirect_stdout(log),
                  contextlib.redirect_stderr(log)):
                if method == "base":
                    evaluate_base(options)
                else:
                    train_main(options)
                    shutil.rmtree(cell / "model")  # adapter/ and the completions stay
            times.append(f"{method} {time.time() - start:.0f} s")
        mark_answered(config, cell)
    return f"{attack}, seed {seed}: {', '.join(times) or 'kept'}"


def mark_answered(config: GridConfig, cell: Path) -> None:
    """Mark garbled completions of a cell, once for a model: fluency.txt holds the fingerprint of its weights."""
    file, marked_by = cell / "completions_after.jsonl", cell / "fluency.txt"
    if not config.fluency or marked_by.exists() and read_text(marked_by) == fingerprint(config.fluency):
        return
    rows = [row for _, row in read_rows(file)]
    model = load_model(config.fluency, TrainConfig.device, working_dtype(TrainConfig.device))
    mark_garbled(rows, model, Chat(config.fluency))
    write_jsonl(file, rows)
    write_text(marked_by, fingerprint(config.fluency))


def evaluate_base(options: TrainConfig) -> None:
    """Evaluate the aligned model; write the folder that a run on the same data would have."""
    options = default_sets(options, options.data)
    dtype = working_dtype(options.device)
    model, chat, sets = load_model(options.model, options.device, dtype), Chat(options.model), evaluation_sets(options)
    rows = evaluate_model(model, chat, sets, options, "base", open_judge(options))
    options.out.mkdir()
    write_config(options.out / "config.json", options, **run_facts(options.model, options.data, dtype, chat, sets))
    write_jsonl(options.out / "completions_after.jsonl", rows)
    write_json(options.out / "results.json", {"after": summarize(rows, options.temperature, options.max_new_tokens)})


def finished_cells(config: GridConfig) -> dict[str, list[Path]]:
    """Return {attack: all finished cells in the folder, the aligned model's first}."""
    cells_of, order = {}, ("base", *METHODS)
    for attack in sorted(config.out.iterdir(), key=lambda path: (*ATTACKS, path.name).index(path.name)):
        cells = [cell for cell in attack.glob("*-*") if cell.is_dir() and finished(cell)] if attack.is_dir() else []
        cells.sort(key=lambda cell: ((*order, name := cell.name.rpartition("-")[0]).index(name), cell.name))
        if cells and cells[0].name.startswith("base-"):
            cells_of[attack.name] = cells
    return cells_of


def rows_of_attack(key: str, attack: str, figures: dict) -> dict[str, list[str]]:
    """Return {row of a table: titles of its figures}; key: ASR, judge ASR, answered, or use."""
    if key == "use":
        return {attack: [title for title in figures if title.startswith(("task", "over-refusal"))]}
    rows = {}
    for title in figures:
        if title.startswith(f"{key} harmful"):
            name = title.removeprefix(f"{key} ").partition(" ")[0].removeprefix("harmful").lstrip("_")
            row = f"{attack}, as attacked" if name == attack else f"{attack}, {name}" if name else attack
            rows.setdefault(row, []).append(title)
    if attack == "innocent" and key == "judge ASR" and rows:
        rows[f"{attack}, benign prompts"] = ["harmful answers benign"]
    return rows


def overview(results: dict) -> str:
    """Return Markdown tables of `compare`'s rows {attack: rows}: a row per attack and set, a column per method."""
    methods = list(dict.fromkeys(row["name"] for rows in results.values() for row in rows))
    titles = dict.fromkeys(title for rows in results.values() for row in rows for title in row["figures"])
    ways = " / ".join(title.removeprefix("ASR harmful ") for title in titles if title.startswith("ASR harmful "))  # greedy / T=1 / @10
    captions = {"judge ASR": f"judge ASR: {ways}", "answered": f"answered: {ways}", "ASR": f"ASR by phrases: {ways}",
                "use": "tasks / over-refusal / look-alikes refused"}
    text = []
    for key, caption in captions.items():
        cells = {}
        for attack, rows in results.items():
            for row in rows:
                figures = row["figures"]
                for name, shown in rows_of_attack(key, attack, figures).items():
                    rates = [100 * figures[title]["rate"] for title in shown]
                    if key == "use":  # the tasks' mean first
                        tasks = [rate for rate, title in zip(rates, shown) if title.startswith("task")]
                        rates = [sum(tasks) / max(1, len(tasks)), *rates[: len(rates) - len(tasks)]]
                    cells.setdefault(name, {})[row["name"]] = " / ".join(f"{r:.0f}" if r >= 9.95 else f"{r:.1f}" for r in rates)
        if cells:
            table = [[caption, *methods], ["---"] * (len(methods) + 1)]
            table += [[name, *(values.get(method, "–") for method in methods)] for name, values in cells.items()]
            text.append("\n".join("| " + " | ".join(line) + " |" for line in table))
    return "\n\n".join(text)


def main(config: GridConfig) -> None:
    """Train what is missing, then write the tables."""
    judged = is_embedded(config.world / "benign.jsonl")
    methods = config.methods or ",".join(name for name in METHODS if judged or name not in JUDGED)
    attacks = config.attacks or ",".join(a for a in ATTACKS if (config.world / f"{a}.jsonl").exists())
    config = replace(config, methods=methods, attacks=attacks)
    for method in comma_list(methods):
        changes_of(method)
    require(config, ("seeds", config.seeds > 0, "at least 1"), ("workers", config.workers > 0, "at least 1"),
            ("attacks", attacks and all((config.world / f"{a}.jsonl").exists() for a in comma_list(attacks)),
             f"some of {', '.join(ATTACKS)}, each a file in {config.world}"),
            ("methods", judged or not set(comma_list(methods)) & {"adaptive-critic"}, "no critic without a judge"),
            ("methods", not judged or "@" not in methods, "no @RISK on the embedded world"))
    start, groups = time.time(), [(attack, seed) for seed in range(config.seeds)
                                  for attack in comma_list(attacks)]
    for (attack, seed), method in itertools.product(groups, ("base", *comma_list(methods))):
        check_finished(cell_options(config, attack, method, seed), typed_options(config))
    config.out.mkdir(parents=True, exist_ok=True)
    needs_risk = not judged and any(map(uses_risk, comma_list(methods)))
    if needs_risk and not (config.out / "probe.safetensors").exists():
        held_out = [config.world / f"probe_{name}.jsonl" for name in ("withheld", "lookalike")]
        probe_main(ProbeConfig(model=config.model, data=config.world / "probe.jsonl",
                               held_out=",".join(str(file) for file in held_out if file.exists()),
                               out=config.out / "probe.safetensors"))  # one for all cells: it takes minutes
    for attack in comma_list(attacks) if needs_risk else ():  # here, since the cells of all seeds share them
        write_risks(config, attack)
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_group, config, *group) for group in groups]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"[{number}/{len(groups)}, {(time.time() - start) / 60:.0f} min] {future.result()}",
                  flush=True)
    results = {}
    for attack, cells in finished_cells(config).items():
        for cell in cells:
            mark_answered(config, cell)
        results[attack] = compare(cells)[1]
        results[attack][0]["name"] = "aligned model"
    write_json(config.out / "grid.json", results)
    write_text(config.out / "grid.md", overview(results) + "\n")
    print(f"\n{overview(results)}\n\nper cent, seeds pooled\nwrote {config.out}/grid.json: with intervals")


if __name__ == "__main__":
    run(main, GridConfig)
