"""Predictions and logs -> accuracies with intervals, the paper's Tables I-IV with ours in them, a page.

    python report.py RESULTS                       (writes RESULTS/report.md and RESULTS/report.html)
    python report.py --score P.json                (accuracies by the official rule, with 95 % intervals)
    python report.py --compare A.json B.json       (the paired difference of two)
    python report.py --need REAL.json SILENT.json  (how much of a model's score needs the audio)
    python report.py --split P.json ... --out DIR  (the questions never, sometimes and always answered right)

A run is a folder RESULTS/NAME with log.jsonl, samples.jsonl and predictions eval/BENCH.AUDIO.json, each with
its .meta. What the page looks like is in report.html alone, a template that opens by itself with sample
data, which is replaced here.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np

from data import Question, questions_hash, read_questions
from files import (
    InputError,
    Parser,
    first_line,
    parse_json,
    read_text,
    rows_of,
    run_program,
    write_rows,
    write_text,
)
from reward import string_match

log = logging.getLogger("omni_r1")

# Each table's head: its columns' "benchmark group", "none" between for the questions asked without audio.
# Its rows: model | method | our run that fills it, or - | the paper's numbers.
PAPER = {
    "Table I: MMAU (original)": """
model | method | run | mmau-mini task: sound, mmau-mini task: music, mmau-mini task: speech, mmau-mini all, \
mmau-full task: sound, mmau-full task: music, mmau-full task: speech, mmau-full all
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
    "Table II: MMAU (v05.15.25)": """
model | method | run | mmau-mini-v2 task: sound, mmau-mini-v2 task: music, mmau-mini-v2 task: speech, \
mmau-mini-v2 all, mmau-full-v2 task: sound, mmau-full-v2 task: music, mmau-full-v2 task: speech, \
mmau-full-v2 all
Qwen2.5-Omni-7B | Direct Inference [2] | - | - - - - 74.7 68.6 76.0 73.1
Qwen2.5-Omni-7B | Reproduced | base-omni | 78.1 65.9 70.6 71.5 74.9 68.0 72.4 71.8
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 82.0 70.1 75.4 75.8 77.8 69.1 76.3 74.4
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 82.3 72.8 75.4 76.8 78.9 70.9 76.0 75.3
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 81.7 73.4 76.0 77.0 78.3 70.8 75.8 75.0""",
    "Table III: MMAR": """
model | method | run | mmar modality: sound, mmar modality: music, mmar modality: speech, \
mmar modality: mix-sound-music, mmar modality: mix-sound-speech, mmar modality: mix-music-speech, \
mmar modality: mix-sound-music-speech, mmar all
Gemini 2.0 Flash | Direct Inference [29] | gemini-2.0-flash | 61.2 51.0 72.1 81.8 72.5 65.9 70.8 65.6
GPT-4o Audio | Direct Inference [30] | gpt-4o-audio | 53.9 51.0 70.4 63.6 72.5 62.2 75.0 63.5
Qwen2-Audio-7B-Instruct | Direct Inference [8] | base-qwen2audio | 33.3 24.3 32.3 9.1 31.2 30.5 25.0 30.0
Qwen2.5-Omni-7B | Direct Inference [2] | - | 58.8 40.8 59.9 54.6 61.9 67.1 58.3 56.7
Qwen2.5-Omni-7B | Reproduced | base-omni | 61.2 47.6 59.5 54.6 61.5 61.0 66.7 58.0
Qwen2.5-Omni-7B | Omni-R1 (AVQA) | omni-avqa | 63.6 51.5 62.2 72.7 65.1 62.2 70.8 61.2
Qwen2.5-Omni-7B | Omni-R1 (AVQA-GPT) | omni-avqa-gpt | 58.8 53.4 65.0 45.5 66.1 63.4 66.7 61.5
Qwen2.5-Omni-7B | Omni-R1 (VGGS-GPT) | omni-vggs-gpt | 67.3 51.5 64.3 45.5 70.2 64.6 70.8 63.4""",
    "Table IV: Fine-tuning with and without audio, MMAU test-mini (none: asked without audio)": """
model | method | run | mmau-mini all, mmau-mini none all
Qwen2-Audio | - | base-qwen2audio | 52.7 30.5
Qwen2-Audio | AVQA, with audio | qwen2audio-avqa | 63.2 44.6
Qwen2-Audio | AVQA, without audio | qwen2audio-avqa-noaudio | 58.8 42.4
Qwen2-Audio | ARC-Easy, without audio | qwen2audio-arc | 60.2 42.2
Qwen2.5-Omni | - | base-omni | 65.9 49.3
Qwen2.5-Omni | AVQA, with audio | omni-avqa | 68.6 51.7
Qwen2.5-Omni | AVQA, without audio | omni-avqa-noaudio | 65.6 49.2
Qwen2.5-Omni | ARC-Easy, without audio | omni-arc | 68.2 51.7""",
}
# The columns that the formats' own scripts group by
GROUPS = """
task modality task_name difficulty category sub-category length_type question_type source_dataset dataset_name
audio-contribution sub-sub-category linguistics_sub_discipline perceptual_skills reasoning_skills"""
# The keys that evaluate.py adds to a row
OURS = "answer_prediction response model_output model_prediction raw_output order_predictions"
ANSWER_KEYS = ["answer_prediction", "model_prediction", "model_output"]  # the first that a row has counts
HEARD = ["real", "silence", "none", "swap"]  # evaluate.py --audio
CURVES = """
step reward official hedged named_none kl entropy completion_length cut_ratio frac_reward_zero_std
eval_accuracy eval_low eval_high"""
ASKED = "model adapter bench audio prompt orders"  # of P.meta: which model, asked how
PAPERS_SIZE = 8.5e9  # parameters, the audio tower among them
RESAMPLED = 2000  # times, by a bootstrap
SAMPLES = 200  # of a run on the page, evenly over its steps
WINDOW = 20  # steps of a moving average
DRIFT = 0.05  # by how much reward and official score may part
LEAP = 10.0  # a KL divergence, in nats a token, that no healthy run has
LONGEST_ANSWER = 500  # characters of each answer on the page: its end, where <answer> stands
TEMPLATE = Path(__file__).with_name("report.html")
SLOT = '<script type="application/json" id="data">'

