"""What is judged, in a frame that it cannot close: texts of a stranger inside a prompt of ours."""

import hashlib
import json
import re
import unicodedata
from pathlib import Path

from lib.files import DataError, read_text

CLOSED = r"\[/[0-9a-f]{6}\]"  # the form of a frame's end
# What a server's chat format may hold, which is not known here; a local judge's own tokens are.
FORMATS = (r"|<\|[^<>|\n]{1,60}\|>|<\|\w{1,20}>|<\w{1,20}\|>|\[\|\w{1,20}\|\]|</?s>|<</?sys>>|\[gmask\]"
           r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk|sop)>|<seed:\w+>"
           r"|\[/?(?:inst|system_prompt|tool_results|tool_calls|available_tools)\]")
UNSEEN = {"Cc", "Cf", "Cn", "Co", "Mn", "Me"}  # categories: control, format, unassigned, private, accents
INVISIBLE = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that nothing is drawn for


def visible(text: str) -> str:
    """What no mark and no token can hide behind: `text` by NFKC, without accents and without characters that
    are not seen (format, control, fillers, …). To be searched in, not to be read.
    """
    decomposed = unicodedata.normalize("NFKD", text)
    seen = (c for c in decomposed
            if c.isspace() or unicodedata.category(c) not in UNSEEN and c not in INVISIBLE)
    return unicodedata.normalize("NFKC", "".join(seen))


def squeezed(text: str) -> str:
    """`visible` text without white space: "Agent :" is searched for as "Agent:" is."""
    return "".join(visible(text).split())


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


def forged(rubric: str, prompt: str, response: str, control=None) -> str | None:
    """What in the texts could pass for a part of the judge's prompt: the end of a frame, or a control token.

    control: the judge's own tokens and lines of its template; None for a server, where those of common chat
    formats are looked for. Searched in what is `visible`, in any case: no full-width or hidden form differs.
    The pair's own mark counts however its digits are spread: it is drawn from the pair, so that one could
    search for a text that has its own.
    """
    text, mark = visible(f"{prompt}\n{response}").casefold(), frame_mark(rubric, prompt, response)
    if found := re.search(CLOSED + FORMATS if control is None else CLOSED, text):
        return found[0]
    if mark in re.sub("[^0-9a-f]", "", text):
        return mark
    text = "".join(text.split())
    return next((token for token in control or () if squeezed(token).casefold() in text), None)
