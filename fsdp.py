"""Manual FSDP: processes, sharding, gathering and releasing, checkpoints. What is computed is in model.py.

Sharding is PyTorch's FSDP2: one group for each decoder layer and each encoder layer, one for the rest; fp32
master shards that AdamW steps on (a bf16 weight of ordinary size cannot take a step of 1e-6), `dtype` for the
compute. All processes call the same groups in the same order, or their collectives would pair up wrongly.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from files import InputError, one_writer, parse_json, read_text, write_text

PARENT = os.getppid()  # whose death ends this process; 1 where that is a container's only other process


def end_with_parent(parent: int = PARENT) -> None:
    """Ask Linux to kill this process when its parent dies: a torchrun that was killed leaves no writer."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere the lock on --out alone must do
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it died before


def is_orphan() -> bool:
    """Whether torchrun died before PARENT was read: process 1 has adopted this one, and is no Python."""
    if PARENT != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        program = Path("/proc/1/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
    return b"python" not in program


if "RANK" in os.environ:  # torchrun's; before torch, whose import takes seconds
    if is_orphan():
        os._exit(1)
    end_with_parent()

# What torch, its allocators and cuBLAS read when they are loaded.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # DataLoader workers are forked
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
# Pinned blocks are rounded up to powers of two unless they are larger than this: 178 GiB instead of 126 for
# the 7B offloaded from one GPU. It joins what the user has set, under the older name if that is the one.
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF" if "PYTORCH_CUDA_ALLOC_CONF" in os.environ else "PYTORCH_ALLOC_CONF"
if "pinned_max_round_threshold_mb" not in os.environ.get(ALLOCATOR, ""):
    os.environ[ALLOCATOR] = f"{os.environ.get(ALLOCATOR, '')},pinned_max_round_threshold_mb:1".strip(",")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.optim.adamw import adamw
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("omni_r1")

# ------------------------------------------------------------------------------------------------- processes


def start_processes(minutes: float = 30) -> tuple[int, int, torch.device]:
    """Join torchrun's processes, or be the only one. Returns (rank, world size, device)."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    launched = "RANK" in os.environ
    device = torch.device("cpu")
    backend = "gloo"
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type != "mps":  # Apple's has no collectives for FSDP2: there it is the CPU
        if local >= torch.accelerator.device_count():
            count = torch.accelerator.device_count()
            raise InputError(f"--nproc_per_node is more than the {count} GPUs here")
        torch.accelerator.set_device_index(local)
        device = torch.device(found.type, local)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        # torchrun sets OMP_NUM_THREADS=1, but an optimizer in host memory wants this process's share of cores
        on_this_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, os.cpu_count() // on_this_node))
    store = None if launched else dist.HashStore()
    limit = timedelta(minutes=minutes)  # a hung collective ends the run
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    be_deterministic()
    return rank, world, device


def be_deterministic() -> None:
    """The order of additions decides the last bit, and a resumed run must give the same weights.

    Strictly: with warn_only attention's backward stays nondeterministic on CUDA. cuDNN's attention also
    builds a plan for every new shape (half a second each), and nearly every shape here is new.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def loader_options(workers: int) -> dict[str, Any]:
    """What a DataLoader with so many processes takes. Forked on Linux, they share what is loaded."""
    if not workers:
        return {}
    context = None  # the system's own
    if sys.platform == "linux":
        context = "fork"  # from Python 3.14 on it would be a server, whose death is not ours
    return {"num_workers": workers, "multiprocessing_context": context, "worker_init_fn": ignore_signals}


def ignore_signals(worker: int) -> None:
    """DataLoader workers end with their parent, not with the terminal's Ctrl-C or the scheduler's SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(multiprocessing.parent_process().pid)


def end_workers() -> None:
    """At exit: multiprocessing would end the workers by SIGTERM, and wait for ever for who ignores it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the DataLoader raises for each that dies
    for worker in multiprocessing.active_children():
        worker.kill()


atexit.register(end_workers)  # before multiprocessing's own, which was registered earlier


class Stop:
    """Remembers SIGTERM and SIGINT: a run ends between steps, where all processes agree."""

    signal = 0

    def __call__(self, number: int, frame: Any) -> None:
        self.signal = number


def hold(out: Path) -> list:
    """Be the one run that writes to `out`. Collective. Keep what this returns until the process ends.

    Rank 0 has the folder to itself; it also waits until the processes of a run before it, which may outlive
    their rank 0 by a moment, are gone. Raises InputError that names the holder.
    """
    held = []
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        held.append(one_writer(out / ".lock"))
        one_writer(out / ".processes").close()
    dist.barrier()
    held.append(one_writer(out / ".processes", shared=True))
    return held


def gather_objects(value: Any) -> list:
    """One Python value per process -> the list of all."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def average(number: float) -> float:
    numbers = gather_objects(number)
    return sum(numbers) / len(numbers)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Gradients of parameters that are whole in each process -> their mean over the processes, in place."""
    gradients = [p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype's meaning: bfloat16 where the GPU computes in it; emulated, or on a CPU, it is slower."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


# -------------------------------------------------------------------------------------------------- sharding


def groups(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: every layer, and the two vocabulary-sized matrices."""
    text = model.model.language_model
    modules = list(text.layers)
    tower = getattr(model.model, "audio_tower", None)
    if tower is not None:
        modules += list(tower.layers)
    if model.lm_head.weight is not text.embed_tokens.weight:  # tied ones belong to the rest, together
        modules += [text.embed_tokens, model.lm_head]
    return modules


def shard(
    lm: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    reshard: bool,
    gathered_rollout: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shard an AudioLM in place, before its weights are read. `mesh` is 1-D, or 2-D (replicate, shard).

    reshard=False gathers each group once a step, at the first prefill, and keeps it through rollout, scoring
    and backward until `release`. reshard=True frees each group after use: a layer's memory instead of the
    model's, for a gather a pass; with `gathered_rollout` not while responses are drawn, when there are no
    gradients yet and the weights fit: there it would be a gather for every token. Gradients are reduced in
    fp32 after each pass.
    """
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for group in groups(lm.model):
        fully_shard(group, reshard_after_forward=reshard, **options)
    fully_shard(lm, reshard_after_forward=reshard, **options)
    lm.set_reshard_after_backward(reshard)
    lm.lockstep = reshard and not gathered_rollout
    if reshard and gathered_rollout:
        lm.gathered = functools.partial(gathered, lm)


@contextlib.contextmanager
def gathered(lm: nn.Module) -> Iterator[None]:
    """Within, the weights are gathered once and stay; afterwards they are shards again."""
    lm.set_reshard_after_forward(False)
    try:
        yield
    finally:
        lm.set_reshard_after_forward(True)
        lm.reset_iter_state()


def release(lm: nn.Module) -> None:
    """Free the gathered weights: the optimizer has moved the shards, so they are out of date."""
    if hasattr(lm, "reset_iter_state"):
        lm.reset_iter_state()


def checkpoint_activations(lm: nn.Module) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again (before `shard`)."""
    text = lm.model.model.language_model
    tower = getattr(lm.model.model, "audio_tower", None)
    layers = list(text.layers)
    if tower is not None:
        layers += list(tower.layers)
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


class HostMomentsAdamW(torch.optim.AdamW):
    """AdamW whose two moments lie in host memory and visit the device one parameter at a time."""

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            weight = local(p)
            hosts = [local(state["exp_avg"]), local(state["exp_avg_sq"])]
            moments = [host.to(weight.device, non_blocking=True) for host in hosts]
            adamw(
                [weight], [local(p.grad)], [moments[0]], [moments[1]], [], [state["step"]], fused=True,
                amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False,
            )  # fmt: skip
            for host, moment in zip(hosts, moments, strict=True):
                host.copy_(moment)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a whole one as it is."""
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


# ----------------------------------------------------------------------------------------------- checkpoints


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first; a kill leaves half of one under another name."""
    return sorted((out / "checkpoints").glob("step-*/"))


def save_checkpoint(
    out: Path,
    step: int,
    tensors: dict[str, Tensor],
    about: dict,
    *,
    keep: int,
    files: list[Path],
) -> None:
    """Write checkpoints/step-N beside its name, rename it, keep the last `keep` up to it. Collective.

    `tensors` (shards or whole) go through torch.distributed.checkpoint, so any number of processes can load
    them; `about` goes into run.json, with the hash of every file; `files` (log and samples) are copied along.
    """
    folder = out / "checkpoints" / f"step-{step:06d}"
    scratch = folder.with_name("writing")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for file in files:
            if file.exists():
                shutil.copyfile(file, scratch / file.name)
    dist.barrier()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(tensors, checkpoint_id=scratch)
    except CheckpointException as error:
        why = next(iter(error.failures.values()))[0]
        raise InputError(
            f"the checkpoint of step {step} cannot be written ({why}); the last is intact"
        ) from None
    hashes = hash_files(scratch)
    if first:
        about = {**about, "files": hashes}
        write_text(scratch / "run.json", json.dumps({**about, "sha256": hash_of(about)}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        for path in (folder / "run.json", folder, folder.parent):
            sync(path)
        everything = checkpoints(out)
        count = everything.index(folder) + 1  # those behind are damaged: the run went on from before them
        for old in everything[: max(0, count - keep)] + everything[count:]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place with what `save_checkpoint` wrote, under this number of processes."""
    try:
        dcp.load(tensors, checkpoint_id=folder)
    except CheckpointException as error:
        why = next(iter(error.failures.values()))[0]
        raise InputError(f"{folder} cannot be loaded: {why}") from None


def newest_intact(out: Path) -> Path | None:
    """The newest checkpoint whose files are what was written, those that are not named. Collective."""
    for folder in reversed(checkpoints(out)):
        wrong = damage(folder)
        if not wrong:
            return folder
        if dist.get_rank() == 0:
            log.warning("%s is damaged (%s): going on from the one before, if any", folder, wrong)
    if checkpoints(out) and dist.get_rank() == 0:
        log.warning("%s: no checkpoint is whole: starting over from step 0", out)
    return None


def damage(folder: Path) -> str:
    """What in a checkpoint differs from what was written, or nothing. Collective."""
    hashes = hash_files(folder)
    try:
        about = parse_json(read_text(folder / "run.json"))
        sealed = about.pop("sha256")
        written = about["files"]
        if sealed != hash_of(about):
            return "run.json"
        wrong = [name for name in written if hashes.get(name) != written[name]]
    except (InputError, ValueError, KeyError, TypeError, AttributeError):
        return "run.json"
    return ", ".join(wrong)


def hash_files(folder: Path) -> dict[str, str]:
    """name -> SHA-256 of the folder's files but run.json, each on the disk; shared over the processes."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "run.json")
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        sync(folder / name)
        with open(folder / name, "rb") as file:
            mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
    hashes = {}
    for part in gather_objects(mine):
        hashes.update(part)
    return hashes


def hash_of(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until the disk has the file, or the folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
