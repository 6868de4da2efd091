"""Laws of the report: our score = the official rule, intervals cover, the page shows what the files say and no more."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import report as report_module
from conftest import DATA
from data import read_questions
from files import append_rows
from report import PAPER, bootstrap, compare, report, score_questions, summary_lines, wilson

HERE = Path(__file__).resolve().parent
HOSTILE = "What </script><script>alert(1)</script><img src=x onerror=alert(1)> \u2028 & is it?"
CONFIG = """{"model": "base-7B", "parameters": 8900000000, "layout": "reshard", "steps": 100, "format_weight": 0.0}"""
STEP = json.loads('{"official": 0.5, "hedged": 0.0, "kl": 0.1, "entropy": 1.0, "frac_reward_zero_std": 0.5}')
ROW = '{"choices": ["dog", "cat", "cow"], "answer": "dog", "difficulty": "easy", "category": ["Reasoning"]}'
ABOUT = '{"bench": "mmau-mini", "audio": "real", "model": "base-7B", "unanswered": {}}'


def mmau_rows(count=40, right=lambda i: i % 4 != 0):
    """Rows of MMAU as evaluate.py writes them."""
    rows = []
    for i in range(count):
        task = ("sound", "music", "speech")[i % 3]
        row = {"id": f"q{i}", "audio_id": f"./clips/clip {i}#.wav", "question": f"What is it, {i}?"}
        said = "dog" if right(i) else "dog and cat"
        row |= {"task": task, "model_prediction": said, "model_output": said}
        rows.append(row | json.loads(ROW))
    return rows


def write_run(folder, rows, name="eval/mmau-mini.real", **about):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    notes = json.loads(ABOUT) | {"audio_dir": str(folder.parent / "clips")}
    path.with_suffix(".meta").write_text(json.dumps(notes | about))
    return path


def write_log(folder, rows, samples=()):
    folder.mkdir(parents=True, exist_ok=True)
    append_rows(folder / "log.jsonl", rows)
    append_rows(folder / "samples.jsonl", samples)
    (folder / "config.json").write_text(CONFIG)


def page_data(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# ------------------------------------------------------------------------------------------------- statistics


def test_intervals_are_newcombes_and_the_means_own():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, Table I
    values = np.random.default_rng(0).beta(2, 2, 400)  # questions of different difficulty
    half = 1.96 * values.std() / 20
    ends = bootstrap(values) - values.mean()
    assert ends == pytest.approx([-half, half], rel=0.08)  # 2,000 resamples give the ends to 3 %


def test_the_papers_numbers_are_the_papers():
    paper = DATA.parent / "paper.txt"
    if not paper.exists():
        pytest.skip(f"the paper is not at {paper}")
    text = re.sub(r"</?[a-z]+>|\*\*", "", paper.read_text())
    for title, table in PAPER.items():
        name = title.split()[1].strip(":")
        body = text[text.index(f"\nTABLE {name}\n") :].split("\n\n")[1]
        published = re.findall(r"\t(-|\d+\.\d)(?=\t|$)", body, re.M)
        rows = table.strip().splitlines()[1:]
        ours = " ".join(row.split(" | ")[3] for row in rows).split()
        assert ours == published


# ---------------------------------------------------------------------------------------------------- scoring

# The groups of its benchmark's own script | a row
FORMS = """
all, task: sound, difficulty: easy, category: Reasoning | {"task": "sound", "difficulty": "easy", "category": ["Reasoning"], "audio_id": "a.wav", "choices": ["dog", "cat"], "answer": "dog"}
all, task_name: accent | {"task_name": "accent", "audio_path": "a.wav", "choice_a": "dog", "choice_b": "cat", "answer_gt": "dog"}
all, question_type: time | {"question_text": "?", "multi_choice": ["dog", "cat"], "answer": "dog", "audio_path": "a.wav", "question_type": "time"}
all, source_dataset: clotho | {"source_dataset": "clotho", "audio_path": "a.wav", "choices": ["dog", "cat"], "answer": "dog"}
all, category: sound, length_type: short | {"category": "sound", "length_type": "short", "audio_path": ["a.wav"], "choices": ["dog", "cat"], "answer": "dog"}
"""


def test_each_format_is_scored_by_its_own_groups(tmp_path):
    for form in FORMS.strip().splitlines():
        groups, row = form.split(" | ")
        rows = []
        for i, said in enumerate(["dog", "cat", "dog", "", "the dog"]):
            rows.append({"id": f"{i}", "question": "?"} | json.loads(row) | {"model_prediction": said})
        path = write_run(tmp_path, rows)
        scores = score_questions(read_questions(path))
        assert scores == dict.fromkeys(groups.split(", "), (0.6, *wilson(3, 5), 5))
        assert summary_lines(path)[-1] == "1 of 5 answers are empty, counted as wrong"


def test_what_differs_is_counted_in_pairs(tmp_path):
    before = write_run(tmp_path, mmau_rows(right=lambda i: i < 10), "a")
    after = write_run(tmp_path, mmau_rows(right=lambda i: 5 <= i < 30), "b")
    assert "25.0 -> 62.5" in compare(before, after) and "20 better, 5 worse of 40" in compare(before, after)


def test_the_program_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import report"
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=True)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("--option FILE") is report.py's main in `tmp_path`: what it prints, or says of errors."""
    monkeypatch.chdir(tmp_path)

    def run(line, code=0):
        monkeypatch.setattr("sys.argv", ["report.py", *line.split()])
        assert report_module.main() == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


