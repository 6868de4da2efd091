"""Laws of the report: our score = the official rule, intervals cover, the page shows what the files say and no more."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import report as report_module
from conftest import DATA
from data import read_questions
from files import InputError
from report import PAPER, bootstrap, compare, need, report, score_questions, split, summary_lines, wilson

HERE = Path(__file__).resolve().parent
HOSTILE = "What </script><script>alert(1)</script><img src=x onerror=alert(1)> \u2028 & is it?"
CONFIG = {"model": "base-7B", "parameters": 8_900_000_000, "layout": "reshard", "steps": 100}
CONFIG["format_weight"] = 0.0
STEP = {"official": 0.5, "hedged": 0.0, "kl": 0.1, "entropy": 1.0, "frac_reward_zero_std": 0.5}


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
    notes = {"bench": "mmau-mini", "audio": "real", "model": "base-7B", "unanswered": {}}
    notes |= {"audio_dir": str(folder.parent / "clips")}
    path.with_suffix(".meta").write_text(json.dumps(notes | about))
    return path


def write_log(folder, rows, samples=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("log", rows), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "config.json").write_text(json.dumps(CONFIG))


def page_data(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# ------------------------------------------------------------------------------------------------- statistics


def test_intervals_cover_the_truth(monkeypatch):
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, Table I
    for n, p in ((11, 0.3), (24, 0.9), (1000, 0.7)):
        intervals = [wilson(right, n) for right in np.random.default_rng(0).binomial(n, p, 4000)]
        covered = np.mean([low <= p <= high for low, high in intervals])
        assert 0.91 <= covered <= 0.98, (n, p, covered)
    monkeypatch.setattr(report_module, "RESAMPLED", 300)
    covered = []
    for seed in range(150):  # averages over 3 orders of 100 questions of different difficulty
        rng = np.random.default_rng(seed)
        low, high = bootstrap(rng.binomial(3, rng.beta(2, 2, 100)) / 3)
        covered.append(low <= 0.5 <= high)
    assert 0.91 <= np.mean(covered) <= 0.99  # 0.95 give or take 2 standard errors of 150 simulations


def test_the_papers_numbers_are_the_papers():
    paper = DATA.parent / "paper.txt"
    if not paper.exists():
        pytest.skip(f"the paper is not at {paper}")
    text = re.sub(r"</?[a-z]+>|\*\*", "", paper.read_text())
    for title, table in PAPER.items():
        name = title.split()[1].strip(":")
        body = text[text.index(f"\nTABLE {name}\n") :].split("\n\n")[1]
        head, *rows = [line.split(" | ") for line in table.strip().splitlines()]
        width = len(head[3].split(", "))
        published = [re.findall(r"\t(-|\d+\.\d)(?=\t|$)", line) for line in body.splitlines()]
        published = [row[-width:] for row in published if set(row) - {"-"}]
        ours = [row[3].split() for row in rows]
        assert [row for row in ours if set(row) != {"-"}] == published
        assert {len(row) for row in ours} == {width}


# ---------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "form",
    [
        {"task": "sound", "difficulty": "easy", "category": ["Reasoning"], "audio_id": "a.wav", "choices": ["dog", "cat"], "answer": "dog"},
        {"task_name": "accent", "audio_path": "a.wav", "choice_a": "dog", "choice_b": "cat", "answer_gt": "dog"},
        {"question_text": "?", "multi_choice": ["dog", "cat"], "answer": "dog", "audio_path": "a.wav", "question_type": "time"},
        {"source_dataset": "clotho", "audio_path": "a.wav", "choices": ["dog", "cat"], "answer": "dog"},
        {"category": "sound", "length_type": "short", "audio_path": ["a.wav"], "choices": ["dog", "cat"], "answer": "dog"},
    ],
    ids=["MMAU", "MMSU", "ADQA", "AudioMCQ", "MMAU-Pro"],
)  # fmt: skip
def test_each_format_is_scored_by_its_own_groups(tmp_path, form):
    rows = []
    for i, said in enumerate(["dog", "cat", "dog", "", "the dog"]):
        rows.append({"id": f"{i}", "question": "What is it?"} | form | {"model_prediction": said})
    path = write_run(tmp_path, rows)
    scores = score_questions(read_questions(path))
    columns = set(report_module.GROUPS.split()) & form.keys()
    for column in columns:
        group = "Reasoning" if form[column] == ["Reasoning"] else form[column]
        assert scores[f"{column}: {group}"] == scores["all"] == (0.6, *wilson(3, 5), 5)
    assert columns and len(scores) == 1 + len(columns)
    lines = summary_lines(path)
    assert lines[0].startswith("all") and "n = 5" in lines[0] and "1 of 5 answers are empty" in lines[-1]


def test_orders_count_by_their_share(tmp_path):
    rows = mmau_rows(8, right=lambda i: True)
    for row in rows:
        row["order_predictions"] = ["dog", "cat"]
    rows[0] |= {"order_predictions": ["", ""], "model_prediction": ""}
    path = write_run(tmp_path, rows)
    assert score_questions(read_questions(path))["all"][0] == pytest.approx(7 / 16)
    assert "same way in all 2 orders: 1 of 8" in "\n".join(summary_lines(path))


def test_what_differs_is_counted_in_pairs(tmp_path):
    before = write_run(tmp_path, mmau_rows(right=lambda i: i < 10), "a")
    after = write_run(tmp_path, mmau_rows(right=lambda i: 5 <= i < 30), "b")
    assert "25.0 -> 62.5" in compare(before, after) and "20 better, 5 worse of 40" in compare(before, after)


def test_the_program_needs_no_torch():
    code = "import sys, report; sys.argv[1:] = ['--score', 'no.json']; sys.modules['torch'] = None; report.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_what_cannot_be_compared_is_refused(tmp_path, caplog):
    write = partial(write_run, tmp_path)
    (tmp_path / "nothing").mkdir()
    real = write(mmau_rows(), "real")
    silent = write(mmau_rows(), "silent", audio="silence")
    few = write(mmau_rows(39), "few", audio="none")
    lacking = write(mmau_rows(), "lacking", audio="none", unanswered={"q1": "no clip"})
    hidden = write([{**row, "answer": ""} for row in mmau_rows()], "hidden", audio="none")
    plain = write([row | {"model_prediction": None} for row in mmau_rows()], "plain")
    plain.write_text(plain.read_text().replace("model_", "no_"))
    for act, files, words in (
        (need, (real, write(mmau_rows(), "mmar", audio="none", bench="mmar")), "asked alike"),
        (need, (real, write(mmau_rows(), "other", audio="none", model="other")), "asked alike"),
        (need, (real, real), "with the clip and without"),
        (need, (silent, real), "with the clip and without"),
        (need, (real, few), "not of the same questions"),
        (need, (real, lacking), "not of the same questions"),
        (need, (real, tmp_path / "no.json"), "no.meta: not what evaluate.py wrote: cannot read"),
        (split, ([hidden], tmp_path), "hide their answers"),
        (compare, (real, few), "not of the same questions"),
        (compare, (real, hidden), "hide their answers"),
        (summary_lines, (hidden,), "no right answers"),
        (summary_lines, (plain,), "has no prediction"),
        (report, (tmp_path / "nothing",), "no predictions"),
    ):
        with pytest.raises(InputError, match=words):
            act(*files)
    split([lacking], tmp_path)
    assert "1 questions have no answer" in caplog.text
    assert '"q1"' not in "".join(path.read_text() for path in tmp_path.glob("*.jsonl"))


# ------------------------------------------------------------------------------------ does it need the audio?

KINDS = ["needs", "needs", "needs", "text", "text", "misleads", "neither"]  # of questions, in turn
RIGHT = {"needs": (1, 0), "text": (1, 1), "misleads": (0, 1), "neither": (0, 0)}  # with the clip, without


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """MMAU's real questions answered with the clip and without: {name: path}."""
    if not DATA.exists():
        pytest.skip(f"real questions are not at {DATA}")
    monkeypatch.setattr(report_module, "RESAMPLED", 200)
    rows = json.loads((DATA / "mmau-test-mini-original.json").read_text())
    paths = {}
    for place, audio in enumerate(("real", "silence")):
        said = []
        for i, row in enumerate(rows):
            right = RIGHT[KINDS[i % 7]][place]
            said.append(row | {"model_prediction": row["answer"] if right else "cannot tell"})
        paths[audio] = write_run(tmp_path, said, audio, audio=audio)
        for row in said:
            row["order_predictions"] = [row["model_prediction"], "cannot tell"]
        paths[f"{audio} twice"] = write_run(tmp_path, said, f"{audio}-twice", audio=audio, orders=2)
    return rows, paths


