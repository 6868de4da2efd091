"""The test that would have found it: what a reward pays for is learned, right or wrong.

    python -m pytest -s -m slow tests/test_gaming.py        (prints both curves, the README's first exercise)

On real weights Eq. 2 to the letter went from 0.19 to 0.97 while the benchmark's score went from 18 % to 0: a
response that lists every choice contains the right one. Here a small model that lists the choices now and
then meets both rewards.
"""

import random

import pytest
import torch
from test_train import log, scores, train_here

import tiny
from data import read_questions
from model import load_model
from report import mean

LISTED, WRONG = 0.4, 0.4  # how often the base lists the choices, and names a wrong one


@pytest.fixture(scope="module")
def lister(world, tmp_path_factory):
    """A world of text alone, whose model answers facts, sometimes wrongly, and sometimes lists the choices."""
    folder = tmp_path_factory.mktemp("lister")
    rng = random.Random(0)
    tiny.write_rows(folder / "arc.jsonl", [tiny.fact(rng, number) for number in range(700)])
    lm = load_model(world / "model")
    examples = []
    for question in read_questions(folder / "arc.jsonl"):
        chance = rng.random()
        said = question.answer
        if chance < LISTED:
            said = str(list(question.choices))
        elif chance < LISTED + WRONG:
            said = rng.choice(question.choices)
        examples.append((lm.encode(question, use_audio=False), said, 0.0))
    torch.manual_seed(0)
    tiny.fit(lm, examples, rng, steps=300, batch=32, peak_rate=3e-3)
    lm.save(folder / "model")
    return folder


def learn(lister, out, reward):
    """60 steps of GRPO; returns the rows of the log, and the held-out scores before and after."""
    options = f"--steps 60 --lr 7e-4 --max_new_tokens 32 --temperature 1 --hold_out 100 --eval_every 20 --group_size 8 --reward {reward}"
    paths = ["--model", str(lister / "model"), "--data", str(lister / "arc.jsonl")]
    assert train_here(out, *paths, *options.split(), "--no_audio") == 0
    return log(out), [row["eval_accuracy"] for row in scores(out)]


def rise(rows, name):
    return mean(rows[-10:], name) - mean(rows[:10], name)


@pytest.mark.slow
def test_a_reward_for_containing_the_answer_teaches_to_list_and_the_default_teaches_to_answer(
    lister, tmp_path, caplog
):
    rows, held_out = {}, {}
    for reward in ("contains", "exact"):
        caplog.clear()
        rows[reward], held_out[reward] = learn(lister, tmp_path / reward, reward)
        warned = "reward and score part" in caplog.text
        print(
            f"\n--reward {reward}: held out {held_out[reward]}, a warning: {warned}\nsteps      reward  official  hedged"
        )
        for first in range(0, 60, 10):
            part = rows[reward][first : first + 10]
            values = "  ".join(f"{mean(part, name):8.2f}" for name in ("reward", "official", "hedged"))
            print(f"{first + 1:2} to {first + 10:2}  {values}")
        assert warned == (reward == "contains")
    gamed, honest = rows["contains"], rows["exact"]
    assert rise(gamed, "official") < -0.05
    assert min(rise(gamed, "reward"), rise(honest, "reward"), rise(honest, "official")) > 0.05
    assert held_out["contains"][-1] < held_out["contains"][0] < held_out["exact"][-1]
