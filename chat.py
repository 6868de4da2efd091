"""A chat endpoint over raw HTTP: for gen_qa.py's questions and for `evaluate.py --url`.

What real servers do wrong is met here: they ask for a pause, time out, reset the connection, cut the body
off. The key is read from OPENAI_API_KEY; it is sent to the server and appears nowhere else.
"""

import email.utils
import json
import os
import random
import threading
import time

import requests

from files import InputError


class Unreachable(Exception):
    """The server failed on one request as often as we try."""


class Refused(Exception):
    """The server will not answer this request (HTTP 400 and the like), however often it is sent."""


class ChatClient:
    """POSTs to /v1/chat/completions. Shared by all workers: a pause that the server asks for is for all."""

    def __init__(self, url, model, tries=12, timeout=60, longest_wait=60):
        self.url, self.model, self.tries = url, model, tries
        self.timeout, self.longest_wait = timeout, longest_wait  # seconds
        self.key = os.environ.get("OPENAI_API_KEY", "")
        self.sessions, self.lock, self.stop = threading.local(), threading.Lock(), threading.Event()
        self.paused_until, self.retries = 0.0, 0

    def complete(self, messages, **options):
        """The answer's text and its (input, output) tokens. Retries what may pass (429, 5xx, timeouts,
        resets, cut-off bodies) with exponential back-off and jitter. Raises Unreachable, Refused, InputError.
        """
        for attempt in range(self.tries + 1):
            while (pause := self.paused_until - time.monotonic()) > 0 and not self.stop.wait(pause):
                pass
            if self.stop.is_set():
                raise Unreachable("stopped")
            try:
                reason, asked = self.post(messages, options)
            except (requests.RequestException, ValueError, KeyError, TypeError, IndexError) as error:
                reason, asked = f"{type(error).__name__}", None
            if reason is None:
                return asked
            with self.lock:
                self.retries += 1
                if asked is not None:
                    self.paused_until = max(self.paused_until, time.monotonic() + asked)
            if asked is None and attempt < self.tries:
                self.stop.wait(min(0.5 * 2**attempt, self.longest_wait) * random.uniform(0.5, 1.0))
        raise Unreachable(f"{self.url} failed {self.tries + 1} times, the last with {reason}")

    def post(self, messages, options):
        """One request -> (None, (text, tokens)), or (why to try again, seconds that the server asks for)."""
        if not hasattr(self.sessions, "session"):
            self.sessions.session = requests.Session()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        body = {"model": self.model, "messages": messages, **options}
        response = self.sessions.session.post(
            self.url, json=body, headers=headers, timeout=self.timeout, allow_redirects=False
        )
        if response.ok:
            reply = json.loads(self.redact(response.text))
            usage = reply.get("usage") or {}
            tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
            return None, (str(reply["choices"][0]["message"]["content"] or ""), tokens)
        said = self.redact(" ".join(response.text.split()))[:300]
        status = response.status_code
        if status in (401, 403, 404) or "model_not_found" in said or "insufficient_quota" in said:
            hint = "; set OPENAI_API_KEY" if status == 401 and not self.key else ""
            raise InputError(f"{self.url} says {status}{hint}: {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            return f"HTTP {status}", retry_after(response.headers.get("Retry-After"))
        raise Refused(f"HTTP {status}: {said}")

    def redact(self, text):
        return text.replace(self.key, "[key]") if self.key else text


def retry_after(value):
    """A Retry-After header (seconds or a date) -> seconds, at most an hour; None if there is none."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.0), 3600.0)