def test_which_questions_need_the_audio_is_counted(answered):
    rows, paths = answered
    lines = need(paths["real"], paths["silence"])
    for column in ("task", "difficulty"):
        for group in {row[column] for row in rows}:
            ours = [KINDS[i % 7] for i, row in enumerate(rows) if row[column] == group]
            counts = [100 * ours.count(kind) / len(ours) for kind in RIGHT]
            real, silent = counts[0] + counts[1], counts[1] + counts[2]
            line = next(line for line in lines if line.startswith(f"{column}: {group} "))
            found = [float(number) for number in re.findall(r"\d+\.\d", line)]
            hand = [real, silent, 100 * silent / real, *found[3:5], *counts]
            assert found == pytest.approx(hand, abs=0.051) and line.endswith(f" n = {len(ours)}")
            assert found[3] < found[2] < found[4]
    average = re.findall(r"\d+\.\d", lines[1])  # 1,000 = 143 x 7 - 1, and the last kind is neither
    assert average[:3] == ["71.5", "42.9", "60.0"] and average[5:] == ["42.9", "28.6", "14.3", "14.2"]
    twice = need(paths["real twice"], paths["silence twice"])  # the second order is never right
    assert re.findall(r"\d+\.\d", twice[1])[:3] == ["35.8", "21.4", "60.0"]
    alike = "answered the same way in all 2 orders"
    assert twice[-2:] == [f"{alike}: 285 of 1000", f"{alike}: 571 of 1000"]


