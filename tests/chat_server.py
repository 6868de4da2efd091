"""A stand-in for a chat endpoint: for the tests, and for the demo's question generation.

    python tests/chat_server.py --port_file FILE

Answers Fig. 1's prompt with a question made from the captions in it; answers a question about audio
(evaluate.py --url) with one of its choices. It can fail as real servers do.
"""

import argparse
import contextlib
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WORDS = "dog bird frog cow engine drill clock siren rain wind waves drum flute guitar man woman robot".split()  # noqa: SIM905


def draw(text: str, count: int) -> int:
    """A number below `count` that the text decides."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % count


def question_about(prompt: str) -> str:
    """The clip's captions -> the text of an answer, the same every time."""
    captions = prompt.rsplit("input:", 1)[1]
    if "never answered" in captions:
        return "I am sorry."
    right = re.search(r"sound of an? (\w+)", captions)[1]
    others = sorted(set(WORDS) - {right}, key=lambda word: draw(captions + word, 2**60))
    choices = [right, *others[:3]]
    row = {"question_text": "What can be heard in the video?", "multi_choice": choices, "answer": 0}
    if draw(captions, 2):
        return f"output: {json.dumps(row)}"
    return f"Here is one.\n```json\n{json.dumps(row, indent=1)}\n```\nI hope that this helps!"


def reply_of(text: str | None, tokens: int = 400) -> dict:
    usage = {"prompt_tokens": tokens, "completion_tokens": 50}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    """Of a request, here and in hub.py."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes | dict, headers: dict | None = None, sent: float = 1.0) -> None:
        """`sent` is the share of the body that is sent before the connection is cut."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: int(sent * len(body))])
        self.server.paid += sent == 1 and b'"usage"' in body
        self.close_connection = sent < 1


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type, fail: float = 0.0):
        """`fail` is the share of requests that fail."""
        super().__init__(("127.0.0.1", 0), handler)
        self.fail = fail
        self.paid = 0  # answers, by whom asks
        self.random = random.Random(0)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


class ChatHandler(Handler):
    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization")
        server.requests.append((time.monotonic(), key, body))
        time.sleep(server.latency)
        content = body["messages"][-1]["content"]
        tokens = len(json.dumps(content)) // 4
        if server.always:
            self.reply(*server.always)
        elif server.random.random() < server.fail:
            self.misbehave(server.random.choice(server.ways), key)
        elif isinstance(content, str):
            self.reply(200, reply_of(question_about(content), tokens))
        else:  # a question about audio: one of the choices that it lists
            asked = next(part["text"] for part in content if part["type"] == "text")
            choices = re.findall(r"'([^']*)'", asked.split("options:")[1])
            if not server.hears:
                tokens = len(asked) // 4
            self.reply(200, reply_of(choices[draw(asked, len(choices))], tokens))

    def misbehave(self, way: str, key: str | None) -> None:
        replies = {
            "pause": (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"}),
            "error": (500, {"error": {"message": f"for {key}"}}),
            "malformed": (200, b'{"choices": [{"message": {"con'),
            "nonsense": (200, reply_of("Sorry, what?")),
            "truncated": (200, reply_of("x" * 400), {}, 0.5),
        }
        if way in replies:
            self.reply(*replies[way])
        else:  # no answer at all, at once or late
            time.sleep(way == "hang")
            self.close_connection = True


class ChatServer(Server):
    def __init__(self, latency: float = 0.0, always: tuple | None = None, hears: bool = True, **options: Any):
        """`latency` in seconds; `always` = (status, body, headers) is the answer to all; one that does not hear
        counts no tokens for audio."""
        super().__init__(ChatHandler, **options)
        self.latency = latency
        self.always = always
        self.hears = hears
        self.ways = ["pause", "error", "malformed", "truncated", "cut", "hang"]
        self.requests = []
        self.url += "/v1/chat/completions"


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[ChatServer]:
    """A running ChatServer, until the block ends."""
    with ChatServer(**options) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port_file", required=True, help="file to write the URL to, once it listens")
    args = parser.parse_args()
    server = ChatServer()
    Path(args.port_file).write_text(server.url)
    server.serve_forever()
