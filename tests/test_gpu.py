"""What a CPU can prove of a run on GPUs: bf16, the collectives of a step, no tensor on the wrong device."""

import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import arguments, environment, log, train_here, weights

import fsdp
import tiny
from data import read_questions
from files import InputError
from model import empty_lm, load_weights
from plan import choose_plan
from train import Run

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------ bf16


def options_of(world, **more) -> list[str]:
    return arguments(world, batch=2, steps=3, lr=1e-4, dtype="bfloat16", save_minutes=1e-9, **more)


@pytest.fixture(scope="module")
def in_fp32(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("fp32")
    assert train_here(out, *options_of(world), "--dtype", "float32") == 0
    return log(out)


@pytest.mark.parametrize(
    "layout",
    [{}, {"reshard": "on", "checkpointing": "on"}, {"cpu_offload": "on"}, {"cpu_offload": "moments"}],
)
def test_bf16_starts_with_a_kl_of_0_stays_near_fp32_and_resumes_bit_for_bit(
    world, in_fp32, layout, tmp_path, monkeypatch
):
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"
    save = Run.save

    def save_and_keep(run):
        save(run)
        if run.step == 2 and not stopped.exists():
            shutil.copytree(whole, stopped)  # what a kill leaves at this moment

    monkeypatch.setattr(Run, "save", save_and_keep)
    for out in (whole, stopped):
        assert train_here(out, *options_of(world, **layout)) == 0
    rows = log(whole)
    assert rows[0]["kl"] == 0 and max(row["kl"] for row in rows) > 0  # of some steps bf16 shows nothing
    assert rows[0]["entropy"] == pytest.approx(in_fp32[0]["entropy"], rel=0.1)
    for row, other, resumed in zip(rows, in_fp32, log(stopped), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=0.05)
        assert all(row[key] == resumed[key] for key in ("step", "loss", "reward", "grad_norm", "kl"))
    resumed = weights(stopped / "model")
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights(whole / "model").items())


def test_a_reference_in_host_memory_changes_nothing(world, in_fp32, tmp_path, monkeypatch):
    """The layout of the smallest cards, which no option asks for."""

    def with_reference(*about):
        chosen = choose_plan(*about)
        return replace(chosen, layout=replace(chosen.layout, offload="on (reference too)"))

    monkeypatch.setattr("train.choose_plan", with_reference)
    assert train_here(tmp_path, *options_of(world, cpu_offload="on"), "--dtype", "float32") == 0
    for row, other in zip(log(tmp_path), in_fp32, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert row["kl"] == pytest.approx(other["kl"], abs=1e-6)


# ----------------------------------------------------------------------------------------------- collectives


LAYOUTS = [{"reshard": "on", "accumulation": 2}, {"reshard": "on", "accumulation": 1}, {}]


def test_a_group_is_gathered_four_times_a_pass_at_most_and_reduced_once_whatever_the_tokens(
    world, pair, tmp_path
):
    out = tmp_path / "calls.json"
    runs = []
    for layout in LAYOUTS:
        for tokens in (2, 9):
            options = arguments(world, batch=4, max_new_tokens=tokens, **layout)
            runs.append(json.dumps(options))
    pair.run("collectives", out, *runs)
    found = json.loads(out.read_text())
    norms = []
    for one in found:
        norms.append(one.pop("norm"))
        assert norms[-1] == pytest.approx(one.pop("norm of torch"), rel=1e-6)
        assert 0 < one["all_gather_single"] <= 4 * one["passes"] * one["groups"]
        assert one["reduce_scatter_single"] == one["passes"] * one["groups"]
    assert min(norms) > 0
    assert [one["passes"] for one in found] == [2, 2, 1, 1, 1, 1]
    assert found[::2] == found[1::2]  # 2 tokens and 9
    # Nothing re-sharded: policy and reference, once.
    assert found[4]["all_gather_single"] == 2 * found[4]["groups"]


# ------------------------------------------------------------------------------------- devices are not mixed


@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("family", ["omni", "qwen2audio"])
def test_what_computes_is_all_on_the_accelerator(family, audio, tmp_path, monkeypatch):
    """The meta device stands in for it: an operation on tensors of two devices raises there as on CUDA.

    As under --cpu_offload: the storage is in host memory, FSDP gathers the weights on the accelerator.
    """
    world = tmp_path / "world"
    tiny.make_world(world, family, effort=0, sizes={"train": 2, "arc": 1, "mmau": 1, "mmar": 1})
    lm = load_weights(empty_lm(world / "model", torch.bfloat16, audio), "cpu", compute="meta")
    for module in lm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"))
    assert lm.device.type == "meta"
    questions = read_questions(world / "train_qa.json", world / "audio")[:2]
    prompts = [lm.encode(question, audio) for question in questions]

    monkeypatch.setattr(lm, "all_done", lambda done: False)  # nothing on this device has a value
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    longest = max(len(prompt.input_ids) for prompt in prompts)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: longest)  # what a mask's size is read from
    responses = lm.generate(prompts, max_new_tokens=3, group_size=4, temperature=1.2)
    scores = lm.score(prompts, responses)
    assert scores.logps.device.type == scores.mask.device.type == "meta"
    assert scores.logps.shape == (8, 3)
    scores.logps.sum().backward()
    assert lm.model.lm_head.weight.grad.device.type == "meta"


