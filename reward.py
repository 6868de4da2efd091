"""Is this answer right? Eq. 2's reward for training, and the benchmarks' own string match for evaluation.

The two differ on purpose. The reward is generous about form (the paper gives no format reward) but must not
pay for a wrong answer that happens to hold the right one's letters ("Woman" contains "man"), nor for naming
every choice: Eq. 2 to the letter does, and real weights soon learned to write the whole list. The string
match is the rule of MMAU's and MMAR's evaluation scripts, token by token, so that our accuracies are theirs.
"""

import re
import runpy
from collections.abc import Callable

from files import InputError, LocalError

# The form of a reply that each of data.PROMPTS asks for; r1-aqa's format reward checks the first.
THINK = "<think></think><answer></answer>"
FORMS = {
    "answer": "<answer></answer>",
    "think": THINK,
    "brief": THINK,
}


def accuracy_reward(
    response: str,
    answer: str,
    choices: list[str],
) -> float:
    """Eq. 2: 1.0 if the response names the right answer and no wrong choice, else 0.0; nothing else."""
    choices = [*choices, answer]
    right = named_choices(answer, choices)
    return float(named_choices(response, choices) == right != [])


def contains_reward(
    response: str,
    answer: str,
    choices: list[str],
) -> float:
    """Eq. 2 to the letter: 1.0 if the response contains the right answer, whatever else it names."""
    choices = [*choices, answer]
    right = named_choices(answer, choices)
    return float(right != [] and right[0] in named_choices(response, choices))


def official_reward(response: str, answer: str, choices: list[str]) -> float:
    """The benchmarks' own rule: 1.0 where `string_match` counts the response as right."""
    return float(string_match(answer, response, choices))


def named_choices(response: str, choices: list[str]) -> list[str]:
    """The distinct choices that stand in the response, normalized, the longest first.

    Case, white space and punctuation do not matter (but where it alone tells choices apart: A, A#); a choice
    inside a longer word, or inside a longer choice that stands there, does not count: "Man and dog" does not
    name "Man", "Man and dog, or man" names both.
    """
    kind = r"\w+"
    distinct = {normalize(choice, kind) for choice in choices}
    spelled = {normalize(choice, SPELLED) for choice in choices}
    if len(distinct) < len(spelled):
        kind = SPELLED
        distinct = spelled
    said = normalize(response, kind)
    named = []
    for choice in sorted(sorted(distinct - {""}), key=len, reverse=True):
        rest = said
        for longer in named:
            if choice in longer:
                rest = rest.replace(longer, "\n")
        if choice in rest:
            named.append(choice)
    return named


SPELLED = r"\w+|[^\w\s]"  # words and marks


def normalize(text: str, kind: str) -> str:
    """Words of a kind in lower case, each between blanks of its own; what is no word is a blank."""
    words = re.findall(kind, text.casefold().rstrip(".!?,;: \n"))  # "Yes." is named by "yes"
    return "".join(f" {word} " for word in words)


def string_match(answer: str, prediction: str, choices: list[str]) -> bool:
    """The official rule of MMAU and MMAR on sets of lower-case words.

    All of the answer's words are in the prediction, and none of the words that a choice adds to the answer's.
    An empty prediction is wrong.
    """
    right = tokens(answer)
    said = tokens(prediction)
    wrong = tokens(" ".join(choices)) - right
    return bool(said) and right <= said and said.isdisjoint(wrong)


def tokens(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def final_answer(text: str, prompt: str) -> str:
    """What the last <answer> tags hold where `prompt` asks for them; the whole text else, or without tags."""
    _, start, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
    if prompt not in FORMS or not start:
        return text
    return answer.partition("</answer>")[0].strip()


def format_reward(text: str, prompt: str) -> float:
    """1.0 if the reply has the form that `prompt` asks for, each tag once and nothing around; else 0.0."""
    pieces = re.split("(</?(?:think|answer)>)", text)  # before, tag, inside, tag, between, tag, ...
    tags = "".join(pieces[1::2])
    return float(tags == FORMS.get(prompt) and not "".join(pieces[::4]).strip())


REWARDS = {
    "exact": accuracy_reward,
    "contains": contains_reward,
    "official": official_reward,
}


def find_reward(name: str) -> Callable:
    """--reward exact, contains, official or FILE.py:function -> a callable with accuracy_reward's signature.

    Raises InputError if there is no such function, and LocalError later if it fails or gives no number.
    """
    if name in REWARDS:
        return REWARDS[name]
    file, _, wanted = name.rpartition(":")
    try:
        function = runpy.run_path(file)[wanted]
        float(function("a dog", "a dog", ["a dog", "a cat"]))
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise InputError(
            f"--reward {name}: no FILE.py:function of (response, answer, choices) gives a number: {error!r}"
        ) from None

    def reward(response: str, answer: str, choices: list[str]) -> float:
        try:
            return float(function(response, answer, choices))
        except Exception as error:
            raise LocalError(f"--reward {name} failed on {response!r:.200}: {error!r}") from None

    return reward