FILES = """{"real": {}, "silent": {"audio": "silence"}, "mmar": {"audio": "none", "bench": "mmar"},
            "other": {"audio": "none", "model": "other"}, "lacking": {"audio": "none", "unanswered": {"q1": "no clip"}}}"""
REFUSED = """
--need real.json mmar.json | asked alike
--need real.json other.json | asked alike
--need real.json real.json | with the clip and without
--need silent.json real.json | with the clip and without
--need real.json few.json | not of the same questions
--need real.json lacking.json | not of the same questions
--need real.json no.json | no.meta: not what evaluate.py wrote: cannot read
--split hidden.json | hide their answers
--compare real.json few.json | not of the same questions
--compare real.json hidden.json | hide their answers
--score plain.json | has no prediction
--score hidden.json | no right answers
nothing | no predictions
"""


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, run):
    (tmp_path / "nothing").mkdir()
    rows = mmau_rows()
    for name, about in json.loads(FILES).items():
        write_run(tmp_path, rows, name, **about)
    write_run(tmp_path, rows[1:], "few", audio="none")
    write_run(tmp_path, [row | {"answer": ""} for row in rows], "hidden", audio="none")
    plain = write_run(tmp_path, rows, "plain")
    plain.write_text(plain.read_text().replace("model_", "no_"))
    for case in REFUSED.strip().splitlines():
        line, words = case.split(" | ")
        said = run(line, code=2)
        assert said.startswith("error: ") and said.count("\n") == 1 and words in said


# ------------------------------------------------------------------------------------ does it need the audio?


@pytest.fixture
def answered(tmp_path, monkeypatch):
    """Twelve questions, a sound's, a music's and a speech's in turn, answered with the clip and without."""
    monkeypatch.setattr(report_module, "RESAMPLED", 200)
    for audio, marks in (("real", "111 110 110 100"), ("silence", "010 011 010 010")):
        rows = mmau_rows(12, right=list(map(int, marks.replace(" ", ""))).__getitem__)
        write_run(tmp_path, rows, audio, audio=audio)
        for row in rows:
            row["order_predictions"] = [row["model_prediction"], "dog and cat"]  # which is never right
        write_run(tmp_path, rows, f"{audio}-twice", audio=audio, orders=2)


# real, silence, retained, needs audio, text suffices, misleads, neither
NEEDED = """
all 66.7 41.7 62.5 41.7 25.0 16.7 16.7 n = 12
task: sound 100.0 0.0 0.0 100.0 0.0 0.0 0.0 n = 4
task: music 75.0 100.0 133.3 0.0 75.0 25.0 0.0 n = 4
task: speech 25.0 25.0 100.0 25.0 0.0 25.0 50.0 n = 4
"""


def test_which_questions_need_the_audio_is_counted_and_orders_count_by_their_share(answered, run):
    lines = run("--need real.json silence.json").splitlines()
    counted = {" ".join(re.sub(r"\[.*\]", "", line).split()) for line in lines}
    assert set(NEEDED.strip().splitlines()) <= counted
    low, high = re.search(r"62\.5 \[(\S+), (\S+)\]", lines[1]).groups()
    assert 0 < float(low) < 62.5 < float(high)
    twice = run("--need real-twice.json silence-twice.json")
    assert re.search(r"all +33\.3 +20\.8 +62\.5 ", twice)
    alike = "answered the same way in all 2 orders"
    assert twice.endswith(f"{alike}: 4 of 12\n{alike}: 7 of 12\n")
    scored = run("--score real-twice.json")
    assert re.search(r"all +33\.3 \[", scored) and f"{alike}: 4 of 12" in scored


