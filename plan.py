"""What a run takes, before it starts: bytes on each GPU, in host memory and on disk, and seconds a step.

    python train.py --plan --world_size 4 --gpu A6000

All from config.json: the shapes come from transformers' own model class on the meta device. The same
arithmetic chooses the layout of every run, the fastest by the model of its seconds among those that fit.
tests/test_plan.py compares the bytes with a whole step at the published sizes; the seconds are a model, of
what a card achieves (`cards.py`), and `bash run.sh test gpu` compares them with the clock.
"""

import argparse
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fsdp
from cards import Card, find_card
from files import InputError
from weights import empty_model, find_model

GIB = 2**30
USABLE = 0.95  # of a GPU's memory: the rest goes to the CUDA context, NCCL and fragmentation
TEXT = 200  # tokens of a long question with its choices, for the bytes
USUAL_TEXT = 60  # and of a usual one, for the seconds
USUAL_ANSWER = 6  # tokens; what is asked to think first is taken to use all of --max_new_tokens
FSDP_HOOK = 60e-6  # seconds of Python before and after each group
PAGEABLE = 5e9  # bytes a second between GPU and host memory that is not pinned
NETWORK = 25e9  # bytes a second between nodes, for each GPU


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
            words.append("reshard" if self.gathered_rollout else "reshard (rollouts too)")
        if self.checkpointing:
            words.append("checkpointing")
        if self.offload == "moments":
            words.append("cpu_offload moments")
        if self.offload == "all":
            words.append("cpu_offload on" + " (reference too)" * self.reference_on_host)
        return f"{', '.join(words) or 'nothing given up'}; {self.questions_per_pass} a pass"


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and what else the arithmetic needs to know of a model."""

    whole: int
    trained: int
    layers: int  # of the decoder
    tower: int  # what hears, with its projection
    embedding: int
    head: int
    pairs_of_rank_1: int  # LoRA's
    text: object  # the decoder's config
    audio: object | None  # the tower's config


def sizes_of(model: nn.Module) -> Sizes:
    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    decoder = model.model.language_model
    tower = getattr(model.model, "audio_tower", None)
    hearing = []
    if tower is not None:
        hearing = [tower, getattr(model.model, "multi_modal_projector", nn.Module())]
    pairs = 0
    for layer in decoder.layers.modules():
        if isinstance(layer, nn.Linear):
            pairs += layer.in_features + layer.out_features
    return Sizes(
        whole=count(model),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=count(decoder.layers),
        tower=count(*hearing),
        embedding=count(decoder.embed_tokens),
        head=count(model.lm_head),
        pairs_of_rank_1=pairs,
        text=model.config.get_text_config(),
        audio=None if tower is None else tower.config,
    )


@dataclass(frozen=True)
class Work:
    """What a plan is made for: the model, the recipe, the machine."""

    sizes: Sizes
    config: argparse.Namespace
    gpus: int  # that share one set of shards
    dtype: torch.dtype
    clip_seconds: float  # the longest clip's; 0 without sound
    card: Card
    memory: float  # bytes of each GPU that can be used
    host_memory: float  # bytes available on this node
    lora: int = 0  # the pairs' rank

    @property
    def trained(self) -> int:
        return self.lora * self.sizes.pairs_of_rank_1 or self.sizes.trained

    @property
    def questions(self) -> int:
        """Of a process and step."""
        return max(1, self.config.batch // (self.gpus * self.config.replicas))

    @property
    def processes(self) -> int:
        """On one node: torchrun says how many; a node of the plan has at most 8 GPUs."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", min(8, self.gpus * self.config.replicas)))

    def passes(self, layout: Layout) -> int:
        return math.ceil(self.questions / layout.questions_per_pass)

    def prompt(self, text: int) -> float:
        """Tokens of a prompt: the text's, and 25 a second of sound."""
        return text + 25 * self.clip_seconds


@dataclass(frozen=True)
class Plan:
    """A layout of the run, the bytes and the seconds it takes."""

    layout: Layout
    gpu: dict  # what -> bytes on each GPU, in the part of the step that takes most
    host: dict  # what -> bytes in host memory, per GPU
    disk: dict  # what -> bytes
    seconds: dict  # term -> modelled seconds a step
    lasting: dict  # what -> bytes of each process's shards, wherever they are
    work: Work
    others: list = field(default_factory=list, repr=False)  # the best plan of each kind of layout

    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    def node_host(self) -> float:
        return sum(self.host.values()) * self.work.processes

    def why_not(self) -> str:
        """Why it cannot run, or nothing if it can."""
        gpu = sum(self.gpu.values())
        if gpu > self.work.memory:
            return f"{gpu / GIB:.1f} GiB a GPU of {self.work.memory / GIB:.1f} that can be used"
        if self.layout.offload != "off" and self.node_host() > self.work.host_memory:
            available = self.work.host_memory / GIB
            return f"{self.node_host() / GIB:.1f} GiB of host memory of {available:.1f} that are free"
        return ""


