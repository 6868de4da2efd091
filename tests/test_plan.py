"""What a run takes, known before it starts: the arithmetic of the published models, and what the plan chooses."""

import functools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from scripts import fake_step
from transformers import WhisperFeatureExtractor

import plan
import tiny
from conftest import DATA, Processes
from files import InputError
from plan import DISK, GIB, choose_plan, find_card, lasting_bytes, step_seconds
from train import FIRST_SAVE, main, parse
from weights import empty_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
OMNI_7B, OMNI_3B, AUDIO_7B = "Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2-Audio-7B-Instruct"


def dimensions(name: str) -> dict:
    if not DATA.exists():
        pytest.skip(f"dimensions of the published models are not at {DATA}")
    return json.loads((DATA / "model-dimensions.json").read_text())[name]


def checkpoint(folder: Path, config: dict) -> Path:
    """A checkpoint's folder without its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    ids, _ = tiny.write_tokenizer(folder)
    config = json.loads(json.dumps(config))
    inner = config.get("thinker_config", config)
    inner["audio_token_index"] = ids["<|AUDIO|>"]
    (folder / "config.json").write_text(json.dumps(config))
    WhisperFeatureExtractor(feature_size=128, chunk_length=300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> the published model on the meta device, made once."""
    made = {}

    def model(name: str):
        if name not in made:
            made[name] = empty_model(checkpoint(tmp_path_factory.mktemp("config"), dimensions(name)))
        return made[name]

    return model


def choose(model, gpus: int, *options):
    return choose_plan(model, gpus, torch.bfloat16, parse(["--plan", *map(str, options)]), CPU, 10.0)


# ---------------------------------------------------------------------------------------------- the choice


PUBLISHED = [  # the README's rows: GPUs, card, more options, what is chosen, GiB a GPU, at most seconds a step
    (8, "H100", [], "nothing given up; 1 a pass", 37, 0.5),
    (4, "A6000", [], "cpu_offload moments; 2 a pass", 41, 6),
    (1, "H100", [], "cpu_offload on; 8 a pass", 76, 7),
    (1, "RTX4090", [], "checkpointing, cpu_offload on (reference too); 8 a pass", 21, 11),
    (1, "RTX4090", ["--lora", 64], "checkpointing; 4 a pass", 21, 5),
]


def test_the_published_rows_fit_and_are_what_is_chosen(models):
    for gpus, card, options, layout, gib, seconds in PUBLISHED:
        chosen = choose(models(OMNI_7B), gpus, "--gpu", card, *options)
        assert not chosen.why_not() and str(chosen.layout) == layout
        assert sum(chosen.gpu.values()) / GIB == pytest.approx(gib, abs=1)
        assert step_seconds(chosen) <= seconds
        assert not chosen.lora or chosen.disk["checkpoints"] < 6e9


def test_less_memory_gives_up_more_and_options_pin_what_is_chosen(models):
    for name in (OMNI_7B, OMNI_3B, AUDIO_7B):
        seconds = []
        for memory in (640, 80, 48, 24):
            chosen = choose(models(name), 4, "--gpu", memory)
            assert sum(chosen.gpu.values()) <= (memory - 1.5) * GIB
            seconds.append(step_seconds(chosen))
        assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
        everything = choose(models(name), 4)  # where memory is no object
        assert str(everything.layout) == "nothing given up; 2 a pass"
    pins = ["--reshard", "on", "--checkpointing", "on", "--cpu_offload", "moments", "--accumulation", 2]
    pinned = choose(models(OMNI_3B), 4, *pins)
    assert str(pinned.layout) == "reshard, checkpointing, cpu_offload moments; 1 a pass"


def test_a_tenth_of_a_run_on_8_h100_goes_to_checkpoints_at_most(models):
    """Of 1000 steps, at the disk speed that the plan states: saved every 20 minutes."""
    chosen = choose(models(OMNI_7B), 8, "--gpu", "H100")
    training = 1000 * step_seconds(chosen)
    count = 1 + (training / 60 - FIRST_SAVE) // chosen.config.save_minutes
    saving = count * chosen.disk["checkpoints"] / (chosen.config.keep + 1) / DISK
    assert 0 < saving <= 0.1 * (training + saving)


def test_a_card_is_found_by_the_drivers_name_and_by_a_persons():
    for gib, names in {
        47.5: ["NVIDIA RTX A6000", "a6000", "NVIDIA RTX 6000 Ada Generation", "6000ada"],
        79.2: ["NVIDIA A100-SXM4-80GB", "a100-80", "NVIDIA H100 80GB HBM3"],
        39.5: ["NVIDIA A100-PCIE-40GB", "A100"],
        23.5: ["NVIDIA GeForce RTX 4090", "4090", "RTX3090"],
        math.inf: ["NVIDIA L40", "NVIDIA A10", "H20", "NVIDIA GH200 480GB", ""],
    }.items():
        for name in names:
            assert find_card(name).memory == (gib - 1.5) * GIB, name


def test_the_numbers_of_designs_arithmetic(models, tmp_path):
    chosen = choose(models(OMNI_7B), 4, "--gpu", "A6000")
    lasting = lasting_bytes(chosen)
    state = sum(value for what, value in lasting.items() if "fp32 shards" in what)
    assert state / GIB == pytest.approx(30.8, rel=0.01)
    assert lasting["reference"] / GIB == pytest.approx(3.84, rel=0.01)
    assert chosen.disk["checkpoints"] / 3 == pytest.approx(100e9, rel=0.02)
    with open(tmp_path / "model-1.safetensors", "wb") as file:
        file.truncate(22 * 10**9)  # the hub's 7B with its talker; it takes no room
    asked = ("--model", tmp_path, "--steps", 1000, "--save_model_every", 250)
    for options, size in ((asked[:2], 22e9), (asked, 4 * 22e9)):
        assert choose(models(OMNI_7B), 1, *options).disk["model folders"] == size