def test_questions_are_split_by_how_often_they_were_answered_right(answered, tmp_path, monkeypatch, capsys):
    rows, paths = answered
    chance = sum(1 / len(row["choices"]) for row in rows)
    for names, kinds in (
        (["silence"], {"never": ("needs", "neither"), "sometimes": (), "always": ("text", "misleads")}),
        (
            ["real", "silence"],
            {"never": ("neither",), "sometimes": ("needs", "misleads"), "always": ("text",)},
        ),
    ):
        lines = split([paths[name] for name in names], tmp_path / "parts")
        for part, those in kinds.items():
            kept = (tmp_path / "parts" / f"{part}.jsonl").read_text().splitlines()
            assert list(map(json.loads, kept)) == [row for i, row in enumerate(rows) if KINDS[i % 7] in those]
            assert f"{len(kept)} {part}" in lines[0]
        assert f"guessing alone would put {chance:.0f} into" in lines[0] or len(names) == 2
    assert len(read_questions(tmp_path / "parts" / "never.jsonl")) == 142
    monkeypatch.setattr(
        "sys.argv", ["report.py", "--split", str(paths["silence twice"]), "--out", str(tmp_path)]
    )
    report_module.main()
    assert "right 571 never, 429 sometimes, 0 always" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- the folder


def test_ours_stands_beside_the_papers_number(tmp_path):
    rows = mmau_rows(right=lambda i: True)
    for run in ("base-omni", "qwen2audio-r1aqa", "mine"):
        write_run(tmp_path / run, rows, model="tiny" if run == "mine" else "base-7B")
    half = mmau_rows(right=lambda i: i < 20)
    for audio, heard in (("none", rows), ("silence", half)):
        write_run(tmp_path / "base-omni", heard, f"eval/mmau-mini.{audio}", audio=audio)
    write_run(tmp_path / "omni-avqa", [{**row, "answer": ""} for row in rows])
    text = report(tmp_path)
    assert text == (tmp_path / "report.md").read_text()
    low, high = (100 * end for end in wilson(40, 40))
    ours = f"**100.0 [{low:.1f}, {high:.1f}]**"
    for paper in ("65.9", "65.6", "49.3"):  # reproduced, R1-AQA, and Table IV's base asked without audio
        assert f"{ours} ({paper})" in text
    assert "answers hidden (68.6)" in text and "| omni-avqa | mmau-mini | answers hidden |" in text
    assert f"| mine | mmau-mini | {ours} |" in text
    kept = re.search(
        r"\| base-omni \| .* \| silence 50.0 \[(.*), (.*)\]; none 100.0 \[100.0, 100.0\] \|", text
    )
    assert 30 < float(kept[1]) < 45 and 55 < float(kept[2]) < 70  # 20 of 40: 50 give or take 2 x 7.9
    assert text.index("### Table I:") < text.index("### Table IV") < text.index("### Does it listen?")
    assert re.findall(r"\*\*(.*) is tiny, of unknown parameters: not the paper's", text) == ["mine"]