def make_plan(work: Work, layout: Layout) -> Plan:
    sizes = work.sizes
    size = work.dtype.itemsize
    if work.lora:
        base = size * sizes.whole / (work.gpus if layout.reshard else 1)
        lasting = {"base": base, "pairs, their gradients and moments": 16 * work.trained}
    else:
        lasting = {
            "weights, fp32 shards": 4 * sizes.whole / work.gpus,
            "gradients, fp32 shards": 4 * sizes.trained / work.gpus,
            "AdamW moments, fp32 shards": 8 * sizes.trained / work.gpus,
            "reference": size * sizes.whole / work.gpus if work.config.beta else 0,
        }
    host = {"workers and libraries": 3e9}
    for what, value in lasting.items():
        if on_host(what, layout):
            host[what] = value
    checkpoint = 12 * work.trained if work.lora else 4 * sizes.whole + 8 * sizes.trained
    disk = {"checkpoints": (work.config.keep + 1) * checkpoint, "final model": size * sizes.whole}
    return Plan(layout, gpu_bytes(work, layout, lasting), host, disk, seconds_of(work, layout), lasting, work)


def on_host(what: str, layout: Layout) -> bool:
    if what == "reference":
        return layout.reference_on_host
    return layout.offload == "all" or (layout.offload == "moments" and what.startswith("AdamW"))


# ------------------------------------------------------------------------------------------ bytes of a step


def gpu_bytes(work: Work, layout: Layout, lasting: dict) -> dict[str, float]:
    """The parts of the step's largest moment."""
    return max(moments(work, layout, lasting).values(), key=lambda parts: sum(parts.values()))


def moments(work: Work, layout: Layout, lasting: dict) -> dict[str, dict[str, float]]:
    """What lies on each GPU during the rollout, at the loss, and at the end of the backward pass."""
    sizes = work.sizes
    size = work.dtype.itemsize
    kept = {what: value for what, value in lasting.items() if not on_host(what, layout)}
    gradients = kept.pop("gradients, fp32 shards", 0.0)
    sharded = work.gpus > 1 or size < 4 or layout.offload == "all"
    if work.lora:
        sharded = layout.reshard
    whole = size * sizes.whole if sharded else 0.0
    vocabulary = max(sizes.embedding, sizes.head) if sharded else 0.0
    copies = 2 if work.gpus > 1 else 1  # the buffer that is gathered into, and the weights
    gathering = copies * size * vocabulary
    if layout.offload == "all":
        gathering += (4 + size) * vocabulary / work.gpus  # on its way from the host
    reducing = 0.0 if work.lora else (size + 4) * vocabulary
    through = 0.0 if layout.reshard else whole
    repeated = work.passes(layout) * work.config.updates > 1  # gradients are there from the first pass on
    activations, logits = activation_bytes(work, layout)
    rollout = {
        "gathered weights": whole if layout.gathered_rollout else through,
        "keys, values and drawing": rollout_bytes(work, layout),
        "group being gathered": gathering,
    }
    loss = {
        "gathered weights": through,
        "activations": activations,
        "logits": logits,
        "gradients, fp32 shards": gradients if repeated else 0.0,
        "group being gathered": gathering,
    }
    end = {
        "gathered weights": through,
        "gradients, fp32 shards": gradients,
        "group being gathered": gathering,
        "gradients being reduced": reducing,
    }
    return {"rollout": {**kept, **rollout}, "loss": {**kept, **loss}, "end": {**kept, **end}}


