"""Eq. 2 and the official string match, against rules written out independently here."""

import functools
import random
import re

import pytest

import reward
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
)

reward.normalize = functools.cache(reward.normalize)  # the same choices again and again
FILES = ["mmau-test-mini-original.json", "mmau-test-mini-v05.15.25.json", "MMAR-meta.jsonl"]
on_real_questions = pytest.mark.parametrize("file", FILES)
if not DATA.exists():
    on_real_questions = pytest.mark.skip(reason=f"real questions are not at {DATA}")


def official(answer, prediction, choices):
    """MMAU's and MMAR's rule, from its description, word by word in plain loops."""

    def words(text):
        return re.findall(r"\b\w+\b", text.lower())

    said, right, wrong = words(prediction), words(answer), []
    for choice in choices:
        wrong += [word for word in words(choice) if word not in right]
    return bool(said) and all(word in said for word in right) and not any(word in said for word in wrong)


def predictions(question, rng):
    """Right, wrong, everything at once, empty, shouted, cut off, other words around."""
    answer, choices = question.answer, list(question.choices)
    yield from (answer, rng.choice(choices), " ".join(choices), "", answer.upper() + ".")
    yield answer[: len(answer) // 2]
    yield f"The answer is {rng.choice(choices)}, not {rng.choice(choices)}"
    yield f"{answer} {rng.choice(choices)[:3]}"


def listings(question, rng):
    """Ways to name all choices: as the prompt lists them, quoted before the answer, joined, shuffled, bare."""
    choices, answer = list(question.choices), question.answer
    shuffled = rng.sample(choices, len(choices))
    yield from (str(choices), str(shuffled), f"{choices}. The answer is {answer}.")
    yield f"The options are {choices}. I cannot tell."
    yield from (", ".join(choices), " or ".join(shuffled), "\n".join(choices), "; ".join(choices).upper())
    yield " ".join(f"({letter}) {choice}" for letter, choice in zip("ABCDEFGH", choices, strict=False))
    yield ", ".join(without_stop(choice) for choice in shuffled) + "."
    yield f"{answer}, not {', '.join(choice for choice in shuffled if fold(choice) != fold(answer))}"


def fold(text):
    return " ".join(text.casefold().split())


def without_stop(text):
    return re.sub(r"[.!?]+$", "", text)


def read_carefully(text, choices):
    """The choices that stand in `text`, word by word: where no longer choice covers a choice's place."""

    def words(text):
        return re.sub(r"[^\w]", " ", text.casefold()).split()

    said = words(text)
    places = []
    for choice in {tuple(words(choice)) for choice in choices} - {()}:  # one of MMAR's is empty
        for start in range(len(said) - len(choice) + 1):
            if tuple(said[start : start + len(choice)]) == choice:
                places.append((start, start + len(choice)))
    named = set()
    for start, end in places:
        if not any(a <= start and end <= b and b - a > end - start for a, b in places):
            named.add(" ".join(said[start:end]))
    return named


@on_real_questions
def test_both_rules_are_those_of_a_careful_reader(file):
    rng, questions = random.Random(0), read_questions(DATA / file)
    assert len(questions) == 1000
    for q in questions[::6]:  # 9,000 replies in all
        choices = list(q.choices)
        for said in (*predictions(q, rng), *listings(q, rng)):
            assert string_match(q.answer, said, choices) == official(q.answer, said, choices), (q.id, said)
            named = read_carefully(said, choices)
            assert sorted(map(fold, named_choices(said, choices))) == sorted(named), (q.id, said)
            (answer,) = read_carefully(q.answer, [q.answer])
            assert accuracy_reward(said, q.answer, choices) == float(named == {answer})
            assert contains_reward(said, q.answer, choices) == float(answer in named)


def punctuated(answer):
    """The answer with other marks, quoted, without them."""
    forms = [f"\u201c{answer}\u201d", answer.replace(" ", "-"), re.sub(r"[^\w\s]", " ", answer)]
    for mark in "-,.:;/()'":
        for other in ("", " ", "\u2013", "\u2019"):
            forms.append(answer.replace(mark, other))
    return forms


@on_real_questions
def test_a_right_answer_is_paid_and_a_list_is_not_on_every_real_question(file):
    """The answer alone or in a sentence is 1; a wrong choice, or all of them in eleven ways, is 0.

    But where every wrong choice is a part of the answer: to list "man, man and dog" may be to say "man and
    dog". What the official match counts right is paid whatever its punctuation, but for 2 % of the questions.
    """
    rng = random.Random(0)
    unpaid = 0
    for q in read_questions(DATA / file):
        choices = list(q.choices)
        wrong = [choice for choice in choices if fold(choice) != fold(q.answer)]
        right = [q.answer, f"The answer is {q.answer}.", without_stop(q.answer.upper())]
        false = []
        for choice in wrong:
            bare = without_stop(choice)
            false += [choice, f"The answer is {bare}"]
            if bare.strip():  # one of MMAR's is empty
                false.append(f"{bare}, {q.answer}")
        if not all(fold(choice) in fold(q.answer) for choice in wrong):
            false += listings(q, rng)
        for form in right + false:
            assert accuracy_reward(form, q.answer, choices) == (form in right), (q.id, form)
        right = [form for form in punctuated(q.answer) if string_match(q.answer, form, choices)]
        unpaid += not all(accuracy_reward(form, q.answer, choices) for form in right)
    assert unpaid <= 20


# response | answer | choices | exact, contains. "red car" and "car wash" overlap: both are named.
CASES = """
Man | Man | Man; Woman | 1 1
Woman | Man | Man; Woman | 0 0
It is a MAN. | Man | Man; Woman | 1 1
['Man', 'Woman']. The answer is Man | Man | Man; Woman | 0 1
Man and dog | Man | Man; Man and dog | 0 0
Man and dog, or man | Man | Man; Man and dog | 0 1
Man and dog, or man | Man and dog | Man; Man and dog | 0 1
Man and dog | Man and dog | Man; Dog; Man and dog | 1 1
man and dog man and dog | Man and dog | Man; Dog; Man and dog | 1 1
man   and DOG | Man and dog | Man; Man and dog | 1 1
red car wash | red car | red car; car wash | 0 1
F#:7 | F#:7 | F#:7; F:7 | 1 1
F#:7 | F:7 | F#:7; F:7 | 0 0
It is A#. | A | A#; A | 0 0
It is A. | A | A#; A | 1 1
-5 | 5 | -5; 5 | 0 0
C++ here | C++ | C++; C | 1 1
fourteen | four | four; fourteen; fourteen | 0 0
Fourteen | fourteen | four; fourteen; Fourteen  | 1 1
a man | A man. | A man.; A woman. | 1 1
rock n roll | Rock–‘n’–Roll | Rock–‘n’–Roll; Jazz | 1 1
A woman, a man. | A man. | A man.; A woman. | 0 1
 | Man | Man; Woman | 0 0
nothing | ? | ?; ; Man | 0 0
Man | Man | Man;  ;  | 1 1
straße | STRASSE | STRASSE; Weg | 1 1
"""


def test_rewards_written_out():
    for case in CASES.strip().splitlines():
        response, answer, choices, paid = case.split(" | ")
        for order in (choices.split("; "), choices.split("; ")[::-1]):
            assert accuracy_reward(response, answer, order) == int(paid[0]), case
            assert contains_reward(response, answer, order) == int(paid[2]), case


# prompt | reply | the answer in it | whether it has the asked form
TAGGED = r"""
direct | <answer>Man</answer> | <answer>Man</answer> | 0
answer |  <answer>\nMan\n</answer>\n | Man | 1
answer | It is <answer>Man</answer> | Man | 0
answer | <answer>Man</answer><answer>Woman</answer> | Woman | 0
answer | <answer>Man | <answer>Man | 0
answer | <answer>Woman <answer>Man</answer> or </answer> | Man | 0
answer | MANY</answer> |  | 0
think | <think>a\nb</think>\n\n<answer>Man</answer> | Man | 1
brief | <think>Woman? No.</think> <answer>Man</answer> | Man | 1
think | <answer>Man</answer> | Man | 0
think | <answer>Man</answer><think>Woman</think> | Man | 0
think | <think><answer>Woman</answer></think><answer>Man</answer> | Man | 0
brief | <think>a</think><think>b</think><answer>Man</answer> | Man | 0
"""


def test_answers_are_taken_from_the_tags_that_the_prompt_asks_for():
    for case in TAGGED.strip().splitlines():
        prompt, reply, answer, asked_form = case.split(" | ")
        reply = reply.replace(r"\n", "\n").replace("MANY", "<answer>" * 50_000)
        assert final_answer(reply, prompt) == answer
        assert format_reward(reply, prompt) == int(asked_form), case
    for prompt, asked in PROMPTS.items():  # the form is that of the tags in the prompt's own words
        reply = "".join(f"<{tag}>x</{tag}>" for tag in re.findall(r"<(\w+)>", asked))
        assert format_reward(reply, prompt) == (prompt != "direct")
        assert final_answer(f"{reply} y", prompt) == ("x" if reply else " y")


def test_rewards_are_found_by_name_and_what_fails_is_one_line(tmp_path):
    assert find_reward("exact") is accuracy_reward and find_reward("contains") is contains_reward
    for said, paid in (("dog, a man", 1), ("man or woman", 0), ("", 0)):
        assert find_reward("official")(said, "Man", ["Man", "Woman"]) == paid
    mine = tmp_path / "mine.py"
    mine.write_text("""
NUMBER = 7
def shortness(response, answer, choices):
    return (answer in response) / (1 + len(response))
def two(response, answer): return 1.0
def nothing(response, answer, choices): pass
def fails(response, answer, choices): return float(response != "Man") or 1 / 0
""")
    (tmp_path / "broken.py").write_text("def reward(:")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    assert find_reward(f"{mine}:shortness")("Man", "Man", ["Man", "Woman"]) == 0.25
    names = "mine.py:NUMBER mine.py:two mine.py:nothing mine.py:none mine.py: none.py:two broken.py:reward ends.py:x"
    for name in ("strict", "", "mine.py", *[f"{tmp_path}/{name}" for name in names.split()]):
        with pytest.raises(InputError, match="FILE.py:function") as error:
            find_reward(name)
        assert "\n" not in str(error.value) and f"--reward {name}" in str(error.value)
    with pytest.raises(InputError, match="failed on 'Man'"):
        find_reward(f"{mine}:fails")("Man", "Man", ["Man", "Woman"])
