"""A run that is killed, stopped or out of room goes on, and ends as if nothing had happened."""

import json
import multiprocessing
import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import DEVICE
from data.conversations import WORLD
from lib import resume
from lib.cli import parse
from lib.files import DataError, new_folder
from train import TrainConfig, main

ROOT = Path(__file__).parent.parent
EVERY_STEP = "1e-9"  # minutes
DAMAGE = {"cut": lambda data: data[: len(data) // 2], "flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
          "empty": lambda data: b""}


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as a terminal's programs have it; a shell's background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and risks of all sizes for runs of a second or two."""
    folder = tmp_path_factory.mktemp("resume")
    lines = (WORLD / "mixed_10.jsonl").read_text().splitlines()[:32]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "risk.jsonl").write_text("".join(f'{{"risk": {0 if i % 3 else i / 32}}}\n' for i in range(32)))
    return folder


def options(folder, name, *own, minutes=EVERY_STEP):
    """A run's command line."""
    every = ["--data", folder / "data.jsonl", "--ref-cache", folder / "ref", "--device", DEVICE,
             "--epochs", "6", "--batch-size", "4", "--lora-r", "2", "--limit", "3", "--samples", "1", "--max-new-tokens", "8",
             "--lookalike", "none", "--task", "none", "--attacked", "none", "--judge", "none", "--out", folder / name, "--save-every", minutes]
    risk = [] if "sft" in own or "csft" in own or "lisa" in own or "--risk" in own else ["--risk", folder / "risk.jsonl", "--risk-by-line"]
    return [str(option) for option in (*every, *risk, *own)]


def start(*typed):
    main(parse(TrainConfig, [str(option) for option in typed]))


def outcome(run):
    """All that a finished run is, but for its place and its speed."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())
    for row in metrics:
        del row["tokens_per_s"]
    same = {name: (run / name).read_bytes() for name in files if name not in ("metrics.jsonl", "config.json", "adapter/adapter_config.json")}
    return files, metrics, same


def stop_at(monkeypatch, step, how):
    """Have something happen in that step of the next loop, once."""
    done, before = [], train.lr_at

    def lr_at(now, *rest):
        if now == step and not done:
            done.append(how())
        return before(now, *rest)

    monkeypatch.setattr(train, "lr_at", lr_at)


CASES = {
    "adaptive": [], "probe and base": ["--risk", "probe", "--epochs", "1"], "anchors": ["--anchor-share", "0.2"],
    "batch gate": ["--gate", "batch", "--ema", "0.7"], "live reference": ["--ref", "live"], "full": ["--lora-r", "0", "--lr", "1e-4"],
    "csft": ["--method", "csft"], "lisa": ["--method", "lisa", "--anchor-share", "0.3", "--epochs", "12"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_stopped_after_a_step_ends_as_if_it_had_not_been(case, folder, monkeypatch, capsys):
    start(*options(folder, f"whole {case}", *CASES[case], minutes="0"))
    for step, which in ((2, signal.SIGTERM), (7 if case != "lisa" else 60, signal.SIGINT)):
        stop_at(monkeypatch, step, lambda: os.kill(os.getpid(), which))
        with pytest.raises(KeyboardInterrupt) as stopped:
            start(*(options(folder, case, *CASES[case], minutes="10") if step == 2 else ("--resume", folder / case)))
        assert stopped.value.__notes__ == [f"to go on: python train.py --resume {shlex.quote(str(folder / case))}"]
        assert [file.stem for file in (folder / case / "steps").iterdir()][-1:] and not (folder / case / "results.json").exists()
    capsys.readouterr()
    start("--resume", folder / case)
    assert f"going on after step {step + 1}, from {folder / case}/steps/" in capsys.readouterr().out
    assert outcome(folder / case) == outcome(folder / f"whole {case}")


def test_a_process_that_is_killed_at_any_moment_goes_on_to_the_bit(folder, monkeypatch):
    """kill -9 of real processes, at random and while a state is being written, until a run is complete; then another run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.chdir(ROOT)
    context, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    context.set_forkserver_preload(["train"])
    own, killed, in_a_save, runs = ["--anchor-share", "0.2", "--gate", "batch", "--ema", "0.5"], 0, 0, 0
    start(*options(folder, "undisturbed", *own))
    latest = time.monotonic() + 400
    while killed < 24 or in_a_save < 6:
        out, runs = folder / f"killed-{runs}", runs + 1
        while not (out / "results.json").exists():
            if out.exists() and not (out / "config.json").exists():
                out.rename(folder / f"empty-{killed}")  # killed between the folder and its first file
            child = context.Process(target=start, args=["--resume", str(out)] if out.exists() else options(folder, out.name, *own))
            child.start()
            enough, aimed = killed >= 24 and in_a_save >= 6, killed % 3 == 0
            deadline, seen, goal = time.monotonic() + draw.uniform(0, 3), set(), draw.randint(2, 14)
            while child.is_alive() and (enough or aimed or time.monotonic() < deadline):
                time.sleep(0.0002 if aimed else 0.01)
                parts = {part.name for part in out.glob("steps/*.part")} if aimed and not enough else set()
                seen |= parts
                if parts and len(seen) > goal:
                    break
            if child.is_alive():
                child.kill()
                child.join()
                killed, in_a_save = killed + 1, in_a_save + bool(list(out.glob("steps/*.part")))
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL) and time.monotonic() < latest
        assert not list(out.rglob("*.part")) and outcome(out) == outcome(folder / "undisturbed")
    print(f"{killed} kills survived, {in_a_save} of them in a save, {runs} runs")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named_and_the_one_before_it_used(damage, folder, monkeypatch, capsys):
    name, spoil = f"damaged {damage}", DAMAGE[damage]
    stop_at(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        start(*options(folder, name))
    older, newest = sorted((folder / name / "steps").iterdir())
    assert (older.stem, newest.stem) == ("00000005", "00000006")
    newest.write_bytes(spoil(newest.read_bytes()))
    (folder / name / "steps" / "00000007.safetensors.part").write_bytes(b"half")
    start("--resume", folder / name)
    said = capsys.readouterr().out
    assert f"{newest}: expected a state of training" in said and f"going on after step 5, from {older}" in said
    if not (folder / "whole").exists():
        start(*options(folder, "whole"))
    assert outcome(folder / name) == outcome(folder / "whole")


def test_what_cannot_be_gone_on_with_is_refused(folder, monkeypatch):
    stop_at(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        start(*options(folder, "odd"))
    run, data = folder / "odd", (folder / "data.jsonl").read_text()
    config = (run / "config.json").read_text()

    def refused(match, *typed):
        with pytest.raises((DataError, OSError), match=match):
            start("--resume", run, *typed)

    refused("--resume: expected no option beside it, since the run has its own, found --lr", "--lr", "1")
    refused("--resume: expected no --judge, found x", "--judge", "x")
    (folder / "data.jsonl").write_text(data + data.splitlines()[0] + "\n")
    refused("expected data_sha256 as .*odd was started with, .* it has changed since")
    (folder / "data.jsonl").write_text(data)
    (run / "config.json").write_text(config.replace('"judge": "none"', '"judge": "http://127.0.0.1:9/v1"'))
    refused("--resume: expected --judge http://127.0.0.1:9/v1, as the run had, found none")
    (run / "config.json").write_text(config.replace('"lr": 0.002', '"lr": -1'))
    refused("--lr: expected above 0, found -1")
    (run / "config.json").write_text(config.replace('"lr": 0.002,', ""))
    refused("config.json: expected the options of a run of train.py, found no lr")
    (run / "config.json").write_text(config.replace('"beta_min": 0.1', '"beta_min": 0.0'))
    refused("steps/00000004.safetensors: expected a state of this model, data and options, found one of others")
    (run / "config.json").write_text(config.replace('"computed_in": "float32"', '"computed_in": "float64"'))
    refused("config.json: computed_in: expected float32 or bfloat16, found 'float64'")
    (run / "config.json").write_text(config)
    with open(run / "config.json") as held:
        resume.expect_alone(held)
        refused("odd: expected a run that no process is at, found one at it")
    rows = (run / "risk.jsonl").read_text()
    (run / "risk.jsonl").write_text("".join(reversed(rows.splitlines(keepends=True))))
    refused("risk.jsonl: expected a row for each example of the data, found others")
    (run / "risk.jsonl").write_text(rows.replace('"risk": 0.0', '"risk": 0.5', 1))
    refused("steps/00000004.safetensors: expected a state of this model, data and options, found one of others")
    (run / "risk.jsonl").write_text(rows)
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics[:40])
    refused("metrics.jsonl: expected 4 lines, found 1")
    (run / "metrics.jsonl").write_text(metrics)
    start("--resume", run)
    refused("--resume: expected an unfinished run, found .*results.json")
    with pytest.raises(ValueError, match="none_such/config.json: not found"):
        start("--resume", folder / "none_such")


def test_a_second_signal_does_not_wait_and_a_signal_ends_the_wait_for_a_lock(folder, monkeypatch):
    progress = resume.Progress(folder, torch.nn.Linear(1, 1), None, 0, [], torch.zeros(0))
    progress.stop()
    with pytest.raises(KeyboardInterrupt):
        progress.stop()

    import fcntl

    own = ["--ref-cache", folder / "held", "--epochs", "2"]
    start(*options(folder, "keeps", *own))
    with open(next((folder / "held").iterdir()), "r+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        threading.Timer(3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            start(*options(folder, "waits", *own))


def test_two_runs_with_the_same_default_name_take_two_names(tmp_path):
    barrier, names = threading.Barrier(8), []

    def take():
        barrier.wait()
        names.append(new_folder(None, str(tmp_path / "runs" / "sft-0")))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in names) == ["sft-0", *(f"sft-0-{i}" for i in range(2, 9))]
    with pytest.raises(DataError, match="--out: expected a folder that does not exist"):
        new_folder(names[0], "x")


def mount(place, size, *more):
    return subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join((*more, f"size={size}k")), "tmpfs", str(place)], capture_output=True).returncode == 0


