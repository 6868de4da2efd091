"""Predictions and logs -> accuracies with intervals, the paper's Tables I-IV with ours in them, a page.

    python report.py RESULTS                       (writes RESULTS/report.md and RESULTS/report.html)
    python report.py --score P.json                (accuracies by the official rule, with 95 % intervals)
    python report.py --compare A.json B.json       (the paired difference of two)

A run is a folder RESULTS/NAME with log.jsonl, samples.jsonl and predictions eval/BENCH.AUDIO.json, each with
its .meta. What the page looks like is in report.html alone, a template that opens by itself with sample
data, which is replaced here. Every number carries an interval: the published differences are often within
the noise of 1,000 questions.
"""

import argparse
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from data import Question, read_questions
from files import InputError, first_line, parse_json, read_text, rows_of, write_text
from reward import string_match

log = logging.getLogger("omni_r1")

# model | method | our run that fills the row, or - | the paper's numbers, column by column. A row of - alone
# is not the paper's, and is there once it was run.
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
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 73.6 74.3 66.1 71.3 74.1 70.8 68.7 71.2
Qwen2-Audio-7B-Instruct | AVQA (not in the paper) | qwen2audio-avqa | - - - - - - - -
Qwen2.5-Omni-7B | Zero-Shot-CoT (not in the paper) | base-omni-think | - - - - - - - -
Qwen2.5-Omni-7B | Omni-R1 (AVQA), LoRA (not in the paper) | omni-avqa-lora | - - - - - - - -
Qwen2.5-Omni-7B | Omni-R1 (AudioMCQ) (not in the paper) | omni-audiomcq | - - - - - - - -""",
    "II": """
Qwen2.5-Omni-7B | Direct Inference [2] | - | - - - - 74.7 68.6 76.0 73.1
Qwen2.5-Omni-7B | Reproduced | base-omni | 78.1 65.9 70.6 71.5 74.9 68.0 72.4 71.8
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 82.0 70.1 75.4 75.8 77.8 69.1 76.3 74.4
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 82.3 72.8 75.4 76.8 78.9 70.9 76.0 75.3
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 81.7 73.4 76.0 77.0 78.3 70.8 75.8 75.0
Qwen2.5-Omni-7B | Zero-Shot-CoT (not in the paper) | base-omni-think | - - - - - - - -
Qwen2.5-Omni-7B | Omni-R1 (AVQA), LoRA (not in the paper) | omni-avqa-lora | - - - - - - - -
Qwen2.5-Omni-7B | Omni-R1 (AudioMCQ) (not in the paper) | omni-audiomcq | - - - - - - - -""",
    "III": """
Gemini 2.0 Flash | Direct Inference [29] | gemini-2.0-flash | 61.2 51.0 72.1 81.8 72.5 65.9 70.8 65.6
GPT-4o Audio | Direct Inference [30] | gpt-4o-audio | 53.9 51.0 70.4 63.6 72.5 62.2 75.0 63.5
Qwen2-Audio-7B-Instruct | Direct Inference [8] | base-qwen2audio | 33.3 24.3 32.3 9.1 31.2 30.5 25.0 30.0
Qwen2.5-Omni-7B | Direct Inference [2] | - | 58.8 40.8 59.9 54.6 61.9 67.1 58.3 56.7
Qwen2.5-Omni-7B | Reproduced | base-omni | 61.2 47.6 59.5 54.6 61.5 61.0 66.7 58.0
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 63.6 51.5 62.2 72.7 65.1 62.2 70.8 61.2
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 58.8 53.4 65.0 45.5 66.1 63.4 66.7 61.5
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 67.3 51.5 64.3 45.5 70.2 64.6 70.8 63.4
Qwen2-Audio-7B-Instruct | AVQA (not in the paper) | qwen2audio-avqa | - - - - - - - -
Qwen2-Audio-7B-Instruct | Zero-Shot-CoT (not in the paper) | base-qwen2audio-think | - - - - - - - -
Qwen2-Audio-7B-Instruct | R1-AQA (not in the paper) | qwen2audio-r1aqa | - - - - - - - -
Qwen2.5-Omni-7B | Zero-Shot-CoT (not in the paper) | base-omni-think | - - - - - - - -
Qwen2.5-Omni-7B | Omni-R1 (AVQA), LoRA (not in the paper) | omni-avqa-lora | - - - - - - - -
Qwen2.5-Omni-7B | Omni-R1 (AudioMCQ) (not in the paper) | omni-audiomcq | - - - - - - - -""",
    "IV": """
