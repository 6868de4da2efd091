"""A chat endpoint over raw HTTP: for gen_qa.py's questions and for `evaluate.py --url`.

The key is read from OPENAI_API_KEY alone and sent to the server alone: no proxy, netrc or redirect gets it or
puts another in its place, and no message holds it, nor the URL's query.
"""

import logging
import os
import random
import threading
import time
import urllib.parse

import requests

from files import InputError, parse_json

log = logging.getLogger("omni_r1")

FIRST_WAIT = 0.5  # seconds between two tries, less up to half of it; doubles with each
LONGEST_WAIT = 60.0
LONGEST_PAUSE = 600.0  # seconds that a Retry-After may ask for
PASSING = (408, 409, 425, 429)  # and all from 500
LARGEST = 2_000_000  # bytes of a reply; an answer has some thousand
SHORTEST_KEY = 12  # characters; `EMPTY` or `none`, as local servers take them, are words of ordinary text


class Refused(Exception):
    """The server will not answer this request, however often it is sent."""


class ChatClient:
    """POSTs to /v1/chat/completions; one for all workers.

    `timeout` (seconds) is for the connection and for each read. `stop`, once set, ends every call under way
    with an InputError. Raises InputError for what is no URL.
    """

    def __init__(self, url: str, model: str, tries: int = 12, timeout: float = 60.0):
        self.url = url
        self.name = public_url(url)
        self.model = model
        self.tries = tries
        self.timeout = timeout
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.mount(url, requests.adapters.HTTPAdapter(pool_maxsize=1000))  # a connection a worker
        if self.key:
            self.session.headers["Authorization"] = f"Bearer {self.key}"
        self.stop = threading.Event()
        self.answers = 0
        self.quiet_until = 0.0

    def complete(self, messages: list[dict], **options: object) -> tuple[str, dict[str, int]]:
        """The answer's text and its usage: {"prompt_tokens": n, "completion_tokens": n}.

        Tries again what may pass (429, 5xx, timeouts, resets, broken replies). Raises Refused for this
        request, InputError where no other would fare better: a wrong key, model or address, or no answer to
        anyone in all the tries.
        """
        body = {"model": self.model, "messages": messages, **options}
        before = self.answers
        reason = "the end of the run"
        pause = 0.0
        for attempt in range(self.tries + 1):
            if self.stop.wait(pause):
                break
            pause = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
            try:
                response = self.session.post(self.url, json=body, timeout=self.timeout, allow_redirects=False)
                answer = self.read(response)
                if answer:
                    self.answers += 1
                    return answer
                reason = f"HTTP {response.status_code}"
                pause = max(pause, retry_after(response.headers.get("Retry-After", "")))
            except (Refused, InputError):
                raise
            except Exception as error:  # its text may hold headers, and with them the key
                reason = type(error).__name__
            self.announce(reason, attempt, pause)
        reason = f"{self.name} failed {self.tries + 1} times, the last with {reason}"
        if self.answers > before:  # others were answered in that time
            raise Refused(reason)
        raise InputError(reason)

    def read(self, response: requests.Response) -> tuple[str, dict[str, int]] | None:
        """None for a status that may pass. Raises Refused, InputError, or what a broken reply brings."""
        status = response.status_code
        if len(response.content) > LARGEST:
            raise Refused(f"a reply of more than {LARGEST:,} bytes")
        if status in PASSING or status >= 500:
            return None
        text = response.content.decode("utf-8-sig")  # JSON is UTF-8, whatever content type is claimed
        if status == 200:
            reply = parse_json(text)
            usage = reply.get("usage") or {}
            tokens = {}
            for name in ("prompt_tokens", "completion_tokens"):
                tokens[name] = int(usage.get(name) or 0)
            return self.redact(reply["choices"][0]["message"]["content"] or ""), tokens
        said = f"{self.name} says HTTP {status}: {self.redact(text)[:300]!r}"
        if status < 400 or status in (401, 402, 403, 404):
            raise InputError(said)
        raise Refused(said)

    def announce(self, reason: str, attempt: int, pause: float) -> None:
        """Say, once for all workers, what is tried again and until when."""
        left = pause
        for later in range(attempt + 1, self.tries):
            left += min(FIRST_WAIT * 2**later, LONGEST_WAIT)
        now = time.time()
        if now > self.quiet_until and (attempt == 2 or pause > 10):
            self.quiet_until = now + left
            until = time.strftime("%H:%M:%S", time.localtime(now + left))
            log.warning("no answer from %s (%s): trying again until about %s", self.name, reason, until)

    def redact(self, text: str) -> str:
        if len(self.key) < SHORTEST_KEY:
            return text
        return text.replace(self.key, "[key]")


def public_url(url: str) -> str:
    """Scheme, host and path, which may be written down: user names and queries hold secrets."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise InputError("--url must be a chat completions endpoint: http(s)://HOST/v1/chat/completions")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def retry_after(value: str) -> float:
    """A Retry-After header in seconds; 0 where it says nothing."""
    try:
        return min(float(value), LONGEST_PAUSE)
    except ValueError:
        return 0.0
