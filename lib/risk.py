"""What a risk may be: the one rule for probe, judges, files and kept verdicts."""

import math

import torch

from data.conversations import Conversation
from lib.cli import printable
from lib.files import DataError

UNKNOWN = 1.0  # what is not known counts as fully risky


def as_risk(value, where: str) -> float:
    """A risk in [0, 1] from a JSON value: a number, or null or NaN, which are UNKNOWN.

    Raises DataError, naming `where`, for anything else: true, "0", −1, 7, ∞.
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise DataError(f"{where}: expected a risk: a number from 0 to 1, or null, found {str(value)[:60]!r}")
    return float(value)


def expect_risks(risk: torch.Tensor) -> torch.Tensor:
    """`risk` (N,) as it is. Raises DataError unless all of it is in [0, 1]; NaN is not."""
    if not bool(((risk >= 0) & (risk <= 1)).all()):
        raise DataError(f"expected risks from 0 to 1, found {risk.min().item()} to {risk.max().item()}")
    return risk


def print_risk(risk: torch.Tensor, conversations: list[Conversation]) -> None:
    """Risk by `source`, where records have one: a whole benign task taken as risky would not be learned."""
    sources = [printable(str(c.meta.get("source", "all examples"))) for c in conversations]
    for source in sorted(set(sources)):
        values = risk[[s == source for s in sources]]
        print(f"  risk of {source}: mean {values.mean():.3f}, "
              f"from {values.min():.3f} to {values.max():.3f} (n = {len(values)})")
