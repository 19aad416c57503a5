"""A run that is killed, stopped or out of room resumes, and ends with the same bits as an undisturbed one."""

import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import train
from conftest import DEVICE, head, read_rows, write_rows
from data.conversations import WORLD, read_conversations
from lib.cli import parse
from lib.files import DataError, new_folder
from train import TrainConfig, main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def interruptible():
    """Handle signals as lib.cli.run does in a terminal: a shell ignores SIGINT in the background."""
    before = {which: signal.signal(which, signal.default_int_handler) for which in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.fixture(scope="module")
def folder():
    """Make data, a file with risks from 0 to 1, and prompts for a probe, for runs of about a second.

    The folder is in memory where that is possible: runs that save every step wait for their disk.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as path:
        folder = Path(path)
        for name, source, n in (("data", "mixed_10", 16), ("probe", "probe", 300)):
            head(f"{source}.jsonl", n, folder / f"{name}.jsonl")
        risks = [{"hash": c.hash, "risk": 0 if i % 3 else i / 16} for i, c in enumerate(read_conversations(folder / "data.jsonl"))]
        write_rows(folder / "risk.jsonl", risks)
        yield folder


def options(folder, name, *more, save_every=1):
    """Return a run's command line. `more` options overrule the others."""
    common = ["--data", folder / "data.jsonl", "--probe-data", folder / "probe.jsonl", "--device", DEVICE, "--epochs", "6",
              "--batch-size", "4", "--lora-r", "2", "--harmful", WORLD / "eval_harmful.jsonl", "--benign", "none", "--task", "none", "--limit", "2", "--samples", "1",
              "--max-new-tokens", "4", "--judge", "none", "--no-eval-base", "--out", folder / name, "--save-every", save_every]
    risk = [] if {"csft", "lisa", "--risk"} & set(more) else ["--risk", folder / "risk.jsonl"]
    return [str(option) for option in (*common, *risk, *more)]


def start(*typed):
    main(parse(TrainConfig, [str(option) for option in typed]))


def outcome(run):
    """Return all that a finished run consists of, except its path and its speed."""
    metrics = read_rows(run / "metrics.jsonl")
    for row in metrics:
        del row["tokens_per_s"]
    files = {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for name in ("config.json", "adapter/adapter_config.json", "metrics.jsonl"):
        files[name] = b""
    return metrics, files


def stop_at(monkeypatch, step, which=signal.SIGTERM):
    """Send this process a signal in that step of the next loop, once."""
    sent, lr_at = [], train.lr_at

    def stopping_lr_at(now, *rest):
        if now == step and not sent:
            sent.append(which)
            os.kill(os.getpid(), which)
        return lr_at(now, *rest)

    monkeypatch.setattr(train, "lr_at", stopping_lr_at)


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Return the outcome of an adaptive run that saves no state."""
    start(*options(folder, "undisturbed", save_every=0))
    return outcome(folder / "undisturbed")


CASES = {
    "probe, anchors, base": ["--risk", "probe", "--anchor-share", "0.2", "--eval-base"],
    "batch gate, live": ["--gate", "batch", "--ema", "0.7", "--ref", "live"],
    "full": ["--lora-r", "0", "--lr", "1e-4"],
    "csft": ["--method", "csft"],
    "lisa": ["--method", "lisa", "--anchor-share", "0.3", "--epochs", "7"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_stopped_twice_ends_with_the_bits_of_an_undisturbed_one(case, folder, monkeypatch, capsys):
    """The state is of every second step: the steps behind it are run again."""
    start(*options(folder, f"whole {case}", *CASES[case], save_every=0))
    run, last = folder / case, 37 if case == "lisa" else 7
    for step, which in ((3, signal.SIGTERM), (last, signal.SIGINT)):
        stop_at(monkeypatch, step, which)
        with pytest.raises(KeyboardInterrupt) as stopped:
            start(*(["--resume", run] if run.exists() else options(folder, case, *CASES[case], save_every=2)))
        assert stopped.value.__notes__ == [f"to go on: python train.py --resume {shlex.quote(str(run))}"]
    capsys.readouterr()
    start("--resume", run)
    assert f"going on after step {last - 1}, from {run}/state.pt" in capsys.readouterr().out
    assert outcome(run) == outcome(folder / f"whole {case}")


@pytest.mark.parametrize("save_every, steps", [(10, [10, 20, 24]), (12, [12, 24]), (0, [])])
def test_the_state_is_saved_every_n_steps_and_after_the_last(save_every, steps, folder, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "save_state", lambda run, parameters, optimizer, state, key: saved.append(state.step))
    start(*options(folder, f"every {save_every}", save_every=save_every))
    assert saved == steps


def start_and_die(event_number, run, *typed):
    """Start a run in this process, and kill the process before the numbered use of a file in `run`."""
    events = 0

    def count(event, arguments):
        nonlocal events
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(run):
            events += 1
            if events == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    start(*typed)


def test_a_process_that_is_killed_at_any_moment_resumes_to_the_same_bits(folder, monkeypatch):
    """kill -9 of processes before they use a file of the run, or at random, until the run is complete; then another run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.chdir(ROOT)
    context, rng = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["train", "torch._dynamo", "test_resume"])
    more = ["--anchor-share", "0.2", "--gate", "batch", "--ema", "0.5", "--epochs", "3"]
    start(*options(folder, "not killed", *more))
    killed, in_a_save, runs = 0, 0, 0
    while killed < 18 or in_a_save < 4 and killed < 200:  # a save is hit by chance: go on until four were
        run, runs = folder / f"killed {runs}", runs + 1
        while not (run / "results.json").exists():
            if run.exists() and not (run / "config.json").exists():
                run.rename(folder / f"empty {killed}")  # killed between the folder and its first file
            typed = ["--resume", str(run)] if run.exists() else options(folder, run.name, *more)
            at_event = killed % 3 > 0
            child = context.Process(target=start_and_die, args=[rng.randint(1, 70) if at_event else 0, str(run), *typed])
            child.start()
            child.join(None if at_event else rng.uniform(0.2, 1.5))
            child.kill()
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL)
            killed += child.exitcode != 0
            in_a_save += bool(list(run.glob("*.part")))
        assert not list(run.rglob("*.part")) and outcome(run) == outcome(folder / "not killed")
    print(f"{killed} kills survived, {in_a_save} of them in a save, {runs} runs")
    assert in_a_save >= 4


