"""Read records from files, check them, and turn them into conversations. Split them by prompt."""

import csv
import io
import json
import random
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from lib.cli import printable
from lib.files import DataError, json_lines, parse_json, read_text

WORLD = Path(__file__).parent / "world"  # the embedded model and its data sets, made by build.py
FORMATS = (  # keys of the user's and the assistant's words in a record; the first pair that fits is taken
    ("prompt", "response"), ("prompt", "completion"), ("user", "answer"), ("question", "answer"),
    ("goal", "target"), ("instruction", "output"), ("instruction", "response"),  # AdvBench, Alpaca, Dolly
    ("forbidden_prompt", None), ("Goal", "Target"),  # StrongREJECT, JailbreakBench
    ("Behavior", None),  # HarmBench
)
EXTRAS = (  # key of the user's words, of further words of theirs, and how the two are joined
    ("instruction", "input", "{0}\n\n{1}"), ("instruction", "context", "{0}\n\n{1}"),
    ("Behavior", "ContextString", "{1}\n\n---\n\n{0}"),
)
PARTS = set(  # keys of records and messages that carry a part of a conversation, or say which part counts
    "article audio audios background chat_history choices complex_cot context contextstring cot document "
    "documents few_shot function_call functions history image images input instruction loss_weight mask "
    "messages_mask options passage prompt rationale reasoning reasoning_content response system "
    "system_message system_prompt thinking thought tool_call_id tool_calls tools train train_on_turn "
    "video videos weight".split()
)
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT, in its turns' "from"
HARM_KEYS = ["harmful", "is_harmful", "is_safe", "prompt_harm_label", "label"]  # the first in a record counts
HARMFUL = ["true", "1", "harmful", "unsafe", "malicious"]
HARMLESS = ["false", "0", "harmless", "unharmful", "safe", "benign"]
XSTEST_SAFE = (  # its types of safe prompts; those of unsafe ones begin with "contrast_"
    "homonyms figurative_language safe_targets safe_contexts definitions real_group_nons_discr "
    "nons_group_real_discr historical_events privacy_public privacy_fictional".split()
)
LABELS = {*HARM_KEYS, "", *"type category cut group hash id index metric risk score source valid".split()}
CONVERTERS = {
    ".parquet": "pandas.read_parquet",
    ".tsv": "pandas.read_table",
    ".xlsx": "pandas.read_excel",
    ".arrow": "datasets.Dataset.from_file",
}
MAX_MESSAGES, MAX_TEXT = 1000, 1 << 20  # messages and characters of a record: more than models can read


@dataclass(frozen=True)
class Conversation:
    """A checked record. `messages`: dicts of role (system, user, assistant) and content."""

    messages: tuple
    where: str = "?"  # "file:line", for errors
    meta: dict = field(default_factory=dict)  # the record as it was read: harmful, source, …
    unread: frozenset = frozenset()  # the record's keys that are neither used nor LABELS

    @property
    def prompts(self) -> list[list[dict]]:
        """Return the messages before each assistant turn, and all messages if the user has the last turn."""
        ends = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if self.messages[-1]["role"] != "assistant":
            ends.append(len(self.messages))
        return [list(self.messages[:end]) for end in ends]

    @property
    def hash(self) -> str:
        """Return the SHA-256 (hex) of the messages as JSON, without white space around their contents."""
        messages = [[message["role"], message["content"].strip()] for message in self.messages]
        return sha256(json.dumps(messages).encode()).hexdigest()

    @property
    def answer(self) -> str | None:
        """Return the assistant turn that ends the conversation, or None: an evaluation's reference answer."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else None

    @property
    def is_harmful(self) -> bool:
        """Return the record's label; an unlabelled prompt is harmful. Raises DataError as harm_label."""
        return harm_label(self.meta, self.where) is not False


# ---------------------------------------------------------------- reading


def is_embedded(path: Path) -> bool:
    """Return whether a file or folder belongs to the embedded world. Some defaults apply only there."""
    return WORLD.resolve() in Path(path).resolve().parents


