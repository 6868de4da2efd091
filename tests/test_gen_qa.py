"""Laws of question generation: killed and failing = undisturbed, no id twice, nothing silent, no file but ours."""

import argparse
import collections
import csv
import json
import multiprocessing
import re
import resource
import sys
import threading
import time
from functools import partial

import pytest

import chat
import files
import gen_qa
from chat_server import reply_of, serving
from conftest import DATA
from data import read_questions
from files import append_rows, rows_of
from gen_qa import PROMPT, parse_answer, prompt_for, question_row, read_captions

KEY = "sk-do-not-print-me"
FORK = multiprocessing.get_context("fork")  # a process that has imported everything already
gen_qa.tqdm.set_lock(threading.RLock())  # its own is shared with a fork, and would stay held by a killed one
COLUMNS = ["id", "caption", "answer_1", "answer_2", "answer_3"]


def clip_name(i):
    return f"abcdefghi{i:02x}_{i}"[:11] + f"_{i:06d}"


def captions_of(i):
    word = "never answered" if i % 50 == 49 else "dog"
    texts = f"The sound of a {word} {i}.|It barks {i}.|A voice speaks number {i}.|There is no music."
    return texts.split("|")


def write_captions(path, count, columns=COLUMNS, *, first=0):
    """The columns of the clips `first` to `count` as a CSV table; others than COLUMNS hold a question."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="Describe the music?", extrasaction="ignore")
        writer.writeheader()
        for i in range(first, count):
            writer.writerow(dict(zip(COLUMNS, [clip_name(i), *captions_of(i)], strict=True)))
    return path


def read(*captions, ids=None, columns=None):
    return read_captions(argparse.Namespace(captions=captions, ids=ids, columns=columns))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(captions, option...) is gen_qa.py's main in this process, without waits: (exit code, stdout, stderr)."""
    monkeypatch.setattr(chat, "FIRST_WAIT", 1e-5)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(captions, *arguments, out="q.jsonl"):
        arguments = ["--captions", captions, "--out", tmp_path / out, *arguments]
        monkeypatch.setattr(sys, "argv", ["gen_qa.py", *map(str, arguments)])
        code = gen_qa.main()
        said = capsys.readouterr()
        assert KEY not in said.out + said.err and "SECRET" not in said.out + said.err
        return code, said.out, said.err

    return run


def finished(out):
    """Its questions and its rejected clips."""
    return rows_of(out) + rows_of(out.with_suffix(".rejected.jsonl"))


def without_tokens(path):
    return sorted(json.dumps(row | {"tokens": 0}) for row in rows_of(path))


def length(row):
    return len("".join([row["question_text"], *row["multi_choice"]]))


# --------------------------------------------------------------------------------- prompt, answers, questions


def test_fig_1_word_for_word():
    paper = DATA.parent / "paper.txt"
    if not paper.exists():
        pytest.skip(f"the paper is not at {paper}")
    figure = paper.read_text().split("```")[1]
    assert "".join(PROMPT.split()) == "".join(figure.split())
    assert prompt_for(["a", "b", "c", "d"]).endswith("E2. input:\nA1: a\nA2: b\nA3: c\nA4: d\noutput:")


GOOD = r'{"question_text": "What\u2028is?", "multi_choice": ["a", "b\n", "c", "d"], "answer": 2}'
BAD = ["", "no", "{'a': 1}", "{} " + GOOD, "{" * 90_000, '{"a":' * 90_000, "{" + "[" * 90_000]
CHANGES = """
{"answer": 4}
{"answer": -1}
{"answer": true}
{"answer": null}
{"answer": "2"}
{"question_text": " "}
{"multi_choice": ["a", "b", "c"]}
{"multi_choice": ["a", "A ", "c", "d"]}
{"multi_choice": 4}
{"multi_choice": ["a", "", "c", "d"]}
{"multi_choice": [1, 2, 3, 4]}
"""