Accuracy = tuple[float, float, float, int]  # share, its interval's low and high end, number of questions
Scores = dict[str, Accuracy | str]  # of "all" and of each group, as "task: music"
Table = tuple[str, list[str], list[list]]  # title, columns, rows of cells (see `cell_text`)


# ------------------------------------------------------------------------------------------------- statistics


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share right / total. (A bootstrap of 11 questions covers 68 %.)"""
    z = 1.959964
    share = right / total
    spread = z * z / total
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    low = (middle - half) / (1 + spread)
    high = (middle + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def bootstrap(values: Sequence, statistic: Callable = np.mean) -> tuple[float, float]:
    """95 % percentile interval of a statistic of (n, ...) values, one row a question, over resampled rows."""
    rng = np.random.default_rng(0)
    found = [statistic(rng.choice(values, len(values))) for _ in range(RESAMPLED)]
    return tuple(np.percentile(found, [2.5, 97.5]))


def percent(share: float, low: float, high: float, *_: int) -> str:
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


# ---------------------------------------------------------------------------------------------------- scoring


def answers(question: Question) -> list[str]:
    """What the model answered, once for each order of the choices that was asked; "" for no answer."""
    row = question.meta["source"]
    for key in ANSWER_KEYS:
        if key in row:
            return row.get("order_predictions") or [str(row[key] or "")]
    raise InputError(f"question {question.id} has no prediction: give what evaluate.py --out wrote")


def rights(question: Question) -> list[bool]:
    """Which of these answers are right, by the official rule."""
    return [string_match(question.answer, text, question.choices) for text in answers(question)]


def correct(question: Question) -> float:
    """Share of the orders in which the question was answered right; 0 or 1 for one."""
    return float(np.mean(rights(question)))


def groups_of(questions: list[Question]) -> dict[str, list[int]]:
    """The places of each group's questions, "all" first. A row may give its group in a list."""
    groups = {"all": list(range(len(questions)))}
    for i, question in enumerate(questions):
        for column in GROUPS.split():
            names = question.meta["source"].get(column) or []
            if not isinstance(names, list):
                names = [names]
            for name in names:
                groups.setdefault(f"{column}: {name}", []).append(i)
    return dict(sorted(groups.items()))


def score_questions(questions: list[Question]) -> Scores:
    """The accuracy in each group; its interval is a little wide where several orders were asked."""
    if questions[0].answer is None:
        return {"all": "answers hidden"}
    shares = np.array([correct(question) for question in questions])
    scores = {}
    for group, places in groups_of(questions).items():
        some = shares[places]
        scores[group] = (some.mean(), *wilson(some.sum(), len(some)), len(some))
    return scores


