"""What a CPU can prove of a run on GPUs: bf16, no tensor on the wrong device, how a process starts and ends."""

import importlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import arguments, environment, log, stop_at, train_here, weights

import fsdp
from conftest import FORK
from data import read_questions
from files import InputError
from model import empty_lm
from plan import choose_plan
from weights import load_weights

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------------ bf16


def options_of(world, **more) -> list[str]:
    return arguments(world, batch=2, steps=3, lr=1e-4, dtype="bfloat16", save_minutes=1e-9, **more)


LAYOUTS = [{"cpu_offload": "moments"}, {"cpu_offload": "on", "reshard": "on", "checkpointing": "on"}]


@pytest.mark.parametrize("layouts", [[], pytest.param(LAYOUTS, marks=pytest.mark.slow)])
def test_bf16_starts_with_a_kl_of_0_stays_near_fp32_and_resumes_bit_for_bit_in_any_layout(
    world, tmp_path, monkeypatch, layouts
):
    """The reference in host memory is the layout of the smallest cards, which no option asks for."""
    fp32, whole = tmp_path / "fp32", tmp_path / "bf16"
    assert train_here(fp32, *options_of(world), "--dtype", "float32") == 0
    assert train_here(whole, *options_of(world)) == 0
    rows, expected = log(whole), weights(whole / "model")
    assert rows[0]["kl"] == 0 and max(row["kl"] for row in rows) > 0  # of some steps bf16 shows nothing
    for row, other in zip(rows, log(fp32), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=0.05)
        assert row["entropy"] == pytest.approx(other["entropy"], rel=0.1)

    def with_reference(*about):
        chosen = choose_plan(*about)
        offload = chosen.layout.offload.replace("on", "on (reference too)")
        return replace(chosen, layout=replace(chosen.layout, offload=offload))

    monkeypatch.setattr("train.choose_plan", with_reference)
    for layout in layouts:
        out = tmp_path / layout["cpu_offload"]
        options = options_of(world, **layout)
        stop_at(2, out, options)
        assert train_here(out, *options) == 0
        for row, other in zip(log(out), rows, strict=True):
            assert all(row[key] == other[key] for key in ("step", "loss", "reward", "grad_norm", "kl"))
        for name, weight in weights(out / "model").items():
            assert torch.equal(weight, expected[name]), name


# ------------------------------------------------------------------------------------- devices are not mixed


@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("family", ["world", "world_qwen2audio"])
def test_what_computes_is_all_on_the_accelerator(family, audio, request, monkeypatch):
    """The meta device stands in for it: an operation on tensors of two devices raises there as on CUDA.

    As under --cpu_offload: the storage is in host memory, FSDP gathers the weights on the accelerator.
    """
    world = request.getfixturevalue(family)
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


# ------------------------------------------------------------------------------------------- the GPU's script


@pytest.mark.slow
def test_what_a_gpu_is_tested_with_runs_on_a_cpu(world, tmp_path):
    out = tmp_path / "gpu.md"
    command = [sys.executable, "tests/gpu.py", "--size", "tiny", "--world", world, "--out", out]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = out.read_text()
    assert "BROKEN" not in table and table.count("| holds |") == 6 and "ms a token" in table
