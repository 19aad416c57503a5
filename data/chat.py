"""Conversation → Example: rendered by the checkpoint's chat template, encoded with a response mask, padded.

The one place where conversations become text and tokens: training, probe, judge and evaluation all come here.
"""

import datetime
import json
import os
import re
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from jinja2 import TemplateError

from data.conversations import Conversation
from lib.checkpoint import read_config
from lib.files import DataError, read_json, read_text
from lib.frame import squeezed
from lib.template import render_template
from lib.tokenizer import open_tokenizer, tokenizer_errors

IGNORE = -100  # label of a token that is not trained on
LONGEST = 1 << 15  # tokens of a prompt for the probe, a judge, or an evaluation
BREAK = "\ufdd0"  # a noncharacter: put into a control token that a message types; there its tokens are parted


def today() -> str:
    """Today's date, YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def parse_date(text: str | None) -> datetime.datetime:
    """A date YYYY-MM-DD, None for today's. Raises DataError for anything else."""
    try:
        return datetime.datetime.strptime(text or today(), "%Y-%m-%d")
    except ValueError:
        raise DataError(f"--date: expected YYYY-MM-DD, found {text!r}") from None


@dataclass(frozen=True)
class Example:
    """A conversation's token ids and as many labels: labels[t] is input_ids[t] in a response, else IGNORE."""

    index: int  # among the examples of a run: risks and kept references are looked up by it
    input_ids: list
    labels: list
    conversation: Conversation | None = None  # as it was read
    training_text: Conversation | None = None  # what the tokens say: normalized as the tokenizer does it, or cut
    cut: bool = False
    anchor: bool = False  # a prompt with the reference's own answer, which no data hold

    @property
    def n_labels(self) -> int:
        """Labels that train something: predicted from the token before, one at position 0 does not."""
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def prompts(self) -> list[list[int]]:
        """The tokens before each assistant turn."""
        trained = [label != IGNORE for label in self.labels]
        starts = [i for i in range(1, len(trained)) if trained[i] and not trained[i - 1]]
        return [self.input_ids[:i] for i in starts]


