"""What a person with a GPU runs first: do the laws hold there, does a step take what the plan says, how fast is it?

    bash run.sh test gpu               # python tests/gpu.py, in about 10 minutes; writes results/gpu.md
    python tests/gpu.py --size tiny    # all of it on a CPU (tests/test_gpu.py)

Nothing is downloaded: the checkpoints have the dimensions of Qwen2.5-Omni-3B and 7B, random weights and the tiny
world's tokenizer; a tiny Qwen2-Audio comes beside them. On all GPUs of this machine, of each model:

1. Four layouts: the fastest, recomputed and offloaded, moments in host memory, LoRA. KL, loss and gradient norm of
   step 1; planned and reserved memory, the least that was free; host memory (Pss of all processes after the first
   step); the seconds of a step and of a checkpoint.
2. Laws: the KL of step 1 is 0, loss and norm are alike in all layouts that train all weights, a step after its
   checkpoint was loaded is the same step bit for bit.
3. What plan.py assumes: a token's decoding, arithmetic, copies to the host, AdamW there; the attention kernels.

Then evaluate.py answers the questions once. The file grows part by part: what one breaks leaves the others.
"""

import argparse
import gc
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fsdp  # isort: skip
import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import tiny
from data import check_clips, load_questions
from files import InputError
from fsdp import clock
from train import Run, parse, set_batch
from weights import empty_model

ROOT = Path(__file__).resolve().parent.parent
TOWER = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
DECODERS = {  # the published dimensions, and a CPU's
    "tiny": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 512, "vocab_size": 1024},
    "3B": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
           "intermediate_size": 11008, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
           "intermediate_size": 18944, "vocab_size": 152064},
}  # fmt: skip
LAYOUTS = [
    [],
    ["--reshard", "on", "--checkpointing", "on", "--cpu_offload", "on"],
    ["--cpu_offload", "moments"],
    ["--lora", "64"],
]
STEPS = 3  # of each layout; the first warms up
BLOCK = 4_194_301  # random numbers that all weights repeat; odd, so that no two rows are alike
GIB = 2**30


# ------------------------------------------------------------------------------------------- what is measured


