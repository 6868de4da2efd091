"""What a run takes, before it starts: the layout that is fastest among those that fit, its memory, its hours.

    python train.py --plan --world_size 4 --gpu A6000

From config.json alone, by cost.py's arithmetic. The same choice is made at the start of every run.
"""

import argparse
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache
from torch import nn

import fsdp
from cost import UNKNOWN, Layout, Work, find_card, gpu_bytes, lasting_bytes, on_host, seconds_of, sizes_of
from files import InputError
from weights import empty_model, find_model

GIB = 2**30
USABLE = 0.95  # of a GPU's memory: the rest goes to the CUDA context, NCCL and fragmentation


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
    lasting = lasting_bytes(work, layout)
    host = {"workers and libraries": 3e9}
    for what, value in lasting.items():
        if on_host(what, layout):
            host[what] = value
    checkpoint = 4 * work.sizes.whole + 8 * work.sizes.trained
    if work.lora:
        checkpoint = 12 * work.trained
    disk = folders_on_disk(work)
    disk["checkpoints"] = (work.config.keep + 1) * checkpoint
    return Plan(layout, gpu_bytes(work, layout), host, disk, seconds_of(work, layout), lasting, work)


def base_files(name: str) -> float:
    """Bytes of a model's weights on this disk; 0 of a hub's that is not here yet."""
    folder = Path(name)
    if not folder.is_dir():
        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            return 0.0
        folder = Path(config).parent
    total = 0.0
    for path in folder.glob("*.safetensors"):
        total += path.stat().st_size
    return total


def folders_on_disk(work: Work) -> dict[str, float]:
    """What the run leaves: the last model and those of --save_model_every, or the pairs, or both."""
    config = work.config
    count = 1
    if config.save_model_every:
        count = math.ceil(config.steps / config.save_model_every)
    model = work.dtype.itemsize * work.sizes.whole
    if config.model_only is None:  # what was not loaded is copied from the base
        model = max(model, work.base_files)
    if work.lora and config.save_merged == "off":
        model = 0.0
    adapter = 4 * work.lora * work.sizes.pairs_of_rank_1
    return {
        "model folders": count * model,
        "adapters": count * adapter,
    }


# ------------------------------------------------------------------------------------------------- choosing


def layouts(work: Work) -> list[list[Layout]]:
    """What the options leave open; those that differ in the rollout and a pass's questions are one kind."""
    config = work.config
    switches = {"auto": (False, True), "on": (True,), "off": (False,)}
    places = {
        "auto": ["off", "moments", "all"],
        "off": ["off"],
        "moments": ["moments"],
        "on": ["all"],
    }
    offloads = [(place, False) for place in places[config.cpu_offload]]
    if config.beta and offloads[-1][0] == "all":
        offloads.append(("all", True))
    if work.lora:
        offloads = [("off", False)]
    reshards = switches[config.reshard]
    if work.lora and work.gpus == 1:
        reshards = (False,)  # the frozen base is sharded among several or not at all
    counts = [config.questions_per_pass]
    if not config.questions_per_pass:  # as even as can be: 8, 4, 3, 2, 1
        even = {math.ceil(work.questions / passes) for passes in range(1, work.questions + 1)}
        counts = sorted(even, reverse=True)
    kinds = []
    for checkpointing in switches[config.checkpointing]:
        for reshard in reshards:
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
        if card is UNKNOWN:
            raise InputError(f"--gpu {config.gpu}: not in cost.py's list, so give --gpu_memory as well")
        memory = USABLE * GIB * card.memory
    elif device.type == "cuda":
        memory = USABLE * torch.cuda.get_device_properties(device).total_memory
    host_memory = math.inf  # --plan's machine may be another
    if not config.plan:
        host_memory = available_host_memory()
    if dist.is_initialized():
        found = fsdp.gather_objects((memory, host_memory))
        memory = min(pair[0] for pair in found)
        host_memory = min(pair[1] for pair in found)
    sizes = sizes_of(model)
    if sizes.audio is None:
        clip_seconds = 0.0
    work = Work(sizes, config, gpus, dtype, clip_seconds, card, memory, host_memory, config.lora)
    work = replace(work, base_files=base_files(config.model))
    plans = best_plans(work)
    if memory == math.inf:  # a CPU's, or not known: nothing has to be given up
        plans = plans[:1]
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
    if plan.why_not():
        return True, sum(plan.gpu.values())
    return False, plan.step_seconds()


