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

from data.conversations import WORLD
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
