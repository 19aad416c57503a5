"""Run folders: what they store, and how an interrupted run resumes.

A run writes config.json first, then, each once and atomically, risk.jsonl, completions_base.jsonl and
anchors.jsonl. During training state.pt holds parameters and optimizer after some step. results.json is
written last. `train.py --resume RUN` reads what is there and computes the rest.
"""

import json
import math
import shlex
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path

import torch

from lib.checkpoint import provenance, write_tensors
from lib.cli import as_typed, option_value, printable
from lib.distributed import full_tensor, on_rank_zero, rank, shard_like
from lib.files import (DataError, errors_name_path, expect_file, is_unused, new_folder, read_json,
                       read_text, remove, remove_if_unused, write_config, write_jsonl, write_text)


# ---------------------------------------------------------------- options and folder


def stored_options(options, file: Path, typed: set):
    """Return `options` with all that were not `typed` taken from a run's config.json, `file`. Prints them.

    Another judge than the run's comes with its own options. Raises DataError for a value that is not of its
    option's type, and for a judge's URL that was not typed again: no file alone makes us contact a server.
    """
    saved = read_json(file)
    values = {}
    if "judge" in typed and options.judge != saved.get("judge"):
        typed = typed | {"judge_kind", "judge_model", "rubric"}
    for option in fields(options):
        if option.name in saved.keys() - typed:
            values[option.name] = option_value(option, saved[option.name], file)
    url = values.get("judge") or ""
    if "://" in url and options.judge != url:
        raise DataError(printable(f"{file}: judged by {url}; to ask this server again, type --judge "
                                  f"{shlex.quote(url)} (evaluate.py takes --judge none, too)"))
    print(f"as in {printable(str(file))}: {as_typed(values, type(options))}")
    return replace(options, **values)


def resumed_options(config):
    """Return the options of the run `config.resume`, with that folder as `out`.

    Raises DataError for a finished run, and for other options beside --resume than the run's judge.
    """
    run = config.resume
    if extra := sorted(set(config.given) - {"resume", "judge"}):
        raise DataError("--resume: expected no option beside it, since the run has its own, found "
                        f"--{extra[0].replace('_', '-')}")
    if (run / "results.json").exists():
        raise DataError(f"--resume: expected an unfinished run, found {run / 'results.json'}")
    options = stored_options(config, run / "config.json", {"out", "resume"})
    if config.judge not in (None, options.judge):
        raise DataError(f"--resume: expected --judge {options.judge}, as the run had, found {config.judge}; "
                        "leave --judge out, or start anew with another judge: --out OTHER")
    return replace(options, out=run)


def run_facts(model: Path, data: Path, dtype: torch.dtype, chat, sets: dict) -> dict:
    """Return what a run is made of beside its options, for config.json: hashes, versions, the dtype.

    sets: as of evaluate.evaluation_sets.
    """
    def content(conversation):
        meta = conversation.meta
        return [conversation.hash, str(meta.get("group")), str(meta.get("metric"))]

    prompts = json.dumps(sets, default=content)
    return provenance(model, data) | {
        "template_sha256": chat.fingerprint, "sets_sha256": sha256(prompts.encode()).hexdigest(),
        "computed_in": str(dtype).removeprefix("torch.")}


def open_run(config, default: str, facts: dict) -> Path:
    """Make the folder of a new run with its config.json, or check that a resumed run has the same `facts`.

    facts: what the run is made of, beside its options: hashes of model, data, template, evaluation prompts.
    Returns the folder. Raises DataError for a fact that has changed, and where another process runs in the
    folder; another commit or version is printed.
    """
    if not config.resume:
        if config.out and is_unstarted(config.out):
            remove_unstarted(config.out)
        out = new_folder(config.out, default)
        write_config(out / "config.json", replace(config, out=out), **facts)
        return out
    saved = read_json(config.out / "config.json")
    for name, value in facts.items():
        if saved.get(name) == value:
            continue
        if name not in ("commit", "versions"):
            raise DataError(f"--resume: expected {name} as {config.out} was started with, "
                            f"{str(saved.get(name))[:12]}, found {str(value)[:12]}: it has changed since")
        print(f"{config.out} was started with {name} {saved.get(name)}, and goes on with {value}")
    return config.out


@contextmanager
def running(out: Path, resumed: bool, keep: bool = True):
    """Lock the run's folder. An interrupt and most errors say how to resume.

    A new run that stored nothing is removed, and with keep=False any run at its end. Raises DataError where
    another process runs in the folder.
    """
    with open(out / "config.json") as lock:
        on_rank_zero(lambda: lock_file(lock))
        try:
            with nullcontext() if resumed else remove_if_unused(out):
                yield
        except (KeyboardInterrupt, DataError, OSError, RuntimeError) as error:
            if keep and (out / "config.json").exists():
                error.add_note(f"to go on: python train.py --resume {shlex.quote(str(out))}")
            raise
        finally:
            if not keep and rank() == 0:
                remove(out)


def is_unstarted(run: Path) -> bool:
    """Return whether this is the folder of a run that was killed before it finished a stage."""
    file = run / "config.json"
    return is_unused(run) and file.exists() and "sets_sha256" in read_json(file)


def remove_unstarted(run: Path) -> None:
    """Remove the folder of such a run. Raises DataError where a process works on it."""
    with open(run / "config.json") as lock:
        lock_file(lock)
        if is_unstarted(run):
            remove(run)


def lock_file(stream) -> None:
    """Lock a file until it is closed or this process dies. Raises DataError where another process has it."""
    try:
        import fcntl  # Windows has none
    except ImportError:
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{Path(stream.name).parent}: expected a run that no process works on, "
                        f"found one that does") from None


