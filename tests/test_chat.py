"""Laws of the chat client: an answer, or one reason; the key goes to the server and nowhere else."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

import chat
from chat import ChatClient, Refused, public_url
from chat_server import reply_of, serving
from files import InputError

KEY = "sk-do-not-print-me"
ASK = [{"role": "user", "content": "?"}]


@pytest.fixture
def server(monkeypatch):
    """A running ChatServer; nobody waits between two tries; OPENAI_API_KEY is KEY."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(chat, "TRIES", 2)
    with serving(always=(200, reply_of("fine"))) as one:
        yield one


def refusal(client):
    """What ends a request that gets no answer."""
    with pytest.raises(InputError) as error:
        client.complete(ASK)
    return error.value


def test_the_answer_comes_with_its_usage_whatever_fails_before(server, monkeypatch):
    monkeypatch.setattr(chat, "TIMEOUT", 0.2)
    monkeypatch.setattr(chat, "TRIES", 12)
    server.always = None
    server.fail = 0.5
    client = ChatClient(server.url, "m")
    asked = [{"content": [{"type": "text", "text": "options: ['fine']"}]}]
    for _ in range(30):
        answer, usage = client.complete(asked, temperature=0)
        assert answer == "fine" and usage["prompt_tokens"] > 0 and usage["completion_tokens"] == 50
    assert len(server.requests) > 40
    for _, key, body in server.requests:
        assert key == f"Bearer {KEY}" and body == {"model": "m", "messages": asked, "temperature": 0}


BROKEN = rb"""
[]
9
{"choices": []}
{"error": {"message": "busy"}}
{"choices": [{"message": {"content": 5}}]}
{"choices": [{"message": {"content": "x"}}], "usage": [1]}
{"choices": [{"message": {"content": "x""".split(b"\n")
BROKEN += [b"[" * 200_000, b'{"choices": [{"message": {"content": "\xff"}}]}']


def test_what_may_pass_is_tried_again_and_what_cannot_is_not(server, monkeypatch):
    client = ChatClient(server.url, "m")
    for body in BROKEN:
        server.always = (200, body)
        assert "failed 3 times" in str(refusal(client))
    assert len(server.requests) == 3 * len(BROKEN)
    for status in (400, 422, 307, 401, 403, 404):
        server.requests.clear()
        server.always = (status, {"error": f"because\n\x1b of {KEY}"}, {"Location": "http://127.0.0.1:9/"})
        error = refusal(client)
        assert isinstance(error, Refused) == (status in (400, 422)) and len(server.requests) == 1
        assert re.search(f"HTTP {status}.*because", str(error)) and KEY not in str(error)
    server.always = (500, {})
    assert not isinstance(refusal(client), Refused)
    monkeypatch.setattr(client.stop, "wait", lambda _: setattr(client, "answers", client.answers + 1))
    assert isinstance(refusal(client), Refused)  # others are answered meanwhile


def test_the_waits_grow_and_the_servers_pause_is_kept(server, monkeypatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 30)
    client = ChatClient(server.url, "m")
    waits = []
    monkeypatch.setattr(client.stop, "wait", waits.append)
    for header, least in {"0": 30, "nan": 30, "soon": 30, "300": 300, "1e300": 600}.items():
        server.always = (429, {}, {"Retry-After": header})
        assert "3 times, the last with HTTP 429" in str(refusal(client))
        assert waits[-3] == 0 < waits[-2] and least <= waits[-1] <= max(60, least)


def test_workers_say_once_what_is_tried_and_for_how_long_and_a_stop_ends_them(server, monkeypatch, caplog):
    monkeypatch.setattr(chat, "FIRST_WAIT", 3.0)
    server.always = (503, {})
    client = ChatClient(f"{server.url}?key=SECRET", "m")
    with ThreadPoolExecutor(4) as pool:
        ends = pool.map(refusal, [client] * 4)
        while not caplog.records:
            client.stop.wait(0.01)
        client.stop.set()
    said = "".join(map(repr, ends)) + caplog.text
    assert "Refused" not in said  # nothing is wrong with these requests
    assert said.count(f"no answer from {server.url} (HTTP 503): trying again for up to") == 1
    assert "SECRET" not in said


def test_the_key_is_taken_out_of_answers_but_no_word_is(server, monkeypatch):
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    for key, written, read in ((KEY, KEY, "[key]"), (KEY, escaped, "[key]"), ("none", "none", "none")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        server.always = (200, json.dumps(reply_of("a _ b")).replace("_", written, 1).encode())
        assert ChatClient(server.url, "m").complete(ASK)[0] == f"a {read} b"


def test_nothing_in_the_environment_gets_or_replaces_the_key(server, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with serving() as spy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, spy.url)
        for key, sent in ((KEY, f"Bearer {KEY}"), ("", None)):
            monkeypatch.setenv("OPENAI_API_KEY", key)
            ChatClient(server.url, "m").complete(ASK)
            assert server.requests[-1][1] == sent
        assert not spy.requests


def test_only_scheme_host_and_path_of_a_url_are_written(server):
    assert public_url("https://me:secret@host:8/v1?key=SECRET#x") == "https://host:8/v1"
    for url in ("ftp://host/v1", "", "host/v1"):
        with pytest.raises(InputError, match="http"):
            ChatClient(url, "m")
    server.always = (404, {"error": "Cannot POST /v1?key=SECRET-OF-MINE"})
    assert "SECRET" not in str(refusal(ChatClient(f"{server.url}?key=SECRET-OF-MINE", "m")))
    with pytest.raises(OSError, match="Failed to parse: (?!.*secret)"):  # a program's one line
        ChatClient("http://me:secret@host:99999/v1", "m")
