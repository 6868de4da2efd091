"""A chat endpoint over raw HTTP: for gen_qa.py's questions and for `evaluate.py --url`.

What real servers do wrong is met here: they ask for a pause, time out, reset the connection, cut the body
off, drip it, blow it up. The key is read from OPENAI_API_KEY alone; it is sent to the server and appears
nowhere else: no proxy, netrc, cookie or redirect gets it or puts another in its place.
"""

import email.utils
import logging
import math
import os
import random
import re
import threading
import time
import urllib.parse
from concurrent.futures import Future, wait
from typing import Any

import requests

from files import InputError, parse_json

log = logging.getLogger("omni_r1")

LARGEST = 10_000_000  # bytes of a reply, decompressed; an answer has some thousand
SHORTEST_KEY = 12  # characters; `EMPTY` or `none`, as local servers take them, are words of ordinary text
LONG_PAUSE = 10.0  # seconds that are worth a word to the user
LONGEST_PAUSE = 3600.0
FIRST_WAIT = 0.5  # seconds between two tries, less up to half of it; doubles with each
LONGEST_WAIT = 60.0


class Unreachable(Exception):
    """The server failed on one request as often as we try, or the client was stopped."""


class RefusedForAll(Unreachable):
    """The server refused so many requests in a row that it is not for what they asked: no more are sent."""


class Refused(Exception):
    """The server will not answer this request (HTTP 400 and the like), however often it is sent."""