def activation_bytes(work: Work, layout: Layout) -> tuple[float, float]:
    """(kept for the backward, for the logits) of one pass, with answers of full length."""
    text = work.sizes.text
    audio = work.sizes.audio
    size = work.dtype.itemsize
    answers = work.config.group_size * (work.config.max_new_tokens - 1)
    tokens = work.prompt(TEXT) + answers
    one_layer = (13 * text.hidden_size + 4 * text.intermediate_size) * size
    per_token = one_layer * text.num_hidden_layers
    if layout.checkpointing:
        per_token = size * text.hidden_size * text.num_hidden_layers + one_layer
    total = tokens * per_token
    if audio is not None:
        per_position = (9 * audio.d_model + 2 * audio.encoder_ffn_dim) * size * audio.encoder_layers
        if layout.checkpointing:
            per_position = size * audio.d_model * audio.encoder_layers
        total += 50 * work.clip_seconds * per_position
    logits = (4 + 4 + 4 + size) * (answers + 1) * text.vocab_size
    return layout.questions_per_pass * total, layout.questions_per_pass * logits


def rollout_bytes(work: Work, layout: Layout) -> float:
    """Keys and values of all tokens, what one layer computes of the prompts, and the logits to draw from."""
    text = work.sizes.text
    size = work.dtype.itemsize
    tokens = work.prompt(TEXT) + work.config.group_size * work.config.max_new_tokens
    keys = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    cache = 2 * keys * text.num_hidden_layers * tokens * size
    layer = (4 * text.hidden_size + 3 * text.intermediate_size) * work.prompt(TEXT) * size
    drawn = 16 * work.config.group_size * text.vocab_size
    return layout.questions_per_pass * (cache + layer + drawn)


# ---------------------------------------------------------------------------------------- seconds of a step


def seconds_of(work: Work, layout: Layout) -> dict[str, float]:
    """Modelled seconds of a step, by term, for answers of usual length."""
    config = work.config
    answer = config.max_new_tokens
    if config.prompt == "direct":
        answer = min(answer, USUAL_ANSWER)
    decoding = min(config.max_new_tokens, answer + 2) - 1  # the longest decides; the prompt gives the first
    compute, launches = compute_seconds(work, layout, answer, decoding)
    gather = gathering_seconds(work, layout, decoding)
    if work.gpus > 1:  # on a stream of its own, beside the compute
        gather -= 0.5 * min(gather, compute + launches)
    scored = work.passes(layout) * config.updates
    reduce = scored * 4 * work.trained * (work.gpus - 1) / work.gpus / work.card.link
    if config.replicas > 1:
        reduce += scored * 8 * work.trained / work.gpus / NETWORK
    on_gpu, host = update_seconds(work, layout)
    if layout.offload != "all":
        launches += 0.1 * config.updates  # of AdamW's and the clip's kernels, over hundreds of tensors
    return {
        "gather": gather,
        "reduce": reduce,
        "compute": compute + on_gpu,
        "launches": launches,
        "host": host,
    }


def compute_seconds(work: Work, layout: Layout, answer: int, decoding: int) -> tuple[float, float]:
    """(compute, launches). A phase takes what its arithmetic, its memory or the launching of its kernels
    takes, whichever is longest; `launches` is what launching adds to the others.
    """
    card = work.card
    sizes = work.sizes
    text = sizes.text
    passes = work.passes(layout)
    scored = passes * work.config.updates
    prompt = work.prompt(USUAL_TEXT)
    one = 2 * sizes.layers * (prompt + work.config.group_size * answer)
    one += 2 * sizes.tower * 50 * work.clip_seconds
    one += 4 * prompt**2 * text.hidden_size * text.num_hidden_layers
    flops = layout.questions_per_pass * one
    read = work.dtype.itemsize * sizes.whole
    spoken = work.dtype.itemsize * (sizes.whole - sizes.tower - sizes.embedding)
    # Kernels, counted by a TorchDispatchMode: 44 a layer of the decoder, 16 a layer of the tower.
    decoder = 44 * text.num_hidden_layers
    kernels = decoder + (16 * sizes.audio.encoder_layers if sizes.audio else 0)
    forwards = passes + scored  # of the prefill, and of the policy's scoring
    if work.config.beta:
        forwards += passes
    if layout.checkpointing:
        forwards += scored
    backward = 1 if work.lora else 2  # no weights' gradients for the frozen base
    phases = [
        (forwards, flops, kernels, read),
        (passes * decoding, 0.0, decoder, spoken),
        (scored, backward * flops, 1.5 * kernels, 2 * read),  # 2.2 times as many, launched from C++
    ]
    compute = 0.0
    launches = 0.0
    for times, arithmetic, launched, moved in phases:
        busy = max(arithmetic / card.flops, moved / card.bandwidth)
        compute += times * busy
        launches += times * max(0.0, launched * card.launch - busy)
    if not work.lora:
        launches += passes * decoding * (text.num_hidden_layers + 3) * FSDP_HOOK
    return compute, launches


