"""A file of risks → the risk of each conversation, joined by what rows say, never by where they stand."""

from pathlib import Path

from data.conversations import Conversation, conversation_of
from lib.files import DataError, json_lines, read_text
from lib.risk import as_risk

BARE = {"risk", "valid", "score", "probe", "critic", "where"}  # keys that name no conversation


def read_risk(path: Path, conversations: list[Conversation], by_line: bool = False) -> dict[str, float]:
    """{conversation.hash: risk} from JSONL rows of "risk", 0 … 1 or null, and a conversation or its "hash".

    Null, NaN and a row whose "valid" is not true are unknown: 1. by_line: rows name no conversation and are
    taken in their order. Raises DataError for a row of no conversation here, a conversation without a row,
    rows that differ about one conversation, and for what is not a risk.
    """
    rows, known = list(json_lines(read_text(path), path)), {c.hash: c for c in conversations}
    found, unknown = {}, 0
    if by_line and len(rows) != len(conversations):
        raise DataError(f"{path}: expected {len(conversations)} risks, one a conversation, found {len(rows)}")
    for number, (line, row) in enumerate(rows):
        where = f"{path}:{line}"
        if not isinstance(row, dict) or "risk" not in row:
            raise DataError(f'{where}: expected {{"risk": number from 0 to 1, …}}, found {str(row)[:60]}')
        if by_line:
            key = conversations[number].hash
        elif "hash" in row:
            key = row["hash"]
        elif row.keys() <= BARE:
            raise DataError(f'{where}: expected a conversation or its "hash" beside the risk, found none '
                            f"(--risk-by-line takes the rows in their order)")
        else:
            key = conversation_of(row, where, need="answer").hash
        if not isinstance(key, str) or key not in known:
            file = conversations[0].where.rpartition(":")[0]
            raise DataError(f"{where}: expected a conversation of {file}, found another one")
        value = row["risk"] if row.get("valid", True) is True else None
        risk, unknown = as_risk(value, where), unknown + (value is None or value != value)
        if found.setdefault(key, risk) != risk:
            raise DataError(f"{where}: expected risk {found[key]}, as an earlier row says of the same "
                            f"conversation, found {risk}")
    if missing := [c for key, c in known.items() if key not in found]:
        raise DataError(f"{path}: expected a risk for each conversation, found none for {missing[0].where}"
                        + f" and {len(missing) - 1} others" * (len(missing) > 1))
    if unknown:
        print(f"{unknown} of {len(rows)} risks are unknown: taken as 1")
    return found
