"""What a layout costs: bytes on each GPU and in host memory, modelled seconds a step. Nothing but arithmetic.

From the shapes of transformers' own model class on the meta device. tests/test_plan.py compares the bytes
with a whole step at the published sizes. The seconds are a model of what a card achieves; `bash run.sh
test gpu` compares them with the clock. plan.py chooses.
"""

import argparse
import math
import os
import re
from dataclasses import dataclass, replace

import torch
from torch import nn

TEXT = 200  # tokens of a long question with its choices, for the bytes
USUAL_TEXT = 60  # and of a usual one, for the seconds
USUAL_ANSWER = 6  # tokens; what is asked to think first is taken to use all of --max_new_tokens
UPDATE = 0.1  # seconds of AdamW and the clip over hundreds of tensors, whatever their size
FSDP_HOOK = 60e-6  # seconds of Python before and after each group
PAGEABLE = 5e9  # bytes a second between GPU and host memory that is not pinned
NETWORK = 25e9  # bytes a second between nodes, for each GPU


# ---------------------------------------------------------------------------------------------------- cards

# The vendor's figures are from NVIDIA's data sheets of each card (dense bf16 with fp32 accumulation, memory,
# memory bandwidth, NVLink or PCIe generation). What is achieved of them is assumed.
FLOPS_ACHIEVED = 0.42  # of the peak, by training on rows of a few thousand tokens
MEMORY_ACHIEVED = 0.84  # of the bandwidth, by kernels that stream
NVLINK_ACHIEVED = 0.78  # of its one direction
WITHOUT_NVLINK = 12e9  # bytes a second of an all-gather over PCIe 4, through the host
PCIE = {3: 12e9, 4: 24e9, 5: 50e9}  # bytes a second to pinned host memory, of 16, 32 and 63 GB/s
LAUNCH = {3: 25e-6, 4: 18e-6, 5: 13e-6}  # seconds a kernel in eager PyTorch: the host is as old as its PCIe

# GiB as the driver reports them; TFLOP/s; GB/s of its memory; GB/s of NVLink in one direction (0: none); PCIe
# generation; GB/s of the memory of the hosts that usually have it.
DATA_SHEETS = """
B200      179    2250  8000  900  5  400
H200      140     989  4800  450  5  200
H100       79.2   989  3350  450  5  200
A100-80    79.2   312  2039  300  4  150
A100-40    39.5   312  1555  300  4  150
L40S       44.5   362   864    0  4  150
6000Ada    47.5   364   960    0  4  150
A6000      47.5   155   768    0  4  150
A10G       22.0    70   600    0  4  100
L4         22.0   121   300    0  4  100
RTX5090    31.4   210  1792    0  5   60
RTX4090    23.5   165  1008    0  4   50
RTX3090    23.5    71   936    0  4   50
"""


@dataclass(frozen=True)
class Card:
    """Rates are achieved ones: FLOP/s, bytes/s, seconds."""

    name: str
    memory: float  # GiB
    flops: float
    bandwidth: float
    link: float  # between two GPUs of a node
    pcie: float  # to and from pinned host memory
    host: float  # bandwidth of the host memory that such cards usually have, shared by a node's processes
    launch: float  # seconds from one kernel's launch to the next


def card(row: str) -> Card:
    """A line of DATA_SHEETS."""
    name, *columns = row.split()
    gib, peak, bandwidth, nvlink, generation, host = map(float, columns)
    link = WITHOUT_NVLINK
    if nvlink:
        link = NVLINK_ACHIEVED * nvlink * 1e9
    return Card(
        name=name,
        memory=gib,
        flops=FLOPS_ACHIEVED * peak * 1e12,
        bandwidth=MEMORY_ACHIEVED * bandwidth * 1e9,
        link=link,
        pcie=PCIE[generation],
        host=host * 1e9,
        launch=LAUNCH[generation],
    )