def test_a_broken_neighbour_costs_itself_alone(tmp_path, caplog):
    """Other tools' files, a kill's half rows and names that are not UTF-8 beside good runs."""
    write_run(tmp_path / "good", mmau_rows())
    for i, text in enumerate(("", "null", '{"bench": 1}', "[" * 3000)):
        write_run(tmp_path / f"foreign{i}", mmau_rows()).with_suffix(".meta").write_text(text)
    write_run(tmp_path / "cut", mmau_rows()).write_text('[{"id"')
    write_log(tmp_path / "other", [{"step": 1}])
    (tmp_path / "other" / "config.json").write_text("{}")
    name = os.path.join(os.fsencode(tmp_path), b"name\xff|")
    os.makedirs(name)
    write_run(Path(os.fsdecode(name)), mmau_rows())
    write_log(tmp_path / "good", [{"step": i, "reward": i / 9} for i in range(1, 9)])
    with open(tmp_path / "good" / "log.jsonl", "a") as file:
        file.write('{"step": 9, "re')
    for place in ("a", "b"):
        write_run(tmp_path / place, mmau_rows(), "p")  # two of one name: both appear
    text = report(tmp_path)
    shown = re.findall(r"^\| (\S+) \| mmau-mini \| \*\*75.0 \[", text, re.M)
    assert sorted(shown) == ["a/p", "b/p", "good", "name?\\|"]
    left_out = " ".join(record.getMessage() for record in caplog.records)
    for name in ("foreign0", "foreign1", "foreign2", "foreign3", "cut", "other"):
        assert name in left_out and name not in text
    assert [row["step"] for row in page_data(tmp_path)["runs"]["good"]["log"]] == [*range(1, 9)]


def test_nothing_in_the_data_ends_the_slot_or_stands_for_it(tmp_path):
    rows = mmau_rows()
    rows[0] |= {
        "question": HOSTILE,
        "model_prediction": HOSTILE,
        "choices": [HOSTILE, "cat"],
        "answer": HOSTILE,
    }
    for run in ("DATA", "\\g<1>", "<script>"):
        write_run(tmp_path / run, rows)
        write_log(tmp_path / run, [{"step": 1}], [{"step": 1, "question": HOSTILE, "responses": [HOSTILE]}])
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    template = report_module.TEMPLATE.read_text()
    outside = re.sub(r'(id="data">).*?(</script>)', r"\1\2", page, flags=re.S)
    assert outside == re.sub(r'(id="data">).*?(</script>)', r"\1\2", template, flags=re.S)
    assert "http" not in outside.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "\u2028" not in page and "innerHTML" not in page
    data = page_data(tmp_path)
    assert "DATA" in data["runs"] and "sample" not in data
    assert data["questions"]["mmau-mini"]["q0"]["question"] == HOSTILE