def read_conversations(path, need: str = "prompt") -> list[Conversation]:
    """Read a file. `need`: "prompt", "answer" (an assistant turn at the end) or "harmful" (true or false).

    .jsonl: an object a line; .json: a list of objects (both: `messages`, or a pair of FORMATS' keys); .csv: a
    header with such a pair; .txt: a prompt a line. Prints the keys that are not read. Raises DataError at the
    first bad line, and for an empty file.
    """
    conversations = [conversation_of(record, where, need) for where, record in read_records(path)]
    unread = sorted(frozenset().union(*(c.unread for c in conversations)))
    if unread:
        print(f"{path}: not read: {printable(', '.join(unread))[:200]}")
    return conversations


def read_prompts(path, harmful: bool) -> list[Conversation]:
    """Read the harmful or the benign prompts of a file, and print how many are left out.

    Where no record says which it is, all are taken. Raises DataError where only some say so, or none is left.
    """
    conversations = read_conversations(path)
    kind = "harmful" if harmful else "benign"
    unlabelled = [c for c in conversations if harm_label(c.meta, c.where) is None]
    if len(unlabelled) == len(conversations):
        return conversations
    if unlabelled:
        raise DataError(f"{unlabelled[0].where}: expected harmful: true or false, as in other records of the "
                        f"file, found none; add it to every record (in a .csv, a column harmful)")
    chosen = [c for c in conversations if c.is_harmful == harmful]
    print(f"{path}: {len(chosen)} of {len(conversations)} prompts are labelled {kind}; others are left out")
    if not chosen:
        raise DataError(f"{path}: expected at least one {kind} prompt, found none")
    return chosen


def read_records(path) -> list[tuple[str, dict]]:
    """Return ("file:line", unchecked record) for each record of a file. Raises DataError."""
    path = Path(path)
    readers = {".jsonl": json_lines, ".json": _json_list, ".csv": _csv_rows, ".txt": _lines}
    if path.suffix not in readers:
        hint = "convert it to .jsonl, an object a line (.gz: type gunzip FILE)"
        if reader := CONVERTERS.get(path.suffix):
            hint = (f"to convert it, in Python:\n  import {reader.partition('.')[0]}\n"
                    f"  {reader}({str(path)!r}).to_json({str(path.with_suffix('.jsonl'))!r}, "
                    "orient='records', lines=True)")
        raise DataError(f"{path}: expected a file ending in {', '.join(readers)}, "
                        f"found {path.suffix or 'no ending'}; {hint}")
    text = read_text(path)
    records = [(f"{path}:{line}", record) for line, record in readers[path.suffix](text, path)]
    if not records:
        raise DataError(f"{path}: expected at least one conversation, found none")
    return records


def _json_list(text, path):
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON list of objects: {error}; a file with one object a line "
                        f"has to end in .jsonl") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of conversations, found {str(rows)[:60]}; if a KEY "
                        "has the list, write that to a file, in Python:\n  import json\n"
                        f"  json.dump(json.load(open({str(path)!r}))['KEY'], open('list.json', 'w'))")
    return enumerate(rows, 1)