SPLIT = """
silence-twice.json | 7 never, 5 sometimes, 0 always
silence.json | 7 never, 0 sometimes, 5 always; guessing alone would put 4 into
lacking.json | 3 never, 0 sometimes, 8 always
real.json silence.json | 2 never, 7 sometimes, 3 always; guessing alone would put 1 into
"""


def test_questions_are_split_by_how_often_they_were_answered_right(answered, run, tmp_path, caplog):
    rows = mmau_rows(12)
    write_run(tmp_path, rows, "lacking", unanswered={"q1": "no clip"})
    for case in SPLIT.strip().splitlines():
        files, words = case.split(" | ")
        assert words in run(f"--split {files} --out parts")
    assert "1 questions have no answer" in caplog.text
    for row in rows:
        del row["model_prediction"], row["model_output"]  # the rest is as published
    for part, those in {"never": (8, 11), "always": (1, 4, 7)}.items():
        kept = read_questions(tmp_path / "parts" / f"{part}.jsonl")
        assert [question.meta["source"] for question in kept] == [rows[i] for i in those]


# ----------------------------------------------------------------------------------------------- the folder


def test_ours_stands_beside_the_papers_number(tmp_path):
    rows = mmau_rows()
    for run in ("base-omni", "qwen2audio-r1aqa", "mine"):
        write_run(tmp_path / run, rows, model="tiny" if run == "mine" else "base-7B")
    half = mmau_rows(right=lambda i: i % 8 > 4)
    for audio, heard in (("none", rows), ("silence", half)):
        write_run(tmp_path / "base-omni", heard, f"eval/mmau-mini.{audio}", audio=audio)
    write_run(tmp_path / "omni-avqa", [row | {"answer": ""} for row in rows])
    write_log(tmp_path / "mine", [])
    config = CONFIG.replace("base-7B", "tiny").replace("8900000000", "500000")
    (tmp_path / "mine" / "config.json").write_text(config)
    text = report(tmp_path)
    assert re.findall(r"\*\*(.*) have 500,000 parameters, the paper's 7B", text) == [
        "tiny and what was trained from it"
    ]
    assert text == (tmp_path / "report.md").read_text()
    ours = "**75.0 [59.8, 85.8]**"  # Wilson's interval of 30 of 40
    for paper in ("65.9", "65.6", "49.3"):  # reproduced, R1-AQA, and Table IV's base asked without audio
        assert f"{ours} ({paper})" in text
    assert "answers hidden (68.6)" in text and "| omni-avqa | mmau-mini | answers hidden |" in text
    assert text.count("| mine | not in the paper's table | **") == 2  # I and IV, which are of that benchmark
    assert f"| mine | mmau-mini | {ours} |" in text
    # Half of what was right stays, give or take 2 x 9.1; the same answers stay in every pair.
    kept = re.search(r"\| silence 50.0 \[(.*), (.*)\]; none 100.0 \[100.0, 100.0\] \|", text)
    assert 27 < float(kept[1]) < 38 and 62 < float(kept[2]) < 73


def test_a_broken_neighbour_costs_itself_alone(tmp_path, caplog):
    """Other tools' files, a kill's half rows and names that are not UTF-8 beside good runs."""
    rows = mmau_rows()
    for i, text in enumerate(("", "null", '{"bench": 1}', "[" * 3000)):
        write_run(tmp_path / f"foreign{i}", rows).with_suffix(".meta").write_text(text)
    write_run(tmp_path / "cut", rows).write_text('[{"id"')
    write_log(tmp_path / "other", [{"step": 1}])
    (tmp_path / "other" / "config.json").write_text("{}")
    for name in ("good", os.fsdecode(b"name\xff|")):
        write_run(tmp_path / name, rows)
    for place in ("a", "b"):
        write_run(tmp_path / place, rows, "p")  # two of one name: both appear
    write_log(tmp_path / "good", [{"step": 1}])
    with open(tmp_path / "good" / "log.jsonl", "a") as file:
        file.write('{"step": 2, "re')
    text = report(tmp_path)
    shown = re.findall(r"^\| (\S+) \| mmau-mini \| \*\*75.0 \[", text, re.M)
    assert sorted(shown) == ["a/p", "b/p", "good", "name?\\|"]
    left_out = re.findall(r"left out: \S*/(\w+)/(?:eval/|log)", caplog.text)
    assert " ".join(left_out) == "cut foreign0 foreign1 foreign2 foreign3 other"
    assert page_data(tmp_path)["runs"]["good"]["log"] == [{"step": 1}]