CARDS = list(map(card, DATA_SHEETS.split("\n")[1:-1]))
UNKNOWN = replace(card("unknown 0 70 600 0 3 50"), name="a card not in cost.py, at modest rates")


def find_card(name: str, gib: float, device: torch.device) -> Card:
    """The card of a name, or of `device` where there is none; modest rates if the list does not have it.

    `gib` (0: not known) tells two cards of one name apart.
    """
    if not name and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        gib = properties.total_memory / 2**30
    named = [known for known in CARDS if is_named(known, name)]
    if not named:
        return UNKNOWN

    def distance(known: Card) -> tuple:
        return letters(known.name) not in letters(name), abs(known.memory - gib)

    return min(named, key=distance)


def is_named(known: Card, name: str) -> bool:
    """Whether "NVIDIA GeForce RTX 4090" or "4090" means the card: a whole word does, so an L40 is no L4."""
    name = name.lower()
    name = name.replace("rtx", " ")
    name = name.replace(" ada", "ada")
    base, *_ = known.name.lower().split("-")
    base = base.removeprefix("rtx")
    return base in re.split("[ -]", name)


def letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# -------------------------------------------------------------------------------------- layouts and work


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
        if self.reshard and self.gathered_rollout:
            words.append("reshard")
        elif self.reshard:
            words.append("reshard (rollouts too)")
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
    largest: int  # of the layers, which are gathered one at a time
    pairs_of_rank_1: int  # LoRA's
    text: object  # the decoder's config
    audio: object | None  # the tower's config


def sizes_of(model: nn.Module) -> Sizes:
    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    decoder = model.model.language_model
    tower = getattr(model.model, "audio_tower", None)
    hearing = []
    audio = None
    if tower is not None:
        audio = tower.config
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
        largest=max(count(layer) for layer in decoder.layers),
        pairs_of_rank_1=pairs,
        text=model.config.get_text_config(),
        audio=audio,
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
    base_files: float = 0  # bytes of the base's weights on the disk

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


def lasting_bytes(work: Work, layout: Layout) -> dict[str, float]:
    """What lasts from step to step on each process, wherever it lies: exact."""
    sizes = work.sizes
    size = work.dtype.itemsize
    if work.lora:
        base = size * sizes.whole
        if layout.reshard:
            base /= work.gpus
        # In fp32, and once more as they compute.
        return {"base": base, "pairs, their gradients and moments": (16 + size) * work.trained}
    lasting = {
        "weights, fp32 shards": 4 * sizes.whole / work.gpus,
        "gradients, fp32 shards": 4 * sizes.trained / work.gpus,
        "AdamW moments, fp32 shards": 8 * sizes.trained / work.gpus,
    }
    if work.config.beta:
        lasting["reference"] = size * sizes.whole / work.gpus
    return lasting


def on_host(what: str, layout: Layout) -> bool:
    if what == "reference":
        return layout.reference_on_host
    return layout.offload == "all" or (layout.offload == "moments" and what.startswith("AdamW"))


# ------------------------------------------------------------------------------------------ bytes of a step


def gpu_bytes(work: Work, layout: Layout) -> dict[str, float]:
    """The parts of the step's largest moment."""
    return max(moments(work, layout).values(), key=lambda parts: sum(parts.values()))


def moments(work: Work, layout: Layout) -> dict[str, dict[str, float]]:
    """What lies on each GPU in the rollout, at the loss, at the first and the last group of the backward."""
    sizes = work.sizes
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
    share = sizes.largest / max(sizes.embedding, sizes.head)
    a_layer = again + share * (reducing + vocabulary)
    rollout = {
        "gathered weights": held,
        "keys, values and drawing": rollout_bytes(work, layout),
        "group being gathered": gathering,
    }
    loss = {
        "gathered weights": through_backward,
        "activations": for_backward,
        "gradients, fp32 shards": gradients * repeated,
        "logits, or the last group being gathered": max(logits, last_gather),
    }
    backward = {
        "gathered weights": through_backward,
        "activations": for_backward,
        "gradients, fp32 shards": gradients * repeated,
        "gradients being reduced, or the logits'": max(reducing, a_layer, with_gradient),
    }
    end = {
        "gathered weights": through_backward,
        "gradients, fp32 shards": gradients,
        "gradients being reduced": reducing,
    }
    parts = {"rollout": rollout, "loss": loss, "backward": backward, "end": end}
    return {moment: {**kept, **part} for moment, part in parts.items()}


