"""Render a chat template with Jinja, sandboxed, in a child process with limits on time and memory.

Jinja's sandbox keeps a template away from the interpreter, but not from endless loops and huge texts. The
child process, `python lib/template.py`, reads requests and writes replies, one line of JSON each. One child
serves all templates. It does not import torch and starts in 0.1 s. A template that reaches a limit ends the
child, and the next request starts another one.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache, lru_cache, partial

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: no limits
    resource = None

SECONDS = 1.0  # of processor time for one rendering; published templates take about 0.0001
MEMORY = 1 << 29  # bytes of address space of the child process
LONGEST = 1 << 17  # characters of a rendered text, and LONGER more for each character of the request
LONGER = 4
DATE = datetime.date(2024, 7, 26)  # printed by templates that print the date; Llama 3.2's own default


class Generation(Extension):
    """The tag {% generation %} … {% endgeneration %}, around assistant words in some templates: no effect."""

    tags = {"generation"}

    def parse(self, parser):
        """Return the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message):
    """Refuse a conversation in the template's own words. Raises TemplateError."""
    raise TemplateError(str(message))


@lru_cache(maxsize=8)
def compile_template(source: str):
    """Compile a template with the settings of transformers' `apply_chat_template`."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # without escapes for HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DATE.strftime}
    return environment.from_string(source)


def answer(line: str) -> dict:
    """Render one request. Returns {"text": …} or {"error": …}."""
    request = json.loads(line)
    try:
        text = compile_template(request["source"]).render(request["variables"])
    except Exception as error:  # a template can cause any: ZeroDivisionError, RecursionError, MemoryError, …
        name = "" if type(error) is TemplateError else f"{type(error).__name__}: "
        words = f"{name}{error}"[:300]
        return {"error": "".join(c if c.isprintable() else " " for c in words)}
    longest = LONGEST + LONGER * len(line)
    if len(text) > longest:
        return {"error": f"expected at most {longest:,} characters of text, found {len(text):,}"}
    return {"text": text}


def serve() -> None:
    """Answer requests until the input ends, which it does when the parent process ends."""
    if resource:
        with suppress(ValueError, OSError):  # macOS has no such limit; or a lower one is already set
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        if resource:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # processor time; its signal ends this process
        reply = json.dumps(answer(line))
        if resource:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


@cache
def start_child(process_id: int) -> subprocess.Popen:
    """Start the child of this process; a fork has another process id, so that it starts its own."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True, start_new_session=True)  # no Ctrl-C for it


def render_template(source: str, variables: dict) -> str:
    """Render a chat template.

    variables: messages, special tokens, …, all of JSON. Raises TemplateError, in one line, where the template
    refuses, fails, or reaches a limit.
    """
    child = start_child(os.getpid())
    reply = ""
    try:
        child.stdin.write(json.dumps({"source": source, "variables": variables}) + "\n")
        child.stdin.flush()
        reply = child.stdout.readline()
    except BrokenPipeError:
        pass
    finally:  # also after Ctrl-C: a late reply must not answer the next request
        if not reply.endswith("\n"):
            start_child.cache_clear()
            child.kill()
            child.communicate()
    if child.returncode is not None:
        raise TemplateError(f"it needs more than {SECONDS:g} s of processor time or {MEMORY >> 20} MB of "
                            f"memory (exit status {child.returncode}); use the template that was published "
                            "with the model")
    reply = json.loads(reply)
    if "error" in reply:
        raise TemplateError(reply["error"])
    return reply["text"]


if __name__ == "__main__":
    serve()
