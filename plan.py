"""What a run takes, before it starts: the layout that fits, its memory and disk, and about how long.

    python train.py --plan --world_size 4 --gpu A6000

Nothing but arithmetic on the shapes of transformers' own model class on the meta device: no weights are read.
tests/test_plan.py compares the bytes with a whole step at the published sizes. Of the layouts that fit the
one whose step is modelled to be the shortest is taken, here and at the start of every run.
"""

import math
import os
import re
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

import fsdp
from files import InputError
from weights import empty_model, find_model

GIB = 2**30
LEFT = 1.5 * GIB  # of a GPU's memory: NCCL, the CUDA context, fragmentation
TEXT = 200  # tokens of a long question with its choices
DISK = 4e9  # bytes a second that a node writes, as assumed

# The name, as a pattern; GiB as the driver reports them; TFLOP/s, dense bf16, of NVIDIA's data sheets; GB/s
# of an all-gather in a node: 78 % of NVLink's one direction, or half of PCIe 4's, through the host.
CARDS = """
B200           179   2250 700
H200           140    989 350
H100            79.2  989 350
A100.*80.*      79.2  312 235
A100.*          39.5  312 235
L40S            44.5  362  12
6000.?Ada       47.5  364  12
A6000           47.5  155  12
A10G            22.0   70  12
L4              22.0  121  12
(RTX.?)?5090    31.4  210  12
(RTX.?)?4090    23.5  165  12
(RTX.?)?3090    23.5   71  12
"""


@dataclass(frozen=True)
class Card:
    name: str
    memory: float  # bytes that a run can use
    flops: float  # a second, at its peak
    link: float  # bytes a second to another GPU of its node


UNKNOWN = Card("a card not in plan.py, at modest rates", math.inf, 70e12, 9e9)

# --cpu_offload's value, and what the names of its bytes begin with; the last is chosen, never asked for.
ON_HOST = {
    "off": (),
    "moments": ("AdamW",),
    "on": ("weights", "gradients", "AdamW"),
    "on (reference too)": ("weights", "gradients", "AdamW", "reference"),
}


@dataclass(frozen=True)
class Layout:
    """What is given up to fit; fsdp.shard says what each means."""

    reshard: bool
    checkpointing: bool
    offload: str  # of ON_HOST
    gathered_rollout: bool
    questions_per_pass: int

    def __str__(self) -> str:
        words = []
        if self.reshard:
            words.append("reshard" + " (rollouts too)" * (not self.gathered_rollout))
        if self.checkpointing:
            words.append("checkpointing")
        if self.offload != "off":
            words.append(f"cpu_offload {self.offload}")
        return f"{', '.join(words) or 'nothing given up'}; {self.questions_per_pass} a pass"


