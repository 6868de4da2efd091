"""Laws of the run: two processes = one, killed = uninterrupted, and what each layout may not change."""

import contextlib
import importlib.machinery
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors import safe_open
from test_data import HOSTILE_ROWS, hostile_clips

import bench
import fsdp
import tiny
from conftest import DATA
from data import check_clips, load_questions, read_questions
from files import InputError
from grpo import group_advantages
from reward import accuracy_reward
from train import Run, main, parse, set_batch

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5


def command(processes, *arguments):
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*python, "train.py", *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(out, *arguments, processes=1, check=True):
    """Run train.py as a user would; returns the finished process."""
    done = subprocess.run(
        command(processes, "--out", out, *arguments),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr
    return done


def train_here(out, *arguments):
    """The same in this process, which has imported everything already; returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["train.py", "--out", str(out), *map(str, arguments)])
        main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    return end.value.code


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


def so_far(out):
    """The same of a run that may not have begun, or be at a row just now."""
    try:
        return log(out)
    except (OSError, ValueError):
        return []


def scores(out):
    return [row for row in rows_of(out / "log.jsonl") if "eval_accuracy" in row]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder):
    """name -> tensor of a checkpoint folder's safetensors files, under the thinker's own names."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name.removeprefix("thinker."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def distance(a, b):
    return sum(((a[name] - b[name]).double().norm() ** 2 for name in a if name in b), torch.zeros(())).sqrt()


@pytest.fixture(scope="module")
def one(world, tmp_path_factory):
    """One process's run of five steps, which the others are compared with."""
    out = tmp_path_factory.mktemp("one")
    assert train_here(out, *arguments(world, hold_out=40, eval_every=2)) == 0
    return out


SLOW = pytest.mark.slow
LAYOUTS = {
    "2 processes, one question a pass": (2, {"questions_per_pass": 1}),
    "2 processes, re-sharded and recomputed": (2, {"reshard": "on", "checkpointing": "on"}),
    "2 processes, offloaded": (2, {"cpu_offload": "on", "reshard": "on"}),
    "2 x 2 processes": (4, {"replicas": 2}),
    "1 process, recomputed, its moments in host memory": (1, {"checkpointing": "on", "cpu_offload": "moments"}),
    "1 process, three questions a pass": (1, {"questions_per_pass": 3}),
}  # fmt: skip


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[SLOW] * (processes > 2)) for name, (processes, _) in LAYOUTS.items()]
)
def test_every_layout_is_the_run_of_one_process(world, one, pair, layout, tmp_path):
    processes, options = LAYOUTS[layout]
    options = arguments(world, hold_out=40, eval_every=2, **options)
    if processes == 1:
        assert train_here(tmp_path, *options) == 0
    elif processes == 2:
        pair.train(tmp_path, *options)
    else:
        train(tmp_path, *options, processes=processes)
    rows, expected = log(tmp_path), log(one)
    assert expected[0]["kl"] == rows[0]["kl"] == 0 and rows[-1]["kl"] > 0  # exactly 0 before the first update
    assert any(row["frac_reward_zero_std"] < 1 for row in rows)  # some advantages are not zero
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for name in ("completion_length", "reward", "official", "hedged", "named_none"):
            assert row[name] == other[name], name
    held_out = [(row["step"], row["eval_accuracy"]) for row in scores(tmp_path)]
    assert held_out == [(row["step"], row["eval_accuracy"]) for row in scores(one)]
    assert (
        rows_of(tmp_path / "samples.jsonl")[0]["responses"] == rows_of(one / "samples.jsonl")[0]["responses"]
    )
    base, w1, w2 = weights(world / "model"), weights(one / "model"), weights(tmp_path / "model")
    assert distance(w2, w1) <= 1e-3 * distance(w1, base)