def test_a_damaged_state_is_refused_with_the_file_to_delete_and_then_training_starts_anew(folder, undisturbed, monkeypatch):
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        start(*options(folder, "damaged"))
    file = folder / "damaged" / "state.pt"
    state = file.read_bytes()
    for damaged in (state[: len(state) // 2], state[:-1], state[100:], b"garbage" * 99, b""):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{file}: expected the state of a run, found .+; delete it to train from the first step"):
            start("--resume", folder / "damaged")
    file.unlink()
    file.with_name("state.pt.part").write_bytes(b"half")
    start("--resume", folder / "damaged")
    assert outcome(folder / "damaged") == undisturbed


def test_a_run_of_which_something_has_changed_is_refused(folder, undisturbed, monkeypatch):
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        start(*options(folder, "odd"))
    run = folder / "odd"

    def refused(match, *typed, file=run / "config.json", change=lambda text: text):
        text = file.read_text()
        file.write_text(change(text))
        assert typed or file.read_text() != text
        with pytest.raises((DataError, OSError), match=match):
            start("--resume", run, *typed)
        file.write_text(text)

    def replaced(old, new):
        return {"change": lambda text: text.replace(old, new, 1)}

    refused("--resume: expected no option beside it, since the run has its own, found --lr", "--lr", "1")
    refused("--resume: expected --judge none, as the run had, found x; leave --judge out, or start anew with another judge: --out OTHER", "--judge", "x")
    refused("config.json: judged by http://127.0.0.1:9/v1; to ask this server again, type --judge http://127.0.0.1:9/v1",
            **replaced('"judge": "none"', '"judge": "http://127.0.0.1:9/v1"'))
    refused("config.json: lr: expected float or NoneType, found 'high'", **replaced('"lr": 0.002', '"lr": "high"'))
    refused("--lr: expected at least 1e-09, found -1", **replaced('"lr": 0.002', '"lr": -1'))
    refused("expected computed_in as .*odd was started with, float64, found float32",
            **replaced('"computed_in": "float32"', '"computed_in": "float64"'))
    other_state = "state.pt: expected the state of a run, found one of other data or options than the run has now; delete it"
    refused(other_state, **replaced('"beta_min": 0.1', '"beta_min": 0.0'))
    refused(other_state, file=run / "risk.jsonl", **replaced('"risk": 0.0', '"risk": 0.5'))
    refused("expected data_sha256 as .*odd was started with, .* it has changed since", file=folder / "data.jsonl",
            change=lambda text: text + text.splitlines(keepends=True)[0])
    for fact in ("model_sha256", "template_sha256", "sets_sha256"):
        refused(f"expected {fact} as .*odd was started with, 0, found .* it has changed since",
                change=lambda text: json.dumps(json.loads(text) | {fact: "0"}))
    refused("risk.jsonl: expected a risk for each conversation, found none[^$]*to go on: python train.py --resume", file=run / "risk.jsonl",
            change=lambda text: "".join(text.splitlines(keepends=True)[1:]))
    refused("metrics.jsonl: expected 3 lines, found 1", file=run / "metrics.jsonl", change=lambda text: text[:40])
    with pytest.raises(ValueError, match="none_such/config.json: not found"):
        start("--resume", folder / "none_such")
    start("--resume", run)
    assert outcome(run) == undisturbed
    with pytest.raises(DataError, match="--resume: expected an unfinished run, found .*results.json"):
        start("--resume", run)


def test_a_second_process_at_one_run_is_refused(folder, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    stop_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        start(*options(folder, "locked"))
    with open(folder / "locked" / "config.json") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="locked: expected a run that no process works on"):
            start("--resume", folder / "locked")


def test_a_run_that_was_killed_in_its_first_stage_may_be_started_anew(folder):
    fcntl = pytest.importorskip("fcntl")
    (folder / "early").mkdir()
    (folder / "early" / "config.json").write_text('{"sets_sha256": "x"}')
    with open(folder / "early" / "config.json") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="early: expected a run that no process works on"):
            start(*options(folder, "early"))
    start(*options(folder, "early"))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "file").touch()
    for name in ("early", "model", "file"):
        with pytest.raises(DataError, match="--out: expected a folder that does not exist"):
            start(*options(folder, name))
    assert (folder / "model" / "config.json").exists()


