"""Conversations: read from files, rendered by the checkpoint's own chat template, encoded with a response mask, padded.

records (files) → Conversation → Example (input_ids, labels) → batch of tensors
"""

import csv
import io
import json
import random
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import jinja2
import jinja2.ext
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from data.checkpoint import read_json

WORLD = Path(__file__).parent / "world"  # the embedded model and its data sets, made by build.py
IGNORE = -100  # label of a token that is not trained on
FORMATS = (  # keys of a record that hold the user's and the assistant's words; the first pair that fits is taken
    ("prompt", "response"), ("prompt", "completion"), ("user", "answer"), ("question", "answer"), ("goal", "target"),
    ("instruction", "output"),
)


class DataError(ValueError):
    """Input that cannot be used: says the file and line, what was expected and what was found."""


@dataclass(frozen=True)
class Conversation:
    """`messages`: dicts of role (system, user, assistant) and content. `meta`: the record as it was read (harmful, source, …)."""

    messages: tuple
    where: str = "?"  # "file:line", for errors
    meta: dict = field(default_factory=dict)

    @property
    def prompts(self) -> list[list[dict]]:
        """The messages before each assistant turn; where there is none, all of them."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [list(self.messages[:i]) for i in turns] or [list(self.messages)]

    @property
    def answer(self) -> str | None:
        """The last assistant turn, where it ends the conversation: the reference answer of an evaluation."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else None


# ---------------------------------------------------------------- reading


def is_embedded(path: Path) -> bool:
    """Whether a file or folder is part of the embedded world: some defaults make sense only there."""
    return WORLD.resolve() in Path(path).resolve().parents


def read_conversations(path, need: str = "prompt") -> list[Conversation]:
    """Read a file of conversations. `need`: "prompt", "answer" (an assistant turn at the end) or "harmful" (true or false).

    .jsonl: an object a line; .json: a list of objects (both: `messages`, or a pair of FORMATS' keys, Alpaca's `input` added to its
    `instruction`); .csv: a header with such a pair (AdvBench: goal, target); .txt: a prompt a line. Raises DataError at the first
    bad line, and for an empty file.
    """
    path = Path(path)
    readers = {".jsonl": json_lines, ".json": _json_list, ".csv": _csv_rows, ".txt": _lines}
    text = read_text(path)
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a file ending in {', '.join(readers)}, found {path.suffix or 'no ending'}")
    try:
        found = [_conversation(record, f"{path}:{line}", need) for line, record in readers[path.suffix](text, path)]
    except (csv.Error, RecursionError) as error:
        raise DataError(f"{path}: expected records of ordinary size and depth, found: {error}") from None
    if not found:
        raise DataError(f"{path}: expected at least one conversation, found none")
    return found


def read_text(path: Path) -> str:
    """A file's text, a byte-order mark left out. Raises DataError where there is no file, or it is not UTF-8."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found {error}") from None


def json_lines(text: str, path: Path):
    """(line number, value) of every line of JSON Lines that is not blank. Raises DataError that names the line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: expected a JSON object, found {line[:60]!r} ({error})") from None


def _json_list(text, path):
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON list of objects: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of objects, found {type(rows).__name__}")
    return enumerate(rows, 1)


def _csv_rows(text, path):
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        if None in row or None in row.values():
            raise DataError(f"{path}:{reader.line_num}: expected {len(reader.fieldnames)} columns ({', '.join(reader.fieldnames)})")
        yield reader.line_num, row


def _lines(text, path):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"messages": [{"role": "user", "content": line.strip()}]}


