"""Laws of the run: two processes = one, killed = uninterrupted, and what each layout may not change."""

import gc
import itertools
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from safetensors import safe_open
from scripts import dump_gradients
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import files
import fsdp
import tiny
import train as program
from conftest import FORK, Processes
from data import Asked, Question, read_questions
from files import rows_of
from grpo import Rollout, group_advantages
from model import draw
from report import doubts
from reward import accuracy_reward
from train import Journal, Run, main, parse

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
SLOW = pytest.mark.slow
HELD_OUT = {"hold_out": 40, "eval_every": 2, "save_model_every": 2}
EACH_STEP = 1e-9  # minutes between checkpoints


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def here(entry, *flags):
    """A program's `main` in this process, which has imported everything already; returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, flags)])
        try:
            code = entry() or 0
        except SystemExit as end:
            code = end.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    gc.collect()  # an error's frames keep the lock on --out
    return code


def train_here(out, *arguments):
    return here(main, "--out", out, *arguments)


def arguments(world, **more):
    options = {
        "model": world / "model", "data": world / "train_qa.json", "audio_dir": world / "audio",
        "steps": STEPS, "lr": 1e-3, "batch": 4, "max_new_tokens": 6, "group_size": 4,
    } | more  # fmt: skip
    flat = []
    for name, value in options.items():
        if value is True:
            flat.append(f"--{name}")
        elif value is not False:
            flat += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flat


def log(out):
    """The rows of the steps; those of the held-out score are `scores`."""
    return [row for row in rows_of(out / "log.jsonl") if "loss" in row]


def scores(out):
    return [row for row in rows_of(out / "log.jsonl") if "eval_accuracy" in row]


def weights(folder):
    """name -> tensor of a checkpoint folder's safetensors files, under the thinker's own names."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name.removeprefix("thinker."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def distance(a, b):
    return sum(((a[name] - b[name]).double().norm() ** 2 for name in a if name in b), torch.zeros(())).sqrt()


def same_run(world, one, two):
    """Two runs have moved the weights alike."""
    base, w1, w2 = weights(world / "model"), weights(one / "model"), weights(two / "model")
    return 0 <= distance(w2, w1) <= 1e-3 * distance(w1, base)


@pytest.fixture(scope="module")
def one(world, tmp_path_factory):
    """One process's run, which the others are compared with."""
    out = tmp_path_factory.mktemp("one")
    assert train_here(out, *arguments(world, **HELD_OUT)) == 0
    return out


ODD = "def odd(response, answer, choices): return len(response) * (len(answer) % 2)"
# processes | what both runs are asked | what the second alone is asked. Without the former the first is `one`.
SAME = """
2 | | --accumulation 2
2 | | --reshard on --checkpointing on --cpu_offload on
4 | | --replicas 2
1 | | --accumulation 2 --checkpointing on --cpu_offload moments
2 | --no_audio --reward {broken}/mine.py:odd --updates 2 --beta 0 --loss token --lr 1e-4 |
2 | --data {world}/train_qa.json {world}/arc.jsonl --shares 0.5 0.5 --updates 2 --beta 0 --loss dr |
2 | --data {broken}/train_qa.json --audio_dir {broken}/audio --prompt answer --format_weight 0.5 --reward contains |
2 | --updates 2 --reshard on --reward {broken}/mine.py:odd --model {qwen2audio}/model |
2 | --updates 2 --reward {broken}/mine.py:odd --lora 4 | --reshard on
2 | --lora 4 --lr 5e-3 | --reshard off --accumulation 2"""


