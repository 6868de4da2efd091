"""Manual FSDP: processes, sharding, gathering and releasing, checkpoints. What is computed is in model.py.

Sharding is PyTorch's FSDP2: one group for each decoder layer and each encoder layer, one for the rest; fp32
master shards that AdamW steps on (a bf16 weight of ordinary size cannot take a step of 1e-6), `dtype` for the
compute. All processes call the same groups in the same order, or their collectives would pair up wrongly.
"""

import ctypes
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from files import (
    InputError,
    LocalError,
    first_line,
    parse_json,
    read_text,
    run_program,
    write_text,
)

if "RANK" in os.environ:  # torchrun's: Linux kills this process when torchrun dies, which leaves no writer
    with suppress(OSError, AttributeError):  # elsewhere the lock on --out alone must do
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG

# What torch, its allocators and cuBLAS read when they are loaded.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
    # Nearly every shape is new, and pinned blocks are rounded up to powers of two unless they are larger than
    # the threshold: 178 GiB instead of 126 for the 7B offloaded from one GPU.
    allocator = "expandable_segments:True,pinned_max_round_threshold_mb:1"
    os.environ.setdefault("PYTORCH_ALLOC_CONF", allocator)

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("omni_r1")

# ------------------------------------------------------------------------------------------------- processes


def start_processes(minutes: float = 30) -> tuple[int, int, torch.device]:
    """Join torchrun's processes, or be the only one: (rank, world size, device). Raises LocalError."""
    device = torch.device("cpu")
    backend = "gloo"
    alone = {}
    if "RANK" not in os.environ:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
            # torchrun sets OMP_NUM_THREADS=1, but an optimizer in host memory wants its share of the cores
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        else:
            check_driver()
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes), **alone)  # a hung collective's
    except (ValueError, RuntimeError) as error:
        wanted = "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, one process a GPU"
        raise LocalError(f"torchrun sets {wanted}; here: {first_line(error)}") from None
    be_deterministic()
    if dist.get_rank() > 0:
        log.setLevel(logging.WARNING)  # one process tells what all do
    return dist.get_rank(), dist.get_world_size(), device


def check_driver(root: Path = Path("/")) -> None:
    """InputError where a GPU is that torch cannot use: a 7B would be trained on the CPU without a word."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not (root / "dev/nvidia0").exists():
        return
    driver = "not known"
    with suppress(OSError):
        driver = (root / "proc/driver/nvidia/version").read_text().partition("\n")[0]
    raise InputError(
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use the GPU here; driver: {driver}. "
        "Install a newer driver, or torch's build for an older one (README); CUDA_VISIBLE_DEVICES= is the CPU"
    )


def make_mesh(device: torch.device, replicas: int) -> DeviceMesh:
    """All processes: (replicas, the rest), or 1-D where the shards have no copies."""
    shape = (replicas, dist.get_world_size() // replicas)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # torch gives them limits of its own
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=30), group)
    return mesh["shard"] if replicas == 1 else mesh


def be_deterministic() -> None:
    """The order of additions decides the last bit, and a resumed run must give the same weights.

    Strictly: with warn_only attention's backward stays nondeterministic on CUDA. cuDNN's attention also
    builds a plan for every new shape (half a second each), and nearly every shape here is new.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.enable_cudnn_sdp(False)


class Stop:
    """Remembers SIGTERM and SIGINT: a run ends between steps, where all processes agree.

    Where another process has died, this one sits in a collective for ever, and Python does not come to run
    its handler. The C part of it wakes a thread, which ends the process after `patience` seconds.
    """

    signal = 0

    def __init__(self, patience: float = 180.0):
        self.patience = patience
        self.closed = threading.Event()
        self.woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        os.read(self.woken, 1)
        if not self.closed.wait(self.patience):
            os._exit(1)

    def close(self) -> None:
        """All is well: no deadline."""
        self.closed.set()
        signal.set_wakeup_fd(-1)

    def __call__(self, number: int, frame: Any) -> None:
        self.signal = number


def run(program: Callable) -> None:
    """`run_program` for one of several processes."""
    code = run_program(program)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def clock() -> float:
    """Seconds, once the device has done what it was asked: kernels run behind Python's back."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@contextmanager
def timed(totals: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds that what stands within takes."""
    started = clock()
    yield
    totals[name] = totals.get(name, 0.0) + clock() - started


def share_out(work: Callable, items: list) -> ChainMap:
    """work(items) -> a dict, each process working on its part of them. Collective."""
    mine = items[dist.get_rank() :: dist.get_world_size()]
    return ChainMap(*gather_objects(work(mine)))


def gather_objects(value: Any) -> list:
    """One Python value per process -> the list of all."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Gradients of parameters that are whole in each process -> their mean over the processes, in place."""
    gradients = [p.grad for p in parameters]
    flat = parameters_to_vector(gradients) / dist.get_world_size()
    dist.all_reduce(flat)
    vector_to_parameters(flat, gradients)


DTYPES = ["auto", "bfloat16", "float32"]  # --dtype


def compute_dtype(name: str, device: torch.device) -> str:
    """--dtype's meaning: bfloat16 where the GPU computes in it; emulated, or on a CPU, it is slower."""
    if name != "auto":
        return name
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


# -------------------------------------------------------------------------------------------------- sharding


