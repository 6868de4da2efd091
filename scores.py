"""Predictions -> accuracies by the official rule, with 95 % intervals, and the difference of two files.

    python evaluate.py --score P.json | --compare A.json B.json

Every number carries an interval: the published differences are often within the noise of 1,000 questions.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import Question, read_questions
from files import InputError
from reward import string_match, wilson

# The columns that the formats' own scripts group by
GROUPS = ["task", "modality", "task_name", "difficulty", "category", "sub-category", "length_type"]
GROUPS += ["question_type", "source_dataset", "dataset_name", "audio-contribution", "sub-sub-category"]
GROUPS += ["linguistics_sub_discipline", "perceptual_skills", "reasoning_skills"]
ANSWER_KEYS = ["answer_prediction", "model_prediction", "model_output"]  # the first that a row has counts

Accuracy = tuple[float, float, float, int]  # share, its interval's low and high end, number of questions
Scores = dict[tuple[str, str], Accuracy]  # by (column, group); ("all", "all") is the average


# ------------------------------------------------------------------------------------------------- statistics


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
    questions = read_questions(path, audio_dir, max_bad=1.0)  # evaluate.py has judged the rows
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