def test_an_answer_in_fig_1s_format_is_read_and_any_other_has_a_reason():
    for written in (GOOD, f"output: {GOOD} and {{more}}", f"Sure:\n```json\n{GOOD}\n```"):
        assert parse_answer(written) == ("What is?", ["c", "a", "b", "d"])
    changed = [json.loads(GOOD) | json.loads(change) for change in CHANGES.strip().splitlines()]
    for bad in BAD + list(map(json.dumps, changed)):
        with pytest.raises(ValueError, match=r"no question|no index"):
            parse_answer(bad)


def test_the_right_answer_stands_at_each_place_a_quarter_of_the_time():
    counts = collections.Counter()
    for i in range(4000):
        row = question_row(f"clip{i}", "What?", ["right", "b", "c", "d"], seed=0, tokens=[0, 0])
        assert row["multi_choice"][row["answer"]] == "right" and len(set(row["multi_choice"])) == 4
        counts[row["answer"]] += 1
    assert len(counts) == 4 and min(counts.values()) > 900


# -------------------------------------------------------------------------------------------------- captions


def test_the_published_tables_are_read_by_their_names_and_joined_by_id(tmp_path):
    overall = write_captions(tmp_path / "VGGSound_AudioSetCaps_caption.csv", 40, ["id", "caption"])
    asked = ["id", "question_1", "answer_1", "question_2", "answer_2", "question_3", "answer_3"]
    answers = write_captions(tmp_path / "VGGSound_Qwen-Audio_Q&A.csv", 42, asked, first=2)
    for tables in ([overall, answers], [answers, overall]):
        assert read(*tables) == {clip_name(i): captions_of(i) for i in range(2, 40)}
    if DATA.exists():
        ((name, texts), _) = read(DATA / "audiosetcaps_examples.jsonl").items()
        assert name == "_7Xe9vD3Hpg_4_10"
        assert [text.split()[2] for text in texts] == ["instrumental", "starts", "but", "genre"]


def test_other_columns_are_named_by_an_option_and_missing_ones_in_one_line(tmp_path, run):
    path = tmp_path / "t.csv"
    path.write_text("clip,all,s,v,m\nx1234567890_30,A,B,C,D\n")
    code, _, said = run(path, "--dry_run")
    assert code == 2 and said.count("\n") == 1
    assert "t.csv has clip, all, s, v, m" in said and "--columns" in said
    code, said, _ = run(path, "--dry_run", "--columns", "clip", "all", "s", "v", "m")
    assert code == 0 and "A1: A\nA2: B\nA3: C\nA4: D\n" in said


NO_TABLE = [b"id,text\na_1,words\n", b"", b"id,caption,sound,speech,music\n", b"\xff\xfe\x00", b'[{"id": "a_1"}, {"id"',
            b"7", b"id,caption,sound,speech,music\na_1," + b"x" * 200_000, b"[" * 100_000, b"[1]", b'{"id": 1}\n5\n']  # fmt: skip


def test_a_table_that_is_none_is_refused_in_one_line(tmp_path, run):
    path = tmp_path / "t.csv"
    said = [run(path)]  # there is none
    for content in NO_TABLE:
        path.write_bytes(content)
        said.append(run(path))
    for code, _, error in said:
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "t.csv" in error


def test_hostile_captions_cost_no_time(tmp_path):
    path = tmp_path / "c.jsonl"
    for text in ("no no" * 20_000, "_1" * 30_000, "." * 60_000, "music a" * 10_000):
        path.write_text(json.dumps(dict.fromkeys(["id", "caption", "sound", "speech", "music"], text)))
        started = time.process_time()
        assert len(read(path, ids=path)) == 1
        assert time.process_time() - started < 1


def test_ids_keep_the_clips_of_another_list_under_its_names(tmp_path):
    captions = write_captions(tmp_path / "c.csv", 10)
    names = [clip_name(i) for i in range(10)]
    lists = {
        json.dumps([{"id": "q1", "video_name": f"{names[3][:11]}_3"}]): [f"{names[3][:11]}_3"],
        f'{names[1][:11]},1,"dog, barking",train\n{names[2][:11]},2,dog,test\n': [names[1]],
        f"{names[7]}\r\n{names[8]}\n": names[7:9],
    }
    for text, kept in lists.items():
        (tmp_path / "ids").write_text(text)
        assert list(read(captions, ids=tmp_path / "ids")) == kept


