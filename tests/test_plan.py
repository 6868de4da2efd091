"""What a run takes, known before it starts: the arithmetic of the published models, and what the plan chooses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import WhisperFeatureExtractor

import cost
import plan
import tiny
from conftest import DATA
from cost import CARDS, UNKNOWN, find_card
from files import InputError
from plan import GIB, USABLE, choose_plan
from train import main, parse
from weights import empty_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
OMNI_7B, OMNI_3B, AUDIO_7B = "Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2-Audio-7B-Instruct"
SHORTER = 4  # times fewer layers, for what must be quick


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


def choose(model, gpus: int, *options, clip_seconds: float = 10.0):
    config = parse(["--plan", *map(str, options)])
    return choose_plan(model, gpus, torch.bfloat16, config, CPU, clip_seconds)


# ---------------------------------------------------------------------------------------------- the seconds


@pytest.mark.parametrize(
    ("gpus", "card", "most"), [(4, "A6000", 7.5), (8, "H100", 0.5), (1, "H100", 5), (1, "RTX4090", 40)]
)
def test_the_papers_step_is_modelled_as_fast_as_it_should_be(models, gpus, card, most):
    chosen = choose(models(OMNI_7B), gpus, "--gpu", card)
    assert chosen.step_seconds() <= most and not chosen.why_not()
    assert set(chosen.seconds) == {"gather", "reduce", "compute", "launches", "host"}


@pytest.mark.parametrize("name", [OMNI_7B, OMNI_3B, AUDIO_7B])
def test_less_memory_never_makes_a_faster_plan_and_what_fits_is_chosen_by_time(models, name):
    seconds = []
    for memory in (640, 80, 48, 24):
        chosen = choose(models(name), 4, "--gpu_memory", memory, "--gpu", "A6000")
        assert sum(chosen.gpu.values()) <= USABLE * memory * GIB
        for other in chosen.others:
            assert other.why_not() or other.step_seconds() >= chosen.step_seconds()
        seconds.append(chosen.step_seconds())
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1]
    assert str(choose(models(name), 4).layout) == "nothing given up; 2 a pass"  # where memory is no object


def test_options_pin_what_the_plan_would_choose(models):
    pinned = choose(
        models(OMNI_3B), 4, "--reshard", "on", "--checkpointing", "on", "--cpu_offload", "moments",
        "--questions_per_pass", 1,
    ).layout  # fmt: skip
    assert pinned.reshard and pinned.checkpointing
    assert (pinned.offload, pinned.questions_per_pass) == ("moments", 1)


@pytest.mark.parametrize(
    ("driver", "gib", "card"),
    [
        ("NVIDIA RTX A6000", 47.5, "A6000"), ("NVIDIA A100-SXM4-80GB", 79.2, "A100-80"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100-40"), ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA L40S", 44.4, "L40S"), ("NVIDIA L4", 22.0, "L4"), ("NVIDIA GeForce RTX 4090", 23.5, "RTX4090"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "6000Ada"), ("4090", 0, "RTX4090"), ("a100-80", 0, "A100-80"),
        ("rtx4090", 0, "RTX4090"), ("A100-80GB", 0, "A100-80"), ("A100", 0, "A100-40"), ("6000ada", 0, "6000Ada"),
        ("NVIDIA L40", 44.5, UNKNOWN.name), ("NVIDIA A10", 22.0, UNKNOWN.name), ("H20", 0, UNKNOWN.name),
        ("A40", 0, UNKNOWN.name), ("NVIDIA GH200 480GB", 95.0, UNKNOWN.name), ("", 0, UNKNOWN.name),
    ],
)  # fmt: skip
def test_a_card_is_found_by_the_drivers_name_and_by_a_persons(driver, gib, card):
    assert find_card(driver, gib, CPU).name == card


def test_a_card_that_is_not_listed_gets_modest_rates_and_the_table_says_so(models):
    assert find_card("Voodoo 2", 0.0, CPU) is UNKNOWN
    assert UNKNOWN.flops <= min(card.flops for card in CARDS)
    table = plan.plan_table(choose(models(OMNI_3B), 4, "--gpu", "Voodoo 2", "--gpu_memory", 48))
    assert UNKNOWN.name in table.splitlines()[0] and "not in" in UNKNOWN.name


# ---------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", [OMNI_7B, AUDIO_7B])
def test_plan_prints_a_table_without_weights(name, tmp_path, monkeypatch, capsys):
    folder = checkpoint(tmp_path, dimensions(name))
    command = f"train.py --plan --model {folder} --world_size 4 --gpu A6000 --steps 500"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as end:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and sum(line.startswith("*") for line in lines) == 1
    (chosen,) = [line.split() for line in lines if line.startswith("*")]
    total = re.fullmatch(r"total: (\d+\.\d) hours for 500 steps", lines[-1])
    assert float(total[1]) == pytest.approx(float(chosen[3]) * 500 / 3600, abs=0.06)
    assert any(line.startswith("disk: ") for line in lines)


def test_the_numbers_of_designs_arithmetic(models):
    chosen = choose(models(OMNI_7B), 4, "--gpu", "A6000")
    state = sum(value for what, value in chosen.lasting.items() if "fp32 shards" in what)
    assert state / GIB == pytest.approx(30.8, rel=0.01)
    assert chosen.lasting["reference"] / GIB == pytest.approx(3.84, rel=0.01)
    assert chosen.gpu["gathered weights"] / GIB == pytest.approx(15.4, rel=0.01)  # for the rollout
    assert chosen.disk["checkpoints"] / 3 == pytest.approx(100e9, rel=0.02)


def test_the_disk_holds_what_is_saved_the_bases_other_parts_too(models, tmp_path):
    with open(tmp_path / "model-1.safetensors", "wb") as file:
        file.truncate(22 * 10**9)  # the hub's 7B with its talker; it takes no room
    asked = ("--model", tmp_path, "--steps", 1000, "--save_model_every", 250)
    loaded = 2 * cost.sizes_of(models(OMNI_7B)).whole
    for options, size in (
        (("--model", tmp_path), 22e9),
        (asked, 4 * 22e9),
        ((*asked, "--lora", 64), 4 * 22e9),
        ((*asked, "--model_only", "thinker"), 4 * loaded),
        ((*asked, "--lora", 64, "--save_merged", "off"), 0),
    ):
        assert choose(models(OMNI_7B), 1, *options).disk["model folders"] == size
    pairs = choose(models(OMNI_7B), 1, *asked, "--lora", 64).disk["adapters"]
    assert pairs == pytest.approx(4 * 0.65e9, rel=0.02)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("gpus", [3, 16])
def test_a_plan_is_of_a_run_that_would_start(gpus, tmp_path):
    folder = checkpoint(tmp_path, dimensions(OMNI_7B))
    config = parse(f"--plan --model {folder} --world_size {gpus} --gpu H100".split())
    with pytest.raises(InputError, match=f"--batch 8 cannot be shared by {gpus} processes"):
        plan.print_plan(config)


def test_a_card_that_is_not_listed_needs_its_memory(models):
    with pytest.raises(InputError, match=r"--gpu A40: .* give --gpu_memory as well"):
        choose(models(OMNI_7B), 1, "--gpu", "A40")


def test_what_cannot_fit_is_refused_with_what_would(tmp_path, monkeypatch, capsys):
    folder = checkpoint(tmp_path, dimensions(OMNI_7B))
    monkeypatch.setattr(
        sys, "argv", f"train.py --plan --model {folder} --world_size 1 --gpu_memory 4".split()
    )
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert re.search(r"does not fit: \d+\.\d GiB a GPU of 3\.8 .*what would: \S+", error)
    monkeypatch.setattr(sys, "argv", f"train.py --plan --model {folder} --world_size 1 --gpu A6000 "
                        "--cpu_offload off".split())  # fmt: skip
    with pytest.raises(SystemExit):
        main()
    assert "4 such GPUs" in capsys.readouterr().err
    replicated = "--replicas 2 --world_size 2 --gpu RTX4090 --cpu_offload off"
    monkeypatch.setattr(sys, "argv", f"train.py --plan --model {folder} {replicated}".split())
    with pytest.raises(SystemExit):
        main()
    assert "16 such GPUs" not in capsys.readouterr().err  # which cannot share 8 questions


def test_too_little_host_memory_is_refused_before_a_weight_is_read(models, monkeypatch):
    config = parse(["--gpu_memory", "24"])
    monkeypatch.setattr(plan, "available_host_memory", lambda: 64 * GIB)
    with pytest.raises(
        InputError, match=r"GiB of host memory of 64.0 that are free, even with .*; what would: "
    ):
        choose_plan(models(OMNI_7B), 1, torch.bfloat16, config, CPU)
    monkeypatch.setattr(plan, "available_host_memory", lambda: 256 * GIB)
    assert choose_plan(models(OMNI_7B), 1, torch.bfloat16, config, CPU).layout.offload == "all"


def test_the_hosts_free_memory_is_measured():
    assert 2**28 < plan.available_host_memory() < 2**50


def test_a_containers_free_memory_is_without_the_files_that_were_read(tmp_path):
    files = {"proc/meminfo": f"MemAvailable: {64 << 20} kB\n"}
    group = "sys/fs/cgroup"
    files[f"{group}/memory.max"] = f"{32 * GIB}\n"
    files[f"{group}/memory.current"] = f"{30 * GIB}\n"
    files[f"{group}/memory.stat"] = f"anon {9 * GIB}\ninactive_file {20 * GIB}\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert plan.available_host_memory(tmp_path) == 22 * GIB
    (tmp_path / group / "memory.max").write_text("max\n")
    assert plan.available_host_memory(tmp_path) == 64 * GIB


# ------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("name", "gpus", "memory"), [(OMNI_7B, 1, 24), (OMNI_7B, 4, 24), (OMNI_7B, 1, 48), (OMNI_3B, 1, 16)]
)
def test_lora_fits_on_small_cards_without_host_memory(models, name, gpus, memory):
    config = parse(["--plan", "--gpu_memory", str(memory)])
    config.lora = 32
    chosen = choose_plan(models(name), gpus, torch.bfloat16, config, CPU)
    assert chosen.layout.offload == "off" and sum(chosen.gpu.values()) <= USABLE * memory * GIB
    assert chosen.disk["checkpoints"] < 5e9
    assert any(other.layout.reshard for other in chosen.others) == (
        gpus > 1
    )  # alone there is no one to share
    config.lora = 0
    if gpus == 1 and memory <= 24:
        assert choose_plan(models(name), gpus, torch.bfloat16, config, CPU).layout.offload == "all"


# ------------------------------------------------------------------------------------- the bytes are proved


def fake_step(folder: Path, gpus: int, clip_seconds: int, *options) -> dict:
    """A whole step on tensors without data: {"layout", "planned": moment -> bytes, "measured": part -> bytes}."""
    tokens = cost.TEXT + 25 * clip_seconds
    command = [
        sys.executable,
        ROOT / "tests/scripts/fake_step.py",
        gpus,
        tokens,
        clip_seconds,
        "--model",
        folder,
    ]
    done = subprocess.run(
        [str(part) for part in (*command, *options)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(step: dict) -> float:
    """The plan is never below the peak, in any part of the step, and at most 10 % above. Returns it in GiB."""
    planned = step["planned"]
    measured = step["measured"]
    parts = {
        "rollout": planned["rollout"],
        "policy scored": planned["loss"],
        "backward": max(planned["backward"], planned["end"]),
    }
    for part, value in parts.items():
        assert measured[part] <= value <= 1.1 * measured[part], (part, step)
    peak = max(measured.values())
    assert peak <= max(planned.values()) <= 1.1 * peak, step
    return peak / GIB


def shorter(config: dict) -> dict:
    config = json.loads(json.dumps(config))
    inner = config.get("thinker_config", config)
    inner["text_config"]["num_hidden_layers"] //= SHORTER
    inner["audio_config"]["encoder_layers"] //= SHORTER
    return config


def test_a_step_takes_what_the_plan_says_a_quarter_of_the_7b(tmp_path):
    folder = checkpoint(tmp_path, shorter(dimensions(OMNI_7B)))
    check(fake_step(folder, 4, 10, "--reshard", "on", "--gpu_memory", 48))


ONE_CARD = {
    "LoRA, recomputed": ["--lora", "64", "--checkpointing", "on", "--questions_per_pass", "4"],
    "LoRA, nothing given up": ["--lora", "64", "--checkpointing", "off", "--questions_per_pass", "8"],
    "LoRA, a question a pass": ["--lora", "64", "--checkpointing", "off", "--questions_per_pass", "1"],
    "all in host memory, the reference too": ["--gpu_memory", "12"],  # what a 4090 has for the whole 7B
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ONE_CARD)
def test_a_step_on_one_card_takes_what_the_plan_says_a_quarter_of_the_7b(layout, tmp_path):
    folder = checkpoint(tmp_path, shorter(dimensions(OMNI_7B)))
    step = fake_step(folder, 1, 10, "--gpu_memory", "48", *ONE_CARD[layout])
    check(step)
    assert ("reference too" in step["layout"]) == ("reference too" in layout)


MACHINES = [(4, 47.5, 10), (8, 79.2, 30), (1, 79.2, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [OMNI_7B, OMNI_3B])
@pytest.mark.parametrize(("gpus", "memory", "clip_seconds"), MACHINES)
def test_a_step_takes_what_the_plan_says(name, gpus, memory, clip_seconds, tmp_path):
    folder = checkpoint(tmp_path, dimensions(name))
    peak = check(fake_step(folder, gpus, clip_seconds, "--gpu_memory", memory))
    if gpus == 8:
        assert peak <= 55  # with prompts of 950 tokens