# ---------------------------------------------------------------------------------- what a process sets itself


def test_a_process_with_a_gpu_has_its_share_of_the_cores_whatever_torchrun_says(monkeypatch):
    """An optimizer in host memory wants them, and torchrun sets OMP_NUM_THREADS=1."""
    said = {}
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: said.update(threads=count))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: said.update(backend=backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(30))
    assert fsdp.start_processes() == (3, 8, torch.device("cuda", 3))
    assert said == {"threads": 7, "backend": "cpu:gloo,cuda:nccl"}
    # cuDNN's attention plans anew for every shape.
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(False)


def test_bfloat16_where_the_gpu_computes_in_it_not_where_it_is_emulated(monkeypatch):
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert fsdp.compute_dtype("auto", torch.device("cuda")) == expected
    assert fsdp.compute_dtype("bfloat16", torch.device("cuda")) == "bfloat16"
    assert fsdp.compute_dtype("auto", torch.device("cpu")) == "float32"


def test_an_old_driver_is_told_and_an_empty_list_of_gpus_is_a_cpu(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fsdp.check_driver(tmp_path)
    for name, text in {"dev/nvidia0": "", "proc/driver/nvidia/version": "NVRM 470.1\nGCC"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"CUDA .* driver: NVRM 470.1\. .*newer driver") as error:
        fsdp.check_driver(tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fsdp.check_driver(tmp_path)


def test_moments_in_host_memory_and_local_clipping_are_torchs_own_bit_for_bit(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: tensor.clone())  # as to a GPU
    torch.manual_seed(0)
    start = [torch.randn(40, 30), torch.randn(7), torch.randn(3, 5)]
    ours = [torch.nn.Parameter(one.clone()) for one in start]
    theirs = [torch.nn.Parameter(one.clone()) for one in start]
    optimizer = fsdp.make_optimizer(ours, 1e-2, host=True)
    reference = torch.optim.AdamW(theirs, 1e-2, weight_decay=0.0, fused=True)
    for step in range(4):
        for i in range(2 + step % 2):  # one of them has no gradient every other step
            ours[i].grad = torch.randn(start[i].shape)
            theirs[i].grad = ours[i].grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert fsdp.clip_gradients(ours, 1.0) == norm.item() > 1
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)


FORK = multiprocessing.get_context("fork")  # a start would import for seconds


def wait_for_ever(pids) -> None:
    """In C, as a collective does whose other processes are gone: Python's handlers do not run."""
    importlib.reload(fsdp)  # its first lines bind this process to torchrun's life
    fsdp.Stop(patience=0.2)
    pids.put(os.getpid())
    dist.HashStore().wait(["what another process would say"], timedelta(seconds=99))


def start_one(pids) -> None:
    """As torchrun."""
    os.environ["RANK"] = "0"
    FORK.Process(target=wait_for_ever, args=(pids,)).start()
    time.sleep(99)


def test_a_process_ends_with_torchrun_and_where_a_signal_finds_its_step_without_end():
    pids = FORK.SimpleQueue()
    process = FORK.Process(target=wait_for_ever, args=(pids,))
    process.start()
    pids.get()
    process.terminate()
    process.join(5)
    assert process.exitcode == 1  # its watchdog's
    process = FORK.Process(target=start_one, args=(pids,))
    process.start()
    pid = pids.get()
    process.kill()
    deadline = time.time() + 5
    while time.time() < deadline and is_running(pid):
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog):
    fsdp.start_processes()
    for step in (1, 2, 3, 4):
        fsdp.save_checkpoint(tmp_path, step, {"a": torch.full((9,), float(step))}, {}, keep=3)
    folders = fsdp.checkpoints(tmp_path)
    assert [folder.name for folder in folders] == ["step-000002", "step-000003", "step-000004"]
    (folders[2] / "run.json").write_text("{")
    piece = max(folders[1].glob("*.distcp"), key=lambda file: file.stat().st_size)
    piece.write_bytes(piece.read_bytes()[:-1])
    assert fsdp.newest_checkpoint(tmp_path) == folders[0]
    assert "step-000004 is damaged" in caplog.text and "step-000003 is damaged" in caplog.text
    tensors = {"a": torch.zeros(9)}
    fsdp.load_checkpoint(folders[0], tensors)
    assert tensors["a"].tolist() == [2.0] * 9
    dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------- the GPU's script


@pytest.mark.slow
def test_what_a_gpu_is_tested_with_runs_on_a_cpu(world, tmp_path):
    out = tmp_path / "gpu.md"
    command = [sys.executable, "tests/gpu.py", "--size", "tiny", "--world", world, "--out", out]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = out.read_text()
    assert "BROKEN" not in table and table.count("| holds |") == 6 and "ms a token" in table