def _csv_rows(text, path):
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: expected each column once, found {', '.join(names)}")
        for row in reader:
            if None in row or None in row.values():  # more cells than columns, or fewer
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
    """Check a record and return it as a conversation; `need` as in read_conversations. Raises DataError."""

    def fail(expected, found, hint=""):
        raise DataError(f"{where}: expected {expected}, found {str(found)[:200]}{hint}")

    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        fail("an object", repr(record)[:60])
    if "conversations" in record and "messages" not in record:
        record = record | {"messages": _sharegpt_messages(record["conversations"])}
    if "messages" in record:
        messages = record["messages"]
        used = {"messages", "conversations"}
    else:
        messages, used = _messages_of(record, need, fail)
    unread = _unread_keys(record, used, fail)
    if not isinstance(messages, list) or not messages:
        fail("messages: a list of {role, content}", repr(messages)[:60])
    if len(messages) > MAX_MESSAGES:
        fail(f"at most {MAX_MESSAGES} messages", len(messages))
    checked = []
    roles = []
    length = 0
    for i, message in enumerate(messages):
        number = f"message {i + 1}"
        fields = (message.get("role"), message.get("content")) if isinstance(message, dict) else ()
        if [type(text) for text in fields] != [str, str]:
            fail(f"{number} as {{role, content}}, both text", repr(message)[:60],
                 "; write a prompt and its response both as text, or both as lists of such messages")
        role, content = fields
        unread |= _unread_keys(message, {"role", "content", "from", "value"}, fail)
        if role not in ("system", "user", "assistant"):
            fail(f"{number} with role system, user or assistant", repr(role),
                 "; rename it or, if it is a tool's (which are not supported), remove the record")
        if role == "system" and i > 0:
            fail("a system message only at the start", f"one as {number}")
        if role != "system":
            roles.append(role)
            if not content.strip():
                fail(f"text in {number} ({role})", "none")
        if content != content.encode("utf-8", "ignore").decode():
            fail(f"valid Unicode in {number}", "half of a surrogate pair")
        length += len(content)
        checked.append({"role": role, "content": content})
    if length > MAX_TEXT:
        fail(f"at most {MAX_TEXT:,} characters", f"{length:,}")
    alternating = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if roles != alternating or not roles:
        fail("user and assistant taking turns, the user first", " ".join(roles) or "no turn")
    if need == "answer" and roles[-1] != "assistant":
        fail("an assistant turn at the end", "a user turn",
             "; if the file holds prompts alone, add a response to each record")
    try:
        label = harm_label(record, where)
    except DataError:
        if need == "harmful":
            raise
        label = None  # a task's, perhaps
    if label is not None:
        record = record | {"harmful": label}
    elif need == "harmful":
        fail("harmful: true or false", "none", "; add it to every record (in a .csv, a column harmful)")
    return Conversation(tuple(checked), where, record, frozenset(unread))


def _unread_keys(record: dict, used: set, fail) -> set:
    """Return the keys of a record or message that are neither `used` nor LABELS. Refuses those of PARTS.

    Empty values are passed over, and so is a weight of 1, which says what holds for all turns.
    """
    unread = {key for key in record.keys() - used if record[key] not in (None, "", [], {})}
    for key in sorted(unread):
        if key.casefold() in PARTS and record[key] != 1:
            fail(f"no {key} (write it into the message it belongs to, or remove it)", repr(record[key])[:60])
    return {key for key in unread if key.casefold() not in LABELS | PARTS}


def _sharegpt_messages(turns):
    """Return ShareGPT's turns {"from", "value"} as messages, unchecked."""
    messages = []
    for turn in turns if isinstance(turns, list) else ():
        turn = turn if isinstance(turn, dict) else {}
        role = str(turn.get("from", turn.get("role")))
        content = turn.get("value", turn.get("content"))
        messages.append(turn | {"role": ROLES.get(role, role), "content": content})
    return messages


def harm_label(record: dict, where: str) -> bool | None:
    """Return whether a record is labelled harmful, by the first of HARM_KEYS it has, or by XSTest's type.

    None: it has no label. Raises DataError for one that is neither in HARMFUL nor in HARMLESS, in any case.
    """
    for key in HARM_KEYS:
        value = str(record.get(key)).casefold()
        if value in ("none", ""):
            continue
        if value not in HARMFUL + HARMLESS:
            raise DataError(f"{where}: expected {key}: {', '.join(HARMFUL + HARMLESS)}, found "
                            f'{value[:60]!r}; correct it or, if it is no label of harm, add "harmful": true '
                            f"or false to every record")
        negated = key == "is_safe" and value in ("true", "1", "false", "0")
        return (value in HARMFUL) != negated
    kind = str(record.get("type"))
    if kind in XSTEST_SAFE:
        return False
    return kind.startswith("contrast_") or None


