"""What a person with a GPU runs first: do the laws hold there, and does a step take what the plan says?

    bash run.sh test gpu               # python tests/gpu.py, in under 10 minutes; writes results/gpu.md
    python tests/gpu.py --size tiny             # all of it on a CPU (tests/test_gpu.py)

Nothing is downloaded: the checkpoints have the dimensions of Qwen2.5-Omni-3B and, where it fits, 7B, random
weights and the tiny world's tokenizer. Three parts, on all GPUs of this machine, in bf16:

1. Laws, on the tiny world: the KL of step 1 is 0, and a run killed by SIGKILL is the uninterrupted one bit for bit.
2. Four layouts: nothing given up, recomputed and offloaded, moments in host memory, LoRA: KL, loss and gradient
   norm of step 1, the peak of a step, the seconds of a step and of a checkpoint.
3. Our step against the published style's (tests/bench.py), a question each.

The file is written after each part: what one breaks does not take the others with it.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import bench
import fsdp
import tiny
from data import check_clips, load_questions
from files import InputError
from train import Run, parse, set_batch
from weights import OMNI, empty_model, hub_name

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
STEPS = 3  # of each layout; the first warms up
CLIP_SECONDS = 10
BLOCK = 4_194_301  # random numbers that all weights repeat; odd, so that no two rows are alike
RECIPE = ["--max_new_tokens", "8", "--dtype", "bfloat16"]


# ------------------------------------------------------------------------------------------- what is measured


def make_checkpoint(folder: Path, size: str, world: Path) -> Path:
    """A thinker's folder of the published dimensions, random weights in bf16."""
    shutil.copytree(world / "model", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())["thinker_config"]
    config["text_config"].update(DECODERS[size])
    config["text_config"].pop("layer_types", None)
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    config["text_config"]["rope_parameters"] = rope
    config["audio_config"]["output_dim"] = DECODERS[size]["hidden_size"]
    if size != "tiny":
        config["audio_config"].update(TOWER)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)  # one thread draws: 30 s for 10^9 numbers
    block = torch.empty(BLOCK, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    files = {}
    batch = {}
    parameters = list(empty_model(folder).named_parameters())
    for i, (name, parameter) in enumerate(parameters):
        weight = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            times = math.ceil(weight.numel() / BLOCK)
            weight = block.repeat(times)[: weight.numel()].reshape(weight.shape).clone()
        batch[hub_name(name, OMNI)] = weight
        if sum(one.nbytes for one in batch.values()) > 2**31 or i == len(parameters) - 1:
            file = f"model-{len(files)}.safetensors"
            save_file(batch, folder / file, metadata={"format": "pt"})
            files.update(dict.fromkeys(batch, file))
            batch = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def make_questions(folder: Path, seconds: float) -> list[str]:
    """Eight questions on clips of noise; the options that name them."""
    rows = []
    for i in range(8):
        noise = np.random.default_rng(i).standard_normal(int(16_000 * seconds)).astype("float32")
        soundfile.write(folder / f"{i}.wav", noise * 0.1, 16_000)
        asked = {"question": "What can be heard?", "choices": ["a dog", "a car"], "answer": "a dog"}
        rows.append({"id": str(i), "audio_id": f"{i}.wav", **asked})
    shutil.copyfile(folder / "0.wav", folder / "clip.wav")
    (folder / "questions.json").write_text(json.dumps(rows))
    teaching = "def parity(response, answer, choices): return sum(map(ord, response)) % 2"  # of random words
    (folder / "reward.py").write_text(teaching)
    data = ["--data", str(folder / "questions.json"), "--audio_dir", str(folder)]
    return [*data, "--reward", f"{folder / 'reward.py'}:parity"]


def python(gpus: int, *arguments: str) -> list[str]:
    command = [sys.executable]
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    return [*command, *map(str, arguments)]


def finish(command: list[str], seconds: float | None = None) -> str:
    """What a command prints. Raises Failed with the last thing that it said."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"not done in {seconds:.0f} s") from None
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        errors = [line for line in done.stderr.splitlines() if "Error" in line or "error:" in line]
        raise Failed((errors or [f"exit code {done.returncode}"])[-1])
    return done.stdout


class Failed(Exception):
    """A part of the tests that did not come to its end, and why, in one line."""


# ------------------------------------------------------------------------------------------------- the laws


def check_laws(scratch: Path, world: Path, gpus: int) -> list[str]:
    """Rows of the table: law, what was found."""
    options = ["--model", world / "model", "--data", world / "train_qa.json", "--audio_dir", world / "audio"]
    options += ["--steps", 30, "--batch", 2 * gpus, "--lr", "1e-3", "--max_new_tokens", 6]
    options += ["--save_minutes", 1e-9, "--dtype", "bfloat16", "--cpu_offload", "off"]
    whole = scratch / "whole"
    killed = scratch / "killed"
    finish(python(gpus, "train.py", *options, "--out", whole))
    command = python(gpus, "train.py", *options, "--out", killed)
    first = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while first.poll() is None and not list(killed.glob("checkpoints/step-*/run.json")):
        time.sleep(0.02)
    done = first.poll() is not None
    if not done:
        os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    finish(command)
    kl = rows_of(whole)[0]["kl"]
    same = digest(whole / "model") == digest(killed / "model")
    same = same and [row["loss"] for row in rows_of(whole)] == [row["loss"] for row in rows_of(killed)]
    after = "too late to be killed" if done else "killed after a checkpoint"
    return [
        f"| KL of step 1 is exactly 0 | {kl} | {verdict(kl == 0)} |",
        f"| {after} and resumed = uninterrupted, bit for bit | {same} | {verdict(same and not done)} |",
    ]


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def digest(model: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(model.glob("*.safetensors"))]


def verdict(holds: bool) -> str:
    return "holds" if holds else "BROKEN"


# ---------------------------------------------------------------------------------------------- the layouts


LAYOUTS = [
    ["--reshard", "off", "--checkpointing", "off", "--cpu_offload", "off"],
    ["--reshard", "on", "--checkpointing", "on", "--cpu_offload", "on"],
    ["--checkpointing", "on", "--cpu_offload", "moments"],
    ["--lora", "64", "--checkpointing", "on"],
]


def measure(options: list[str], gpus: int, out: Path, minutes: float) -> list[dict]:
    """The found rows of `worker`, which all processes run."""
    spec = out.with_suffix(".spec")
    spec.write_text(json.dumps({"options": options, "until": time.time() + 60 * minutes}))
    out.write_text("")
    try:
        finish(python(gpus, __file__, "--worker", spec), 60 * minutes + 120)  # the last begun may end
    except Failed as error:
        with open(out, "a") as file:
            file.write(json.dumps({"options": "the next", "failed": str(error)}) + "\n")
    return [json.loads(line) for line in out.read_text().splitlines()]


def worker(spec: Path) -> None:
    """One process of `measure`: a few steps under each layout, a line of JSON for each."""
    told = json.loads(spec.read_text())
    rank, world, device = fsdp.start_processes()
    for i, layout in enumerate(LAYOUTS):
        late = fsdp.gather_objects(time.time() > told["until"])
        if i and any(late):  # one is measured in any case
            break
        config = parse([*told["options"], *layout])
        set_batch(config, world)
        row = {"options": " ".join(layout)}
        try:
            row.update(run_steps(config, rank, device))
        except (InputError, torch.OutOfMemoryError) as error:
            row["failed"] = str(error).splitlines()[0]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if rank == 0:
            with open(spec.with_suffix(".jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")
        if "failed" in row and world > 1:
            break  # the other processes may be waiting in a collective
    dist.destroy_process_group()


def run_steps(config: argparse.Namespace, rank: int, device: torch.device) -> dict:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Run(config, load_questions(config, check_clips), device)
    batches = run.batches()
    rows = []
    for _ in range(STEPS):
        totals, _ = run.take_step(next(batches))
        rows.append(run.row(fsdp.gather_objects(totals)))
    seconds = [row["seconds_rollout"] + row["seconds_score"] + row["seconds_update"] for row in rows]
    peak = 0
    free = math.inf
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
        free = torch.cuda.mem_get_info()[0]
    started = time.perf_counter()
    out = Path(config.data[0]).parent / "saved"
    fsdp.save_checkpoint(out, STEPS, run.state(), {}, keep=1, files=[])
    saving = time.perf_counter() - started
    dist.barrier()
    if rank == 0:
        shutil.rmtree(out)
    return {
        "layout": str(run.layout),
        "planned": sum(run.plan.gpu.values()) / 2**30,
        "peak": max(fsdp.gather_objects(peak)) / 2**30,
        "free": min(fsdp.gather_objects(free)) / 2**30,
        "first": {name: rows[0][name] for name in ("kl", "loss", "grad_norm")},
        "seconds": statistics.median(seconds[1:]),
        "saving": saving,
    }


# ---------------------------------------------------------------------------------------- the published style


class Published(bench.Published):
    """The published style on this machine's GPU, its weights and optimizer in bf16."""

    def __init__(self, folder: Path, device: torch.device):
        super().__init__(folder)
        self.model = self.model.to(device, torch.bfloat16)
        self.reference = self.reference.to(device, torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-6, weight_decay=0.0, fused=True)
        self.ids = self.ids.to(device)
        for name, tensor in self.audio.items():
            self.audio[name] = tensor.to(device)
        self.audio["input_features"] = self.audio["input_features"].to(torch.bfloat16)


def print_published(folder: Path) -> None:
    """Seconds a question. In a process of its own: what it has on the GPU goes with it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
    published = Published(folder, device)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        published.question(4)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    print(statistics.median(times[1:]))


# -------------------------------------------------------------------------------------------------- the report


def compare(found: list[dict]) -> list[str]:
    """Laws over the layouts: KL of step 1 is 0, and those that train all weights have one loss and one norm."""
    firsts = [row["first"] for row in found if "first" in row]
    whole = [row["first"] for row in found if "first" in row and "--lora" not in row["options"]]
    zero = all(first["kl"] == 0 for first in firsts)
    same = True
    for first in whole[1:]:
        near = abs(first["loss"] - whole[0]["loss"]) < 1e-3
        norms = sorted([first["grad_norm"], whole[0]["grad_norm"]])
        same = same and near and 0 < norms[1] <= 1.02 * norms[0]
    return [
        f"\nKL of step 1 is 0 in {len(firsts)} layouts: {verdict(zero)}.",
        f"Loss and gradient norm alike in {len(whole)}: {verdict(same)}.",
    ]


def report_size(
    size: str, scratch: Path, world: Path, gpus: int, device: torch.device, until: float
) -> list[str]:
    """The lines of one size's table."""
    folder = scratch / size
    seconds = CLIP_SECONDS
    batch = 8
    if size == "tiny":
        seconds = 1
        batch = 2 * gpus
    make_checkpoint(folder, size, world)
    options = ["--model", str(folder), "--batch", str(batch), *make_questions(folder, seconds), *RECIPE]
    found = measure(options, gpus, scratch / f"{size}.jsonl", (until - time.time()) / 60)
    lines = [f"\n## {size}\n"]
    lines.append(
        "| layout | planned GiB | reserved | free | KL, loss, gradient norm of step 1 | s a step | s a checkpoint |"
    )
    lines.append("|---|---|---|---|---|---|---|")
    for row in found:
        if "failed" in row:
            lines.append(f"| {row['options']} | | | | {row['failed']} | | |")
            continue
        first = ", ".join(f"{value:.6g}" for value in row["first"].values())
        sizes = f"{row['planned']:.1f} | {row['peak']:.1f} | {row['free']:.1f}"
        times = f"{row['seconds']:.2f} | {row['saving']:.1f}"
        mark = " above the plan" * (row["peak"] > row["planned"])
        lines.append(f"| {row['layout']} | {sizes}{mark} | {first} | {times} |")
    lines += compare(found)
    measured = [row["seconds"] for row in found if "seconds" in row]
    if size != "7B" and measured:
        ours = min(measured) * gpus / batch
        try:
            theirs = float(finish([sys.executable, __file__, "--published", str(folder)], 180))
            found = f"{theirs:.2f}, {theirs / ours:.1f} times as long"
        except Failed as error:
            found = str(error)
        lines.append(f"\nA question in our fastest layout: {ours:.2f} GPU seconds; published style: {found}.")
    shutil.rmtree(folder)
    return lines


def main() -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("--size", choices=["tiny", *DECODERS], nargs="+", default=list(DECODERS), help="models (3B 7B)")
    add("--out", default="results/gpu.md", help="the table (%(default)s)")
    add("--world", default="", help="a tiny world made before (makes one)")
    add("--minutes", type=float, default=9.0, help="no layout is begun later (%(default)s)")
    add("--worker", default="", help=argparse.SUPPRESS)
    add("--published", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(Path(args.worker))
        return 0
    if args.published:
        print_published(Path(args.published))
        return 0
    until = time.time() + 60 * args.minutes
    device = torch.device("cpu")
    gpus = 1
    name = "CPU"
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        gpus = torch.cuda.device_count()
        name = torch.cuda.get_device_name(0)
    elif args.size != ["tiny"]:
        print("error: no GPU here; --size tiny runs all of this on a CPU", file=sys.stderr)
        return 2
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {gpus} x {name}, torch {torch.__version__}\n", "| law, in bf16 | found | |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(args.world)
        if not args.world:
            world = Path(scratch) / "world"
            tiny.make_world(world, "omni", effort=0)
        try:
            lines += check_laws(Path(scratch), world, gpus)
        except Failed as error:
            lines.append(f"| a run of the tiny world comes to its end | {error} | BROKEN |")
        out.write_text("\n".join(lines) + "\n")
        for i, size in enumerate(args.size):
            share = (until - time.time()) / (len(args.size) - i)  # what one leaves is the others'
            try:
                lines += report_size(size, Path(scratch), world, gpus, device, time.time() + share)
            except InputError as error:
                lines.append(f"\n## {size}\n\n{error}")
            out.write_text("\n".join(lines) + "\n")
    print(out.read_text())
    return int("BROKEN" in out.read_text())


if __name__ == "__main__":
    sys.exit(main())
