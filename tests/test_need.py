"""Do you need the audio? What --split finds to need it does, and 60 steps on that alone teach to listen sooner.

    python -m pytest -s -m slow tests/test_need.py        (prints the split and each run's scores)

The text gives half of these questions away: only the right choice has the category that they name. The base has
learned those associations, and hears; but to most wordings of the others it mostly says the first choice, heard or
not. That habit pays one time in four, where the tiny world's "unclear" never does and is gone in a few steps,
whatever is trained on; on never.jsonl it pays never, and no step is spent on what the text gives away.
"""

import random
from itertools import product

import numpy as np
import pytest
import torch
from test_train import here, log, train_here

import evaluate
import tiny
from data import read_questions
from model import load_model
from report import answers, bootstrap, mean, need, paired, percent, read_finished, split

KINDS = ("needs audio", "given away")  # a question's, in turn
SEEDS = (0, 1, 2)


def write_questions(folder, name, rng, noise):
    rows = []
    for number in range(1200):
        given_away = number % 2
        right, text, choices = tiny.ask(rng, "audio", given_away)
        clip = tiny.write_clip(folder, f"{name}-{number}", [right], noise, number)
        row = {"audio_path": clip, "question": text, "choices": choices, "answer": right}
        rows.append(row | {"category": KINDS[given_away]})
    tiny.write_rows(folder / f"{name}.jsonl", rows)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """The questions, base/model, and never.jsonl and its like, of what that answers three times without the clips."""
    folder = tmp_path_factory.mktemp("need")
    rng, noise = random.Random(0), np.random.default_rng(0)
    for name in ("lessons", "train", "bench"):
        write_questions(folder, name, rng, noise)
    lm = load_model(world / "model")
    examples = []
    for question in read_questions(folder / "lessons.jsonl", folder):
        given_away = question.question.startswith("Which")
        hears = (rng.random() < 0.75) != given_away  # and one in four the other way
        guesses = question.question.startswith(tiny.SHY) and rng.random() < 0.85
        said = question.answer
        if not given_away and (guesses or not hears):
            said = question.choices[0]
        examples.append((lm.encode(question, use_audio=hears), said, 0.0))
    torch.manual_seed(0)
    tiny.fit(lm, examples, rng, steps=200, batch=16, peak_rate=3e-3)
    lm.save(folder / "base" / "model")
    answer(folder, "base", "train", "none", "--orders", 3)
    print(split([folder / "base" / "train.none.json"], folder))
    return folder


def answer(folder, run, name, audio, *more):
    """The questions with what the run's model answers, heard or not."""
    out = folder / run / f"{name}.{audio}.json"
    paths = ["--model", out.parent / "model", "--data", folder / f"{name}.jsonl", "--out", out]
    assert here(evaluate.main, *paths, "--audio", audio, "--max_new_tokens", 8, *more) == 0
    questions = read_finished(out).questions
    named_none = sum(answers(question)[0] not in question.choices for question in questions)
    print(f"{named_none} answers are empty or none of the choices; chance is 25 %")
    return questions


def scores(folder, run):
    """(n, 2) right with the clip and without, to new questions."""
    heard, unheard = answer(folder, run, "bench", "real"), answer(folder, run, "bench", "none")
    print(f"\n{run}:", *need(folder / run / "bench.real.json", folder / run / "bench.none.json"), sep="\n")
    return paired(heard, unheard)


@pytest.mark.slow
def test_what_is_never_answered_right_without_the_clip_needs_it_and_little_else_does(folder):
    counts = []
    for part in ("never", "sometimes", "always"):
        text = (folder / f"{part}.jsonl").read_text()
        counts.append([text.count(kind) for kind in KINDS])
        print(f"{part}: {KINDS} {counts[-1]}")
    (never, given_away), (sometimes, _), (always, _) = counts
    assert never > 0.9 * (given_away + never)
    assert always < 0.1 * (never + sometimes + always)


def difference(some):
    """Of (n, after which run, with the clip or without) right: by how much more the second run's share stays."""
    heard, unheard = some.sum(0).T
    return np.diff(unheard / heard)[0]


@pytest.mark.slow
def test_what_is_trained_on_what_needs_the_audio_keeps_less_of_its_score_without(folder):
    scores(folder, "base")
    found = []
    for seed, data in product(SEEDS, ("train", "never")):
        out = folder / f"{data}, seed {seed}"
        options = f"--steps 60 --lr 3e-4 --group_size 8 --temperature 1 --max_new_tokens 8 --seed {seed}"
        paths = ["--model", folder / "base" / "model", "--data", folder / f"{data}.jsonl"]
        assert train_here(out, *paths, "--audio_dir", folder, *options.split()) == 0
        found.append(scores(folder, out.name))
        print(f"groups that teach nothing: {mean(log(out), 'frac_reward_zero_std'):.2f}")
    shares = np.stack(found, 1).reshape(-1, len(SEEDS), 2, 2).mean(1)
    low, high = bootstrap(shares, difference)
    print(f"\nafter never.jsonl - after all: retained {percent(difference(shares), low, high)}")
    heard, unheard = np.diff(shares, axis=1).T
    ends = bootstrap(heard[0])
    print(f"score with the clip {percent(heard.mean(), *ends)}, without {unheard.mean():.1%}")
    assert high < 0 < ends[0]  # a model that is worse would keep less, too