Qwen2-Audio | - | base-qwen2audio | 52.7 30.5
Qwen2-Audio | AVQA, with audio | qwen2audio-avqa | 63.2 44.6
Qwen2-Audio | AVQA, without audio | qwen2audio-avqa-noaudio | 58.8 42.4
Qwen2-Audio | ARC-Easy, without audio | qwen2audio-arc | 60.2 42.2
Qwen2.5-Omni | - | base-omni | 65.9 49.3
Qwen2.5-Omni | AVQA, with audio | omni-avqa | 68.6 51.7
Qwen2.5-Omni | AVQA, without audio | omni-avqa-noaudio | 65.6 49.2
Qwen2.5-Omni | ARC-Easy, without audio | omni-arc | 68.2 51.7
Qwen2.5-Omni | Omni-R1 (AVQA), LoRA (not in the paper) | omni-avqa-lora | - -
Qwen2.5-Omni | Omni-R1 (AudioMCQ) (not in the paper) | omni-audiomcq | - -""",
}
# table | title | its columns: benchmarks x audio at inference x groups
TABLES = """
I | MMAU (original) | mmau-mini mmau-full | real | sound music speech all
II | MMAU (v05.15.25) | mmau-mini-v2 mmau-full-v2 | real | sound music speech all
III | MMAR | mmar | real | sound music speech mix-sound-music mix-sound-speech mix-music-speech mix-sound-music-speech all
IV | Fine-tuning with and without audio, MMAU test-mini (none: asked without audio) | mmau-mini | real none | all"""  # noqa: E501
# The columns that the formats' own scripts group by
GROUPS = """
task modality task_name difficulty category sub-category length_type question_type source_dataset dataset_name
audio-contribution sub-sub-category linguistics_sub_discipline perceptual_skills reasoning_skills"""
ANSWER_KEYS = ["answer_prediction", "model_prediction", "model_output"]  # the first that a row has counts
CURVES = """
step reward official hedged named_none kl entropy completion_length cut_ratio frac_reward_zero_std
eval_accuracy eval_low eval_high"""
LEARNED = ["reward", "official", "hedged", "kl", "eval_accuracy"]
ASKED = ["model", "adapter", "bench", "audio", "prompt", "orders"]  # of P.meta: which model, asked how
PAPERS_SIZE = 7e9  # parameters
SAMPLES = 200  # of a run on the page, evenly over its steps
LONGEST_ANSWER = 500  # characters of each answer on the page: its end, where <answer> stands
TEMPLATE = Path(__file__).with_name("report.html")
SLOT = '<script type="application/json" id="data">'
SCORES_HERE = "<!-- scores -->"  # in a model card: weights.py's, which imports torch

Accuracy = tuple[float, float, float, int]  # share, its interval's low and high end, number of questions
Scores = dict[tuple[str, str], Accuracy]  # by (column, group); ("all", "all") is the average


# ------------------------------------------------------------------------------------------------- statistics


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share right / total. (A bootstrap of 11 questions covers 68 %.)"""
    z = 1.959964
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
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(repeats)]
    low, high = np.percentile(means, [2.5, 97.5])
    return low, high


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value that a change which mended `better` and broke `worse` answers is by chance."""
    n = better + worse
    ways = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * ways / 2**n)


def percent(share: float, low: float, high: float, *_: int) -> str:
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


# ---------------------------------------------------------------------------------------------------- scoring


def answers(question: Question) -> list[str]:
    """What the model answered, once for each order of the choices that was asked; "" for no answer."""
    row = question.meta["source"]
    for key in ANSWER_KEYS:
        if key in row:
            return row.get("order_predictions") or [str(row[key] or "")]
    return [""]


def correct(question: Question) -> float:
    """Share of the orders in which the question was answered right, by the official rule; 0 or 1 for one."""
    right = [string_match(question.answer, text, question.choices) for text in answers(question)]
    return sum(right) / len(right)


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
    for column in GROUPS.split():
        names = question.meta["source"].get(column) or []
        if not isinstance(names, list):
            names = [names]
        found += [(column, str(name)) for name in names]
    return found


def score_questions(questions: list[Question]) -> Scores:
    """The accuracy in each group that the rows name, the average first; {} where the answers are hidden.

    Wilson's interval, or a bootstrap over questions where they were asked in several orders.
    """
    values: dict[tuple[str, str], list[float]] = {}
    several = False
    for question in questions:
        if question.answer is None:
            return {}
        value = correct(question)
        several = several or len(answers(question)) > 1
        for group in groups_of(question):
            values.setdefault(group, []).append(value)
    scores = {}
    for group, shares in sorted(values.items()):
        total = sum(shares)
        interval = bootstrap(shares) if several else wilson(total, len(shares))
        scores[group] = (total / len(shares), *interval, len(shares))
    return scores


def summary_lines(path: Path | str) -> list[str]:
    """A predictions file's accuracies as text; and how many questions got no answer, which count as wrong.

    Raises InputError if the right answers are hidden.
    """
    questions = read_predictions(path)
    lines = []
    for (column, group), numbers in score_questions(questions).items():
        name = "average" if column == "all" else f"{column}: {group}"
        lines.append(f"{name:45} {percent(*numbers)}  n = {numbers[3]}")
    if not lines:
        raise InputError(f"{path} holds no right answers (test-full): send it to the benchmark's server")
    given = [answers(question) for question in questions]
    alike = [len(set(texts)) == 1 for texts in given if len(texts) > 1]
    if alike:
        same = sum(alike)
        share = percent(same / len(alike), *wilson(same, len(alike)))
        lines.append(f"answered the same way in all orders: {share}")
    empty = sum(not texts[0] for texts in given)
    if empty:
        lines.append(f"{empty} of {len(given)} answers are empty, counted as wrong")
    return lines


def compare(first: Path | str, second: Path | str) -> str:
    """The paired difference of two predictions files of one benchmark, as text. Raises InputError."""
    found = paired(read_predictions(first), read_predictions(second))
    shares = [f"{100 * share:.1f}" for share in found["shares"]]
    return (
        f"{' -> '.join(shares)}, difference {percent(*found['difference'])}; {found['better']} better, "
        f"{found['worse']} worse of {found['n']}, McNemar p = {found['p']:.3g}"
    )


def paired(first: list[Question], second: list[Question]) -> dict[str, Any]:
    """Two models' answers to the same questions: what of them differs. Raises InputError."""
    if first[0].answer is None:
        raise InputError("these questions hide their answers, so there is nothing to compare")
    before = {question.id: correct(question) for question in first}
    after = {question.id: correct(question) for question in second}
    differ = before.keys() ^ after.keys()
    if differ:
        raise InputError(f"these files are not of the same questions ({len(differ)} differ)")
    gains = np.array([after[name] - before[name] for name in before])
    better = int((gains > 0).sum())
    worse = int((gains < 0).sum())
    return {
        "shares": [np.mean(list(before.values())), np.mean(list(after.values()))],
        "difference": [gains.mean(), *bootstrap(gains)],
        "better": better,
        "worse": worse,
        "n": len(gains),
        "p": mcnemar(better, worse),
    }


