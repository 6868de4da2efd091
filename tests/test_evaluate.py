"""Laws of the evaluation: batched = single; killed, shared, repeated = once; nothing unfinished looks finished."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from test_train import here

import data
import evaluate as evaluation
from chat_server import reply_of, serving
from conftest import DATA, free_port
from data import read_questions
from files import InputError, one_writer
from model import load_model
from report import read_result, readable
from reward import string_match

RECORD = evaluation.Evaluation.record


def evaluate(out, *more, code=0, **named):
    """evaluate.py's main in this process, to save its start, on the tiny MMAU: what it says."""
    values = {"model": WORLD / "model", "data": WORLD / "mmau.json", "audio_dir": WORLD / "audio"}
    values |= {"out": out, "max_new_tokens": 8, **named}
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    said = io.StringIO()
    logging.getLogger().handlers.clear()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ended = here(evaluation.main, *words, *more)
    assert ended == code, said.getvalue()
    return said.getvalue()


def refused(says, out, *more, **named):
    said = evaluate(out, *more, code=2, **named)
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1 and says in errors[0], said


@pytest.fixture(scope="module", autouse=True)
def world_of_all(world):
    global WORLD
    WORLD = world


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("eval") / "base.json"
    said = evaluate(out)
    return rows_in(out), said


@pytest.fixture
def few(tmp_path):
    """A file of 24 questions."""
    (tmp_path / "few.json").write_text(json.dumps(rows_in(WORLD / "mmau.json")[:24]))
    return {"data": tmp_path / "few.json"}


def average(said):
    return float(re.search(r"all +(\S+)", said)[1])


def change(few, **keys):
    rows = [row | keys for row in rows_in(few["data"])]
    few["data"].write_text(json.dumps(rows))


def rows_in(out):
    return json.loads(out.read_text())


def about(out):
    return json.loads(out.with_suffix(".meta").read_text())


def share_right(rows):
    return 100 * np.mean([string_match(row["answer"], row["model_output"], row["choices"]) for row in rows])


# --------------------------------------------------------------------------------------------- what is answered


def test_the_file_is_the_benchmarks_own_rows_with_the_answers_taken_one_at_a_time(whole):
    rows, said = whole
    lm = load_model(WORLD / "model")
    questions = read_questions(WORLD / "mmau.json", WORLD / "audio")
    for row, question in zip(rows[::10], questions[::10], strict=True):
        alone = lm.decode(lm.generate([lm.encode(question)], 8)[0][0])
        assert row["model_prediction"] == row["model_output"] == alone
    assert average(said) == pytest.approx(share_right(rows), abs=0.05)
    own = [{k: v for k, v in row.items() if k not in evaluation.MMAU_KEYS} for row in rows]
    assert own == rows_in(WORLD / "mmau.json")


def then(number):
    """What sends this process a signal once it has written four answers down."""
    left = [None] * 4

    def record(job, *answer):
        RECORD(job, *answer)
        left.pop()
        if not left:
            os.kill(os.getpid(), number)

    return record


