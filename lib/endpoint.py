"""Ask a chat model behind an OpenAI-compatible URL (vLLM, llama.cpp, Ollama, hosted)."""

import http.client
import json
import os
import time
import urllib.request

from lib.files import DataError, parse_json

TIMEOUT = 120.0  # seconds to wait for a sign of the server
ATTEMPTS = 5  # requests per prompt, with waits of 1, 2, 4, 8 s between them
GIVE_UP = 8  # prompts in a row without an answer, after which the server is not asked again
MAX_CACHED = 64  # prompt_tokens of a prompt that was cached, at most; no model's context is so short
# A request without a reply (urllib's errors are OSErrors), or with one that is no chat completion.
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


class EndpointError(Exception):
    """A prompt has no answer. The text says why."""


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Return every reply as it is: no redirect is followed, since that would hand the key to another host."""

    def http_response(self, request, response):
        """Return the response, whatever its status."""
        return response

    https_response = http_response


class Endpoint:
    """The model of this name behind `url`, which ends before /chat/completions; the key is JUDGE_API_KEY.

    Raises DataError for a URL with a password or query.
    """

    def __init__(self, url: str, model: str):
        if any(mark in url for mark in "@?#"):
            raise DataError("--judge: expected a URL without user, password or query "
                            "(set the key in JUDGE_API_KEY), found one with them")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model = model
        self.key = os.environ.get("JUDGE_API_KEY", "").strip() or "EMPTY"  # servers without keys ignore it
        self.opener = urllib.request.build_opener(AnyStatus)
        self.sampling = {"temperature": 0}
        self.unanswered = 0  # prompts in a row

    def send(self, prompt: str, sampling: dict) -> tuple[int, str]:
        """Send a prompt. Returns the HTTP status and the reply's text."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]} | sampling
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with self.opener.open(request, timeout=TIMEOUT) as response:
            return response.status, response.read(1 << 24).decode(errors="replace")

    def complete(self, prompt: str, n_words: int) -> str:
        """Return the answer to a prompt.

        n_words: the number of words in the part of the prompt that no other prompt begins with.
        Tries again after network errors, replies that are no chat completion, HTTP 408, 429 and 5xx.
        Raises EndpointError for a prompt without an answer, DataError after GIVE_UP of them in a row.
        """
        sampling = self.sampling  # other threads may change it
        for attempt in range(ATTEMPTS):
            time.sleep(2 ** (attempt - 1) if attempt else 0)
            if self.unanswered >= GIVE_UP:
                raise EndpointError("not asked: the server has stopped answering")
            try:
                status, text = self.send(prompt, sampling)
                if status == 200:
                    if self.sampling and not sampling:
                        print(f"judge: {self.url} refuses a temperature: its own is used")
                        self.sampling = sampling
                    answer = read_answer(parse_json(text), n_words)
                    self.unanswered = 0
                    return answer
                why = f"HTTP {status}: {text!r}"
            except EndpointError:  # an answer, which cannot be used
                self.unanswered = 0
                raise
            except FAILURES as error:
                status = 0
                why = f"no chat completion: {error!r}"
            if sampling and status in (400, 422) and "temperature" in why:
                sampling = {}  # some reasoning models have no choice of it; or the error quotes the prompt
            elif 300 <= status < 500 and status not in (408, 429):
                break
        self.unanswered += status not in (400, 413, 422)  # these are about the prompt, not the server
        why = why.replace(self.key, "…")[:200]
        if self.unanswered >= GIVE_UP:
            raise DataError(f"--judge: expected answers from {self.url}, found none to {GIVE_UP} prompts in "
                            f"a row: {why} (check --judge, --judge-model and JUDGE_API_KEY)")
        raise EndpointError(why)


def read_answer(reply: dict, n_words: int) -> str:
    """Return the text of a chat completion. Raises EndpointError if the prompt or the answer was cut.

    Some servers leave cached tokens out of prompt_tokens: those of a beginning that other prompts share,
    or nearly all if this prompt was sent before. A word has at least one token, so that a prompt was cut
    if prompt_tokens is less than n_words but more than MAX_CACHED.
    """
    choice = reply["choices"][0]
    answer = (choice["message"]["content"] or "").strip()
    n_tokens = (reply.get("usage") or {}).get("prompt_tokens") or n_words
    if MAX_CACHED < n_tokens < n_words:
        raise EndpointError("a prompt of which the server has read the end alone: raise its context "
                            "(Ollama: num_ctx; vLLM: --max-model-len)")
    if choice.get("finish_reason") == "length":
        raise EndpointError("an answer that was cut: raise the server's limit of new tokens, or switch its "
                            "thinking off")
    return answer