def group_bytes(work: Work, layout: Layout) -> tuple[float, float, float, float]:
    """What all gathered weights take, the largest group of them, its gathering, its gradients' reduction."""
    sizes = work.sizes
    size = work.dtype.itemsize
    sharded = work.gpus > 1 or size < 4 or layout.offload == "all"
    if work.lora:
        sharded = layout.reshard
    if not sharded:
        return 0.0, 0.0, 0.0, 0.0
    largest = max(sizes.embedding, sizes.head)
    whole = size * sizes.whole
    gathering = size * largest  # the buffer it is gathered into
    reducing = (4 + 4 / work.gpus) * largest  # in fp32, and this process's part of the sum
    if work.gpus > 1:
        gathering += size * sizes.largest  # the buffer before is kept
        reducing += size * largest  # and as it was computed
    elif layout.offload == "all":
        gathering = 4 * largest  # in fp32 from the host
    if work.lora:
        reducing = 0.0
    return whole, size * largest, gathering, reducing


def activation_bytes(work: Work, layout: Layout) -> tuple[float, float]:
    """(kept for the backward, of a layer that is computed again) of one pass, with answers of full length."""
    text = work.sizes.text
    audio = work.sizes.audio
    size = work.dtype.itemsize
    answers = work.config.group_size * (work.config.max_new_tokens - 1)
    tokens = work.prompt(TEXT) + answers
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
        per_position = (9 * audio.d_model + 2 * audio.encoder_ffn_dim) * size * audio.encoder_layers
        if layout.checkpointing:
            per_position = size * audio.d_model * audio.encoder_layers
        total += 50 * work.clip_seconds * per_position
    return layout.questions_per_pass * total, layout.questions_per_pass * again


def logits_bytes(work: Work, layout: Layout) -> tuple[float, float]:
    """(at the loss, as the backward begins): in fp32 their softmax as well, and then the gradient."""
    row = 4 * work.sizes.text.vocab_size
    rows = work.config.group_size * (work.config.max_new_tokens - 1) + 1
    rows *= layout.questions_per_pass
    entropy = 3 * 64 * row  # of 64 rows at a time
    return 2 * rows * row + entropy, 3 * rows * row


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
    compute, launches = compute_seconds(work, layout, answer=answer, decoding=decoding)
    gather = gathering_seconds(work, layout, decoding)
    if work.gpus > 1:  # on a stream of its own, beside the compute
        gather -= 0.5 * min(gather, compute + launches)
    scored = work.passes(layout) * config.updates
    reduce = scored * 4 * work.trained * (work.gpus - 1) / work.gpus / work.card.link
    if config.replicas > 1:
        reduce += scored * 8 * work.trained / work.gpus / NETWORK
    on_gpu, host = update_seconds(work, layout)
    launches += UPDATE * config.updates
    return {
        "gather": gather,
        "reduce": reduce,
        "compute": compute + on_gpu,
        "launches": launches,
        "host": host,
    }


def compute_seconds(work: Work, layout: Layout, *, answer: int, decoding: int) -> tuple[float, float]:
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
    kernels = decoder
    if sizes.audio is not None:
        kernels += 16 * sizes.audio.encoder_layers
    forwards = passes + scored  # of the prefill, and of the policy's scoring
    if work.config.beta:
        forwards += passes
    if layout.checkpointing:
        forwards += scored
    backward = 2
    if work.lora:
        backward = 1  # no weights' gradients for the frozen base
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
    from_host = 4 * (layout.offload == "all")  # bytes a parameter: fp32, cast on the GPU
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
