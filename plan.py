"""What a run takes, before it starts: the layout that fits, its memory and disk, and about how long.

    python train.py --plan --world_size 4 --gpu A6000

Nothing but arithmetic on the shapes of transformers' own model class on the meta device: no weights are read.
tests/test_plan.py compares the bytes with a whole step at the published sizes. The layout is the first that
fits in a fixed order: few passes, weights whole while responses are drawn, then as little given up as can be.
The same choice is made at the start of every run.
"""

import argparse
import math
import os
import re
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache
from torch import nn

import fsdp
from files import InputError
from weights import empty_model, find_model

GIB = 2**30
LEFT = 1.5 * GIB  # of a GPU's memory: NCCL, the CUDA context, fragmentation
TEXT = 200  # tokens of a long question with its choices
DISK = 4e9  # bytes a second that a node writes, as assumed

# From NVIDIA's data sheets: GiB as the driver reports them; TFLOP/s, dense bf16; GB/s between two GPUs in one
# direction: NVLink, or an all-gather over PCIe through the host.
CARDS = """
B200     179   2250 900
H200     140    989 450
H100      79.2  989 450
A100-40   39.5  312 300
A100-80   79.2  312 300
L40S      44.5  362  12
6000Ada   47.5  364  12
A6000     47.5  155  12
A10G      22.0   70  12
L4        22.0  121  12
RTX5090   31.4  210  12
RTX4090   23.5  165  12
RTX3090   23.5   71  12
"""


@dataclass(frozen=True)
class Card:
    name: str
    memory: float  # bytes
    flops: float  # a second, at its peak
    link: float  # bytes a second to another GPU of its node


UNKNOWN = Card("a card not in plan.py, at modest rates", 0.0, 70e12, 12e9)


@dataclass(frozen=True)
class Layout:
    """What is given up to fit; fsdp.shard says what each means."""

    reshard: bool
    checkpointing: bool
    offload: str  # in host memory: "off" (nothing), "moments" (AdamW's) or "all" (shards, gradients, moments)
    gathered_rollout: bool
    questions_per_pass: int
    reference_on_host: bool = False  # with "all": the reference too, gathered from there layer by layer

    def __str__(self) -> str:
        words = []
        if self.reshard:
            words.append("reshard" + " (rollouts too)" * (not self.gathered_rollout))
        if self.checkpointing:
            words.append("checkpointing")
        if self.offload == "moments":
            words.append("cpu_offload moments")
        if self.offload == "all":
            words.append("cpu_offload on" + " (reference too)" * self.reference_on_host)
        return f"{', '.join(words) or 'nothing given up'}; {self.questions_per_pass} a pass"