def refusal(plans: list[Plan]) -> str:
    """One line: what the smallest layout lacks, and what would fit."""
    work = plans[0].work
    on_gpus = [plan for plan in plans if sum(plan.gpu.values()) <= work.memory]
    closest = min(on_gpus or plans, key=lambda plan: sum(plan.gpu.values()))
    would = []
    for gpus in range(work.gpus + 1, work.config.batch + 1):
        more = replace(work, gpus=gpus)
        world = gpus * work.config.replicas
        if work.config.batch % world == 0 and not min(best_plans(more), key=preference).why_not():
            would.append(f"{world} such GPUs")
            break
    pairs = min(best_plans(replace(work, lora=32)), key=preference)
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
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * int(line.split()[1])
        limit = (container / "memory.max").read_text().strip()
        used = int((container / "memory.current").read_text())
        for line in (container / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == "inactive_file":  # files that were read: freed when memory is wanted
                used -= int(value)
        if limit != "max":
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass  # not a Linux that tells, or no container
    return available


# ------------------------------------------------------------------------------------------------- printing


def set_batch(config: argparse.Namespace, world: int) -> None:
    """--batch from --accumulation where that is given; InputError if the processes cannot share it."""
    if world % config.replicas:
        raise InputError(f"--replicas {config.replicas} does not divide the {world} processes")
    if config.accumulation:
        config.batch = config.accumulation * world
    if config.batch % world:
        raise InputError(f"--batch {config.batch} cannot be shared by {world} processes: give a multiple")


def print_plan(config: argparse.Namespace) -> None:
    """train.py --plan: from config.json alone (of a hub name, nothing else is fetched)."""
    model = empty_model(find_model(config.model, config_only=True), not config.no_audio)
    gpus = config.world_size or torch.accelerator.device_count() or 1
    set_batch(config, gpus)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
    dtype = torch.bfloat16  # of the GPUs that are meant, whatever is here
    if config.dtype == "float32":
        dtype = torch.float32
    print(plan_table(choose_plan(model, gpus // config.replicas, dtype, config, device)))


def plan_line(plan: Plan) -> str:
    """What a run says of its plan when it starts."""
    gpu = sum(plan.gpu.values()) / GIB
    host = plan.node_host() / GIB
    seconds = f"{plan.step_seconds():.2f} s a step as modelled for {plan.work.card.name}"
    return f"layout: {plan.layout}; {gpu:.1f} GiB a GPU, {host:.1f} GiB of host memory a node, {seconds}"


def plan_table(plan: Plan) -> str:
    """Every kind of layout with its GiB and modelled seconds, what the chosen one consists of, the hours."""
    work = plan.work
    lines = [f"{work.gpus * work.config.replicas} x {work.card.name}; the layout marked * runs"]
    terms = list(plan.seconds)
    lines.append(
        "  GiB a GPU  host a node  s a step  " + "".join(f"{term:>9}" for term in terms) + "  layout"
    )
    for other in plan.others:
        mark = " *"[other.layout == plan.layout]
        sums = f"{mark} {sum(other.gpu.values()) / GIB:9.1f}  {other.node_host() / GIB:11.1f}"
        seconds = "".join(f"{other.seconds[term]:9.2f}" for term in terms)
        unfit = " (does not fit)" * bool(other.why_not())
        lines.append(f"{sums}  {other.step_seconds():8.2f}  {seconds}  {other.layout}{unfit}")
    places = {
        "each GPU": plan.gpu,
        "host memory, per GPU": plan.host,
        "disk": plan.disk,
    }
    for where, parts in places.items():
        lines.append(f"{where}: {sum(parts.values()) / GIB:.1f} GiB")
        for what, value in parts.items():
            if value:
                lines.append(f"  {value / GIB:8.2f}  {what}")
    hours = plan.step_seconds() * work.config.steps / 3600
    lines.append(f"total: {hours:.1f} hours for {work.config.steps} steps")
    return "\n".join(lines)
