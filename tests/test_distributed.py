"""Two processes on the CPU (gloo), started as a user starts them, give what one gives. Always on the CPU: two need two GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import probe
from conftest import read_rows, write_rows
from data.conversations import WORLD
from lib import distributed
from lib.cli import run
from lib.files import DataError
from train import TrainConfig, complete_options

ROOT = Path(__file__).parent.parent
CASES = {
    "csft": ["--method", "csft"],
    "live": ["--ref", "live", "--epochs", "2"],
    "kept, accumulated": ["--ref", "keep", "--accumulation", "2", "--batch-size", "3"],
}
if torch.__version__ >= (2, 8):
    CASES |= {
        "fsdp, closed gate, checkpointing": [  # some examples need no reference
            "--fsdp", "--ref", "keep", "--gradient-checkpointing", "--beta-min", "0", "--beta-max", "1"],
        "fsdp, full": ["--fsdp", "--ref", "keep", "--lora-r", "0", "--lr", "1e-4"],
    }
STOPPED = list(CASES)[-1]  # this case is also stopped and resumed
EACH = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import evaluate
import train
from data.chat import IGNORE, Example
from lib import distributed
from lib.cli import parse, run
from lib.reference import kept_reference
from model import add_lora, compile_blocks, load_model
from train import TrainConfig
torch.set_num_threads(1)
out, n = Path(sys.argv[3]), int(os.environ.get("WORLD_SIZE", 1))
for options in json.loads(sys.argv[2]):
    train.main(parse(TrainConfig, options))
typed = "--limit 7 --samples 2 --max-new-tokens 8 --judge none --device cpu --task none --harmful".split()
typed += [sys.argv[1] + "/data/world/eval_harmful.jsonl", sys.argv[1] + "/data/world/model", "--out", str(out) + " evaluation"]
evaluate.main(parse(evaluate.EvalConfig, typed, positional="paths"))

# Two processes are interrupted, as torchrun does with all of them, and go on.
if n > 1:
    lr_at = train.lr_at
    def stopping_lr_at(step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        return lr_at(step, *rest)
    train.lr_at = stopping_lr_at
    stopped = options[options.index("--out") + 1] + " stopped"
    try:
        train.main(parse(TrainConfig, [*options, "--out", stopped, "--save-every", "1"]))
    except KeyboardInterrupt as error:
        print(*error.__notes__)
    train.lr_at = lr_at
    train.main(parse(TrainConfig, ["--resume", stopped]))

# Float32 adapters over bfloat16 weights, sharded and compiled where there are several processes.
model = load_model(sys.argv[1] + "/tests/golden/llama", dtype=torch.bfloat16)
model.model.layers = model.model.layers[:2]  # the first has a graph of its own, all others share one
add_lora(model, 4, 8)
lengths = (10, 20, 14, 9, 17, 11, 12, 16)
batch = [Example(i, list(range(3, 3 + n)), [IGNORE] * 4 + list(range(7, 3 + n))) for i, n in enumerate(lengths)]
config = TrainConfig(epochs=4, batch_size=8, lr=1e-2)
if n > 1:
    distributed.shard_model(model, "cpu")
distributed.on_rank_zero(out.mkdir)
reference = kept_reference(out / "reference.bin", model, batch, 8)
if n > 1:
    compile_blocks(model, backend="eager")
train.train(config, model, reference, config.baseline(8), batch, torch.linspace(0, 1, 8), out)
assert not torch._dynamo.utils.counters["graph_break"]
assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

if n > 1:  # as train.py ends for an error
    print("all done")
    sys.argv[1:] = ["--data", "nowhere.jsonl", "--device", "cpu"]
    sys.argv[0] = "train.py"
    run(train.main, TrainConfig)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run every case in one process and in two, by a script that runs one after the other: torch is imported once.

    18 examples in steps of 8: unequal responses, and a last step that begins a second epoch. Risks from 0 to 1.
    """
    folder = tmp_path_factory.mktemp("processes")
    rows = read_rows(WORLD / "mixed_10.jsonl")[:17]
    turns = zip(["user", "assistant"] * 2, ["Hi", "Hello there.", "1 + 1?", "2"])
    rows.insert(0, {"messages": [{"role": role, "content": content} for role, content in turns]})
    write_rows(folder / "data.jsonl", rows)
    write_rows(folder / "risk.jsonl", [row | {"risk": 0 if i % 3 else i / 18} for i, row in enumerate(rows)])
    (folder / "each.py").write_text(EACH)
    common = ["--data", folder / "data.jsonl", "--lr", "1e-3", "--epochs", "1", "--limit", "3", "--samples", "0", "--max-new-tokens", "8",
              "--harmful", WORLD / "eval_harmful.jsonl", "--benign", "none", "--judge", "none", "--no-eval-base", "--device", "cpu"]

    def options(case, n):
        typed = [option for option in CASES[case] if n == 2 or option != "--fsdp"]
        risk = [] if case == "csft" else ["--risk", folder / "risk.jsonl"]
        return [str(option) for option in (*common, *risk, *typed, "--out", folder / f"{case}-{n}")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(ROOT), json.dumps([options(case, 1) for case in CASES]), str(folder / "bfloat16-1")])
        exec(EACH, {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "each.py",
               ROOT, json.dumps([options(case, 2) for case in CASES]), folder / "bfloat16-2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert "all done" in done.stdout, done.stderr[-3000:]
    assert done.returncode != 0 and done.stderr.count("error: --data: expected a file") == 2  # both processes end with it
    assert done.stdout.count("per cent with 95 % intervals") == len(CASES) + 1  # the second process prints nothing
    assert f"to go on: python train.py --resume '{folder / STOPPED}-2 stopped'" in done.stdout
    return folder


def metrics_of(run):
    return read_rows(run / "metrics.jsonl")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_and_save_what_one_does(case, runs):
    one, two = (runs / f"{case}-{n}" for n in (1, 2))
    assert len(metrics_of(one)) == {"live": 5}.get(case, 3)
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        for key in ("loss", "nll", "kl", "grad_norm"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (a["step"], key)
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (one, two)]
    assert files[0] == files[1] and (one / "model" / "config.json").read_text() == (two / "model" / "config.json").read_text()
    for name in ("model/model.safetensors", *["adapter/adapter_model.safetensors"] * ("full" not in case)):
        tensors, others = load_file(one / name), load_file(two / name)
        assert tensors.keys() == others.keys()
        for key in tensors:
            torch.testing.assert_close(tensors[key], others[key], atol=2e-4, rtol=1e-3)
    completions = [(run / "completions_after.jsonl").read_text() for run in (one, two)]
    assert completions[0].count("\n") == 3 and completions[0] == completions[1]


def test_two_processes_that_are_interrupted_resume_to_the_same_bits(runs):
    rows = [metrics_of(runs / f"{STOPPED}-2{suffix}") for suffix in ("", " stopped")]
    assert [row | {"tokens_per_s": 0} for row in rows[0]] == [row | {"tokens_per_s": 0} for row in rows[1]]
    for name in ("model/model.safetensors", "completions_after.jsonl", "results.json"):
        assert (runs / f"{STOPPED}-2" / name).read_bytes() == (runs / f"{STOPPED}-2 stopped" / name).read_bytes()
    assert not (runs / f"{STOPPED}-2 stopped" / "state.pt").exists()


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="FSDP of two dtypes needs torch 2.8")
def test_fsdp_trains_float32_adapters_over_compiled_bfloat16_weights(runs):
    one, two = metrics_of(runs / "bfloat16-1"), metrics_of(runs / "bfloat16-2")
    assert len(one) == 4 and one[-1]["loss"] < one[0]["loss"]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_evaluation_in_two_processes_gives_the_same_responses_greedy_and_sampled(runs):
    completions = [(runs / f"bfloat16-{n} evaluation" / "completions.jsonl").read_text() for n in (1, 2)]
    assert completions[0] == completions[1] and completions[0].count("\n") == 7 * 3 + 7 * 2


def test_a_script_that_runs_in_one_process_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["probe.py"])
    with pytest.raises(SystemExit, match="error: expected one process for probe.py: only train.py and evaluate.py"):
        run(probe.main, probe.ProbeConfig)


