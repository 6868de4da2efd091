"""Laws of question generation: killed and failing = undisturbed, no id twice, nothing silent, no file but ours."""

import collections
import csv
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gen_qa
from captions import Captions, find_columns, same_clip
from chat_server import serving
from conftest import DATA
from data import read_questions
from files import InputError
from gen_qa import PROMPT, parse_answer, prompt_for, question_row, usable

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-do-not-print-me"
TEXTS = ["A dog barks.", "The sound of a dog.", "There is no speech.", "There is no music in this audio."]


@pytest.fixture
def serve():
    """serve(**options) -> a running ChatServer."""
    with serving() as start:
        yield start


def clip_name(i):
    return f"abcdefghi{i:02x}_{i}"[:11] + f"_{i:06d}"


def captions_of(i):
    word = "never answered" if i % 50 == 49 else "dog"
    return [
        f"The sound of a {word} {i}.",
        f"It barks {i}.",
        f"A voice speaks number {i}.",
        "There is no music in this audio.",
    ]


def write_table(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_captions(path, count):
    rows = [[clip_name(i), *captions_of(i)] for i in range(count)]
    return write_table(path, ["id", "caption", "answer_1", "answer_2", "answer_3"], rows)


def command(captions, out, url, *more):
    return [sys.executable, "gen_qa.py", "--captions", captions, "--out", out, "--url", url, *map(str, more)]


def generate(captions, out, url, *more, key=KEY):
    """Run gen_qa.py as a user would."""
    env = {**os.environ, "OPENAI_API_KEY": key}
    arguments = command(captions, out, url, *more)
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def run_here(monkeypatch, capsys, *arguments):
    """gen_qa.py's main in this process, which saves its start: (exit code, stdout, the last line of stderr)."""
    monkeypatch.setattr(sys, "argv", ["gen_qa.py", *map(str, arguments)])
    monkeypatch.setattr(gen_qa.warnings, "simplefilter", lambda *_: None)
    code = 0
    try:
        gen_qa.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, (said.err.splitlines() or [""])[-1]


def rows(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def clips_of(*paths, ids=None):
    return list(Captions([Path(path) for path in paths], ids))


# --------------------------------------------------------------------------------- prompt, answers, questions


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
    "line separators": json.dumps(GOOD | {"question_text": "What\u2028?"}).replace("What ?", "What?"),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_answers_are_read_as_models_write_them(way):
    question, choices = usable(parse_answer(WRITTEN[way]), TEXTS)
    assert question.replace(" ", "") == "What?" and choices == ["c", "a", "b", "d"]


BAD = [
    "", "no", "{" * 5000, "{'a': 1}", json.dumps(GOOD | {"question_text": " "}), json.dumps(GOOD | {"answer": 4}),
    json.dumps(GOOD | {"answer": -1}), json.dumps(GOOD | {"answer": True}), json.dumps(GOOD | {"answer": None}),
    json.dumps(GOOD | {"multi_choice": ["a", "b", "c"]}), json.dumps(GOOD | {"multi_choice": ["a", "A ", "c", "d"]}),
    json.dumps(GOOD | {"multi_choice": ["a", "", "c", "d"]}), json.dumps(GOOD | {"multi_choice": "abcd"}),
    json.dumps(GOOD | {"answer": "z"}), json.dumps(GOOD | {"answer": "9" * 5000}), '{"multi_choice": 4}',
    json.dumps(GOOD | {"multi_choice": 4}), json.dumps(GOOD | {"multi_choice": [1, 2, 3, 4]}), "{" + "[" * 9000,
    "{" + "-" * 15000 + "1: 2}", "{" + "(" * 9000 + "}",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_question_is_refused_with_a_reason(text):
    with pytest.raises(ValueError, match="."):
        usable(parse_answer(text), TEXTS)


def test_no_false_music_refuses_questions_about_music_that_is_not_there():
    row = GOOD | {"question_text": "Which instrument leads the music?"}
    with pytest.raises(ValueError, match="music"):
        usable(row, TEXTS, no_false_music=True)
    assert usable(row, [*TEXTS[:3], "The music is jazz."], no_false_music=True)


def test_the_right_answer_stands_at_each_place_a_quarter_of_the_time():
    made = [question_row(f"clip{i}", "What?", ["right", "b", "c", "d"], seed=0) for i in range(4000)]
    for row in made:
        assert row["multi_choice"][row["answer"]] == "right" and len(set(row["multi_choice"])) == 4
    counts = collections.Counter(row["answer"] for row in made)
    assert all(900 < counts[place] < 1100 for place in range(4))
    assert made[7] == question_row("clip7", "What?", ["right", "b", "c", "d"], seed=0)


# -------------------------------------------------------------------------------------------------- captions

TABLES = {
    "published examples": None,
    "csv with questions": "file,Q1,A1,Q2,A2,Q3,A3,summary\nx1234567890_30,Describe this audio according to the sounds,"
    "dogs are barking loudly,information about the speech?,a man is speaking,information about the music?,"
    "there is no music,Dogs bark while a man speaks\ny1234567890_40,Describe this audio according to the sounds,"
    "rain falls on a roof,information about the speech?,nobody can be heard,information about the music?,slow piano "
    "music plays,A piano plays in the rain\n",
    "other order": "music,speech,overall caption,sounds,clip\nthere is no music,a woman is speaking,A woman talks in a "
    "street,cars are passing by,x1234567890_30\n",
    "no header": "x1234567890_30,Dogs bark while a man speaks,dogs are barking loudly,a man is speaking,there is no "
    "music\ny1234567890_40,A piano plays in the rain,rain falls on a roof,no speech is heard,slow piano music plays\n",
    "a JSON list": json.dumps([{"file": "x1234567890_30", "caption": "Dogs bark while a man speaks", "sound":
                                "dogs are barking", "speech": "a man is speaking", "music": "there is no music"}]),
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
    name, (overall, sound, speech, music) = clips_of(path)[0]
    assert name in ("x1234567890_30", "_7Xe9vD3Hpg_4_10")  # the first row, header or not
    assert "music" in music and re.search("speech|speak", speech)
    assert re.match("A solemn|Dogs bark|A woman", overall) and re.match(
        "The music starts|dogs are|cars", sound
    )


def test_audiosetcaps_two_tables_are_joined_by_id(tmp_path):
    overall = [[clip_name(i), captions_of(i)[0]] for i in range(40)]
    answers = []
    for i in reversed(range(2, 42)):
        _, sounds, speech, music = captions_of(i)
        asked = ["Describe the sounds?", "Give information about speech?", "about music?"]
        answers.append([clip_name(i), asked[0], sounds, asked[1], speech, asked[2], music])
    a = write_table(tmp_path / "VGGSound_AudioSetCaps_caption.csv", ["id", "caption"], overall)
    header = ["id", "question_1", "answer_1", "question_2", "answer_2", "question_3", "answer_3"]
    b = write_table(tmp_path / "VGGSound_Qwen-Audio_Q&A.csv", header, answers)
    expected = {clip_name(i): captions_of(i) for i in range(2, 40)}
    assert dict(clips_of(a, b)) == dict(clips_of(b, a)) == expected
    captions = Captions([a, b])
    list(captions)
    alone = [same_clip(name) for name in captions.left_out["not in every table"]]
    assert sorted(alone) == sorted(same_clip(clip_name(i)) for i in (0, 1, 40, 41))


NO_TABLE = {
    "no captions": "id,text\nabc_1,some words are here\n",
    "no ids": "name,caption\nabc,some words are here\n",
    "empty": "",
    "a header alone": "id,caption,sound,speech,music\n",
    "binary": b"\xff\xfe\x00\x01",
    "half a JSON list": '[{"id": "a_1"}, {"id"',
    "a number": "7",
    "a huge field": "id,caption\na_1," + "x" * 200_000,
    "a deep JSON list": "[" * 100_000,
}


@pytest.mark.parametrize("kind", [*NO_TABLE, "missing", "a folder", "a FIFO"])
def test_a_table_that_is_none_is_refused_in_one_line(tmp_path, monkeypatch, capsys, kind):
    path = tmp_path / "t.csv"
    if kind in NO_TABLE:
        content = NO_TABLE[kind]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    code, _, said = run_here(monkeypatch, capsys, "--captions", path, "--out", tmp_path / "q.jsonl")
    assert code == 2 and said.startswith("error: ") and "t.csv" in said
    if kind in NO_TABLE:
        with pytest.raises(InputError, match="t.csv"):
            find_columns([path])


def test_ids_keep_the_clips_of_another_list_under_its_names(tmp_path):
    captions = write_captions(tmp_path / "c.csv", 10)
    names = [clip_name(i) for i in range(10)]
    avqa, vgg, lines = tmp_path / "avqa.json", tmp_path / "vgg.csv", tmp_path / "names.txt"
    avqa.write_text(
        json.dumps([{"id": "q1", "video_name": f"{names[3][:11]}_3"}, {"video_name": names[5]}, 5])
    )
    vgg.write_text(f'{names[1][:11]},1,"dog, barking",train\n{names[2][:11]},2,dog,test\n')
    lines.write_text(f"{names[7]}\r\n{names[8]}\n")
    assert [name for name, _ in clips_of(captions, ids=avqa)] == [f"{names[3][:11]}_3", names[5]]
    assert [name for name, _ in clips_of(captions, ids=vgg)] == [names[1]]
    assert [name for name, _ in clips_of(captions, ids=lines)] == names[7:9]


def test_what_is_left_out_is_counted_and_named(tmp_path, monkeypatch, capsys):
    table = [
        {"id": clip_name(i), "caption": f"A dog {i}.", "sound": "s", "speech": "t", "music": "u"}
        for i in range(22)
    ]
    for row in table[:8]:
        row["caption"] = ""
    table += [table[9], {"caption": "no id"}]
    path, ids = tmp_path / "c.jsonl", tmp_path / "ids.txt"
    path.write_text("".join(json.dumps(row) + "\n" for row in table) + "not JSON\n")
    ids.write_text("".join(f"{clip_name(i)}\n" for i in range(20, 40)))
    out = ["--out", tmp_path / "q.jsonl", "--dry_run"]
    _, said, _ = run_here(monkeypatch, capsys, "--captions", path, *out)
    assert f"8 left out, no overall caption: {clip_name(0)}, {clip_name(1)}," in said
    assert f"1 left out, a clip met before: {clip_name(9)}" in said and "2 left out, no id" in said
    assert "14 clips, 14 to ask" in said
    _, said, _ = run_here(monkeypatch, capsys, "--captions", path, "--ids", ids, *out)
    assert (
        f"18 left out, of --ids, without captions: {clip_name(22)}, " in said and "2 clips, 2 to ask" in said
    )
    ids.write_text("\n" + json.dumps([{"video_name": clip_name(20)}]))
    _, said, _ = run_here(monkeypatch, capsys, "--captions", path, "--ids", ids, *out)
    assert "1 clips, 1 to ask" in said


# ----------------------------------------------------------------------------------------- runs, kills, files


def test_a_disturbed_and_killed_run_gives_the_rows_of_an_undisturbed_one(tmp_path, serve, kills=3, clips=150):
    captions = write_captions(tmp_path / "c.csv", clips)
    env = {**os.environ, "OPENAI_API_KEY": KEY}
    calm = generate(captions, tmp_path / "calm.jsonl", serve().url)
    assert calm.returncode == 0, calm.stderr
    rough = serve(fail=0.3, latency=0.005)
    rough.ways += ["nonsense"]
    rng = random.Random(0)
    output = ""
    arguments = command(captions, tmp_path / "rough.jsonl", rough.url, "--timeout", 0.5, "--workers", 8)
    for _ in range(kills):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        job = subprocess.Popen(arguments, cwd=ROOT, env=env, **pipes)
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
    calm_rows = (tmp_path / "calm.jsonl").read_text().splitlines()
    rough_rows = (tmp_path / "rough.jsonl").read_text().splitlines()
    assert sorted(calm_rows) == sorted(rough_rows) and len(calm_rows) == clips - clips // 50
    rejected = [
        sorted(row["id"] for row in rows(tmp_path / f"{run}.rejected.jsonl")) for run in ("calm", "rough")
    ]
    assert rejected[0] == rejected[1]
    assert {authorization for _, authorization, _ in rough.requests} == {f"Bearer {KEY}"}
    assert {body["max_tokens"] for _, _, body in rough.requests} == {512}
    written = output + last.stdout + last.stderr + "".join(f.read_text() for f in tmp_path.iterdir())
    assert KEY not in written
    assert len(read_questions(tmp_path / "rough.jsonl")) == clips - clips // 50
    summary = json.loads((tmp_path / "rough.summary.json").read_text())
    assert summary["retries"] > 0 and summary["done"] + summary["rejected"] == clips
    assert sum(summary["answer_places"]) == summary["done"]


@pytest.mark.slow
def test_twenty_kills(tmp_path, serve):
    test_a_disturbed_and_killed_run_gives_the_rows_of_an_undisturbed_one(
        tmp_path, serve, kills=20, clips=1000
    )


FOREIGN = {
    "a page of prose": "Notes.\nThe end",
    "one line of JSON without an end": '[{"id": "a", "video_name": "a"}]' * 5000,
    "AVQA's rows": json.dumps({"id": 1, "video_name": "a", "question_text": "?", "multi_choice": ["a"], "answer": 0,
                               "question_type": "Is"}) + "\n",
    "a row whose id is a list": '{"id": [], "video_name": "a", "question_text": "?", "multi_choice": [], "answer": 0, '
    '"question_type": "Generated"}\n',
    "a JSON row without an end": '{"id": "a", "mine": 1}',
    "half of a JSON row": '{"id": "a", "mi',
    "half a row after a foreign one": '{"a": 1}\n{"id": "b',
    "half a row of other keys after our first": '{"id": "a", "video_name": "a", "my_field": "Q',
    "a whole row of other keys without an end": '{"id": "a", "video_name": "a", "question_text": "?", "mine": 1}',
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("mode", [[], ["--dry_run"], ["--sample", 3]])
def test_a_file_that_is_not_ours_is_never_touched(tmp_path, monkeypatch, capsys, kind, mode):
    out = tmp_path / "out.jsonl"
    out.write_text(FOREIGN[kind])
    captions = write_captions(tmp_path / "c.csv", 3)
    arguments = ["--captions", captions, "--out", out, "--url", "http://127.0.0.1:9/", "--tries", 0, *mode]
    code, _, said = run_here(monkeypatch, capsys, *arguments)
    assert code == 2 and "out.jsonl, line" in said and "not one of our rows" in said
    assert out.read_text() == FOREIGN[kind]


@pytest.mark.parametrize("mode", [["--dry_run"], ["--sample", 2]])
def test_dry_run_and_sample_write_nothing(tmp_path, monkeypatch, capsys, mode):
    out = tmp_path / "new" / "q.jsonl"
    captions = write_captions(tmp_path / "c.csv", 3)
    assert run_here(monkeypatch, capsys, "--captions", captions, "--out", out, *mode)[0] == 0
    assert not out.parent.exists()
    out.parent.mkdir()
    row = question_row(clip_name(0), "What?", ["a", "b", "c", "d"], 0)
    out.write_text(json.dumps(row) + '\n{"id": "half a li')
    out.with_suffix(".rejected.jsonl").write_text('{"id": "x", "reason": "y')
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    code, said, _ = run_here(monkeypatch, capsys, "--captions", captions, "--out", out, *mode)
    assert code == 0 and ("2 to ask" in said or "What?" in said)
    assert before == {path: path.read_bytes() for path in out.parent.iterdir()}


HALVES = [
    "{",
    '{"id": "abc',
    '{"id": "abc", "vi',
    '{"id": "abc", "video_name": "abc", "question_te',
    '{"id": "half a letter \udcc3',
]


@pytest.mark.parametrize("half", HALVES)
def test_our_own_half_row_is_cut_and_a_whole_one_without_its_end_is_kept(
    tmp_path, serve, monkeypatch, capsys, half
):
    out = tmp_path / "q.jsonl"
    whole = json.dumps(question_row(clip_name(0), "Mine?", ["a", "b", "c", "d"], 0))
    arguments = ["--captions", write_captions(tmp_path / "c.csv", 3), "--out", out, "--url", serve().url]
    out.write_bytes(f"{whole}\n{half}".encode("utf-8", "surrogateescape"))
    assert run_here(monkeypatch, capsys, *arguments)[0] == 0
    kept = out.read_text()
    assert len(rows(out)) == 3 and rows(out)[0]["question_text"] == "Mine?"
    out.write_text(kept.rstrip("\n"))
    assert run_here(monkeypatch, capsys, *arguments)[0] == 0
    assert out.read_text() == kept


def test_rows_stand_one_a_line_whatever_stands_in_them(tmp_path, serve, monkeypatch, capsys):
    answer = json.dumps(
        {
            "question_text": "What\u2028is\u0085it?",
            "multi_choice": ["a\u2029b", "\ud800", "c", "d"],
            "answer": 0,
        }
    )
    server = serve(always=(200, {"choices": [{"message": {"content": answer}}]}))
    out = tmp_path / "q.jsonl"
    arguments = ["--captions", write_captions(tmp_path / "c.csv", 2), "--out", out, "--url", server.url]
    assert run_here(monkeypatch, capsys, *arguments)[0] == 0
    assert len(out.read_text().splitlines()) == 2
    assert sorted(rows(out)[0]["multi_choice"]) == ["?", "a b", "c", "d"]
    server.always = (200, {"choices": [{"message": {"content": "no \u2028 question \u2029\n"}}]})
    out = tmp_path / "r.jsonl"
    assert run_here(monkeypatch, capsys, *arguments, "--out", out)[0] == 2
    assert (
        run_here(monkeypatch, capsys, *arguments, "--out", out)[0] == 2
    )  # its rejected rows can be read again
    assert len(rows(out.with_suffix(".rejected.jsonl"))) == 2


def test_a_second_start_names_the_first_and_touches_nothing(tmp_path, serve):
    captions = write_captions(tmp_path / "c.csv", 60)
    server = serve(latency=0.3)
    out = tmp_path / "q.jsonl"
    first = subprocess.Popen(command(captions, out, server.url, "--workers", 1), cwd=ROOT, stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)  # fmt: skip
    while not out.exists() or not rows(out):
        time.sleep(0.01)
    server.open.clear()  # it waits for its next answer
    spy = serve()
    second = generate(captions, out, spy.url)
    assert second.returncode == 2 and f"held by process {first.pid}" in second.stderr and not spy.requests
    first.send_signal(signal.SIGINT)
    server.open.set()
    assert first.wait(60) == 2
    assert len({row["id"] for row in rows(out)}) == len(rows(out)) > 0
    with open(f"{out}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back


SUMMARIES = [
    "",
    "[]",
    "{",
    '{"tokens": 5, "retries": 0}',
    '{"tokens": [1, "x"], "retries": 0}',
    '{"tokens": [1]}',
]


@pytest.mark.parametrize("text", SUMMARIES)
def test_a_damaged_summary_is_named(tmp_path, monkeypatch, capsys, text):
    (tmp_path / "q.summary.json").write_text(text)
    captions = write_captions(tmp_path / "c.csv", 3)
    code, _, said = run_here(monkeypatch, capsys, "--captions", captions, "--out", tmp_path / "q.jsonl")
    assert code == 2 and "q.summary.json" in said


WRONG = [
    ("--timeout", "nan"), ("--timeout", "0"), ("--timeout", "inf"), ("--timeout", "1e12"), ("--seed", "-1"),
    ("--workers", "0"), ("--workers", "100000"), ("--tries", "-1"), ("--tries", "5000"), ("--price_in", "nan"),
    ("--price_out", "-1"), ("--sample", "-1"), ("--keep_shortest", "-1"), ("--max_tokens", "0"), ("--url", "nowhere"),
    ("--out", "."), ("--ids", "missing.json"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), WRONG)
def test_an_option_that_no_run_can_be_made_with_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, option, value
):
    captions = write_captions(tmp_path / "c.csv", 3)
    arguments = ["--captions", captions, "--out", tmp_path / "q.jsonl", option, value]
    code, out, said = run_here(monkeypatch, capsys, *arguments)
    assert code == 2 and said.startswith("error: ") and (option in said or value in said) and out == ""
    assert not (tmp_path / "q.jsonl").exists()


# ------------------------------------------------------------------------------------ servers that do not serve

STOPS = {
    401: "unauthorized",
    402: "insufficient balance",
    403: "forbidden",
    404: "no such path",
    400: "model_not_found: no such model",
}


@pytest.mark.parametrize("status", STOPS)
def test_what_cannot_pass_stops_at_once_and_says_why(tmp_path, serve, status):
    server = serve(always=(status, {"error": {"message": f"{STOPS[status]} {KEY}"}}))
    done = generate(write_captions(tmp_path / "c.csv", 50), tmp_path / "q.jsonl", server.url, "--workers", 4)
    assert done.returncode == 2 and STOPS[status] in done.stderr and str(status) in done.stderr
    assert KEY not in done.stderr + done.stdout and len(server.requests) <= 4


@pytest.mark.parametrize("count", [3, 50])
def test_a_server_that_refuses_everything_is_no_success_and_no_clip_is_to_blame(
    tmp_path, serve, monkeypatch, capsys, count
):
    server = serve(always=(400, {"error": "this model takes no messages"}))
    out = tmp_path / "q.jsonl"
    arguments = [
        "--captions",
        write_captions(tmp_path / "c.csv", count),
        "--out",
        out,
        "--url",
        server.url,
        "--workers",
        4,
    ]
    code, _, said = run_here(monkeypatch, capsys, *arguments)
    assert code == 2 and "takes no messages" in said and len(server.requests) <= 12
    assert not out.exists() and not out.with_suffix(".rejected.jsonl").exists()
    server.always = None
    assert run_here(monkeypatch, capsys, *arguments)[0] == 0
    assert len(rows(out)) == count - count // 50


def test_a_clip_that_is_refused_among_others_is_asked_once_and_rejected(tmp_path, serve, monkeypatch, capsys):
    server = serve()
    complete = gen_qa.ChatClient.complete

    def picky(client, messages, **options):
        if "number 3." in messages[0]["content"]:
            raise gen_qa.Refused("HTTP 400: not that one")
        return complete(client, messages, **options)

    monkeypatch.setattr(gen_qa.ChatClient, "complete", picky)
    out = tmp_path / "q.jsonl"
    arguments = ["--captions", write_captions(tmp_path / "c.csv", 6), "--out", out, "--url", server.url]
    assert run_here(monkeypatch, capsys, *arguments)[0] == 0
    assert len(rows(out)) == 5 and len(server.requests) == 5
    assert rows(out.with_suffix(".rejected.jsonl")) == [
        {"id": clip_name(3), "reason": "HTTP 400: not that one", "answer": ""}
    ]


def test_what_is_refused_after_a_restart_is_to_blame_only_if_the_server_answers_at_all(
    tmp_path, serve, monkeypatch, capsys
):
    server = serve()
    out = tmp_path / "q.jsonl"
    arguments = ["--out", out, "--url", server.url, "--captions"]
    assert run_here(monkeypatch, capsys, *arguments, write_captions(tmp_path / "a.csv", 3))[0] == 0
    more = write_captions(tmp_path / "b.csv", 6)
    server.always = (400, {"error": "no credit"})
    code, _, said = run_here(monkeypatch, capsys, *arguments, more)
    assert code == 2 and "no credit" in said and not out.with_suffix(".rejected.jsonl").exists()
    server.always = None
    complete = gen_qa.ChatClient.complete

    def picky(client, messages, **options):
        if any(f"number {i}." in messages[0]["content"] for i in (3, 4, 5)):
            raise gen_qa.Refused("HTTP 400: not that one")
        return complete(client, messages, **options)

    monkeypatch.setattr(gen_qa.ChatClient, "complete", picky)
    assert run_here(monkeypatch, capsys, *arguments, more)[0] == 0
    assert len(rows(out.with_suffix(".rejected.jsonl"))) == 3


def test_no_question_at_all_is_no_success_and_does_not_cost_all_clips(tmp_path, serve, monkeypatch, capsys):
    server = serve(fail=1.0)
    server.ways = ["nonsense"]
    for count, say in ((4, "no question came out of 4 clips"), (300, "clips rejected, 0 questions")):
        out = tmp_path / f"q{count}.jsonl"
        captions = write_captions(tmp_path / "c.csv", count)
        code, _, said = run_here(
            monkeypatch, capsys, "--captions", captions, "--out", out, "--url", server.url
        )
        assert code == 2 and say in said and "no question in the answer" in said
    assert len(server.requests) <= 5 * (4 + 100 + 2 * 16)


def test_one_question_among_a_hundred_that_are_none_is_no_success_either(
    tmp_path, serve, monkeypatch, capsys
):
    server = serve()
    arguments = ["--out", tmp_path / "q.jsonl", "--url", server.url]
    captions = write_captions(tmp_path / "c.csv", 1)
    assert run_here(monkeypatch, capsys, "--captions", captions, *arguments)[0] == 0
    server.fail = 1.0
    server.ways = ["nonsense"]
    captions = write_captions(tmp_path / "c.csv", 300)
    code, _, said = run_here(monkeypatch, capsys, "--captions", captions, *arguments)
    assert code == 2 and "clips rejected, 1 questions" in said


def test_no_file_of_the_users_is_written_over(tmp_path, serve, monkeypatch, capsys):
    captions = write_captions(tmp_path / "c.csv", 2)
    url = serve().url
    for name, written in {"q.shortest.jsonl": "mine", "q.jsonl.lock": "mine"}.items():
        (tmp_path / name).write_text(written)
        arguments = [
            "--captions",
            captions,
            "--out",
            tmp_path / "q.jsonl",
            "--url",
            url,
            "--keep_shortest",
            1,
        ]
        code, _, said = run_here(monkeypatch, capsys, *arguments)
        assert code == 2 and name in said and (tmp_path / name).read_text() == written
        (tmp_path / name).unlink()
    (tmp_path / "q.jsonl.lock").symlink_to(captions)
    before = captions.read_bytes()
    assert run_here(monkeypatch, capsys, *arguments)[0] == 2 and captions.read_bytes() == before
    os.mkfifo(tmp_path / "pipe")
    arguments[3] = tmp_path / "pipe"
    code, _, said = run_here(monkeypatch, capsys, *arguments)
    assert code == 2 and "no regular file" in said


def test_two_outputs_of_one_stem_share_nothing(tmp_path):
    assert gen_qa.beside(tmp_path / "q.jsonl", "rejected.jsonl") == tmp_path / "q.rejected.jsonl"
    assert gen_qa.beside(tmp_path / "q.json", "rejected.jsonl") == tmp_path / "q.json.rejected.jsonl"


def test_a_server_that_is_gone_stops_the_run_and_nothing_is_lost(tmp_path, serve, monkeypatch, capsys):
    captions = write_captions(tmp_path / "c.csv", 40)
    arguments = ["--captions", captions, "--out", tmp_path / "q.jsonl", "--url"]
    code, _, said = run_here(
        monkeypatch, capsys, *arguments, "http://127.0.0.1:9/v1/chat/completions", "--tries", 1
    )
    assert code == 2 and "failed 2 times" in said
    assert run_here(monkeypatch, capsys, *arguments, serve().url)[0] == 0
    assert len(rows(tmp_path / "q.jsonl")) == 40


def test_a_full_disk_stops_the_run_and_what_is_there_stays_whole(tmp_path, serve, monkeypatch, capsys):
    captions = write_captions(tmp_path / "c.csv", 40)
    out = tmp_path / "q.jsonl"
    script = "import resource, gen_qa\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\ngen_qa.main()"
    python, _, *arguments = command(captions, out, serve().url)
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert 5 < len(rows(out)) < 12  # whole rows only
    assert run_here(monkeypatch, capsys, *map(str, arguments))[0] == 0
    assert len({row["id"] for row in rows(out)}) == len(rows(out)) == 40


def test_the_price_is_said_before_and_the_rest_as_asked(tmp_path, serve, monkeypatch, capsys):
    out = tmp_path / "q.jsonl"
    server = serve()
    arguments = ["--captions", write_captions(tmp_path / "c.csv", 50), "--out", out, "--url", server.url]

    def run(*more):
        code, said, _ = run_here(monkeypatch, capsys, *arguments, *more)
        assert code == 0
        return said

    dry = run("--dry_run", "--price_in", 1000, "--price_out", 0)
    assert "50 clips, 50 to ask" in dry and PROMPT in dry and not server.requests
    price = float(re.search(r"price (\S+)", dry)[1])
    assert 10 < price < 40  # 50 prompts of about 400 tokens, at 1000 a million
    dry = run("--dry_run", "--price_in", 0, "--price_out", 1000)
    assert float(re.search(r"price (\S+)", dry)[1]) == 3.0  # 50 answers of 60 tokens
    run("--keep_shortest", 10, "--max_tokens", 300)
    assert {body["max_tokens"] for _, _, body in server.requests} == {300}
    kept = rows(tmp_path / "q.shortest.jsonl")
    length = {r["id"]: len("".join([r["question_text"], *r["multi_choice"]])) for r in rows(out)}
    assert len(kept) == 10 and max(length[r["id"]] for r in kept) <= sorted(length.values())[9]
    assert run("--sample", 2).count("A4: There is no music") == 2
    asked = len(server.requests)
    run()
    assert len(server.requests) == asked
    run("--retry_rejected")
    assert len(server.requests) == asked + 5  # the rejected clip, five times more


@pytest.mark.slow
def test_sixteen_workers_reach_the_rate_that_the_latency_allows(tmp_path, serve):
    server = serve(latency=0.2)
    done = generate(write_captions(tmp_path / "c.csv", 1600), tmp_path / "q.jsonl", server.url)
    assert done.returncode == 0
    times = [t for t, _, _ in server.requests]
    rate = (len(times) - 1) / (max(times) - min(times))
    print(f"{rate:.1f} questions a second of the 80 that 200 ms and 16 workers allow")
    assert rate >= 0.5 * 80  # 0.95 on a quiet machine; the printed figure is what is reported


@pytest.mark.slow
@pytest.mark.parametrize("tables", [1, 2])
def test_a_hundred_thousand_captions_in_little_memory(tmp_path, serve, tables):
    count = 100_000
    out = tmp_path / "q.jsonl"
    captions = [write_captions(tmp_path / "c.csv", count)]
    if tables == 2:
        overall = [[clip_name(i), captions_of(i)[0]] for i in range(count)]
        answers = [[clip_name(i), *captions_of(i)[1:]] for i in range(count)]
        captions = [write_table(tmp_path / "a.csv", ["id", "caption"], overall)]
        captions += [write_table(tmp_path / "b.csv", ["id", "answer_1", "answer_2", "answer_3"], answers)]
    done = [question_row(clip_name(i), "What?", ["a", "b", "c", "d"], 0) for i in range(count - 200)]
    out.write_text("".join(json.dumps(row) + "\n" for row in done))
    server = serve()
    peak = "print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    script = f"import gen_qa\ntry: gen_qa.main()\nfinally: {peak}"
    arguments = ["--captions", *captions, "--out", out, "--url", server.url]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    start_up = server.requests[0][0] - started
    peak = int(re.search(r"peak (\d+)", done.stdout)[1]) / 1024
    print(f"first request after {start_up:.1f} s, peak memory {peak:.0f} MB")
    assert start_up < 60 and peak < 300  # the printed figure is what is reported
