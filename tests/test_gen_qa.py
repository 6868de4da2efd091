"""Laws of question generation: killed and failing = undisturbed, no id twice, the key appears nowhere."""

import collections
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from chat import ChatClient, retry_after
from chat_server import ChatServer
from conftest import DATA
from data import InputError, read_questions
from gen_qa import PROMPT, checked, find_columns, parse_answer, prompt_for, question_row, read_captions

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-do-not-print-me"
TEXTS = ["A dog barks.", "The sound of a dog.", "There is no speech.", "There is no music in this audio."]


@pytest.fixture
def serve():
    """serve(**options) -> a running ChatServer."""
    servers = []

    def start(**options):
        servers.append(ChatServer(**options))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def write_captions(path, count):
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "caption", "answer_1", "answer_2", "answer_3"])
        for i in range(count):
            word = "never answered" if i % 50 == 49 else "dog"
            said, music = f"A voice speaks number {i}.", "There is no music in this audio."
            table.writerow(
                [
                    f"abcdefghi{i:02x}_{i}"[:11] + f"_{i:06d}",
                    f"The sound of a {word} {i}.",
                    f"It barks {i}.",
                    said,
                    music,
                ]
            )
    return path


def command(captions, out, url, *more):
    return [sys.executable, "gen_qa.py", "--captions", captions, "--out", out, "--url", url, *map(str, more)]


