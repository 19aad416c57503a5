"""One thread, and the project's root on the path."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

from data.conversations import WORLD
from model import add_lora, load_model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


def policy(path=WORLD / "model", adapter=0.05, dtype=torch.float32):
    """A checkpoint with adapters that already do something."""
    model = load_model(path, dtype=dtype)
    add_lora(model, 8, 16)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * adapter
    return model
