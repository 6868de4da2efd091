"""Laws of the evaluation: batched = single; killed, shared, repeated = once; nothing unfinished looks finished."""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate as evaluation
from chat_server import serving
from conftest import DATA, free_port
from data import read_questions
from files import InputError, one_writer
from model import load_model
from reward import string_match

ROOT = Path(__file__).resolve().parent.parent


def evaluate(*arguments, check=True):
    """evaluate.py's main in this process, to save its start."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    logging.getLogger().handlers.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                evaluation.main()
            except SystemExit as end:
                code = end.code
    torch.use_deterministic_algorithms(False)
    assert not check or code == 0, err.getvalue()
    return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def options(world, out, **more):
    values = {"model": world / "model", "data": world / "mmau.json", "audio_dir": world / "audio", "out": out}
    values |= {"max_new_tokens": 8, **more}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def refused(*arguments, says):
    done = evaluate(*arguments, check=False)
    errors = [line for line in done.err.splitlines() if "error:" in line]
    assert done.code == 2 and len(errors) == 1 and says in errors[0], done.err


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A tiny model's threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """One uninterrupted evaluation of the tiny MMAU."""
    out = tmp_path_factory.mktemp("eval") / "base.json"
    return out, evaluate(*options(world, out)).out


@pytest.fixture
def few(world, tmp_path):
    """A file of 24 questions, and a folder with links to their clips."""
    rows = json.loads((world / "mmau.json").read_text())[:24]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    (tmp_path / "clips").mkdir()
    for row in rows:
        name = Path(row["audio_id"]).name
        (tmp_path / "clips" / name).symlink_to(world / "audio" / name)
    return {"data": tmp_path / "few.json", "audio_dir": tmp_path / "clips"}


def average(text):
    return float(re.search(r"average +(\S+)", text)[1])


def rows_in(out):
    return json.loads(Path(out).read_text())


def about(out):
    return json.loads(Path(out).with_suffix(".meta").read_text())


# --------------------------------------------------------------------------------------------- what is answered


def test_the_file_is_the_benchmarks_own_rows_with_the_answers_taken_one_at_a_time(world, whole):
    rows = rows_in(whole[0])
    keys = ("model_output", "model_prediction")
    own = [{k: v for k, v in row.items() if k not in keys} for row in rows]
    assert own == rows_in(world / "mmau.json")
    lm = load_model(world / "model")
    for row, question in zip(rows, read_questions(world / "mmau.json", world / "audio"), strict=True):
        alone = lm.decode(lm.generate([lm.encode(question)], 8)[0][0])
        assert row["model_prediction"] == row["model_output"] == alone
    right = [string_match(row["answer"], row["model_output"], row["choices"]) for row in rows]
    assert average(whole[1]) == pytest.approx(100 * np.mean(right), abs=0.05)


def then(number):
    """What sends this process a signal once it has written four answers down."""
    record = evaluation.Evaluation.record
    left = [None] * 4

    def counted(job, *answer):
        record(job, *answer)
        left.pop()
        if not left:
            os.kill(os.getpid(), number)

    return counted


def forked(arguments, record, **environment):
    """evaluate.py's main in a process that need not import anything: its id."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.environ.update(environment)
            evaluation.Evaluation.record = record
            os._exit(evaluate(*arguments, check=False).code)
        os._exit(99)
    return child


def test_batch_size_processes_a_kill_and_ctrl_c_change_nothing(world, few, whole, tmp_path, monkeypatch):
    out = tmp_path / "p.json"
    arguments = options(world, out, **few, batch_size=3)
    record = evaluation.Evaluation.record
    assert os.waitpid(forked(arguments, then(signal.SIGKILL)), 0)[1] == signal.SIGKILL and not out.exists()
    (part,) = tmp_path.glob("p.json.part-*-0")
    part.with_name("p.json.part-else-0").write_text('{"id": "mmau-0", "text": "forged"}')
    before = part.read_text() + '{"id": "half a l'
    part.write_text(before)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "record", then(signal.SIGINT))
        stopped = evaluate(*arguments, check=False)
    assert stopped.code == 2 and stopped.err.splitlines()[-1].startswith("interrupted: what was answered")
    assert part.read_text().startswith(before) and part.read_text().count('"text"') == 8

    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pair = [forked(arguments, record, RANK=str(rank), **shared) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in pair] == [0, 0]
    assert rows_in(out) == rows_in(whole[0])[:24] and not list(tmp_path.glob(f"{part.name[:-1]}*"))
    refused(*options(world, out, **few, batch_size=5), says="batch_size: 3 -> 5")


