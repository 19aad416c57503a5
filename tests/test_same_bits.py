"""Same seed, same machine: the same bits, of every script, here and in another process whose sets have another order.

On the CPU: sums of a GPU may come in any order.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import critic
import evaluate
import probe
import train
from conftest import DEVICE
from critic import CriticConfig
from data.conversations import WORLD
from evaluate import EvalConfig
from probe import ProbeConfig
from train import TrainConfig

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="promised on the CPU")
ROOT = Path(__file__).parent.parent
EVALUATED = {"harmful": str(WORLD / "eval_harmful.jsonl"), "benign": "none", "task": "none", "limit": 3, "samples": 2, "max_new_tokens": 8}
TRAINED = {"data": Path("data.jsonl"), "epochs": 2, "batch_size": 4, "lora_r": 2, "judge": "none", **EVALUATED}
WRITTEN = {  # folder: what a script has to have written there
    "fitted": {"fitted/probe.safetensors"},
    "adaptive": {"adaptive/model/model.safetensors", "adaptive/adapter/adapter_model.safetensors", "adaptive/metrics.jsonl", "adaptive/risk.jsonl",
                 "adaptive/probe.safetensors", "adaptive/completions_base.jsonl", "adaptive/completions_after.jsonl", "adaptive/results.json"},
    "batch": {"batch/model/model.safetensors", "batch/adapter/adapter_model.safetensors", "batch/metrics.jsonl", "batch/anchors.jsonl"},
    "judged": {"judged/verdicts.jsonl"},
    "evaluation": {"evaluation/completions.jsonl", "evaluation/results.json"},
}


def run_all() -> None:
    """Every script, small, in the working directory; train.py with a probe that it fits, and with smoothed batches and anchors."""
    take = {"data.jsonl": ("mixed_30", slice(24)), "prompts.jsonl": ("probe", slice(None, None, 10)), "pairs.jsonl": ("judge_test", slice(12))}
    for name, (source, part) in take.items():
        Path(name).write_text("".join((WORLD / f"{source}.jsonl").read_text().splitlines(True)[part]))
    probe.main(ProbeConfig(data=Path("prompts.jsonl"), out=Path("fitted/probe.safetensors")))
    adaptive = TrainConfig(probe_data=Path("prompts.jsonl"), out=Path("adaptive"), **TRAINED)
    train.main(adaptive)
    train.main(replace(adaptive, out=Path("batch"), gate="batch", ema=0.5, ref="live", probe=Path("fitted/probe.safetensors"), anchor_share=0.25,
                       eval_base=False))
    critic.main(CriticConfig(data=Path("pairs.jsonl"), out=Path("judged/verdicts.jsonl"), judge=str(WORLD / "judge")))
    evaluate.main(EvalConfig(paths=(WORLD / "model",), out=Path("evaluation"), **EVALUATED))


def written(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return {folder: {file: bytes}} of what was written, without the time that steps took."""
    folders = {}
    for name in WRITTEN:
        files = {str(file.relative_to(folder)): file.read_bytes() for file in sorted((folder / name).rglob("*")) if file.is_file()}
        for file in [file for file in files if file.endswith("metrics.jsonl")]:
            rows = [json.loads(line) for line in files[file].splitlines()]
            files[file] = json.dumps([{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]).encode()
        folders[name] = files
    return folders


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What all scripts write: here, and in another process."""
    folders = [tmp_path_factory.mktemp(name) for name in ("here", "elsewhere")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folders[0])
        run_all()
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    code = "import conftest; from test_same_bits import run_all; run_all()"  # conftest: one thread, as here
    subprocess.run([sys.executable, "-c", code], cwd=folders[1], check=True, capture_output=True,
                   env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "1", "CUDA_VISIBLE_DEVICES": ""})
    return [written(folder) for folder in folders]


@pytest.mark.parametrize("folder", WRITTEN)
def test_the_same_bits_are_written(runs, folder):
    here, elsewhere = (files[folder] for files in runs)
    assert WRITTEN[folder] <= here.keys() == elsewhere.keys()
    assert [file for file in here if here[file] != elsewhere[file]] == []
