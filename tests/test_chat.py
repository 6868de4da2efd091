"""Laws of the chat client: an answer, or one reason; every request ends in time; the key goes nowhere else."""

import gzip
import json
import logging
import threading
import time

import pytest

import chat
from chat import ChatClient, Refused, RefusedForAll, TryAgain, Unreachable, read_reply, retry_after
from chat_server import serving
from files import InputError

KEY = "sk-do-not-print-me"
FINE = {"choices": [{"message": {"content": "fine"}}], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
ASK = [{"role": "user", "content": "?"}]


@pytest.fixture
def serve():
    """serve(**options) -> a running ChatServer."""
    with serving() as start:
        yield start


@pytest.fixture
def quick(monkeypatch):
    """No waiting between two tries."""
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.0)


def test_the_answer_comes_with_its_usage(serve):
    server = serve(always=(200, FINE))
    answer = ChatClient(server.url, "m").complete(ASK, temperature=0, max_tokens=5)
    assert answer == ("fine", {"prompt_tokens": 7, "completion_tokens": 2})
    assert server.requests[0][2] == {"model": "m", "messages": ASK, "temperature": 0, "max_tokens": 5}


def deep(levels):
    return b"[" * levels + b"]" * levels


BROKEN = {
    "a list": b"[]",
    "a number": b"7",
    "a huge number": b"9" * 5000,
    "a text": b'"fine"',
    "nothing": b"",
    "nested deeply": deep(900),
    "nested very deeply": deep(200_000),
    "nested in the message": b'{"choices": [{"message": {"content": ' + deep(900) + b"}}]}",
    "no choices": b'{"choices": []}',
    "an error as a success": b'{"error": {"message": "busy"}}',
    "content is a number": b'{"choices": [{"message": {"content": 5}}]}',
    "usage is a list": b'{"choices": [{"message": {"content": "x"}}], "usage": [1]}',
    "not UTF-8": b'{"choices": [{"message": {"content": "\xff"}}]}',
    "half": json.dumps(FINE).encode()[:30],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_reply_is_tried_again(kind):
    with pytest.raises(TryAgain):
        read_reply(BROKEN[kind])


USAGES = [
    None,
    {},
    {"prompt_tokens": -1},
    {"prompt_tokens": "7"},
    {"prompt_tokens": 10**30},
    {"prompt_tokens": True},
]


@pytest.mark.parametrize("usage", USAGES)
def test_a_count_of_tokens_that_is_none_counts_nothing(usage):
    text, tokens = read_reply(json.dumps(FINE | {"usage": usage}).encode())
    assert text == "fine" and tokens == {"prompt_tokens": 0, "completion_tokens": 0}


def test_text_is_utf8_whatever_the_content_type_says_and_can_be_written(serve):
    body = '{"choices": [{"message": {"content": "Geräusch \u2028 \\ud800"}}]}'.encode()
    server = serve(always=(200, body, {"Content-Type": "text/plain; charset=latin-1"}))
    assert ChatClient(server.url, "m").complete(ASK)[0] == "Geräusch \u2028 ?"


@pytest.mark.parametrize("way", ["drip header", "drip body", "hang"])
def test_one_request_ends_in_time_however_slowly_the_bytes_come(serve, quick, way):
    server = serve(fail=1.0)
    server.ways = [way]
    with pytest.raises(Unreachable, match="2 times, the last with"):
        ChatClient(server.url, "m", tries=1, timeout=0.4).complete(ASK)
    while len(server.requests) < 2:  # they may be under way when their time is over
        time.sleep(0.01)
    assert len(server.requests) == 2


def test_a_compressed_reply_is_read_and_a_bomb_is_not_unpacked(serve, quick, monkeypatch):
    server = serve(always=(200, gzip.compress(json.dumps(FINE).encode()), {"Content-Encoding": "gzip"}))
    assert ChatClient(server.url, "m").complete(ASK)[0] == "fine"
    bomb = gzip.compress(bytes(10_000_000)) * 40  # 0.4 MB of 400
    server.always = (200, bomb, {"Content-Encoding": "gzip"})
    with pytest.raises(Unreachable, match="more than 10,000,000 bytes"):
        ChatClient(server.url, "m", tries=0).complete(ASK)


def test_a_pause_that_the_server_asks_for_holds_for_all_and_is_said_once(serve, caplog, quick):
    server = serve(always=(429, {"error": "slow"}, {"Retry-After": "3600"}))
    server.open.clear()  # all four have asked before the first is told to wait
    client = ChatClient(server.url, "m", tries=3)
    answers = []
    workers = [threading.Thread(target=lambda: answers.append(client.complete(ASK)[0])) for _ in range(4)]
    with caplog.at_level(logging.WARNING):
        for worker in workers:
            worker.start()
        while len(server.requests) < 4:
            time.sleep(0.01)
        server.open.set()
        while client.retries < 4 or not caplog.records:
            time.sleep(0.01)
    assert client.paused_until > time.monotonic() + 3590
    server.always = (200, FINE)
    assert answers == [] and len(server.requests) == 4 and len(caplog.records) == 1
    assert "asks for a pause of 3600 seconds" in caplog.text
    client.paused_until = 0.0  # the hour is over
    for worker in workers:
        worker.join(60)
    assert answers == ["fine"] * 4 and len(server.requests) == 8


PAUSES = {
    "0": 0, "-5": 0, "nan": 0, "soon": 0, "": 0, None: 0, "2": 2, "inf": 3600, "1e300": 3600,
    "Wed, 21 Oct 2015 07:28:00 GMT": 0, "Fri, 31 Dec 9999 23:59:59 GMT": 3600, "Mon, 99 Foo 2015": 0,
}  # fmt: skip


@pytest.mark.parametrize("header", PAUSES)
def test_a_retry_after_is_between_nothing_and_an_hour(header):
    assert retry_after(header) == PAUSES[header]


@pytest.mark.parametrize("header", ["0", "-5", "nan"])
def test_no_pause_is_no_hurry(serve, header, monkeypatch):
    """The waits between tries stay, and grow, when the server says that there need be none."""
    server = serve(always=(429, {}, {"Retry-After": header}))
    client = ChatClient(server.url, "m", tries=8)
    waits = []
    monkeypatch.setattr(client.stop, "wait", waits.append)
    with pytest.raises(Unreachable, match="9 times, the last with HTTP 429"):
        client.complete(ASK)
    assert len(waits) == 8 and waits[0] >= 0.25 and waits[-1] >= 30 and max(waits) <= 60


def test_refusals_in_a_row_end_it_for_all_and_say_why(serve):
    server = serve(always=(400, {"error": {"message": "no audio here"}}))
    client = ChatClient(server.url, "m", patience=5)
    for _ in range(4):
        with pytest.raises(Refused, match="no audio here"):
            client.complete(ASK)
    for _ in range(3):
        with pytest.raises(RefusedForAll, match="refused 5 requests in a row.*no audio here"):
            client.complete(ASK)
    assert len(server.requests) == 5


def test_refusals_between_answers_are_only_theirs(serve):
    server = serve()
    client = ChatClient(server.url, "m", patience=3)
    for _ in range(5):
        server.always = (400, {"error": "no"})
        for _ in range(2):
            with pytest.raises(Refused):
                client.complete(ASK)
        server.always = (200, FINE)
        assert client.complete(ASK)[0] == "fine"


ESCAPED = "".join(f"\\u{ord(letter):04X}" for letter in KEY)


@pytest.mark.parametrize("written", [KEY, ESCAPED, KEY[:5] + ESCAPED[30:], KEY.replace("-", "\\u002d")])
def test_the_key_is_taken_out_of_answers_and_errors(serve, monkeypatch, written):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(always=(200, b'{"choices": [{"message": {"content": "a %s b"}}]}' % written.encode()))
    assert ChatClient(server.url, "m").complete(ASK)[0] == "a [key] b"
    server.always = (400, f"<p>bad key {written}</p>".encode())
    with pytest.raises(Refused, match=r"bad key \[key\]</p>$"):
        ChatClient(server.url, "m").complete(ASK)


@pytest.mark.parametrize("key", ["EMPTY", "none", "1"])
def test_a_key_that_is_a_word_rewrites_nothing(serve, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    text = f"{key}: output 1, none, EMPTY"
    server = serve(
        always=(200, {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 11}})
    )
    assert ChatClient(server.url, "m").complete(ASK) == (text, {"prompt_tokens": 11, "completion_tokens": 0})


def test_nothing_in_the_environment_gets_or_replaces_the_key(serve, monkeypatch, tmp_path):
    server = serve(always=(200, FINE))
    spy = serve(always=(200, FINE))
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HTTP_PROXY", spy.url)
    monkeypatch.setenv("http_proxy", spy.url)
    monkeypatch.setenv("ALL_PROXY", spy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for key, sent in ((KEY, f"Bearer {KEY}"), ("", None)):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        ChatClient(server.url, "m").complete(ASK)
        assert server.requests[-1][1] == sent
    assert not spy.requests


def test_a_redirect_is_not_followed(serve):
    spy = serve(always=(200, FINE))
    server = serve(always=(307, {}, {"Location": spy.url}))
    with pytest.raises(InputError, match="says 307"):
        ChatClient(server.url, "m").complete(ASK)
    assert not spy.requests


URLS = {
    "http://someone:secret@127.0.0.1/v1": "user name or password",
    "ftp://host/v1": "http", "": "http", "host/v1": "http", "http://": "http", "http://[": "http",
    "http://host:port/": "http", "http://a b/": "http", "file:///etc/passwd": "http",
}  # fmt: skip


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_is_none_is_refused_in_one_line(url):
    with pytest.raises(InputError, match=URLS[url]) as error:
        ChatClient(url, "m")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["a\nb: c", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_naming_it(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY") as error:
        ChatClient("http://127.0.0.1:9/", "m")
    assert key not in str(error.value)


def test_messages_name_the_endpoint_without_its_query(serve):
    server = serve(always=(404, b"\x1b[31mno\n\nsuch path"))
    with pytest.raises(InputError, match=r"says 404:\s+\[31mno such path$") as error:
        ChatClient(server.url + "?key=secret", "m").complete(ASK)
    assert "secret" not in str(error.value)


def test_a_stopped_client_leaves_requests_under_way(serve):
    server = serve(always=(200, FINE))
    server.open.clear()
    client = ChatClient(server.url, "m")
    threading.Timer(0.3, client.stop.set).start()
    with pytest.raises(Unreachable, match="stopped"):
        client.complete(ASK)