def test_nothing_is_forked_and_nothing_goes_through_shared_memory(world, whole, few, tmp_path, monkeypatch):
    def fail(*arguments, **more):
        raise AssertionError("a process, or shared memory")

    monkeypatch.setattr(os, "fork", fail)
    monkeypatch.setattr(multiprocessing.Process, "start", fail)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", fail)
    monkeypatch.setattr(torch.UntypedStorage, "share_memory_", fail)
    evaluate(*options(world, tmp_path / "p.json", **few))
    assert rows_in(tmp_path / "p.json") == rows_in(whole[0])[:24]


def test_audio_none_silence_and_swap_are_what_they_say(world, few, whole, tmp_path):
    outs = {audio: tmp_path / f"{audio}.json" for audio in ("none", "silence", "swap")}
    several = options(world, tmp_path / "real.json", **few)
    for audio, out in outs.items():
        several += ["--and", "--audio", audio, "--out", out]
    loaded = []
    load = evaluation.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_model", lambda *a, **b: loaded.append(a) or load(*a, **b))
        evaluate(*several)
    assert len(loaded) == 1 and rows_in(tmp_path / "real.json") == rows_in(whole[0])[:24]
    for out in outs.values():
        right = [string_match(row["answer"], row["model_output"], row["choices"]) for row in rows_in(out)]
        assert 100 * np.mean(right) + 10 < average(whole[1])
        assert about(out)["audio"] == out.stem and about(out)["unanswered"] == {}
    lm, questions = load_model(world / "model"), read_questions(few["data"], few["audio_dir"])
    heard = {
        "none": lm.encode(questions[0], use_audio=False),
        "silence": lm.encode(questions[0], waveform=np.zeros(16_000, "float32")),
    }
    for audio, prompt in heard.items():
        assert rows_in(outs[audio])[0]["model_output"] == lm.decode(lm.generate([prompt], 8)[0][0])
    args = types.SimpleNamespace(audio="swap", seed=0, orders=1)
    for question, (asked,) in zip(questions, evaluation.ask_everything(questions, args), strict=True):
        assert asked.audio not in (None, question.audio)


