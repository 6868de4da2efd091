"""Eq. 2 and the official string match, against rules written out independently here."""

import random
import re

import pytest

from conftest import DATA
from data import read_questions
from reward import accuracy_reward, string_match

FILES = ["mmau-test-mini-original.json", "mmau-test-mini-v05.15.25.json", "MMAR-meta.jsonl"]


def official(answer, prediction, choices):
    """MMAU's and MMAR's rule, from its description, word by word in plain loops."""

    def words(text):
        found = []
        for word in re.findall(r"\b\w+\b", text.lower()):
            if word not in found:
                found.append(word)
        return found

    said, right, wrong = words(prediction), words(answer), []
    if not said:
        return False
    for choice in choices:
        if sorted(words(choice)) != sorted(right):
            wrong += [word for word in words(choice) if word not in right]
    return all(word in said for word in right) and not any(word in said for word in wrong)


def predictions(question, rng):
    """Right, wrong, everything at once, empty, shouted, cut off, other words around."""
    answer, choices = question.answer, list(question.choices)
    yield from (
        answer,
        rng.choice(choices),
        " ".join(choices),
        "",
        answer.upper() + ".",
        answer[: len(answer) // 2],
    )
    yield f"The answer is {rng.choice(choices)}, not {rng.choice(choices)}"
    yield f"{answer} {rng.choice(choices)[:3]}"


@pytest.mark.skipif(not DATA.exists(), reason=f"real questions are not at {DATA}")
@pytest.mark.parametrize("file", FILES)
def test_string_match_is_the_official_rule_on_every_real_question(file):
    rng, questions = random.Random(0), read_questions(DATA / file)
    assert len(questions) == 1000
    disagreements = [(q.id, said) for q in questions for said in predictions(q, rng)
                     if string_match(q.answer, said, q.choices) != official(q.answer, said, q.choices)]  # fmt: skip
    assert not disagreements


@pytest.mark.skipif(not DATA.exists(), reason=f"real questions are not at {DATA}")
@pytest.mark.parametrize("file", FILES)
def test_only_the_right_choice_said_alone_is_rewarded_on_every_real_question(file):
    for q in read_questions(DATA / file):
        for choice in q.choices:
            same = " ".join(choice.casefold().split()) == " ".join(q.answer.casefold().split())
            assert accuracy_reward(choice, q.answer, q.choices) == float(same), (q.id, choice)


CASES = [  # response, answer, choices, reward, strict reward
    ("Man", "Man", ["Man", "Woman"], 1, 1),
    ("Woman", "Man", ["Man", "Woman"], 0, 0),
    ("It is a MAN.", "Man", ["Man", "Woman"], 1, 1),
    ("A man or a woman", "Man", ["Man", "Woman"], 1, 0),
    ("Man and dog", "Man", ["Man", "Man and dog"], 0, 0),
    ("Man and dog, or man", "Man", ["Man", "Man and dog"], 1, 0),
    ("Man and dog", "Man and dog", ["Man", "Man and dog"], 1, 1),
    ("man\n  and DOG", "Man and dog", ["Man", "Man and dog"], 1, 1),
    ("F#:7", "F#:7", ["F#:7", "F:7"], 1, 1),
    ("F#:7", "F:7", ["F#:7", "F:7"], 0, 0),
    ("C++ here", "C++", ["C++", "C"], 1, 1),
    ("fourteen", "four", ["four", "fourteen", "fourteen"], 0, 0),
    ("", "Man", ["Man", "Woman"], 0, 0),
    ("straße", "STRASSE", ["STRASSE", "Weg"], 1, 1),
]


@pytest.mark.parametrize(("response", "answer", "choices", "reward", "strict"), CASES)
def test_rewards_written_out(response, answer, choices, reward, strict):
    assert accuracy_reward(response, answer, choices) == reward
    assert accuracy_reward(response, answer, choices, strict=True) == strict
