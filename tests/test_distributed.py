"""Two processes on the CPU (gloo), started as a user starts them, against one; on the CPU under --device cuda too: two need two GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
from data.conversations import WORLD
from evaluate import EvalConfig
from lib import distributed
from lib.cli import parse
from lib.files import DataError
from train import TrainConfig, check

ROOT = Path(__file__).parent.parent
OPTIONS = ["--epochs", "1", "--limit", "5", "--samples", "1", "--compile", "off", "--judge", "none"]


def start(n, script, *options):
    """`script` in n processes, as a user starts it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    command = [sys.executable, *launcher, str(script), *map(str, options)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)


CASES = {
    "live": ["--ref", "live"],
    "cached, accumulated": ["--accumulation", "2", "--batch-size", "3"],
    "fsdp, closed gate, checkpointing": [  # some examples need no reference
        "--fsdp", "--gradient-checkpointing", "--beta-min", "0", "--beta-max", "1"],
    "fsdp, full": ["--fsdp", "--lora-r", "0", "--lr", "1e-4"],
    "csft": ["--method", "csft"],
}
EACH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from data.chat import IGNORE, Example
from lib import distributed
from lib.cli import parse
from model import add_lora, compile_blocks, load_model
from train import TrainConfig, main, reference_of, train
for options in json.loads(sys.argv[2]):
    main(parse(TrainConfig, options))

# Float32 adapters over bfloat16 weights, sharded and compiled where there are several processes.
model = load_model(sys.argv[1] + "/tests/golden/llama", dtype=torch.bfloat16)
model.model.layers = model.model.layers[:2]  # the first has a graph of its own, all others share one
add_lora(model, 4, 8)
lengths = (10, 20, 14, 9, 17, 11, 12, 16)
batch = [Example(i, list(range(3, 3 + n)), [IGNORE] * 4 + list(range(7, 3 + n))) for i, n in enumerate(lengths)]
config, risk = TrainConfig(epochs=4, batch_size=8, lr=1e-2, ref_cache=Path(sys.argv[3] + ".ref")), torch.linspace(0, 1, 8)
if distributed.world_size() > 1:
    distributed.shard_model(model, "cpu")
reference = reference_of(config, model, batch, risk)
if distributed.world_size() > 1:
    compile_blocks(model, backend="eager")
