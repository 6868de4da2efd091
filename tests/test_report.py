"""Laws of the report: our score = the official rule, intervals cover, the page shows what the files say and no more."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import report as report_module
from conftest import DATA
from files import InputError
from report import (
    COLUMNS,
    PAPER,
    bootstrap,
    compare,
    mcnemar,
    paper_rows,
    report,
    score,
    summary_lines,
    wilson,
)

SCRIPTS = Path(__file__).resolve().parent / "scripts"
HOSTILE = "What </script><script>alert(1)</script><img src=x onerror=alert(1)> \u2028 & is it?"


def mmau_rows(count=40, right=lambda i: i % 4 != 0):
    """Rows of MMAU as evaluate.py writes them."""
    rows = []
    for i in range(count):
        task = ("sound", "music", "speech")[i % 3]
        row = {"id": f"q{i}", "audio_id": f"./clips/clip {i}#.wav", "question": f"What is it, {i}?"}
        row |= {"choices": ["dog", "cat", "cow"], "answer": "dog", "task": task, "difficulty": "easy"}
        said = "dog" if right(i) else "dog and cat"
        rows.append(row | {"category": ["Reasoning"], "model_prediction": said, "model_output": said})
    return rows


def write_run(folder, rows, name="eval/mmau-mini.real", **about):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    notes = {
        "bench": "mmau-mini",
        "audio": "real",
        "audio_dir": str(folder.parent / "clips"),
        "data": "d.json",
    }
    path.with_suffix(".meta").write_text(json.dumps(notes | about))
    return path


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page_data(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# ------------------------------------------------------------------------------------------------- statistics


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


# ---------------------------------------------------------------------------------------------------- scoring


def test_scores_are_grouped_and_weighted_by_question(tmp_path):
    path = write_run(tmp_path / "run", mmau_rows(41))
    summary = score(path)
    assert summary["all", "all"][0] == pytest.approx(30 / 41) and summary["all", "all"][3] == 41
    for column in ("task", "difficulty", "category"):
        parts = [numbers for (name, _), numbers in summary.items() if name == column]
        assert sum(n for *_, n in parts) == 41
        assert sum(p * n for p, *_, n in parts) / 41 == pytest.approx(summary["all", "all"][0])
    assert summary_lines(path)[0].startswith("average") and "n = 41" in summary_lines(path)[0]


@pytest.mark.parametrize(
    "form",
    [
        {"task_name": "accent", "audio_path": "a.wav", "choice_a": "dog", "choice_b": "cat", "answer_gt": "dog"},
        {"question_text": "?", "multi_choice": ["dog", "cat"], "answer": "dog", "audio_path": "a.wav", "question_type": "time"},
        {"source_dataset": "clotho", "audio_path": "a.wav", "choices": ["dog", "cat"], "answer": "dog"},
        {"category": "sound", "length_type": "short", "audio_path": ["a.wav"], "choices": ["dog", "cat"], "answer": "dog"},
    ],
    ids=["MMSU", "ADQA", "AudioMCQ", "MMAU-Pro"],
)  # fmt: skip
def test_each_format_is_scored_by_its_own_groups(tmp_path, form):
    rows = []
    for i, said in enumerate(["dog", "cat", "dog", ""]):
        rows.append({"id": f"{i}", "question": "What is it?"} | form | {"model_prediction": said})
    summary = score(write_run(tmp_path, rows))
    columns = {"task_name", "question_type", "source_dataset", "category", "length_type"} & form.keys()
    for column in columns:
        assert summary[column, form[column]][0] == 0.5 and summary[column, form[column]][3] == 4


def test_orders_count_by_their_share_and_empty_answers_are_counted(tmp_path):
    rows = mmau_rows(8, right=lambda i: True)
    for row in rows:
        row["order_predictions"] = ["dog", "cat"]
    rows[0] |= {"order_predictions": ["", ""], "model_prediction": ""}
    path = write_run(tmp_path, rows)
    assert score(path)["all", "all"][0] == pytest.approx(7 / 16)
    text = "\n".join(summary_lines(path))
    assert "1 of 8 answers are empty" in text and "same way in all orders: 12.5" in text


def test_compare_is_paired_and_refuses_other_questions(tmp_path):
    before = write_run(tmp_path, mmau_rows(right=lambda i: i < 10), "a")
    after = write_run(tmp_path, mmau_rows(right=lambda i: 5 <= i < 30), "b")
    assert "25.0 -> 62.5" in compare(before, after) and "20 better, 5 worse of 40" in compare(before, after)
    with pytest.raises(InputError, match="not of the same questions"):
        compare(before, write_run(tmp_path, mmau_rows(39), "c"))


@pytest.mark.parametrize("hidden", [1, 40])
def test_answers_are_hidden_only_where_all_are(tmp_path, hidden):
    rows = mmau_rows(40, right=lambda i: True)
    for row in rows[:hidden]:
        del row["answer"]
    path = write_run(tmp_path / "base-omni", rows)
    text = report(tmp_path)
    if hidden == 1:
        assert score(path)["all", "all"][3] == 39 and "**100.0 [" in text
    else:
        with pytest.raises(InputError, match="no right answers"):
            score(path)
        assert "answers hidden (65.9)" in text


# ----------------------------------------------------------------------------------------------- the folder


def test_ours_stands_beside_the_papers_number(tmp_path):
    rows = mmau_rows(right=lambda i: True)
    for run in ("base-omni", "qwen2audio-r1aqa", "omni-avqa-lora", "mine"):
        write_run(tmp_path / run, rows)
    write_run(tmp_path / "omni-avqa", rows, "eval/mmau-mini.none", audio="none")
    text = report(tmp_path)
    assert text == (tmp_path / "report.md").read_text()
    low, high = (100 * end for end in wilson(40, 40))
    ours = f"**100.0 [{low:.1f}, {high:.1f}]**"
    for paper in ("65.9", "65.6", "51.7"):  # reproduced, R1-AQA, and Table IV's AVQA asked without audio
        assert f"{ours} ({paper})" in text
    for method in ("Omni-R1 (AVQA), LoRA (not in the paper)", "R1-AQA [7]"):
        assert re.search(rf"\| {re.escape(method)} \| \*\*100", text)
    assert f"| mine | mmau-mini | real | {ours} |" in text
    assert text.index("### Table I:") < text.index("### Table IV") < text.index("### All runs")


def test_a_broken_neighbour_costs_itself_alone(tmp_path, caplog):
    """Other tools' files, a kill's half rows and names that are not UTF-8 beside one good run."""
    write_run(tmp_path / "good", mmau_rows())
    arc = {
        "id": "a",
        "question": {
            "stem": "What?",
            "choices": [{"label": "A", "text": "dog"}, {"label": "B", "text": "cat"}],
        },
    }
    write_run(
        tmp_path / "arc",
        [arc | {"answerKey": "A", "model_prediction": "dog"}],
        "p",
        bench="arc",
        audio_dir=None,
    )
    unasked = [{k: v for k, v in row.items() if not k.startswith("model_")} for row in mmau_rows()]
    write_run(tmp_path / "unasked", unasked)
    write_run(tmp_path / "cut", mmau_rows()).write_text('[{"id"')
    for i, text in enumerate(
        ("", "[]", "7", "null", '{"bench": 1}', '{"bench', "[" * 3000, '{"audio": "real"}')
    ):
        write_run(tmp_path / f"foreign{i}", mmau_rows()).with_suffix(".meta").write_text(text)
    (tmp_path / "bytes.meta").write_bytes(b"\xff\xfe{}")
    (tmp_path / "bytes.json").write_text("[]")
    os.makedirs(os.path.join(os.fsencode(tmp_path), b"name\xff|"))
    write_run(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"name\xff|"))), mmau_rows())
    steps = [json.dumps({"step": i, "loss": 0.1, "reward": i / 9}) for i in range(1, 9)]
    strange = ["[1]", "null", '{"step": "x", "reward": {}}', '{"step": 9, "reward": 1e999}', '{"step": 1']
    (tmp_path / "good" / "log.jsonl").write_text("\n".join(steps + strange))
    (tmp_path / "good" / "samples.jsonl").write_text('{"step": 1, "audio": 7, "rewards": [1e999]}\n{"step"')
    text = report(tmp_path)
    assert "| good | mmau-mini | real | **75.0 [" in text and "| p | arc | real | **100.0 [" in text
    assert (
        "| unasked | mmau-mini | real | cannot be read |" in text
        and "| cut | mmau-mini | real | cannot" in text
    )
    assert "| name?\\| | mmau-mini | real | **75.0 [" in text and "foreign" not in text
    assert "no score" in caplog.text and "foreign0" in caplog.text and "bytes.meta" in caplog.text
    data = page_data(tmp_path)
    assert [row["step"] for row in data["logs"]["good"]] == [*range(1, 9), 9]
    assert data["samples"]["good"] == [{"step": 1, "audio": None, "rewards": [None]}]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no predictions"):
        report(tmp_path / "nothing")


def test_predictions_of_one_name_all_appear(tmp_path):
    for name in ("a", "b", "c"):
        write_run(tmp_path / name, mmau_rows(), "p")
    write_run(tmp_path / "run", mmau_rows())
    write_run(tmp_path / "run", mmau_rows(), "eval/mmau-mini.again")
    lines = tmp_path / "lines.jsonl"
    write_run(tmp_path, mmau_rows(), "lines.jsonl").rename(lines)  # evaluate.py --out lines.jsonl
    rows = re.findall(r"^\| (\S+) \| mmau-mini \| real \|", report(tmp_path), re.M)
    assert len(rows) == len(set(rows)) == 6 and {"p", "run", "lines"} <= set(rows)
    assert len(page_data(tmp_path)["questions"]["mmau-mini"]["runs"]) == 6


def test_nothing_in_the_data_ends_the_slot_or_stands_for_it(tmp_path):
    rows = mmau_rows()
    rows[0] |= {
        "question": HOSTILE,
        "model_prediction": HOSTILE,
        "choices": [HOSTILE, "cat"],
        "answer": HOSTILE,
    }
    for run in ("DATA", "TABLES", "CURVES", "\\g<1>", "<script>"):
        write_run(tmp_path / run, rows)
        write_lines(
            tmp_path / run / "samples.jsonl", [{"step": 1, "question": HOSTILE, "responses": [HOSTILE]}]
        )
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    template = report_module.TEMPLATE.read_text()
    tags = re.compile(r"</?script[^>]*>")
    assert tags.findall(page) == tags.findall(template)
    assert "\u2028" not in page and "innerHTML" not in page
    outside = re.sub(r'(id="data">).*?(</script>)', r"\1\2", page, flags=re.S)
    assert outside == re.sub(r'(id="data">).*?(</script>)', r"\1\2", template, flags=re.S)
    assert "http" not in outside.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    data = page_data(tmp_path)
    assert "DATA" in data["samples"] and "sample" not in data
    assert any(question["question"] == HOSTILE for question in data["questions"]["mmau-mini"]["questions"])


def test_clips_are_found_from_the_page(tmp_path):
    name = os.fsdecode(b"caf\xe9 #1?.wav")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / name).write_bytes(b"RIFF")
    row = {"step": 3, "k": 0, "question": "?", "audio": str(tmp_path / "clips" / name)}
    write_run(tmp_path / "results" / "run", mmau_rows(), audio_dir=str(tmp_path / "clips"))
    write_lines(tmp_path / "results" / "run" / "samples.jsonl", [row])
    report(tmp_path / "results")
    data = page_data(tmp_path / "results")
    assert data["samples"]["run"][0]["audio"] == "../clips/caf%E9%20%231%3F.wav"
    assert data["questions"]["mmau-mini"]["questions"][0]["audio"].startswith("../clips/")


def test_the_learning_table_shows_a_reward_that_rises_alone(tmp_path):
    rows = []
    for i in range(1, 101):
        rows.append(
            {"step": i, "loss": 0.0, "reward": i / 100, "official": 1 - i / 100, "hedged": i / 100, "kl": 0.0}
        )
        if i % 50 == 0:
            rows.append({"step": i, "eval_accuracy": 1 - i / 200, "eval_low": 0.2, "eval_high": 0.9})
    write_lines(tmp_path / "run" / "log.jsonl", rows)
    text = report(tmp_path)
    assert "| run | 0.105 → 0.905 | 0.895 → 0.095 | 0.105 → 0.905 | 0.000 → 0.000 | 0.750 → 0.500 |" in text


def test_scores_go_into_the_model_card_once(tmp_path):
    write_run(tmp_path / "run", mmau_rows())
    card = tmp_path / "run" / "model" / "README.md"
    card.parent.mkdir()
    card.write_text("# A model\n\n<!-- scores -->\n\n## Recipe\n")
    report(tmp_path)
    first = card.read_text()
    report(tmp_path)
    assert card.read_text() == first and first.count("| run | mmau-mini | real | **75.0 [") == 1
    assert first.startswith("# A model\n\n<!-- scores -->\n") and first.endswith("\n\n## Recipe\n")
    card.write_bytes(b"\xff")  # somebody's
    assert "75.0" in report(tmp_path) and card.read_bytes() == b"\xff"


def test_a_tagged_answer_is_shown_whole_and_scored_by_what_it_ends_in(tmp_path):
    rows = mmau_rows(1, right=lambda i: True)
    rows[0]["raw_output"] = "<think>" + "It barks. " * 200 + "</think><answer>dog</answer>"
    write_run(tmp_path / "base-omni-think", rows)
    assert "| Zero-Shot-CoT (not in the paper) | **100.0 [" in report(tmp_path)
    said = page_data(tmp_path)["questions"]["mmau-mini"]["questions"][0]["said"]["0"]
    assert said.endswith("It barks. </think><answer>dog</answer>") and len(said) < 1000


def test_a_large_folder_gives_a_page_of_reasonable_size(tmp_path):
    write_run(tmp_path / "run", mmau_rows(1000))
    sample = {"step": 1, "question": "What is it?" * 5, "choices": ["dog"] * 4, "responses": ["dog" * 60] * 4}
    write_lines(tmp_path / "run" / "samples.jsonl", [sample | {"step": i} for i in range(1, 2001)])
    write_lines(
        tmp_path / "run" / "log.jsonl", [{"step": i, "reward": 0.5, "seconds_wait": 0.1} for i in range(2000)]
    )
    report(tmp_path)
    assert [row["step"] for row in page_data(tmp_path)["samples"]["run"]][::199] == [1, 2000]
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


# ------------------------------------------------------------------------------------------------- the page


def drawn(page, *actions):
    """{id: tree} of what the page's script draws, under node with a stand-in document."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    command = ["node", str(SCRIPTS / "page.js"), str(page), json.dumps(actions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def texts(tree):
    """All texts of a tree, in order."""
    if isinstance(tree, str):
        return [tree]
    return [text for child in tree[2:] for text in texts(child)]