def gathering_seconds(work: Work, layout: Layout, decoding: int) -> float:
    """All gathers of a step: of the rollouts, of scoring and backward, of the reference."""
    sizes = work.sizes
    passes = work.passes(layout)
    from_host = 4 if layout.offload == "all" else 0  # bytes a parameter: fp32, cast on the GPU
    policy = gather_seconds(work, sizes.whole, from_host)
    spoken = gather_seconds(work, sizes.whole - sizes.tower, from_host)
    if work.lora and not layout.reshard:
        return 0.0  # the base is whole on each GPU
    total = policy * work.config.updates
    if layout.reshard:
        total = 2 * passes * work.config.updates * policy + passes * policy
        if not layout.gathered_rollout:
            total += passes * decoding * spoken
    if work.config.beta and (work.gpus > 1 or layout.reference_on_host):
        total += passes * gather_seconds(work, sizes.whole, work.dtype.itemsize * layout.reference_on_host)
    return total


def gather_seconds(work: Work, elements: float, from_host: int) -> float:
    """One pass over so many parameters: copied in and out, between the GPUs, from the host."""
    card = work.card
    copied = 6 * elements
    moved = 0.0
    if work.gpus > 1:
        copied = 8 * elements
        moved = work.dtype.itemsize * elements * (work.gpus - 1) / work.gpus
    return copied / card.bandwidth + moved / card.link + from_host * elements / work.gpus / card.pcie


def update_seconds(work: Work, layout: Layout) -> tuple[float, float]:
    """(on the GPU, on the host): gradients on their way there, and AdamW over its 40 bytes a parameter."""
    card = work.card
    updates = work.config.updates
    shard = work.trained
    if not work.lora:
        shard = work.trained / work.gpus
    memory = card.host / work.processes
    if layout.offload == "all":
        first = 4 * shard / card.pcie
        later = 4 * shard / PAGEABLE + 12 * shard / memory  # added up in host memory
        return 0.0, updates * (first + (work.passes(layout) - 1) * later + 40 * shard / memory)
    host = 0.0
    if layout.offload == "moments":
        host = updates * 16 * shard / min(PAGEABLE, memory / 2)
    return updates * 40 * shard / card.bandwidth, host


# ------------------------------------------------------------------------------------------------- choosing


def layouts(work: Work) -> list[list[Layout]]:
    """What the options leave open; those that differ in the rollout and a pass's questions are one kind."""
    config = work.config
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}
    places = {"auto": ["off", "moments", "all"], "off": ["off"], "moments": ["moments"], "on": ["all"]}
    offloads = [(place, False) for place in places[config.cpu_offload]]
    if config.beta and offloads[-1][0] == "all":
        offloads.append(("all", True))
    if work.lora:
        offloads = [("off", False)]
    counts = [config.questions_per_pass]
    if not config.questions_per_pass:  # as even as can be: 8, 4, 3, 2, 1
        counts = sorted({math.ceil(work.questions / n) for n in range(1, work.questions + 1)}, reverse=True)
    kinds = []
    for checkpointing in switches[config.checkpointing]:
        for reshard in switches[config.reshard]:
            for place, reference in offloads:
                kind = []
                for count in counts:
                    whole = Layout(reshard, checkpointing, place, True, min(count, work.questions), reference)
                    kind.append(whole)
                    if reshard:
                        kind.append(replace(whole, gathered_rollout=False))
                kinds.append(kind)
    return kinds


def choose_plan(
    model: nn.Module,
    gpus: int,
    dtype: torch.dtype,
    config: argparse.Namespace,
    device: torch.device,
    clip_seconds: float = 10.0,
) -> Plan:
    """The plan with the least modelled seconds among those that fit and that the options leave open.

    `gpus` share one set of shards; `model` is empty. Collective where processes are running: all choose
    alike, and none measures free memory after another has taken some. Raises InputError, with what would
    fit, if nothing does.
    """
    card = find_card(config.gpu, config.gpu_memory, device)
    memory = math.inf
    if config.gpu_memory:
        memory = USABLE * GIB * config.gpu_memory
    elif config.gpu:
        memory = USABLE * GIB * (card.memory or math.inf)
    elif device.type == "cuda":
        memory = USABLE * torch.cuda.get_device_properties(device).total_memory
    host_memory = math.inf if config.plan else available_host_memory()
    if dist.is_initialized():
        found = fsdp.gather_objects((memory, host_memory))
        memory = min(pair[0] for pair in found)
        host_memory = min(pair[1] for pair in found)
    sizes = sizes_of(model)
    if sizes.audio is None:
        clip_seconds = 0.0
    lora = getattr(config, "lora", 0)
    work = Work(sizes, config, gpus, dtype, clip_seconds, card, memory, host_memory, lora)
    plans = best_plans(work)
    chosen = min(plans, key=preference)
    if chosen.why_not():
        raise InputError(refusal(plans))
    return replace(chosen, others=plans)