def test_runs_that_start_together_take_different_folders(tmp_path):
    barrier, paths = threading.Barrier(8), []

    def take():
        barrier.wait()
        paths.append(new_folder(None, str(tmp_path / "runs" / "sft-0")))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in paths) == ["sft-0", *(f"sft-0-{i}" for i in range(2, 9))]
    with pytest.raises(DataError, match="--out: expected a folder that does not exist"):
        new_folder(paths[0], "x")


def mount(path, kilobytes, *more):
    """Mount a disk of this size. Returns whether that is permitted."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join((*more, f"size={kilobytes}k")), "tmpfs", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


FILES = ("verdicts.sqlite", "risk.jsonl", "anchors.jsonl", "reference", "metrics.jsonl", "state.pt", "adapter", "run/model",
         "completions_after.jsonl", "results.json", "config.json")


def test_a_full_disk_is_an_error_that_names_a_file_and_with_room_the_run_goes_on(folder, tmp_path, monkeypatch):
    """Disks of ever more room hold the run with its reference and, in the working directory, the verdicts."""
    disk, full_at, enough = tmp_path / "disk", [], False
    disk.mkdir()
    run = disk / "run"
    more = ["--risk", "critic", "--judge", WORLD / "judge", "--epochs", "1", "--ref", "keep", "--anchor-share", "0.2"]
    monkeypatch.chdir(tmp_path)
    start(*options(folder, "roomy", *more))
    sizes = iter((4, 60, 300, 1500, 9000))
    while not enough:
        if not mount(disk, next(sizes)):
            pytest.skip("needs the right to mount a small disk")
        try:
            monkeypatch.chdir(disk)
            typed = options(folder, "unused", *more, "--out", run)
            try:
                start(*typed)
                enough = True
            except (DataError, OSError) as error:
                assert any(words in str(error) for words in ("No space left", "is full", "of room")), error
                full_at.append(next(name for name in FILES if name in str(error)))
                assert not list(disk.rglob("*.part")) and mount(disk, 64_000, "remount")
                start(*(["--resume", run] if (run / "config.json").exists() else typed))
            assert outcome(run) == outcome(folder / "roomy")
        finally:
            monkeypatch.chdir(tmp_path)
            subprocess.run(["umount", "-l", str(disk)], check=True)
    print(f"full disks survived at {full_at}")
    assert len(set(full_at)) >= 4