def _conversation(record, where: str, need: str) -> Conversation:
    """Check one record and bring it into the one form."""

    def fail(expected, found):
        raise DataError(f"{where}: expected {expected}, found {found}")

    if not isinstance(record, dict):
        fail("an object", repr(record)[:60])
    if "messages" in record:
        messages = record["messages"]
    else:
        pair = next((pair for pair in FORMATS if pair[0] in record and (pair[1] in record or need != "answer")), None)
        if pair is None:
            fail("messages, or one of " + ", ".join("/".join(pair) for pair in FORMATS), f"keys {sorted(record)}")
        prompt = record[pair[0]]
        if pair[0] == "instruction" and record.get("input"):
            prompt = f"{prompt}\n\n{record['input']}"
        messages = [{"role": "user", "content": prompt}]
        if record.get("system"):
            messages = [{"role": "system", "content": record["system"]}, *messages]
        if record.get(pair[1]) is not None:
            messages.append({"role": "assistant", "content": record[pair[1]]})
    if not isinstance(messages, list) or not messages:
        fail("messages: a list of {role, content}", repr(messages)[:60])
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            fail(f"message {i + 1} as {{role, content}}, both text", repr(message)[:60])
        if message["role"] not in ("system", "user", "assistant"):
            fail(f"message {i + 1} with role system, user or assistant", repr(message["role"]))
        if message["role"] == "system" and i > 0:
            fail("a system message only at the start", f"one as message {i + 1}")
        if not message["content"].strip() and message["role"] != "system":
            fail(f"text in message {i + 1} ({message['role']})", "none")
        if message["content"].encode("utf-8", "ignore").decode() != message["content"]:
            fail(f"valid Unicode in message {i + 1}", "half of a surrogate pair")
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2) or not turns:
        fail("user and assistant taking turns, the user first", " ".join(turns) or "no turn")
    if need == "answer" and turns[-1] != "assistant":
        fail("an assistant turn at the end", f"a {turns[-1]} turn")
    if need == "harmful" and not isinstance(record.get("harmful"), bool):
        fail("harmful: true or false", repr(record.get("harmful")))
    return Conversation(tuple({"role": m["role"], "content": m["content"]} for m in messages), where, record)


def split_by_prompt(conversations: list[Conversation], fractions=(0.6, 0.2, 0.2), seed: int = 0) -> list[list[Conversation]]:
    """Deterministic splits, each class (`harmful`) divided alike; conversations with the same prompt always fall together.

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
                raise DataError(f"{file}: expected enough distinct {kind} prompts for splits of {fractions}, found {len(keys)}")
            for key in keys[start:end]:
                if odd := [c for c in groups[key] if c.meta["harmful"] != harmful]:
                    raise DataError(f"{odd[0].where}: expected harmful = {harmful} as in {groups[key][0].where} (same prompt), "
                                    f"found {not harmful}")
                split += groups[key]
    return splits


# ---------------------------------------------------------------- rendering and encoding


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, with which some templates mark the assistant's words: rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one conversation, equally long: labels[t] is input_ids[t] in a response and IGNORE elsewhere."""

    index: int  # of the conversation in its file: risk files are matched by it
    input_ids: list
    labels: list

    @property
    def n_labels(self) -> int:
        """Labels that train something: each is predicted from the token before, so that one at position 0 does not."""
        return sum(label != IGNORE for label in self.labels[1:])