class Chat:
    """A checkpoint's tokenizer and template. Messages are words: only the template writes control tokens.

    `date`: what a template that prints today's date is told, YYYY-MM-DD; None for all other templates.
    """

    def __init__(self, path, date: str | None = None):
        self.path, self.file = Path(path), Path(path) / "tokenizer.json"
        config_file, template_file = self.path / "tokenizer_config.json", self.path / "chat_template.jinja"
        if not os.path.lexists(self.file):
            found = ", ".join(sorted(p.name for p in self.path.glob("*token*"))) or "no tokenizer"
            raise DataError(f"{path}: expected tokenizer.json, found {found}")
        alone = not os.path.lexists(self.path / "config.json")
        self.vocab_size = 10**7 if alone else read_config(path).vocab_size
        self.tokenizer, raw = open_tokenizer(self.file, self.vocab_size)
        with tokenizer_errors(self.file):
            serialized = self.tokenizer.to_str()
        config = read_json(config_file, default={})
        source = (read_text(template_file, links=False) if os.path.lexists(template_file)
                  else config.get("chat_template"))
        if isinstance(source, list):  # several named templates
            source = next((entry.get("template") for entry in source
                           if isinstance(entry, dict) and entry.get("name") == "default"), None)
        if not source:
            raise DataError(f"{path}: expected a chat template (chat_template.jinja, or in "
                            f"tokenizer_config.json), found none")
        special = {key: value.get("content") if isinstance(value, dict) else value
                   for key, value in config.items()
                   if key.endswith("_token") and isinstance(value, (str, dict))}
        for key, text in {"chat_template": source, **special}.items():
            if not isinstance(text, str) or text != text.encode("utf-8", "ignore").decode():
                raise DataError(f"{config_file}: {key}: expected text, found {repr(text)[:60]}")
        self.source, self.special_tokens = source, special
        uses_date = "strftime_now" in source
        self.date = parse_date(date).strftime("%Y-%m-%d") if uses_date else None
        content = source + json.dumps(special, sort_keys=True) + serialized
        self.fingerprint = sha256(content.encode()).hexdigest()
        self._learn_structure(raw["model"])

    def _learn_structure(self, model: dict) -> None:
        """How the template parts turns, from conversations of plain words.

        `control` {id: text}: special tokens, and others that it writes. `marks`: lines between two turns
        that are words alone (Llama 2's [/INST]), (squeezed, whether they begin a line): no message may have
        them. Raises DataError for a template that leaves out what the user says, or writes nothing.
        """
        added = self.tokenizer.get_added_tokens_decoder()
        self.control = {i: token.content for i, token in added.items() if token.special and token.content}
        self.marks, self._typed = set(), None
        # What the tokenizer itself gives for words that it lacks, so that words may have it.
        self._unknown = {self.tokenizer.token_to_id(model.get("unk_token") or ""), model.get("unk_id")}
        system, *turns = [{"role": role, "content": content} for role, content in
                          (("system", "qaz"), ("user", "wsx"), ("assistant", "edc"), ("user", "rfv"))]
        # Every prompt begins with a user's turn. A template may refuse system prompts, or later turns.
        texts = [self.render(turns[:1], add_generation_prompt=True, where=str(self.path))]
        if "wsx" not in texts[0]:
            raise DataError(f"{self.path}: expected a chat template that renders what a user says, found: "
                            f"{'other text' if texts[0] else 'nothing'}")
        for messages in (turns, [system, *turns]):
            try:
                texts.append(self.render(messages, add_generation_prompt=True))
            except DataError:
                pass
        for text in texts:
            self.control |= {i: added[i].content for i in self.encode(text) if i in added}
        self._checked = self.control.keys() - self._unknown
        tokens = "|".join(map(re.escape, self.control.values()))
        first = "".join(map(re.escape, {token[0] for token in self.control.values()}))
        if tokens:  # most places are left by their first character
            self._typed = re.compile(f"(?=[{first}])(?=(?:{tokens}))(.)", re.DOTALL)
        for text in texts:
            for gap in re.split("qaz|wsx|edc|rfv", text)[1:-1]:
                self.marks |= {(squeezed(line), n > 0) for n, line in enumerate(gap.split("\n"))
                               if line.strip() and not (tokens and re.search(tokens, line))}

    def render(self, messages, add_generation_prompt: bool = False, where: str = "conversation",
               **variables) -> str:
        """Text as transformers' `apply_chat_template` gives it, with BREAK in control tokens that are typed.

        Raises DataError in the template's words, and for a message that could pass for two turns.
        """
        plain = []
        for message in messages:
            content = message["content"]
            marks = (self._mark(line) for line in content.split("\n"))
            if mark := BREAK * (BREAK in content) or next(filter(None, marks), ""):
                raise DataError(f"{where}: expected messages without {mark!r}, by which turns or tokens are "
                                f"parted here, found one with it")
            plain.append(message | {"content": self._parted(content)})
        variables |= {"messages": plain, "add_generation_prompt": add_generation_prompt,
                      "tools": None, "documents": None}
        try:
            return render_template(self.source, self.special_tokens | variables, self.date)
        except TemplateError as error:
            raise DataError(f"{where}: the chat template of {self.path} refuses it: {error}") from None

    def _parted(self, text: str) -> str:
        """A message with BREAK in each control token that it types."""
        return self._typed.sub(rf"\1{BREAK}", text) if self._typed else text

    def _mark(self, line: str) -> str | None:
        """The mark of a turn that a line of a message has."""
        line = squeezed(line) if self.marks else ""
        return next((mark for mark, begins in self.marks
                     if (line.startswith(mark) if begins else mark in line)), None)

    def tokens(self, messages, where: str = "conversation", **variables) -> tuple[str, list, list]:
        """(text, token ids, place of each in the text): what `render` gives, a typed control token as words.

        Raises DataError where a control token is left that the template would not write around other words.
        """
        rendered, ids, places, start = self.render(messages, where=where, **variables), [], [], 0
        for piece in rendered.split(BREAK):
            encoding = self._encoding(piece)
            ids += encoding.ids
            places += [(start + a, start + b) for a, b in encoding.offsets]
            start += len(piece)
        words = [message | {"content": "x" if message["content"].strip() else ""} for message in messages]
        expected = self.encode(self.render(words, where=where, **variables))
        found, expected = ([i for i in sequence if i in self._checked] for sequence in (ids, expected))
        if found != expected:
            shown = [" ".join(self.control[i] for i in sequence) for sequence in (expected, found)]
            raise DataError(f"{where}: expected the template's control tokens {shown[0]}, found {shown[1]}: "
                            f"this tokenizer cannot write one that a message types as words")
        return rendered.replace(BREAK, ""), ids, places

    def encode(self, text: str) -> list[int]:
        """Token ids. The template has written the special tokens: none is added."""
        return self._encoding(text).ids

    def _encoding(self, text: str):
        with tokenizer_errors(self.file):
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if (last := max(encoding.ids, default=0)) >= self.vocab_size:
            raise DataError(f"{self.file}: expected token ids under the model's vocab_size = "
                            f"{self.vocab_size}, found {last}")
        return encoding

    def encode_prompt(self, messages, where: str = "conversation", **variables) -> list[int]:
        """Token ids up to the position from which the first response token is generated."""
        return self.tokens(messages, where, add_generation_prompt=True, **variables)[1]

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        with tokenizer_errors(self.file):
            return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def encode_example(self, conversation: Conversation, index: int, max_length: int) -> Example:
        """Encode a conversation, cut at `max_length` tokens, assistant turns and their end token labelled.

        A turn's labels begin where the tokens of its prompt (messages before it, with a generation prompt)
        end, and go as far as the messages up to it, rendered alone, agree with the whole. Raises DataError
        where the prompt, as text or as tokens, is not a prefix of the whole: the mask would be a guess.
        """
        messages, where = conversation.messages, conversation.where
        whole, ids, places = self.tokens(messages, where)
        labels, said = [IGNORE] * len(ids), [self.decode_text(message["content"]) for message in messages]
        last, at = len(messages), 0  # of what a cut leaves; the place in the whole behind the last message
        for i, message in enumerate(messages):
            words = message["content"].strip()
            if message["role"] == "assistant":
                prompt = self.encode_prompt(messages[:i], where)
                if len(prompt) >= max_length < len(ids):
                    break  # nothing from here on is left of it
                upto = self.tokens(messages[: i + 1], where)[1]
                differing = (n for n, (a, b) in enumerate(zip(upto, ids)) if a != b)
                start, end = len(prompt), next(differing, min(len(upto), len(ids)))
                while end > start and not whole[slice(*places[end - 1])].strip():
                    end -= 1  # the template's newline after the end of the turn is not the response
                if ids[:start] != prompt or end == start:
                    raise DataError(f"{where}: expected the tokens of the prompt of turn {i + 1} as a prefix "
                                    f"of the whole conversation's, found others: either the response begins "
                                    f"with white space that merges with the prompt (strip it), or the "
                                    f"template rewrites earlier turns (make each record end with its only "
                                    f"assistant turn)")
                at, ends = places[start][0], places[end - 1][1]
                labels[start:end] = ids[start:end]
                if start < max_length < end:
                    said[i] = self.decode(ids[start:max_length])
                last = i + 1 if start < max_length else last
            at = whole.find(words, at, ends if message["role"] == "assistant" else None)
            if at < 0:
                raise DataError(f"{where}: expected the template to keep the words of turn {i + 1}, found "
                                f"that it leaves some out, or rewrites them when later turns follow; make "
                                f"each record end with its only assistant turn")
            at += len(words)
        last = last if max_length < len(ids) else len(messages)
        seen = tuple(message | {"content": text} for message, text in zip(messages[:last], said))
        return Example(index, ids[:max_length], labels[:max_length], conversation,
                       replace(conversation, messages=seen), len(ids) > max_length)

    def decode_text(self, text: str) -> str:
        """A message as its tokens say it: a tokenizer may normalize (Qwen: NFC; Llama 2: ▁ is a space)."""
        pieces = self._parted(text).split(BREAK)
        with tokenizer_errors(self.file):
            return "".join(self.tokenizer.decode(self.encode(piece)) for piece in pieces).strip()


