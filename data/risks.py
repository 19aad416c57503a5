"""A file of risks → the risk of each example, joined by what rows say, never by where they stand."""

from pathlib import Path

from data.chat import Example
from data.conversations import FORMATS, Conversation, conversation_of
from lib.files import DataError, json_lines, read_text
from lib.risk import UNKNOWN, as_risk

TEXTS = {"messages", *(prompt for prompt, _ in FORMATS)}  # keys of a conversation


def hash_of(row: dict, where: str) -> str | None:
    """The conversation that a row names, by its "hash" or its texts. Raises DataError where they differ."""
    if not isinstance(row.get("hash"), str | None):
        raise DataError(f"{where}: hash: expected text, found {repr(row['hash'])[:60]}")
    named = {row["hash"]} if row.get("hash") else set()
    if TEXTS & row.keys():
        named.add(conversation_of(row, where, need="answer").hash)
    if len(named) > 1:
        raise DataError(f"{where}: expected the hash of the row's own conversation, found another one's")
    return next(iter(named), None)


def read_risk(path: Path, conversations: list[Conversation], examples: list[Example],
              by_line: bool = False) -> list[float]:
    """Risk of each example, from JSONL rows of "risk", 0 … 1 or null, and a conversation or its "hash".

    Unknown, hence 1, are null, NaN, a row whose "valid" is not true, and what is said of a conversation of
    which the tokens hold something else (a cut, a tokenizer that normalizes). by_line: rows may name nothing
    and are taken in their order. Raises DataError for a row of no conversation here, an example without a
    row, and for what is not a risk; of rows about the same conversation the riskiest counts.
    """
    rows, file = list(json_lines(read_text(path), path)), conversations[0].where.rpartition(":")[0]
    known = {c.hash for c in conversations} | {example.training_text.hash for example in examples}
    if by_line and len(rows) != len(conversations):
        raise DataError(f"{path}: expected {len(conversations)} risks, one a conversation, found {len(rows)}")
    found, unknown = {}, 0
    for number, (line, row) in enumerate(rows):
        where = f"{path}:{line}"
        if not isinstance(row, dict) or "risk" not in row:
            raise DataError(f'{where}: expected {{"risk": number from 0 to 1, …}}, found {str(row)[:60]}')
        key, place = hash_of(row, where), conversations[number].hash if by_line else None
        if key is None and not by_line:
            raise DataError(f'{where}: expected a conversation or its "hash" beside the risk, found none '
                            f"(--risk-by-line takes the rows in their order)")
        if key is not None and (key not in known or by_line and key != place):
            raise DataError(f"{where}: expected a conversation of {file}, found another one")
        value = row["risk"] if row.get("valid", True) is True else None
        risk, unknown = as_risk(value, where), unknown + (value is None or value != value)
        found[key or place] = max(risk, found.get(key or place, 0.0))  # of rows about the same conversation
    if unknown:
        print(f"{unknown} of {len(rows)} risks are unknown: taken as 1")
    if other := sum(example.training_text.hash not in found for example in examples):
        print(f"{other} of {len(examples)} examples hold less or other text than the file judged: taken as 1")
    for example in examples:
        if not {example.training_text.hash, example.conversation.hash} & found.keys():
            raise DataError(f"{path}: expected a risk for each conversation, found none for "
                            f"{example.conversation.where}")
    return [found.get(example.training_text.hash, UNKNOWN) for example in examples]


def risks_of_rows(rows: list[dict], examples: list[Example], file: Path) -> list[float]:
    """Risk of each example from a run's own risk.jsonl, in the order of both.

    Raises DataError where the hashes say that they are not of these examples.
    """
    if [row.get("hash") for row in rows] != [example.training_text.hash for example in examples]:
        raise DataError(f"{file}: expected a row for each example of the data, found others: what the run "
                        f"was started with has changed since")
    return [as_risk(row.get("risk"), str(file)) for row in rows]