def test_what_is_left_out_is_counted_and_named(tmp_path, run):
    rows = [{"id": clip_name(i), "caption": "A" * (i > 7), "sound": "s", "speech": "t"} for i in range(22)]
    rows += [rows[9], {"caption": "no id"}]
    rows[0]["music"] = "u"
    path, ids = tmp_path / "c.jsonl", tmp_path / "ids.txt"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids.write_text("".join(f"{clip_name(i)}\n" for i in range(20, 40)))
    _, said, _ = run(path, "--dry_run")
    assert f"8 left out, without an overall caption or not in every table: {clip_name(0)}, " in said
    assert f"2 left out, without an id or met before: {clip_name(9)}, " in said
    assert "14 clips, 14 to ask" in said
    _, said, _ = run(path, "--dry_run", "--ids", ids)
    assert "18 left out, of --ids, without captions" in said and "2 clips, 2 to ask" in said


# ----------------------------------------------------------------------------------------- runs, kills, files


@pytest.mark.parametrize("kills, clips", [(2, 100), pytest.param(20, 1000, marks=pytest.mark.slow)])
def test_a_disturbed_and_killed_run_gives_the_rows_of_an_undisturbed_one(tmp_path, run, kills, clips):
    captions = write_captions(tmp_path / "c.csv", clips)
    calm, rough = (tmp_path / name for name in ("calm.jsonl", "rough.jsonl"))
    options = ["--workers", 8, "--keep_shortest", 7, "--url"]
    with serving() as server:
        assert run(captions, *options, server.url, out=calm)[0] == 0
        paid = len(server.requests)
    with serving(fail=0.3, latency=0.01) as server:
        server.ways.remove("hang")  # for a minute
        server.ways += ["nonsense"]
        arguments = [captions, *options, f"{server.url}?key=SECRET"]
        for _ in range(kills):
            have = len(rows_of(rough))
            job = FORK.Process(target=run, args=arguments, kwargs={"out": rough})
            job.start()
            while job.is_alive() and len(rows_of(rough)) < have + 15:
                time.sleep(0.01)
            job.kill()
            job.join()
        with open(rough, "a") as file:
            file.write('{"id": "half a li')  # as a kill can leave it
        code, said, error = run(*arguments, out=rough)
        assert code == 0, error
        assert {key for _, key, _ in server.requests} == {f"Bearer {KEY}"}
        before = len(server.requests)
        assert run(*arguments, out=rough)[0] == 0 and len(server.requests) == before
        answered = finished(rough)
        lost = server.paid - sum(row["tokens"][1] for row in answered) / 50
        assert 0 <= lost <= 8 * kills  # what was on its way
        run(*arguments, "--retry_rejected", out=rough)
        assert len(server.requests) > before
    assert without_tokens(rough) == without_tokens(calm)
    assert len(read_questions(rough)) == clips - clips // 50
    for out in (calm, rough):
        rejected = {row["id"] for row in finished(out) if "reason" in row and "again" not in row}
        assert rejected == {clip_name(i) for i in range(49, clips, 50)}
    files = "".join(file.read_text() for file in tmp_path.iterdir())
    assert KEY not in files and "SECRET" not in files
    # Tokens stand in the rows: what the calm run paid, and the sum that the rough one says after its kills.
    assert sum(row["tokens"][1] for row in finished(calm)) == 50 * paid
    asked, got = (sum(row["tokens"][i] for row in answered) for i in range(2))
    assert f"{asked:,} tokens in, {got:,} out" in said
    shortest = tmp_path / "rough.shortest.jsonl"
    assert list(map(length, rows_of(shortest))) == sorted(map(length, rows_of(rough)))[:7]