def generate(captions, out, url, *more):
    env = {**os.environ, "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        command(captions, out, url, *more), cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    return done


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fig_1_word_for_word():
    paper = DATA.parent / "paper.txt"
    if not paper.exists():
        pytest.skip(f"the paper is not at {paper}")
    figure = paper.read_text().split("```")[1]
    assert "".join(PROMPT.split()) == "".join(figure.split())
    assert prompt_for(TEXTS).endswith("E2. input:\nA1: A dog barks.\nA2: The sound of a dog.\nA3: There is no "
                                      "speech.\nA4: There is no music in this audio.\noutput:")  # fmt: skip


GOOD = {"question_text": "What?", "multi_choice": ["a", "b", "c", "d"], "answer": 2}
WRITTEN = {
    "plain": json.dumps(GOOD),
    "after output:": f"output: {json.dumps(GOOD)} and {{more}}",
    "fenced": f"Sure {{here}}:\n```json\n{json.dumps(GOOD, indent=2)}\n```",
    "single quotes": str(GOOD),
    "trailing commas": json.dumps(GOOD).replace("]", ",]").replace("}", ",}"),
    "index as text": json.dumps(GOOD | {"answer": "2"}),
    "answer's text": json.dumps(GOOD | {"answer": "c"}),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_answers_are_read_as_models_write_them(way):
    assert checked(parse_answer(WRITTEN[way]), TEXTS) == ("What?", ["c", "a", "b", "d"])


BAD = [
    "", "no", "{" * 5000, "{'a': 1}", json.dumps(GOOD | {"question_text": " "}), json.dumps(GOOD | {"answer": 4}),
    json.dumps(GOOD | {"answer": -1}), json.dumps(GOOD | {"answer": True}), json.dumps(GOOD | {"answer": None}),
    json.dumps(GOOD | {"multi_choice": ["a", "b", "c"]}), json.dumps(GOOD | {"multi_choice": ["a", "A ", "c", "d"]}),
    json.dumps(GOOD | {"multi_choice": ["a", "", "c", "d"]}), json.dumps(GOOD | {"multi_choice": "abcd"}),
    json.dumps(GOOD | {"answer": "z"}),
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_question_is_refused_with_a_reason(text):
    with pytest.raises(ValueError, match="."):
        checked(parse_answer(text), TEXTS)


def test_no_false_music_refuses_questions_about_music_that_is_not_there():
    row = GOOD | {"question_text": "Which instrument leads the music?"}
    with pytest.raises(ValueError, match="music"):
        checked(row, TEXTS, no_false_music=True)
    assert checked(row, [*TEXTS[:3], "The music is jazz."], no_false_music=True)


def test_the_right_answer_stands_at_each_place_a_quarter_of_the_time():
    made = [question_row(f"clip{i}", "What?", ["right", "b", "c", "d"], seed=0) for i in range(4000)]
    assert all(
        row["multi_choice"][row["answer"]] == "right" and len(set(row["multi_choice"])) == 4 for row in made
    )
    counts = collections.Counter(row["answer"] for row in made)
    assert all(900 < counts[place] < 1100 for place in range(4))
    assert made[7] == question_row("clip7", "What?", ["right", "b", "c", "d"], seed=0)


TABLES = {
    "published examples": None,
    "csv with questions": "file,Q1,A1,Q2,A2,Q3,A3,summary\nx1234567890_30,Describe this audio according to the sounds,"
    "dogs are barking loudly,information about the speech?,a man is speaking,information about the music?,"
    "there is no music,Dogs bark while a man speaks\ny1234567890_40,Describe this audio according to the sounds,"
    "rain falls on a roof,information about the speech?,nobody can be heard,information about the music?,slow piano "
    "music plays,A piano plays in the rain\n",
    "other order": "music,speech,overall caption,sounds,clip\nthere is no music,a woman is speaking,A woman talks in a "
    "street,cars are passing by,x1234567890_30\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_columns_are_found_by_what_they_hold(tmp_path, kind):
    path = tmp_path / "table.csv"
    if TABLES[kind] is None:
        if not DATA.exists():
            pytest.skip(f"real captions are not at {DATA}")
        path = DATA / "audiosetcaps_examples.jsonl"
    else:
        path.write_text(TABLES[kind], encoding="utf-8-sig")
    overall, sound, speech, music = next(read_captions(path))[1]
    assert "music" in music and re.search("speech|speak", speech)
    assert re.match("A solemn|Dogs bark|A woman", overall) and re.match(
        "The music starts|dogs are|cars", sound
    )


def test_a_table_without_the_columns_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\nabc_1,some words are here\n")
    with pytest.raises(InputError, match="t.csv"):
        find_columns(tmp_path / "t.csv")


def test_ids_keep_the_clips_of_another_list_under_its_names(tmp_path):
    captions = write_captions(tmp_path / "c.csv", 10)
    names = [name for name, _ in read_captions(captions)]
    (tmp_path / "avqa.json").write_text(
        json.dumps([{"video_name": f"{names[3][:11]}_3"}, {"video_name": names[5]}])
    )
    assert [n for n, _ in read_captions(captions, tmp_path / "avqa.json")] == [f"{names[3][:11]}_3", names[5]]
    (tmp_path / "vgg.csv").write_text(f"{names[1][:11]},1,dog,train\n{names[2][:11]},2,dog,test\n")
    assert [n for n, _ in read_captions(captions, tmp_path / "vgg.csv")] == [names[1]]


def test_a_disturbed_and_killed_run_gives_the_rows_of_an_undisturbed_one(tmp_path, serve, kills=3, clips=150):
    captions, env = write_captions(tmp_path / "c.csv", clips), {**os.environ, "OPENAI_API_KEY": KEY}
    calm = generate(captions, tmp_path / "calm.jsonl", serve().url)
    assert calm.returncode == 0, calm.stderr
    rough, rng, output = serve(fail=0.3, latency=0.005), random.Random(0), ""
    rough.ways += ["nonsense"]
    for _ in range(kills):
        job = subprocess.Popen(
            command(captions, tmp_path / "rough.jsonl", rough.url, "--timeout", 0.5, "--workers", 8),
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        have = len(rough.requests)
        while job.poll() is None and len(rough.requests) < have + 10:
            time.sleep(0.01)
        time.sleep(rng.random() * 6 / max(kills, 6))
        job.send_signal(signal.SIGKILL)
        output += job.communicate()[0]
    with open(tmp_path / "rough.jsonl", "a") as file:
        file.write('{"id": "half a li')  # as a kill can leave it
    last = generate(captions, tmp_path / "rough.jsonl", rough.url, "--timeout", 0.5, "--workers", 8)
    assert last.returncode == 0, last.stderr
    for name in ("jsonl", "rejected.jsonl"):
        calm_rows, rough_rows = (
            (tmp_path / f"{run}.{name}").read_text().splitlines() for run in ("calm", "rough")
        )
        if name == "jsonl":
            assert sorted(calm_rows) == sorted(rough_rows) and len(calm_rows) == clips - clips // 50
        assert sorted(json.loads(r)["id"] for r in calm_rows) == sorted(
            json.loads(r)["id"] for r in rough_rows
        )
    assert {authorization for _, authorization, _ in rough.requests} == {f"Bearer {KEY}"}
    written = output + last.stdout + last.stderr + "".join(f.read_text() for f in tmp_path.iterdir())
    assert KEY not in written
    assert len(read_questions(tmp_path / "rough.jsonl")) == clips - clips // 50
    summary = json.loads((tmp_path / "rough.summary.json").read_text())
    assert summary["retries"] > 0 and summary["done"] + summary["rejected"] == clips
    assert sum(summary["answer_places"]) == summary["done"]


@pytest.mark.slow
def test_twenty_kills(tmp_path, serve):
    test_a_disturbed_and_killed_run_gives_the_rows_of_an_undisturbed_one(
        tmp_path, serve, kills=20, clips=3000
    )


STOPS = {401: "unauthorized", 403: "forbidden", 404: "no such path", 400: "model_not_found: no such model"}


@pytest.mark.parametrize("status", STOPS)
def test_what_cannot_pass_stops_at_once_and_says_why(tmp_path, serve, status):
    server = serve(always=(status, {"error": {"message": f"{STOPS[status]} {KEY}"}}))
    done = generate(write_captions(tmp_path / "c.csv", 50), tmp_path / "q.jsonl", server.url, "--workers", 4)
    assert done.returncode == 2 and STOPS[status] in done.stderr and str(status) in done.stderr
    assert KEY not in done.stderr + done.stdout and len(server.requests) <= 4


def test_a_pause_that_the_server_asks_for_holds_for_all_workers(serve):
    server = serve(always=(429, {"error": "slow"}, {"Retry-After": "1"}))
    client = ChatClient(server.url, "m", tries=3)
    workers = [threading.Thread(target=client.complete, args=([],)) for _ in range(4)]
    started = time.monotonic()
    for worker in workers:
        worker.start()
    time.sleep(0.8)
    assert len(server.requests) == 4 and server.requests[-1][0] - started < 0.5
    server.always = (200, {"choices": [{"message": {"content": "fine"}}]})
    for worker in workers:
        worker.join()
    assert min(t for t, _, _ in server.requests[4:]) - started >= 1.0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and retry_after("soon") is None


def test_a_server_that_is_gone_stops_the_run_and_nothing_is_lost(tmp_path, serve):
    captions = write_captions(tmp_path / "c.csv", 40)
    done = generate(captions, tmp_path / "q.jsonl", "http://127.0.0.1:9/v1/chat/completions", "--tries", 1)
    assert done.returncode == 2 and "failed 2 times" in done.stderr
    assert generate(captions, tmp_path / "q.jsonl", serve().url).returncode == 0
    assert len(rows(tmp_path / "q.jsonl")) == 40


def test_the_price_is_said_before_and_the_rest_as_asked(tmp_path, serve):
    captions, out, server = write_captions(tmp_path / "c.csv", 50), tmp_path / "q.jsonl", serve()
    dry = generate(captions, out, server.url, "--dry_run", "--price_in", 1000)
    assert "50 clips, 50 to ask" in dry.stdout and PROMPT in dry.stdout and not server.requests
    price = float(re.search(r"price (\S+)", dry.stdout)[1])
    assert generate(captions, out, server.url, "--keep_shortest", 10).returncode == 0
    kept = rows(tmp_path / "q.shortest.jsonl")
    length = {r["id"]: len("".join([r["question_text"], *r["multi_choice"]])) for r in rows(out)}
    assert len(kept) == 10 and max(length[r["id"]] for r in kept) <= sorted(length.values())[9]
    assert 10 < price < 40  # 49 prompts of about 400 tokens, at 1000 a million
    assert generate(captions, out, server.url, "--sample", 2).stdout.count("A4: There is no music") == 2
    asked = len(server.requests)
    assert generate(captions, out, server.url).returncode == 0 and len(server.requests) == asked
    generate(captions, out, server.url, "--retry_rejected")
    assert len(server.requests) == asked + 5  # the rejected clip, five times more


@pytest.mark.slow
def test_sixteen_workers_reach_the_rate_that_the_latency_allows(tmp_path, serve):
    server = serve(latency=0.2)
    assert (
        generate(write_captions(tmp_path / "c.csv", 1600), tmp_path / "q.jsonl", server.url).returncode == 0
    )
    times = [t for t, _, _ in server.requests]
    rate = (len(times) - 1) / (max(times) - min(times))
    print(f"{rate:.1f} questions a second of the 80 that 200 ms and 16 workers allow")
    assert rate >= 0.95 * 80


@pytest.mark.slow
def test_a_hundred_thousand_captions_in_little_memory(tmp_path, serve):
    captions, out = write_captions(tmp_path / "c.csv", 100_000), tmp_path / "q.jsonl"
    names = [name for name, _ in read_captions(captions)]
    out.write_text(
        "".join(json.dumps(question_row(n, "What?", ["a", "b", "c", "d"], 0)) + "\n" for n in names[:-200])
    )
    server, started = serve(), time.monotonic()
    peak = "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    script = f"import gen_qa\ntry: gen_qa.main()\nfinally: {peak}"
    python, _, *arguments = command(captions, out, server.url)
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    start_up, peak = server.requests[0][0] - started, int(re.search(r"peak (\d+)", done.stdout)[1]) / 1024
    print(f"first request after {start_up:.1f} s, peak memory {peak:.0f} MB")
    assert start_up < 10 and peak < 300