def forked(record, out, environment, **named):
    """The same in a process of its own, which need not import anything."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.environ.update(environment)
            evaluation.Evaluation.record = record
            evaluate(out, **named)
            os._exit(0)
        os._exit(99)
    return child


def test_batch_size_processes_a_kill_ctrl_c_and_forged_answers_change_nothing(
    few, whole, tmp_path, monkeypatch
):
    out = tmp_path / "p.json"
    few["batch_size"] = 3
    forged = dict.fromkeys(evaluation.OURS.split(), "forged") | {"order_predictions": ["forged"] * 2}
    change(few, **forged)
    few["data"].write_text(json.dumps([*rows_in(few["data"]), forged]))  # and a row that is no question
    killed = forked(then(signal.SIGKILL), out, {}, **few)
    assert os.waitpid(killed, 0)[1] == signal.SIGKILL and not out.exists()
    (part,) = tmp_path.glob("p.json.part-*-0")
    other = {"id": whole[0][9]["id"], "text": "another model's"}
    part.with_name("p.json.part-else-0").write_text(json.dumps(other))
    before = part.read_text() + '{"id": "half a l'
    part.write_text(before)
    monkeypatch.setattr(evaluation.Evaluation, "record", then(signal.SIGINT))
    assert "\nerror: interrupted; what was written is kept" in evaluate(out, code=2, **few)
    assert part.read_text().startswith(before) and part.read_text().count('"text"') == 8

    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pair = [forked(RECORD, out, shared | {"RANK": str(rank)}, **few) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in pair] == [0, 0]
    assert rows_in(out) == whole[0][:24] and not list(tmp_path.glob(f"{part.name[:-1]}*"))
    monkeypatch.setattr(evaluation, "load_model", None)  # nothing is asked twice
    evaluate(out, **few)
    refused("batch_size: 3 -> 5", out, **few | {"batch_size": 5})


def test_audio_none_silence_and_swap_are_what_they_say_with_one_loading(few, whole, tmp_path):
    outs = {audio: tmp_path / f"{audio}.json" for audio in ("none", "silence", "swap")}
    more = []
    for audio, out in outs.items():
        more += ["--and", "--audio", audio, "--out", out]
    lm = load_model(WORLD / "model")
    with mock.patch.object(evaluation, "load_model", return_value=lm) as loading:
        evaluate(tmp_path / "real.json", *more, **few)
    loading.assert_called_once()
    assert rows_in(tmp_path / "real.json") == whole[0][:24]
    for audio, out in outs.items():
        assert share_right(rows_in(out)) + 10 < average(whole[1])
        assert about(out)["audio"] == audio and about(out)["unanswered"] == {}
    questions = read_questions(few["data"], WORLD / "audio")
    heard = {"none": {"use_audio": False}, "silence": {"waveform": np.zeros(16_000, "float32")}}
    for audio, how in heard.items():
        alone = lm.generate([lm.encode(questions[0], **how)], 8)[0][0]
        assert rows_in(outs[audio])[0]["model_output"] == lm.decode(alone)
    swapped = evaluation.ask_everything(questions, Namespace(audio="swap", seed=0, orders=1))
    for question, (asked,) in zip(questions, swapped, strict=True):
        assert asked.audio not in (None, question.audio)


def test_mmar_lines_come_back_as_the_list_that_its_script_reads_with_every_order(tmp_path):
    rows = [json.loads(line) for line in (WORLD / "mmar.jsonl").read_text().splitlines()][:16]
    rows[3]["url"] = "half a pair: \ud800"  # which no UTF-8 file can hold as it is
    (tmp_path / "mmar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run[1].json"
    assert "n = 16" in evaluate(out, data=tmp_path / "mmar.jsonl", orders=3)
    assert about(out)["bench"] == "mmar"
    for row, before in zip(rows_in(out), rows, strict=True):
        assert row["id"] == before["id"] and row["answer_prediction"] == row["order_predictions"][0]
        assert len(row["order_predictions"]) == 3


def test_hidden_answers_are_written_for_the_server_and_a_runs_own_model_has_its_own_place(few, tmp_path):
    change(few, answer=None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model").symlink_to(WORLD / "model")
    assert "hidden" in evaluate("", **few, model=tmp_path / "mine" / "model")
    out = tmp_path / "mine" / "eval" / "mmau-mini.real.json"
    assert all("model_output" in row for row in rows_in(out))
    (result,) = readable(tmp_path.rglob("*.meta"), read_result, tmp_path)  # the page's
    assert (result.run, result.bench, result.audio) == ("mine", "mmau-mini", "real")


# ------------------------------------------------------------------------------------- what looks finished is


def test_missing_clips_stop_it_or_are_asked_again_once_they_are_there(few, whole, tmp_path, monkeypatch):
    out = tmp_path / "p.json"
    few["audio_dir"] = tmp_path / "clips"
    refused("24 of 24 questions", out, **few)
    assert not list(tmp_path.glob("p.*"))
    shutil.copytree(WORLD / "audio", few["audio_dir"])
    data.clips_in.cache_clear()
    clip = few["audio_dir"] / f"{whole[0][5]['id']}.wav"
    clip.rename(tmp_path / "away.wav")
    assert "1 of 24 answers are empty" in evaluate(out, **few)
    assert list(about(out)["unanswered"]) == [clip.stem]
    with monkeypatch.context() as patch:  # nothing new to ask: no model is loaded
        patch.setattr(evaluation, "load_model", None)
        evaluate(out, **few)
    (tmp_path / "away.wav").rename(clip)
    data.clips_in.cache_clear()
    evaluate(out, **few)
    assert rows_in(out) == whole[0][:24] and about(out)["unanswered"] == {}
    assert not list(tmp_path.glob("*.part-*"))


def test_answers_are_those_of_one_model_to_one_set_of_questions(few, tmp_path):
    out, model = tmp_path / "p.json", tmp_path / "other"
    shutil.copytree(WORLD / "model", model)
    few["model"] = model
    evaluate(out, **few)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        weight.view(-1)[::1000] += 1e-3  # as little as training with bfloat16 changes
        if name.endswith("norm.weight"):
            weight.fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused("weights: ", out, **few)
    refused("not finite", tmp_path / "nan.json", **few)
    shutil.copy(WORLD / "model" / "model.safetensors", model)
    change(few, question="What?")
    refused("questions: ", out, **few)
    for damaged in ("[1, 2", "[1, 2]"):
        out.with_suffix(".meta").write_text(damaged)
        refused("does not say how", out, **few)
    out.with_suffix(".meta").unlink()
    refused("does not say how", out, **few)


def test_one_writer(few, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "one_writer", lambda path: one_writer(path, patience=0.1))
    with one_writer(tmp_path / ".p.meta.lock"):
        refused(f"held by process {os.getpid()}", tmp_path / "p.json", **few)
    out = tmp_path / "twice.json"
    refused("held by process", out, "--and", "--out", out, **few)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    other, out = tmp_path / "other.json", tmp_path / "o.json"
    other.write_text("[]")
    for says, named in {
        "no/such": {"model": "no/such"},
        "other.meta does not say": {"out": other},
        "mmau.meta does not say": {"out": WORLD / "mmau.json"},
        "--batch_size": {"batch_size": 0},
        "--seed": {"seed": -1},
        "nowhere": {"adapter": "nowhere"},
        "not allowed with": {"url": "http://127.0.0.1:1/v1", "adapter": tmp_path},
        "--out is needed": {"out": "", "model": "hub/base"},
    }.items():
        refused(says, **{"out": out} | named)
    assert not out.exists() and other.read_text() == "[]"


def test_mmaus_version_is_told_by_its_questions():
    files = [DATA / f"mmau-test-mini-{version}.json" for version in ("original", "v05.15.25")]
    if not files[0].exists():
        pytest.skip(f"the published questions are not in {DATA}")
    name_of = evaluation.bench_name
    names = ["mmau-mini", "mmau-mini-v2"]
    both = list(map(read_questions, files))
    for questions, name, other in zip(both, names, names[::-1], strict=True):
        for part in (questions, questions[:200], questions[700:]):
            assert name_of(part, None) == name_of(part, name) == name
        assert name_of(questions, "mine") == "mine"
        mixed = questions[:200] + both[1][700:] + both[0][700:]
        for part, given in ((questions, other), (mixed, None), (questions[100:300], None)):
            with pytest.raises(InputError, match="mmau-mini (and|or) mmau-mini-v2"):
                name_of(part, given)


# ------------------------------------------------------------------------------------------- behind an endpoint


def test_a_model_behind_an_endpoint_fills_its_rows_and_no_secret_is_written(few, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-secret-secret")
    out = tmp_path / "p.json"
    with serving(fail=0.3, hears=False) as server:
        server.ways.remove("hang")
        few |= {"url": f"{server.url}?key=sk-secret-in-the-url", "model": "gpt"}
        said = evaluate(out, **few)
        assert about(out)["url"] == server.url and "does it hear?" in said
        said += evaluate(out, code=2, seed=1, **few)
    assert all(row["model_prediction"] in row["choices"] for row in rows_in(out))
    audio = server.requests[0][2]["messages"][0]["content"][0]["input_audio"]
    assert audio["format"] == "wav" and len(audio["data"]) > 10_000
    assert "sk-secret" not in said + out.read_text() + out.with_suffix(".meta").read_text()


def test_a_server_that_refuses_gives_no_result_and_costs_no_answer_twice(few, tmp_path, monkeypatch):
    with serving(always=(200, reply_of(None))) as server:
        named = few | {"url": server.url, "model": "gpt", "batch_size": 2, "out": tmp_path / "p.json"}
        refused("24 of 24 questions have no answer", **named)
        server.always = None
        answered = []

        def record(job, *answer):
            answered.append(answer)
            RECORD(job, *answer)
            if len(answered) >= 9:
                server.always = (400, {"error": {"message": "no such thing"}})

        with monkeypatch.context() as patch:
            patch.setattr(evaluation.Evaluation, "record", record)
            refused("no such thing", **named)
        assert not named["out"].exists() and len(answered) >= 9
        server.always = None
        before = len(server.requests)
        evaluate(**named)
    assert len(server.requests) - before == 24 - len(answered) + 1  # and one without its clip
    assert about(named["out"])["unanswered"] == {}


def test_the_answer_is_taken_from_the_form_that_the_prompt_asks_for(few, tmp_path):
    change(few, answer="a dog", choices=["a dog", "a cat"])
    reply = "<think>It is no cat.</think><answer>a dog</answer>"
    with serving(always=(200, reply_of(reply))) as server:
        said = evaluate(tmp_path / "p.json", **few, url=server.url, model="gpt", prompt="think")
    row = rows_in(tmp_path / "p.json")[0]
    assert row["model_output"] == row["model_prediction"] == "a dog"
    assert row["raw_output"] == reply and average(said) == 100.0
    assert "<think>" in server.requests[0][2]["messages"][0]["content"][-1]["text"]
