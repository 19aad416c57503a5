"""Put untrusted texts into a judge's prompt, each in a frame that the text cannot close."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path

from lib.files import DataError, read_text

CLOSING = r"\[/[0-9a-f]{6}\]"  # the end of a frame, whatever its mark
# Control tokens of common chat formats: a server's own are not known (a local judge's are in its tokenizer).
FORMATS = (r"|<\|[^<>|]{1,60}\|>|<\|\w{1,20}>|<\w{1,20}\|>|\[\|\w{1,20}\|\]|</?s>|<</?sys>>|\[gmask\]"
           r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk|sop)>|<seed:\w+>"
           r"|\[/?(?:inst|system_prompt|tool_results|tool_calls|available_tools)\]")
HIDDEN = "Cc Cf Cn Co Mn Me Zs Zl Zp".split()  # control, format, unassigned, private, accents, spaces
BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that are drawn as nothing


def squeezed(text: str) -> str:
    """Return `text` in NFKC form, without white space, accents and invisible characters, for searches."""
    decomposed = unicodedata.normalize("NFKD", text)
    drawn = (c for c in decomposed if unicodedata.category(c) not in HIDDEN and c not in BLANKS)
    return unicodedata.normalize("NFKC", "".join(drawn))


def read_rubric(path: Path) -> str:
    """Read a rubric. Raises DataError if {prompt} or {response} is not in it."""
    text = read_text(path).strip()
    if "{prompt}" not in text or "{response}" not in text:
        raise DataError(f"{path}: expected a rubric with {{prompt}} and {{response}}, found {text[:60]!r}")
    return text


def frame_mark(*texts: str) -> str:
    """Return the mark of a pair's frames: six hexadecimal digits, from (rubric, prompt, response)."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:6]


def fill(rubric: str, prompt: str, response: str) -> str:
    """Return the rubric with {prompt} and {response} replaced, in one pass, by [mark] text [/mark]."""
    texts = {"prompt": prompt, "response": response}
    mark = frame_mark(rubric, prompt, response)

    def framed(match):
        return f"[{mark}]\n{texts[match[1]]}\n[/{mark}]"

    return re.sub(r"\{(prompt|response)\}", framed, rubric)


def find_forged_markup(rubric: str, prompt: str, response: str, control: list | None) -> str | None:
    """Return what in a pair of texts could pass for a part of the judge's prompt, or None.

    control: the judge's control tokens and the lines of its template; None for a server. The pair's own mark
    is found however its digits are spread: since the mark is a hash, one can search for a text that holds it.
    """
    text = squeezed(f"{prompt}\n{response}").casefold()
    mark = frame_mark(rubric, prompt, response)
    if match := re.search(CLOSING + FORMATS if control is None else CLOSING, text):
        return match[0]
    if mark in re.sub("[^0-9a-f]", "", text):
        return mark
    return next((token for token in control or () if squeezed(token).casefold() in text), None)
