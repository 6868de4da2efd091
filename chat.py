"""A chat endpoint over raw HTTP: for gen_qa.py's questions and for `evaluate.py --url`.

The key is read from OPENAI_API_KEY alone and sent to the server alone: no proxy, netrc or redirect gets it or
puts another in its place, and no message holds it, nor the URL's query.
"""

import logging
import os
import random
import re
import threading
import time
from contextlib import suppress

import requests

from files import InputError, parse_json

log = logging.getLogger("omni_r1")

TRIES = 12  # after the first
TIMEOUT = 60.0  # seconds for the connection, and for each read
FIRST_WAIT = 0.5  # seconds between two tries, less up to half of it; doubles with each
LONGEST_WAIT = 60.0
LONGEST_PAUSE = 600.0  # seconds that a Retry-After may ask for
PASSING = (408, 409, 425, 429)  # and all from 500
SHORTEST_KEY = 12  # characters; `EMPTY` or `none`, as local servers take them, are words of ordinary text


class Refused(InputError):
    """The server will not answer this request, however often it is sent; another it may."""


class ChatClient:
    """POSTs to /v1/chat/completions; one for all workers.

    `stop`, once set, ends every call that is not on its way. Raises InputError for what is no URL.
    """

    def __init__(self, url: str, model: str):
        self.url = url
        self.name = public_url(url)
        self.model = model
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.mount(url, requests.adapters.HTTPAdapter(pool_maxsize=1000))  # a connection a worker
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"
        secrets = (key, *re.split("[?&=#]", url)[1:])  # and the values of a query
        self.secrets = [one for one in secrets if len(one) >= SHORTEST_KEY]
        self.stop = threading.Event()
        self.answers = 0
        self.quiet_until = 0.0

    def complete(self, messages: list[dict], **options: object) -> tuple[str, dict]:
        """The answer's text and its usage: {"prompt_tokens": n, "completion_tokens": n}.

        Tries again what may pass (429, 5xx, timeouts, resets, broken replies). Raises Refused for this
        request, InputError where no other would fare better: a wrong key, model or address, or no answer to
        anyone in all the tries.
        """
        body = {"model": self.model, "messages": messages, **options}
        before = self.answers
        reason = "the end of the run"
        pause = 0.0
        for attempt in range(TRIES + 1):
            if self.stop.wait(pause):
                raise InputError(reason)
            pause = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
            try:
                response = self.session.post(self.url, json=body, timeout=TIMEOUT, allow_redirects=False)
                status = response.status_code
                reason = f"HTTP {status}"
                if status < 500 and status not in PASSING:
                    answer = self.read(response)
                    self.answers += 1
                    return answer
                with suppress(ValueError):  # "soon"
                    asked = float(response.headers.get("Retry-After", 0))
                    pause = max(pause, min(asked, LONGEST_PAUSE))
            except InputError:
                raise
            except Exception as error:  # its text may hold headers, and with them the key
                reason = type(error).__name__
            now = time.monotonic()
            if pause > 1 and now > self.quiet_until:  # once for all workers, not at the first two failures
                most = pause + LONGEST_WAIT * (TRIES - attempt)
                self.quiet_until = now + most
                log.warning("no answer from %s (%s): trying again for up to %d s", self.name, reason, most)
        reason = f"{self.name} failed {TRIES + 1} times, the last with {reason}"
        if self.answers > before:  # others were answered in that time
            raise Refused(reason)
        raise InputError(reason)

    def read(self, response: requests.Response) -> tuple[str, dict]:
        """Raises Refused, InputError, or what a broken reply brings."""
        status = response.status_code
        text = response.content.decode("utf-8-sig")  # JSON is UTF-8, whatever content type is claimed
        if status == 200:
            reply = parse_json(text)
            usage = reply.get("usage") or {}
            tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
            text = reply["choices"][0]["message"]["content"] or ""
        for secret in self.secrets:
            text = text.replace(secret, "[key]")
        if status == 200:
            return text, tokens
        said = f"{self.name} says HTTP {status}: {text[:300]!r}"
        if status < 405 and status != 400:
            raise InputError(said)
        raise Refused(said)


def public_url(url: str) -> str:
    """Scheme, host and path, which may be written down: user names and queries hold secrets."""
    match = re.match(r"(https?://)(?:[^/?#]*@)?([^?#]*)", url)
    if not match:
        raise InputError("--url must be a chat completions endpoint: http(s)://HOST/v1/chat/completions")
    public = match[1] + match[2]
    requests.Request("POST", public).prepare()  # an OSError that says what is wrong with it
    return public
