"""Eq. 2 and the official string match, against rules written out independently here."""

import random
import re

import pytest

from conftest import DATA
from data import PROMPTS, read_questions
from files import InputError
from reward import (
    accuracy_reward,
    contains_reward,
    final_answer,
    find_reward,
    format_reward,
    named_choices,
    string_match,
    wilson,
)

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


def fold(text):
    return " ".join(text.casefold().split())


def without_stop(choice):
    return re.sub(r"[ .!?,;:]+$", "", fold(choice))


def read_carefully(text, choices):
    """The choices that stand in `text`, from the definition, in plain loops over places.

    A choice is named where it stands as whole words that the place of no longer choice covers.
    """
    said = f" {fold(text)} "
    places = []
    for choice in set(map(without_stop, choices)) - {""}:  # one of MMAR's is empty
        start = said.find(choice)
        while start >= 0:
            end = start + len(choice)
            beside = said[start - 1] + said[end]
            if not any(letter.isalnum() or letter == "_" for letter in beside):
                places.append((start, end))
            start = said.find(choice, start + 1)
    named = set()
    for start, end in places:
        covers = [(a, b) for a, b in places if a <= start and end <= b and b - a > end - start]
        if not covers:
            named.add(said[start:end])
    return named


def listings(q, rng):
    """Ways to name all choices: as the prompt lists them, quoted before the answer, joined, shuffled, bare."""
    choices = list(q.choices)
    shuffled = rng.sample(choices, len(choices))
    quoted = f"The options are {choices}."
    yield from (
        str(choices),
        str(shuffled),
        f"{choices}. The answer is {q.answer}.",
        f"{quoted} I cannot tell.",
    )
    yield from (", ".join(choices), " or ".join(shuffled), "\n".join(choices), "; ".join(choices).upper())
    yield " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDEFGH", choices, strict=False))
    yield ", ".join(re.sub(r"[.!?]+$", "", choice) for choice in shuffled) + "."
    yield f"{q.answer}, not {', '.join(c for c in shuffled if fold(c) != fold(q.answer))}"


@pytest.mark.skipif(not DATA.exists(), reason=f"real questions are not at {DATA}")
@pytest.mark.parametrize("file", FILES)
def test_a_right_answer_is_paid_and_a_list_is_not_on_every_real_question(file, capsys):
    """The answer alone or in a sentence is 1; a wrong choice, or all of them in eleven ways, is 0.

    But where every wrong choice is a part of the answer: to list "man, man and dog" may be to say "man and
    dog". How often the official string match agrees is measured and printed.
    """
    rng = random.Random(0)
    agreed = {"the answer": [], "a wrong choice": [], "all choices": []}
    for q in read_questions(DATA / file):
        choices = list(q.choices)
        wrong = [choice for choice in choices if fold(choice) != fold(q.answer)]
        forms = [
            ("the answer", form, 1.0)
            for form in (
                q.answer,
                f"The answer is {q.answer}.",
                q.answer.upper(),
                re.sub(r"[.!?]+$", "", q.answer),
            )
        ]
        for choice in wrong:
            bare = re.sub(r"[.!?]+$", "", choice)
            forms += [("a wrong choice", form, 0.0) for form in (choice, f"The answer is {choice}.", bare)]
            if bare.strip():  # one of MMAR's is empty
                forms.append(("a wrong choice", f"{bare}, {q.answer}", 0.0))
        if not all(fold(choice) in fold(q.answer) for choice in wrong):
            forms += [("all choices", form, 0.0) for form in listings(q, rng)]
        for kind, form, expected in forms:
            reward = accuracy_reward(form, q.answer, choices)
            assert reward == expected, (q.id, form)
            agreed[kind].append(reward == string_match(q.answer, form, choices))
    shares = {kind: sum(same) / len(same) for kind, same in agreed.items()}
    with capsys.disabled():
        print(f"\n{file}: exact agrees with the official match on " + ", ".join(
            f"{share:.2%} of {len(agreed[kind])} ({kind})" for kind, share in shares.items()))  # fmt: skip
    assert min(shares.values()) > 0.95


@pytest.mark.skipif(not DATA.exists(), reason=f"real questions are not at {DATA}")
@pytest.mark.parametrize("file", FILES)
def test_both_rewards_find_the_choices_that_a_careful_reader_finds(file):
    rng = random.Random(0)
    for q in read_questions(DATA / file)[::3]:
        for form in (*predictions(q, rng), *listings(q, rng)):
            named = read_carefully(form, q.choices)
            assert set(named_choices(form, list(q.choices))) == named, (q.id, form)
            answer = without_stop(q.answer)
            assert accuracy_reward(form, q.answer, list(q.choices)) == float(named == {answer})
            assert contains_reward(form, q.answer, list(q.choices)) == float(answer in named)


