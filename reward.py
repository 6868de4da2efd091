"""Is this answer right? Eq. 2's reward for training, and the benchmarks' own string match for evaluation.

The two differ on purpose. The reward is generous about form (the paper gives no format reward) but must not
pay for a wrong answer that happens to hold the right one's letters ("Woman" contains "man"), nor for naming
every choice: Eq. 2 to the letter does, and real weights soon learned to write the whole list. The string
match is the rule of MMAU's and MMAR's evaluation scripts, token by token, so that our accuracies are theirs.
"""

import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

from files import InputError

# The form that each of data.PROMPTS asks for; r1-aqa's format reward checks the first.
FORMS = {
    "answer": r"<answer>.*</answer>",
    "think": r"<think>.*</think>\s*<answer>.*</answer>",
}


LARGEST = 1e6  # of a reward: beyond, fp32 advantages lose their digits


class RewardError(InputError):
    """The user's own reward failed: on one response, so in one process alone."""


def accuracy_reward(response: str, answer: str, choices: list[str]) -> float:
    """Eq. 2: 1.0 if the response names the right answer and no wrong choice, else 0.0; nothing else."""
    named = named_choices(response, [*choices, answer])
    return float(named == [bare(answer)])


def contains_reward(response: str, answer: str, choices: list[str]) -> float:
    """Eq. 2 to the letter: 1.0 if the response contains the right answer, whatever else it names."""
    named = named_choices(response, [*choices, answer])
    return float(bare(answer) in named)


def named_choices(response: str, choices: list[str]) -> list[str]:
    """The distinct choices that stand in the response, as `bare` texts, the longest first.

    Case, white space and a choice's own full stop do not matter; a choice inside a longer word, or inside a
    longer choice that stands there, does not count: "Man and dog" does not name "Man", "Man and dog, or man"
    names both.
    """
    response = normalize(response)
    distinct = {bare(choice) for choice in choices}
    distinct.discard("")
    named = []
    for choice in sorted(sorted(distinct), key=len, reverse=True):
        rest = response
        for longer in named:
            if choice in longer:
                rest = whole_words(longer).sub("\n", rest)  # a blank that no choice has in it
        if whole_words(choice).search(rest):
            named.append(choice)
    return named


def normalize(text: str) -> str:
    return " ".join(text.casefold().split())


def bare(choice: str) -> str:
    """What is looked for in a response: "Yes." is named by "yes", "Yes, it is" and "yes!" alike."""
    return normalize(choice).rstrip(".!?,;: ")


def whole_words(text: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


def string_match(answer: str, prediction: str, choices: list[str]) -> bool:
    """The official rule of MMAU and MMAR on sets of lower-case words.

    All of the answer's words are in the prediction, and none of the words that a choice adds to the answer's.
    An empty prediction is wrong.
    """
    right = tokens(answer)
    said = tokens(prediction)
    wrong = set()
    for choice in choices:
        wrong.update(tokens(choice) - right)
    if not said:
        return False
    return right <= said and said.isdisjoint(wrong)


def tokens(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


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


def final_answer(text: str, prompt: str) -> str:
    """What the last <answer> tags hold where `prompt` asks for them; the whole text else, or without tags."""
    before, _, _ = text.rpartition("</answer>")
    _, start, answer = before.rpartition("<answer>")
    if prompt not in FORMS or not start:
        return text
    return answer.partition("</answer>")[0].strip()


def format_reward(text: str, prompt: str) -> float:
    """1.0 if the reply has the form that `prompt` asks for, each tag once and nothing around; else 0.0."""
    if prompt not in FORMS:
        return 0.0
    tags = re.findall(r"</?(?:think|answer)>", text)
    if len(tags) != len(set(tags)):
        return 0.0
    whole = re.fullmatch(FORMS[prompt], text.strip(), re.DOTALL)
    return float(whole is not None)


def find_reward(name: str) -> Callable[[str, str, list[str]], float]:
    """--reward exact, contains or FILE.py:function -> a callable with accuracy_reward's signature.

    Raises InputError if there is no such function, and RewardError later if it fails or gives no number.
    """
    if name == "exact":
        return accuracy_reward
    if name == "contains":
        return contains_reward
    file, _, wanted = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise InputError(f"--reward {name}: exact, contains, or FILE.py:function of a file that is there")
    spec = importlib.util.spec_from_file_location("reward_of_the_user", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, wanted)
        inspect.signature(function).bind("response", "answer", ["choice"])
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        wrong = f"--reward {name} is no function of (response, answer, choices): {error!r}"
        raise InputError(wrong) from None

    def reward(response: str, answer: str, choices: list[str]) -> float:
        try:
            value = float(function(response, answer, choices))
        except Exception as error:
            wrong = f"--reward {name} failed on {response!r:.200}: {error!r}"
            raise RewardError(wrong) from None
        if not abs(value) < LARGEST:
            raise RewardError(f"--reward {name} gave {value} for {response!r:.200}")
        return value

    return reward