def test_a_full_disk_is_an_error_that_names_a_file_and_with_room_the_run_goes_on(folder, tmp_path, capsys):
    """A disk of ever more room, on which run, reference and verdicts are; the last attempt of each size has enough."""
    disk = tmp_path / "disk"
    disk.mkdir()
    own = ["--anchor-share", "0.2", "--ref-cache", disk / "ref", "--judge", WORLD / "judge", "--epochs", "2", "--ref", "cache"]
    start(*options(folder, "roomy", *own[:2], *own[6:]))
    failed, at = 0, set()
    for size in (4, 12, 24, 40, 60, 100, 200, 300, 500, 900, 1500, 2500, 4000, 6000, 8000, 12000):
        if not mount(disk, size):
            pytest.skip("mounts a small disk: needs the right to")
        try:
            try:
                start(*options(folder, "unused", *own, "--out", disk / "run"))
            except (DataError, OSError) as error:
                assert str(disk) in str(error) and any(word in str(error) for word in ("space", "full", "room")), error
                assert not list((disk / "run").rglob("*.part"))
                failed, at = failed + 1, at | {str(error).partition(str(disk))[2].strip("':/ ").partition(":")[0]}
                assert mount(disk, 64_000, "remount")
                start(*(["--resume", disk / "run"] if (disk / "run" / "config.json").exists() else options(folder, "unused", *own, "--out", disk / "run-2")))
            run = disk / ("run" if (disk / "run" / "results.json").exists() else "run-2")
            assert outcome(run) == outcome(folder / "roomy")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    print(f"{failed} full disks survived, at {sorted(at)}")
    assert failed >= 8 and len(at) >= 5


