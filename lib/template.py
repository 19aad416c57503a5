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
import threading
from functools import cache, lru_cache

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: no limit on memory
    resource = None

SECONDS = 1.0  # of processor time for one rendering; published templates take about 0.0001
MEMORY = 1 << 29  # bytes of address space of the child process
LONGEST = 1 << 17  # characters of a rendered text, and LONGER more for each character of the request
LONGER = 4


class Generation(Extension):
    """The tag {% generation %} … {% endgeneration %}, around assistant words in some templates: no effect."""

    tags = {"generation"}

    def parse(self, parser):
        """Return the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Return a value as JSON, without Jinja's escapes for HTML: the filter `tojson` of transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def raise_exception(message):
    """Refuse a conversation in the template's own words. Raises TemplateError."""
    raise TemplateError(str(message))


@lru_cache(maxsize=8)
def compile_template(source: str):
    """Compile a template with the settings of transformers' `apply_chat_template`."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def answer(line: str) -> dict:
    """Render one request. Returns {"text": …} or {"error": …}."""
    request = json.loads(line)
    try:
        if request["date"]:
            date = datetime.datetime.strptime(request["date"], "%Y-%m-%d")
            request["variables"]["strftime_now"] = date.strftime
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
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        except (ValueError, OSError):  # macOS has no such limit; or a lower one is already set
            pass
    limit_time = getattr(signal, "setitimer", None)  # Windows has none
    for line in sys.stdin:
        if limit_time:
            limit_time(signal.ITIMER_PROF, SECONDS)  # counts processor time, then ends this process
        reply = json.dumps(answer(line))
        if limit_time:
            limit_time(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


class Renderer:
    """A child process that renders templates, started for the first request and after a limit ended it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process = None

    def ask(self, request: dict) -> dict:
        """Send a request. Returns the reply. Raises TemplateError where the child process ends instead."""
        with self.lock:
            if self.process is None:
                self.process = subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, text=True, start_new_session=True)  # no Ctrl-C for the child
            reply = ""
            try:
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:  # also after Ctrl-C: a late reply must not answer the next request
                complete = reply.endswith("\n")
                if not complete:
                    process, self.process = self.process, None
                    process.kill()
                    process.communicate()
            if not complete:
                raise TemplateError(f"it needs more than {SECONDS:g} s of processor time or "
                                    f"{MEMORY >> 20} MB of memory (exit status {process.returncode}); "
                                    f"use the template that was published with the model")
            return json.loads(reply)


@cache
def renderer_of(process_id: int) -> Renderer:
    """Return the renderer of this process. A fork has another process id, so that it starts its own."""
    return Renderer()


def render_template(source: str, variables: dict, date: str | None = None) -> str:
    """Render a chat template.

    variables: messages, special tokens, …, all of JSON. date: YYYY-MM-DD, which strftime_now prints.
    Raises TemplateError, in one line, where the template refuses, fails, or reaches a limit.
    """
    request = {"source": source, "variables": variables, "date": date}
    reply = renderer_of(os.getpid()).ask(request)
    if "error" in reply:
        raise TemplateError(reply["error"])
    return reply["text"]


if __name__ == "__main__":
    serve()