@pytest.mark.parametrize("world, wrong, words", [
    (1, dict(fsdp=True), "--fsdp: expected several processes"),
    (2, dict(fsdp=True, ref="live"), "--ref: expected auto or keep with --fsdp"),
    (2, dict(batch_size=3), "--batch-size: expected times --accumulation a multiple of the 2 processes, found 3"),
    (2, dict(device="cuda:1"), "--device: expected cpu or cuda for several processes"),
])
def test_what_several_processes_cannot_share_is_refused(world, wrong, words, monkeypatch):
    monkeypatch.setattr("lib.options.world_size", lambda: world)
    with pytest.raises(DataError, match=words):
        complete_options(TrainConfig(**wrong))


def test_with_one_process_every_collective_is_the_identity(device):
    ones = torch.ones(4, device=device)
    parameter = torch.nn.Parameter(ones.clone())
    parameter.grad = 3 * ones
    assert distributed.sum_and_clip([parameter], 2.0) == 6.0 and torch.allclose(parameter.grad, ones)
    assert distributed.sum_and_clip([parameter], 100.0) == pytest.approx(2.0) and torch.allclose(parameter.grad, ones)
    assert distributed.all_gather([1]) == [[1]] and distributed.on_rank_zero(lambda: 5) == 5
    with pytest.raises(KeyError):
        distributed.on_rank_zero(lambda: {}["x"])