def test_a_reference_that_cannot_be_kept_runs_live_and_says_so(folder, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount(disk, 64_000):
        pytest.skip("mounts a disk that cannot be written: needs the right to")
    assert mount(disk, 64_000, "remount", "ro")
    try:
        start(*options(folder, "read-only", "--ref-cache", disk / "ref", "--epochs", "2"))
        assert "the reference runs in every step: [Errno 30] Read-only file system" in capsys.readouterr().out
        with pytest.raises(OSError, match="Read-only"):
            start(*options(folder, "must", "--ref-cache", disk / "ref", "--ref", "cache"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_processes_are_stopped_and_go_on_alike(folder, tmp_path):
    """torchrun gets SIGTERM in the middle; two processes go on, and end as two that were not stopped."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    own = ["--device", "cpu", "--ref", "cache", "--no-eval-base"] + (["--fsdp"] if torch.__version__ >= (2, 8) else [])

    def run(*typed, stop=False):
        process = subprocess.Popen([*command, *typed], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while stop and process.poll() is None:
            if (folder / "two" / "metrics.jsonl").exists() and len((folder / "two" / "metrics.jsonl").read_text().splitlines()) > 3:
                process.terminate()
                break
            time.sleep(0.02)
        return process.communicate(timeout=120)[0]

    run(*options(folder, "two", *own, "--epochs", "8", minutes="10"), stop=True)
    steps = sorted(int(file.stem) for file in (folder / "two" / "steps").iterdir())
    assert steps and 3 < steps[0] < 64
    said = run("--resume", str(folder / "two"))
    assert f"going on after step {steps[0]}, from" in said
    run(*options(folder, "two whole", *own, "--epochs", "8"))
    assert outcome(folder / "two") == outcome(folder / "two whole")