def summary_lines(path: Path | str) -> list[str]:
    """A predictions file's accuracies as text. Raises InputError if the right answers are hidden."""
    questions = read_questions(path)
    if questions[0].answer is None:
        raise InputError(f"{path} holds no right answers (test-full): send it to the benchmark's server")
    lines = []
    for group, numbers in score_questions(questions).items():
        lines.append(f"{group:45} {percent(*numbers)}  n = {numbers[3]}")
    empty = sum(not answers(question)[0] for question in questions)
    if empty:
        lines.append(f"{empty} of {len(questions)} answers are empty, counted as wrong")
    return lines + agreement(questions)


def agreement(questions: list[Question]) -> list[str]:
    """How many questions were answered alike in all orders of their choices; nothing for one order."""
    given = [answers(question) for question in questions]
    if len(given[0]) == 1:
        return []
    alike = sum(len(set(texts)) == 1 for texts in given)
    return [f"answered the same way in all {len(given[0])} orders: {alike} of {len(given)}"]


def side_by_side(files: list[list[Question]]) -> list[tuple]:
    """Each question as the files have it. Raises InputError for other questions or hidden answers."""
    if any(questions[0].answer is None for questions in files):
        raise InputError("these questions hide their answers, so there is nothing to compare")
    if len(set(map(questions_hash, files))) > 1:
        raise InputError("these files are not of the same questions in the same order")
    return list(zip(*files, strict=True))


def paired(first: list[Question], second: list[Question]) -> np.ndarray:
    """(n, 2): two models' shares of right answers to each question. Raises InputError."""
    return np.array([list(map(correct, same)) for same in side_by_side([first, second])])


def compare(first: Path | str, second: Path | str) -> str:
    """The paired difference of two predictions files of one benchmark, as text. Raises InputError."""
    shares = paired(read_questions(first), read_questions(second))
    before, after = 100 * shares.mean(0)
    gains = np.diff(shares)  # (n, 1)
    return (
        f"{before:.1f} -> {after:.1f}, difference {percent(gains.mean(), *bootstrap(gains))}; "
        f"{(gains > 0).sum()} better, {(gains < 0).sum()} worse of {len(gains)}"
    )


# ---------------------------------------------------------------------------------------- is the run healthy?


def mean(rows: list[dict], name: str) -> float:
    return sum(row.get(name, 0.0) for row in rows) / len(rows)


