"""Laws of the chat client: an answer, or one reason; the key goes to the server and nowhere else."""

import json
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


def test_the_answer_comes_with_its_usage_whatever_fails_before(server, monkeypatch):
    monkeypatch.setattr(chat, "TIMEOUT", 0.2)
    monkeypatch.setattr(chat, "TRIES", 12)
    client = ChatClient(server.url, "m")
    server.always = None
    server.fail = 0.5
    text = [{"type": "text", "text": "options: ['fine']"}]
    for _ in range(30):
        answer, usage = client.complete([{"content": text}], temperature=0)
        assert answer == "fine" and usage["prompt_tokens"] > 0 and usage["completion_tokens"] == 50
    assert len(server.requests) > 40
    assert server.requests[0][2] == {"model": "m", "messages": [{"content": text}], "temperature": 0}
    assert {key for _, key, _ in server.requests} == {f"Bearer {KEY}"}


BROKEN = rb"""
[]
9
{"choices": []}
{"error": {"message": "busy"}}
{"choices": [{"message": {"content": 5}}]}
{"choices": [{"message": {"content": "x"}}], "usage": [1]}
{"choices": [{"message": {"content": "x""".split(b"\n")
BROKEN += [b"[" * 200_000, b'{"choices": [{"message": {"content": "\xff"}}]}']
STATUSES = {307: InputError, 401: InputError, 403: InputError, 404: InputError, 400: Refused, 422: Refused}


def test_what_may_pass_is_tried_again_and_what_cannot_is_not(server):
    client = ChatClient(server.url, "m")
    for body in BROKEN:
        server.always = (200, body)
        with pytest.raises(InputError, match="failed 3 times"):
            client.complete(ASK)
    assert len(server.requests) == 3 * len(BROKEN)
    for status, kind in STATUSES.items():
        server.requests.clear()
        server.always = (status, {"error": f"because\n\x1b of {KEY}"}, {"Location": "http://127.0.0.1:9/"})
        with pytest.raises(kind, match=f"HTTP {status}.*because") as error:
            client.complete(ASK)
        assert len(server.requests) == 1 and KEY not in str(error.value) and "\n" not in str(error.value)


def test_what_fails_while_others_are_answered_is_refused_for_itself(server, monkeypatch):
    client = ChatClient(server.url, "m")
    monkeypatch.setattr(client.stop, "wait", lambda pause: setattr(client, "answers", client.answers + 1))
    server.always = (500, {})
    with pytest.raises(Refused, match="failed 3 times, the last with HTTP 500"):
        client.complete(ASK)


def test_the_waits_grow_and_the_servers_pause_is_kept(server, monkeypatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(chat, "TRIES", 8)
    client = ChatClient(server.url, "m")
    for header, least in {"0": 30, "nan": 30, "soon": 30, "300": 300, "inf": 600, "1e300": 600}.items():
        waits = []
        monkeypatch.setattr(client.stop, "wait", waits.append)
        server.always = (429, {}, {"Retry-After": header})
        with pytest.raises(InputError, match="9 times, the last with HTTP 429"):
            client.complete(ASK)
        assert waits[0] == 0 and waits[1] >= 0.25 and least <= waits[-1] <= max(60, least)


def test_workers_say_once_what_is_tried_and_for_how_long_and_a_stop_ends_them(server, monkeypatch, caplog):
    monkeypatch.setattr(chat, "FIRST_WAIT", 3.0)
    server.always = (503, {})
    client = ChatClient(f"{server.url}?key=SECRET", "m")

    def work():
        with pytest.raises(InputError) as error:
            client.complete(ASK)
        return str(error.value)

    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(work) for _ in range(4)]
        while not caplog.records:
            client.stop.wait(0.01)
        client.stop.set()
    assert f"no answer from {server.url} (HTTP 503): trying again for up to" in caplog.text
    assert "SECRET" not in caplog.text + "".join(end.result() for end in ends)


def test_the_key_is_taken_out_of_answers_but_no_word_is(server, monkeypatch):
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in KEY)
    for written in (KEY, escaped):
        server.always = (200, json.dumps(reply_of("a _ b")).replace("_", written, 1).encode())
        assert ChatClient(server.url, "m").complete(ASK)[0] == "a [key] b"
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    server.always = (200, reply_of("none of these"))
    assert ChatClient(server.url, "m").complete(ASK)[0] == "none of these"


def test_nothing_in_the_environment_gets_or_replaces_the_key(server, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with serving() as spy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, spy.url)
        for key, sent in ((KEY, f"Bearer {KEY}"), ("", None)):
            monkeypatch.setenv("OPENAI_API_KEY", key)
            ChatClient(server.url, "m").complete(ASK)
            assert server.requests[-1][1] == sent
        assert not spy.requests


def test_only_scheme_host_and_path_of_a_url_are_written():
    assert public_url("https://me:secret@host:8/v1?key=SECRET#x") == "https://host:8/v1"
    for url in ("ftp://host/v1", "", "host/v1", "file:///etc/passwd"):
        with pytest.raises(InputError, match="http"):
            ChatClient(url, "m")
