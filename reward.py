"""Is this answer right? Eq. 2's reward for training, and the benchmarks' own string match for evaluation.

The two differ on purpose. The reward is generous about form (the paper gives no format reward) but must not
pay for a wrong answer that happens to hold the right one's letters: "Woman" contains "man". The string match
is the rule of MMAU's and MMAR's evaluation scripts, token by token, so that our accuracies are theirs.
"""

import re


def accuracy_reward(response: str, answer: str, choices: list[str], strict: bool = False) -> float:
    """Eq. 2: 1.0 if the response contains the right answer, else 0.0; nothing else.

    Looks for every choice, case-folded, with white space collapsed, not inside a longer word. A choice found
    only inside a longer found choice does not count ("Man" in "Man and dog"). `strict` also asks for no wrong
    choice.
    """
    response, answer = normalize(response), normalize(answer)
    spans = {text: occurrences(text, response) for text in {answer, *map(normalize, choices)}}
    found = {text for text in spans if stands_alone(text, spans)}
    return float(answer in found and not (strict and found - {answer}))


def normalize(text):
    return " ".join(text.casefold().split())


def occurrences(text, response):
    """Where `text` stands in `response` as whole words: a list of (start, end)."""
    pattern = rf"(?<!\w)(?={re.escape(text)}(?!\w))"  # a look-ahead, so that overlapping ones are found too
    return [(m.start(), m.start() + len(text)) for m in re.finditer(pattern, response)] if text else []


def stands_alone(text, spans):
    """Whether some occurrence of `text` lies in no occurrence of a longer choice."""
    longer = [span for other, found in spans.items() if len(other) > len(text) for span in found]
    return any(not any(a <= start and end <= b for a, b in longer) for start, end in spans[text])


def string_match(answer: str, prediction: str, choices: list[str]) -> bool:
    """The official rule of MMAU and MMAR on sets of lower-case words.

    All of the answer's words are in the prediction, and none of the words that a choice adds to the answer's.
    An empty prediction is wrong.
    """
    answer_words, words = tokens(answer), tokens(prediction)
    added_by_wrong_choices = set().union(*(tokens(choice) - answer_words for choice in choices))
    return bool(words) and answer_words <= words and not words & added_by_wrong_choices


def tokens(text):
    return set(re.findall(r"\b\w+\b", text.lower()))
