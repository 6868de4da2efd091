"""The model's weights: the hub's files, into each process's shards, and back into such files.

Everything here is about where weights lie; what they compute is in model.py. Sharding is PyTorch's FSDP2: one
group for each decoder layer and each encoder layer, one for the rest, fp32 master shards that AdamW steps on
(a bf16 weight of ordinary size cannot take a step of 1e-6), `dtype` for the compute.
"""

import functools
import json
import os
import shutil
import signal
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # DataLoader workers are forked
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    logging,
)

from files import InputError, write_text

logging.set_verbosity_error()  # the hub's own Qwen2.5-Omni config draws a page of warnings


@dataclass(frozen=True)
class Family:
    """What differs between the two model families."""

    model_class: type
    names: tuple  # (prefix of transformers' parameter names, prefix in the hub's files)
    before_audio: str  # chat template around the audio tokens, as published
    after_audio: str
    padding_frames: (
        int  # frames after the clip that the encoder needs to see (its convolution looks one ahead)
    )


OMNI = Family(
    Qwen2_5OmniThinkerForConditionalGeneration,
    (
        ("model.language_model.", "model."),
        ("model.audio_tower.", "audio_tower."),
        ("model.visual.", "visual."),
    ),
    "<|audio_bos|>",
    "<|audio_eos|>",
    0,
)
QWEN2_AUDIO = Family(
    Qwen2AudioForConditionalGeneration,
    (
        ("model.language_model.", "language_model.model."),
        ("model.audio_tower.", "audio_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "Audio 1: <|audio_bos|>",
    "<|audio_eos|>\n",
    1,
)
FAMILIES = {"qwen2_5_omni": OMNI, "qwen2_5_omni_thinker": OMNI, "qwen2_audio": QWEN2_AUDIO}


def find_model(path, config_only=False) -> Path:
    """A local folder as it is, a hub name downloaded (no pickles). Raises InputError if it is neither."""
    wanted = ["config.json"] if config_only else ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or len(folder.parts) != 2 or str(path).startswith((".", "/", "~")):
            raise InputError(
                f"no model folder at {path}: give a checkpoint folder, or a hub name as owner/name"
            )
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=wanted))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{path} is no local folder and cannot be fetched from the hub: {reason}"
            ) from None
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json: not a checkpoint folder")
    return folder


def read_config(folder):
    """The language side's config: for the hub's whole Qwen2.5-Omni, its thinker's."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder}/config.json cannot be read: {str(error).splitlines()[0]}") from None
    config = getattr(config, "thinker_config", config)
    if config.model_type not in FAMILIES:
        raise InputError(f"{folder} holds a {config.model_type}; supported: {', '.join(FAMILIES)}")
    return config


def weight_files(folder) -> dict:
    """Every weight's name in the folder's safetensors files -> its file."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    if not (folder / "model.safetensors").exists():
        raise InputError(f"{folder} has no safetensors weights (other formats are not read)")
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), folder / "model.safetensors")


def hub_name(name, family) -> str:
    """transformers' parameter name -> the name in the hub's files (without Qwen2.5-Omni's "thinker.")."""
    for ours, theirs in family.names:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def empty_model(folder, audio=True):
    """The model on the meta device (shapes, no memory), without the parts that no question of ours can use.

    The vision tower, the unused begin/end-of-audio embedding and, with audio=False, the audio side can never
    get a gradient: they are not loaded at all, and `save_model` copies them from the base checkpoint's files.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = FAMILIES[config.model_type].model_class(config)
    unused = [(model.model, "visual"), (model.model.audio_tower, "audio_bos_eos_token")]
    if not audio:
        unused += [(model.model, "audio_tower"), (model.model, "multi_modal_projector")]
    for parent, part in unused:
        if hasattr(parent, part):
            delattr(parent, part)
    return model


@torch.no_grad()
def read_weights(lm):
    """Copy each weight, or this process's rows of it, from its file: FSDP splits dimension 0 evenly."""
    files = weight_files(lm.folder)
    prefix = "thinker." if any(name.startswith("thinker.") for name in files) else ""
    handles = {}
    for name, parameter in lm.model.named_parameters():
        stored = prefix + hub_name(name, lm.prompts.family)
        if stored not in files:
            raise InputError(
                f"{lm.folder} has no weight named {stored}: incomplete, or of another kind of model"
            )
        if files[stored] not in handles:
            handles[files[stored]] = safe_open(files[stored], "pt")
        rows, target, start = handles[files[stored]].get_slice(stored), parameter, 0
        if rows.get_shape() != list(parameter.shape):
            raise InputError(
                f"{lm.folder}: {stored} is {rows.get_shape()}, config.json says {list(parameter.shape)}"
            )
        if isinstance(parameter, DTensor):
            target, mesh = parameter.to_local(), parameter.device_mesh
            start = mesh.get_local_rank(mesh.ndim - 1) * -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
        if target.numel():
            target.copy_(rows[start : start + target.shape[0]] if target.ndim else rows[:])


