"""A stand-in for a chat endpoint: for the tests, and for the demo's question generation.

    python tests/chat_server.py --port_file FILE [--latency 0.2] [--fail 0.3]

Answers Fig. 1's prompt with a question made from the captions in it, in one of the ways in which models write;
answers a question about audio (evaluate.py --url) with one of its choices. It can fail as real servers do.
"""

import argparse
import contextlib
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WORDS = ["dog", "bird", "frog", "cow", "engine", "drill", "clock", "siren", "rain", "wind", "thunder"]
WORDS += ["waves", "drum", "flute", "violin", "guitar", "piano", "trumpet", "man", "woman", "child"]
WORDS += ["robot", "crowd", "singer"]


def draw(text: str, count: int) -> int:
    """A number below `count` that the text decides."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return int(digest, 16) % count


def question_about(prompt: str) -> str:
    """The clip's captions -> the text of an answer, the same every time."""
    captions = prompt.rsplit("input:", 1)[1]
    named = re.search(r"sound of an? (\w+)", captions) or re.search(r"A2:\W*(?:The |A |An )?(\w+)", captions)
    right = named[1].lower()
    others = [word for word in WORDS if word != right]
    others.sort(key=lambda word: draw(captions + word, 2**60))
    others = others[:3]
    row = {"question_text": "What can be heard in the video?", "multi_choice": [right, *others], "answer": 0}
    text = json.dumps(row)
    styles = [
        f"output: {text}",
        f"Here is one.\n```json\n{json.dumps(row, indent=1)}\n```\nI hope that this helps!",
        str(row),
        text.replace("]", ",]").replace("}", ", }"),
        f"output:\n{text}\n",
    ]
    if "never answered" in captions:
        return "I am sorry."
    return styles[draw(captions, len(styles))]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((time.monotonic(), self.headers.get("Authorization"), body))
        server.open.wait()
        time.sleep(server.latency)
        if server.always:
            return self.reply(*server.always)
        if server.random.random() < server.fail:
            return self.misbehave(server.random.choice(server.ways))
        content = body["messages"][-1]["content"]
        tokens = len(json.dumps(content)) // 4
        if isinstance(content, str):
            text = question_about(content)
        else:  # a question about audio: one of the choices that it lists
            asked = next(part["text"] for part in content if part["type"] == "text")
            choices = re.findall(r"'([^']*)'", asked.split("options:")[1])
            text = choices[draw(asked, len(choices))]
            if not server.hears:
                tokens = len(asked) // 4
        self.reply(200, self.completion(text, tokens))

    def completion(self, text: str, tokens: int = 400) -> dict:
        usage = {"prompt_tokens": tokens, "completion_tokens": 50}
        return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}

    def reply(self, status: int, body: bytes | dict, headers: dict | None = None) -> None:
        data = body
        if not isinstance(body, bytes):
            data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def misbehave(self, way: str) -> None:
        if way == "pause":
            self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
        elif way == "busy":
            self.reply(503, b"<html>busy</html>")
        elif way == "error":
            self.reply(500, {"error": {"message": f"for {self.headers.get('Authorization')}"}})
        elif way == "nonsense":
            self.reply(200, self.completion("Sorry, what?"))
        elif way == "truncated":
            data = json.dumps(self.completion("x" * 400)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif way == "cut":
            self.reply(200, json.dumps(self.completion("x" * 400)).encode()[:100])
        elif way == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif way == "hang":
            time.sleep(1.0)
            self.close_connection = True
        elif way in ("drip header", "drip body"):  # a byte now and then, for ever
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            if way == "drip body":
                self.end_headers()
            else:
                self.send_header("X-Slow", "")
                self.flush_headers()
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        port: int = 0,
        latency: float = 0.0,
        fail: float = 0.0,
        seed: int = 0,
        always: tuple | None = None,
        hears: bool = True,
    ):
        """`latency` in seconds; `fail` is the share of requests that fail, each in one of `ways`; `always` =
        (status, body, headers) is the answer to all; one that does not hear counts no tokens for audio."""
        super().__init__(("127.0.0.1", port), Handler)
        self.hears = hears
        self.latency = latency
        self.fail = fail
        self.always = always
        self.random = random.Random(seed)
        self.ways = ["pause", "busy", "error", "truncated", "cut", "reset", "hang"]
        self.requests = []
        self.open = threading.Event()  # while it is clear, requests are counted and wait for their answers
        self.open.set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1/chat/completions"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


@contextlib.contextmanager
def serving() -> Iterator[Callable[..., ChatServer]]:
    """A function: its options -> a running ChatServer. All of them end with the block."""
    servers = []

    def start(**options: Any) -> ChatServer:
        server = ChatServer(**options)
        servers.append(server)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


if __name__ == "__main__":
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--port_file", required=True, help="file to write the URL to, once it listens")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds (default: 0)")
    parser.add_argument("--fail", type=float, default=0.0, help="share of requests that fail (default: 0)")
    args = parser.parse_args()
    server = ChatServer(latency=args.latency, fail=args.fail)
    Path(args.port_file).write_text(server.url)
    server.serve_forever()