# ------------------------------------------------------------------------------------------- a folder of runs


@dataclass(frozen=True)
class Result:
    """A predictions file that evaluate.py wrote."""

    run: str
    bench: str
    audio: str  # what was heard: real, none, silence, swap
    path: Path
    about: dict[str, Any]  # its .meta
    questions: list[Question]
    scores: Scores

    @property
    def place(self) -> tuple[str, str, str]:
        return self.run, self.bench, self.audio

    @property
    def average(self) -> Accuracy | str:
        return self.scores.get(("all", "all"), "answers hidden")


def readable(paths: Iterable[Path], read: Callable) -> Iterator[Any]:
    """What `read` makes of each file; another program's, a damaged or unfinished one is named and left."""
    for path in sorted(paths):
        try:
            yield read(path)
        except Exception as error:
            log.warning("left out: %s: %s", path, first_line(error))


def find_results(folder: Path) -> list[Result]:
    """Every predictions file under `folder`, told by its .meta; what was heard comes first."""
    results: dict[tuple, Result] = {}
    for result in readable(folder.rglob("*.meta"), read_result):
        if result.place in results:  # a/p.json, b/p.json: no prediction hides another
            result = replace(result, run=str(result.path.relative_to(folder)))
        results[result.place] = result
    return sorted(results.values(), key=lambda result: result.audio != "real")


