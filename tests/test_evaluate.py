"""Laws of the evaluation: batched = single, killed = whole, our score = the official rule, intervals cover."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from chat_server import ChatServer
from conftest import DATA
from data import read_questions
from evaluate import main
from model import load_model
from report import COLUMNS, PAPER, bootstrap, mcnemar, paper_rows, score, wilson

ROOT = Path(__file__).resolve().parent.parent


def evaluate(*arguments, processes=1, check=True):
    """Run evaluate.py as a user would (in this process, to save its start, where one is enough)."""
    if processes > 1:
        python = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*python, "evaluate.py", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)
    else:
        out, err, code = io.StringIO(), io.StringIO(), 0
        logging.getLogger().handlers.clear()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
            try:
                main()
            except SystemExit as end:
                code = end.code
        done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    assert not check or done.returncode == 0, done.stderr
    return done


def arguments(world, out, data="mmau.json", **more):
    options = {
        "model": world / "model",
        "data": world / data,
        "audio_dir": world / "audio",
        "out": out,
        "max_new_tokens": 8,
    }
    return [x for name, value in (options | more).items() for x in (f"--{name}", value)]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """One uninterrupted evaluation of the tiny MMAU."""
    out = tmp_path_factory.mktemp("eval") / "base.json"
    return out, evaluate(*arguments(world, out)).stdout


def test_the_file_is_the_benchmarks_own_rows_with_the_answers_taken_one_at_a_time(world, whole):
    rows, own = json.loads(whole[0].read_text()), json.loads((world / "mmau.json").read_text())
    keys = ("model_output", "model_prediction")
    assert [{k: v for k, v in row.items() if k not in keys} for row in rows] == own
    lm = load_model(world / "model")
    for row, question in zip(rows, read_questions(world / "mmau.json", world / "audio"), strict=True):
        alone = lm.decode(lm.generate([lm.encode(question)], 8)[0][0])
        assert row["model_prediction"] == row["model_output"] == alone


def test_batch_size_processes_and_a_kill_change_nothing(world, whole, tmp_path):
    job = subprocess.Popen(
        [sys.executable, "evaluate.py", *map(str, arguments(world, tmp_path / "p.json", batch_size=4))],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    part, deadline = tmp_path / "p.json.part-0", time.time() + 60
    while time.time() < deadline and not (part.exists() and part.stat().st_size > 1000):
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert part.exists() and not (tmp_path / "p.json").exists()
    with open(part, "a") as file:
        file.write('[7, 0, "half a l')
    evaluate(*arguments(world, tmp_path / "p.json", batch_size=4), processes=2)
    assert (tmp_path / "p.json").read_text() == whole[0].read_text()
    assert not list(tmp_path.glob("*.part-*"))
    refused = evaluate(*arguments(world, tmp_path / "p.json", batch_size=5), check=False)
    assert refused.returncode == 2 and "batch_size: 4 -> 5" in refused.stderr


def test_audio_none_silence_and_swap_are_what_they_say(world, whole, tmp_path):
    average = {"real": float(re.search(r"average +(\S+)", whole[1])[1])}
    for audio in ("none", "silence", "swap"):
        said = evaluate(*arguments(world, tmp_path / f"{audio}.json", audio=audio)).stdout
        average[audio] = float(re.search(r"average +(\S+)", said)[1])
    assert average["real"] > max(average["none"], average["silence"], average["swap"]) + 10
    lm, (first, *_) = load_model(world / "model"), read_questions(world / "mmau.json", world / "audio")
    silent = lm.encode(first, waveform=np.zeros(16_000, "float32"))
    assert (
        lm.decode(lm.generate([silent], 8)[0][0])
        == json.loads((tmp_path / "silence.json").read_text())[0]["model_output"]
    )
    compared = evaluate("--compare", tmp_path / "none.json", whole[0]).stdout
    assert f"{average['none']} -> {average['real']}" in compared and "McNemar p" in compared


def test_mmar_comes_back_as_lines_with_every_order_and_a_missing_clip_is_named(world, tmp_path):
    folder = tmp_path / "audio"
    folder.mkdir()
    rows = [json.loads(line) for line in (world / "mmar.jsonl").read_text().splitlines()][:24]
    for row in rows[1:]:
        name = Path(row["audio_path"]).name
        (folder / name).write_bytes((world / "audio" / name).read_bytes())
    (tmp_path / "mmar.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = arguments(world, tmp_path / "p.json", data=tmp_path / "mmar.jsonl") + [
        "--audio_dir",
        folder,
        "--orders",
        3,
    ]
    done = evaluate(*options)
    assert f"unanswered: {rows[0]['id']}" in done.stderr and "no such file" in done.stderr
    answered = [json.loads(line) for line in (tmp_path / "p.json").read_text().splitlines()]
    assert [row["id"] for row in answered] == [row["id"] for row in rows] and answered[0][
        "answer_prediction"
    ] == ""
    assert all(len(row["order_predictions"]) == 3 for row in answered)
    assert "1 of 24 answers are empty" in done.stdout and "same way in all orders" in done.stdout
    assert "n = 24" in done.stdout


def test_hidden_answers_are_written_for_the_server_and_not_scored(world, tmp_path):
    rows = [
        {k: v for k, v in row.items() if k != "answer"}
        for row in json.loads((world / "mmau.json").read_text())[:8]
    ]
    (tmp_path / "full.json").write_text(json.dumps(rows))
    done = evaluate(*arguments(world, tmp_path / "p.json", data=tmp_path / "full.json"))
    assert "hidden" in done.stdout and all(
        "model_output" in row for row in json.loads((tmp_path / "p.json").read_text())
    )
    refused = evaluate("--score", tmp_path / "p.json", check=False)
    assert refused.returncode == 2 and "no right answers" in refused.stderr


BAD = {
    "of another benchmark": ("--compare", "{mmau}", "{mmar}"),
    "without predictions": ("--score", "{questions}"),
    "cut off": ("--score", "{cut}"),
    "missing": ("--score", "nothing.json"),
    "no model": ("--model", "no/such", "--data", "{questions}", "--out", "{out}"),
    "no out": ("--model", "m", "--data", "{questions}"),
    "nothing to report": ("--report", "{empty}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(world, whole, tmp_path, name):
    (tmp_path / "cut.json").write_text(whole[0].read_text()[:5000])
    rows = [
        json.loads(line) | {"answer_prediction": "dog"}
        for line in (world / "mmar.jsonl").read_text().splitlines()
    ]
    (tmp_path / "mmar.json").write_text(json.dumps(rows))
    (tmp_path / "empty").mkdir()
    paths = {"mmau": whole[0], "mmar": tmp_path / "mmar.json", "questions": world / "mmau.json", "cut": tmp_path / "cut.json",
             "out": tmp_path / "o.json", "empty": tmp_path / "empty"}  # fmt: skip
    done = evaluate(*[part.format(**paths) for part in BAD[name]], check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1


@pytest.mark.parametrize("fail", [0.0, 0.3])
def test_a_model_behind_a_chat_endpoint_fills_its_rows(world, tmp_path, monkeypatch, fail):
    server = ChatServer(fail=fail)
    server.ways.remove("hang")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "q.json").write_text(json.dumps(json.loads((world / "mmau.json").read_text())[:40]))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    done = evaluate(
        *arguments(world, tmp_path / "p.json", data=tmp_path / "q.json", url=server.url, model="gpt")
    )
    server.shutdown()
    rows = json.loads((tmp_path / "p.json").read_text())
    assert all(row["model_prediction"] in row["choices"] for row in rows) and "average" in done.stdout
    audio = server.requests[0][2]["messages"][0]["content"][0]["input_audio"]
    assert audio["format"] == "wav" and len(audio["data"]) > 10_000
    assert "sk-secret" not in done.stdout + done.stderr + "".join(f.read_text() for f in tmp_path.iterdir())


def test_the_papers_numbers_are_the_papers():
    paper = DATA.parent / "paper.txt"
    if not paper.exists():
        pytest.skip(f"the paper is not at {paper}")
    text = re.sub(r"</?[a-z]+>|\*\*", "", paper.read_text())
    for table in PAPER:
        body = text[text.index(f"\nTABLE {table}\n") :]
        lines = [re.split(r"\t", line) for line in body.split("\n\n")[1].splitlines() if "\t" in line]
        published = [
            [None if x == "-" else float(x) for x in cells if re.fullmatch(r"-|\d+\.\d", x)]
            for cells in lines
        ]
        published = [numbers for numbers in published if any(numbers)]
        width = len(COLUMNS[table][1])
        assert [numbers[-width:] for numbers in published] == [row[3] for row in paper_rows(table)]


def test_the_report_has_our_numbers_beside_the_papers_and_a_page_that_stands_alone(world, whole, tmp_path):
    for run, audio in (("base-omni", "real"), ("omni-avqa", "real"), ("omni-avqa", "none"), ("mine", "real")):
        folder = tmp_path / run / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        rows = json.loads(whole[0].read_text())
        if run == "omni-avqa":
            rows = [row | {"model_prediction": row["answer"]} for row in rows]
        rows[0]["question"] = "What </script><img src=x onerror=alert(1)> is it?"
        (folder / f"mmau-mini.{audio}.json").write_text(json.dumps(rows))
        about = {"bench": "mmau-mini", "audio": audio, "audio_dir": str(world / "audio")}
        (folder / f"mmau-mini.{audio}.meta").write_text(json.dumps(about))
    steps = [{"step": i, "reward": i / 9, "kl": 0.1} for i in range(1, 10)]
    (tmp_path / "omni-avqa" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    markdown = evaluate("--report", tmp_path).stdout
    low, high = (100 * x for x in wilson(300, 300))
    assert (
        f"**100.0 [{low:.1f}, {high:.1f}]** (68.6)" in markdown
        and f"**100.0 [{low:.1f}, {high:.1f}]** (51.7)" in markdown
    )
    assert "| mine | mmau-mini | real |" in markdown and "(71.3)" in markdown
    page = (tmp_path / "report.html").read_text()
    assert (
        "<polyline" in page
        and "omni-avqa" in page
        and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    first = data["mmau-mini, audio real"]["questions"][0]
    assert "</script>" in first["question"] and (tmp_path / first["audio"]).resolve().exists()
    assert first["correct"][data["mmau-mini, audio real"]["runs"].index("omni-avqa")] == 1


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    for n, least in ((11, 0.91), (24, 0.91), (300, 0.93), (1000, 0.93)):
        for p in (0.3, 0.5, 0.7, 0.9):
            right = rng.binomial(n, p, 4000)
            covered = np.mean([low <= p <= high for low, high in (wilson(k, n) for k in right)])
            assert least <= covered <= (0.97 if n >= 300 else 1.0), (n, p, covered)
    covered = []
    for seed in range(250):  # averages over 3 orders of 300 questions of different difficulty
        chance = np.random.default_rng(seed).beta(2, 2, 300)
        values = np.random.default_rng([seed, 1]).binomial(3, chance) / 3
        low, high = bootstrap(values, repeats=400, seed=seed)
        covered.append(low <= 0.5 <= high)
    assert 0.92 <= np.mean(covered) <= 0.98  # 0.95 give or take 2 standard errors of 250 simulations


def test_mcnemar_is_the_exact_binomial_test():
    from scipy.stats import binomtest

    for better, worse in ((0, 0), (3, 1), (10, 30), (200, 170)):
        exact = binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert mcnemar(better, worse) == pytest.approx(exact)


def test_scores_are_grouped_and_weighted_by_question(whole):
    summary = score(whole[0])
    rows = json.loads(whole[0].read_text())
    for what in ("task", "difficulty", "category", "sub-category"):
        parts = [numbers for (name, _), numbers in summary.items() if name == what]
        assert sum(n for *_, n in parts) == len(rows)
        assert sum(p * n for p, *_, n in parts) / len(rows) == pytest.approx(summary["all", "all"][0])