@dataclass(frozen=True)
class Work:
    """What a plan is made for: the model in numbers of parameters, the recipe, the machine."""

    config: argparse.Namespace
    gpus: int  # that share one set of shards
    dtype: torch.dtype
    card: Card
    memory: float  # bytes of each GPU that can be used
    host_memory: float  # bytes available on this node
    clip_seconds: float  # the longest clip's; 0 without sound
    whole: int
    full: int  # what --lora 0 trains
    layers: int  # of the decoder
    vocabulary: int  # the larger of the two matrices
    largest: int  # of the layers, which are gathered one at a time
    pairs_of_rank_1: int  # LoRA's
    text: object  # the decoder's config
    audio: object | None  # the tower's config
    lora: int  # the pairs' rank

    @property
    def trained(self) -> int:
        return self.lora * self.pairs_of_rank_1 or self.full

    @property
    def questions(self) -> int:
        """Of a process and step."""
        return max(1, self.config.batch // (self.gpus * self.config.replicas))

    @property
    def prompt(self) -> float:
        """Tokens: the text's, and 25 a second of sound."""
        return TEXT + 25 * self.clip_seconds

    def passes(self, layout: Layout) -> int:
        return math.ceil(self.questions / layout.questions_per_pass)


@dataclass(frozen=True)
class Plan:
    """A layout of the run and the bytes that it takes."""

    layout: Layout
    gpu: dict  # what -> bytes on each GPU, in the part of the step that takes most
    host: dict  # what -> bytes in host memory of a node
    disk: dict  # what -> bytes
    work: Work

    def why_not(self) -> str:
        """Why it cannot run, or nothing if it can."""
        limits = {"a GPU": (self.gpu, self.work.memory)}
        if self.layout.offload != "off":
            limits["of host memory"] = (self.host, self.work.host_memory)
        for where, (parts, limit) in limits.items():
            needed = sum(parts.values())
            if needed > limit:
                return f"{needed / GIB:.1f} GiB {where} of {limit / GIB:.1f} that are free"
        return ""


# ------------------------------------------------------------------------------------------ bytes of a step


def lasting_bytes(work: Work, layout: Layout) -> dict[str, float]:
    """What lasts from step to step on each process, wherever it lies: exact."""
    size = work.dtype.itemsize
    if work.lora:
        base = size * work.whole
        if layout.reshard:
            base /= work.gpus
        # In fp32, and once more as they compute.
        return {"base": base, "pairs, their gradients and moments": (16 + size) * work.trained}
    lasting = {
        "weights, fp32 shards": 4 * work.whole / work.gpus,
        "gradients, fp32 shards": 4 * work.trained / work.gpus,
        "AdamW moments, fp32 shards": 8 * work.trained / work.gpus,
    }
    if work.config.beta:
        lasting["reference"] = size * work.whole / work.gpus
    return lasting


def on_host(what: str, layout: Layout) -> bool:
    if what == "reference":
        return layout.reference_on_host
    return layout.offload == "all" or (layout.offload == "moments" and what.startswith("AdamW"))


def moments(work: Work, layout: Layout) -> dict[str, dict[str, float]]:
    """What lies on each GPU in the rollout, at the loss, at the first and the last group of the backward."""
    kept = {}
    for what, value in lasting_bytes(work, layout).items():
        if not on_host(what, layout):
            kept[what] = value
    gradients = kept.pop("gradients, fp32 shards", 0.0)
    whole, vocabulary, gathering, reducing = group_bytes(work, layout)
    through = whole
    through_backward = whole
    last_gather = 0.0  # the vocabulary's, when no logits are there yet
    if layout.reshard:
        through = vocabulary  # the group that is used
        through_backward = vocabulary * (work.gpus > 1)  # the last buffer, later groups; one process has none
        last_gather = through + gathering - through_backward
    held = through
    if layout.gathered_rollout:
        held = whole
    repeated = work.passes(layout) * work.config.updates > 1  # gradients are there from the first pass on
    for_backward, again = activation_bytes(work, layout)
    logits, with_gradient = logits_bytes(work, layout)
    a_layer = again + work.largest / work.vocabulary * (reducing + vocabulary)
    rollout = {
        "gathered weights": held,
        "keys, values and drawing": rollout_bytes(work, layout),
        "group being gathered": gathering,
    }
    end = {
        "gathered weights": through_backward,
        "gradients, fp32 shards": gradients,
        "gradients being reduced": reducing,
    }
    pass_begins = {**end, "activations": for_backward, "gradients, fp32 shards": gradients * repeated}
    del pass_begins["gradients being reduced"]
    loss = {**pass_begins, "logits, or the last group being gathered": max(logits, last_gather)}
    backward = {
        **pass_begins,
        "gradients being reduced, or the logits'": max(reducing, a_layer, with_gradient),
    }
    parts = {"rollout": rollout, "loss": loss, "backward": backward, "end": end}
    return {moment: {**kept, **part} for moment, part in parts.items()}


def group_bytes(work: Work, layout: Layout) -> tuple[float, float, float, float]:
    """What all gathered weights take, the largest group of them, its gathering, its gradients' reduction."""
    size = work.dtype.itemsize
    sharded = work.gpus > 1 or size < 4 or layout.offload == "all"
    if work.lora:
        sharded = layout.reshard
    if not sharded:
        return 0.0, 0.0, 0.0, 0.0
    largest = work.vocabulary
    gathering = size * largest  # the buffer it is gathered into
    reducing = (4 + 4 / work.gpus) * largest  # in fp32, and this process's part of the sum
    if work.gpus > 1:
        gathering += size * work.largest  # the buffer before is kept
        reducing += size * largest  # and as it was computed
    elif layout.offload == "all":
        gathering = 4 * largest  # in fp32 from the host
    if work.lora:
        reducing = 0.0
    return size * work.whole, size * largest, gathering, reducing


def activation_bytes(work: Work, layout: Layout) -> tuple[float, float]:
    """(kept for the backward, of a layer that is computed again) of one pass, with answers of full length."""
    text = work.text
    audio = work.audio
    size = work.dtype.itemsize
    tokens = work.prompt + work.config.group_size * (work.config.max_new_tokens - 1)
    states = 13  # of the hidden size, that a layer keeps
    if work.lora:
        states = 10  # what is frozen keeps no inputs
    one_layer = tokens * (states * text.hidden_size + 4 * text.intermediate_size) * size
    total = text.num_hidden_layers * one_layer
    again = 0.0
    if layout.checkpointing:
        total = text.num_hidden_layers * tokens * text.hidden_size * size
        again = one_layer
    total += 10 * tokens * text.hidden_size * size  # around the last norm
    if audio is not None and not work.lora:
        per_position = 9 * audio.d_model + 2 * audio.encoder_ffn_dim
        if layout.checkpointing:
            per_position = audio.d_model
        total += 50 * work.clip_seconds * per_position * size * audio.encoder_layers
    return layout.questions_per_pass * total, layout.questions_per_pass * again


def logits_bytes(work: Work, layout: Layout) -> tuple[float, float]:
    """(at the loss, as the backward begins): in fp32 their softmax as well, and then the gradient."""
    row = 4 * work.text.vocab_size
    rows = work.config.group_size * (work.config.max_new_tokens - 1) + 1
    rows *= layout.questions_per_pass
    entropy = 3 * 64 * row  # of 64 rows at a time
    return 2 * rows * row + entropy, 3 * rows * row


def rollout_bytes(work: Work, layout: Layout) -> float:
    """Keys and values of all tokens, what one layer computes of the prompts, and the logits to draw from."""
    text = work.text
    size = work.dtype.itemsize
    tokens = work.prompt + work.config.group_size * work.config.max_new_tokens
    keys = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    cache = 2 * keys * text.num_hidden_layers * tokens * size
    layer = (4 * text.hidden_size + 3 * text.intermediate_size) * work.prompt * size
    drawn = 16 * work.config.group_size * text.vocab_size
    return layout.questions_per_pass * (cache + layer + drawn)


def disk_bytes(work: Work) -> dict[str, float]:
    """The last model and those of --save_model_every, LoRA's pairs, checkpoints and the one being written."""
    config = work.config
    count = 1
    if config.save_model_every:
        count = math.ceil(config.steps / config.save_model_every)
    folder = Path(config.model)
    cached = try_to_load_from_cache(config.model, "config.json") if not folder.is_dir() else None
    if isinstance(cached, str):
        folder = Path(cached).parent
    base = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "model folders": count * max(work.dtype.itemsize * work.whole, base),  # the base's other parts too
        "adapters": count * 4 * work.lora * work.pairs_of_rank_1,
        "checkpoints": (config.keep + 1) * checkpoint_bytes(work),
    }