def read_result(meta: Path) -> Result:
    """RUN/eval/BENCH.AUDIO.json is RUN's; a predictions file of any other name gives the run its own."""
    about = parse_json(read_text(meta))
    path = meta.with_suffix(".json")
    if not path.is_file():
        path = meta.with_suffix("")  # predictions of another ending: P.txt and P.txt.meta
    questions = read_predictions(path, about.get("audio_dir") or os.path.dirname(about.get("data") or ""))
    run = path.parent.parent.name if path.parent.name == "eval" else path.stem
    scores = score_questions(questions)
    return Result(run, about["bench"], about["audio"], path, about, questions, scores)


def read_run(file: Path) -> tuple[str, dict[str, Any]]:
    """(name, what is drawn) of the run whose log.jsonl this is."""
    about = {}
    if file.with_name("config.json").exists():
        about = parse_json(read_text(file.with_name("config.json")))
    run: dict[str, Any] = {name: about.get(name) for name in ("model", "parameters", "layout", "steps")}
    run["log"] = []
    run["seconds"] = 0.0
    for row in rows_of(file):
        run["log"].append({key: float(row[key]) for key in CURVES.split() if key in row})
        run["seconds"] += sum(row[key] for key in row if key.startswith("seconds"))
    samples = rows_of(file.with_name("samples.jsonl"))
    stride = len(samples) // SAMPLES + 1
    run["samples"] = samples[::-stride][::-1]
    return file.parent.name, run


def clip_link(path: str | None, folder: Path) -> str | None:
    """A clip's address from the page, percent-encoded: its name may hold #, ? or bytes that are not UTF-8."""
    return quote(os.fsencode(os.path.relpath(path, folder))) if path else None


# --------------------------------------------------------------------------------------------- what is drawn


def fields_of(table: str) -> list[list[str]]:
    """The fields of each row of a table of PAPER, and of TABLES."""
    return [line.split(" | ") for line in table.strip().splitlines()]


def paper_tables(results: list[Result]) -> list[dict[str, Any]]:
    """Tables I-IV as {"title", "columns", "rows"}. A cell is a text, or [ours, the paper's number or "-"].

    Ours is an Accuracy, a text that says why there is none, or None for what was not run.
    """
    ours: dict[tuple, Accuracy | str] = {}
    for result in results:
        ours[(*result.place, "all")] = result.average
        for (column, group), numbers in result.scores.items():
            if column in ("task", "modality"):
                ours[(*result.place, group)] = numbers
    tables = []
    for name, title, benches, heard, groups in fields_of(TABLES):
        columns = list(product(benches.split(), heard.split(), groups.split()))
        rows = []
        for model, method, run, published in fields_of(PAPER[name]):
            cells = []
            for column, number in zip(columns, published.split(), strict=True):
                cells.append([ours.get((run, *column)), number])
            if cells.count([None, "-"]) < len(cells):
                rows.append([model, method, *cells])
        heads = [" ".join(column).replace(" real", "") for column in columns]
        tables.append(
            {"title": f"Table {name}: {title}", "columns": ["model", "method", *heads], "rows": rows}
        )
    return tables


def results_table(results: list[Result]) -> dict[str, Any]:
    rows = []
    for result in results:
        empty = sum(not answers(question)[0] for question in result.questions)
        rows.append([*result.place, [result.average, "-"], str(empty)])
    heads = ["run", "benchmark", "audio", "average", "without an answer"]
    return {"title": "All runs", "columns": heads, "rows": rows}