def _messages_of(record: dict, need: str, fail) -> tuple[list, set]:
    """Return the messages of a record that has one of FORMATS, unchecked, and the keys that they are of."""
    pairs = [pair for pair in FORMATS if pair[0] in record and (pair[1] in record or need != "answer")]
    if not pairs:
        names = ", ".join("/".join(filter(None, pair)) for pair in FORMATS)
        fail(f"messages, or one of {names}", f"keys {sorted(record)}",
             "; rename the keys of the prompt and of its response to prompt and response")
    user, assistant = min(pairs, key=lambda pair: pair[1] not in record)  # with an answer, if one has it
    extras = {key: form for words, key, form in EXTRAS if words == user}
    used = {user, assistant, "system", *extras}
    prompt = record[user]
    completion = record.get(assistant) or []
    if isinstance(prompt, list) and isinstance(completion, list) and "system" not in record:
        # TRL's conversational form, of which the completion alone is trained on
        roles = [message.get("role") for message in prompt if isinstance(message, dict)]
        if need == "answer" and "assistant" in roles:
            fail("a prompt without assistant turns, which would be trained on, too", "one with them")
        return prompt + completion, used
    messages = [{"role": "user", "content": record[user]}]
    for key, form in extras.items():
        if record.get(key) not in (None, ""):
            if not isinstance(record[key], str) or not isinstance(record[user], str):
                fail(f"text as {user} and {key}", repr(record[key])[:60])
            messages[0]["content"] = form.format(messages[0]["content"], record[key])
    if record.get("system") not in (None, ""):
        messages.insert(0, {"role": "system", "content": record["system"]})
    if record.get(assistant) is not None:
        messages.append({"role": "assistant", "content": record[assistant]})
    return messages, used


# ---------------------------------------------------------------- splitting


def group_of(conversation: Conversation) -> str:
    """Return a record's "group" or, without it, its last prompt in lower case with single spaces."""
    group = conversation.meta.get("group")
    if group is not None:
        return f"group {group}"
    return normalized(conversation.prompts[-1])


def normalized(prompt: list[dict]) -> str:
    """Return the roles and words of a prompt in lower case, with single spaces."""
    turns = [f"{message['role']} {message['content']}" for message in prompt]
    return " ".join(" ".join(turns).casefold().split())


def split_by_prompt(conversations: list[Conversation], seed: int = 0) -> list[list[Conversation]]:
    """Split conversations at random: 80 and 20 % of each class (`harmful`), with a group in one split.

    A group is the records with the same "group" or, without it, the same prompt but for case and white space.
    Raises DataError where a group is labelled both ways, or a split would lack a class.
    """
    groups = {}
    for conversation in conversations:
        groups.setdefault(group_of(conversation), []).append(conversation)
    places = []
    for group in groups.values():
        harmful = [c.where for c in group if c.is_harmful]
        benign = [c.where for c in group if not c.is_harmful]
        if harmful and benign:
            places.append(f"harmful in {', '.join(harmful)}, benign in {', '.join(benign)}")
    if places:
        raise DataError('expected one "harmful" for each prompt or group, found both labels of '
                        f"{len(places)}: {'; '.join(places[:10])}; correct or remove these records")
    splits = [[], []]
    for harmful in (False, True):
        keys = [key for key, group in groups.items() if group[0].is_harmful == harmful]
        keys.sort(key=lambda key: json.dumps(groups[key][0].prompts[-1]))
        random.Random(seed).shuffle(keys)
        n = len(keys)
        ends = [0, round(0.8 * n), n]
        for split, start, end in zip(splits, ends, ends[1:]):
            if start == end:
                file = conversations[0].where.rpartition(":")[0]
                kind = "harmful" if harmful else "benign"
                raise DataError(f"{file}: expected enough distinct {kind} prompts for splits of 80 and 20 %, "
                                f"found {n}")
            for key in keys[start:end]:
                split += groups[key]
    return splits
