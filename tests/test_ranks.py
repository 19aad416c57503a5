"""Two processes on the CPU (gloo), started as a user starts them, against one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import WORLD, ranks

ROOT = Path(__file__).parent.parent
OPTIONS = ["--epochs", "1", "--limit", "5", "--samples", "1", "--no-compile", "--judge", "none"]


def start(processes, script, *options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(script), *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """34 examples in steps of 8: processes with unequal responses, and a last step of two. Risks of all sizes."""
    folder = tmp_path_factory.mktemp("data")
    lines = (WORLD / "mixed_10.jsonl").read_text().splitlines()[:33]
    turns = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello there."), ("user", "1 + 1?"), ("assistant", "2"))]
    (folder / "data.jsonl").write_text("\n".join([json.dumps({"messages": turns}), *lines]) + "\n")
    (folder / "risk.jsonl").write_text("".join(f'{{"risk": {0 if i % 3 else i / 34}}}\n' for i in range(34)))
    return ["--data", folder / "data.jsonl", "--risk", folder / "risk.jsonl", "--lr", "1e-3", "--ref-cache", folder / "ref"]


CASES = {
    "ddp": [],
    "ddp, cached, packed": ["--ref", "cache", "--max-tokens-per-batch", "90", "--accumulation", "2"],
    "fsdp": ["--fsdp", "--beta-min", "0", "--beta-max", "1"],  # with examples that need no reference
    "fsdp, cached": ["--fsdp", "--ref", "cache", "--gradient-checkpointing"],
    "fsdp, full": ["--fsdp", "--lora-r", "0", "--lr", "1e-4"],
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_and_save_what_one_does(case, data, tmp_path):
    for processes in (1, 2):
        options = [option for option in CASES[case] if processes == 2 or option != "--fsdp"]
        done = start(processes, "train.py", *OPTIONS, *data, *options, "--out", tmp_path / str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("per cent with 95 % intervals") == 1  # the others are silent
    one, two = (tmp_path / name for name in "12")
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "nll", "kl", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (a["step"], key)
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


BFLOAT16 = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from data import IGNORE, Example, ranks
from lora import add_lora
from model import compile_blocks, load_model
from train import TrainConfig, train
ranks.join()
model = load_model(sys.argv[1] + "/tests/golden/llama", dtype=torch.bfloat16)
add_lora(model, 4, 8)
if ranks.world() > 1:
    ranks.shard(model, "cpu")
compile_blocks(model, backend="aot_eager")
lengths = (10, 20, 14, 9, 17, 11, 12, 16)
batch = [Example(i, list(range(3, 3 + n)), [IGNORE] * 4 + list(range(7, 3 + n))) for i, n in enumerate(lengths)]
config = TrainConfig(epochs=4, batch_size=8, lr=1e-2)
train(config, model, None, batch, torch.linspace(0, 1, 8), sys.argv[2])
assert not torch._dynamo.utils.counters["graph_break"]
assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
ranks.leave()
"""


def test_fsdp_trains_float32_adapters_over_compiled_bfloat16_weights(tmp_path):
    (tmp_path / "script.py").write_text(BFLOAT16)
    rows = []
    for processes in (1, 2):
        done = start(processes, tmp_path / "script.py", ROOT, tmp_path / str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        rows.append([json.loads(line) for line in (tmp_path / str(processes)).read_text().splitlines()])
    assert len(rows[0]) == 4 and rows[0][-1]["loss"] < rows[0][0]["loss"]
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_evaluation_in_two_processes_gives_the_same_greedy_responses(tmp_path):
    options = ["--limit", "7", "--samples", "2", "--judge", WORLD / "judge", "--verdicts", tmp_path / "v.sqlite", "--eval-batch-size", "3"]
    found = []
    for processes in (1, 2):
        done = start(processes, "evaluate.py", WORLD / "model", *options, "--out", tmp_path / str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (tmp_path / str(processes) / "completions.jsonl").read_text().splitlines()
        found.append([row for line in lines if (row := json.loads(line))["decoding"] == "greedy"])
    assert found[0] == found[1] and "harmful" in found[0][0] and len(lines) == 7 * 3 + 7 * 4


@pytest.mark.parametrize(
    "script, options, words",
    [
        ("train.py", ["--data", "nowhere.jsonl"], "nowhere.jsonl: expected a file"),
        ("train.py", ["--out", WORLD], "--out: expected a folder that does not exist"),
        ("probe.py", [], "expected one process for probe.py: only train.py and evaluate.py"),
    ],
)
def test_what_is_wrong_ends_all_processes_with_its_line(script, options, words):
    done = start(2, script, *options)
    assert done.returncode != 0 and f"error: {words}" in done.stderr


def test_fsdp_alone_is_an_error():
    done = start(1, "train.py", "--fsdp")
    assert done.returncode == 1 and "--fsdp: expected several processes" in done.stderr


def test_one_process_is_its_own_company():
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 3.0)
    ranks.average_gradients([parameter])
    assert ranks.clip_gradients([parameter], 2.0).item() == 6.0 and torch.allclose(parameter.grad, torch.ones(4))
    assert ranks.clip_gradients([parameter], 100.0).item() == pytest.approx(2.0) and torch.allclose(parameter.grad, torch.ones(4))
    assert ranks.gather([1]) == [[1]] and ranks.on_first(lambda: 5) == 5 and ranks.all_true(True) and not ranks.all_true(False)
    with pytest.raises(KeyError):
        ranks.on_first(lambda: {}["x"])