def checkpoint_bytes(work: Work) -> float:
    if work.lora:
        return 12 * work.trained
    return 4 * work.whole + 8 * work.trained


# ------------------------------------------------------------------------------------------------- choosing


def make_plan(work: Work, layout: Layout) -> Plan:
    """The parts of the step's largest moment, and what lies elsewhere."""
    gpu = max(moments(work, layout).values(), key=lambda parts: sum(parts.values()))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", min(8, work.gpus * work.config.replicas)))
    host = {"libraries": 3e9 * processes}
    for what, value in lasting_bytes(work, layout).items():
        if on_host(what, layout):
            host[what] = value * processes
    return Plan(layout, gpu, host, disk_bytes(work), work)


def plans(work: Work) -> list[Plan]:
    """What the options leave open, the preferred first. Moments cross to the host faster than all."""
    config = work.config
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}
    places = {"auto": ["off", "moments", "all"], "off": ["off"], "moments": ["moments"], "on": ["all"]}
    offloads = [(place, False) for place in places[config.cpu_offload]]
    if config.beta and offloads[-1][0] == "all":
        offloads.append(("all", True))
    reshards = switches[config.reshard]
    if work.lora:
        offloads = [("off", False)]
    if work.lora and work.gpus == 1:
        reshards = (False,)  # the frozen base is sharded among several or not at all
    passes = range(1, work.questions + 1)
    if config.accumulation:
        passes = [min(config.accumulation, work.questions)]
    counts = sorted({math.ceil(work.questions / count) for count in passes}, reverse=True)
    found = []
    axes = product(counts, (True, False), offloads, reshards, switches[config.checkpointing])
    for count, whole, (place, reference), reshard, checkpointing in axes:
        if reshard or whole:
            found.append(make_plan(work, Layout(reshard, checkpointing, place, whole, count, reference)))
    return found