def test_clips_are_found_from_the_page_and_it_stays_small(tmp_path):
    clip = os.path.join(tmp_path, "clips", os.fsdecode(b"caf\xe9 #1?.wav"))
    sample = {"question": "What?" * 9, "choices": ["dog"] * 4, "responses": ["dog" * 60] * 4, "audio": clip}
    rows = mmau_rows(1000)
    rows[1]["raw_output"] = "<think>" + "It barks. " * 200 + "</think><answer>dog</answer>"
    results = tmp_path / "results"
    write_run(results / "run", rows, audio_dir=str(tmp_path / "clips"))
    log = [STEP | {"step": i} for i in range(1, 2001)]
    write_log(results / "run", log, [sample | row for row in log])
    report(results)
    data = page_data(results)
    samples = data["runs"]["run"]["samples"]
    assert samples[0]["audio"] == "../clips/caf%E9%20%231%3F.wav"
    assert 100 <= len(samples) <= 200 and samples[-1]["step"] == 2000
    questions = data["questions"]["mmau-mini"]
    assert questions["q0"]["audio"].startswith("../clips/")
    assert questions["q1"]["said"]["0"][0].endswith("It barks. </think><answer>dog</answer>")
    assert (results / "report.html").stat().st_size < 1_000_000


# ------------------------------------------------------------------------------------------------- the page