def test_two_processes_accumulate_the_gradients_of_one_in_planned_shards_with_few_collectives(
    world, pair, tmp_path
):
    """All accumulated gradients of 6 questions, element by element."""
    script = ROOT / "tests" / "scripts" / "dump_gradients.py"
    options = arguments(world, batch=6, reshard="off")
    alone = [sys.executable, script, *options, "--out", tmp_path / "g1"]
    subprocess.run(alone, cwd=ROOT, env=environment(), check=True, capture_output=True)
    pair.run("dump_gradients", *options, "--out", tmp_path / "g2")
    one, two = (torch.load(tmp_path / f"g{n}" / "step.pt", weights_only=True) for n in (1, 2))
    assert one["responses"] == two["responses"] and len(one["responses"]) == 6
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name
    for side in (one, two):  # what the plan says of each process's shards, and what they took
        for what, size in side["bytes"].items():
            assert size == pytest.approx(side["plan"][what], rel=0.03), what
    # Policy and reference are gathered once for the whole step, whatever its questions and tokens.
    assert two["collectives"]["all_gather_single"] == 2 * two["groups"]
    assert two["collectives"]["reduce_scatter_single"] == two["groups"]


def test_log_has_the_keys_of_other_trainers_and_says_what_the_reward_hides(one):
    keys = (
        "step loss reward reward_std frac_reward_zero_std kl entropy completion_length clip_ratio grad_norm"
    )
    keys += " learning_rate seconds_wait seconds_rollout seconds_score seconds_update peak_memory_mb"
    keys += " hedged named_none official cut_ratio bad_clips"
    rows = log(one)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(set(keys.split()) <= set(row) for row in rows)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3 * (5 - i) / 5 for i in range(5)])
    assert [row["step"] for row in scores(one)] == [0, 2, 4, 5]
    assert all(row["eval_low"] < row["eval_accuracy"] < row["eval_high"] for row in scores(one))


def test_gradients_are_clipped(world, one, tmp_path):
    """To a norm far below AdamW's epsilon, so that no weight moves."""
    assert train_here(tmp_path, *arguments(world, steps=1, max_grad_norm=1e-12)) == 0
    base = weights(world / "model")
    moved = distance(weights(one / "model"), base)
    assert distance(weights(tmp_path / "model"), base) < 1e-3 * moved and log(tmp_path)[0]["grad_norm"] > 0.01


def test_samples_show_what_was_said_and_paid(world, one):
    samples = rows_of(one / "samples.jsonl")
    assert [sample["step"] for sample in samples] == list(range(1, STEPS + 1))
    questions = {q.id: q for q in read_questions(world / "train_qa.json", world / "audio")}
    for sample in samples:
        question = questions[sample["id"]]
        assert sample["k"] == 0 and sample["audio"] == question.audio
        for text, reward in zip(sample["responses"], sample["rewards"], strict=True):
            assert reward == accuracy_reward(text, question.answer, list(question.choices))
        advantages = group_advantages(torch.tensor(sample["rewards"]))
        assert torch.allclose(torch.tensor(sample["advantages"]), advantages)


def test_models_samples_and_curves_go_where_they_are_asked_to(world, tmp_path, monkeypatch):
    curves = []
    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    stand_in.init = lambda **options: None
    stand_in.Table = lambda columns: types.SimpleNamespace(add_data=lambda *values: None)
    stand_in.log = lambda values, step: curves.append(step)
    stand_in.finish = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    more = {"save_model_every": 2, "samples": 2, "model_only": "thinker", "wandb": "project"}
    assert train_here(tmp_path / "r", *arguments(world, steps=5, **more)) == 0
    folders = sorted(path.name for path in (tmp_path / "r").glob("model*"))
    assert folders == ["model", "model-step-2", "model-step-4"]
    w2, w4, last = (weights(tmp_path / "r" / name) for name in (*folders[1:], "model"))
    assert distance(w2, w4) > 0 and distance(w4, last) > 0
    assert json.loads((tmp_path / "r" / "model" / "config.json").read_text())["model_type"].endswith(
        "thinker"
    )
    samples = rows_of(tmp_path / "r" / "samples.jsonl")
    assert [(row["step"], row["k"]) for row in samples] == [(s, k) for s in range(1, 6) for k in (0, 1)]
    assert set(curves) == set(range(1, 6))
    assert train_here(tmp_path / "none", *arguments(world, steps=1, samples=0, save_every=1)) == 0
    assert rows_of(tmp_path / "none" / "samples.jsonl") == []