def make_checkpoint(folder: Path, world: Path, text: dict, audio: dict, dtype=torch.bfloat16) -> None:
    """A model's folder, an Omni's with the thinker alone: the world's tokenizer, other dimensions, random
    weights."""
    shutil.copytree(world / "model", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config = config.get("thinker_config", config)
    config["text_config"].pop("layer_types", None)
    config["text_config"].update(text)
    if "output_dim" in config["audio_config"]:  # an Omni
        eighth = text["hidden_size"] // text["num_attention_heads"] // 8
        sections = [eighth, 3 * eighth // 2, 3 * eighth // 2]
        rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
        config["text_config"]["rope_parameters"] = rope
        config["audio_config"]["output_dim"] = text["hidden_size"]
    config["audio_config"].update(audio)
    (folder / "config.json").write_text(json.dumps(config))
    model = empty_model(folder).to(dtype).to_empty(device="cpu").requires_grad_(False)
    block = torch.empty(BLOCK, dtype=dtype).normal_(0, 0.02)
    for p in model.parameters():
        p.fill_(1.0)
        if p.ndim > 1:
            p.copy_(block.repeat(math.ceil(p.numel() / BLOCK))[: p.numel()].view_as(p))
    model.save_pretrained(folder)


def make_questions(folder: Path, count: int, seconds: float) -> None:
    """Questions on clips of noise, and a reward by which random words teach."""
    rows = []
    for i in range(count):
        noise = np.random.default_rng(i).standard_normal(int(16_000 * seconds)).astype("float32")
        soundfile.write(folder / f"{i}.wav", noise * 0.1, 16_000)
        asked = {"question": "What can be heard?", "choices": ["a dog", "a car"], "answer": "a dog"}
        rows.append({"id": str(i), "audio_path": f"{i}.wav", **asked})
    (folder / "questions.json").write_text(json.dumps(rows))
    (folder / "reward.py").write_text("def parity(said, answer, choices): return sum(map(ord, said)) % 2")


def resident() -> float:
    """Bytes of host memory of all processes, what they share counted once."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(fsdp.gather_objects(1024 * int(re.search(r"Pss: *(\d+)", rollup)[1])))


def take_step(run: Run, asked: list) -> dict:
    totals, _ = run.take_step(asked)
    row = run.row(fsdp.gather_objects({**totals, "seconds_wait": 0.0}))
    row["seconds"] = row["seconds_rollout"] + row["seconds_score"] + row["seconds_update"]
    return row


def measure(folder: Path, layout: list[str], rank: int, world: int, device: torch.device) -> dict:
    """A few steps under one layout, its checkpoint, one step twice: the table's row."""
    options = [
        "--model",
        folder,
        "--data",
        folder / "questions.json",
        "--reward",
        f"{folder / 'reward.py'}:parity",
    ]
    options += ["--batch", math.lcm(len(list(folder.glob("*.wav"))), world), "--max_new_tokens", 8]
    config = parse([*map(str, options), *layout])
    set_batch(config, world)
    loaded = load_questions(config, check_clips)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Run(config, loaded, device)
    batches = run.batches()
    rows = [take_step(run, next(batches))]
    host = resident()
    free = []
    for _ in range(STEPS - 1):
        rows.append(take_step(run, next(batches)))
        free.append(torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0)
    found = {
        "layout": str(run.layout),
        "planned": sum(run.plan.gpu.values()) / GIB,
        "reserved": (torch.cuda.max_memory_reserved() if device.type == "cuda" else 0) / GIB,
        "free": min(free) / GIB,
        "planned_host": sum(run.plan.host.values()) / GIB,
        "host": host / GIB,
        "seconds": statistics.median(row["seconds"] for row in rows[1:]),
    }
    for name in ("kl", "loss", "grad_norm"):
        found[name] = rows[0][name]
    asked = next(batches)
    started = time.perf_counter()
    out = Path(fsdp.gather_objects(tempfile.mkdtemp())[0])
    fsdp.save_checkpoint(out, STEPS, run.state(), {}, keep=1)
    found["saving"] = time.perf_counter() - started
    with torch.profiler.profile() as profile:
        once = take_step(run, asked)
    dcp.load(run.state(), checkpoint_id=fsdp.newest_checkpoint(out))
    run.step -= 1
    again = take_step(run, asked)
    found["resumed"] = all(once[name] == again[name] for name in ("loss", "grad_norm"))
    names = {event.name() for event in profile.profiler.kineto_results.events()}  # key_averages takes 10 s
    found["kernels"] = [name for name in names if re.search("flash|efficient|fmha|attention_math", name)]
    found["token"] = decoding(run, asked)
    dist.barrier()
    shutil.rmtree(out, ignore_errors=True)
    return found


def decoding(run: Run, asked: list) -> float:
    """Milliseconds a token, from 2 to 18."""
    run.policy.eos = torch.tensor([-1])
    seconds = []
    for tokens in (2, 2, 18):
        started = clock()
        run.policy.generate([one.prompt for one in asked], tokens, group_size=4)
        seconds.append(clock() - started)
    fsdp.release(run.policy)
    return 1000 * (seconds[2] - seconds[1]) / 16


def seconds_of(call) -> float:
    call()
    started = clock()
    for _ in range(3):
        call()
    return (clock() - started) / 3


def constants(device: torch.device) -> dict[str, float]:
    """What plan.py assumes of the machine."""
    found = {}
    width, inner, count = 256, 512, 2**20
    if device.type == "cuda":
        width, inner, count = 3584, 18944, 2**28
    weight = torch.randn(inner, width, device=device, dtype=torch.bfloat16)
    for tokens in (350, 2500):
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        seconds = seconds_of(lambda x=x: x @ weight.T)
        found[f"TFLOP/s at {tokens} tokens"] = 2e-12 * tokens * width * inner / seconds
    p = torch.nn.Parameter(torch.zeros(count))
    p.grad = torch.ones_like(p)
    optimizer = fsdp.make_optimizer([p], 1e-6)
    found["GB/s of AdamW in host memory"] = 28e-9 * count / seconds_of(optimizer.step)
    if device.type == "cuda":
        there = p.detach().to(device)
        for kind, host in {"pageable": p.detach(), "pinned": p.detach().pin_memory()}.items():
            found[f"GB/s to the GPU, {kind}"] = 4e-9 * count / seconds_of(lambda host=host: there.copy_(host))
            found[f"GB/s from it, {kind}"] = 4e-9 * count / seconds_of(lambda host=host: host.copy_(there))
    return found


# -------------------------------------------------------------------------------------------------- the report


def verdict(holds: bool) -> str:
    return "holds" if holds else "BROKEN"


def table(name: str, found: list[dict]) -> list[str]:
    lines = [f"\n## {name}\n"]
    lines.append(
        "| layout | planned GiB | reserved | free | host: planned | used | KL, loss, norm of step 1 | s a step | s a checkpoint |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in found:
        if "failed" in row:
            lines.append(f"| {row['layout']} | | | | | | {row['failed']} | | |")
            continue
        mark = " above the plan" * (row["reserved"] > row["planned"])
        lines.append(
            f"| {row['layout']} | {row['planned']:.1f} | {row['reserved']:.1f}{mark} | {row['free']:.1f} "
            f"| {row['planned_host']:.1f} | {row['host']:.1f} "
            f"| {row['kl']:.3g}, {row['loss']:.6g}, {row['grad_norm']:.6g} | {row['seconds']:.2f} | {row['saving']:.1f} |"
        )
    done = [row for row in found if "failed" not in row]
    if not done:
        return [*lines, f"\nNo layout runs: {verdict(False)}"]
    whole = [row for row in done if "--lora" not in row["options"]]
    norms = sorted(row["grad_norm"] for row in whole)
    losses = sorted(row["loss"] for row in whole)
    alike = losses[-1] - losses[0] < 1e-3 and 0 < norms[-1] <= 1.02 * norms[0]
    kernels = sorted({name for row in done for name in row["kernels"]})
    return [
        *lines,
        "\n| law | |\n|---|---|",
        f"| the KL of step 1 is 0 | {verdict(all(row['kl'] == 0 for row in done))} |",
        f"| loss and gradient norm of step 1 are alike in {len(whole)} layouts | {verdict(alike)} |",
        f"| a step after its checkpoint was loaded is the same | {verdict(all(row['resumed'] for row in done))} |",
        f"\nDecoding: {done[0]['token']:.1f} ms a token. Attention: {', '.join(kernels)}.",
    ]


def worker(folders: list[str], out: Path) -> None:
    """One process of all: every layout of every model; rank 0 appends to the report."""
    rank, world, device = fsdp.start_processes()
    for folder in map(Path, folders):
        found = []
        for layout in LAYOUTS[: 1 if "Audio" in folder.name else None]:
            row = {"layout": " ".join(layout)}
            try:
                row = measure(folder, layout, rank, world, device)
            except (InputError, torch.OutOfMemoryError) as error:
                row["failed"] = str(error).splitlines()[0]
            found.append({**row, "options": layout})
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if "failed" in row and world > 1:
                break  # the other processes may be waiting in a collective
        if rank == 0:
            with open(out, "a") as file:
                file.write("\n".join(table(folder.name, found)) + "\n")
    if rank == 0:
        rows = [f"| {name} | {value:.3g} |" for name, value in constants(device).items()]
        with open(out, "a") as file:
            file.write("\n".join(["\n| what plan.py assumes | found |\n|---|---|", *rows]) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("--size", choices=list(DECODERS), nargs="+", default=["3B", "7B"], help="models (3B 7B)")
    add("--out", default="results/gpu.md", help="the table (%(default)s)")
    add("--world", default="", help="a tiny world made before (makes one)")
    add("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = Path(args.out)
    if args.worker:
        worker(args.worker, out)
        return 0
    gpus = torch.cuda.device_count()
    if not gpus and args.size != ["tiny"]:
        print("error: no GPU here; --size tiny runs all of this on a CPU", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(0) if gpus else "CPU"
    out.write_text(f"# {gpus} x {name}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(args.world)
        if not args.world:
            world = Path(scratch) / "omni"
            tiny.make_world(world, "omni", effort=0)
        other = Path(scratch) / "qwen2audio"
        tiny.make_world(other, "qwen2audio", effort=0)
        folders = [(other / "model").rename(Path(scratch) / "tiny Qwen2-Audio")]
        make_questions(folders[0], 2, 1)
        for size in args.size:
            folders.append(Path(scratch) / size)
            make_checkpoint(folders[-1], world, DECODERS[size], {} if size == "tiny" else TOWER)
            make_questions(folders[-1], *((2, 1) if size == "tiny" else (8, 10)))
        command = [sys.executable]
        if gpus > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        code = subprocess.run([*command, __file__, "--out", out, "--worker", *folders]).returncode
        started = time.perf_counter()
        evaluation = [
            sys.executable,
            "evaluate.py",
            "--model",
            folders[-1],
            "--data",
            folders[-1] / "questions.json",
        ]
        code += subprocess.run([*evaluation, "--out", Path(scratch) / "answers.json"], cwd=ROOT).returncode
        seconds = time.perf_counter() - started
    with open(out, "a") as file:
        file.write(f"\nevaluate.py: {seconds:.0f} s. Everything came to its end: {verdict(not code)}.\n")
    print(out.read_text())
    return int("BROKEN" in out.read_text())


if __name__ == "__main__":
    sys.exit(main())