def test_hostile_replies_and_a_refusal_are_rejected(tmp_path, monkeypatch, run):
    read_reply = chat.ChatClient.read

    def hostile(client, response):
        asked = response.request.body
        if b"number 2." in asked:
            response._content = json.dumps(reply_of("{" + "[" * 900_000)).encode()
        elif b"number 4." in asked:
            response.status_code = 400
        return read_reply(client, response)

    monkeypatch.setattr(chat.ChatClient, "read", hostile)
    with serving() as server:
        assert run(write_captions(tmp_path / "c.csv", 20), "--url", server.url)[0] == 0
    rejected = {row["id"]: row["reason"] for row in rows_of(tmp_path / "q.rejected.jsonl")}
    assert rejected.keys() == {clip_name(i) for i in (2, 4)}
    assert "no question" in rejected[clip_name(2)] and "HTTP 400" in rejected[clip_name(4)]
    assert len(rows_of(tmp_path / "q.jsonl")) == 18
    assert (tmp_path / "q.rejected.jsonl").stat().st_size < 15_000


def test_a_server_that_does_not_serve_stops_the_run_and_nothing_is_lost(tmp_path, run):
    captions = write_captions(tmp_path / "c.csv", 300)
    with serving(always=(401, {"error": f"unauthorized {KEY}"})) as server:
        code, _, said = run(captions, "--url", server.url, "--workers", 4)
        assert code == 2 and "HTTP 401" in said and "unauthorized" in said and len(server.requests) < 20
        server.always = (400, {"error": "this model takes no messages"})
        code, _, said = run(captions, "--url", server.url)
        assert code == 2 and "takes no messages" in said and "--retry_rejected" in said
        assert len(server.requests) <= 8 + 100 + 16
        server.always = None
        assert run(captions, "--url", server.url, "--retry_rejected")[0] == 0
    rows = rows_of(tmp_path / "q.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) == 294


AVQA = '{"id": 1, "video_name": "a", "question_text": "?", "multi_choice": ["a", "b"], "answer": 0}'


def test_dry_run_and_sample_write_nothing_and_no_foreign_file_is_touched(tmp_path, run):
    out = tmp_path / "new" / "q.jsonl"
    run = partial(run, write_captions(tmp_path / "c.csv", 50), out=out)
    code, _, said = run("--sample", 2)
    assert code == 2 and "q.jsonl: no questions to sample" in said
    code, said, _ = run("--dry_run", "--price_in", 1000, "--price_out", 1e6)
    assert code == 0 and "50 clips, 50 to ask" in said and PROMPT in said and not out.parent.exists()
    price = float(re.search(r"price (\S+) dollars", said)[1])
    assert 3010 < price < 3040  # 50 prompts of about 400 tokens, and 50 answers of 60
    out.parent.mkdir()
    append_rows(out, [question_row(clip_name(0), "What?", ["a", "b", "c", "d"], seed=0, tokens=[1, 2])])
    with open(out, "a") as file:
        file.write('{"id": "half a li')
    before = out.read_bytes()
    assert "There is no music" in run("--sample", 2)[1]
    assert "49 to ask" in run("--dry_run")[1]
    assert [path.read_bytes() for path in out.parent.iterdir()] == [before]
    out.write_text(AVQA)
    for mode in ([], ["--dry_run"]):
        code, _, said = run(*mode)
        assert code == 2 and "rows that are not ours" in said and out.read_text() == AVQA


def test_one_writer_and_a_full_disk(tmp_path, monkeypatch, run):
    out = tmp_path / "q.jsonl"
    monkeypatch.setattr(files.one_writer, "__defaults__", (0.1,))  # seconds of patience
    with serving(latency=0.1) as server:
        options = [write_captions(tmp_path / "c.csv", 30), "--url", server.url, "--workers", 1]
        first = FORK.Process(target=run, args=options)
        first.start()
        while not rows_of(out):
            time.sleep(0.01)
        code, _, said = run(*options)
        first.kill()
        first.join()
        assert code == 2 and f"held by process {first.pid}" in said
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
        code, _, said = run(*options)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2 and said.endswith("File too large\n") and 3 < len(rows_of(out)) < 15


@pytest.mark.slow
def test_workers_reach_the_rate_that_the_latency_allows(tmp_path, run):
    with serving(latency=0.2) as server:
        assert run(write_captions(tmp_path / "c.csv", 1000), "--url", server.url)[0] == 0
    times = [when for when, _, _ in server.requests]
    rate = (len(times) - 1) / (max(times) - min(times))
    assert rate >= 0.5 * 80  # 16 workers, 200 ms each; 0.95 on a quiet machine