def layers(model: nn.Module) -> list[nn.Module]:
    """Of the decoder and of the audio tower, if any."""
    found = list(model.model.language_model.layers)
    tower = getattr(model.model, "audio_tower", None)
    if tower is not None:  # a run without audio has put it away
        found += tower.layers
    return found


def groups(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: every layer, and the two vocabulary-sized matrices."""
    embedding = model.model.language_model.embed_tokens
    if model.lm_head.weight is embedding.weight:  # tied ones belong to the rest, together
        return layers(model)
    return [*layers(model), embedding, model.lm_head]


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
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": precision, "reshard_after_forward": reshard}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for group in [*groups(lm.model), lm]:
        fully_shard(group, **options)
    lm.set_reshard_after_backward(reshard)
    lm.lockstep = reshard and not gathered_rollout
    if reshard and gathered_rollout:
        lm.gathered = partial(gathered, lm)


@contextmanager
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
    for layer in layers(lm.model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def make_optimizer(parameters: list[nn.Parameter], lr: float, host: bool = False) -> torch.optim.AdamW:
    """AdamW without weight decay, its state there from the start, so that all of it is saved.

    `host`: the moments lie in host memory, pinned where there is a GPU.
    """
    kind = HostMomentsAdamW if host else torch.optim.AdamW
    optimizer = kind(parameters, lr, weight_decay=0.0, fused=True)
    for p in parameters:
        state = optimizer.state[p]
        state["step"] = torch.zeros((), device=p.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(p)
            if host:
                state[name] = state[name].cpu()
            if host and p.is_cuda:
                state[name]._local_tensor = state[name]._local_tensor.pin_memory()
    return optimizer


MOMENTS = ("exp_avg", "exp_avg_sq")


class HostMomentsAdamW(torch.optim.AdamW):
    """AdamW whose moments lie in host memory and visit the device, two parameters' at a time.

    On a GPU two streams take turns, each with all that is done to a parameter: while one computes, or copies
    back, the other fetches. A block that is dropped is free for the next on the stream that has used it.
    """

    streams = (None, None)  # on a CPU

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        parameters = group["params"]
        on_gpu = parameters[0].is_cuda
        if on_gpu:
            torch.cuda.synchronize()  # the gradients are there
        if on_gpu and self.streams[0] is None:
            self.streams = (torch.cuda.Stream(), torch.cuda.Stream())
        for i, p in enumerate(parameters):
            state = self.state[p]
            with torch.cuda.stream(self.streams[i % 2]):
                hosts = {name: state[name] for name in MOMENTS}
                for name in MOMENTS:
                    state[name] = hosts[name].to(p.device, non_blocking=True)
                group["params"] = [p]
                super().step()
                for name in MOMENTS:
                    state[name] = hosts[name].copy_(state[name], non_blocking=True)
        group["params"] = parameters
        if on_gpu:
            torch.cuda.synchronize()  # a checkpoint reads them from the host


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], most: float) -> float:
    """Scale the gradients in place to a norm of at most `most`; returns the norm that they had.

    torch's clip_grad_norm_ on this process's shards: the dispatch of hundreds of DTensors would cost more.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    mesh = getattr(parameters[0], "device_mesh", None)
    if mesh is not None and mesh.size(mesh.ndim - 1) > 1:
        squared = norm**2
        dist.all_reduce(squared, group=mesh.get_group(mesh.ndim - 1))
        norm = squared.sqrt()
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


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
) -> None:
    """Write checkpoints/step-N beside its name, rename it, keep the last `keep` up to it. Collective.

    `tensors` (shards or whole) go through torch.distributed.checkpoint, so any number of processes can load
    them; `about` goes into run.json, with the size of every file; the log and the samples are copied along.
    """
    folder = out / "checkpoints" / f"step-{step:06d}"
    scratch = folder.with_name("writing")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for file in out.glob("*.jsonl"):
            shutil.copy(file, scratch)
    dist.barrier()
    hook = threading.excepthook
    threading.excepthook = lambda told: None  # a writer's failure comes back as the exception
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(scratch, thread_count=4))
    except CheckpointException as error:
        why = next(iter(error.failures.values()))[0]
        before = "the one before is intact" if checkpoints(out) else "there is none before it"
        raise InputError(f"the checkpoint of step {step} cannot be written ({why}); {before}") from None
    finally:
        threading.excepthook = hook
    if first:
        write_text(scratch / "run.json", json.dumps({**about, "files": sizes(scratch)}, indent=1))
        for path in (scratch / "run.json", scratch):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        sync(folder.parent)
        everything = checkpoints(out)
        count = everything.index(folder) + 1  # those behind are damaged: the run went on from before them
        for old in everything[: max(0, count - keep)] + everything[count:]:
            shutil.rmtree(old)
    dist.barrier()


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint whose files have the sizes that were written; the damaged ones are named.

    To load it, torch unpickles its `.metadata`, which can run code: a checkpoint must be one's own.
    """
    for folder in reversed(checkpoints(out)):
        with suppress(InputError, ValueError, KeyError, TypeError):
            written = parse_json(read_text(folder / "run.json"))["files"]
            if written.items() <= sizes(folder).items():
                return folder
        log.info("%s is damaged: the one before is taken, if any", folder)
    return None


def sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes."""
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def sync(path: Path) -> None:
    """Wait until the disk has the file, or the folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