def elements(tree, tag):
    """All elements of a tree with that tag, as (attributes, text)."""
    if isinstance(tree, str):
        return []
    own = [(tree[1], " ".join(texts(tree)))] if tree[0] == tag else []
    return own + [found for child in tree[2:] for found in elements(child, tag)]


def test_the_template_opens_by_itself_with_sample_data():
    page = drawn(report_module.TEMPLATE)
    assert "Sample data" in texts(page["about"])[0] and len(elements(page["curve-panels"], "svg")) == 5
    for name in ("table-list", "group-table", "sample", "list"):
        assert len(texts(page[name])) > 5, name
    assert "a-gamed-run: the reward moved by" in texts(page["curve-warnings"])[0]


def test_the_page_draws_tables_curves_samples_and_questions(tmp_path):
    rows = mmau_rows(250)
    rows[0]["question"] = HOSTILE
    write_run(tmp_path / "base-omni", rows)
    write_run(tmp_path / "omni-avqa", mmau_rows(250, right=lambda i: i % 2 == 0)[1:] + rows[:1])
    steps = [{"step": i, "reward": 0.5, "official": 0.5, "kl": 0.1, "entropy": 1.0} for i in range(1, 200)]
    steps.append({"step": 100, "eval_accuracy": 0.6, "eval_low": 0.5, "eval_high": 0.7})
    write_lines(tmp_path / "omni-avqa" / "log.jsonl", steps)
    sample = {
        "k": 0,
        "id": "a",
        "question": HOSTILE,
        "choices": ["<b>", "cat"],
        "answer": "<b>",
        "audio": "x.wav",
    }
    sample |= {"responses": ["<i>", "cat"], "rewards": [1.0, 0.0], "advantages": [0.7, -0.7]}
    write_lines(tmp_path / "omni-avqa" / "samples.jsonl", [sample | {"step": i} for i in range(1, 6)])
    report(tmp_path)

    page = drawn(tmp_path / "report.html")
    assert "paper 65.9" in " ".join(texts(page["table-list"]))
    assert {"74.8", "49.6"} <= set(texts(page["group-table"]))  # 187 and 124 of 250
    assert len(elements(page["curve-panels"], "circle")) == 1 and not texts(page["curve-warnings"])
    assert texts(page["sample-step"]) == ["step 5, question a"] and HOSTILE in texts(page["sample"])
    assert elements(page["sample"], "pre")[0][1] == "<i>" and "0.70" in texts(page["sample"])
    assert elements(page["sample"], "audio")[0][0]["src"].endswith("x.wav")
    assert texts(page["count"]) == ["250 of 250, 100 shown"] and HOSTILE in texts(page["list"])
    assert len(elements(page["list"], "audio")) == 100

    page = drawn(
        tmp_path / "report.html",
        ("sample-slider", "value", "1", "oninput"),
        ("group", "value", "task: sound", "onchange"),
        ("show", "value", "wrong, right", "onchange"),
    )
    assert texts(page["sample-step"]) == ["step 2, question a"]
    wrong_then_right = [i for i in range(1, 250) if i % 3 == 0 and i % 4 == 0]
    assert texts(page["count"])[0].startswith(f"{len(wrong_then_right)} of 250")
    page = drawn(tmp_path / "report.html", ("words", "value", "it, 17?", "oninput"))
    assert texts(page["count"]) == ["1 of 250, 1 shown"]
    page = drawn(tmp_path / "report.html", ("more", "hidden", False, "onclick"))
    assert texts(page["count"]) == ["250 of 250, 200 shown"]


def test_the_page_warns_of_a_reward_that_rises_without_the_score(tmp_path):
    for run, official in (("gamed", -1), ("honest", 1)):
        rows = [{"step": i, "reward": i / 100, "official": 0.5 + official * i / 200} for i in range(1, 101)]
        write_lines(tmp_path / run / "log.jsonl", rows)
    write_lines(tmp_path / "short" / "log.jsonl", [{"step": 1, "reward": 0.5}])
    report(tmp_path)
    warnings = texts(drawn(tmp_path / "report.html")["curve-warnings"])
    assert warnings[0].startswith("gamed: the reward moved by +80 points, the official score by -40")