def test_clips_are_found_from_the_page_and_it_stays_small(tmp_path):
    clip = os.path.join(tmp_path, "clips", os.fsdecode(b"caf\xe9 #1?.wav"))
    sample = {"question": "What?" * 9, "choices": ["dog"] * 4, "responses": ["dog" * 60] * 4, "audio": clip}
    rows = mmau_rows(1000)
    rows[1]["raw_output"] = "<think>" + "It barks. " * 200 + "</think><answer>dog</answer>"
    write_run(tmp_path / "results" / "run", rows, audio_dir=str(tmp_path / "clips"))
    log = [STEP | {"step": i, "seconds_wait": 0.25} for i in range(1, 2001)]
    write_log(tmp_path / "results" / "run", log, [sample | row for row in log])
    report(tmp_path / "results")
    data = page_data(tmp_path / "results")
    run = data["runs"]["run"]
    assert run["samples"][0]["audio"] == "../clips/caf%E9%20%231%3F.wav" and run["seconds"] == 500
    assert 100 <= len(run["samples"]) <= 200 and run["samples"][-1]["step"] == 2000
    questions = data["questions"]["mmau-mini"]
    assert questions["q0"]["audio"].startswith("../clips/")
    assert questions["q1"]["said"]["0"][0].endswith("It barks. </think><answer>dog</answer>")
    assert (tmp_path / "results" / "report.html").stat().st_size < 1_000_000


# ------------------------------------------------------------------------------------------------- the page