@dataclass(frozen=True)
class Plan:
    """A run under one layout: the recipe, the machine, the model in numbers of parameters."""

    config: Namespace
    layout: Layout | None
    gpus: int  # that share one set of shards
    card: Card
    host_memory: float  # bytes available on this node
    dtype: torch.dtype
    clip_seconds: float  # the longest clip's; 0 without sound
    lora: int  # the pairs' rank
    whole: int
    pairs_of_rank_1: int  # LoRA's
    active: int  # of them those that a token meets: of a layer's experts a few
    vocabulary: int  # the larger of its two matrices
    layer: int  # of the decoder; that or the vocabulary is the largest part that is gathered at a time
    text: object  # the decoder's config
    audio: object | None  # the tower's config

    @property
    def trained(self) -> int:
        return self.lora * self.pairs_of_rank_1 or self.whole

    @property
    def questions(self) -> int:
        """Of a process and step."""
        return self.config.batch // (self.gpus * self.config.replicas)

    @property
    def passes(self) -> int:
        return math.ceil(self.questions / self.layout.questions_per_pass)

    @property
    def gpu(self) -> dict[str, float]:
        """What -> bytes on each GPU, in the part of the step that takes most."""
        found = {"gathered weights, activations, gradients": max(passing_bytes(self).values())}
        for what, value in lasting_bytes(self).items():
            if not what.startswith(("gradients", *ON_HOST[self.layout.offload])):
                found[what] = value
        return found

    @property
    def host(self) -> dict[str, float]:
        """What -> bytes in host memory of a node."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", min(8, self.gpus * self.config.replicas)))
        found = {"libraries": 3e9 * processes}
        for what, value in lasting_bytes(self).items():
            if what.startswith(ON_HOST[self.layout.offload]):
                found[what] = value * processes
        return found

    @property
    def disk(self) -> dict[str, float]:
        """What -> bytes: models, checkpoints and the one that is being written."""
        config = self.config
        models = math.ceil(config.steps / (config.save_model_every or config.steps))
        base = sum(file.stat().st_size for file in Path(config.model).glob("*.safetensors"))
        return {  # what of the base is not loaded is copied along
            "model folders": models * max(self.dtype.itemsize * self.whole, base),
            "checkpoints": (config.keep + 1) * 12 * self.trained,
        }

    def why_not(self) -> str:
        """Why it cannot run, or nothing if it can."""
        gpu = sum(self.gpu.values())
        host = sum(self.host.values())
        if gpu > self.card.memory:
            return f"{gpu / GIB:.1f} GiB a GPU of {self.card.memory / GIB:.1f} that are free"
        if host > self.host_memory and self.layout.offload != "off":
            return f"{host / GIB:.1f} GiB of host memory of {self.host_memory / GIB:.1f} that are free"
        return ""


# ------------------------------------------------------------------------------------------ bytes of a step


def lasting_bytes(plan: Plan) -> dict[str, float]:
    """What lasts from step to step of each process, wherever it lies: exact."""
    size = plan.dtype.itemsize
    if plan.lora:
        base = size * plan.whole
        if plan.layout.reshard:
            base /= plan.gpus
        # In fp32, and once more as they compute.
        return {"base": base, "pairs, their gradients and moments": (16 + size) * plan.trained}
    shard = plan.whole / plan.gpus
    return {
        "weights, fp32 shards": 4 * shard,
        "gradients, fp32 shards": 4 * shard,
        "AdamW moments, fp32 shards": 8 * shard,
        "reference": size * shard * bool(plan.config.beta),
    }


def passing_bytes(plan: Plan) -> dict[str, float]:
    """What else each GPU has while responses are drawn, in a pass's backward, and once that is over.

    Of what is gathered and reduced the vocabulary's matrix is the largest; answers are of full length.
    """
    layout = plan.layout
    config = plan.config
    text = plan.text
    size = plan.dtype.itemsize
    sharded = layout.reshard or not plan.lora
    whole = size * plan.whole * sharded
    largest = max(plan.vocabulary, plan.layer) * sharded
    # Its gradients in fp32, this process's part of their sum, and as they were computed.
    reducing = (4 + 4 / plan.gpus + size * (plan.gpus > 1)) * largest
    drawing = (
        whole + 2 * size * largest
    )  # that is gathered beside the layer before it, or in fp32 from the host
    if layout.reshard:
        # the last buffer; of layers the next one's as well
        whole = size * max(largest, 2 * plan.layer) * (plan.gpus > 1)
        if not layout.gathered_rollout:
            drawing = 3 * size * largest
    gradients = 4 * plan.whole / plan.gpus
    if plan.lora or layout.offload.startswith("on"):
        gradients = 0.0  # with the pairs, or in host memory
    repeated = plan.passes * config.updates > 1  # gradients are there from the first pass on

    # Of a pass: the text's tokens, 25 a second of sound (50 in the tower), the answers'; what a layer of the
    # decoder makes of them, and what is kept of it.
    in_pass = size * layout.questions_per_pass
    tokens = in_pass * (TEXT + 25 * plan.clip_seconds + config.group_size * config.max_new_tokens)
    keys = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * keys
    inner = 4 * text.intermediate_size
    experts = getattr(text, "num_experts_per_tok", 0)
    if experts:  # each has its own copy of what it reads and says
        copies = 1 if plan.lora else 2
        inner = experts * (4 * text.moe_intermediate_size + copies * text.hidden_size)
    layer = tokens * (10.5 * text.hidden_size + 3 * text.num_attention_heads * keys + inner)
    kept = layer
    again = 0.0
    if layout.checkpointing:
        kept = tokens * text.hidden_size
        again = layer
    activations = text.num_hidden_layers * kept + 10 * tokens * text.hidden_size  # these around the last norm
    if plan.audio is not None and not plan.lora:
        heard = 9 * plan.audio.d_model + 2 * plan.audio.encoder_ffn_dim
        if layout.checkpointing:
            heard = plan.audio.d_model
        activations += in_pass * 50 * plan.clip_seconds * heard * plan.audio.encoder_layers
    logits = 12 * layout.questions_per_pass * config.group_size * config.max_new_tokens * text.vocab_size
    share = max(0.6, plan.layer / max(plan.vocabulary, plan.layer))  # a dense layer is half the vocabulary
    last = max(reducing, again + share * reducing, logits)
    return {
        "rollout": drawing + cache + 0.6 * layer,
        "backward": whole + gradients * repeated + activations + last,
        "end": whole + gradients + reducing,
    }


# ------------------------------------------------------------------------------------------------- choosing


def choose_plan(
    model: torch.nn.Module,
    gpus: int,
    dtype: torch.dtype,
    config: Namespace,
    device: torch.device,
    clip_seconds: float = 10.0,
) -> Plan:
    """The fastest plan that fits of those that the options leave open.

    `gpus` share one set of shards; `model` is empty. Collective where processes are running: all choose
    alike, and none measures free memory after another has taken some. Raises InputError, with what would
    fit, if nothing does.
    """
    card = find_gpu(config.gpu, device)
    host_memory = math.inf  # --plan's machine may be another
    if not config.plan:
        host_memory = available_host_memory()
    if dist.is_initialized():
        card = min(fsdp.gather_objects(card), key=lambda card: card.memory)
        host_memory = min(fsdp.gather_objects(host_memory))
    decoder = model.model.language_model
    text = model.config.get_text_config()
    whole = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in decoder.layers.parameters() if p.ndim == 3)
    linears = [layer for layer in decoder.layers.modules() if isinstance(layer, torch.nn.Linear)]
    tower = getattr(model.model, "audio_tower", None)
    chosen = best(
        Plan(
            config=config,
            layout=None,
            gpus=gpus,
            card=card,
            host_memory=host_memory,
            dtype=dtype,
            clip_seconds=clip_seconds * (tower is not None),
            lora=config.lora,
            whole=whole,
            pairs_of_rank_1=sum(layer.in_features + layer.out_features for layer in linears),
            active=whole
            - experts
            + experts * getattr(text, "num_experts_per_tok", 1) // getattr(text, "num_experts", 1),
            vocabulary=model.lm_head.weight.numel(),
            layer=sum(p.numel() for p in decoder.layers[0].parameters()),
            text=text,
            audio=getattr(tower, "config", None),
        )
    )
    if chosen.why_not():
        raise InputError(refusal(chosen))
    return chosen


def find_gpu(asked: str, device: torch.device) -> Card:
    """--gpu's, or this machine's with the memory that is free."""
    if not asked and device.type != "cuda":
        return UNKNOWN
    card = find_card(asked or torch.cuda.get_device_name(device))
    if not asked:
        return replace(card, memory=torch.cuda.mem_get_info(device)[0] - LEFT)
    if card is UNKNOWN:
        raise InputError(f"--gpu {asked}: no card of plan.py's list, so give a number of GiB")
    return card


def find_card(name: str) -> Card:
    """What "NVIDIA GeForce RTX 4090", "4090" or so many GiB mean. Only whole words: an L40 is no L4."""
    for line in CARDS.strip().splitlines():
        pattern, gib, peak, link = line.split()
        found = re.search(rf"\b({pattern})\b", name, re.IGNORECASE)
        if found:
            return Card(found[0], float(gib) * GIB - LEFT, float(peak) * 1e12, float(link) * 1e9)
    if re.fullmatch(r"\d+(\.\d+)?", name):
        return replace(UNKNOWN, memory=float(name) * GIB - LEFT)
    return UNKNOWN


def best(plan: Plan) -> Plan:
    """The fastest layout that fits of those that the options leave open, or the smallest."""
    config = plan.config
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}
    offloads = [place for place in ON_HOST if config.cpu_offload in ("auto", place.split()[0])]
    if plan.lora:
        offloads = ["off"]
    sizes = range(1, plan.questions + 1)
    if config.accumulation:
        sizes = [math.ceil(plan.questions / config.accumulation)]
    given_up = (switches[config.reshard], switches[config.checkpointing], offloads)
    found = []
    for axes in product(*given_up, (True, False), sizes):
        found.append(replace(plan, layout=Layout(*axes)))
    fitting = [one for one in found if not one.why_not()]
    if fitting:
        return min(fitting, key=step_seconds)
    return min(found, key=lambda one: sum(one.gpu.values()))


def refusal(closest: Plan) -> str:
    """One line: what the smallest layout lacks, and what would fit."""
    would = []
    for gpus in range(closest.gpus + 1, closest.config.batch + 1):
        world = gpus * closest.config.replicas
        if closest.config.batch % world == 0 and not best(replace(closest, gpus=gpus)).why_not():
            would.append(f"{world} such GPUs")
            break
    pairs = best(replace(closest, lora=32))
    if not closest.lora and not pairs.why_not():
        would.append(f"--lora 32 ({sum(pairs.gpu.values()) / GIB:.1f} GiB a GPU)")
    what = " or ".join(would) or "a smaller model, or a smaller --group_size or --max_new_tokens"
    return f"does not fit: {closest.why_not()}, even with {closest.layout}; what would: {what}"


def available_host_memory(root: Path = Path("/")) -> float:
    """Bytes that this machine, or the container that this is, has left."""
    available = math.inf
    try:
        meminfo = (root / "proc/meminfo").read_text()
        available = 1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo)[1])
        # Not all that the container has: files that were read are freed when memory is wanted.
        used = int(re.search(r"anon (\d+)", (root / "sys/fs/cgroup/memory.stat").read_text())[1])
        available = min(available, int((root / "sys/fs/cgroup/memory.max").read_text()) - used)
    except (OSError, ValueError, TypeError):
        pass  # not a Linux that tells, no container, or none with a limit ("max")
    return available


def set_batch(config: Namespace, world: int) -> None:
    """InputError if the processes cannot share a step's questions."""
    if world % config.replicas:
        raise InputError(f"--replicas {config.replicas} does not divide the {world} processes")
    if config.batch % world:
        raise InputError(f"--batch {config.batch} cannot be shared by {world} processes: give a multiple")