class TryAgain(Exception):
    """One attempt failed in a way that may pass. `pause`: the seconds that the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class ChatClient:
    """POSTs to /v1/chat/completions. Shared by all workers: a pause that the server asks for is for all.

    `timeout` (seconds) is for one whole request, from the name's lookup to the body's last byte. After
    `patience` refusals in a row, whoever asked, every call raises RefusedForAll. Raises InputError for a URL
    or a key that cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tries: int = 12,
        timeout: float = 60.0,
        patience: int = 8,
    ):
        self.url = url
        self.name = name_of(url)
        self.model = model
        self.tries = tries
        self.timeout = timeout
        self.patience = patience
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self.key.isascii() or not self.key.isprintable():
            raise InputError("OPENAI_API_KEY holds characters that no key has")
        self.session = requests.Session()
        self.session.trust_env = False
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=1000)  # a connection a worker
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)
        self.lock = threading.Lock()
        self.stop = threading.Event()  # set it, and every call under way raises Unreachable
        self.paused_until = 0.0
        self.retries = 0
        self.refusals = 0  # in a row
        self.verdict = Unreachable("stopped")  # what a stopped client raises

    def complete(self, messages: list[dict], **options: Any) -> tuple[str, dict[str, int]]:
        """The answer's text and its usage: {"prompt_tokens": n, "completion_tokens": n}.

        Tries again what may pass (429, 5xx, timeouts, resets, broken replies) with exponential back-off and
        jitter. Raises Refused, RefusedForAll, Unreachable; InputError for a wrong key, model or address.
        """
        reason = ""
        for attempt in range(self.tries + 1):
            self.wait_for_pause()
            try:
                answer = self.post(messages, options)
            except TryAgain as error:
                reason = str(error)
                self.put_off(error.pause)
            except Refused as error:
                self.count_refusal(error)
                raise
            except InputError as error:
                self.end(error)
            else:
                self.refusals = 0
                return answer
            if attempt < self.tries:
                longest = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
                self.stop.wait(longest * random.uniform(0.5, 1.0))
        raise Unreachable(f"{self.name} failed {self.tries + 1} times, the last with {reason}")

    def wait_for_pause(self) -> None:
        while not self.stop.is_set():
            pause = self.paused_until - time.monotonic()
            if pause <= 0:
                return
            self.stop.wait(min(pause, 1.0))
        raise self.verdict

    def put_off(self, pause: float) -> None:
        """Hold all requests back for `pause` seconds from now."""
        with self.lock:
            self.retries += 1
            now = time.monotonic()
            longer = now + pause - max(self.paused_until, now)
            self.paused_until = max(self.paused_until, now + pause)
        if pause > LONG_PAUSE and longer > 1.0:  # said once, not by each of the workers
            until = time.strftime("%H:%M:%S", time.localtime(time.time() + pause))
            log.warning("%s asks for a pause of %.0f seconds: waiting until %s", self.name, pause, until)

    def count_refusal(self, error: Refused) -> None:
        with self.lock:
            self.refusals += 1
            count = self.refusals
        if count >= self.patience:
            reason = f"{self.name} refused {count} requests in a row, the last with {error}"
            self.end(RefusedForAll(reason))

    def end(self, verdict: Exception) -> None:
        """Raise the verdict, in every other call too, now and later: the first that there is."""
        with self.lock:
            if not self.stop.is_set():
                self.verdict = verdict
                self.stop.set()
        raise self.verdict from None

    def post(self, messages: list[dict], options: dict[str, Any]) -> tuple[str, dict[str, int]]:
        """One request: the answer's text and usage. Raises TryAgain, Refused, InputError."""
        exchange = Future()
        body = {"model": self.model, "messages": messages, **options}
        # A thread for each request: sockets know timeouts for one read, not a deadline for all of them.
        threading.Thread(target=self.send, args=(body, exchange), daemon=True).start()
        deadline = time.monotonic() + self.timeout
        while not wait([exchange], timeout=0.2).done:
            if self.stop.is_set():
                raise self.verdict
            if time.monotonic() > deadline:
                raise TryAgain(f"no whole reply in {self.timeout:g} seconds")
        status, headers, data = exchange.result()
        if 200 <= status < 300:
            text, usage = read_reply(data)
            return self.redact(text), usage
        said = re.sub(r"[\s\x00-\x1f\x7f]+", " ", self.redact(data.decode("utf-8", "replace")))[:300]
        for_all = "model_not_found" in said or "insufficient_quota" in said
        if status < 400 or status in (401, 402, 403, 404) or for_all:
            hint = ""
            if status == 401 and not self.key:
                hint = "; set OPENAI_API_KEY"
            raise InputError(f"{self.name} says {status}{hint}: {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            raise TryAgain(f"HTTP {status}", retry_after(headers.get("Retry-After")))
        raise Refused(f"HTTP {status}: {said}")

    def send(self, body: dict, exchange: Future) -> None:
        """Set `exchange` to (status, headers, the body's bytes), or to a TryAgain."""
        headers = {}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        options = {"timeout": self.timeout, "allow_redirects": False, "stream": True}
        data = bytearray()
        deadline = time.monotonic() + self.timeout
        try:
            with self.session.post(self.url, json=body, headers=headers, **options) as response:
                for piece in response.iter_content(65_536):
                    data += piece
                    if len(data) > LARGEST:
                        raise TryAgain(f"a reply of more than {LARGEST:,} bytes")
                    if time.monotonic() > deadline:
                        raise TryAgain("no whole reply in time")  # nobody waits for it any more
            exchange.set_result((response.status_code, response.headers, bytes(data)))
        except TryAgain as error:
            exchange.set_exception(error)
        except Exception as error:  # its text may hold headers, and with them the key
            exchange.set_exception(TryAgain(type(error).__name__))

    def redact(self, text: str) -> str:
        """`text` without the key, as it is or as JSON may escape it."""
        if len(self.key) < SHORTEST_KEY:
            return text
        letters = [rf"(?:\\?{re.escape(letter)}|\\u(?i:{ord(letter):04x}))" for letter in self.key]
        return re.sub("".join(letters), "[key]", text)


def name_of(url: str) -> str:
    """The URL for messages: without its query, which may hold secrets. Raises InputError."""
    try:
        parts = urllib.parse.urlsplit(requests.Request("POST", url).prepare().url)
    except (ValueError, requests.RequestException):
        parts = urllib.parse.urlsplit("")
    if parts.scheme not in ("http", "https"):
        raise InputError("--url must be a chat completions endpoint: http(s)://HOST/v1/chat/completions")
    if "@" in parts.netloc:
        raise InputError("--url holds a user name or password: put the key into OPENAI_API_KEY instead")
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def read_reply(data: bytes) -> tuple[str, dict[str, int]]:
    """A reply's bytes -> the answer's text, its usage. JSON is UTF-8, whatever content type is claimed."""
    try:
        reply = parse_json(data.decode("utf-8-sig"))
        text = reply["choices"][0]["message"]["content"] or ""
        usage = reply.get("usage") or {}
        text = text.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written
        tokens = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise TryAgain("a reply that holds no answer") from None
    for name, count in tokens.items():
        if type(count) is not int or not 0 <= count < 10**9:
            tokens[name] = 0
    return text, tokens


def retry_after(value: str | None) -> float:
    """A Retry-After header (seconds or a date) -> seconds from now, at most an hour; 0 if it says nothing."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            seconds = 0.0
    if math.isnan(seconds):
        seconds = 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE)