def drawn(page, *actions):
    """{id: tree} of what the page's script draws, under node with a stand-in document."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    command = ["node", str(HERE / "scripts" / "page.js"), str(page), json.dumps(actions)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def words(tree):
    """All texts of a tree, in order."""
    return tree if isinstance(tree, str) else " ".join(words(child) for child in tree[2:])


def elements(tree, tag):
    """All elements of a tree with that tag."""
    if isinstance(tree, str):
        return []
    return [tree] * (tree[0] == tag) + [found for child in tree[2:] for found in elements(child, tag)]


def test_the_template_opens_by_itself_with_sample_data():
    page = drawn(report_module.TEMPLATE)
    assert "Sample data" in words(page["about"]) and len(elements(page["curve-panels"], "svg")) == 5
    for name in ("cards", "table-list", "group-table", "sample", "list"):
        assert len(words(page[name])) > 50, name
    assert "reward and score part" in words(page["cards"])


def test_the_first_screen_says_whether_each_run_worked(tmp_path):
    """Cards: base -> trained and whether chance explains it, does it listen, and what is not healthy."""
    steps = [STEP | {"step": i, "reward": 0.5, "seconds_update": 36.0} for i in range(1, 101)]
    logs = {"gamed": [step | {"reward": step["step"] / 100} for step in steps]}
    logs["good"] = [step | {"official": step["reward"]} for step in logs["gamed"]]
    logs["deaf"] = [step | {"frac_reward_zero_std": 1.0} for step in steps]
    logs["leaps"] = [*steps[:6], steps[6] | {"kl": 27.9}, *steps[7:]]
    for run, log in logs.items():
        write_log(tmp_path / run, log)
    write_run(tmp_path / "a-decoy", mmau_rows(), model="another-7B")  # nobody's base
    write_run(tmp_path / "base-omni", mmau_rows(right=lambda i: i < 10))
    write_run(tmp_path / "good", mmau_rows(right=lambda i: 5 <= i < 30), model="good")
    write_run(tmp_path / "good", mmau_rows(right=lambda i: i < 20), "eval/none", audio="none", model="good")
    write_run(tmp_path / "gamed", mmau_rows(right=lambda i: i < 11), model="gamed")
    report(tmp_path)
    cards = {}
    for card in elements(drawn(tmp_path / "report.html")["cards"], "div"):
        if card[1].get("class") == "card":
            cards[words(card[2])] = words(card)
    assert set(cards) == {*logs, "a-decoy"}  # the base stands on the others'
    assert "8.9B parameters · step 100 of 100 · 1.0 h · reshard" in cards["good"]
    assert [run for run in logs if "healthy" in cards[run]] == ["good"]
    assert re.search(r"25\.0 →  62\.5 .* \+37\.5 \[.*\], better, 0 lies outside", cards["good"])
    assert "with audio 62.5; none 50.0, keeps 80 %" in cards["good"]
    assert "0 lies within: it may be chance" in cards["gamed"]
    assert "reward and score part" in cards["gamed"]
    assert "in 10 steps no group's rewards differ" in cards["deaf"]
    assert "leaps to 27.9 at step 7" in cards["leaps"]


def test_the_page_draws_tables_curves_samples_and_questions(tmp_path):
    rows = mmau_rows(250)
    rows[0]["question"] = HOSTILE
    write_run(tmp_path / "base-omni", rows)
    after = rows[:1] + mmau_rows(250, right=lambda i: i % 2 == 0)[1:]
    write_run(tmp_path / "omni-avqa", after, model="omni-avqa/model")
    steps = [STEP | {"step": i, "reward": 0.5} for i in range(1, 200)]
    steps.append({"step": 100, "eval_accuracy": 0.6, "eval_low": 0.5, "eval_high": 0.7})
    sample = {"id": "a", "question": HOSTILE, "choices": ["<b>", "cat"], "answer": "<b>", "audio": "x.wav"}
    sample |= {"responses": ["<i>", "cat"], "rewards": [1.0, 0.0], "advantages": [0.7, -0.7]}
    samples = [sample | {"step": i} for i in range(1, 6)]
    samples[0] = samples[0] | {"rewards": [0.0, 0.0]}  # teaches nothing
    write_log(tmp_path / "omni-avqa", steps, samples)
    report(tmp_path)

    page = drawn(tmp_path / "report.html")
    tables = words(page["table-list"])
    assert "paper 65.9" in tables and "14 rows of the paper alone" in tables
    assert {"74.8", "49.6"} <= set(words(page["group-table"]).split())  # 187 and 124 of 250
    assert len(elements(page["curve-panels"], "circle")) == 1
    assert words(page["sample-step"]) == "step 2, question a" and HOSTILE in words(page["sample"])
    assert words(elements(page["sample"], "pre")[0]) == "<i>"
    assert elements(page["sample"], "audio")[0][1]["src"].endswith("x.wav")
    differ = sum((i % 4 != 0) != (i % 2 == 0) for i in range(1, 250))
    assert words(page["count"]) == f"{differ} of 250, 100 shown"

    page = drawn(
        tmp_path / "report.html",
        ("sample-slider", "value", "3", "oninput"),
        ("words", "value", "it, 1", "oninput"),
        ("group", "value", "task: sound", "onchange"),
        ("show", "value", "wrong, right", "onchange"),
    )
    assert words(page["sample-step"]) == "step 4, question a"
    mended = [i for i in range(1, 250) if i % 12 == 0 and str(i).startswith("1")]
    assert words(page["count"]).startswith(f"{len(mended)} of 250")
    page = drawn(tmp_path / "report.html", ("show", "value", "", "onchange"), ("more", "id", "", "onclick"))
    assert words(page["count"]) == "250 of 250, 200 shown" and HOSTILE in words(page["list"])
