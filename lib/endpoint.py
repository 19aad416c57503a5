"""A chat model behind an OpenAI-compatible URL (vLLM, llama.cpp, Ollama, hosted); standard library only."""

import email.utils
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from functools import cached_property

from lib.cli import printable
from lib.files import DataError

ATTEMPTS = 4  # requests per prompt, with waits of ½, 1, 2 s between them, or what Retry-After says
MAX_WAIT = 30.0  # seconds that a Retry-After is followed to
GIVE_UP = 8  # prompts in a row that get no answer: the others are not sent
MAX_TOKENS = 2048  # of an answer: some models reason first
TRANSPORT = (OSError, http.client.HTTPException)  # urllib's errors are OSErrors
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # an answer of another form


class EndpointError(Exception):
    """A prompt that got no answer, and why."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key to another host."""

    def redirect_request(self, *args):
        return None


class Endpoint:
    """`url` ends before /chat/completions; the key, JUDGE_API_KEY, goes in the Authorization header only."""

    def __init__(self, url: str, model: str | None, timeout: float):
        if any(mark in url for mark in "@?#"):
            raise DataError("--judge: expected a URL without user, password or query "
                            "(a key belongs in JUDGE_API_KEY), found one with them")
        self.url, self.timeout = url.rstrip("/").removesuffix("/chat/completions"), timeout
        self.key, self.unanswered = os.environ.get("JUDGE_API_KEY", "").strip(), 0
        self.opener = urllib.request.build_opener(NoRedirect)
        self.entries, self.system = self.models(), None
        self.model = model or self.only_model()

    def send(self, path: str, body: dict | None = None) -> dict:
        """One request, the whole answer within the time-out. Raises TRANSPORT and ValueError."""
        headers = ({"Content-Type": "application/json"}
                   | ({"Authorization": f"Bearer {self.key}"} if self.key else {}))
        request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body else None,
                                         headers)
        deadline, text = time.monotonic() + self.timeout, b""
        with self.opener.open(request, timeout=self.timeout) as reply:
            while chunk := reply.read1(1 << 16):
                text += chunk
                if time.monotonic() > deadline or len(text) > 1 << 24:
                    raise TimeoutError("an answer that is too slow or too long")
        return json.loads(text)

    def models(self) -> dict[str, dict] | None:
        """{name: entry} of the server's models; None where it does not say."""
        try:
            return {str(entry["id"]): entry for entry in self.send("/models")["data"]}
        except (*TRANSPORT, *MALFORMED):
            return None

    def only_model(self) -> str:
        """The server's only model; "default" where it does not say (the prompts then show what is wrong)."""
        if self.entries is None:
            return "default"
        if len(self.entries) != 1:
            names = self.without_key(", ".join(list(self.entries)[:9]))
            raise DataError(f"--judge-model: expected one of the models at {self.url} ({names}, …), "
                            f"found none given")
        return next(iter(self.entries))

    @cached_property
    def identity(self) -> str | None:
        """What the server says of its model, its /models entry and system_fingerprint; None for neither.

        What servers say of every model is not counted. Asked once, before the first prompt; None from then on
        where an answer comes from another system_fingerprint.
        """
        try:
            reply = self.send("/chat/completions", self.body("1", max_tokens=1))
            self.system = reply.get("system_fingerprint")
        except (*TRANSPORT, *MALFORMED):
            self.system = False  # not known: answers are not compared with it
        entry = (self.entries or {}).get(self.model, {})
        common = ("id", "object", "owned_by", "created", "permission", "parent")  # vLLM: time of request
        entry = {key: entry[key] for key in sorted(entry) if key not in common}
        named = entry or self.system not in (None, False, "", "fp_ollama")
        return json.dumps([self.url, self.model, entry, self.system]) if named else None

    def body(self, prompt: str, max_tokens: int = MAX_TOKENS) -> dict:
        """A request for the answer at temperature 0."""
        return {"model": self.model, "temperature": 0, "max_tokens": max_tokens,
                "messages": [{"role": "user", "content": prompt}]}

    def complete(self, prompt: str) -> str:
        """The answer at temperature 0; retries network errors, HTTP 408, 429, 5xx. Raises EndpointError."""
        for attempt in range(ATTEMPTS):
            if self.unanswered >= GIVE_UP:
                raise EndpointError(f"not asked, after {GIVE_UP} in a row without an answer")
            wait = 0.5 * 2**attempt
            try:
                reply = self.send("/chat/completions", self.body(prompt))
                choice = reply["choices"][0]
                text, cut = choice["message"]["content"] or "", choice.get("finish_reason") == "length"
                if not isinstance(text, str):
                    raise TypeError("content that is not text")
                self.unanswered = 0
                if self.system is not False and reply.get("system_fingerprint") != self.system:
                    self.identity = None
                counted = (reply.get("usage") or {}).get("prompt_tokens")
                if isinstance(counted, int) and counted < len(prompt.split()):
                    raise EndpointError("a prompt of which the server has read the end alone")
                if cut:
                    raise EndpointError(f"an answer cut at {MAX_TOKENS} tokens")
                return text
            except urllib.error.HTTPError as error:
                why, wait = self.told_by(error), retry_after(error.headers.get("Retry-After"), wait)
                if error.code in (400, 413, 422):  # this prompt, not the server
                    raise EndpointError(why) from None
                if error.code not in (408, 429) and error.code < 500:
                    break
            except TRANSPORT as error:
                why = str(getattr(error, "reason", "") or error) or type(error).__name__
            except MALFORMED as error:
                why = f"no chat completion could be had ({type(error).__name__})"
            if attempt + 1 < ATTEMPTS:
                time.sleep(wait)
        self.unanswered += 1
        raise EndpointError(self.without_key(why))

    def told_by(self, error: urllib.error.HTTPError) -> str:
        """The status, and the beginning of what the server says about it."""
        try:
            said = error.read(4096).decode(errors="replace")
        except TRANSPORT:
            said = ""
        return " ".join(self.without_key(f"HTTP {error.code} {error.reason} {said}").split())[:200]

    def without_key(self, text: str) -> str:
        """What may be printed: a server could repeat the key."""
        return printable(text.replace(self.key, "…") if self.key else text)


def retry_after(header: str | None, otherwise: float) -> float:
    """Seconds to wait by Retry-After (seconds or a date), at most MAX_WAIT; `otherwise` where unreadable."""
    try:
        seconds = float(header)
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, IndexError, OverflowError):
            return otherwise
    return min(max(seconds, 0.0), MAX_WAIT) if seconds == seconds else otherwise
