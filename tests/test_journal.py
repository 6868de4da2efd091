"""Laws of the log: each step once, half a row is none, and a reward that parts from the score is told."""

import json
import logging
import sys
import types

import pytest

from journal import Journal, drift, read_log


def row(step, reward, official):
    return {"step": step, "loss": 0.0, "reward": reward, "official": official, "hedged": reward - official}


def test_a_reward_that_runs_away_from_the_score_is_told_once_within_40_steps(tmp_path, caplog):
    """As on real weights: the reward went from 0.19 to 0.97, the score from 18 % to 0."""
    journal = Journal(tmp_path, 0, {})
    with caplog.at_level(logging.WARNING):
        for step in range(1, 151):
            done = step / 150
            journal.write(row(step, 0.19 + 0.78 * done, 0.18 * (1 - done)))
    (warning,) = [record.getMessage() for record in caplog.records]
    step = int(warning.split(":")[0].removeprefix("step "))
    assert 20 <= step <= 40 and "reward and score part" in warning and "samples.jsonl" in warning


def test_a_resumed_run_says_what_an_uninterrupted_one_would(tmp_path, caplog):
    rows = [row(step, min(1.0, 0.2 + step / 60), 0.2) for step in range(1, 41)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:20]) + '{"step": 21, "lo')
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 21))
    whole = [drift(rows[:n]) for n in range(21, 41)]
    resumed = Journal(tmp_path, 20, {})
    with caplog.at_level(logging.WARNING):
        for n, r in enumerate(rows[20:]):
            resumed.write(r)
            assert drift(resumed.rows) == pytest.approx(whole[n])
        assert [record.getMessage()[:8] for record in caplog.records] == ["step 22:"]
        Journal(tmp_path, 40, {}).write(row(41, 1.0, 0.2))
    assert len(caplog.records) == 1  # told once, whatever the starts


def test_a_form_that_is_learned_is_no_alarm(tmp_path, caplog):
    journal = Journal(tmp_path, 0, {"format_weight": 0.5})
    for step in range(1, 60):
        form = min(1.0, step / 30)
        journal.write(row(step, 0.3 + 0.5 * form, 0.3) | {"asked_form": form})
    assert not caplog.records


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.5])
def test_a_reward_with_another_offset_is_no_alarm(tmp_path, caplog, offset):
    journal = Journal(tmp_path, 0, {})
    for step in range(1, 100):
        share = 0.3 + 0.001 * step
        journal.write(row(step, offset + share, share))
        journal.write({"step": step, "eval_accuracy": share})
    assert not caplog.records


def test_scalars_and_samples_reach_wandb(tmp_path, monkeypatch):
    """wandb's own calls, in a module that stands in for it."""
    calls = []
    stand_in = types.ModuleType("wandb")

    class Table:
        def __init__(self, columns):
            self.columns, self.rows = columns, []

        def add_data(self, *values):
            self.rows.append(values)

    stand_in.Table = Table
    stand_in.init = lambda **options: calls.append(("init", options))
    stand_in.log = lambda values, step: calls.append((step, values))
    stand_in.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    journal = Journal(tmp_path / "..", 0, {"lr": 1}, "my-project")
    journal.write(row(1, 0.5, 0.5))
    journal.show([{"step": 1, "id": "q", "responses": ["a", "b"]}])
    journal.close()
    (_, options), (step, scalars), (_, samples), (last, _) = calls
    assert (
        options["project"] == "my-project" and options["resume"] == "allow" and options["config"] == {"lr": 1}
    )
    assert step == 1 and scalars["reward"] == 0.5 and "step" not in scalars
    assert samples["samples"].columns == ["step", "id", "responses"] and last == "finish"