def test_mmar_lines_come_back_as_the_list_that_its_script_reads_with_every_order(world, tmp_path):
    rows = [json.loads(line) for line in (world / "mmar.jsonl").read_text().splitlines()][:16]
    rows[3]["url"] = "half a pair: \ud800"  # which no UTF-8 file can hold as it is
    (tmp_path / "mmar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run[1].json"
    done = evaluate(*options(world, out, data=tmp_path / "mmar.jsonl", orders=3))
    answered = rows_in(out)
    assert [row["id"] for row in answered] == [row["id"] for row in rows]
    for row in answered:
        assert len(row["order_predictions"]) == 3 and row["answer_prediction"] == row["order_predictions"][0]
    assert "n = 16" in done.out and about(out)["bench"] == "mmar"


def test_only_what_the_model_answered_is_scored_whatever_the_rows_hold(world, few, whole, tmp_path):
    rows = rows_in(few["data"])
    for row in rows:
        row |= dict.fromkeys(evaluation.OURS, row["answer"]) | {"order_predictions": [row["answer"]] * 2}
    few["data"].write_text(json.dumps(rows))
    done = evaluate(*options(world, tmp_path / "p.json", **few))
    assert rows_in(tmp_path / "p.json") == rows_in(whole[0])[:24] and average(done.out) < 100


def test_hidden_answers_are_written_for_the_server_and_a_runs_own_model_has_its_own_place(
    world, few, tmp_path
):
    rows = rows_in(few["data"])
    for row in rows:
        del row["answer"]
    few["data"].write_text(json.dumps(rows))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model").symlink_to(world / "model")
    arguments = options(world, "", **few, model=tmp_path / "mine" / "model")
    done = evaluate(*[word for word in arguments if word not in ("--out", "")])
    out = tmp_path / "mine" / "eval" / "mmau-mini.real.json"
    assert "hidden" in done.out and about(out)["bench"] == "mmau-mini"
    assert all("model_output" in row for row in rows_in(out))


# ------------------------------------------------------------------------------------- what looks finished is


def test_missing_clips_stop_it_or_are_asked_again_once_they_are_there(world, few, whole, tmp_path):
    out = tmp_path / "p.json"
    refused(*options(world, out, **few | {"audio_dir": tmp_path / "none"}), says="24 of 24 questions")
    assert not list(tmp_path.glob("p.json*"))
    clip = sorted(few["audio_dir"].iterdir())[5]
    clip.rename(tmp_path / "away.wav")
    done = evaluate(*options(world, out, **few))
    assert "1 of 24 answers are empty" in done.out and list(about(out)["unanswered"]) == [clip.stem]
    with pytest.MonkeyPatch.context() as patch:  # nothing new to ask: no model is loaded
        patch.setattr(evaluation, "load_model", None)
        evaluate(*options(world, out, **few))
    (tmp_path / "away.wav").rename(clip)
    sys.modules["data"].clips_in.cache_clear()
    evaluate(*options(world, out, **few))
    assert rows_in(out) == rows_in(whole[0])[:24] and about(out)["unanswered"] == {}
    assert not list(tmp_path.glob("*.part-*"))


def test_answers_are_those_of_one_model_to_one_set_of_questions(world, few, tmp_path):
    model = tmp_path / "other"
    shutil.copytree(world / "model", model)
    again = options(world, tmp_path / "p.json", **few, model=model)
    evaluate(*again)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        weight.view(-1)[::1000] += 1e-3  # as little as training with bfloat16 changes
        if name.endswith("norm.weight"):
            weight.fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(*again, says="weights: ")
    refused(*options(world, tmp_path / "nan.json", **few, model=model), says="not finite")
    shutil.copy(world / "model" / "model.safetensors", model)
    rows = rows_in(few["data"])
    rows[0]["question"] += "?"
    few["data"].write_text(json.dumps(rows))
    refused(*again, says="questions: ")
    (tmp_path / "p.meta").write_text("[1, 2")
    refused(*again, says="other arguments (model: None")


def test_one_writer(world, few, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "one_writer", lambda path: one_writer(path, patience=0.1))
    held = one_writer(tmp_path / ".p.meta.lock")
    refused(*options(world, tmp_path / "p.json", **few), says=f"held by process {os.getpid()}")
    held.close()


def test_bad_input_is_one_line_and_exit_code_2(world, tmp_path):
    (tmp_path / "other.json").write_text("[]")
    run = options(world, tmp_path / "o.json")
    for says, more in {
        "no/such": ["--model", "no/such"],
        "other arguments": ["--out", tmp_path / "other.json"],
        "mmau.json is of other": ["--out", world / "mmau.json"],
        "--batch_size": ["--batch_size", "0"],
        "--seed": ["--seed", "-1"],
        "nowhere": ["--adapter", "nowhere"],
        "not allowed with": ["--url", "http://127.0.0.1:1/v1", "--adapter", tmp_path],
        "--out is needed": ["--out", ""],
    }.items():
        refused(*run, *more, says=says)
    assert not (tmp_path / "o.json").exists() and (tmp_path / "other.json").read_text() == "[]"


def test_mmaus_version_is_told_by_its_questions():
    files = [DATA / f"mmau-test-mini-{version}.json" for version in ("original", "v05.15.25")]
    if not files[0].exists():
        pytest.skip(f"the published questions are not in {DATA}")
    names = ["mmau-mini", "mmau-mini-v2"]
    original, revised = map(read_questions, files)
    for questions, name, other in zip((original, revised), names, names[::-1], strict=True):
        for part in (questions, questions[:200], questions[700:]):
            assert evaluation.bench_name(part, None) == evaluation.bench_name(part, name) == name
        assert evaluation.bench_name(questions, "mine") == "mine"
        with pytest.raises(InputError, match="mmau-mini and mmau-mini-v2"):
            evaluation.bench_name(questions, other)
    with pytest.raises(InputError, match="mmau-mini and mmau-mini-v2"):
        evaluation.bench_name(original[:500] + revised[500:], None)
    with pytest.raises(InputError, match="give --bench mmau-mini or"):
        evaluation.bench_name(revised[100:300], None)


# ------------------------------------------------------------------------------------------- behind an endpoint


def test_a_model_behind_an_endpoint_fills_its_rows_and_no_secret_is_written(
    world, few, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-secret-secret")
    with serving(fail=0.3, hears=False) as server:
        server.ways.remove("hang")
        url = f"{server.url}?key=sk-secret-in-the-url"
        again = options(world, tmp_path / "p.json", **few, url=url, model="gpt")
        done = evaluate(*again)
        assert about(tmp_path / "p.json")["url"] == server.url and "does it hear?" in done.err
        moved = evaluate(*again, "--seed", "1", check=False)
    assert all(row["model_prediction"] in row["choices"] for row in rows_in(tmp_path / "p.json"))
    audio = server.requests[0][2]["messages"][0]["content"][0]["input_audio"]
    assert audio["format"] == "wav" and len(audio["data"]) > 10_000
    said = [done.out, done.err, moved.err, *(p.read_text() for p in tmp_path.glob("**/*.[jm]*[!g]"))]
    assert moved.code == 2 and len(said) >= 5 and "sk-secret" not in "".join(said)


def test_a_server_that_refuses_gives_no_result_and_costs_no_answer_twice(world, few, tmp_path, monkeypatch):
    with serving() as server:
        empty = {"choices": [{"message": {"content": None}}], "usage": {}}
        server.always = (200, empty, {})
        again = options(world, tmp_path / "p.json", **few, url=server.url, model="gpt", batch_size=2)
        refused(*again, says="24 of 24 questions have no answer")
        server.always = None
        answered = []
        record = evaluation.Evaluation.record

        def counted(job, *answer):
            answered.append(answer)
            record(job, *answer)
            if len(answered) >= 9:
                server.always = (400, {"error": {"message": "no such thing"}}, {})

        with monkeypatch.context() as patch:
            patch.setattr(evaluation.Evaluation, "record", counted)
            refused(*again, says="questions have no answer")
        assert not (tmp_path / "p.json").exists() and len(answered) >= 9
        server.always = None
        before = len(server.requests)
        evaluate(*again)
    assert len(server.requests) - before == 24 - len(answered) + 1  # and one without its clip
    assert about(tmp_path / "p.json")["unanswered"] == {}


def test_the_answer_is_taken_from_the_form_that_the_prompt_asks_for(world, few, tmp_path):
    row = rows_in(few["data"])[0]
    few["data"].write_text(json.dumps([row]))
    wrong = next(choice for choice in row["choices"] if choice != row["answer"])
    said = f"<think>It is no {wrong}.</think><answer>{row['answer']}</answer>"
    with serving(always=(200, {"choices": [{"message": {"content": said}}]}, {})) as server:
        arguments = options(world, tmp_path / "p.json", **few, url=server.url, model="gpt", prompt="think")
        done = evaluate(*arguments)
    (answered,) = rows_in(tmp_path / "p.json")
    assert answered["model_output"] == answered["model_prediction"] == row["answer"]
    assert answered["raw_output"] == said and average(done.out) == 100.0
    assert "<think>" in server.requests[0][2]["messages"][0]["content"][-1]["text"]
