"""The risk of an example: a number in [0, 1], 1 where it is unknown. Rules, report, and files of risks."""

import math
from pathlib import Path

import torch

from data.chat import Example
from data.conversations import FORMATS, Conversation, conversation_of
from lib.cli import printable
from lib.files import DataError, read_rows

UNKNOWN = 1.0  # an unknown risk counts as the highest


def as_risk(value, where: str) -> float:
    """Return a risk in [0, 1] from a JSON value; null and NaN are UNKNOWN.

    Raises DataError that names `where` for anything else: true, "0", −1, 7, ∞.
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise DataError(f"{where}: expected a risk: a number from 0 to 1, or null, found {str(value)[:60]!r}")
    return float(value)


def print_risk(risk: torch.Tensor, conversations: list[Conversation]) -> None:
    """Print the risk of each `source`: a benign task that counts as risky would not be learned."""
    sources = [printable(str(c.meta.get("source", "all examples"))) for c in conversations]
    for source in sorted(set(sources)):
        values = risk[[s == source for s in sources]]
        print(f"  risk of {source}: mean {values.mean():.3f}, "
              f"from {values.min():.3f} to {values.max():.3f} (n = {len(values)})")


def row_hash(row: dict, where: str) -> str:
    """Return the hash of the conversation that a row of a risk file is about: its own, or else its "hash"."""
    texts = {"messages", "conversations", *(prompt for prompt, _ in FORMATS)}
    if texts & row.keys():
        return conversation_of(row, where, need="answer").hash
    if not isinstance(row.get("hash"), str):
        raise DataError(f'{where}: expected a conversation or its "hash" beside the risk, found neither')
    return row["hash"]


def read_risk(path: Path, examples: list[Example]) -> list[float]:
    """Return the risk of each example from a JSON Lines file; rows are joined by content, not by position.

    A row has "risk", 0 … 1 or null, and a conversation or its "hash"; of several rows on one conversation the
    riskiest counts. Unknown, hence 1, is null, NaN, a row whose "valid" is not true, and the risk of an
    example whose tokens hold another text than its record, because it was cut or the tokenizer normalizes.
    Rows of other conversations are left out. Raises DataError for an example without a row, and for other
    risks.
    """
    risks = {}
    n_rows = 0
    n_unknown = 0
    for where, row in read_rows(path):
        if "risk" not in row:
            raise DataError(f'{where}: expected {{"risk": number from 0 to 1, …}}, found {str(row)[:60]}')
        key = row_hash(row, where)
        value = row["risk"] if row.get("valid", True) is True else None
        n_rows += 1
        n_unknown += value is None or value != value
        risks[key] = max(as_risk(value, where), risks.get(key, 0.0))
    for example in examples:
        if example.training_text.hash not in risks and example.conversation.hash not in risks:
            raise DataError(f"{path}: expected a risk for each conversation, found none for "
                            f"{example.conversation.where}")
    known = {e.conversation.hash for e in examples} | {e.training_text.hash for e in examples}
    if others := len(risks.keys() - known):
        print(f"{path}: {others} of {len(risks)} conversations are not in the training data: left out")
    n_other = sum(example.training_text.hash not in risks for example in examples)
    if n_unknown:
        print(f"{n_unknown} of {n_rows} risks are unknown: taken as 1")
    if n_other:
        print(f"{n_other} of {len(examples)} examples hold less or other text than the file judged: taken as 1")
    return [risks.get(example.training_text.hash, UNKNOWN) for example in examples]
