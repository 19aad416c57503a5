"""Turn conversations into token ids: render with the checkpoint's chat template, encode, label, pad.

Training, probe, judge and evaluation all use this one path from a conversation to tokens.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence

from data.conversations import Conversation
from lib.checkpoint import read_config
from lib.files import DataError, read_json, read_text
from lib.frame import squeezed
from lib.template import render_template
from lib.tokenizer import open_tokenizer, tokenizer_errors

IGNORE = -100  # label of a token that is not trained on
LONGEST = 1 << 15  # tokens of a prompt for the probe, a judge, or an evaluation
BREAK = "\ufdd0"  # a noncharacter, inserted into control tokens that messages type: text is encoded up to it


@dataclass(frozen=True)
class Example:
    """An encoded conversation. labels[t] is input_ids[t] in a response and IGNORE elsewhere."""

    index: int  # position among the examples of a run
    input_ids: list
    labels: list
    conversation: Conversation | None = None  # the record as it was read
    training_text: Conversation | None = None  # the messages that the tokens decode to, cut and normalized
    cut: bool = False  # whether tokens are left out at max_length
    anchor: bool = False  # a prompt with the reference's own answer, which is not part of the data

    @property
    def n_labels(self) -> int:
        """Return the number of predicted labels. The token at position 0 has no token before it."""
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def prompts(self) -> list[list[int]]:
        """Return the token ids before each assistant turn."""
        prompts = []
        for i in range(1, len(self.labels)):
            if self.labels[i] != IGNORE and self.labels[i - 1] == IGNORE:
                prompts.append(self.input_ids[:i])
        return prompts


def read_template(folder: Path) -> tuple[str, dict]:
    """Return a checkpoint's chat template and special tokens {"bos_token": text, …}. Raises DataError."""
    template_file = folder / "chat_template.jinja"
    config = read_json(folder / "tokenizer_config.json", default={})
    source = config.get("chat_template")
    if os.path.lexists(template_file):
        source = read_text(template_file)
    if isinstance(source, list):  # several named templates
        named = [entry for entry in source if isinstance(entry, dict)]
        templates = [entry.get("template") for entry in named if entry.get("name") == "default"]
        source = templates[0] if templates else None
    if not source or not isinstance(source, str):
        raise DataError(f"{folder}: expected a chat template (chat_template.jinja, or chat_template in "
                        f"tokenizer_config.json), found {repr(source)[:60]}")
    special_tokens = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            special_tokens[key] = text
    return source, special_tokens