def test_one_question_is_explained_and_nothing_is_written(world, tmp_path, capsys):
    reward = tmp_path / "mine.py"
    reward.write_text("def half(response, answer, choices): return 0.5 * (response == answer)")
    options = arguments(world, reward=f"{reward}:half", seed=3)
    assert train_here(tmp_path / "out", *options, "--explain") == 0
    said = capsys.readouterr().out
    assert said.count("answer ") >= 4 and "reward 0.5 (Eq. 2)" in said and "kl        0.000000" in said
    reward.write_text("def half(response, answer, choices): return 0.5")
    # A group that teaches nothing is scored all the same.
    assert train_here(tmp_path / "out", *options, "--explain", "--beta", 0) == 0
    assert capsys.readouterr().out.split("entropy ")[1].split()[0] == said.split("entropy ")[1].split()[0]
    data, clips = broken_world(world, tmp_path, broken=20)
    broken = arguments(world, data=data, audio_dir=clips)
    assert train_here(tmp_path / "out", *broken, "--explain") == 2
    assert "clips in a row cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_held_out_questions_are_never_trained_on(world):
    """The same ones whatever the seed, and none of them among any step's questions."""
    options = parse(arguments(world, hold_out=300))
    loaded = load_questions(options, check_clips)
    held_out = {question.id for question in loaded.held_out}
    trained = {question.id for file in loaded.files for question in file}
    assert len(held_out) == 300 and not held_out & trained and len(trained) == 300
    assert (
        loaded.held_out == load_questions(parse(arguments(world, hold_out=300, seed=5)), check_clips).held_out
    )