Path(sys.argv[3]).mkdir(exist_ok=True)
train(config, model, reference, batch, risk, Path(sys.argv[3]))
assert not torch._dynamo.utils.counters["graph_break"]
assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every case in one process and in two, which a script runs one after the other: torch is imported once.

    34 examples in steps of 8: unequal responses, and a last step that begins a second epoch. Risks of all sizes.
    """
    folder = tmp_path_factory.mktemp("processes")
    lines = (WORLD / "mixed_10.jsonl").read_text().splitlines()[:33]
    turns = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello there."), ("user", "1 + 1?"), ("assistant", "2"))]
    (folder / "data.jsonl").write_text("\n".join([json.dumps({"messages": turns}), *lines]) + "\n")
    (folder / "risk.jsonl").write_text("".join(f'{{"risk": {0 if i % 3 else i / 34}}}\n' for i in range(34)))
    (folder / "each.py").write_text(EACH + "distributed.destroy()\n")
    every = ["--data", folder / "data.jsonl", "--lr", "1e-3", "--ref-cache", folder / "ref", "--epochs", "1", "--limit", "5",
             "--samples", "0", "--max-new-tokens", "12", "--judge", "none", "--no-eval-base", "--device", "cpu"]

    def options(case, n):
        own = [option for option in CASES[case] if n == 2 or option != "--fsdp"]
        kept = [] if case in ("live", "csft") else ["--ref", "cache"]
        risk = [] if case == "csft" else ["--risk", folder / "risk.jsonl", "--risk-by-line"]
        return [str(option) for option in (*every, *kept, *risk, *own, "--out", folder / f"{case}-{n}")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(ROOT), json.dumps([options(case, 1) for case in CASES]), str(folder / "bfloat16-1")])
        exec(EACH, {})
    done = start(2, folder / "each.py", ROOT, json.dumps([options(case, 2) for case in CASES]), folder / "bfloat16-2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("per cent with 95 % intervals") == len(CASES)  # the second process is silent
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_and_save_what_one_does(case, runs):
    one, two = (runs / f"{case}-{n}" for n in (1, 2))
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(rows[0]) == (6 if "accumulated" in case else 5)
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "nll", "kl", "grad_norm"):
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (a["step"], key)
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (one, two)]
    assert files[0] == files[1] and (one / "model" / "config.json").read_text() == (two / "model" / "config.json").read_text()
    for name in ("model/model.safetensors", *["adapter/adapter_model.safetensors"] * ("full" not in case)):
        ours, theirs = load_file(one / name), load_file(two / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=2e-4, rtol=1e-3)
    greedy = [[(row["prompt"], row["response"]) for line in (run / "completions_after.jsonl").read_text().splitlines()
               if (row := json.loads(line))["decoding"] == "greedy"] for run in (one, two)]
    assert len(greedy[0]) == 15 and greedy[0] == greedy[1]


def test_fsdp_trains_float32_adapters_over_compiled_bfloat16_weights(runs):
    rows = [[json.loads(line) for line in (runs / f"bfloat16-{n}" / "metrics.jsonl").read_text().splitlines()] for n in (1, 2)]
    assert len(rows[0]) == 4 and rows[0][-1]["loss"] < rows[0][0]["loss"]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_evaluation_in_two_processes_gives_the_same_responses_greedy_and_sampled(tmp_path):
    options = [WORLD / "model", "--limit", "7", "--samples", "2", "--max-new-tokens", "16", 
               "--eval-batch-size", "3", "--device", "cpu"]
    evaluate.main(parse(EvalConfig, [*map(str, options), "--out", str(tmp_path / "1")], positional="paths"))
    done = start(2, "evaluate.py", *options, "--out", tmp_path / "2")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [(tmp_path / name / "completions.jsonl").read_text().splitlines() for name in "12"]
    found = [[json.loads(line) for line in file] for file in lines]
    assert found[0] == found[1] and "harmful" in found[0][0] and len(lines[1]) == 7 * 3 + 7 * 4


def test_what_is_wrong_ends_all_processes_with_its_line():
    done = start(2, "train.py", "--data", "nowhere.jsonl", "--device", "cpu")
    assert done.returncode != 0 and "error: nowhere.jsonl: expected a file" in done.stderr


def test_a_script_that_shares_no_work_is_refused_as_one_of_several():
    done = subprocess.run([sys.executable, "probe.py"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"RANK": "0", "WORLD_SIZE": "2"})
    assert done.returncode == 1 and "error: expected one process for probe.py: only train.py and evaluate.py" in done.stderr


@pytest.mark.parametrize("world, wrong, words", [
    (1, dict(fsdp=True), "--fsdp: expected several processes"),
    (2, dict(fsdp=True, ref="live"), "--ref: expected the kept reference, auto or cache, with --fsdp"),
    (2, dict(batch_size=3), "--batch-size: expected times --accumulation a multiple of the 2 processes, found 3"),
    (2, dict(device="cuda:1"), "--device: expected cpu or cuda for several processes"),
])
def test_what_several_processes_cannot_share_is_refused(world, wrong, words, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    with pytest.raises(DataError, match=words):
        check(TrainConfig(**wrong))


def test_one_process_is_its_own_company(device):
    ones = torch.ones(4, device=device)
    parameter = torch.nn.Parameter(ones.clone())
    parameter.grad = 3 * ones
    assert distributed.sum_and_clip([parameter], 2.0) == 6.0 and torch.allclose(parameter.grad, ones)
    assert distributed.sum_and_clip([parameter], 100.0) == pytest.approx(2.0) and torch.allclose(parameter.grad, ones)
    assert distributed.all_gather([1]) == [[1]] and distributed.on_rank_zero(lambda: 5) == 5 and distributed.all_true(True) and not distributed.all_true(False)
    with pytest.raises(KeyError):
        distributed.on_rank_zero(lambda: {}["x"])