@pytest.mark.parametrize("line", [pytest.param(x, marks=[SLOW] * (x[0] > "2")) for x in SAME.split("\n")[1:]])
def test_a_run_is_the_same_on_any_number_of_processes_and_in_any_layout(
    world, world_qwen2audio, one, pair, line, tmp_path, caplog
):
    broken_world(world, tmp_path)
    (tmp_path / "mine.py").write_text(ODD)
    told = line.format(world=world, qwen2audio=world_qwen2audio, broken=tmp_path)
    processes, both, own = [part.split() for part in told.split("|")]
    first, second = one, tmp_path / "second"
    options = arguments(world, **HELD_OUT)
    if both:
        first, options = tmp_path / "first", [*arguments(world), *both]
        assert train_here(first, *options) == 0
    if processes == ["1"]:
        assert train_here(second, *options, *own) == 0
    else:
        several = pair if processes == ["2"] else Processes(4)
        several.train(second, *options, *own)
    rows, expected = log(second), log(first)
    again = "--updates" in both
    assert again or rows[0]["kl"] == 0  # exactly 0 before the first update
    assert any(row["frac_reward_zero_std"] < 1 for row in rows)  # some advantages are not zero
    assert not again or "--lora" in both or any(row["clip_ratio"] > 0 for row in rows)
    for row, other in zip(rows, expected, strict=True):
        for key in ("loss", "grad_norm", "clip_ratio", "kl", "entropy"):
            assert row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key  # a KL can be 100
        for key in ("completion_length", "reward", "official", "hedged", "named_none", "bad_clips"):
            assert row[key] == other[key], key
    assert ("{broken}/audio" in line) == (rows[-1]["bad_clips"] > 0) == ("replaced" in caplog.text)
    for row, other in zip(scores(second), scores(first), strict=True):
        assert (row["step"], row["eval_accuracy"]) == (other["step"], other["eval_accuracy"])
    said, expected = (rows_of(out / "samples.jsonl")[0]["responses"] for out in (second, first))
    base = world_qwen2audio if "qwen2audio" in line else world
    assert said == expected and same_run(base, first, second)