def write_once(file: Path, compute) -> None:
    """Compute the rows of a JSON Lines file and write them, where there is no such file yet."""
    if not on_rank_zero(file.exists):
        rows = compute()
        on_rank_zero(lambda: write_jsonl(file, rows))


# ---------------------------------------------------------------- metrics


def append_metrics(run: Path, row: dict) -> None:
    """Append a step's row to metrics.jsonl."""
    file = run / "metrics.jsonl"
    if rank() == 0:
        with errors_name_path(file), open(file, "a") as stream:
            stream.write(json.dumps(row) + "\n")


def cut_metrics(run: Path, n_steps: int) -> None:
    """Keep the first n_steps lines of metrics.jsonl: later steps are run again. Raises DataError for fewer."""
    file = run / "metrics.jsonl"
    lines = read_text(file).splitlines(keepends=True)[:n_steps] if n_steps else []
    if len(lines) < n_steps:
        raise DataError(f"{file}: expected {n_steps} lines, found {len(lines)}")
    write_text(file, "".join(lines))


def step_metrics(examples, s, alpha, beta, loss, nll, kl) -> dict:
    """Return a step's row of metrics.jsonl: loss, means of risk, α, β, and NLL and KL per response token.

    All (B,): s, alpha, beta of each example, nll and kl summed over its tokens; the sum of `loss` is the
    step's. KL is of examples with β > 0 alone; "nll_risky", "kl_risky" are of those with s > ½, "nll_other",
    "kl_other" of the others. A value is None where it is of no example, "risk" where no example has β > 0.
    """
    n_tokens = torch.tensor([example.n_labels for example in examples])
    every = torch.ones_like(s, dtype=torch.bool)
    risky = s > 0.5
    pulled = beta > 0

    def per_token(sums, which):
        return (sums[which].sum() / n_tokens[which].sum()).item() if which.any() else None

    return {
        "loss": loss.sum().item(),
        "nll": per_token(nll, every),
        "nll_risky": per_token(nll, risky),
        "nll_other": per_token(nll, ~risky),
        "kl": per_token(kl, pulled),
        "kl_risky": per_token(kl, pulled & risky),
        "kl_other": per_token(kl, pulled & ~risky),
        "risk": s.mean().item() if pulled.any() else None,
        "alpha": alpha.mean().item(),
        "beta": beta.mean().item(),
    }


def check_step(row: dict, max_kl: float) -> None:
    """Raise FloatingPointError for a gradient that is not finite, DataError for |KL| above `max_kl`, or NaN."""
    if not math.isfinite(row["grad_norm"]):
        raise FloatingPointError(f"step {row['step']}: gradient {row['grad_norm']}, loss {row['loss']}; no "
                                 "model is saved")
    if row["kl"] is not None and not abs(row["kl"]) < max_kl:
        raise DataError(f"step {row['step']}: expected KL 0 before the policy moves, found {row['kl']:.2g} a "
                        "token: the reference is not the model's")


# ---------------------------------------------------------------- the state of training


@dataclass
class State:
    """What the next step depends on, beside the parameters and the optimizer's state."""

    step: int = 0  # steps done
    smoothed_risk: float | None = None  # of --gate batch
    moved: bool = False  # whether the policy has left the reference
    phase_start: list = field(default_factory=list)  # Lisa's: a tensor for each parameter


def restore_state(run: Path, parameters: list, optimizer, key: str) -> State:
    """Load the run's saved state into parameters and optimizer, and cut metrics.jsonl behind its step.

    key: of `state_key`. Returns a new State where none is saved. Raises DataError for a damaged one, and for
    one of another key.
    """
    file = run / "state.pt"
    state = State()
    if on_rank_zero(file.exists):
        try:
            saved = torch.load(expect_file(file), "cpu", weights_only=True)
            if saved["key"] != key:
                raise ValueError("one of other data or options than the run has now")
            state = State(**saved["state"])
            for parameter, tensors in zip(parameters, saved["tensors"], strict=True):
                tensors = {name: shard_like(tensor, parameter) for name, tensor in tensors.items()}
                parameter.data.copy_(tensors.pop("parameter"))
                if "phase_start" in tensors:
                    state.phase_start.append(tensors.pop("phase_start"))
                optimizer.state[parameter] = tensors
        except Exception as error:
            raise DataError(f"{file}: expected the state of a run, found {str(error)[:100] or 'no data'}; "
                            "delete it to train from the first step") from None
        print(f"going on after step {state.step}, from {file}")
    on_rank_zero(lambda: cut_metrics(run, state.step))
    return state


def save_state(run: Path, parameters: list, optimizer, state: State, key: str) -> None:
    """Write parameters, optimizer and `state` to state.pt, atomically. All processes call it."""
    saved = {"key": key, "state": vars(state) | {"phase_start": []}, "tensors": []}
    for i, parameter in enumerate(parameters):
        tensors = {"parameter": parameter.detach()} | optimizer.state.get(parameter, {})
        if state.phase_start:
            tensors["phase_start"] = state.phase_start[i]
        tensors = {name: full_tensor(tensor).cpu() for name, tensor in tensors.items()}
        if rank() == 0:
            saved["tensors"].append(tensors)
    on_rank_zero(lambda: write_tensors(run / "state.pt", saved))


def state_key(run: Path, examples: list, risk: torch.Tensor) -> str:
    """Return the SHA-256 of a run's config.json, its examples' tokens and labels, and their risk."""
    digest = sha256(risk.double().numpy().tobytes())
    config_file = run / "config.json"
    if config_file.exists():
        digest.update(config_file.read_bytes())
    for example in examples:
        content = example.index, example.anchor, example.input_ids, example.labels
        digest.update(repr(content).encode())
    return digest.hexdigest()
