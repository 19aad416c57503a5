"""A run that may be killed at any moment and goes on with `train.py --resume RUN`: what its folder keeps.

What is known before training stands in files that are written once and whole, and are read from then on:
config.json first, then risk.jsonl, completions_base.jsonl, anchors.jsonl. What training changes is in
steps/N.safetensors, after N steps, the newest two of them; results.json ends it all, and steps/ goes.
"""

import json
import os
import shlex
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from lib import distributed
from lib.checkpoint import load_checked, provenance, save_checked
from lib.cli import as_typed, option_value
from lib.files import (DataError, errors_name_path, expect, fsync, json_lines, new_folder, read_json, read_text,
                       remove, remove_if_unused, write_config, write_jsonl, write_text)

ADAMW = ("step", "exp_avg", "exp_avg_sq")  # an optimizer's state of a parameter, once it has taken a step


def options_of_run(config, check):
    """The options of the run config.resume, a dataclass of config's type, checked; the run becomes its `out`.

    Raises DataError for a finished run, a folder that is none, other options beside --resume, and where a
    run's judge is a URL that is not typed: a file alone makes nobody talk to a server.
    """
    run, file = config.resume, config.resume / "config.json"
    if odd := sorted(set(config.given) - {"resume", "judge"}):
        raise DataError(f"--resume: expected no option beside it, since the run has its own, found "
                        f"--{odd[0].replace('_', '-')}")
    if (run / "results.json").exists():
        raise DataError(f"--resume: expected an unfinished run, found {run / 'results.json'}")
    saved = read_json(file)
    options = [option for option in fields(config) if option.name not in ("given", "resume", "out")]
    if absent := [option.name for option in options if option.name not in saved]:
        raise DataError(f"{file}: expected the options of a run of train.py, found no {absent[0]}")
    values = {option.name: option_value(option, saved[option.name], file) for option in options}
    url = values["judge"] if "://" in (values["judge"] or "") else None
    if config.judge != url:
        raise DataError(f"--resume: expected {f'--judge {url}, as the run had' if url else 'no --judge'}, "
                        f"found {config.judge or 'none'}")
    print(f"as in {file}: {as_typed(values, type(config))}")
    dtype = ("float32 or bfloat16", lambda value: value in ("float32", "bfloat16"))
    expect(saved, {"computed_in": dtype}, file, DataError)
    if values["dtype"] == "auto":  # which may have been decided by a measurement
        values["dtype"] = saved["computed_in"]
    try:
        return check(replace(config, **values, out=run))
    except DataError as error:
        raise DataError(f"{file}: {error}") from None


def run_folder(config, default: str, policy, chat, sets: dict):
    """`config` with its `out`: a new folder with config.json in it, or the run's that is to be resumed.

    config.json has the options and what the run is made of: model, template, data, evaluation sets. Raises
    DataError where one of these has changed since; another commit or torch is printed.
    """
    asked = [[kind, name, [[c.hash, str(c.meta.get("group")), str(c.meta.get("metric"))] for c in rows]]
             for kind, group in sets.items() for name, rows in group.items()]
    facts = provenance(config.model, config.data) | {
        "template_sha256": chat.fingerprint, "sets_sha256": sha256(json.dumps(asked).encode()).hexdigest(),
        "computed_in": str(policy.lm_head.weight.dtype).removeprefix("torch.")}
    if not config.resume:
        config = replace(config, out=new_folder(config.out, default))
        write_config(config.out / "config.json", config, **facts)
        return config
    saved = read_json(config.out / "config.json")
    for name, found in facts.items():
        if saved.get(name) != found and name in ("commit", "versions"):
            print(f"{config.out} was started with {name} {saved.get(name)}, and goes on with {found}")
        elif saved.get(name) != found:
            raise DataError(f"--resume: expected {name} as {config.out} was started with, "
                            f"{str(saved.get(name))[:12]}, found {found[:12]}: it has changed since")
    return config


@contextmanager
def in_run(config):
    """Within it the run's folder is this process's alone; where it ends early, the way to go on is told.

    Raises DataError where another process is at it. A new run that knows nothing yet leaves no folder.
    """
    command = f"python train.py --resume {shlex.quote(str(config.out))}"
    command += f" --judge {shlex.quote(config.judge)}" if "://" in config.judge else ""
    lock = open(config.out / "config.json")
    try:
        distributed.on_rank_zero(lambda: expect_alone(lock))
        with nullcontext() if config.resume else remove_if_unused(config.out):
            yield
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        if (config.out / "config.json").exists():
            again = " (with torchrun, as before)" * (distributed.world_size() > 1)
            error.add_note(f"to go on: {command}{again}")
        raise
    finally:
        lock.close()


def expect_alone(stream) -> None:
    """Lock a file until it is closed or this process dies. Raises DataError where another process has."""
    try:
        import fcntl  # which Windows lacks

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        raise DataError(f"{Path(stream.name).parent}: expected a run that no process is at, "
                        f"found one at it") from None


def keep_rows(file: Path, compute) -> None:
    """Write the rows of compute() to a JSON Lines file, where it is not there yet."""
    if not distributed.on_rank_zero(file.exists):
        rows = compute()
        distributed.on_rank_zero(lambda: write_jsonl(file, rows))


def kept_rows(file: Path, compute) -> list[dict]:
    """The rows of a file of `keep_rows`, kept now or before. Raises DataError for one that is no object."""
    keep_rows(file, compute)
    found = list(json_lines(read_text(file, links=False), file))
    if odd := [line for line, row in found if not isinstance(row, dict)]:
        raise DataError(f"{file}:{odd[0]}: expected an object, found something else")
    return [row for _, row in found]