def best_plans(work: Work) -> list[Plan]:
    """The best plan of each kind of layout."""
    best = []
    for kind in layouts(work):
        best.append(min((make_plan(work, layout) for layout in kind), key=preference))
    return best


def preference(plan: Plan) -> tuple[bool, float]:
    """The smaller, the better: what fits before what does not, the faster before the slower."""
    fits = not plan.why_not()
    return not fits, plan.step_seconds() if fits else sum(plan.gpu.values())


def refusal(plans: list[Plan]) -> str:
    """One line: what the smallest layout lacks, and what would fit."""
    closest = min(plans, key=lambda plan: (sum(plan.gpu.values()) > plan.work.memory, sum(plan.gpu.values())))
    work = closest.work
    would = []
    for gpus in range(work.gpus + 1, work.config.batch + 1):
        more = replace(work, gpus=gpus)
        if work.config.batch % gpus == 0 and not min(best_plans(more), key=preference).why_not():
            would.append(f"{gpus * work.config.replicas} such GPUs")
            break
    if not work.lora and hasattr(work.config, "lora"):
        pairs = min(best_plans(replace(work, lora=32)), key=preference)
        if not pairs.why_not():
            would.append(f"--lora 32 ({sum(pairs.gpu.values()) / GIB:.1f} GiB a GPU)")
    would.append("a smaller --group_size or --max_new_tokens, or another model" if not would else "")
    options = " or ".join(part for part in would if part)
    return f"does not fit: {closest.why_not()}, even with {closest.layout}; what would: {options}"


def available_host_memory() -> float:
    """Bytes that this machine, or the container that this is, has left."""
    available = math.inf
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * int(line.split()[1])
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text()
        if limit != "max":
            available = min(available, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # not a Linux that tells, or no container
    return available


# ------------------------------------------------------------------------------------------------- printing


def print_plan(config: argparse.Namespace) -> None:
    """train.py --plan: from config.json alone (of a hub name, nothing else is fetched)."""
    model = empty_model(find_model(config.model, config_only=True), not config.no_audio)
    gpus = config.world_size or torch.accelerator.device_count() or 1
    if gpus % config.replicas:
        raise InputError(f"--replicas {config.replicas} does not divide the {gpus} GPUs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    print(plan_table(choose_plan(model, gpus // config.replicas, dtype, config, device)))


def plan_table(plan: Plan) -> str:
    """Every kind of layout with its GiB and modelled seconds, what the chosen one consists of, the hours."""
    work = plan.work
    lines = [f"{work.gpus * work.config.replicas} x {work.card.name}; the layout marked * runs"]
    terms = list(plan.seconds)
    lines.append(
        "  GiB a GPU  host a node  s a step  " + "".join(f"{term:>9}" for term in terms) + "  layout"
    )
    for other in plan.others:
        mark = "*" if other.layout == plan.layout else " "
        sums = f"{mark} {sum(other.gpu.values()) / GIB:9.1f}  {other.node_host() / GIB:11.1f}"
        seconds = "".join(f"{other.seconds[term]:9.2f}" for term in terms)
        unfit = " (does not fit)" if other.why_not() else ""
        lines.append(f"{sums}  {other.step_seconds():8.2f}  {seconds}  {other.layout}{unfit}")
    for where, parts in (("each GPU", plan.gpu), ("host memory, per GPU", plan.host), ("disk", plan.disk)):
        lines.append(f"{where}: {sum(parts.values()) / GIB:.1f} GiB")
        for what, value in parts.items():
            if value:
                lines.append(f"  {value / GIB:8.2f}  {what}")
    hours = plan.step_seconds() * work.config.steps / 3600
    lines.append(f"total: {hours:.1f} hours for {work.config.steps} steps")
    return "\n".join(lines)