def encode_examples(chat: Chat, conversations: list[Conversation], max_length: int) -> list[Example]:
    """Examples with something to train on, numbered; what a cut at `max_length` tokens leaves out is printed.

    Raises DataError where nothing is left.
    """
    kept, lost = [], []
    for conversation in conversations:
        example = chat.encode_example(conversation, len(kept), max_length)
        if example.n_labels:
            kept.append(example)
        else:
            lost.append(conversation.where)
    if not kept:
        raise DataError(f"{conversations[0].where}: no response fits into max_length = {max_length} tokens")
    if cut := sum(example.cut for example in kept) + len(lost):
        print(f"{cut} of {len(conversations)} conversations are cut at {max_length} tokens")
    if lost:
        shown = ", ".join(lost[:5]) + " …" * (len(lost) > 5)
        print(f"{len(lost)} without any of the response left are not trained on: {shown}")
    return kept


def encode_prompts(chat: Chat, conversations: list[Conversation], longest: int) -> list[list[int]]:
    """Token ids of each conversation's last prompt.

    Raises DataError for one of more than `longest` tokens, or LONGEST: attention's memory is its square.
    """
    prompts, longest = [], min(longest, LONGEST)
    for conversation in conversations:
        prompts.append(chat.encode_prompt(conversation.prompts[-1], conversation.where))
        if len(prompts[-1]) > longest:
            raise DataError(f"{conversation.where}: expected a prompt of at most {longest} tokens (what the "
                            f"model reads, less a response), found {len(prompts[-1])}")
    return prompts


def pad(sequences: list[list[int]], value: int, side: str, device="cpu") -> torch.Tensor:
    """Sequences of unequal length as a tensor (B, T), filled with `value` on the `side` "left" or "right"."""
    width = max(len(sequence) for sequence in sequences)
    fill = [[value] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor([f + s if side == "left" else s + f for f, s in zip(fill, sequences)], device=device)


def pad_left(prompts: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-id prompts (B, T), each ending at the last place, and where their tokens are (B, T), boolean."""
    return pad(prompts, 0, "left", device), pad([[True] * len(ids) for ids in prompts], False, "left", device)


def rows_that_fit(batch_size: int, longest: int) -> int:
    """How many sequences to take at a time: masks (B, T, T) of at most 1 GB, and at least one sequence."""
    return max(1, min(batch_size, LONGEST**2 // max(1, longest) ** 2))


def batches_by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices of sequences, the shortest first, in batches of `batch_size` (the last one may be smaller).

    Those are smaller whose longest sequence makes their masks too large.
    """
    order, batches = sorted(range(len(lengths)), key=lambda i: lengths[i]), []
    for i in order:  # each is the longest so far
        if not batches or len(batches[-1]) >= rows_that_fit(batch_size, lengths[i]):
            batches.append([])
        batches[-1].append(i)
    return batches
