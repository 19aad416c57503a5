"""Records of a file → Conversation: read, checked, brought into one form, split by prompt."""

import csv
import io
import json
import random
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from lib.files import DataError, json_lines, parse_json, read_text

WORLD = Path(__file__).parent / "world"  # the embedded model and its data sets, made by build.py
FORMATS = (  # keys of the user's and the assistant's words in a record; the first pair that fits is taken
    ("prompt", "response"), ("prompt", "completion"), ("user", "answer"), ("question", "answer"),
    ("goal", "target"), ("instruction", "output"),
)
MOST_MESSAGES, MOST_TEXT = 1000, 1 << 20  # of a record; characters: more than any model's context


@dataclass(frozen=True)
class Conversation:
    """A checked record. `messages`: dicts of role (system, user, assistant) and content."""

    messages: tuple
    where: str = "?"  # "file:line", for errors
    meta: dict = field(default_factory=dict)  # the record as it was read: harmful, source, …

    @property
    def prompts(self) -> list[list[dict]]:
        """The messages before each assistant turn, and all of them where a user's turn is the last."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        turns += [len(self.messages)] * (self.messages[-1]["role"] != "assistant")
        return [list(self.messages[:i]) for i in turns]

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the messages as JSON, each without white space around it."""
        messages = [[message["role"], message["content"].strip()] for message in self.messages]
        return sha256(json.dumps(messages).encode()).hexdigest()

    @property
    def answer(self) -> str | None:
        """The last assistant turn, where it ends the conversation: the reference answer of an evaluation."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else None


# ---------------------------------------------------------------- reading


def is_embedded(path: Path) -> bool:
    """Whether a file or folder is part of the embedded world: some defaults make sense only there."""
    return WORLD.resolve() in Path(path).resolve().parents


def read_conversations(path, need: str = "prompt") -> list[Conversation]:
    """Read a file. `need`: "prompt", "answer" (an assistant turn at the end) or "harmful" (true or false).

    .jsonl: an object a line; .json: a list of objects (both: `messages`, or a pair of FORMATS' keys, Alpaca's
    `input` added to its `instruction`); .csv: a header with such a pair (AdvBench: goal, target); .txt: a
    prompt a line. Raises DataError at the first bad line, and for an empty file.
    """
    return [conversation_of(record, where, need) for where, record in read_records(path)]


def read_records(path) -> list[tuple[str, dict]]:
    """("file:line", record as it stands there) of a file. Raises DataError, for an empty one too."""
    path = Path(path)
    readers = {".jsonl": json_lines, ".json": _json_list, ".csv": _csv_rows, ".txt": _lines}
    text = read_text(path)
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a file ending in {', '.join(readers)}, "
                        f"found {path.suffix or 'no ending'}")
    found = [(f"{path}:{line}", record) for line, record in readers[path.suffix](text, path)]
    if not found:
        raise DataError(f"{path}: expected at least one conversation, found none")
    return found


def _json_list(text, path):
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON list of objects: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of objects, found {type(rows).__name__}")
    return enumerate(rows, 1)


def _csv_rows(text, path):
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: expected each column once, found {', '.join(names)}")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}:{reader.line_num}: expected {len(names)} columns "
                                f"({', '.join(names)})")
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: expected cells of ordinary size, "
                        f"found: {error}") from None


def _lines(text, path):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"messages": [{"role": "user", "content": line.strip()}]}


def conversation_of(record, where: str, need: str) -> Conversation:
    """One record, checked and brought into the one form; `need` as in read_conversations."""

    def fail(expected, found):
        raise DataError(f"{where}: expected {expected}, found {str(found)[:200]}")

    if not isinstance(record, dict):
        fail("an object", repr(record)[:60])
    if "messages" in record:
        messages = record["messages"]
    else:
        pair = next((pair for pair in FORMATS
                     if pair[0] in record and (pair[1] in record or need != "answer")), None)
        if pair is None:
            fail("messages, or one of " + ", ".join("/".join(pair) for pair in FORMATS),
                 f"keys {sorted(record)}")
        alpaca, prompt = pair[0] == "instruction", record[pair[0]]
        for key in ("system", *["input"] * alpaca):
            if not isinstance(record.get(key), str | None):
                fail(f"text as {key}", repr(record[key])[:60])
        if alpaca and isinstance(prompt, str) and record.get("input"):
            prompt = f"{prompt}\n\n{record['input']}"
        messages = [{"role": "user", "content": prompt}]
        if record.get("system"):
            messages = [{"role": "system", "content": record["system"]}, *messages]
        if record.get(pair[1]) is not None:
            messages.append({"role": "assistant", "content": record[pair[1]]})
    if not isinstance(messages, list) or not messages:
        fail("messages: a list of {role, content}", repr(messages)[:60])
    if len(messages) > MOST_MESSAGES:
        fail(f"at most {MOST_MESSAGES} messages", len(messages))
    for i, message in enumerate(messages):
        if (not isinstance(message, dict) or not isinstance(message.get("role"), str)
                or not isinstance(message.get("content"), str)):
            fail(f"message {i + 1} as {{role, content}}, both text", repr(message)[:60])
        if message["role"] not in ("system", "user", "assistant"):
            fail(f"message {i + 1} with role system, user or assistant", repr(message["role"]))
        if message["role"] == "system" and i > 0:
            fail("a system message only at the start", f"one as message {i + 1}")
        if not message["content"].strip() and message["role"] != "system":
            fail(f"text in message {i + 1} ({message['role']})", "none")
        if message["content"].encode("utf-8", "ignore").decode() != message["content"]:
            fail(f"valid Unicode in message {i + 1}", "half of a surrogate pair")
    if (length := sum(len(message["content"]) for message in messages)) > MOST_TEXT:
        fail(f"at most {MOST_TEXT:,} characters", f"{length:,}")
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2) or not turns:
        fail("user and assistant taking turns, the user first", " ".join(turns) or "no turn")
    if need == "answer" and turns[-1] != "assistant":
        fail("an assistant turn at the end", f"a {turns[-1]} turn")
    if need == "harmful" and not isinstance(record.get("harmful"), bool):
        fail("harmful: true or false", repr(record.get("harmful")))
    return Conversation(tuple({"role": m["role"], "content": m["content"]} for m in messages), where, record)


def split_by_prompt(conversations: list[Conversation], fractions=(0.6, 0.2, 0.2),
                    seed: int = 0) -> list[list[Conversation]]:
    """Deterministic splits, each class (`harmful`) divided alike; one prompt's conversations stay together.

    Raises DataError where the same prompt is labelled both ways, or a split would lack a class.
    """
    groups = {}
    for conversation in conversations:
        groups.setdefault(json.dumps(conversation.prompts[-1]), []).append(conversation)
    splits = [[] for _ in fractions]
    for harmful in (False, True):
        keys = sorted(key for key, group in groups.items() if group[0].meta["harmful"] == harmful)
        random.Random(seed).shuffle(keys)
        ends = [round(sum(fractions[: i + 1]) * len(keys)) for i in range(len(fractions))]
        for split, start, end in zip(splits, [0, *ends], ends):
            if start == end:
                file, kind = conversations[0].where.rpartition(":")[0], "harmful" if harmful else "benign"
                raise DataError(f"{file}: expected enough distinct {kind} prompts for splits of {fractions}, "
                                f"found {len(keys)}")
            for key in keys[start:end]:
                if odd := [c for c in groups[key] if c.meta["harmful"] != harmful]:
                    raise DataError(f"{odd[0].where}: expected harmful = {harmful} as in "
                                    f"{groups[key][0].where} (same prompt), found {not harmful}")
                split += groups[key]
    return splits
