"""What a run takes, before it starts: bytes on each GPU, in host memory and on disk, from config.json alone.

    python train.py --plan --world_size 4 --gpu_memory 48

The shapes come from transformers' own model class on the meta device; the same check runs before every
training.
"""

from dataclasses import dataclass

import torch

from files import InputError
from weights import empty_model, find_model, groups


@dataclass(frozen=True)
class Plan:
    """A layout of the run, and the bytes it takes."""

    reshard: bool
    checkpointing: bool
    cpu_offload: bool
    gpu: dict  # what -> bytes on each GPU
    host: dict  # what -> bytes in host memory, per GPU
    disk: dict  # what -> bytes


def make_plan(model, gpus, dtype, config, reshard, checkpointing, cpu_offload) -> Plan:
    """Count the bytes of a run on `gpus` GPUs per replica, from the meta-device `model` (no weights).

    Exact for what lasts (shards, gradients, AdamW's two moments, reference); the activations are an estimate
    for a 30 s clip, a 200-token question and responses of full length.
    """
    size = dtype.itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    biggest = max(sum(p.numel() for p in group.parameters()) for group in groups(model))
    sharded = gpus > 1 or size < 4 or cpu_offload
    at_once = min(everything, 2 * biggest) if reshard else everything
    resident = {
        "weights, fp32 shards": 4 * everything / gpus,
        "gradients, fp32 shards": 4 * trained / gpus,
        "AdamW moments, fp32 shards": 8 * trained / gpus,
    }
    gpu = {} if cpu_offload else dict(resident)
    gpu["reference"] = size * everything / gpus if config.beta else 0
    gpu["gathered weights"] = size * at_once if sharded else 0
    if config.beta and gpus > 1 and not reshard:
        gpu["gathered reference"] = size * everything
    gpu["gradients being reduced"] = (size + 4) * biggest if sharded else 0
    gpu["activations"] = activation_bytes(model, size, config, checkpointing)
    host = {"workers and libraries": 3e9, **(resident if cpu_offload else {})}
    checkpoint_bytes = 4 * everything + 8 * trained
    disk = {"checkpoints": (config.keep + 1) * checkpoint_bytes, "final model": size * everything}
    return Plan(reshard, checkpointing, cpu_offload, gpu, host, disk)


def activation_bytes(model, size, config, checkpointing):
    """Kept for one question's backward: about 12 of the hidden and 4 of the feed-forward size a token."""
    text, tower = model.config.get_text_config(), getattr(model.model, "audio_tower", None)
    responses = config.group_size * config.max_new_tokens
    tokens, heard, total = responses + 200, 0, 0
    if tower is not None:
        heard, c = 1500, tower.config
        tokens += heard // 2
        per_layer = c.d_model if checkpointing else 8 * c.d_model + 2 * c.encoder_ffn_dim
        total += size * heard * per_layer * c.encoder_layers
    per_layer = text.hidden_size if checkpointing else 12 * text.hidden_size + 4 * text.intermediate_size
    return total + size * tokens * per_layer * text.num_hidden_layers + 12 * responses * text.vocab_size


def print_plan(config):
    """train.py --plan: from config.json alone (a hub name fetches nothing else). Returns the exit code."""
    model = empty_model(find_model(config.model, config_only=True), not config.no_audio)
    gpus = config.world_size or torch.accelerator.device_count() or 1
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(plan_table(choose_plan(model, gpus // config.replicas, dtype, config, device)))
    return 0


def choose_plan(model, gpus, dtype, config, device):
    """The first layout that fits --gpu_memory, or the GPU's own, of those that the options leave open.

    Nothing given up first; then re-sharding between layers; then recomputing activations as well; then
    keeping shards and optimizer in host memory. Without a figure for the memory (a CPU), the first. Raises
    InputError if none fits.
    """
    layouts = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
    memory = config.gpu_memory * 2**30
    if not memory and device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    asked = (config.reshard, config.checkpointing, config.cpu_offload)
    plans = []
    for layout in layouts:
        layout = [on if ask == "auto" else ask == "on" for on, ask in zip(layout, asked, strict=True)]
        plans.append(make_plan(model, gpus, dtype, config, *layout))
        if not memory or sum(plans[-1].gpu.values()) <= 0.95 * memory:
            return plans[-1]
    needs = sum(plans[-1].gpu.values()) / 2**30
    raise InputError(
        f"does not fit: {needs:.1f} GiB a GPU of {memory / 2**30:.1f} GiB even with {describe(plans[-1])}; "
        "use more GPUs, a smaller model, or --group_size, --max_new_tokens or --beta 0 to shrink the rest"
    )


def describe(plan):
    options = ("reshard", "checkpointing", "cpu_offload")
    return " ".join(f"--{name} {'on' if getattr(plan, name) else 'off'}" for name in options)


def plan_table(plan):
    """The plan as text: GiB by what takes them."""
    lines = [f"layout: {describe(plan)}"]
    for place in ("gpu", "host", "disk"):
        rows = getattr(plan, place)
        where = {"gpu": "each GPU", "host": "host memory, per GPU", "disk": "disk"}[place]
        lines.append(f"{where}: {sum(rows.values()) / 2**30:.1f} GiB")
        lines += [f"  {value / 2**30:8.2f}  {what}" for what, value in rows.items() if value]
    return "\n".join(lines)
