"""One thread, and the project's root on the path."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)