def curves_table(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means of the first and the last 20 rows (or quarter) of each run that have the number."""
    rows = []
    for run, found in runs.items():
        cells = [run]
        for key in LEARNED:
            values = [row[key] for row in found["log"] if key in row]
            count = min(20, (len(values) + 3) // 4)
            if values:
                values = [f"{np.mean(values[:count]):.3f} → {np.mean(values[-count:]):.3f}"]
            cells.append("".join(values))
        rows.append(cells)
    return {"title": "Learning: first → last 20 steps", "columns": ["run", *LEARNED], "rows": rows}


def markdown(table: dict[str, Any]) -> str:
    """A table as above in Markdown. A name that would break out of its cell, or is not UTF-8, cannot."""
    columns = table["columns"]
    lines = []
    for cells in [columns, ["---"] * len(columns), *table["rows"]]:
        line = "|"
        for cell in cells:
            line += f" {cell_text(cell)} |"
        lines.append(line.encode("utf-8", "replace").decode())
    return "\n".join(lines)


def cell_text(cell: str | list) -> str:
    if isinstance(cell, str):
        return cell.replace("|", "\\|")
    ours, published = cell
    text = ours or ""
    if isinstance(ours, tuple):
        text = f"**{percent(*ours)}**"
    if published != "-":
        text += f" ({published})"
    return text.strip()


def question_texts(results: list[Result], folder: Path) -> dict[str, Any]:
    """{benchmark: {id: what its question says}}; the page puts beside it what each run answered."""
    texts: dict[str, Any] = {}
    for result in results:
        page = texts.setdefault(result.bench, {})
        for question in result.questions:
            page[question.id] = {
                "question": question.question,
                "choices": question.choices,
                "answer": question.answer,
                "audio": clip_link(question.audio, folder),
                "groups": [": ".join(group) for group in groups_of(question)[1:]],
            }
    return texts


def result_row(result: Result, base: Result | None) -> dict[str, Any]:
    """A result as the page draws it; "said" is [id, answer, share of the orders answered right or None]."""
    said = []
    for question in result.questions:
        text = question.meta["source"].get("raw_output", answers(question)[0])
        right = None if question.answer is None else correct(question)
        said.append([question.id, text[-LONGEST_ANSWER:], right])
    run, bench, audio = result.place
    scores = [[*group, *numbers] for group, numbers in result.scores.items()]
    row = {"run": run, "bench": bench, "audio": audio, "scores": scores, "said": said}
    if base and result.scores:
        with suppress(InputError):  # of other questions
            row["gain"] = {"base": base.run, **paired(base.questions, result.questions)}
    return row


def base_of(result: Result, results: list[Result], runs: dict[str, dict[str, Any]]) -> Result | None:
    """What the run was trained from, asked the same in the same way; None where that was not asked."""
    asked = {**result.about, "model": runs.get(result.run, {}).get("model"), "adapter": None}
    for other in results:
        if all(other.about.get(key) == asked.get(key) for key in ASKED):
            return other
    return None


def notes(results: list[Result], runs: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each model that is not of the paper's size: beside the paper's numbers ours mislead."""
    sizes = {run["model"]: run["parameters"] for run in runs.values()}
    found: dict[str, None] = {}
    for result in results:
        model = str(runs.get(result.run, result.about).get("model"))
        size = sizes.get(model)
        is_papers = size is None and "7B" in model
        if not (result.about.get("url") or is_papers or (size or 0) >= PAPERS_SIZE):
            words = f"{result.run} is {model}, of {size or 'unknown'} parameters: not the paper's 7B model"
            found[words] = None
    return list(found)


def fill_cards(results: list[Result]) -> None:
    """Each run's scores into its model/README.md, after the mark, in place of the table that stood there."""
    for result in results:
        folder = result.path.parent
        card = folder.with_name("model") / "README.md"
        if folder.name == "eval" and card.is_file():
            head, mark, rest = read_text(card).partition(SCORES_HERE)
            own = [other for other in results if other.path.parent == folder]
            rest = re.sub(r"\A\n*(\|.*\n)*\n*", "", rest)
            if mark:
                write_text(card, f"{head}{mark}\n\n{markdown(results_table(own))}\n\n{rest}")


def page(data: dict[str, Any]) -> str:
    """report.html with `data` in the place of its sample; no text of it can end the script element."""
    before, slot, rest = read_text(TEMPLATE).partition(SLOT)
    _, end, after = rest.partition("</script>")
    text = json.dumps(data, separators=(",", ":"))  # in ASCII, so U+2028 and half characters are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return before + slot + text + end + after


def report(folder: Path | str) -> str:
    """Write report.md and report.html into `folder`, scores into model cards. Returns report.md's text."""
    folder = Path(os.path.abspath(folder))
    results = find_results(folder)
    logs = [*folder.glob("log.jsonl"), *folder.glob("*/log.jsonl")]
    runs = dict(readable(logs, read_run))
    if not results and not runs:
        raise InputError(f"{folder} has no log, and no predictions of evaluate.py (with their .meta file)")
    for run in runs.values():
        for sample in run["samples"]:
            sample["audio"] = clip_link(sample.get("audio"), folder)
    small = notes(results, runs)
    tables = [*paper_tables(results), results_table(results), curves_table(runs)]
    text = "# Results\n\nOurs in bold with its 95 % interval, the paper's in parentheses.\n"
    for note in small:
        text += f"\n**{note}**\n".encode("utf-8", "replace").decode()
    for table in tables:
        text += f"\n### {table['title']}\n\n{markdown(table)}\n"
    data = {"tables": tables, "notes": small, "runs": runs, "questions": question_texts(results, folder)}
    data["results"] = [result_row(result, base_of(result, results, runs)) for result in results]
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page(data))
    fill_cards(results)
    return text