# ---------------------------------------------------------------------------------------------------- hours


def step_seconds(plan: Plan) -> float:
    """About how long a step takes, for answers of a tenth of --max_new_tokens. Not measured.

    42 % of the card's peak is what training achieves; a launch takes 15 us, a decoder's layer has 44.
    FSDP2 gathers the next layer and reduces the last one's gradients while one is computed, so that of
    computing and crossing the longer counts; nothing crosses while a token is decoded. 24 GB/s cross to the
    host and as many back, which moments do at once; AdamW there reads and writes 100 GB/s.
    """
    layout = plan.layout
    passes = plan.passes
    answer = plan.config.max_new_tokens / 10
    tokens = plan.questions * (60 + 25 * plan.clip_seconds + plan.config.group_size * answer)
    forwards = 3 + layout.checkpointing  # rollout, policy, reference; the backward is two
    launching = passes * 44 * plan.text.num_hidden_layers * 15e-6
    computing = (forwards + 2) * 2 * plan.active * tokens / (
        0.42 * plan.card.flops
    ) + 2 * forwards * launching
    gathers = 1
    if layout.reshard:
        gathers = 3 * passes
        if not layout.gathered_rollout:
            gathers += passes * answer
    size = plan.dtype.itemsize
    references = passes * bool(plan.config.beta)
    crossing = size * plan.whole * (gathers + references) + 4 * plan.trained * passes
    if plan.lora and not layout.reshard:
        crossing = 0.0
    crossing *= (1 - 1 / plan.gpus) / plan.card.link
    moved = {"off": 0, "moments": 8}.get(layout.offload, 4 * (gathers + passes))  # bytes of a parameter
    host = moved * plan.whole / plan.gpus / 24e9
    if layout.offload.startswith("on"):
        host += 40 * plan.whole / 100e9
    return 0.1 + max(computing, crossing) + answer * launching + host


