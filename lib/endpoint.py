"""Ask a chat model behind an OpenAI-compatible URL (vLLM, llama.cpp, Ollama, hosted)."""

import http.client
import json
import os
import time
import urllib.request

from lib.files import DataError, parse_json

TIMEOUT = 120.0  # seconds to wait for a sign of the server
ATTEMPTS = 4  # requests per prompt, with waits of ½, 1, 2 s between them, or of what Retry-After says
MAX_WAIT = 30  # seconds, if Retry-After says more
GIVE_UP = 8  # prompts in a row without an answer, after which no other is sent
MAX_TOKENS = 2048  # of an answer: some models reason first
MAX_CACHED = 64  # prompt_tokens of a prompt that was cached, at most; no model's context is so short
# A request without a reply (urllib's errors are OSErrors), or with one that is no chat completion.
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)
SAME_FOR_ALL = "id object owned_by created permission parent".split()  # keys of /models that identify nothing


class EndpointError(Exception):
    """A prompt has no answer. The text says why."""


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Return every reply as it is: no redirect is followed, since that would hand the key to another host."""

    def http_response(self, request, response):
        """Return the response, whatever its status."""
        return response

    https_response = http_response


class Endpoint:
    """A model behind `url`, which ends before /chat/completions; the key is read from JUDGE_API_KEY.

    model: its name, None for the server's only one. fingerprint: what the server says of it, None if nothing
    identifies the model, or once an answer has another system_fingerprint. unanswered: prompts in a row.
    parameters: names of those that the server takes, of temperature and max_tokens or max_completion_tokens.
    Raises DataError for a URL with a password or query, and for a server of several models.
    """

    def __init__(self, url: str, model: str | None = None):
        if any(mark in url for mark in "@?#"):
            raise DataError("--judge: expected a URL without user, password or query "
                            "(set the key in JUDGE_API_KEY), found one with them")
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.key = os.environ.get("JUDGE_API_KEY", "").strip() or "EMPTY"  # servers without keys ignore it
        self.opener = urllib.request.build_opener(AnyStatus)
        self.unanswered = 0
        self.parameters = ["temperature", "max_tokens"]
        try:
            entries = {str(entry["id"]): entry for entry in parse_json(self.send("/models")[1])["data"]}
        except FAILURES:
            entries = {"default": {}}  # a server that does not list its models
        if not model and len(entries) != 1:
            names = ", ".join(entries).replace(self.key, "…")  # a server could repeat it
            raise DataError(f"--judge-model: expected one of the models at {self.url} ({names!r}), "
                            "found none")
        self.model = model or next(iter(entries))
        entry = entries.get(self.model, {})
        entry = {key: entry[key] for key in sorted(entry) if key not in SAME_FOR_ALL}
        try:
            self.system = parse_json(self.first_reply())["system_fingerprint"]
        except FAILURES:
            self.system = None
        identified = entry or self.system not in (None, "", "fp_ollama")  # Ollama says this of all models
        self.fingerprint = json.dumps([self.url, self.model, entry, self.system]) if identified else None

    def send(self, path: str, body: dict | None = None) -> tuple:
        """Send a request. Returns the HTTP response and its text."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, headers)
        with self.opener.open(request, timeout=TIMEOUT) as response:
            return response, response.read(1 << 24).decode(errors="replace")

    def ask(self, prompt: str, max_tokens: int = MAX_TOKENS) -> tuple:
        """Send a prompt, to be answered at temperature 0. Returns the HTTP response and its text."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        for name in self.parameters:
            body[name] = 0 if name == "temperature" else max_tokens
        return self.send("/chat/completions", body)

    def first_reply(self) -> str:
        """Return the text of a first reply, after removing the parameters that the server refuses by name."""
        while True:
            response, text = self.ask("1", max_tokens=1)
            refused = [name for name in self.parameters if name in text]
            if response.status not in (400, 422) or not refused:
                return text
            print(f"judge: the server refuses {refused[0]}")
            self.parameters.remove(refused[0])
            if refused[0] == "max_tokens":
                self.parameters.append("max_completion_tokens")

    def complete(self, prompt: str, n_words: int) -> str:
        """Return the answer to a prompt. Raises EndpointError.

        n_words: the number of words in the part of the prompt that no other prompt begins with.
        Tries again after network errors, replies that are no chat completion, HTTP 408, 429 and 5xx.
        """
        wait = 0
        for attempt in range(ATTEMPTS):
            time.sleep(wait)
            if self.unanswered >= GIVE_UP:
                raise EndpointError(f"not asked, after {GIVE_UP} in a row without an answer")
            status, wait = 0, 0.5 * 2**attempt
            try:
                response, text = self.ask(prompt)
                status = response.status
                if status == 200:
                    return self.read_answer(parse_json(text), n_words)
                why = f"HTTP {status}: {text!r}"
                retry_after = response.headers.get("Retry-After", "")
                if retry_after.isdecimal():  # it may be a date, too
                    wait = min(int(retry_after), MAX_WAIT)
            except FAILURES as error:
                why = f"no chat completion: {error!r}"
            if 300 <= status < 500 and status not in (408, 429):
                break
        self.unanswered += status not in (400, 413, 422)  # these are about the prompt, not the server
        raise EndpointError(why.replace(self.key, "…")[:200])

    def read_answer(self, reply: dict, n_words: int) -> str:
        """Return the text of a chat completion. Raises EndpointError if the prompt or the answer was cut.

        Some servers leave cached tokens out of prompt_tokens: those of a beginning that other prompts share,
        or nearly all if this prompt was sent before. A word has at least one token, so that a prompt was cut
        if prompt_tokens is less than n_words but more than MAX_CACHED.
        """
        choice = reply["choices"][0]
        answer = (choice["message"]["content"] or "").strip()
        prompt_cut = MAX_CACHED < (reply.get("usage") or {}).get("prompt_tokens", n_words) < n_words
        self.unanswered = 0
        if reply.get("system_fingerprint") != self.system:
            self.fingerprint = None
        if prompt_cut:
            raise EndpointError("a prompt of which the server has read the end alone")
        if choice.get("finish_reason") == "length":
            raise EndpointError(f"an answer cut at {MAX_TOKENS} tokens")
        return answer
