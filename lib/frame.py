"""What is judged, in a frame that it cannot close: texts of a stranger inside a prompt of ours."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path

from lib.files import DataError, read_text

# Marks of the frame, and the control tokens of common chat formats: a server's are not known here.
FORGED = re.compile(r"\[/?[0-9a-f]{6}\]|<\|[^<>|\n]{1,60}\|>|</?s>|\[/?inst\]|<</?sys>>"
                    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>")
INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters and marks that nothing is drawn for


def visible(text: str) -> str:
    """`text` as a reader takes it: NFKC, case folded, without invisible characters (format, fillers, …)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c in "\n\t" or not (
        unicodedata.category(c) in ("Cc", "Cf", "Cn", "Co") or c in INVISIBLE
        or "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef"))


def read_rubric(path: Path) -> str:
    """A rubric. Raises DataError where {prompt} or {response} is not in it."""
    text = read_text(path).strip()
    if absent := [name for name in ("{prompt}", "{response}") if name not in text]:
        raise DataError(f"{path}: expected a rubric with {' and '.join(absent)} in it, found none")
    return text


def frame_mark(rubric: str, prompt: str, response: str) -> str:
    """Six hexadecimal digits, others for each pair; drawn from the pair, so that scores can be repeated."""
    return hashlib.sha256(json.dumps([rubric, prompt, response]).encode()).hexdigest()[:6]


def fill(rubric: str, prompt: str, response: str) -> str:
    """The rubric with {prompt} and {response} replaced in one pass, each in a frame: [mark] … [/mark]."""
    texts, mark = {"prompt": prompt, "response": response}, frame_mark(rubric, prompt, response)
    return re.sub(r"\{(prompt|response)\}", lambda match: f"[{mark}]\n{texts[match[1]]}\n[/{mark}]", rubric)


def forged(prompt: str, response: str, control=()) -> str | None:
    """What in the texts could pass for a part of the judge's prompt: of the frame's form, or a control token.

    control: the judge's own tokens. Searched in what a reader sees: no full-width, hidden or upper-case form
    differs. A text with the frame's form is not judged, so that no text can close a frame.
    """
    text = visible(f"{prompt}\n{response}")
    if found := FORGED.search(text):
        return found[0]
    return next((token for token in control if visible(token) in text), None)