class Chat:
    """A checkpoint's tokenizer and chat template. The one place where conversations become text and tokens."""

    def __init__(self, path):
        path = Path(path)
        config_file, template_file = path / "tokenizer_config.json", path / "chat_template.jinja"
        if not (path / "tokenizer.json").exists():
            found = ", ".join(sorted(p.name for p in path.glob("*token*"))) or "no tokenizer"
            raise DataError(f"{path}: expected tokenizer.json, found {found}")
        try:
            self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path / 'tokenizer.json'}: expected a tokenizer of the tokenizers library, found: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config = read_json(config_file, default={})
        source = template_file.read_text(encoding="utf-8") if template_file.exists() else config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        if not source:
            raise DataError(f"{path}: expected a chat template (chat_template.jinja, or in tokenizer_config.json), found none")
        special = {key: value["content"] if isinstance(value, dict) else value
                   for key, value in config.items() if key.endswith("_token") and isinstance(value, (str, dict))}
        try:
            self.template = self.compile(source, special)
        except jinja2.TemplateError as error:
            raise DataError(f"{path}: the chat template does not compile: {error}") from None
        self.fingerprint = sha256((source + json.dumps(special, sort_keys=True) + self.tokenizer.to_str()).encode()).hexdigest()

    @staticmethod
    def compile(source: str, special_tokens: dict) -> jinja2.Template:
        """A chat template in the sandbox, with what transformers' `apply_chat_template` puts at its disposal."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= special_tokens
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(source)

    def render(self, messages, add_generation_prompt: bool = False, where: str = "conversation", **variables) -> str:
        """The conversation as text, as transformers' `apply_chat_template` gives it. Raises DataError with the template's own words."""
        variables |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            return self.template.render(**variables)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template refuses it: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids. The template has written the special tokens: none is added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, messages, where: str = "conversation") -> list[int]:
        """Token ids up to the position from which the first response token is generated."""
        return self.encode(self.render(messages, add_generation_prompt=True, where=where))

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def encode_example(self, conversation: Conversation, index: int, max_length: int) -> Example:
        """Encode a whole conversation; every assistant turn is labelled, its end-of-turn token included, cut at `max_length` tokens.

        A turn's labels begin where the tokens of its prompt (the messages before it, with a generation prompt) end, and go as far as the
        messages up to it, rendered alone, agree with the whole. Raises DataError where the prompt, as text or as tokens, is not a prefix of
        the whole: the mask would be a guess.
        """
        whole = self.render(conversation.messages, where=conversation.where)
        encoding = self.tokenizer.encode(whole, add_special_tokens=False)
        ids, labels = encoding.ids, [IGNORE] * len(encoding.ids)
        for i, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                prompt = self.encode_prompt(conversation.messages[:i], conversation.where)
                upto = self.encode(self.render(conversation.messages[: i + 1], where=conversation.where))
                start, end = len(prompt), next((n for n, (a, b) in enumerate(zip(upto, ids)) if a != b), min(len(upto), len(ids)))
                while end > start and not whole[slice(*encoding.offsets[end - 1])].strip():
                    end -= 1  # the template's newline after the end of the turn is not the response
                if ids[:start] != prompt or end == start:
                    raise DataError(f"{conversation.where}: expected the tokens of the prompt of turn {i + 1} as a prefix of the whole "
                                    f"conversation's, found others: either the response begins with white space that merges with the "
                                    f"prompt (strip it), or the template rewrites earlier turns (make each record end with its only "
                                    f"assistant turn)")
                if message["content"].strip() not in whole[encoding.offsets[start][0] : encoding.offsets[end - 1][1]]:
                    raise DataError(f"{conversation.where}: expected the template to keep the words of turn {i + 1}, found that it "
                                    f"rewrites them when later turns follow; make each record end with its only assistant turn")
                labels[start:end] = ids[start:end]
        return Example(index, ids[:max_length], labels[:max_length])


def encode_examples(chat: Chat, conversations: list[Conversation], max_length: int) -> tuple[list[Example], str]:
    """Examples that have something to train on, and a line that says what truncation at `max_length` tokens took away ("" if nothing)."""
    kept, cut, lost = [], 0, []
    for index, conversation in enumerate(conversations):
        example = chat.encode_example(conversation, index, max_length)
        cut += len(example.input_ids) == max_length and len(chat.encode(chat.render(conversation.messages))) > max_length
        if example.n_labels:
            kept.append(example)
        else:
            lost.append(conversation.where)
    if not kept:
        raise DataError(f"{conversations[0].where}: no response fits into max_length = {max_length} tokens")
    report = f"{cut} of {len(conversations)} conversations are cut at {max_length} tokens" if cut else ""
    if lost:
        shown = ", ".join(lost[:5]) + " …" * (len(lost) > 5)
        report += f"; {len(lost)} without any of the response left are not trained on: {shown}"
    return kept, report


def pad(sequences: list[list[int]], value: int, side: str, device="cpu") -> torch.Tensor:
    """Sequences of unequal length as one tensor (B, T), filled with `value` on the `side` "left" or "right"."""
    width = max(len(sequence) for sequence in sequences)
    fill = [[value] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor([f + s if side == "left" else s + f for f, s in zip(fill, sequences)], device=device)


def batches_by_length(lengths: list[int], most_rows: int, most_tokens: int = 0) -> list[list[int]]:
    """Indices of sequences, the shortest first, in batches of at most most_rows.

    With most_tokens, a batch also has at most so many tokens, its padding included (or is a single sequence), and at most 10 % padding.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and len(batches[-1]) < most_rows:
            rows, real = len(batches[-1]) + 1, sum(lengths[j] for j in batches[-1]) + lengths[i]
            if not most_tokens or rows * lengths[i] <= most_tokens and real >= 0.9 * rows * lengths[i]:
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches
