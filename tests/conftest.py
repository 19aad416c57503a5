"""One thread, the project's root on the path, and the device: `python -m pytest --device cuda` runs the models there."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from safetensors.torch import load_file

from data.chat import Chat, encode_examples
from data.conversations import WORLD, read_conversations
from lib import fused
from model import add_lora, load_model as load

torch.set_num_threads(1)

DEVICE = "cpu"  # of --device, set before any test module is imported
# Largest difference from an oracle, absolute and relative: on the CPU, and on a GPU, where TF32 is off.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.03, 0.03)}


def pytest_addoption(parser):
    """Add --device."""
    parser.addoption("--device", default=DEVICE, help="where the tests' models run: cpu, cuda, …")


def pytest_configure(config):
    """Set DEVICE, and hide the GPUs where it is the CPU."""
    global DEVICE
    DEVICE = config.getoption("--device")
    if DEVICE == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the scripts' default device is the CPU then, too
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        torch.empty(0, device=DEVICE)
    except (RuntimeError, AssertionError) as error:
        raise pytest.UsageError(f"--device {DEVICE}: {error}") from None


@pytest.fixture(scope="session")
def device() -> str:
    """Return DEVICE."""
    return DEVICE


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Run every test in a folder of its own: verdicts.sqlite is written to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch: every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chat():
    """Return the embedded model's chat."""
    return Chat(WORLD / "model")


@pytest.fixture(scope="session")
def world(chat):
    """Return the embedded model in float32, and its chat."""
    return load_model(WORLD / "model", dtype=torch.float32), chat


@pytest.fixture(scope="session")
def model():
    """Return the embedded model with adapters that already do something. Tests leave it as it is, but for gradients."""
    return policy()


@pytest.fixture(scope="session")
def examples(chat):
    """Return 24 examples of the embedded world, some of them harmful."""
    return encode_examples(chat, read_conversations(WORLD / "mixed_10.jsonl")[:24], 256)


def read_rows(file):
    """Return the values in a JSON Lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(file, rows):
    """Write a JSON Lines file; a row that is text is written as it is. Returns its path."""
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return file


def head(name, n, file):
    """Write the first n lines of a file of the embedded world into another one. Returns its path."""
    file.write_text("".join((WORLD / name).read_text().splitlines(True)[:n]))
    return file


def fast_token_loss(hidden, weight, labels, alpha, beta, ref_hidden, dtype=None):
    """Call fused_token_loss with the arguments of train.token_loss; `dtype` is that of the stored vectors."""
    terms = fused.reference_terms(ref_hidden, weight, labels[: len(ref_hidden)], dtype)
    return fused.fused_token_loss(hidden, weight, labels, alpha, beta, terms)


def load_model(path, device=None, dtype=None):
    """Call model.load_model, by default on DEVICE."""
    return load(path, device or DEVICE, dtype)


def policy(path=WORLD / "model", adapter=0.05, dtype=torch.float32):
    """Load a checkpoint with adapters that already do something."""
    model = load_model(path, dtype=dtype)
    add_lora(model, 8, 16)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * adapter).to(DEVICE)
    return model


def adapter_parameters(model):
    """Return the adapters' parameters by their names in PEFT's format."""
    return {f"base_model.model.{name}.weight": p for name, p in model.named_parameters() if ".lora_" in name}


def load_adapter(model, folder):
    """Put the adapters of a folder in PEFT's format, as save_adapter writes it, into a model."""
    config = json.loads((folder / "adapter_config.json").read_text())
    add_lora(model, config["r"], config["lora_alpha"])
    parameters, tensors = adapter_parameters(model), load_file(folder / "adapter_model.safetensors")
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        parameter.data = tensors[name].to(DEVICE)


def hidden_states(model, ids, mask=None):
    """Return the residual stream (L + 1, B, T, H), not normed, behind the embeddings and each block."""
    return torch.stack(model.model(ids, mask, pool=lambda x: x)[1])


def tolerance(dtype=torch.float32) -> float:
    """Return the entry of TOLERANCES for DEVICE."""
    return TOLERANCES[dtype][DEVICE != "cpu"]


def assert_near(actual, expected, dtype=torch.float32):
    """Compare two tensors within TOLERANCES, wherever they are."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), atol=tolerance(dtype), rtol=tolerance(dtype))