# ------------------------------------------------------------------------------------ what is printed, refused


def plan_of(folder: Path, options: str, capsys, monkeypatch) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", f"train.py --plan --model {folder} {options}".split())
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


def test_a_plan_is_a_short_table_or_one_line_with_what_would_fit(tmp_path, capsys, monkeypatch):
    folder = checkpoint(tmp_path, dimensions(OMNI_7B))
    monkeypatch.setattr(plan, "empty_model", functools.cache(plan.empty_model))
    code, table, _ = plan_of(folder, "--world_size 4 --gpu A6000 --steps 500", capsys, monkeypatch)
    assert code == 0 and "each GPU: " in table and "disk: " in table
    assert "a checkpoint: 9" in table and "4 GB/s" in table
    assert re.search(r"layout: .* about \d+\.\d hours for 500 steps on A6000, not measured\n$", table)
    for options, words in {
        "--world_size 1 --gpu 4": r"does not fit: \d+\.\d GiB a GPU of 2\.5 .*what would: \S+",
        "--world_size 1 --gpu A6000 --cpu_offload off": "4 such GPUs or --lora 32",
        "--world_size 3 --gpu H100": "--batch 8 cannot be shared by 3 processes",
        "--world_size 1 --gpu A40": "--gpu A40: .* give a number of GiB",
    }.items():
        code, _, error = plan_of(folder, options, capsys, monkeypatch)
        assert code == 2 and error.count("\n") == 1 and re.search(words, error), error
    replicated = "--replicas 2 --world_size 2 --gpu RTX4090 --cpu_offload off"
    assert (
        "16 such GPUs" not in plan_of(folder, replicated, capsys, monkeypatch)[2]
    )  # cannot share 8 questions


def test_too_little_host_memory_is_refused_before_a_weight_is_read(models, monkeypatch):
    config = parse(["--gpu", "24"])
    monkeypatch.setattr(plan, "available_host_memory", lambda: 64 * GIB)
    with pytest.raises(
        InputError, match=r"GiB of host memory of 64.0 that are free, even with .*; what would: "
    ):
        choose_plan(models(OMNI_7B), 1, torch.bfloat16, config, CPU)
    monkeypatch.setattr(plan, "available_host_memory", lambda: 256 * GIB)
    assert choose_plan(models(OMNI_7B), 1, torch.bfloat16, config, CPU).layout.offload.startswith("on")


def test_a_containers_free_memory_is_without_the_files_that_were_read(tmp_path):
    assert 2**28 < plan.available_host_memory() < 2**50
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {64 << 20} kB\n"}
    group = "sys/fs/cgroup"
    files[f"{group}/memory.max"] = f"{32 * GIB}\n"
    files[f"{group}/memory.stat"] = f"anon {9 * GIB}\nfile {20 * GIB}\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert plan.available_host_memory(tmp_path) == 23 * GIB
    (tmp_path / group / "memory.max").write_text("max\n")
    assert plan.available_host_memory(tmp_path) == 64 * GIB


# ------------------------------------------------------------------------------------- the bytes are proved


def check_step(folder: Path, gpus: int, clip_seconds: int, options: str) -> tuple[float, str]:
    """The plan is never below the peak of a whole fake step, in any part of it, and at most 10 % above.

    Returns the peak in GiB and the layout.
    """
    about = [gpus, plan.TEXT + 25 * clip_seconds, clip_seconds, "--model", folder, "--out", folder / "step"]
    process = Processes(1)
    process.run(fake_step.main, *about, *options.split())
    process.stop()
    step = json.loads((folder / "step").read_text())
    assert all(step["measured"][part] <= step["planned"][part] for part in step["measured"]), step
    peak = max(step["measured"].values())
    assert max(step["planned"].values()) <= 1.1 * peak, step
    return peak / GIB, step["layout"]


PARTS = {  # of the 7B with fewer layers: GPUs, options
    "resharded": (4, "--reshard on"),
    "LoRA, recomputed": (1, "--lora 64 --checkpointing on --accumulation 2"),
    "LoRA, nothing given up": (1, "--lora 64 --checkpointing off --accumulation 1"),
    "moments in host memory": (1, "--cpu_offload moments"),
    "all in host memory, the reference too": (1, "--gpu 12"),  # what a 4090 has for the whole 7B
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_step_takes_what_the_plan_says_of_the_7b_with_fewer_layers(part, tmp_path):
    config = dimensions(OMNI_7B)
    inner = config["thinker_config"]
    inner["text_config"]["num_hidden_layers"] = 5
    inner["audio_config"]["encoder_layers"] = 2
    gpus, options = PARTS[part]
    _, chosen = check_step(checkpoint(tmp_path, config), gpus, 10, f"--gpu 48 {options}")
    assert ("reference too" in chosen) == ("reference too" in part)


@pytest.mark.slow
@pytest.mark.parametrize("name", [OMNI_7B, OMNI_3B])
@pytest.mark.parametrize(("gpus", "memory", "clip_seconds"), [(4, 47.5, 10), (8, 79.2, 30), (1, 79.2, 10)])
def test_a_step_takes_what_the_plan_says(name, gpus, memory, clip_seconds, tmp_path):
    folder = checkpoint(tmp_path, dimensions(name))
    peak, _ = check_step(folder, gpus, clip_seconds, f"--gpu {memory}")
    assert gpus < 8 or peak <= 55  # with prompts of 950 tokens