def drawn(page, actions="[]"):
    """{id: tree} of what the page's script draws, under node with a stand-in document, after actions as JSON."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    command = ["node", str(HERE / "scripts" / "page.js"), str(page), actions]
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


CARDS = r"""
good | 8.9B parameters · step 100 of 100 · 1.0 h · reshard
good | 25\.0 →  62\.5 .* \+37\.5 \[.*\], better, 0 lies outside
good | with audio 62.5; none 50.0, keeps 80 %
gamed | 0 lies within: it may be chance
gamed | reward and score part
deaf | in 10 steps no group's rewards differ
leaps | leaps to 27.9 at step 7
"""


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
    assert [run for run in logs if "healthy" in cards[run]] == ["good"]
    for case in CARDS.strip().splitlines():
        run, said = case.split(" | ")
        assert re.search(said, cards[run])


SAMPLE = """{"id": "a", "choices": ["<b>", "cat"], "answer": "<b>", "audio": "x.wav", "responses": ["<i>", "cat"],
             "rewards": [1.0, 0.0], "advantages": [0.7, -0.7]}"""
ACTIONS = """[["sample-slider", "value", "3", "oninput"], ["words", "value", "it, 1", "oninput"],
              ["group", "value", "task: sound", "onchange"], ["show", "value", "wrong, right", "onchange"]]"""


def test_the_page_draws_tables_curves_samples_and_questions_and_nothing_in_them_is_html(tmp_path):
    rows = mmau_rows(250)
    rows[0] |= {"question": HOSTILE, "choices": [HOSTILE, "cat"], "answer": HOSTILE}
    write_run(tmp_path / "base-omni", rows)
    after = rows[:1] + mmau_rows(250, right=lambda i: i % 2 == 0)[1:]
    write_run(tmp_path / "<script>", after, model="<script>/model")
    steps = [STEP | {"step": i, "reward": 0.5} for i in range(1, 200)]
    steps.append(json.loads('{"step": 100, "eval_accuracy": 0.6, "eval_low": 0.5, "eval_high": 0.7}'))
    samples = [json.loads(SAMPLE) | {"question": HOSTILE, "step": i} for i in range(1, 6)]
    samples[0]["rewards"] = [0.0, 0.0]  # teaches nothing
    write_log(tmp_path / "<script>", steps, samples)
    report(tmp_path)
    path = tmp_path / "report.html"
    slot = re.compile(r'(?<=id="data">).*?(?=</script>)', re.S)
    outside = slot.sub("", path.read_text())
    assert outside == slot.sub("", report_module.TEMPLATE.read_text())
    assert re.findall("http[^-].*", outside) == ['http://www.w3.org/2000/svg";']

    page = drawn(path)
    tables = words(page["table-list"])
    assert "paper 65.9" in tables and "15 rows of the paper alone" in tables
    assert {"74.8", "49.6"} <= set(words(page["group-table"]).split())  # 187 and 124 of 250
    assert len(elements(page["curve-panels"], "circle")) == 1
    assert words(page["sample-step"]) == "step 2, question a" and HOSTILE in words(page["sample"])
    assert words(elements(page["sample"], "pre")[0]) == "<i>"
    assert elements(page["sample"], "audio")[0][1]["src"].endswith("x.wav")
    assert words(page["count"]) == "187 of 250, 100 shown"  # they differ, but where i % 4 == 2

    page = drawn(path, ACTIONS)
    assert words(page["sample-step"]) == "step 4, question a"
    assert words(page["count"]) == "9 of 250, 9 shown"  # 12, 108, 120, ..., 192
    page = drawn(path, '[["show", "value", "", "onchange"], ["more", "id", "", "onclick"]]')
    assert words(page["count"]) == "250 of 250, 200 shown" and HOSTILE in words(page["list"])


CHROMIUM = "chromium chromium-browser google-chrome chrome chrome-headless-shell"
LOOK = """new Promise(done => document.readyState == "complete" ? done() : addEventListener("load", done)).then(() => {
  const wide = [...document.querySelectorAll("body *")].filter(one => !one.parentElement.closest(".scroll")
    && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.tagName + " " + one.id);
  const tops = ["cards", "curves", "samples", "questions", "tables"].map(id =>
    document.getElementById(id).getBoundingClientRect().top);
  return [document.documentElement.scrollWidth, wide, tops];
})"""


def looked_at(page, width, height, home):
    """What LOOK finds in a window of Chromium, which is asked through its debugging pipe: JSON that ends with a 0."""
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM.split())), None)
    if browser is None:
        pytest.skip("Chromium is not installed")
    flags = f"--headless --no-sandbox --no-zygote --single-process --disable-gpu --remote-debugging-pipe --user-data-dir={home}"
    theirs, ours = os.pipe()
    answers, said = os.pipe()
    start = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{said}', browser, *flags.split()]
    with subprocess.Popen(start, pass_fds=(theirs, said), stderr=subprocess.DEVNULL) as process:
        os.close(said)
        with open(answers, "rb") as heard:

            def ask(method, session=None, **params):
                message = {"id": 1, "method": method, "params": params}
                if session:
                    message["sessionId"] = session
                os.write(ours, json.dumps(message).encode() + b"\0")
                text = b""
                while '"id":1' not in text.decode():  # not an event
                    text = b"".join(iter(lambda: heard.read(1), b"\0"))
                return json.loads(text)["result"]

            target = ask("Target.createTarget", url="about:blank")["targetId"]
            session = ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            ask("Emulation.setDeviceMetricsOverride", session, **size)
            ask("Page.navigate", session, url=page.as_uri())
            found = ask("Runtime.evaluate", session, expression=LOOK, returnByValue=True, awaitPromise=True)
            process.kill()
    return found["result"]["value"]


@pytest.mark.slow
def test_in_a_browser_ones_own_run_comes_first_and_a_phone_shows_all(tmp_path):
    steps = [STEP | {"step": i, "reward": i / 100} for i in range(1, 101)]
    samples = [json.loads(SAMPLE) | {"question": HOSTILE, "step": i} for i in range(1, 6)]
    write_log(tmp_path / "mine", steps, samples)
    report(tmp_path)
    _, wide, (cards, curves, samples, questions, tables) = looked_at(
        tmp_path / "report.html", 1280, 800, tmp_path / "b"
    )
    assert not wide and cards < curves < 800 and curves < samples < tables
    write_run(tmp_path / "base-omni", mmau_rows())
    write_run(tmp_path / "mine", mmau_rows(right=lambda i: i < 20), model="mine")
    report(tmp_path)
    width, wide, _ = looked_at(tmp_path / "report.html", 390, 844, tmp_path / "c")
    assert width == 390 and not wide