def preferred(found: list[Plan]) -> Plan:
    """The first that fits, or the smallest."""
    for plan in found:
        if not plan.why_not():
            return plan
    on_gpus = [plan for plan in found if sum(plan.gpu.values()) <= plan.work.memory]
    return min(on_gpus or found, key=lambda plan: sum(plan.gpu.values()))


def make_work(model: nn.Module, gpus: int, dtype: torch.dtype, config: argparse.Namespace, **machine) -> Work:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    decoder = model.model.language_model
    tower = getattr(model.model, "audio_tower", None)
    pairs = 0
    for layer in decoder.layers.modules():
        if isinstance(layer, nn.Linear):
            pairs += layer.in_features + layer.out_features
    if tower is None:
        machine["clip_seconds"] = 0.0
    return Work(
        config=config,
        gpus=gpus,
        dtype=dtype,
        whole=count(model),
        full=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=count(decoder.layers),
        vocabulary=max(count(decoder.embed_tokens), count(model.lm_head)),
        largest=max(count(layer) for layer in decoder.layers),
        pairs_of_rank_1=pairs,
        text=model.config.get_text_config(),
        audio=getattr(tower, "config", None),
        lora=config.lora,
        **machine,
    )


def choose_plan(
    model: nn.Module,
    gpus: int,
    dtype: torch.dtype,
    config: argparse.Namespace,
    device: torch.device,
    clip_seconds: float = 10.0,
) -> Plan:
    """The first plan that fits of those that the options leave open.

    `gpus` share one set of shards; `model` is empty. Collective where processes are running: all choose
    alike, and none measures free memory after another has taken some. Raises InputError, with what would
    fit, if nothing does.
    """
    card = UNKNOWN
    memory = math.inf  # a CPU's, or not known: nothing has to be given up
    if device.type == "cuda":
        card = find_card(torch.cuda.get_device_name(device))
        memory = torch.cuda.mem_get_info(device)[0] - LEFT
    if config.gpu:
        try:
            memory = float(config.gpu) * GIB - LEFT
        except ValueError:
            card = find_card(config.gpu)
            memory = card.memory - LEFT
        if memory <= 0:
            raise InputError(f"--gpu {config.gpu}: no card of plan.py's list, so give a number of GiB")
    host_memory = math.inf  # --plan's machine may be another
    if not config.plan:
        host_memory = available_host_memory()
    if dist.is_initialized():
        found = fsdp.gather_objects((memory, host_memory))
        memory = min(pair[0] for pair in found)
        host_memory = min(pair[1] for pair in found)
    machine = {"card": card, "memory": memory, "host_memory": host_memory, "clip_seconds": clip_seconds}
    work = make_work(model, gpus, dtype, config, **machine)
    chosen = preferred(plans(work))
    if chosen.why_not():
        raise InputError(refusal(chosen))
    return chosen


def find_card(name: str) -> Card:
    """What "NVIDIA GeForce RTX 4090" or "4090" means: a whole word does, so an L40 is no L4."""
    words = re.split("[ -]", name.lower().replace("rtx", " ").replace(" ada", "ada"))
    found = UNKNOWN
    for line in CARDS.split("\n")[1:-1]:
        known, gib, peak, link = line.split()
        base, _, size = known.lower().removeprefix("rtx").partition("-")
        if base in words and (found is UNKNOWN or f"{size}gb" in words or size in words):
            found = Card(known, float(gib) * GIB, float(peak) * 1e12, float(link) * 1e9)
    return found


def refusal(closest: Plan) -> str:
    """One line: what the smallest layout lacks, and what would fit."""
    work = closest.work
    would = []
    for gpus in range(work.gpus + 1, work.config.batch + 1):
        world = gpus * work.config.replicas
        if work.config.batch % world == 0 and not preferred(plans(replace(work, gpus=gpus))).why_not():
            would.append(f"{world} such GPUs")
            break
    pairs = preferred(plans(replace(work, lora=32)))
    if not work.lora and not pairs.why_not():
        would.append(f"--lora 32 ({sum(pairs.gpu.values()) / GIB:.1f} GiB a GPU)")
    if not would:
        would.append("a smaller model, or a smaller --group_size or --max_new_tokens")
    return f"does not fit: {closest.why_not()}, even with {closest.layout}; what would: {' or '.join(would)}"