CASES = [  # response, answer, choices, exact, contains
    ("Man", "Man", ["Man", "Woman"], 1, 1),
    ("Woman", "Man", ["Man", "Woman"], 0, 0),
    ("It is a MAN.", "Man", ["Man", "Woman"], 1, 1),
    ("A man or a woman", "Man", ["Man", "Woman"], 0, 1),
    ("['Man', 'Woman']. The answer is Man", "Man", ["Man", "Woman"], 0, 1),
    ("Man and dog", "Man", ["Man", "Man and dog"], 0, 0),
    ("Man and dog, or man", "Man", ["Man", "Man and dog"], 0, 1),
    ("Man and dog, or man", "Man and dog", ["Man", "Man and dog"], 0, 1),
    ("Man and dog", "Man and dog", ["Man", "Man and dog"], 1, 1),
    ("Man and dog", "Man and dog", ["Man", "Dog", "Man and dog"], 1, 1),
    ("man\n  and DOG", "Man and dog", ["Man", "Man and dog"], 1, 1),
    ("red car wash", "red car", ["red car", "car wash"], 0, 1),  # they overlap: both are named
    ("red car wash", "car wash", ["red car", "car wash"], 0, 1),
    ("F#:7", "F#:7", ["F#:7", "F:7"], 1, 1),
    ("F#:7", "F:7", ["F#:7", "F:7"], 0, 0),
    ("C++ here", "C++", ["C++", "C"], 1, 1),
    ("fourteen", "four", ["four", "fourteen", "fourteen"], 0, 0),
    ("Fourteen", "fourteen", ["four", "fourteen", "Fourteen "], 1, 1),
    ("The man", "A man.", ["A man.", "A woman."], 0, 0),
    ("a man", "A man.", ["A man.", "A woman."], 1, 1),
    ("A woman, a man.", "A man.", ["A man.", "A woman."], 0, 1),
    ("", "Man", ["Man", "Woman"], 0, 0),
    ("Man", "Man", ["Man", " ", ""], 1, 1),
    ("straße", "STRASSE", ["STRASSE", "Weg"], 1, 1),
]


@pytest.mark.parametrize(("response", "answer", "choices", "exact", "contains"), CASES)
def test_rewards_written_out(response, answer, choices, exact, contains):
    for order in (choices, choices[::-1]):
        assert accuracy_reward(response, answer, order) == exact
        assert contains_reward(response, answer, order) == contains


def test_the_choices_named_are_counted_once_each():
    choices = ["Man", "man ", "Woman", "Man and dog"]
    assert named_choices("A man and dog; a WOMAN, a woman", choices) == ["man and dog", "woman"]
    assert named_choices("a dog", choices) == [] == named_choices("", choices)


TAGGED = [  # prompt, reply, the answer in it, whether it has the asked form
    ("direct", "<answer>Man</answer>", "<answer>Man</answer>", 0),
    ("direct", "Man", "Man", 0),
    ("answer", "<answer>Man</answer>", "Man", 1),
    ("answer", " <answer>\nMan\n</answer>\n", "Man", 1),
    ("answer", "Man", "Man", 0),
    ("answer", "It is <answer>Man</answer>", "Man", 0),
    ("answer", "<answer>Man</answer><answer>Woman</answer>", "Woman", 0),
    ("answer", "<answer>Man", "<answer>Man", 0),
    ("answer", "<answer>Woman <answer>Man</answer> or </answer>", "Man", 0),
    ("answer", "<answer>" * 50_000 + "</answer>", "", 0),
    ("think", "<think>Woman? No.</think> <answer>Man</answer>", "Man", 1),
    ("think", "<think>a\nb</think>\n\n<answer>Man</answer>", "Man", 1),
    ("think", "<answer>Man</answer>", "Man", 0),
    ("think", "<answer>Man</answer><think>Woman</think>", "Man", 0),
    ("think", "<think><answer>Woman</answer></think><answer>Man</answer>", "Man", 0),
    ("think", "<think>a</think><think>b</think><answer>Man</answer>", "Man", 0),
    ("think", "<think>Man", "<think>Man", 0),
]


@pytest.mark.parametrize(("prompt", "reply", "answer", "asked_form"), TAGGED)
def test_answers_are_taken_from_the_tags_that_the_prompt_asks_for(prompt, reply, answer, asked_form):
    assert final_answer(reply, prompt) == answer
    assert format_reward(reply, prompt) == asked_form
    for tag in ("answer", "think"):
        assert (f"<{tag}>" in PROMPTS[prompt]) == (prompt == tag or (tag, prompt) == ("answer", "think"))


def test_rewards_are_found_by_name(tmp_path):
    assert find_reward("exact") is accuracy_reward and find_reward("contains") is contains_reward
    (tmp_path / "mine.py").write_text("""
NUMBER = 7
def shortness(response, answer, choices):
    return accuracy(response, answer) / (1 + len(response))
def accuracy(response, answer):
    return answer in response
def nothing(response, answer, choices): pass
def nan(response, answer, choices): return float("nan")
""")
    (tmp_path / "broken.py").write_text("def reward(:")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    mine = tmp_path / "mine.py"
    assert find_reward(f"{mine}:shortness")("Man", "Man", ["Man", "Woman"]) == 0.25
    missing = ("strict", "", "mine.py", f"{tmp_path / 'none.py'}:reward", f"{tmp_path}:reward")
    wrong = (f"{mine}:NUMBER", f"{mine}:accuracy", f"{mine}:none", f"{mine}:", f"{tmp_path / 'broken.py'}:reward",
             f"{tmp_path / 'ends.py'}:reward")  # fmt: skip
    for name, words in [
        *((n, "FILE.py:function") for n in missing),
        *((n, "is no function of") for n in wrong),
    ]:
        with pytest.raises(InputError, match=words) as error:
            find_reward(name)
        assert "\n" not in str(error.value) and f"--reward {name}" in str(error.value)
    for name, words in ((f"{mine}:nothing", "failed on 'Man'"), (f"{mine}:nan", "gave nan for 'Man'")):
        with pytest.raises(InputError, match=words):
            find_reward(name)("Man", "Man", ["Man", "Woman"])


def test_wilsons_interval_covers_what_it_says():
    """The share of 95 % and more of draws whose interval holds the true share, and the published example."""
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, Table I
    rng = random.Random(0)
    for share in (0.05, 0.5, 0.66):
        held = 0
        for _ in range(2000):
            low, high = wilson(sum(rng.random() < share for _ in range(50)), 50)
            held += low <= share <= high
        assert held / 2000 > 0.925, share
