"""Predictions and logs -> accuracies by the official rule, the paper's Tables I-IV with ours, and a page.

    python report.py results                       (writes results/report.md and results/report.html)
    python report.py --score P.json | --compare A.json B.json

A run is a folder results/NAME with log.jsonl, samples.jsonl and predictions eval/BENCH.AUDIO.json, each with
its .meta. Every number carries a 95 % interval: the published differences are often within the noise of 1,000
questions. What the page looks like is in report.html alone, a template that opens by itself with sample data,
which is replaced here. Nothing here needs torch.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from data import Question, read_questions
from files import InputError, parse_json, read_text, rows_of, write_text
from reward import string_match

log = logging.getLogger("omni_r1")

# The columns that the formats' own scripts group by
GROUPS = ["task", "modality", "task_name", "difficulty", "category", "sub-category", "length_type"]
GROUPS += ["question_type", "source_dataset", "dataset_name", "audio-contribution", "sub-sub-category"]
GROUPS += ["linguistics_sub_discipline", "perceptual_skills", "reasoning_skills"]
ANSWER_KEYS = ["answer_prediction", "model_prediction", "model_output"]  # the first that a row has counts

Accuracy = tuple[float, float, float, int]  # share, its interval's low and high end, number of questions
Scores = dict[tuple[str, str], Accuracy]  # by (column, group); ("all", "all") is the average

# model | method | our run that fills the row, or - | the paper's numbers, column by column
PAPER = {
    "I": """
- | Human [4] | - | 86.3 78.2 82.2 82.2 - - - -
Audio Flamingo 2 | Direct Inference [13] | audio-flamingo-2 | 61.6 74.0 30.9 55.5 65.1 72.9 40.3 59.4
Phi-4 Multi-Modal | Direct Inference [14] | phi-4-multimodal | 61.0 52.9 52.8 55.6 - - - -
GPT-4o Voice Model | Direct Inference [15] | gpt-4o-audio | 63.4 60.8 53.2 59.1 - - - -
Qwen2-Audio-7B-Instruct | Direct Inference [8] | - | 55.0 51.0 42.0 49.2 45.9 53.3 45.9 52.5
Qwen2-Audio-7B-Instruct | Reproduced [8] | base-qwen2audio | 61.6 54.5 42.0 52.7 - - - -
Qwen2-Audio-7B-Instruct | Zero-Shot-CoT [16] | base-qwen2audio-think | 61.9 56.3 55.3 57.8 - - - -
Qwen2-Audio-7B-Instruct | CoTA [11] | - | 60.1 64.3 60.7 61.7 - - - -
Qwen2-Audio-7B-Instruct | R1-AQA [7] | qwen2audio-r1aqa | 68.8 64.3 63.7 65.6 69.8 61.4 62.7 64.4
Kimi-Audio | Direct Inference [17] | kimi-audio | 73.3 61.7 60.7 65.2 - - - -
Qwen2.5-Omni-7B | Direct Inference [2] | - | 67.9 69.2 59.8 65.6 - - - -
Qwen2.5-Omni-7B | Reproduced | base-omni | 69.4 66.8 61.6 65.9 71.6 67.1 66.5 68.4
Qwen2.5-Omni-7B | SARI [9] | - | 72.8 67.2 61.3 67.1 - - - -
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 70.9 70.1 64.9 68.6 73.6 68.6 70.1 70.8
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 72.4 73.1 64.3 69.9 74.3 70.2 69.2 71.2
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 73.6 74.3 66.1 71.3 74.1 70.8 68.7 71.2""",
    "II": """
Qwen2.5-Omni-7B | Direct Inference [2] | - | - - - - 74.7 68.6 76.0 73.1
Qwen2.5-Omni-7B | Reproduced | base-omni | 78.1 65.9 70.6 71.5 74.9 68.0 72.4 71.8
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 82.0 70.1 75.4 75.8 77.8 69.1 76.3 74.4
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 82.3 72.8 75.4 76.8 78.9 70.9 76.0 75.3
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 81.7 73.4 76.0 77.0 78.3 70.8 75.8 75.0""",
    "III": """