def available_host_memory(root: Path = Path("/")) -> float:
    """Bytes that this machine, or the container that this is, has left."""
    available = math.inf
    container = root / "sys/fs/cgroup"
    try:
        meminfo = (root / "proc/meminfo").read_text()
        available = 1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo)[1])
        limit = (container / "memory.max").read_text().strip()
        used = int((container / "memory.current").read_text())
        files = re.search(r"^inactive_file (\d+)", (container / "memory.stat").read_text(), re.M)
        if limit != "max":  # files that were read are freed when memory is wanted
            available = min(available, int(limit) - used + int(files[1]))
    except (OSError, ValueError, TypeError):
        pass  # not a Linux that tells, or no container
    return available


def set_batch(config: argparse.Namespace, world: int) -> None:
    """InputError if the processes cannot share a step's questions."""
    if world % config.replicas:
        raise InputError(f"--replicas {config.replicas} does not divide the {world} processes")
    if config.batch % world:
        raise InputError(f"--batch {config.batch} cannot be shared by {world} processes: give a multiple")


# ---------------------------------------------------------------------------------------------------- hours


def step_seconds(plan: Plan) -> float:
    """About how long a step takes, for answers of 6 tokens: from the card's peak and its link. Not measured.

    42 % of the peak is what training achieves; a launch takes 15 us, 44 of them a layer
    of the decoder for each token; 24 GB/s cross to the host, whose memory AdamW reads and writes at 100 GB/s.
    """
    work = plan.work
    layout = plan.layout
    config = work.config
    passes = work.passes(layout)
    answer = config.max_new_tokens
    if config.prompt == "direct":
        answer = min(answer, 6)
    tokens = 60 + 25 * work.clip_seconds + config.group_size * answer
    forwards = 3 + layout.checkpointing  # rollout, policy, reference; the backward is two
    compute = work.questions * (forwards + 2) * 2 * work.layers * tokens / (0.42 * work.card.flops)
    launches = passes * (answer + 2 * forwards) * 44 * work.text.num_hidden_layers * 15e-6
    shard = work.trained / work.gpus
    gathers = 1
    if layout.reshard:
        gathers = 3 * passes
        if not layout.gathered_rollout:
            gathers += passes * answer
    reference = passes * bool(config.beta)
    crossing = 0.0
    if not work.lora:
        moved = work.dtype.itemsize * work.whole * (gathers + reference) + 4 * work.trained * passes
        crossing = moved * (work.gpus - 1) / work.gpus / (0.78 * work.card.link)
    host = 0.0
    if layout.offload == "moments":
        host = 16 * shard / 24e9
    if layout.offload == "all":
        host = (4 * gathers + 4 * passes) * shard / 24e9 + 40 * work.trained / 100e9
    return 0.1 + compute + launches + crossing + host


# ------------------------------------------------------------------------------------------------- printing


def hours_line(plan: Plan) -> str:
    steps = plan.work.config.steps
    hours = step_seconds(plan) * steps / 3600
    return f"about {hours:.1f} hours for {steps} steps on {plan.work.card.name}, not measured"


def plan_line(plan: Plan) -> str:
    """What a run says of its plan when it starts."""
    if plan.work.memory == math.inf:
        return f"layout: {plan.layout}"
    gpu = sum(plan.gpu.values()) / GIB
    host = sum(plan.host.values()) / GIB
    return f"layout: {plan.layout}; {gpu:.1f} GiB a GPU, {host:.1f} of host memory; {hours_line(plan)}"


def print_plan(config: argparse.Namespace) -> None:
    """train.py --plan: from config.json alone (of a hub name, nothing else is fetched)."""
    model = empty_model(find_model(config.model, config_only=True), not config.no_audio)
    gpus = config.world_size or torch.accelerator.device_count() or 1
    set_batch(config, gpus)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16  # of the GPUs that are meant, whatever is here
    if config.dtype == "float32":
        dtype = torch.float32
    plan = choose_plan(model, gpus // config.replicas, dtype, config, device)
    print(f"layout: {plan.layout}")
    for where, parts in {"each GPU": plan.gpu, "host memory": plan.host, "disk": plan.disk}.items():
        print(f"{where}: {sum(parts.values()) / GIB:.1f} GiB")
        for what, value in parts.items():
            if value:
                print(f"  {value / GIB:8.2f}  {what}")
    size = checkpoint_bytes(plan.work)
    print(
        f"a checkpoint: {size / GIB:.1f} GiB, {size / DISK:.0f} s where a node writes {DISK / 1e9:.0f} GB/s"
    )
    print(f"total: {hours_line(plan)}")