# ------------------------------------------------------------------------------------------------- printing


def plan_line(plan: Plan) -> str:
    """What a run says of its plan when it starts, and --plan at its end."""
    if plan.card.memory == math.inf and not plan.config.plan:
        return f"layout: {plan.layout}"
    steps = plan.config.steps
    hours = step_seconds(plan) * steps / 3600
    gpu = sum(plan.gpu.values()) / GIB
    host = sum(plan.host.values()) / GIB
    return (
        f"layout: {plan.layout}; {gpu:.1f} GiB a GPU, {host:.1f} of host memory; "
        f"about {hours:.1f} hours for {steps} steps on {plan.card.name}, not measured"
    )


def print_plan(config: Namespace) -> None:
    """train.py --plan: from config.json alone (of a hub name, nothing else is fetched)."""
    model = empty_model(find_model(config.model, config_only=True), not config.no_audio)
    gpus = config.world_size or torch.accelerator.device_count() or 1
    set_batch(config, gpus)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16  # of the GPUs that are meant
    plan = choose_plan(model, gpus // config.replicas, dtype, config, device)
    for where, parts in {"each GPU": plan.gpu, "host memory": plan.host, "disk": plan.disk}.items():
        print(f"{where}: {sum(parts.values()) / GIB:.1f} GiB")
        for what, value in parts.items():
            print(f"  {value / GIB:8.2f}  {what}")
    checkpoint = f"{12 * plan.trained / GIB:.1f} GiB, {12 * plan.trained / DISK:.0f} s"
    print(f"a checkpoint: {checkpoint} where a node writes {DISK / 1e9:.0f} GB/s")
    print(plan_line(plan))