# ------------------------------------------------------------------------------------- is a run's log healthy

WINDOW = 20  # steps of a moving average
DRIFT = 0.05  # by how much reward and official score may part
LEAP = 10.0  # a KL divergence, in nats a token, that no healthy run has
SIGNS = {
    "hedged": "naming several choices",
    "named_none": "naming none",
    "completion_length": "tokens of an answer",
}


def mean(rows: list[dict], name: str) -> float:
    return sum(row.get(name, 0.0) for row in rows) / len(rows)


def doubts(rows: list[dict], format_weight: float = 0.0) -> dict[str, str]:
    """What the last rows of the log give reason to doubt: name -> words.

    Reward and official score part where their distance has grown by more than DRIFT, from the first 10 steps
    to the last 20; only the growth counts, and not what --format_weight pays for the form.
    """
    told = {}
    first = rows[: WINDOW // 2]
    last = rows[-WINDOW:]
    recent = rows[-WINDOW // 2 :]
    if len(recent) == WINDOW // 2 and mean(recent, "frac_reward_zero_std") == 1:
        told["nothing"] = (
            f"nothing is learned: in {len(recent)} steps no group's rewards differ (reward "
            f"{mean(recent, 'reward'):.2f}; {mean(recent, 'named_none'):.0%} of the answers name no choice). "
            "Read samples.jsonl, and try --explain"
        )
    if rows[-1]["kl"] > LEAP:
        told["leap"] = f"the KL divergence leaps to {rows[-1]['kl']:.1f}: a smaller --lr, or a larger --beta"
    gaps = []
    for some in (first, last):
        gaps.append(mean(some, "reward") - format_weight * mean(some, "asked_form") - mean(some, "official"))
    if len(rows) >= WINDOW and gaps[1] - gaps[0] > DRIFT:
        reasons = []
        for name, what in SIGNS.items():
            reasons.append(f"{what} {mean(first, name):.2f} -> {mean(last, name):.2f}")
        told["drift"] = (
            f"reward and score part: over the last {WINDOW} steps the reward is {mean(last, 'reward'):.2f}, "
            f"but the benchmarks' rule finds {mean(last, 'official'):.2f} of the answers right "
            f"({'; '.join(reasons)}). Read samples.jsonl; --reward official pays what the score counts"
        )
    return told


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