Gemini 2.0 Flash | Direct Inference [29] | gemini-2.0-flash | 61.2 51.0 72.1 81.8 72.5 65.9 70.8 65.6
GPT-4o Audio | Direct Inference [30] | gpt-4o-audio | 53.9 51.0 70.4 63.6 72.5 62.2 75.0 63.5
Qwen2-Audio-7B-Instruct | Direct Inference [8] | base-qwen2audio | 33.3 24.3 32.3 9.1 31.2 30.5 25.0 30.0
Qwen2.5-Omni-7B | Direct Inference [2] | - | 58.8 40.8 59.9 54.6 61.9 67.1 58.3 56.7
Qwen2.5-Omni-7B | Reproduced | base-omni | 61.2 47.6 59.5 54.6 61.5 61.0 66.7 58.0
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 63.6 51.5 62.2 72.7 65.1 62.2 70.8 61.2
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 58.8 53.4 65.0 45.5 66.1 63.4 66.7 61.5
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 67.3 51.5 64.3 45.5 70.2 64.6 70.8 63.4""",
    "IV": """
Qwen2-Audio | - | base-qwen2audio | 52.7 30.5
Qwen2-Audio | AVQA, with audio | qwen2audio-avqa | 63.2 44.6
Qwen2-Audio | AVQA, without audio | qwen2audio-avqa-noaudio | 58.8 42.4
Qwen2-Audio | ARC-Easy, without audio | qwen2audio-arc | 60.2 42.2
Qwen2.5-Omni | - | base-omni | 65.9 49.3
Qwen2.5-Omni | AVQA, with audio | omni-avqa | 68.6 51.7
Qwen2.5-Omni | AVQA, without audio | omni-avqa-noaudio | 65.6 49.2
Qwen2.5-Omni | ARC-Easy, without audio | omni-arc | 68.2 51.7""",
}
# Rows that the paper does not have: tables | model | method | our run
MORE = """
I III | Qwen2-Audio-7B-Instruct | AVQA | qwen2audio-avqa
III | Qwen2-Audio-7B-Instruct | Zero-Shot-CoT | base-qwen2audio-think
III | Qwen2-Audio-7B-Instruct | R1-AQA | qwen2audio-r1aqa
I II III | Qwen2.5-Omni-7B | Zero-Shot-CoT | base-omni-think
I II III IV | Qwen2.5-Omni-7B | Omni-R1 (AVQA), LoRA | omni-avqa-lora
I II III IV | Qwen2.5-Omni-7B | Omni-R1 (AudioMCQ) | omni-audiomcq"""
KINDS = ["sound", "music", "speech"]
MIXES = ["mix-sound-music", "mix-sound-speech", "mix-music-speech", "mix-sound-music-speech"]
COLUMNS = {  # table -> (title, (benchmark, audio at inference, group) of each column)
    "I": ("MMAU (original)", list(product(["mmau-mini", "mmau-full"], ["real"], [*KINDS, "all"]))),
    "II": ("MMAU (v05.15.25)", list(product(["mmau-mini-v2", "mmau-full-v2"], ["real"], [*KINDS, "all"]))),
    "III": ("MMAR", list(product(["mmar"], ["real"], [*KINDS, *MIXES, "all"]))),
    "IV": (
        "Fine-tuning with and without audio, MMAU test-mini",
        list(product(["mmau-mini"], ["real", "none"], ["all"])),
    ),
}
CURVES = ["step", "reward", "official", "hedged", "named_none", "kl", "entropy", "completion_length"]
CURVES += ["eval_accuracy", "eval_low", "eval_high"]
SAMPLES = 200  # of a run on the page, evenly over its steps
LONGEST_ANSWER = 500  # characters of each answer on the page: its end, where <answer> stands
TEMPLATE = Path(__file__).with_name("report.html")
SLOT = '<script type="application/json" id="data">'
SCORES_HERE = "<!-- scores -->"  # in a model card, which weights.py writes


# ------------------------------------------------------------------------------------------------- statistics


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share right / total. (A bootstrap of 11 questions covers 68 %.)"""
    z = 1.959964
    if not total:
        return 0.0, 1.0
    share = right / total
    spread = z * z / total
    middle = share + spread / 2
    variance = share * (1 - share) / total
    half = z * math.sqrt(variance + spread / (4 * total))
    low = (middle - half) / (1 + spread)
    high = (middle + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def bootstrap(values: Sequence[float], repeats: int = 2000, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of (n,) values, one a question, over resampled questions."""
    values = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    means = np.empty(repeats)
    for i in range(repeats):
        sample = rng.integers(0, len(values), len(values))
        means[i] = values[sample].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value that a change which mended `better` and broke `worse` answers is by chance."""
    n = better + worse
    ways = 0
    for k in range(min(better, worse) + 1):
        ways += math.comb(n, k)
    return min(1.0, 2 * ways / 2**n)


def percent(share: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


# ---------------------------------------------------------------------------------------------------- scoring


def answers(question: Question) -> list[str]:
    """What the model answered, once for each order of the choices that was asked; "" for no answer."""
    row = question.meta["source"]
    orders = row.get("order_predictions")
    if isinstance(orders, list) and orders:
        return list(map(str, orders))
    for key in ANSWER_KEYS:
        if isinstance(row.get(key), str):
            return [row[key]]
    return [""]


def correct(question: Question) -> float:
    """Share of the orders in which the question was answered right, by the official rule; 0 or 1 for one."""
    given = answers(question)
    right = 0
    for text in given:
        right += string_match(question.answer, text, question.choices)
    return right / len(given)


def read_predictions(path: Path | str, audio_dir: str | None = None) -> list[Question]:
    """Questions with the answers given in their rows. Raises InputError if no row has one."""
    questions = read_questions(path, audio_dir)
    for question in questions:
        if not question.meta["source"].keys().isdisjoint(ANSWER_KEYS):
            return questions
    raise InputError(f"{path} holds questions without predictions: give what evaluate.py --out wrote")


def groups_of(question: Question) -> list[tuple[str, str]]:
    """The (column, group) pairs that a question counts in. A row may give its group in a list."""
    found = [("all", "all")]
    for column in GROUPS:
        names = question.meta["source"].get(column)
        if not isinstance(names, list):
            names = [names]
        for name in names:
            if isinstance(name, str):
                found.append((column, name))
    return found


def score_questions(questions: list[Question]) -> Scores:
    """`score` of questions that are read already; {} if they hide their answers."""
    values: dict[tuple[str, str], list[float]] = {}
    several = False
    for question in questions:
        if question.answer is None:
            continue
        value = correct(question)
        several = several or len(answers(question)) > 1
        for group in groups_of(question):
            values.setdefault(group, []).append(value)
    summary = {}
    for group, shares in sorted(values.items()):
        total = sum(shares)
        interval = wilson(total, len(shares))
        if several:
            interval = bootstrap(shares)
        summary[group] = (total / len(shares), *interval, len(shares))
    return summary


def score(path: Path | str) -> Scores:
    """A predictions file's accuracy in each group that its rows name, the average first.

    Wilson's interval, or a bootstrap over questions where they were asked in several orders. Raises
    InputError if the answers are hidden.
    """
    summary = score_questions(read_predictions(path))
    if not summary:
        raise InputError(f"{path} holds no right answers (test-full): send it to the benchmark's server")
    return summary


def summary_lines(path: Path | str) -> list[str]:
    """What `score` found, as text; and how many questions got no answer, which count as wrong."""
    lines = []
    for (column, group), numbers in score(path).items():
        name = f"{column}: {group}"
        if column == "all":
            name = "average"
        lines.append(f"{name:45} {percent(numbers[0], numbers[1:3])}  n = {numbers[3]}")
    questions = read_predictions(path)
    empty = 0
    orders = []
    for question in questions:
        given = answers(question)
        empty += not given[0]
        if len(given) > 1:
            orders.append(len(set(given)) == 1)
    if orders:
        same = sum(orders)
        share = percent(same / len(orders), wilson(same, len(orders)))
        lines.append(f"answered the same way in all orders: {share}")
    if empty:
        lines.append(f"{empty} of {len(questions)} answers are empty, counted as wrong")
    return lines


def compare(first: Path | str, second: Path | str) -> str:
    """The paired difference of two predictions files of one benchmark, as text."""
    before = correct_by_id(first)
    after = correct_by_id(second)
    differ = before.keys() ^ after.keys()
    if differ:
        raise InputError(f"{first} and {second} are not of the same questions ({len(differ)} differ)")
    gains = np.array([after[name] - before[name] for name in before])
    better = int((gains > 0).sum())
    worse = int((gains < 0).sum())
    shares = []
    for side in (before, after):
        shares.append(f"{100 * np.mean(list(side.values())):.1f}")
    return (
        f"{' -> '.join(shares)}, difference {percent(gains.mean(), bootstrap(gains))}; "
        f"{better} better, {worse} worse of {len(gains)}, McNemar p = {mcnemar(better, worse):.3g}"
    )


def correct_by_id(path: Path | str) -> dict[str, float]:
    values = {}
    for question in read_predictions(path):
        if question.answer is None:
            raise InputError(f"{path} holds no right answers, so there is nothing to compare")
        values[question.id] = correct(question)
    return values


# ----------------------------------------------------------------------------------------- the paper's tables


def paper_rows(table: str) -> Iterator[tuple[str, str, str | None, list[float | None]]]:
    """(model, method, our run that fills the row or None, the paper's numbers or None) of each row."""
    for line in PAPER[table].strip().splitlines():
        model, method, run, numbers = line.split(" | ")
        published = [None if number == "-" else float(number) for number in numbers.split()]
        yield model, method, None if run == "-" else run, published


# ------------------------------------------------------------------------------------------- a folder of runs


@dataclass(frozen=True)
class Result:
    """A predictions file that evaluate.py wrote."""

    run: str
    bench: str
    audio: str  # what was heard: real, none, silence, swap
    path: Path
    questions: list[Question]
    scores: Scores
    status: str  # why there are no scores; "" where there are


def find_results(folder: Path) -> list[Result]:
    """RUN/eval/BENCH.AUDIO.json, or any other name, which is then the run's; told by the .meta beside it.

    A name that is taken (a/p.json, b/p.json) gives way to the whole path: no prediction hides another.
    """
    results = []
    taken = set()
    for meta in sorted(folder.rglob("*.meta"), key=lambda path: (len(path.parts), path)):
        about = read_about(meta)
        path = meta.with_suffix(".json")
        if not path.is_file():
            path = meta.with_suffix("")  # predictions of another ending: P.txt and P.txt.meta
        if not about or not path.is_file():
            log.warning("left out: %s is not of a finished evaluation", meta)
            continue
        audio = about["audio"]
        bench = about["bench"]
        run = path.stem
        if path.parent.name == "eval":
            run = path.parent.parent.name
        if (run, bench, audio) in taken:
            run = str(path.relative_to(folder))
        taken.add((run, bench, audio))
        status = ""
        questions = []
        try:
            questions = read_predictions(path, about["audio_dir"])
        except InputError as error:
            status = "cannot be read"
            log.warning("no score: %s", error)
        scores = score_questions(questions)
        if questions and not scores:
            status = "answers hidden"  # MMAU's test-full hides its answers
        results.append(Result(run, bench, audio, path, questions, scores, status))
    return sorted(results, key=lambda result: result.audio != "real")  # what was heard comes first


def read_about(meta: Path) -> dict[str, str]:
    """What evaluate.py noted beside its predictions, {} if it did not write the file."""
    try:
        about = parse_json(read_text(meta))
        folder = about["audio_dir"] or os.path.dirname(about["data"])  # as read_questions looks for clips
        return {
            "bench": str(about["bench"]),
            "audio": str(about["audio"]),
            "audio_dir": str(folder),
        }
    except (InputError, ValueError, TypeError, KeyError):
        return {}


def find_runs(folder: Path) -> dict[str, Path]:
    """{run: its folder} of each that train.py wrote a log or samples to."""
    runs = {}
    for place in [folder, *sorted(folder.glob("*/"))]:
        if (place / "log.jsonl").is_file() or (place / "samples.jsonl").is_file():
            runs[place.name] = place
    return runs


def read_log(run: Path) -> list[dict[str, float]]:
    """What is drawn of the rows of the steps, and of the rows with held-out scores between them."""
    rows = []
    for row in rows_of(run / "log.jsonl"):
        drawn = {}
        for key in CURVES:
            value = row.get(key)
            if isinstance(value, int | float) and abs(value) < 1e300:
                drawn[key] = value
        if "step" in drawn:
            rows.append(drawn)
    return rows


def read_samples(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Some of a run's samples, as train.py wrote them but for their clips' addresses."""
    rows = rows_of(run / "samples.jsonl")
    places = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLES))
    samples = []
    for place in places.astype(int):
        row = rows[place]
        samples.append({**row, "audio": clip_link(row.get("audio"), folder)})
    return samples


def clip_link(path: Any, folder: Path) -> str | None:
    """A clip's address from the page, percent-encoded: its name may hold #, ? or bytes that are not UTF-8."""
    try:
        return quote(os.fsencode(os.path.relpath(path, folder)))
    except (TypeError, ValueError):
        return None


# --------------------------------------------------------------------------------------------- what is drawn


def paper_tables(results: list[Result]) -> list[dict[str, Any]]:
    """Tables I-IV as {"title", "columns", "rows"}. A cell is a text, or [ours, the paper's number or None].

    Ours is an Accuracy, a text that says why there is none, or None for what was not run.
    """
    ours: dict[tuple, Accuracy | str] = {}
    for result in results:
        place = (result.run, result.bench, result.audio)
        ours[(*place, "all")] = result.status
        for (column, group), numbers in result.scores.items():
            if column in ("all", "task", "modality"):
                ours[(*place, group)] = numbers
    runs = {result.run for result in results}
    tables = []
    for name, (title, columns) in COLUMNS.items():
        rows = list(paper_rows(name))
        for line in MORE.strip().splitlines():
            names, model, method, run = line.split(" | ")
            if name in names.split() and run in runs:
                rows.append((model, f"{method} (not in the paper)", run, [None] * len(columns)))
        heads = [f"{bench} {group}" for bench, _, group in columns]
        if name == "IV":
            heads = ["with audio", "without audio"]
        drawn = []
        for model, method, run, published in rows:
            cells = [model, method]
            for column, number in zip(columns, published, strict=True):
                cells.append([ours.get((run, *column)), number])
            drawn.append(cells)
        tables.append(
            {"title": f"Table {name}: {title}", "columns": ["model", "method", *heads], "rows": drawn}
        )
    return tables


def results_table(results: list[Result]) -> dict[str, Any]:
    rows = []
    for result in results:
        average = result.scores.get(("all", "all"), result.status)
        empty = sum(not answers(question)[0] for question in result.questions)
        rows.append([result.run, result.bench, result.audio, [average, None], str(empty)])
    heads = ["run", "benchmark", "audio", "average", "without an answer"]
    return {"title": "All runs", "columns": heads, "rows": rows}


def curves_table(logs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Means of each run's first and last 20 steps (or quarter); its first and last held-out score."""
    averaged = {"reward": 20, "official": 20, "hedged": 20, "kl": 20, "eval_accuracy": 1}
    rows = []
    for run, steps in logs.items():
        cells = [run]
        for key, count in averaged.items():
            values = [row[key] for row in steps if key in row]
            cells.append("")
            count = min(count, (len(values) + 3) // 4)
            if values:
                cells[-1] = f"{np.mean(values[:count]):.3f} → {np.mean(values[-count:]):.3f}"
        rows.append(cells)
    return {"title": "Learning: first → last 20 steps", "columns": ["run", *averaged], "rows": rows}


def markdown(table: dict[str, Any]) -> str:
    """A table as above in Markdown. A name that would break out of its cell, or is not UTF-8, cannot."""
    columns = table["columns"]
    lines = []
    for cells in [columns, ["---"] * len(columns), *table["rows"]]:
        texts = []
        for cell in cells:
            if isinstance(cell, list):
                cell = cell_text(*cell)
            texts.append(cell.replace("\n", " ").replace("|", "\\|"))
        lines.append(f"| {' | '.join(texts)} |".encode("utf-8", "replace").decode())
    return "\n".join(lines)


def cell_text(ours: Accuracy | str | None, published: float | None) -> str:
    text = ours or ""
    if isinstance(ours, tuple):
        text = f"**{percent(ours[0], ours[1:3])}**"
    if published is not None:
        text += f" ({published})"
    return text.strip()


def question_pages(results: list[Result], folder: Path) -> dict[str, Any]:
    """{benchmark: {"runs", "questions"}}: each question once, with what each run said."""
    pages: dict[str, Any] = {}
    for result in results:
        page = pages.setdefault(result.bench, {"runs": [], "questions": {}})
        column = len(page["runs"])
        page["runs"].append(f"{result.run}, audio {result.audio}")
        for question in result.questions:
            key = (question.id, question.question, question.choices)
            row = page["questions"].setdefault(key, {"audio": None, "said": {}, "right": {}})
            row["id"], row["question"], row["choices"] = key
            row["answer"] = question.answer
            row["groups"] = [": ".join(group) for group in groups_of(question)[1:]]
            said = question.meta["source"].get("raw_output", answers(question)[0])
            row["said"][column] = str(said)[-LONGEST_ANSWER:]
            if question.answer is not None:
                row["right"][column] = correct(question)
            if result.audio == "real":
                row["audio"] = clip_link(question.audio, folder)
    for page in pages.values():
        page["questions"] = list(page["questions"].values())
    return pages


def fill_cards(results: list[Result]) -> None:
    """Each run's scores into its model/README.md, after the mark, in place of the table that stood there."""
    cards: dict[Path, list[Result]] = {}
    for result in results:
        card = result.path.parent.parent / "model" / "README.md"
        if result.path.parent.name == "eval" and card.is_file():
            cards.setdefault(card, []).append(result)
    for card, own in cards.items():
        try:
            head, mark, rest = read_text(card).partition(SCORES_HERE)
        except InputError as error:
            log.warning("no scores into it: %s", error)
            continue
        lines = rest.split("\n")
        while lines and (not lines[0] or lines[0].startswith("|")):
            lines.pop(0)
        if mark:
            write_text(card, "\n".join([head + mark, "", markdown(results_table(own)), "", *lines]))


def page(data: dict[str, Any]) -> str:
    """report.html with `data` in the place of its sample; no text of it can end the script element."""
    before, slot, rest = read_text(TEMPLATE).partition(SLOT)
    _, end, after = rest.partition("</script>")
    if not end:
        raise InputError(f"{TEMPLATE} has lost its slot for the data: {SLOT}…</script>")
    finite = json.loads(json.dumps(data), parse_constant=lambda name: None)  # 1e999, infinity: no JSON
    text = json.dumps(finite, separators=(",", ":"))  # in ASCII, so U+2028 and half characters are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return before + slot + text + end + after


def report(folder: Path | str) -> str:
    """Write report.md and report.html into `folder`, scores into model cards. Returns report.md's text."""
    folder = Path(os.path.abspath(folder))
    results = find_results(folder)
    runs = find_runs(folder)
    if not results and not runs:
        raise InputError(
            f"{folder} has no log, and no predictions that evaluate.py wrote (with their .meta file)"
        )
    logs = {run: read_log(path) for run, path in runs.items()}
    tables = [*paper_tables(results), results_table(results), curves_table(logs)]
    text = "# Results\n\nOurs in bold with its 95 % interval, the paper's in parentheses.\n"
    for table in tables:
        text += f"\n### {table['title']}\n\n{markdown(table)}\n"
    data = {"tables": tables, "logs": logs, "questions": question_pages(results, folder)}
    data["samples"] = {run: read_samples(path, folder) for run, path in runs.items()}
    data["results"] = []
    for result in results:
        scores = [[*group, *numbers] for group, numbers in result.scores.items()]
        about = {
            "run": result.run,
            "bench": result.bench,
            "audio": result.audio,
            "status": result.status,
        }
        data["results"].append({**about, "scores": scores})
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page(data))
    fill_cards(results)
    return text


# ---------------------------------------------------------------------------------------------------- options


def main() -> None:
    logging.basicConfig(format="%(message)s")
    sys.stdout.reconfigure(errors="replace")  # a file's name need not be UTF-8
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    add("results", nargs="?", help="a folder of runs: write the paper's tables and a page into it")
    add("--score", metavar="P", help="print the accuracies of a predictions file")
    add("--compare", nargs=2, metavar=("A", "B"), help="print the paired difference of two")
    args = parser.parse_args()
    try:
        if args.score:
            print(*summary_lines(args.score), sep="\n")
        elif args.compare:
            print(compare(*args.compare))
        elif args.results:
            print(report(args.results))
        else:
            parser.error("give a folder of runs, --score or --compare")
    except (InputError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