VARIANTS = {
    "DAPO": {"loss": "token", "epsilon_high": 0.28, "beta": 0, "mask_truncated": True},
    "Dr. GRPO": {"loss": "dr", "scale_rewards": "off", "beta": 0},
    "R1-AQA's prompt": {"prompt": "answer", "format_weight": 0.5, "reward": "contains"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_the_same_on_two_processes_and_two_updates_make_the_clip_work(
    world, pair, name, tmp_path
):
    options = arguments(world, updates=2, steps=3, **VARIANTS[name])
    assert train_here(tmp_path / "r1", *options) == 0
    pair.train(tmp_path / "r2", *options)
    for row, other in zip(log(tmp_path / "r1"), log(tmp_path / "r2"), strict=True):
        for key in ("loss", "reward", "clip_ratio", "kl", "entropy"):
            if key == "entropy" and row["frac_reward_zero_std"] == 1:
                continue  # each process has scored one group that teaches nothing
            assert row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key  # a KL can be 100
    assert any(row["clip_ratio"] > 0 for row in log(tmp_path / "r1"))


def test_a_narrower_clip_clips_more(world, tmp_path):
    clipped = []
    for epsilon in (0.2, 0.01):
        out = tmp_path / str(epsilon)
        assert train_here(out, *arguments(world, updates=2, steps=1, epsilon=epsilon)) == 0
        clipped.append(log(out)[0]["clip_ratio"])
    assert 0 <= clipped[0] < clipped[1]


@pytest.mark.parametrize("kind", ["qwen2audio", "omni with LoRA"])
def test_processes_whose_groups_teach_unlike_numbers_meet_in_every_collective(
    world, world_qwen2audio, pair, kind, tmp_path
):
    """Without a KL divergence, groups of equal rewards are not scored; a layer's call is a collective."""
    reward = tmp_path / "mine.py"
    reward.write_text("def odd(response, answer, choices): return len(response) * (len(answer) % 2)")
    where = world_qwen2audio if kind == "qwen2audio" else world
    options = arguments(
        where, beta=0, reshard="on", reward=f"{reward}:odd", lora=4 * ("LoRA" in kind), steps=3
    )
    pair.train(tmp_path / "r2", *options)
    assert train_here(tmp_path / "r1", *options) == 0
    rows, others = log(tmp_path / "r1"), log(tmp_path / "r2")
    assert any(0 < row["frac_reward_zero_std"] < 1 for row in rows)
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-5)
        assert row["entropy"] == pytest.approx(other["entropy"], abs=1e-5) or row["frac_reward_zero_std"] == 1


def mixed(world, **more):
    """A run that draws each step from AVQA with audio or ARC without."""
    files = [world / "train_qa.json", world / "arc.jsonl"]
    return arguments(world, data=files, shares=[0.5, 0.5], **more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no_audio", "mixed"])
def test_two_processes_are_one_without_audio_and_mixed(world, tmp_path, kind):
    make = mixed if kind == "mixed" else (lambda w, **more: arguments(w, no_audio=True, **more))
    for processes in (1, 2):
        train(tmp_path / f"r{processes}", *make(world), processes=processes)
    base, w1, w2 = weights(world / "model"), *(weights(tmp_path / f"r{n}" / "model") for n in (1, 2))
    assert 0 < distance(w2, w1) <= 1e-3 * distance(w1, base) or distance(w2, w1) == 0
    assert [r["reward"] for r in log(tmp_path / "r1")] == [r["reward"] for r in log(tmp_path / "r2")]


def kill_and_resume(out, options, processes, moments, seed=0, launcher_only=False):
    """Start the run; kill -9 all its processes, or torchrun alone, at random moments; start it again at once,
    until it ends.
    """
    rng, environ = random.Random(seed), environment()
    for moment in range(moments):
        with open(os.devnull, "w") as quiet:
            job = subprocess.Popen(
                command(processes, "--out", out, *options),
                cwd=ROOT, env=environ, stdout=quiet, stderr=quiet, start_new_session=True,
            )  # fmt: skip
        have, deadline = len(so_far(out)), time.time() + 300
        if launcher_only and moment % 3 == 0:
            deadline = time.time() + rng.uniform(1, 8)  # while its processes import torch or meet
        while job.poll() is None and time.time() < deadline:  # into its steps, so that something is lost
            if len(so_far(out)) not in (0, have):
                break
            time.sleep(0.02)
        time.sleep(rng.random())
        children = children_of(job.pid)
        job.kill()
        if launcher_only:
            job.wait()
            all_end(children, seconds=5)
        else:
            send_all(children, signal.SIGKILL)
        job.wait()
    train(out, *options, processes=processes)


def killed_is_uninterrupted(world, out, kind, processes, kills, pair=None, launcher_only=False, **more):
    options = {"steps": 12, "save_every": 2, "batch": 2, "no_audio": kind == "no_audio"} | more
    options = (mixed if kind == "mixed" else arguments)(world, **options)
    if pair:
        pair.train(out / "whole", *options)
    else:
        train(out / "whole", *options, processes=processes)
    kill_and_resume(out / "killed", options, processes, kills, launcher_only=launcher_only)
    whole, killed = weights(out / "whole" / "model"), weights(out / "killed" / "model")
    assert distance(whole, weights(world / "model")) > 0
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    for row, other in zip(log(out / "whole"), log(out / "killed"), strict=True):
        assert all(row[key] == other[key] for key in ("step", "loss", "reward", "grad_norm", "kl"))


def test_killed_is_uninterrupted(world, pair, tmp_path):
    killed_is_uninterrupted(world, tmp_path, "mixed", processes=2, kills=1, pair=pair)


@pytest.mark.slow
def test_ten_killed_launchers_change_nothing(world, pair, tmp_path):
    """Their processes may outlive them by a moment, when the next ones are there already."""
    killed_is_uninterrupted(world, tmp_path, "audio", 2, kills=10, pair=pair, launcher_only=True, steps=40)


def own_processes():
    """A command before another, which is then process 1."""
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces for users here")
    return alone


@pytest.mark.slow
def test_it_trains_where_nothing_else_runs(world, tmp_path):
    """As in a container: the run is process 1 there, and the parent of those that decode clips."""
    run = [*own_processes(), *command(1, "--out", tmp_path, *arguments(world, steps=2))]
    done = subprocess.run(run, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wide_world(tmp_path_factory):
    """A model wide enough for a backward pass that is not deterministic to show (hidden size 512)."""
    folder = tmp_path_factory.mktemp("wide") / "world"
    tiny.make_world(folder, effort=0.15, hidden=512, sizes={"train": 60, "arc": 40, "mmau": 20, "mmar": 8})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("kind", "kills"), [("audio", 4), ("no_audio", 3), ("mixed", 3)])  # 20 in all
def test_killed_twenty_times_on_a_wide_model(wide_world, tmp_path, kind, kills, processes):
    killed_is_uninterrupted(wide_world, tmp_path, kind, processes, kills, group_size=8, lr=1e-4)


def started(processes, out, *options, rows=1, **more):
    """A run that has begun: so many steps are in the log."""
    job = subprocess.Popen(
        command(processes, "--out", out, *options),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more,
    )  # fmt: skip
    deadline = time.time() + 300
    while time.time() < deadline and len(so_far(out)) < rows and job.poll() is None:
        time.sleep(0.01)
    return job


def test_a_signal_to_the_whole_group_saves_and_another_number_of_processes_goes_on(
    world, one, tmp_path, capsys
):
    """As a scheduler stops a job: SIGTERM to torchrun, its processes and theirs that decode clips."""
    reward = tmp_path / "reward_in_time.py"
    reward.write_text(f"""if True:
        import pathlib, time, reward
        def exact(*asked):  # in no hurry, as long as the test is not
            time.sleep(0.1 * pathlib.Path({str(tmp_path / "wait")!r}).exists())
            return reward.accuracy_reward(*asked)
    """)
    options = arguments(world, hold_out=40, eval_every=2, reward=f"{reward}:exact")
    (tmp_path / "wait").touch()
    job = started(2, tmp_path, *options)
    send_all([job.pid, *children_of(job.pid)], signal.SIGTERM)
    (tmp_path / "wait").unlink()
    output, _ = job.communicate(timeout=300)
    assert job.returncode != 0 and "saved" in output
    (saved,) = (tmp_path / "checkpoints").glob("step-*")
    assert int(saved.name[5:]) == len(log(tmp_path)) < STEPS
    assert train_here(tmp_path, *options, "--lr", 2e-3, "--beta", 0.1) == 2
    assert "beta: 0.04 -> 0.1; lr: 0.001 -> 0.002" in capsys.readouterr().err
    assert train_here(tmp_path, *options) == 0
    assert train_here(tmp_path, *options) == 0 and "finished" in capsys.readouterr().out
    assert train_here(tmp_path, *options, "--lr", 2e-3) == 2 and "lr: 0.001" in capsys.readouterr().err
    base, w1, w2 = weights(world / "model"), weights(one / "model"), weights(tmp_path / "model")
    assert distance(w2, w1) <= 1e-3 * distance(w1, base)


def test_a_killed_launcher_leaves_no_process_and_a_second_start_waits_for_its_turn(world, tmp_path):
    options = arguments(world, steps=3000, save_every=5)
    job = started(2, tmp_path, *options)
    second = train(tmp_path, *options, check=False)
    assert second.returncode == 2 and "one run writes to a place at a time" in second.stderr
    assert f"process {os.getpid()}" not in second.stderr and "Traceback" not in second.stderr
    children = children_of(job.pid)
    assert len(children) >= 4  # two processes, and one each that decodes clips
    job.kill()
    job.wait()
    all_end(children, seconds=5)
    rows = len(log(tmp_path))
    resumed = started(1, tmp_path, *options, rows=rows + 1)
    os.kill(resumed.pid, signal.SIGTERM)
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 128 + signal.SIGTERM and "saved" in output and rows > 0


@pytest.mark.parametrize("parent", ["sh", "python"])
def test_a_worker_whose_launcher_died_before_it_looked_ends(parent):
    """Process 1 has adopted it then. A torchrun that is process 1 itself, as in a container, is alive."""
    worker = [sys.executable, "-c", "import fsdp; print('goes on')"]
    init = ["sh", "-c", f"{shlex.join(worker)}; true"]
    if parent == "python":
        init = [sys.executable, "-c", f"import subprocess; subprocess.run({worker})"]
    torchrun = {"RANK": "0", "TORCHELASTIC_RUN_ID": "1"}
    done = subprocess.run(
        [*own_processes(), *init], cwd=ROOT, env=os.environ | torchrun, capture_output=True, text=True
    )
    assert done.stdout == ("goes on\n" if parent == "python" else "") and not done.stderr


@pytest.mark.slow
def test_pythons_way_to_start_processes_changes_nothing(world, one, tmp_path):
    """From Python 3.14 on that is a server which forks them."""
    script = "import multiprocessing as m; m.set_start_method('forkserver'); import train; train.main()"
    options = arguments(world, hold_out=40, eval_every=2, out=tmp_path)
    subprocess.run([sys.executable, "-c", script, *options], cwd=ROOT, env=environment(), check=True)
    assert distance(weights(one / "model"), weights(tmp_path / "model")) == 0


def children_of(pid):
    """All processes below `pid`, its own children first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(")")[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
    for child in list(found):
        found += children_of(child)
    return found


def send_all(processes, number):
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def all_end(processes, seconds):
    deadline = time.time() + seconds
    while time.time() < deadline and any(is_alive(pid) for pid in processes):
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in processes)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(world, tmp_path, caplog, capsys):
    """Flipped bytes anywhere, in run.json and in the log too; log and samples come back with it."""
    options = arguments(world, steps=7, save_every=2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stop_at(6, whole, options)
    shutil.copytree(whole, broken)
    rng = random.Random(0)
    folders = sorted((whole / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000004", "step-000006"]
    names = sorted(path.name for path in folders[-1].iterdir())
    for name in 2 * names:  # 20 flips
        shutil.rmtree(broken)
        shutil.copytree(whole, broken)
        flip(broken / "checkpoints" / "step-000006" / name, rng)
        assert intact(broken) == "step-000004", name
        flip(broken / "checkpoints" / "step-000004" / name, rng)
        assert intact(broken) is None
    shutil.rmtree(broken)
    shutil.copytree(whole, broken)
    flip(broken / "checkpoints" / "step-000006" / "run.json", rng)
    (broken / "log.jsonl").unlink()
    assert train_here(whole, *options) == 0 and train_here(broken, *options) == 0
    assert "step-000006 is damaged (run.json)" in caplog.text
    assert distance(weights(whole / "model"), weights(broken / "model")) == 0
    assert [row["step"] for row in log(broken)] == [row["step"] for row in log(whole)] == list(range(1, 8))


def test_a_checkpoint_that_was_just_saved_is_kept_whatever_damaged_ones_stand_behind(world, tmp_path):
    options = arguments(world, steps=9, save_every=2, keep=1)
    stop_at(6, tmp_path, options)
    folder = tmp_path / "checkpoints"
    (folder / "step-000006" / "run.json").unlink()
    shutil.copytree(folder / "step-000006", folder / "step-000004")
    stop_at(3, tmp_path, options)
    assert intact(tmp_path) == "step-000003"
    assert [path.name for path in folder.iterdir()] == ["step-000003"]


def test_a_folder_or_run_of_others_is_not_written_to(world, one, tmp_path, capsys):
    options = arguments(world)
    (tmp_path / "log.jsonl").write_text("mine\n")
    assert train_here(tmp_path, *options) == 2
    assert "no run of this program" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_text() == "mine\n"
    questions = json.loads((world / "train_qa.json").read_text())
    questions[0]["question_text"] += "?"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(questions))
    config = json.loads((one / "config.json").read_text())
    config["data"] = [str(other)]
    shutil.copytree(one, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    options = arguments(world, data=other, hold_out=40, eval_every=2)
    assert train_here(tmp_path / "run", *options) == 2
    assert "questions: " in capsys.readouterr().err


def stop_at(step, out, options):
    """A run that a signal ends once `step` is taken."""
    take_step = Run.take_step

    def take_and_stop(run, asked):
        row = take_step(run, asked)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "take_step", take_and_stop)
        assert train_here(out, *options) == 128 + signal.SIGTERM


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def intact(out):
    """Name of the newest checkpoint that is whole, as a run of one process sees it."""
    fsdp.start_processes()
    found = fsdp.newest_intact(out)
    torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    return found and found.name


def test_a_steps_questions_are_shared_evenly_or_not_at_all():
    for world in (1, 2, 4, 8):
        config = parse([])
        set_batch(config, world)
        assert config.batch == 8
    with pytest.raises(InputError, match="--batch 8 cannot be shared by 3 processes"):
        set_batch(parse([]), 3)
    config = parse(["--accumulation", "2"])
    set_batch(config, 3)
    assert config.batch == 6


BAD_ARGUMENTS = {
    "model": ("no/such/folder", "no model folder"),
    "data": ("nothing.json", "nothing.json"),
    "steps": (0, "--steps"),
    "group_size": (1, "--group_size"),
    "accumulation": (-1, "--accumulation"),
    "seed": (-1, "--seed"),
    "seed (that no generator takes)": (2**64, "--seed"),
    "timeout": ("nan", "--timeout"),
    "shares": ("nan", "--shares"),
    "lr": ("inf", "--lr"),
    "beta": ("nan", "--beta"),
    "reward": ("no_such.py:f", "no_such.py"),
    "wandb": ("project", "wandb is not installed"),
    "eval_data": ("nothing.json", "nothing.json"),
    "replicas": (3, "--replicas"),
    "audio_dir": ("/nowhere", "no readable clip"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_get_one_line_and_exit_code_2(world, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    value, words = BAD_ARGUMENTS[name]
    code = train_here(tmp_path / "run", *arguments(world, **{name.split()[0]: value}))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "run" / "log.jsonl").exists()


def broken_world(world, folder, broken):
    """The world's training questions with their clips, `broken` of which have a good header and bad
    samples.
    """
    questions = read_questions(world / "train_qa.json", world / "audio")[:20]
    rows = [question.meta["source"] for question in questions]
    (folder / "audio").mkdir()
    for i, question in enumerate(questions):
        target = folder / "audio" / f"{rows[i]['video_name']}.wav"
        samples, rate = soundfile.read(question.audio, dtype="float32")
        if i < broken:
            samples[len(samples) // 2] = float("nan")
        soundfile.write(target, samples, rate, subtype="FLOAT")
    (folder / "train_qa.json").write_text(json.dumps(rows))
    return folder / "train_qa.json", folder / "audio"


def test_a_clip_that_fails_to_decode_is_replaced_the_same_way_on_any_number_of_processes(
    world, pair, tmp_path, caplog
):
    data, clips = broken_world(world, tmp_path, broken=2)
    options = arguments(world, data=data, audio_dir=clips, max_bad=0.5)
    assert train_here(tmp_path / "r1", *options) == 0
    assert "replaced" in caplog.text
    pair.train(tmp_path / "r2", *options)
    one, two = log(tmp_path / "r1"), log(tmp_path / "r2")
    assert [r["reward"] for r in one] == [r["reward"] for r in two] and one[-1]["bad_clips"] == two[-1][
        "bad_clips"
    ] > 0


def test_a_non_finite_loss_stops_before_the_optimizer_moves(world, tmp_path, capsys):
    """A weight that is infinite makes the first step's loss NaN: nothing is stepped, the questions are
    named.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.down_proj.weight") and "talker" not in n)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert train_here(tmp_path / "run", *arguments(world, model=tmp_path / "model")) == 2
    assert "not finite" in capsys.readouterr().err
    asked = json.loads((tmp_path / "run" / "nonfinite-step-1-rank-0.json").read_text())
    assert len(asked) == 4 and all(len(row["responses"]) == 4 for row in asked)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line(world, tmp_path, capsys):
    (tmp_path / "config.json.writing").symlink_to("/dev/full")
    assert train_here(tmp_path, *arguments(world, steps=1)) == 2
    assert "error: [Errno 28]" in capsys.readouterr().err


@pytest.mark.slow
def test_one_process_dying_ends_the_run(world, tmp_path):
    job = started(2, tmp_path, *arguments(world, steps=5000))
    os.kill(children_of(job.pid)[0], signal.SIGKILL)
    output, _ = job.communicate(timeout=300)
    assert job.returncode != 0 and "exitcode" in output


@pytest.mark.slow
def test_a_hung_process_ends_the_run_with_the_reason(world, tmp_path):
    job = started(2, tmp_path, *arguments(world, steps=5000, timeout=0.5))
    os.kill(children_of(job.pid)[0], signal.SIGSTOP)
    output, _ = job.communicate(timeout=300)
    assert job.returncode != 0 and "error: another process died or hangs" in output


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one_intact(world, one, tmp_path):
    """A limit on the size of files stands for a full disk: it stops the checkpoint of step 4, not the log."""
    options = [*arguments(world, save_every=2, hold_out=40, eval_every=2), "--out", tmp_path]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    done = subprocess.run(
        command(1, *options), cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 2 and "checkpoint of step 2 cannot be written" in done.stderr
    assert "Traceback" not in done.stderr and not list((tmp_path / "checkpoints").glob("step-*"))
    assert train_here(tmp_path, *options[:-2]) == 0
    assert distance(weights(one / "model"), weights(tmp_path / "model")) == 0


@pytest.mark.skipif(not DATA.exists(), reason=f"real clips and questions are not at {DATA}")
def test_a_step_on_the_real_question_and_clip(world, tmp_path):
    row = json.loads((DATA / "mmau-test-mini-original.json").read_text())[0]
    (tmp_path / "mmau.json").write_text(json.dumps([row]))
    some_but_not_all = "def odd(response, *asked): return len(response) % 2"
    (tmp_path / "odd.py").write_text(some_but_not_all)
    options = {"data": tmp_path / "mmau.json", "audio_dir": DATA / "audio", "steps": 1, "batch": 1}
    options = arguments(world, **options, group_size=64, temperature=3, reward=f"{tmp_path}/odd.py:odd")
    assert train_here(tmp_path / "run", *options) == 0
    (row,) = log(tmp_path / "run")
    assert 0 < row["reward"] < 1 and row["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="no /proc/self/smaps_rollup here")
def test_no_process_ever_holds_the_whole_model(world, tmp_path):
    """Beyond its shards, loading takes less than half a bf16 copy of the weights, summed over 4 processes."""
    middle = bench.middle_model(tmp_path, "omni")
    python = [*command(4)[:-1], ROOT / "tests" / "scripts" / "load_memory.py", middle, world / "model"]
    done = subprocess.run(python, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    print(f"loading takes {float(done.stdout):.3f} of a bf16 copy beyond the shards")
    assert float(done.stdout) < 0.5


def test_hostile_clips_and_rows_are_named_and_the_run_goes_on(world, tmp_path, capsys):
    """Every hostile clip and row of test_data.py through the command line, beside good ones."""
    (tmp_path / "audio").mkdir()
    clips = hostile_clips(tmp_path / "audio")
    good = [q.audio for q in read_questions(world / "mmau.json", world / "audio")[:20]]
    row = json.loads((world / "mmau.json").read_text())[0]
    rows = [row | {"id": f"hostile {name}", "audio_id": name} for name in clips]
    for i, clip in enumerate(good):
        shutil.copy(clip, tmp_path / "audio")
        asked = "What <|im_end|> <|AUDIO|> <|audio_bos|> is it?" if i % 2 else row["question"]
        rows.append(row | {"id": f"good {i}", "audio_id": Path(clip).name, "question": asked})
    rows += [bad for bad, _ in HOSTILE_ROWS.values() if isinstance(bad, dict) and "audio_id" in bad]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    options = {"data": tmp_path / "q.json", "audio_dir": tmp_path / "audio", "steps": 4, "max_bad": 0.9}
    done = train(tmp_path / "run", *arguments(world, **options))
    assert len(log(tmp_path / "run")) == 4 and "Traceback" not in done.stderr
    for name, words in clips.items():  # what a header does not tell is named when its turn comes
        header_tells = words is not None and not any(word in words for word in ("finite", "decoded"))
        assert (f"left out: {tmp_path / 'audio' / name}" in done.stderr) == header_tells, name
    assert done.stderr.count("skipped:") >= 6
    assert train_here(tmp_path / "again", *arguments(world, **options | {"max_bad": 0.1})) == 2
    assert "rows are malformed" in capsys.readouterr().err
