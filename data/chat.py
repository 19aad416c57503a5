"""Conversation → Example: rendered by the checkpoint's chat template, encoded with a response mask, padded.

The one place where conversations become text and tokens: training, probe, judge and evaluation all come here.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import jinja2
import jinja2.ext
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from data.conversations import Conversation
from lib.files import DataError, read_json

IGNORE = -100  # label of a token that is not trained on


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, some templates' mark of assistant words: rendered as is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


@dataclass(frozen=True)
class Example:
    """A conversation's token ids and as many labels: labels[t] is input_ids[t] in a response, else IGNORE."""

    index: int  # of the conversation in its file: risk files are matched by it
    input_ids: list
    labels: list

    @property
    def n_labels(self) -> int:
        """Labels that train something: predicted from the token before, one at position 0 does not."""
        return sum(label != IGNORE for label in self.labels[1:])


class Chat:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, path):
        path = Path(path)
        config_file, template_file = path / "tokenizer_config.json", path / "chat_template.jinja"
        if not (path / "tokenizer.json").exists():
            found = ", ".join(sorted(p.name for p in path.glob("*token*"))) or "no tokenizer"
            raise DataError(f"{path}: expected tokenizer.json, found {found}")
        try:
            self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path / 'tokenizer.json'}: expected a tokenizer of the tokenizers library, "
                            f"found: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config = read_json(config_file, default={})
        source = (template_file.read_text(encoding="utf-8") if template_file.exists()
                  else config.get("chat_template"))
        if isinstance(source, list):  # several named templates
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        if not source:
            raise DataError(f"{path}: expected a chat template (chat_template.jinja, or in "
                            f"tokenizer_config.json), found none")
        special = {key: value["content"] if isinstance(value, dict) else value
                   for key, value in config.items()
                   if key.endswith("_token") and isinstance(value, (str, dict))}
        try:
            self.template = self.compile(source, special)
        except jinja2.TemplateError as error:
            raise DataError(f"{path}: the chat template does not compile: {error}") from None
        content = source + json.dumps(special, sort_keys=True) + self.tokenizer.to_str()
        self.fingerprint = sha256(content.encode()).hexdigest()

    @staticmethod
    def compile(source: str, special_tokens: dict) -> jinja2.Template:
        """A chat template in the sandbox, with what transformers' `apply_chat_template` offers it."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[_Generation, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals |= special_tokens
        environment.globals |= {"raise_exception": _raise_exception,
                                "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(source)

    def render(self, messages, add_generation_prompt: bool = False, where: str = "conversation",
               **variables) -> str:
        """Text as transformers' `apply_chat_template` gives it. Raises DataError in the template's words."""
        variables |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt,
                      "tools": None, "documents": None}
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
        """Encode a conversation, cut at `max_length` tokens, assistant turns and their end token labelled.

        A turn's labels begin where the tokens of its prompt (messages before it, with a generation prompt)
        end, and go as far as the messages up to it, rendered alone, agree with the whole. Raises DataError
        where the prompt, as text or as tokens, is not a prefix of the whole: the mask would be a guess.
        """
        whole = self.render(conversation.messages, where=conversation.where)
        encoding = self.tokenizer.encode(whole, add_special_tokens=False)
        ids, labels = encoding.ids, [IGNORE] * len(encoding.ids)
        for i, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                prompt = self.encode_prompt(conversation.messages[:i], conversation.where)
                upto = self.encode(self.render(conversation.messages[: i + 1], where=conversation.where))
                differing = (n for n, (a, b) in enumerate(zip(upto, ids)) if a != b)
                start, end = len(prompt), next(differing, min(len(upto), len(ids)))
                while end > start and not whole[slice(*encoding.offsets[end - 1])].strip():
                    end -= 1  # the template's newline after the end of the turn is not the response
                if ids[:start] != prompt or end == start:
                    raise DataError(f"{conversation.where}: expected the tokens of the prompt of turn "
                                    f"{i + 1} as a prefix of the whole conversation's, found others: either "
                                    f"the response begins with white space that merges with the prompt "
                                    f"(strip it), or the template rewrites earlier turns (make each record "
                                    f"end with its only assistant turn)")
                turn = whole[encoding.offsets[start][0] : encoding.offsets[end - 1][1]]
                if message["content"].strip() not in turn:
                    raise DataError(f"{conversation.where}: expected the template to keep the words of turn "
                                    f"{i + 1}, found that it rewrites them when later turns follow; make "
                                    f"each record end with its only assistant turn")
                labels[start:end] = ids[start:end]
        return Example(index, ids[:max_length], labels[:max_length])


def encode_examples(chat: Chat, conversations: list[Conversation], max_length: int) -> list[Example]:
    """Examples with something to train on; what a cut at `max_length` tokens takes away is printed.

    Raises DataError where nothing is left.
    """
    kept, cut, lost = [], 0, []
    for index, conversation in enumerate(conversations):
        example = chat.encode_example(conversation, index, max_length)
        cut += (len(example.input_ids) == max_length
                and len(chat.encode(chat.render(conversation.messages))) > max_length)
        if example.n_labels:
            kept.append(example)
        else:
            lost.append(conversation.where)
    if not kept:
        raise DataError(f"{conversations[0].where}: no response fits into max_length = {max_length} tokens")
    if cut:
        print(f"{cut} of {len(conversations)} conversations are cut at {max_length} tokens")
    if lost:
        shown = ", ".join(lost[:5]) + " …" * (len(lost) > 5)
        print(f"{len(lost)} without any of the response left are not trained on: {shown}")
    return kept


def pad(sequences: list[list[int]], value: int, side: str, device="cpu") -> torch.Tensor:
    """Sequences of unequal length as a tensor (B, T), filled with `value` on the `side` "left" or "right"."""
    width = max(len(sequence) for sequence in sequences)
    fill = [[value] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor([f + s if side == "left" else s + f for f, s in zip(fill, sequences)], device=device)


def pad_left(prompts: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-id prompts (B, T), each ending at the last place, and where their tokens are (B, T), boolean."""
    return pad(prompts, 0, "left", device), pad([[True] * len(ids) for ids in prompts], False, "left", device)


def batches_by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices of sequences, the shortest first, in batches of `batch_size` (the last one may be smaller)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