class Chat:
    """A checkpoint's tokenizer and chat template. Only the template writes control tokens.

    A control token that a message types is encoded as ordinary text. A message that could pass for the words
    between two turns (`marks`, such as Llama 2's [/INST]) is refused.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.file = Path(path) / "tokenizer.json"
        configs = self.path / "config.json", self.path / "adapter_config.json"
        has_config = any(map(os.path.lexists, configs))
        self.vocab_size = read_config(path).vocab_size if has_config else 10**7
        self.tokenizer, raw = open_tokenizer(self.file, self.vocab_size)
        with tokenizer_errors(self.file):
            serialized = self.tokenizer.to_str()
        self.source, self.special_tokens = read_template(self.path)
        content = self.source + json.dumps(self.special_tokens, sort_keys=True) + serialized
        self.fingerprint = sha256(content.encode("utf-8", "backslashreplace")).hexdigest()
        self.control = {}  # {id: text}: special tokens, and added tokens that the template writes
        self.typed_control = None  # matches the first character of a control token in a message
        self.marks = set()  # (squeezed line, whether it begins a line): words between turns
        self.variables = {}  # further names that the template reads
        self.ends_turn = False  # whether the template writes something behind the assistant's words
        self.end_token_ids = ()  # the tokenizer's eos_token, and the token that ends an assistant turn
        self._learn_structure()
        model = raw["model"]  # the tokenizer itself writes its unknown token for words
        unknown = {self.tokenizer.token_to_id(model.get("unk_token") or ""), model.get("unk_id")}
        self.checked = self.control.keys() - unknown
        self._learn_end()

    def _learn_structure(self) -> None:
        """Render conversations of known words, to find the control tokens and the words between turns.

        Raises DataError for a template that leaves out the user's words.
        """
        system, *turns = [{"role": role, "content": content} for role, content in
                          (("system", "qaz"), ("user", "wsx"), ("assistant", "edc"), ("user", "rfv"))]
        texts = []
        refusal = None
        for messages in (turns[:1], turns, [system, *turns]):
            try:
                texts.append(self.render(messages, add_generation_prompt=True))
            except DataError as error:  # some templates refuse system prompts, or so few turns, or so many
                refusal = error
        if not any("wsx" in text for text in texts):
            raise DataError(f"{self.path}: expected a chat template that renders what a user says, found: "
                            f"{refusal or ('other text' if any(texts) else 'nothing')}")
        written = {i for text in texts for i in self.encode(text)}
        for i, token in self.tokenizer.get_added_tokens_decoder().items():
            if token.content and (token.special or i in written):
                self.control[i] = token.content
        if self.control:
            tokens = "|".join(map(re.escape, self.control.values()))
            self.typed_control = re.compile(f"(?={tokens})(.)", re.DOTALL)
        for text in texts:
            for gap in re.split("qaz|wsx|edc|rfv", text)[1:-1]:
                for number, line in enumerate(gap.split("\n")):
                    if line.strip() and self._part_control(line) == line:
                        self.marks.add((squeezed(line), number > 0))

    def _learn_end(self) -> None:
        """Render an answer to find the prompt's last words and the end of an assistant turn.

        Qwen3 writes an empty thought into a turn without one. It is part of the prompt, not of the response:
        where the prompt with enable_thinking=False begins the turn, that is the prompt everywhere.
        """
        ask = {"role": "user", "content": "wsx"}
        answer = {"role": "assistant", "content": "edc"}
        no_thought = {"enable_thinking": False}
        ends = []
        with suppress(DataError):  # some templates refuse so few turns
            prompt = self.render([ask], add_generation_prompt=True, **no_thought)
            if self.render([ask, answer], **no_thought).startswith(prompt):
                self.variables = no_thought
        for messages in ([ask, answer], [ask, answer, ask]):  # GLM ends a turn by the next role's token
            with suppress(DataError):
                ends.append(self.render(messages).partition("edc")[2].partition("wsx")[0])
        self.ends_turn = bool(ends and ends[0].strip())
        end_token_ids = {self.tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))} - {None}
        for end in ends:
            end_token_ids.update([i for i in self.encode(end) if i in self.checked][:1])
        self.end_token_ids = tuple(sorted(end_token_ids))

    def _part_control(self, text: str) -> str:
        """Return a message with BREAK behind the first character of each control token in it."""
        return self.typed_control.sub(rf"\1{BREAK}", text) if self.typed_control else text

    def _find_mark(self, text: str) -> str | None:
        """Return the words in a message that could pass for the end of a turn, or None."""
        if BREAK in text:
            return BREAK
        for line in text.split("\n") if self.marks else ():
            line = squeezed(line)
            for mark, begins_line in self.marks:
                if line.startswith(mark) if begins_line else mark in line:
                    return mark
        return None

    def render(self, messages, add_generation_prompt: bool = False, where: str = "conversation",
               **variables) -> str:
        """Render messages as transformers' `apply_chat_template` does, with BREAK in typed control tokens.

        variables: further names that the template may read. Raises DataError where the template refuses, and
        for a message that has one of `marks`.
        """
        parted = []
        for message in messages:
            if mark := self._find_mark(message["content"]):
                raise DataError(f"{where}: expected messages without {mark!r}, which separates turns or "
                                f"tokens here, found one with it")
            parted.append(message | {"content": self._part_control(message["content"])})
        variables = self.variables | variables
        variables |= {"messages": parted, "add_generation_prompt": add_generation_prompt,
                      "tools": None, "documents": None}
        try:
            return render_template(self.source, self.special_tokens | variables)
        except TemplateError as error:
            raise DataError(f"{where}: the chat template of {self.path} refuses it: {error}") from None

    def tokens(self, messages, where: str = "conversation", **variables) -> tuple[str, list, list]:
        """Return the rendered text, its token ids, and the span (start, end) of each token in the text.

        Raises DataError where the control tokens are not those of the same turns with other words.
        """
        rendered = self.render(messages, where=where, **variables)
        ids = []
        offsets = []
        position = 0
        for piece in rendered.split(BREAK):
            encoding = self._encode(piece)
            ids += encoding.ids
            offsets += [(position + start, position + end) for start, end in encoding.offsets]
            position += len(piece)
        words = []
        for message in messages:
            words.append(message | {"content": "x" if message["content"].strip() else ""})
        plain_ids = self.encode(self.render(words, where=where, **variables))
        expected = [self.control[i] for i in plain_ids if i in self.checked]
        control = [self.control[i] for i in ids if i in self.checked]
        if control != expected:
            raise DataError(f"{where}: expected the template's control tokens {' '.join(expected)}, "
                            f"found {' '.join(control)}: this tokenizer cannot encode a control token that a "
                            f"message types as words")
        return rendered.replace(BREAK, ""), ids, offsets

    def encode(self, text: str) -> list[int]:
        """Return token ids. No special token is added: the template has written them."""
        return self._encode(text).ids

    def _encode(self, text: str):
        with tokenizer_errors(self.file):
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        largest = max(encoding.ids, default=0)
        if largest >= self.vocab_size:
            raise DataError(f"{self.file}: expected token ids under the model's vocab_size = "
                            f"{self.vocab_size}, found {largest}")
        return encoding

    def encode_prompt(self, messages, where: str = "conversation", **variables) -> list[int]:
        """Return the token ids before the first response token."""
        return self.tokens(messages, where, add_generation_prompt=True, **variables)[1]

    def decode(self, ids: list[int]) -> str:
        """Return text without special tokens."""
        with tokenizer_errors(self.file):
            return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def decode_text(self, text: str) -> str:
        """Return a message after encoding and decoding: a tokenizer may normalize (Qwen: NFC; Llama 2: ▁)."""
        pieces = self._part_control(text).split(BREAK)
        with tokenizer_errors(self.file):
            return "".join(self.tokenizer.decode(self.encode(piece)) for piece in pieces).strip()

    def encode_example(self, conversation: Conversation, index: int, max_length: int) -> Example:
        """Encode a conversation, cut at `max_length` tokens, and label assistant turns and their end tokens.

        An answer that is cut, here or in its record ("cut": true), has no label behind its last word: it does
        not teach where to stop. Raises DataError where a response's tokens cannot be located exactly in the
        whole conversation.
        """
        messages = conversation.messages
        where = conversation.where
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        thinks = any("</think>" in answer for answer in answers)
        is_cut = conversation.meta.get("cut")
        if thinks and "</think>" in self.control.values():
            raise DataError(f"{where}: expected answers without </think>, which this template writes itself, "
                            f"found one with it; remove the thoughts")
        variables = dict.fromkeys(self.variables, True) if thinks else {}
        text, ids, offsets = self.tokens(messages, where, **variables)
        labels = [IGNORE] * len(ids)
        contents = [self.decode_text(message["content"]) for message in messages]
        n_messages = len(messages)  # that a cut leaves
        position = 0  # in text, where the last message ends
        for i, message in enumerate(messages):
            limit = None
            if message["role"] == "assistant":
                prompt = self.encode_prompt(messages[:i], where, **variables)
                if len(prompt) >= max_length and len(ids) > max_length:
                    break  # the cut leaves nothing of this response
                alone = self.tokens(messages[: i + 1], where, **variables)[1]
                start, end = self._response_span(alone, prompt, text, ids, offsets, where)
                labels[start:end] = ids[start:end]
                position = offsets[start][0]
                limit = offsets[end - 1][1]
                n_messages = i + 1
                if end > max_length:
                    contents[i] = self.decode(ids[start:max_length])
            words = message["content"].strip()
            position = text.find(words, position, limit)
            if position < 0:
                raise DataError(f"{where}: expected the template to keep the words of turn {i + 1}, found "
                                f"them left out or rewritten; make each record end with its only "
                                f"assistant turn")
            position += len(words)
            if message["role"] == "assistant" and (message is messages[-1] and is_cut or end > max_length):
                for t in range(start, end):
                    if offsets[t][1] > position:
                        labels[t] = IGNORE
        cut = len(ids) > max_length
        pairs = list(zip(messages, contents))[: n_messages if cut else None]
        training_text = tuple(message | {"content": content} for message, content in pairs)
        return Example(index, ids[:max_length], labels[:max_length], conversation,
                       replace(conversation, messages=training_text), cut)

    def _response_span(self, alone: list, prompt: list, text: str, ids: list, offsets: list,
                       where: str) -> tuple[int, int]:
        """Return (start, end) in `ids` of a response's tokens with the end of its turn.

        They begin where the prompt's tokens end. They end where the tokens of the conversation up to this
        turn, `alone`, differ from those of the whole one, less white space that the template adds.
        """
        start = len(prompt)
        end = 0
        while end < min(len(alone), len(ids)) and alone[end] == ids[end]:
            end += 1
        while end > start and not text[slice(*offsets[end - 1])].strip():
            end -= 1
        if ids[:start] != prompt or end <= start:
            raise DataError(f"{where}: expected the tokens of the prompt as a prefix of the whole "
                            f"conversation's, found others: either the response begins with white space "
                            f"that merges with the prompt (strip it), or the template rewrites earlier "
                            f"turns, as Qwen3's does (make each record end with its only assistant turn), or "
                            f"it opens a thought that turns lack, as DeepSeek-R1's does (remove <think> from "
                            f"its generation prompt, in chat_template.jinja)")
        return start, end


def encode_examples(chat: Chat, conversations: list[Conversation], max_length: int) -> list[Example]:
    """Encode conversations and number the examples. Those without a label left are dropped and printed.

    Raises DataError where none is left.
    """
    if not chat.ends_turn:
        print(f"the chat template of {chat.path} writes nothing behind an assistant's words: what is trained "
              f"with it does not learn to stop")
    examples = []
    dropped = []
    for conversation in conversations:
        example = chat.encode_example(conversation, len(examples), max_length)
        if example.n_labels:
            examples.append(example)
        else:
            dropped.append(conversation.where)
    if not examples:
        raise DataError(f"{conversations[0].where}: no response fits into max_length = {max_length} tokens")
    n_cut = sum(example.cut for example in examples) + len(dropped)
    if n_cut:
        print(f"{n_cut} of {len(conversations)} conversations are cut at {max_length} tokens")
    if dropped:
        names = ", ".join(dropped[:5]) + " …" * (len(dropped) > 5)
        print(f"{len(dropped)} without any of the response left are not trained on: {names}")
    return examples


def encode_prompts(chat: Chat, conversations: list[Conversation], longest: int) -> list[list[int]]:
    """Encode each conversation's last prompt.

    Raises DataError for more than `longest` tokens, or LONGEST: attention needs memory quadratic in length.
    """
    prompts = []
    longest = min(longest, LONGEST)
    for conversation in conversations:
        prompt = chat.encode_prompt(conversation.prompts[-1], conversation.where)
        if len(prompt) > longest:
            raise DataError(f"{conversation.where}: expected a prompt of at most {max(0, longest)} tokens "
                            f"(the model's context, less a response), found {len(prompt)}: remove it from the file")
        prompts.append(prompt)
    return prompts


def pad(sequences: list[list[int]], value: int, side: str, device="cpu") -> torch.Tensor:
    """Return sequences as a tensor (B, T), filled with `value` on the `side` "left" or "right"."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side).to(device)


def pad_left(prompts: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts padded on the left, (B, T), and their boolean attention mask (B, T)."""
    mask = [[True] * len(ids) for ids in prompts]
    return pad(prompts, 0, "left", device), pad(mask, False, "left", device)


def rows_that_fit(batch_size: int, longest: int) -> int:
    """Return how many sequences to run at once: at least one, and masks (B, T, T) of at most 1 GB."""
    return max(1, min(batch_size, LONGEST**2 // max(1, longest) ** 2))


def batches_by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Return batches of indices, shortest sequences first. Long sequences come in smaller batches."""
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or len(batches[-1]) >= rows_that_fit(batch_size, lengths[i]):
            batches.append([])
        batches[-1].append(i)
    return batches
