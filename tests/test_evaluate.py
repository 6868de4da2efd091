"""Laws of the evaluation: batched = single; killed, shared, repeated = once; nothing unfinished looks finished."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import evaluate as evaluation
from chat_server import ChatServer
from conftest import DATA
from data import clips_in, read_questions
from files import InputError, one_writer
from model import load_model
from predictions import bench_name, parts_of
from reward import string_match

ROOT = Path(__file__).resolve().parent.parent


def evaluate(*arguments, check=True) -> subprocess.CompletedProcess:
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
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def start(arguments, processes=1) -> subprocess.Popen:
    """evaluate.py as a user would start it, in a process group of its own."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*command, "evaluate.py", *map(str, arguments)], cwd=ROOT, start_new_session=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def options(world, out, **more) -> list:
    values = {"model": world / "model", "data": world / "mmau.json", "audio_dir": world / "audio", "out": out}
    values |= {"max_new_tokens": 8, **more}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def refused(*arguments, says: str) -> None:
    done = evaluate(*arguments, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and says in errors[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A tiny model's threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mmau(world, tmp_path_factory):
    """The first half of the tiny MMAU."""
    path = tmp_path_factory.mktemp("questions") / "mmau.json"
    path.write_text(json.dumps(json.loads((world / "mmau.json").read_text())[:150]))
    return path


@pytest.fixture(scope="module")
def whole(world, mmau, tmp_path_factory):
    """One uninterrupted evaluation of it."""
    out = tmp_path_factory.mktemp("eval") / "base.json"
    return out, evaluate(*options(world, out, data=mmau)).stdout


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


@contextlib.contextmanager
def served(**how) -> Iterator[ChatServer]:
    server = ChatServer(**how)
    server.ways.remove("hang")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def average(text: str) -> float:
    return float(re.search(r"average +(\S+)", text)[1])


# --------------------------------------------------------------------------------------------- what is answered


def test_the_file_is_the_benchmarks_own_rows_with_the_answers_taken_one_at_a_time(world, mmau, whole):
    rows, own = json.loads(whole[0].read_text()), json.loads(mmau.read_text())
    keys = ("model_output", "model_prediction")
    assert [{k: v for k, v in row.items() if k not in keys} for row in rows] == own
    lm = load_model(world / "model")
    for row, question in zip(rows, read_questions(mmau, world / "audio"), strict=True):
        alone = lm.decode(lm.generate([lm.encode(question)], 8)[0][0])
        assert row["model_prediction"] == row["model_output"] == alone
    right = [string_match(row["answer"], row["model_output"], row["choices"]) for row in rows]
    assert average(whole[1]) == pytest.approx(100 * np.mean(right), abs=0.05)


KILLED = """if True:
    import os, evaluate
    record = evaluate.Evaluation.record
    def until_20(job, rows, bar):
        record(job, rows, bar)
        if bar.n >= 20:
            os.kill(os.getpid(), 9)
    evaluate.Evaluation.record = until_20
    evaluate.main()
"""


def test_batch_size_processes_a_kill_and_ctrl_c_change_nothing(world, mmau, whole, tmp_path):
    out = tmp_path / "p.json"
    arguments = options(world, out, data=mmau, batch_size=4)

    def kept():
        return sum(len(part.read_text().splitlines()) for part in parts_of(out))

    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL and 20 <= kept() < 150
    with open(tmp_path / "p.json.part-0", "a") as file:
        file.write('[7, 0, "half a l')
    before = kept()

    record = evaluation.Evaluation.record

    def then_ctrl_c(*rows):
        record(*rows)
        signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "record", then_ctrl_c)
        stopped = evaluate(*arguments, check=False)
    assert stopped.returncode == 130 and kept() >= before + 4 and not out.exists()
    assert stopped.stderr.splitlines()[-1].startswith("interrupted: what was answered is kept")

    together = start(arguments, processes=2)
    said = together.communicate()[1]
    assert together.returncode == 0, said
    assert out.read_text() == whole[0].read_text() and not parts_of(out)
    refused(*options(world, out, data=mmau, batch_size=5), says="batch_size: 4 -> 5")


def test_audio_none_silence_and_swap_are_what_they_say(world, mmau, whole, tmp_path):
    found = {"real": average(whole[1])}
    for audio in ("none", "silence", "swap"):
        found[audio] = average(
            evaluate(*options(world, tmp_path / f"{audio}.json", data=mmau, audio=audio)).stdout
        )
    assert found["real"] > max(found["none"], found["silence"], found["swap"]) + 10
    lm, (first, *_) = load_model(world / "model"), read_questions(mmau, world / "audio")
    silent = lm.encode(first, waveform=np.zeros(16_000, "float32"))
    said = lm.decode(lm.generate([silent], 8)[0][0])
    assert said == json.loads((tmp_path / "silence.json").read_text())[0]["model_output"]
    compared = evaluate("--compare", tmp_path / "none.json", whole[0]).stdout
    assert f"{found['none']} -> {found['real']}" in compared and "McNemar p" in compared


def test_mmar_lines_come_back_as_the_list_that_its_script_reads_with_every_order(world, tmp_path):
    rows = [json.loads(line) for line in (world / "mmar.jsonl").read_text().splitlines()][:16]
    rows[3]["url"] = "half a pair: \ud800"  # this row cannot be asked, and must not cost the others
    (tmp_path / "mmar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run[1].json"
    done = evaluate(*options(world, out, data=tmp_path / "mmar.jsonl", orders=3))
    answered = json.loads(out.read_text())
    assert [row["id"] for row in answered] == [row["id"] for row in rows]
    assert [len(row.get("order_predictions", [])) for row in answered] == [
        0 if i == 3 else 3 for i in range(16)
    ]
    assert all(
        row["answer_prediction"] == row["order_predictions"][0] for row in answered if row is not answered[3]
    )
    assert "same way in all orders" in done.stdout and "n = 15" in done.stdout
    assert json.loads((tmp_path / "run[1].meta").read_text())["bench"] == "mmar" and not parts_of(out)


def test_several_evaluations_in_one_command_are_those_of_one_each(world, whole, few, tmp_path):
    outs = [tmp_path / "a.json", tmp_path / "a.txt"]  # of one stem, and yet apart
    more = ["--out", *outs, "--audio", "real", "none"]
    done = evaluate(*options(world, outs[0], **few, dtype="bfloat16"), *more)
    assert done.stdout.count("saved") == 2
    for out, meta, audio in zip(outs, ("a.meta", "a.txt.meta"), ("real", "none"), strict=True):
        about = json.loads((tmp_path / meta).read_text())
        assert about["audio"] == audio and about["dtype"] == "bfloat16" and about["unanswered"] == {}
        assert all("model_output" in row for row in json.loads(out.read_text()))


def test_hidden_answers_are_written_for_the_server_and_not_scored(world, few, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in json.loads(few["data"].read_text())]
    few["data"].write_text(json.dumps(rows))
    done = evaluate(*options(world, tmp_path / "p.json", **few))
    assert "hidden" in done.stdout and json.loads((tmp_path / "p.meta").read_text())["bench"] == "mmau-full"
    assert all("model_output" in row for row in json.loads((tmp_path / "p.json").read_text()))
    refused("--score", tmp_path / "p.json", says="no right answers")


# ------------------------------------------------------------------------------------- what looks finished is


def test_missing_clips_stop_it_or_are_asked_again_once_they_are_there(world, few, whole, tmp_path):
    refused(
        *options(world, tmp_path / "p.json", **few | {"audio_dir": tmp_path / "none"}),
        says="24 of 24 questions",
    )
    assert not (tmp_path / "p.json").exists() and not parts_of(tmp_path / "p.json")
    clip = sorted((few["audio_dir"]).iterdir())[5]
    clip.rename(tmp_path / "away.wav")
    done = evaluate(*options(world, tmp_path / "p.json", **few))
    assert "1 of 24 answers are empty" in done.stdout and "no such file" in done.stderr
    assert list(json.loads((tmp_path / "p.meta").read_text())["unanswered"]) == [clip.stem]
    with pytest.MonkeyPatch.context() as patch:  # nothing new to ask: no model is loaded
        patch.setattr(evaluation, "load_model", None)
        evaluate(*options(world, tmp_path / "p.json", **few))
    samples, rate = soundfile.read(tmp_path / "away.wav", dtype="int16")
    soundfile.write(clip.with_suffix(".flac"), samples, rate)  # converted, as the program advises
    clips_in.cache_clear()
    evaluate(*options(world, tmp_path / "p.json", **few))
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads(whole[0].read_text())[:24]
    assert json.loads((tmp_path / "p.meta").read_text())["unanswered"] == {} and not parts_of(
        tmp_path / "p.json"
    )


def test_answers_are_those_of_one_model_to_one_set_of_questions(world, few, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    again = options(world, tmp_path / "p.json", **few, model=model)
    evaluate(*again)
    weights = load_file(model / "model.safetensors")
    for weight in weights.values():
        weight.view(-1)[::1000] += 1e-3  # as little as training with bfloat16 changes
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(*again, says="fingerprint: ")
    shutil.copy(world / "model" / "model.safetensors", model)
    rows = json.loads(few["data"].read_text())
    rows[0]["question"] += "?"
    few["data"].write_text(json.dumps(rows))
    refused(*again, says="fingerprint: ")
    (tmp_path / "p.meta").unlink()
    refused(*again, says="no p.meta says")
    (tmp_path / "p.json").unlink()
    (tmp_path / "p.json.part-1").write_text('{"asked": "of another model"}\n[0, 0, "dog", null]\n')
    refused(*again, says="answers to something else")
    (tmp_path / "p.json.part-1").write_bytes(b"\xff\x00\n\n")
    refused(*again, says="damaged")
    (tmp_path / "p.json.part-1").unlink()
    (tmp_path / "p.meta").write_text("[1, 2")
    refused(*again, says="damaged")


def test_one_writer(world, few, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "one_writer", lambda path: one_writer(path, patience=0.1))
    held = one_writer(tmp_path / ".p.json.lock")
    refused(*options(world, tmp_path / "p.json", **few), says=f"held by process {os.getpid()}")
    held.close()
    assert not (tmp_path / "p.meta").exists()


def test_predictions_that_another_has_changed_are_not_ours(world, few, tmp_path):
    again = options(world, tmp_path / "p.json", **few)
    evaluate(*again)
    text = (tmp_path / "p.json").read_text()
    (tmp_path / "p.json").write_text(text.replace("model_output", "answer"))
    refused(*again, says="not what was written here")
    (tmp_path / "p.json").write_text(text)
    evaluate(*again)


def test_a_model_of_nan_and_a_dead_loader_end_in_one_line(world, few, tmp_path, monkeypatch):
    shutil.copytree(world / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name].fill_(float("nan"))
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(*options(world, tmp_path / "nan.json", **few, model=tmp_path / "model"), says="not finite")
    monkeypatch.setattr(evaluation.Batches, "encode", lambda self, asked: os._exit(9))
    refused(*options(world, tmp_path / "p.json", **few), says="DataLoader worker")
    assert not (tmp_path / "p.json").exists() and not (tmp_path / "nan.json").exists()


REFUSED = {  # what is wrong -> what is said, and the arguments
    "of another benchmark": ("not of the same questions", "--compare", "{whole}", "{mmar}"),
    "without predictions": ("without predictions", "--score", "{mmau}"),
    "missing": ("nothing.json", "--score", "nothing.json"),
    "no model": ("no/such", "--model", "no/such", "--data", "{mmau}", "--out", "{out}"),
    "no out": ("--out is needed", "--model", "m", "--data", "{mmau}"),
    "nothing to report": ("no predictions", "--report", "{empty}"),
    "a file of another's": ("exists", "{run}", "--out", "{other}"),
    "its own questions": ("exists", "{run}", "--out", "{mmau}"),
    "twice the same": ("twice", "{run}", "--out", "{out}", "{out}"),
    "one for two": ("2 for 1", "{run}", "--audio", "real", "none"),
    "no batch": ("--batch_size 0", "{run}", "--batch_size", "0"),
    "no such seed": ("--seed -1", "{run}", "--seed", "-1"),
    "no share": ("--max_bad nan", "{run}", "--max_bad", "nan"),
    "no adapter": ("nowhere", "{run}", "--adapter", "nowhere"),
    "adapter of a server": ("--adapter", "{run}", "--url", "http://127.0.0.1:1/v1", "--adapter", "{empty}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(world, whole, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("[]")
    rows = [json.loads(line) for line in (world / "mmar.jsonl").read_text().splitlines()]
    (tmp_path / "mmar.json").write_text(json.dumps([row | {"answer_prediction": "dog"} for row in rows]))
    paths = {"whole": whole[0], "mmar": tmp_path / "mmar.json", "mmau": world / "mmau.json", "run": "--model",
             "out": tmp_path / "o.json", "empty": tmp_path / "empty", "other": tmp_path / "other.json"}  # fmt: skip
    says, *parts = REFUSED[name]
    arguments = [part.format(**paths) for part in parts]
    if parts[0] == "{run}":
        arguments = [*options(world, tmp_path / "o.json"), *arguments[1:]]
    before = (world / "mmau.json").read_bytes()
    refused(*arguments, says=says)
    assert (world / "mmau.json").read_bytes() == before and (tmp_path / "other.json").read_text() == "[]"
    assert not (tmp_path / "o.json").exists()


def test_mmaus_version_is_told_by_its_questions():
    files = [DATA / f"mmau-test-mini-{version}.json" for version in ("original", "v05.15.25")]
    if not files[0].exists():
        pytest.skip(f"the published questions are not in {DATA}")
    names = ["mmau-mini", "mmau-mini-v2"]
    original, revised = map(read_questions, files)
    for questions, name, other in zip((original, revised), names, names[::-1], strict=True):
        assert (
            bench_name(questions, None)
            == bench_name(questions[:200], None)
            == bench_name(questions, name)
            == name
        )
        assert bench_name(questions, "mine") == "mine"
        with pytest.raises(InputError, match=f"--bench {other}: by their text these questions are {name}"):
            bench_name(questions, other)
    with pytest.raises(InputError, match="neither"):
        bench_name(original[:500] + revised[500:], None)
    with pytest.raises(InputError, match="give --bench mmau-mini or"):
        bench_name(revised[100:300], None)


# ------------------------------------------------------------------------------------------- behind an endpoint


@pytest.mark.parametrize("fail", [0.0, 0.3])
def test_a_model_behind_a_chat_endpoint_fills_its_rows(world, few, tmp_path, monkeypatch, fail):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-secret-secret")
    with served(fail=fail) as server:
        done = evaluate(*options(world, tmp_path / "p.json", **few, url=server.url, model="gpt"))
    rows = json.loads((tmp_path / "p.json").read_text())
    assert all(row["model_prediction"] in row["choices"] for row in rows) and "average" in done.stdout
    audio = server.requests[0][2]["messages"][0]["content"][0]["input_audio"]
    assert audio["format"] == "wav" and len(audio["data"]) > 10_000
    written = [path.read_text() for path in tmp_path.glob("*.*") if path.is_file()]
    assert "sk-secret" not in done.stdout + done.stderr + "".join(written)
    assert "does it hear" not in done.stderr


def test_a_server_that_does_not_hear_is_named(world, few, tmp_path):
    with served(hears=False) as server:
        done = evaluate(*options(world, tmp_path / "p.json", **few, url=server.url, model="gpt"))
    assert "does it hear?" in done.stderr


def test_empty_answers_are_none(world, few, tmp_path):
    with served() as server:
        server.always = (200, {"choices": [{"message": {"content": None}}], "usage": {}}, {})
        again = options(world, tmp_path / "p.json", **few, url=server.url, model="gpt")
        refused(*again, says="24 of 24 questions have no answer")
        server.always = None
        evaluate(*again)
    assert json.loads((tmp_path / "p.meta").read_text())["unanswered"] == {}


def test_a_server_that_refuses_gives_no_result_and_costs_no_answer_twice(world, few, tmp_path):
    with served() as server:
        again = options(world, tmp_path / "p.json", **few, url=server.url, model="gpt", batch_size=2)
        asked = []
        record = evaluation.Evaluation.record

        def counted(job, rows, bar):
            asked.extend(row for row in rows if not row[2])
            record(job, rows, bar)
            if len(asked) >= 9:
                server.always = (400, {"error": {"message": "no such thing"}}, {})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation.Evaluation, "record", counted)
            refused(*again, says="in a row")
        assert not (tmp_path / "p.json").exists()
        server.always = None
        before = len(server.requests)
        evaluate(*again)
        assert (
            len(server.requests) - before == 24 - len(asked) + 1 and len(asked) >= 9
        )  # and one without its clip


def test_the_answer_is_taken_from_the_form_that_the_prompt_asks_for(world, few, tmp_path):
    def think(text):
        return f"<think>It is no {text['wrong']}.</think><answer>{text['right']}</answer>"

    rows = json.loads(few["data"].read_text())
    rows = [row for row in rows if row["choices"] == rows[0]["choices"]][:1] or rows[:1]
    few["data"].write_text(json.dumps(rows))
    right = rows[0]["answer"]
    wrong = next(choice for choice in rows[0]["choices"] if choice != right)
    said = think({"right": right, "wrong": wrong})
    with served() as server:
        server.always = (200, server_reply(said), {})
        done = evaluate(
            *options(world, tmp_path / "p.json", **few, url=server.url, model="gpt", prompt="think")
        )
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert row["model_output"] == row["model_prediction"] == right and row["raw_output"] == said
    assert (
        average(done.stdout) == 100.0 and json.loads((tmp_path / "p.meta").read_text())["prompt"] == "think"
    )
    assert "<think>" in server.requests[0][2]["messages"][0]["content"][-1]["text"]


def server_reply(text):
    usage = {"prompt_tokens": 9, "completion_tokens": 9}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}