def test_two_processes_accumulate_the_gradients_of_one_in_planned_shards_with_few_collectives(
    world, pair, tmp_path
):
    """Element by element. What is gathered does not depend on the number of tokens, here 6."""
    sides = []
    for number, layout in enumerate([{}, {"reshard": "off"}, {"reshard": "on", "accumulation": 2}]):
        out = tmp_path / f"side{number}"
        options = arguments(world, **layout, out=out)
        if number:
            pair.run(dump_gradients.main, *options)
        else:
            here(dump_gradients.main, *options)
        sides.append(torch.load(out / "step.pt", weights_only=True))
    one = sides[0]
    for side in sides:
        assert side["responses"] == one["responses"] and len(one["responses"]) == 4
        assert side["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            assert (side["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name
        for what, size in side["bytes"].items():  # what the plan says of each process's shards
            assert size == pytest.approx(side["plan"][what], rel=0.03), what
    kept, resharded = sides[1:]
    assert [side["passes"] for side in sides] == [1, 1, 2]
    # Policy and reference once for the whole step; or for rollout, reference, forward and backward of a pass.
    assert kept["all_gather_single"] == 2 * kept["groups"]
    assert 0 < resharded["all_gather_single"] <= 4 * 2 * resharded["groups"]
    for side in sides[1:]:
        assert side["reduce_scatter_single"] == side["passes"] * side["groups"]


def test_log_samples_and_models_are_what_other_trainers_and_people_expect(world, one):
    keys = """step loss reward reward_std frac_reward_zero_std kl entropy completion_length clip_ratio grad_norm
    learning_rate seconds_wait seconds_rollout seconds_score seconds_update peak_memory_mb bad_clips"""
    rows = log(one)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(set(keys.split()) <= set(row) for row in rows)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert [row["step"] for row in scores(one)] == [0, 2, 3]
    assert all(row["eval_low"] < row["eval_accuracy"] < row["eval_high"] for row in scores(one))
    questions = {q.id: q for q in read_questions(world / "train_qa.json", world / "audio")}
    for step, sample in enumerate(rows_of(one / "samples.jsonl"), start=1):
        question = questions[sample["id"]]
        assert (sample["step"], sample["k"], sample["audio"]) == (step, 0, question.audio)
        rewards = [accuracy_reward(text, question.answer, question.choices) for text in sample["responses"]]
        assert sample["rewards"] == rewards
        assert sample["advantages"] == pytest.approx(group_advantages(torch.tensor(rewards)).tolist())
    assert distance(weights(one / "model-step-2"), weights(one / "model")) > 0
    config = json.loads((one / "config.json").read_text())
    assert config["parameters"] > 1e5 and config["lr"] == 1e-3


def test_gradients_are_clipped(world, one, tmp_path):
    """To a norm far below AdamW's epsilon, so that no weight moves."""
    assert train_here(tmp_path, *arguments(world, steps=1, max_grad_norm=1e-12)) == 0
    base = weights(world / "model")
    moved = distance(weights(tmp_path / "model"), base)
    assert moved < 1e-3 * distance(weights(one / "model"), base) and log(tmp_path)[0]["grad_norm"] > 0.01


def test_one_question_is_explained_and_nothing_is_written(world, tmp_path, capsys):
    reward = tmp_path / "mine.py"
    reward.write_text("def half(response, answer, choices): return 0.5")
    options = arguments(world, reward=f"{reward}:half", seed=3)
    assert train_here(tmp_path / "out", *options, "--explain") == 0
    said = capsys.readouterr().out
    assert re.search(r"prompt +\d+ tokens, of which \d+ audio \(\d\.\d s\)", said)  # as the model reads it
    assert "Please choose the answer from the following options: ['" in said
    assert said.count("answer ") >= 4 and "reward 0.5 (Eq. 2)" in said and "kl        0.000000" in said
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ killed and resumed


def killed_is_uninterrupted(world, out, several, kills, **more):
    """kill -9 of all processes, or of the first alone, whose death ends the others, at random moments."""
    options = {"steps": 12, "save_minutes": EACH_STEP, "batch": 2} | more
    options = arguments(world, **options)
    whole, killed = out / "whole", out / "killed"
    several.train(whole, *options)
    rng = random.Random(0)
    for moment in range(kills):
        wanted = len(log(killed)) + 1  # so that something is lost
        deadline = time.time() + 300
        if moment % 3 == 2:  # while its processes meet, or read the checkpoint
            deadline = time.time() + rng.uniform(0, 2)
        several.start(main, "--out", killed, *options)
        jobs = several.jobs
        while time.time() < deadline and len(log(killed)) < wanted and not several.pipes[0].poll():
            time.sleep(0.01)
        time.sleep(rng.random() / 2)
        for job in jobs[: 2 - moment % 2]:
            job.kill()
        for job in jobs:
            job.join(60)
        assert all(job.exitcode for job in jobs) and jobs[0].exitcode == -signal.SIGKILL
        several.stop()
    several.train(killed, *options)
    result = "adapter" if "lora" in more else "model"
    expected, found = weights(whole / result), weights(killed / result)
    assert all(torch.equal(expected[name], found[name]) for name in expected) and expected
    for row, other in zip(log(whole), log(killed), strict=True):
        assert all(row[key] == other[key] for key in ("step", "loss", "reward", "grad_norm", "kl"))


def test_killed_is_uninterrupted_and_a_dead_process_ends_the_run(world, pair, tmp_path):
    killed_is_uninterrupted(world, tmp_path, pair, kills=2, steps=4)


@pytest.fixture(scope="module")
def wide_world(tmp_path_factory):
    """A model wide enough for a backward pass that is not deterministic to show (hidden size 512)."""
    folder = tmp_path_factory.mktemp("wide") / "world"
    tiny.make_world(folder, effort=0.15, hidden=512, sizes={"train": 60, "arc": 40, "mmau": 20, "mmar": 8})
    return folder


@SLOW
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("more", [{}, {"no_audio": True}, {"lora": 4}])
def test_killed_often_on_a_wide_model(wide_world, tmp_path, more, processes):
    killed_is_uninterrupted(
        wide_world, tmp_path, Processes(processes), kills=5, group_size=8, lr=1e-4, **more
    )


def as_program(*flags):
    torch.set_num_threads(1)
    sys.argv = ["train.py", *flags]
    main()


def torchrun(*flags):
    """Its own agent, which here forks its two processes, since an import takes ten seconds."""
    agent = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(agent, as_program)(*map(str, flags))


def test_a_signal_saves_a_second_start_is_refused_and_another_number_of_processes_goes_on(
    world, one, tmp_path, capsys, caplog, monkeypatch
):
    """As a scheduler stops a job. One launch for three laws."""
    reward = tmp_path / "reward_in_time.py"
    reward.write_text(f"""if True:
        import pathlib, time, reward
        def exact(*asked, place=pathlib.Path({str(tmp_path)!r})):
            while (place / "wait").exists() and (place / "log.jsonl").exists():  # in the first step
                time.sleep(0.01)
            return reward.accuracy_reward(*asked)
    """)
    options = arguments(world, hold_out=40, eval_every=2, reward=f"{reward}:exact")
    (tmp_path / "wait").touch()
    monkeypatch.setattr(files.one_writer, "__defaults__", (0.2,))  # seconds of patience
    job = FORK.Process(target=torchrun, args=("--out", tmp_path, *options))
    job.start()
    while not scores(tmp_path) and job.is_alive():
        time.sleep(0.01)
    assert train_here(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert "one run writes to a place at a time" in error and f"process {os.getpid()}" not in error
    job.terminate()  # torchrun passes it on
    time.sleep(1)
    (tmp_path / "wait").unlink()
    job.join(300)
    assert job.exitcode == 1
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    assert saved.name == "step-000001" and len(log(tmp_path)) == 1
    assert train_here(tmp_path, *options, "--lr", 2e-3, "--beta", 0.1) == 2
    error = capsys.readouterr().err
    assert "beta: 0.04 -> 0.1" in error and "lr: 0.001 -> 0.002" in error
    assert train_here(tmp_path, *options) == 0
    assert train_here(tmp_path, *options) == 0 and "finished" in caplog.text
    assert train_here(tmp_path, *options, "--lr", 2e-3) == 2 and "lr: 0.001" in capsys.readouterr().err
    assert same_run(world, one, tmp_path)


def stop_at(step, out, options):
    """A run that a signal ends once `step` is taken."""
    take_step = Run.take_step

    def take_and_stop(run, asked):
        done = take_step(run, asked)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "take_step", take_and_stop)
        assert train_here(out, *options) == 128 + signal.SIGTERM


def test_checkpoints_come_by_the_clock_the_last_are_kept_and_damaged_ones_are_passed_over(
    world, tmp_path, monkeypatch, caplog
):
    """The first after 5 minutes, the others every 10, the last at the signal. Then a file is cut short."""
    clock = itertools.count(0, 310)  # seconds: a little more than five minutes a call
    fake = SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(program, "time", fake)
    options = arguments(world, steps=5, save_minutes=10)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stop_at(4, whole, options)
    assert [folder.name for folder in fsdp.checkpoints(whole)] == ["step-000003", "step-000004"]
    newest = fsdp.newest_checkpoint(whole)
    assert newest.name == "step-000004"
    for path in newest.iterdir():  # any of them, run.json too
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        damaged = broken / "checkpoints" / newest.name / path.name
        damaged.write_bytes(damaged.read_bytes()[:-1])
        assert fsdp.newest_checkpoint(broken).name == "step-000003", path.name
    (broken / "log.jsonl").unlink()  # it comes back with the checkpoint
    assert train_here(whole, *options) == 0 and train_here(broken, *options) == 0
    assert "step-000004 is damaged" in caplog.text
    assert distance(weights(whole / "model"), weights(broken / "model")) == 0
    assert [row["step"] for row in log(broken)] == [row["step"] for row in log(whole)] == list(range(1, 6))


def test_a_folder_or_run_of_others_is_not_written_to(world, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("mine\n")
    assert train_here(tmp_path, *arguments(world)) == 2
    assert "config.json" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_text() == "mine\n"


BAD_ARGUMENTS = """
--model no/such/folder | no model folder
--data nothing.json | nothing.json
--steps 0 | --steps
--group_size 1 | --group_size
--seed 18446744073709551616 | --seed
--shares nan | --shares
--shares 1 1 | --shares: 2 for 1 files
--lr inf | --lr
--temperature 1e-40 | --temperature
--beta nan | --beta
--reward no_such.py:f | no_such.py
--eval_data nothing.json | nothing.json
--replicas 3 | --replicas
--audio_dir /nowhere | no readable clip
--no_such_option 1 | no_such_option"""


@pytest.mark.parametrize("line", BAD_ARGUMENTS.split("\n")[1:])
def test_bad_arguments_get_one_line_and_exit_code_2(world, tmp_path, capsys, line):
    flags, words = line.split(" | ")
    assert train_here(tmp_path / "run", *arguments(world), *flags.split()) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_least_temperature_that_is_taken_is_greedy():
    logits = torch.randn(1, 4, 100)
    assert torch.equal(draw(logits, 1e-12, None), logits.argmax(-1))


@pytest.mark.parametrize("told", [{"RANK": "abc"}, {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "two"}])
def test_what_torchrun_would_have_set_otherwise_is_one_line(world, tmp_path, capsys, monkeypatch, told):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert train_here(tmp_path, *arguments(world)) == 2
    assert "error: torchrun sets RANK" in capsys.readouterr().err


def broken_world(world, folder):
    """The world's first training questions with their clips, a few of which have a good header and bad
    samples.
    """
    questions = read_questions(world / "train_qa.json", world / "audio")[:20]
    rows = [question.meta["source"] for question in questions]
    (folder / "audio").mkdir()
    for i, question in enumerate(questions):
        samples, rate = soundfile.read(question.audio, dtype="float32")
        if i < 4:
            samples[len(samples) // 2] = float("nan")
        soundfile.write(folder / "audio" / f"{rows[i]['video_name']}.wav", samples, rate, subtype="FLOAT")
    (folder / "train_qa.json").write_text(json.dumps(rows))


def test_a_non_finite_loss_stops_before_the_optimizer_moves(world, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def huge(response, *_): return 1e39 if len(response) % 2 else 0")
    assert train_here(tmp_path / "run", *arguments(world, reward=f"{tmp_path}/mine.py:huge")) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # not behind the progress bar
    assert error.startswith("error: step 1: loss or gradient is not finite; asked here: [")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on_later(world, tmp_path, capsys):
    """A limit on the size of files stands for a full disk: it stops the first checkpoint, not the log."""
    options = arguments(world, steps=2, save_minutes=EACH_STEP)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
    code = train_here(tmp_path, *options)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "checkpoint of step 1 cannot be written" in error and "intact" not in error
    assert train_here(tmp_path, *options) == 0 and len(log(tmp_path)) == 2


# ------------------------------------------------------------------------- what would look good without being so


def row(step, reward, official, **more):
    row = {"step": step, "loss": 0.0, "reward": reward, "official": official, "hedged": reward - official}
    return row | {"kl": 0.0, "frac_reward_zero_std": 0.5, "named_none": 0.0, "completion_length": 2} | more


def test_a_reward_that_parts_from_the_score_is_told_once_and_early_and_at_the_end(tmp_path, caplog, capsys):
    """As on real weights: the reward went from 0.19 to 0.97, the score from 18 % to 0."""
    journal = Journal(parse(["--out", str(tmp_path)]), 0)
    asked = [Asked(1, 0, Question("1", "?", ("a", "b"), "a", None, {}), None, ())]
    said = Rollout(asked, [], [["what was said"]], torch.zeros(1, 1), torch.zeros(1, 1))
    for s in range(1, 151):
        journal.write_step(row(s, 0.19 + 0.78 * s / 150, 0.18 * (1 - s / 150)), said)
    (warning,) = [told.getMessage() for told in caplog.records if told.levelno == logging.WARNING]
    assert 20 <= int(re.match(r"step (\d+): reward and score part", warning)[1]) <= 40
    assert "naming several" in warning and warning.endswith("(an answer: 'what was said')")
    journal.summary()
    assert warning in capsys.readouterr().out


def test_what_is_paid_for_the_form_or_always_is_no_alarm():
    form = [min(1.0, s / 30) for s in range(60)]
    assert not doubts([row(s, 0.3 + 0.5 * form[s], 0.3, asked_form=form[s]) for s in range(60)], 0.5)
    for offset in (0.0, 1.5):
        assert not doubts([row(s, offset + 0.001 * s, 0.001 * s) for s in range(100)])