def doubts(rows: list[dict], format_weight: float = 0.0) -> dict[str, str]:
    """What a run's rows of the log give reason to doubt: {name: words}, {} for a healthy run.

    Reward and official score part where their distance has grown by more than DRIFT, from the first 10 steps
    to the last 20; only the growth counts, and not what --format_weight pays for the form.
    """
    found = {}
    first = rows[: WINDOW // 2]
    last = rows[-WINDOW:]
    recent = rows[-WINDOW // 2 :]
    if len(recent) == WINDOW // 2 and mean(recent, "frac_reward_zero_std") == 1:
        found["nothing"] = (
            f"nothing is learned: in {len(recent)} steps no group's rewards differ (reward "
            f"{mean(recent, 'reward'):.2f}; {mean(recent, 'named_none'):.0%} of the answers name no choice). "
            "Read samples.jsonl, and try --explain"
        )
    for row in rows:
        if row["kl"] > LEAP:
            words = f"the KL divergence leaps to {row['kl']:.1f} at step {row['step']}"
            found["leap"] = f"{words}: a smaller --lr, or a larger --beta"
    if len(rows) < WINDOW:
        return found
    gaps = []
    for some in (first, last):
        form = format_weight * mean(some, "asked_form")
        gaps.append(mean(some, "reward") - form - mean(some, "official"))
    if gaps[1] - gaps[0] > DRIFT:
        found["drift"] = (
            f"reward and score part: over the last {WINDOW} steps the reward is {mean(last, 'reward'):.2f}, "
            f"but the benchmarks' rule finds {mean(last, 'official'):.2f} of the answers right (naming "
            f"several {mean(first, 'hedged'):.2f} -> {mean(last, 'hedged'):.2f}, naming none "
            f"{mean(first, 'named_none'):.2f} -> {mean(last, 'named_none'):.2f}, tokens of an answer "
            f"{mean(first, 'completion_length'):.2f} -> {mean(last, 'completion_length'):.2f}). Read "
            "samples.jsonl; --reward official pays what the score counts"
        )
    return found


# ------------------------------------------------------------------------------------------- a folder of runs


@dataclass(frozen=True)
class Result:
    """A predictions file that evaluate.py wrote."""

    run: str
    bench: str
    audio: str  # one of HEARD
    about: dict  # its .meta
    questions: list[Question]
    scores: Scores


def readable(paths: Iterable[Path], read: Callable, folder: Path) -> list:
    """What `read` makes of each file; another program's, a damaged or unfinished one is named and left."""
    found = []
    for path in sorted(paths):
        try:
            found.append(read(path, folder))
        except Exception as error:
            log.warning("left out: %s: %s", path, first_line(error))
    return found


def run_name(path: Path, folder: Path) -> str:
    """A run's place in the results' folder; that folder's own name where it is the run itself."""
    name = os.path.relpath(path, folder)
    return folder.name if name == "." else name


def read_result(meta: Path, folder: Path) -> Result:
    """RUN/eval/BENCH.AUDIO.json is RUN's; a predictions file elsewhere is a run of its own."""
    about = parse_json(read_text(meta))
    path = meta.with_suffix(".json")
    if not path.is_file():
        path = meta.with_suffix("")  # predictions of another ending: P.txt and P.txt.meta
    questions = read_questions(path, about["audio_dir"] or os.path.dirname(about["data"]))
    run = path.parent.parent if path.parent.name == "eval" else path.with_suffix("")
    scores = score_questions(questions)
    return Result(run_name(run, folder), about["bench"], about["audio"], about, questions, scores)


def read_run(file: Path, folder: Path) -> tuple[str, dict]:
    """(name, its arguments and what is drawn) of the run whose log.jsonl this is."""
    run = parse_json(read_text(file.with_name("config.json")))
    rows = rows_of(file)
    steps = [row for row in rows if "kl" in row]  # not the held-out scores
    run["doubts"] = doubts(steps, run["format_weight"])
    run["seconds"] = sum(row[key] for row in rows for key in row if key.startswith("seconds"))
    run["log"] = [{key: row[key] for key in CURVES.split() if key in row} for row in rows]
    samples = rows_of(file.with_name("samples.jsonl"))
    stride = len(samples) // SAMPLES + 1
    run["samples"] = samples[::-stride][::-1]
    for sample in run["samples"]:
        sample["audio"] = clip_link(sample.get("audio"), folder)
    return run_name(file.parent, folder), run


def asked(about: dict) -> str:
    return str([about.get(key) for key in ASKED.split()])


def clip_link(path: str | None, folder: Path) -> str | None:
    """A clip's address from the page, percent-encoded: its name may hold #, ? or bytes that are not UTF-8."""
    return quote(os.fsencode(os.path.relpath(path, folder))) if path else None


# ------------------------------------------------------------------------------------ does it need the audio?


def retained(shares: np.ndarray) -> str:
    """(n, 2) right with the clip and without: the share of the score that stays (of one right at least)."""

    def kept(some: np.ndarray) -> float:
        heard, unheard = some.sum(0)
        return unheard / max(heard, 1)

    return percent(kept(shares), *bootstrap(shares, kept))


def read_finished(path: str) -> Result:
    """An evaluation that was answered to its end; questions without an answer are left out, and counted."""
    meta = Path(path).with_suffix(".meta")
    try:
        result = read_result(meta, meta.parent)
        missing = result.about["unanswered"]
    except Exception as error:
        raise InputError(f"{path}, {meta.name}: not what evaluate.py wrote: {first_line(error)}") from None
    if missing:
        log.warning("%s: %d questions have no answer, and are left out", path, len(missing))
    return replace(result, questions=[one for one in result.questions if one.id not in missing])


def need(real: str, silent: str) -> list[str]:
    """One model's answers with the clip and without, over all and by group: which of them needed it.

    In percent of all answers, each order one; the retained share with its 95 % interval, paired by questions.
    """
    heard = read_finished(real)
    unheard = read_finished(silent)
    alike = asked({**heard.about, "audio": unheard.audio}) == asked(unheard.about)
    if not alike or heard.audio != "real" or unheard.audio == "real":
        raise InputError(f"{real}, {silent}: give one model's answers with the clip and without, asked alike")
    pairs = side_by_side([heard.questions, unheard.questions])
    right = np.array([list(map(rights, pair)) for pair in pairs])  # (n, 2, orders)
    lines = [
        f"{'':35}  real {unheard.audio:>7} {'retained':19} needs audio, text suffices, misleads, neither"
    ]
    for group, places in groups_of(heard.questions).items():
        one, other = right[places].swapaxes(0, 1)  # (n, orders)
        stays = retained(right[places].mean(2))
        lines.append(
            f"{group:35} {100 * one.mean():5.1f} {100 * other.mean():7.1f} {stays:19} "
            f"{100 * (one & ~other).mean():11.1f} {100 * (one & other).mean():14.1f} "
            f"{100 * (other & ~one).mean():9.1f} {100 * (~one & ~other).mean():8.1f}  n = {len(places)}"
        )
    return lines + agreement(heard.questions) + agreement(unheard.questions)


def split(paths: list[str], out: str) -> list[str]:
    """Write the questions never, sometimes and always answered right over all files and orders.

    JSON lines of the published rows, so that train.py reads each file. Raises InputError.
    """
    parts = {"never": [], "sometimes": [], "always": []}
    guessed = 0.0
    for same in side_by_side([read_finished(path).questions for path in paths]):
        right = sum(map(rights, same), [])
        row = same[0].meta["source"]
        published = {key: row[key] for key in row if key not in OURS.split()}
        parts[list(parts)[any(right) + all(right)]].append(published)
        guessed += len(same[0].choices) ** -len(right)
    for name, rows in parts.items():
        write_rows(Path(out) / f"{name}.jsonl", rows)
    counts = [f"{len(rows)} {name}" for name, rows in parts.items()]
    return [f"right {', '.join(counts)}; guessing alone would put {guessed:.0f} into always", f"saved {out}"]


# ------------------------------------------------------------------------------------------------- the tables


def paper_tables(results: list[Result]) -> list[Table]:
    """Tables I-IV with our numbers beside the paper's; below them the runs that the paper's has not."""
    ours = {}  # run -> {column: numbers}
    for result in results:
        found = ours.setdefault(result.run, {})
        for group, numbers in result.scores.items():
            column = f"{result.bench} {result.audio} {group}"
            found[column.replace(" real ", " ")] = numbers
    tables = []
    for title, text in PAPER.items():
        head, *published = [line.split(" | ") for line in text.strip().splitlines()]
        columns = head[3].split(", ")
        others = dict(ours)
        rows = []
        for model, method, run, numbers in published:
            found = others.pop(run, {})
            cells = zip(map(found.get, columns), numbers.split(), strict=True)
            rows.append([model, method, *cells])
        for run, found in others.items():
            if found.keys() & columns:
                cells = [[found.get(column), "-"] for column in columns]
                rows.append([run, "not in the paper's table", *cells])
        tables.append((title, ["model", "method", *columns], rows))
    return tables


def results_table(results: list[Result]) -> Table:
    """A row a run and benchmark: its averages by what was heard, and what of them stays without the clip."""
    heard = {}
    for result in results:
        heard.setdefault((result.run, result.bench), {})[result.audio] = result
    rows = []
    for place, found in heard.items():
        cells = []
        for audio in HEARD:
            cells.append([found[audio].scores["all"], "-"] if audio in found else "")
        stays = []
        for audio in HEARD[1:]:
            with suppress(InputError, KeyError):  # hidden answers; not asked
                shares = paired(found["real"].questions, found[audio].questions)
                stays.append(f"{audio} {retained(shares)}")
        rows.append([*place, *cells, "; ".join(stays)])
    return "Does it listen?", ["run", "benchmark", *HEARD, "retained"], rows


def markdown(table: Table) -> str:
    """A table in Markdown. A name that would break out of its cell cannot."""
    _, columns, rows = table
    lines = []
    for cells in [columns, ["---"] * len(columns), *rows]:
        lines.append(f"| {' | '.join(map(cell_text, cells))} |")
    return "\n".join(lines)


def cell_text(cell: str | list) -> str:
    """A cell is a text, or [ours: an Accuracy, a text or None for what was not run; the paper's or "-"]."""
    if isinstance(cell, str):
        return cell.replace("|", "\\|")
    ours, published = cell
    text = ours or ""
    if isinstance(ours, tuple):
        text = f"**{percent(*ours)}**"
    if published != "-":
        text += f" ({published})"
    return text.strip()


# --------------------------------------------------------------------------------------------------- the page


def draw(results: list[Result], runs: dict[str, dict], folder: Path) -> tuple[list, dict]:
    """The page's results, and {benchmark: {id: a question}}, each with what the results said.

    A result is (run, benchmark, audio, scores, gain), its gain (base's run, score before, after, difference
    with its interval) or None. "said" is {place of the result: [answer, share of the orders right]}.
    """
    rows = []
    texts = {}
    by_asked = {asked(result.about): result for result in results}
    for place, result in enumerate(results):
        model = runs.get(result.run, {}).get("model")
        base = by_asked.get(asked({**result.about, "model": model, "adapter": None}))
        gain = None
        with suppress(InputError):  # of other questions, or of hidden answers
            if base:
                shares = paired(base.questions, result.questions)
                gains = np.diff(shares)
                gain = (base.run, *shares.mean(0), gains.mean(), *bootstrap(gains))
        rows.append((result.run, result.bench, result.audio, result.scores, gain))
        page = texts.setdefault(result.bench, {})
        for question in result.questions:
            shown = {**vars(question), "meta": {}, "groups": list(groups_of([question]))[1:], "said": {}}
            shown["audio"] = clip_link(question.audio, folder)
            text = question.meta["source"].get("raw_output", answers(question)[0])
            said = page.setdefault(question.id, shown)["said"]
            said[place] = [text[-LONGEST_ANSWER:], question.answer and correct(question)]
    return rows, texts


def notes(runs: dict[str, dict]) -> list[str]:
    """A line for each base that is not of the paper's size: beside the paper's numbers its own mislead."""
    sizes = {run["model"]: run["parameters"] for run in runs.values()}
    text = "{} and what was trained from it have {:,} parameters, the paper's 7B"
    return [text.format(*size) for size in sizes.items() if not 0.8 < size[1] / PAPERS_SIZE < 1.2]


def page(data: dict) -> str:
    """report.html with `data` in the place of its sample; no text of it can end the script element."""
    before, slot, rest = read_text(TEMPLATE).partition(SLOT)
    _, end, after = rest.partition("</script>")
    text = json.dumps(data)  # in ASCII, so U+2028 and half characters are escaped
    return before + slot + text.replace("<", "\\u003c") + end + after


def report(folder: Path | str) -> str:
    """Write report.md and report.html into `folder`. Returns report.md's text."""
    folder = Path(os.path.abspath(folder))
    results = readable(folder.rglob("*.meta"), read_result, folder)
    runs = dict(readable(folder.rglob("log.jsonl"), read_run, folder))
    if not results and not runs:
        raise InputError(f"{folder} has no log, and no predictions of evaluate.py (with their .meta file)")
    small = notes(runs)
    tables = [*paper_tables(results), results_table(results)]
    text = "# Results\n\nOurs in bold with its 95 % interval, the paper's in parentheses.\n"
    for note in small:
        text += f"\n**{note}**\n"
    for table in tables:
        text += f"\n### {table[0]}\n\n{markdown(table)}\n"
    text = text.encode("utf-8", "replace").decode()  # a folder's name need not be UTF-8
    drawn, questions = draw(results, runs, folder)
    data = {"tables": tables, "notes": small, "runs": runs, "questions": questions, "results": drawn}
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page(data))
    return text


# ---------------------------------------------------------------------------------------------------- options


def program() -> None:
    sys.stdout.reconfigure(errors="replace")  # a file's name need not be UTF-8
    parser = Parser(__doc__)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("results", nargs="?", help="a folder of runs: write the paper's tables and a page into it")
    add("--score", metavar="P", help="print the accuracies of a predictions file")
    add("--compare", nargs=2, metavar=("A", "B"), help="print the paired difference of two")
    add("--need", nargs=2, metavar=("REAL", "SILENT"), help="print how much of a score needs the audio")
    add("--split", nargs="+", metavar="P", help="write the questions never, sometimes, always answered right")
    parser.add_argument("--out", default=".", help="folder of --split's three files (default: .)")
    args = parser.parse_args()
    if args.score:
        lines = summary_lines(args.score)
    elif args.compare:
        lines = [compare(*args.compare)]
    elif args.need:
        lines = need(*args.need)
    elif args.split:
        lines = split(args.split, args.out)
    else:
        lines = [report(args.results)]
    print(*lines, sep="\n")


main = partial(run_program, program)

if __name__ == "__main__":
    sys.exit(main())