class Progress:
    """A training loop's metrics and states on the disk; a context manager, in which signals wait for a step.

    run: the folder, with metrics.jsonl and steps/. minutes: between states; the last step has one, too, and
    with 0 there is none. A state is of `examples`, their `risk` and config.json: with others it is refused.
    """

    def __init__(self, run: Path, policy, optimizer, minutes: float, examples: list, risk: torch.Tensor):
        self.metrics_file, self.folder, self.seconds = run / "metrics.jsonl", run / "steps", 60 * minutes
        self.parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.optimizer, self.metrics = optimizer, None
        self.saved_at, self.stopping = time.monotonic(), False
        of, options = sha256(risk.double().numpy().tobytes()), run / "config.json"
        of.update(options.read_bytes() if options.exists() else b"")
        for e in examples:
            of.update(np.array([e.index, e.anchor, len(e.input_ids), *e.input_ids, *e.labels]).tobytes())
        self.of = of.hexdigest()

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {which: signal.signal(which, self.stop) for which in (signal.SIGINT, signal.SIGTERM)
                           if signal.getsignal(which) != signal.SIG_IGN}  # as in a shell's background
        return self

    def __exit__(self, *error):
        for which, handler in self.before.items():
            signal.signal(which, handler)
        if self.metrics:
            self.metrics.close()
        if self.stopping and error[0] is None:  # a signal that came behind the last step
            raise KeyboardInterrupt

    def stop(self, *which) -> None:
        """On a signal: end after this step; on a second one, now."""
        if self.stopping and distributed.world_size() == 1:  # torchrun hands on what a terminal has sent already
            raise KeyboardInterrupt
        self.stopping = True
        if distributed.rank() == 0:
            os.write(2, b"\nstopping after this step\n")  # print could be at work already

    def newest(self) -> Path | None:
        """The newest state that is whole; damaged ones are named, and left out."""
        for file in sorted(self.folder.glob("*.safetensors"), reverse=True):
            try:
                load_checked(file, "a state of training")
                return file
            except DataError as error:
                print(f"{error}: left out")
        return None

    def restore(self, values: tuple) -> tuple:
        """Put policy and optimizer where the newest state left them → (steps done, its values, its `beside`).

        (0, values, None) where there is none. Raises DataError where it is of other examples or options.
        """
        file, steps, beside = distributed.on_rank_zero(self.newest), 0, []
        if file:
            tensors, metadata = load_checked(file, "a state of training")
            if metadata.get("of") != self.of:
                raise DataError(f"{file}: expected a state of this model, data and options, found one of "
                                f"others: what the run was started with has changed since")
            try:
                steps, found = int(file.stem), json.loads(metadata["values"])
                if not isinstance(found, list) or len(found) != len(values):
                    raise ValueError(f"the values {str(found)[:60]}")
                values = tuple(found)
                for name, parameter in self.parameters.items():
                    own = {key: distributed.shard_like(tensors[f"{key} {name}"], parameter)
                           for key in ("parameter", "beside", *ADAMW) if f"{key} {name}" in tensors}
                    parameter.data.copy_(own.pop("parameter"))
                    beside += [own.pop("beside")] if "beside" in own else []
                    self.optimizer.state[parameter].update(own)
            except (LookupError, ValueError, RuntimeError) as error:  # with a right checksum all the same
                raise DataError(f"{file}: expected a state of training, found: {error}") from None
            print(f"going on after step {steps}, from {file}")
        self.metrics = self.open_metrics(steps)
        return steps, values, beside or None

    def open_metrics(self, steps: int):
        """The file of metrics to write behind its first `steps` lines: those of later steps come anew."""
        def shorten():
            lines = read_text(self.metrics_file).splitlines(keepends=True)[:steps] if steps else []
            if len(lines) < steps:
                raise DataError(f"{self.metrics_file}: expected {steps} lines, found {len(lines)}")
            write_text(self.metrics_file, "".join(lines))

        distributed.on_rank_zero(shorten)
        return open(self.metrics_file if distributed.rank() == 0 else os.devnull, "a", buffering=1)

    def end_step(self, steps: int, row: dict, last: bool, values: tuple, beside: list | None) -> None:
        """Write the metrics of a step; then, where it is time or the end, a state after `steps` steps.

        values: JSON; beside: None, or a tensor for each parameter. Raises KeyboardInterrupt after a signal.
        """
        with errors_name_path(self.metrics_file):
            self.metrics.write(json.dumps(row) + "\n")
        due = distributed.rank() == 0 and time.monotonic() - self.saved_at >= self.seconds
        due, stopping = distributed.all_reduce_sum(torch.tensor([float(due), float(self.stopping)])).bool().tolist()
        if self.seconds and (due or stopping or last):
            self.save(steps, values, beside)
        if stopping:
            raise KeyboardInterrupt

    def save(self, steps: int, values: tuple, beside: list | None) -> None:
        """Write steps/N.safetensors; then delete all but it and the one before."""
        tensors = {}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            own = {"parameter": parameter} | self.optimizer.state.get(parameter, {})
            own |= {"beside": beside[i]} if beside else {}
            for key, tensor in own.items():
                tensor = distributed.full_tensor(tensor.detach()).cpu().contiguous()
                if distributed.rank() == 0:
                    tensors[f"{key} {name}"] = tensor

        def write():
            self.folder.mkdir(exist_ok=True)
            fsync(self.metrics_file)
            metadata = {"of": self.of, "values": json.dumps(values)}
            save_checked(self.folder / f"{steps:08}.safetensors", tensors, metadata)
            for old in sorted(self.folder.glob("*.safetensors"))[:-2]:
                remove(old)

        distributed.on_rank_zero(write)
        self.saved_at = time.monotonic()