@torch.no_grad()
def save_model(lm, out, dtype, file_bytes=4 * 2**30):
    """A checkpoint folder with every weight of the class under its hub name, in `dtype`; renamed into place.

    Weights that were not loaded are copied from the base's files, tokenizer, feature extractor, generation
    config and chat template too. Gathers one weight at a time; rank 0 writes files of at most 4 GiB.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    scratch, base = out.with_name(out.name + ".writing"), weight_files(lm.folder)
    prefix = "thinker." if any(name.startswith("thinker.") for name in base) else ""
    trained = {prefix + hub_name(name, lm.prompts.family): p for name, p in lm.model.named_parameters()}
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    where, batch, size = {}, {}, 0
    names = [name for name in base if name.startswith(prefix)]
    for name in names:
        if name in trained:
            weight = trained[name].detach()
            weight = (weight.full_tensor() if isinstance(weight, DTensor) else weight).to("cpu", dtype)
        if not first:
            continue
        if name not in trained:
            with safe_open(base[name], "pt") as file:
                weight = file.get_tensor(name)
        batch[name.removeprefix(prefix)] = weight.contiguous()
        size += weight.nbytes
        if size >= file_bytes or name == names[-1]:
            file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
            save_file(batch, scratch / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(batch, file))
            batch, size = {}, 0
    if first:
        (scratch / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )
        write_companions(lm, scratch, dtype)
        shutil.rmtree(out, ignore_errors=True)
        scratch.rename(out)
    if dist.is_initialized():
        dist.barrier()


def write_companions(lm, folder, dtype):
    config = read_config(lm.folder)
    config.dtype, config.architectures = dtype, [lm.prompts.family.model_class.__name__]
    config.save_pretrained(folder)
    for file in lm.folder.iterdir():
        skipped = file.name == "config.json" or file.name.endswith(".index.json")
        if file.suffix in (".json", ".txt", ".jinja") and not skipped:
            shutil.copyfile(file, folder / file.name)


# ------------------------------------------------------------------------------------ processes and sharding


def start_processes(minutes=30, replicas=1):
    """Join torchrun's processes, or be the only one. Returns (rank, world size, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if world % replicas:
        raise InputError(f"--replicas {replicas} does not divide the {world} processes")
    device, backend = torch.device("cpu"), "gloo"
    if torch.accelerator.is_available():
        if local >= torch.accelerator.device_count():
            raise InputError(
                f"--nproc_per_node is more than the {torch.accelerator.device_count()} GPUs here"
            )
        torch.accelerator.set_device_index(local)
        device = torch.device(torch.accelerator.current_accelerator().type, local)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    store = None if "RANK" in os.environ else dist.HashStore()
    limit = timedelta(minutes=minutes)  # a hung collective ends the run
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    # The order of additions decides the last bit, and a resumed run must give the same weights.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return rank, world, device


class Stop:
    """Remembers SIGTERM and SIGINT: a step is given up between questions, where all processes agree."""

    signal = 0

    def __call__(self, number, frame):
        self.signal = number


STOP = Stop()


def ignore_signals(worker):
    """DataLoader workers end with their parent, not with the terminal's Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def gather(value):
    """One Python value per process -> the list of all."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shard(lm, mesh, dtype, reshard, cpu_offload=False):
    """Shard with FSDP2, before or after the weights are read. `mesh` is 1-D, or 2-D (replicate, shard).

    reshard=False gathers each group once per optimizer step, at the first prefill, and keeps it through
    rollouts, scoring and backward until `release`. reshard=True frees each layer after use: a layer's memory
    instead of the model's, for a gather per layer and token. Gradients are reduced after each question in
    fp32, so that accumulating costs a shard's memory and not the model's.
    """
    options = {
        "mesh": mesh,
        "reshard_after_forward": reshard,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(torch.accelerator.is_available())
        if cpu_offload
        else OffloadPolicy(),
    }
    for group in groups(lm.model):
        fully_shard(group, **options)
    fully_shard(lm, **options)
    lm.set_reshard_after_backward(reshard)
    lm.lockstep = reshard


def groups(model):
    """The modules that are gathered one at a time: every layer, and the two vocabulary-sized matrices."""
    tower = getattr(model.model, "audio_tower", None)
    text = model.model.language_model
    return [*text.layers, *(tower.layers if tower else []), text.embed_tokens, model.lm_head]


def release(lm):
    """Free the gathered weights: the optimizer has moved the shards, so they are out of date."""
    for module in lm.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def checkpoint_activations(lm):
    """Keep only each layer's input for the backward pass and compute the rest again (before `shard`)."""
    for layer in groups(lm.model)[:-2]:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


# --------------------------------------------------------------------------------------------- checkpoints


def checkpoints(out):
    """The run's complete checkpoints, oldest first."""
    return sorted(f for f in Path(out).glob("checkpoints/step-*") if (f / "run.json").exists())


def save_checkpoint(out, step, tensors, about, keep):
    """Write checkpoints/step-N beside its name, rename it, remove all but the last `keep`. Collective.

    `tensors` (shards or whole) go through torch.distributed.checkpoint, so any number of processes can load
    them; `about` is the JSON beside them.
    """
    folder = Path(out) / "checkpoints" / f"step-{step:06d}"
    scratch = folder.with_name("writing")
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=scratch)
    except CheckpointException as error:
        why = next(iter(error.failures.values()))[0]
        raise InputError(
            f"the checkpoint of step {step} cannot be written ({why}); the last is intact"
        ) from None
    if dist.get_rank() == 0:
        write_text(scratch / "run.json", json.dumps(about, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder, tensors):
    """Fill `tensors` in place with what `save_checkpoint` wrote, under this number of processes."""
    dcp.load(tensors, checkpoint_id=folder)
