"""Fine-tune an audio LLM with GRPO (Sections III-B and IV-A). The defaults are the paper's AVQA run.

    torchrun --nproc_per_node 4 train.py
    python train.py --model M --data arc.jsonl --no_audio --out results/arc     (text only, Section IV-E)
    python train.py --plan --world_size 4 --gpu_memory 48                       (what it takes, without weights)

A run is a pure function of its arguments. Which question is asked as number k of step s, and the random numbers its
responses are drawn with, follow from (seed, s, k): not from the number of processes, and not from what happened
before. So two processes do what one does, and a checkpoint is the weights, the optimizer's state and a step number.
"""

import argparse
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import InputError, check_clip, read_questions
from grpo import clock, question_loss
from model import PromptEncoder, load_model
from weights import checkpoint_activations, choose_plan, release, shard

log = logging.getLogger("omni_r1")


def option(default, help, **more):
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": help, **more})


AUTO = {"choices": ["auto", "on", "off"]}


@dataclass
class Config:
    """One field, one option. Those marked `free` may change when a run is resumed."""

    model: str = option("Qwen/Qwen2.5-Omni-7B", "checkpoint folder or hub name")
    data: list = option(
        ["data/avqa/train_qa.json"], "question file(s): AVQA, generated, ARC, MMAU or MMAR format"
    )
    audio_dir: list = option(["data/avqa/audio"], "folder of the clips: one for all files or one for each")
    shares: list = option(
        [], "share of the steps for each of several question files (equal if not given)", type=float
    )
    out: str = option("results/omni-avqa", "folder of the run: log.jsonl, checkpoints, model", free=True)
    no_audio: bool = option(False, "drop the audio tokens from every prompt (Section IV-E)")
    steps: int = option(1000, "optimizer steps")
    accumulation: int = option(2, "questions per process and step", free=True)
    group_size: int = option(4, "responses per question, G")
    temperature: float = option(1.2, "sampling temperature of the rollout")
    max_new_tokens: int = option(64, "longest response in tokens")
    beta: float = option(0.04, "weight of the KL divergence; 0 loads no reference model")
    epsilon: float = option(0.2, "clipping range of the probability ratio")
    strict: bool = option(False, "no reward for a response that contains a wrong choice beside the right one")
    lr: float = option(1e-6, "learning rate at the start; falls linearly to 0")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    seed: int = option(0, "of the order of questions and of sampling")
    dtype: str = option(
        "auto", "compute type: bfloat16 where the accelerator has it", choices=["auto", "bfloat16", "float32"]
    )
    reshard: str = option("auto", "free each layer's gathered weights after use", free=True, **AUTO)
    checkpointing: str = option(
        "auto", "activation checkpointing: recompute layers in the backward", free=True, **AUTO
    )
    cpu_offload: str = option(
        "auto", "keep shards, gradients and optimizer in host memory", free=True, **AUTO
    )
    replicas: int = option(1, "2-D mesh: so many copies of the shards (say, one per node)", free=True)
    save_every: int = option(100, "steps between checkpoints (12 bytes a parameter each)", free=True)
    keep: int = option(2, "checkpoints kept", free=True)
    workers: int = option(1, "DataLoader workers per process, which decode audio", free=True)
    max_bad: float = option(0.1, "share of malformed rows or unreadable clips that stops the run", free=True)
    max_nonfinite: int = option(
        0, "steps with a non-finite loss or gradient that are skipped before giving up", free=True
    )
    timeout: int = option(30, "minutes after which a hung collective ends the run", free=True)
    plan: bool = option(
        False, "print the memory and disk that the run takes, from config.json alone, and stop", free=True
    )
    world_size: int = option(0, "--plan: number of GPUs (default: as found)", free=True)
    gpu_memory: float = option(0, "GiB per GPU to plan for (default: as found)", free=True)


def parse(argv=None) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for f in fields(Config):
        default = f.default if f.default is not MISSING else f.default_factory()
        kwargs = {"help": f"{f.metadata['help']} (default: {default})", "default": default}
        if f.type is bool:
            kwargs["action"] = "store_true"
        else:
            kwargs["type"] = f.metadata.get("type", str if f.type is list else f.type)
            kwargs["choices"] = f.metadata.get("choices")
            kwargs["nargs"] = "+" if f.type is list else None
        parser.add_argument(f"--{f.name}", **kwargs)
    return Config(**vars(parser.parse_args(argv)))


# ------------------------------------------------------------------------------------------- before the run


def check_arguments(config):
    """Raise InputError for values that make no sense, before anything is read."""
    least = {"steps": 1, "accumulation": 1, "group_size": 2, "max_new_tokens": 1, "save_every": 1, "keep": 1}
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least {smallest}")
    if config.temperature <= 0:
        raise InputError(
            f"--temperature {config.temperature}: a group of equal responses teaches nothing; above 0"
        )
    if config.lr <= 0 or config.beta < 0 or not 0 < config.epsilon < 1:
        raise InputError("--lr must be above 0, --beta at least 0 and --epsilon between 0 and 1")
    if len(config.audio_dir) not in (1, len(config.data)):
        raise InputError(
            f"--audio_dir: {len(config.audio_dir)} folders for {len(config.data)} files; give 1, or 1 each"
        )
    if config.shares and (
        len(config.shares) != len(config.data) or min(config.shares) < 0 or not sum(config.shares)
    ):
        raise InputError(f"--shares: give {len(config.data)} numbers, one per file, not negative")


def start_processes(config):
    """Join torchrun's processes, or be the only one. Returns (rank, world size, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world % config.replicas:
        raise InputError(f"--replicas {config.replicas} does not divide the {world} processes")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device, backend = torch.device("cpu"), "gloo"
    if accelerator is not None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.accelerator.device_count():
            raise InputError(f"{torch.accelerator.device_count()} GPUs here: lower --nproc_per_node to that")
        torch.accelerator.set_device_index(local)
        device = torch.device(accelerator.type, local)
        backend = f"cpu:gloo,{accelerator.type}:{dist.get_default_backend_for_device(accelerator.type)}"
    store = None if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=config.timeout)
    )
    # The order of additions decides the last bit, and a resumed run must give the same weights.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return rank, world, device


def gather(value):
    """One Python value per process -> the list of all."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def load_questions(config, rank, world):
    """The question files as lists of questions with a readable clip, by the existence and header of every clip.

    Bad ones are named in the log and left out; more than `max_bad` of a file raises InputError.
    """
    folders = config.audio_dir * len(config.data) if len(config.audio_dir) == 1 else config.audio_dir
    files = []
    for path, folder in zip(config.data, folders, strict=True):
        questions = read_questions(path, folder, config.max_bad)
        if any(q.answer is None for q in questions):
            raise InputError(f"{path} hides its answers: a benchmark's test set, not to be trained on")
        reasons = {}
        if not config.no_audio:
            mine = {q.audio for q in questions[rank::world] if q.audio is not None}
            for part in gather({clip: reason for clip in mine if (reason := check_clip(clip))}):
                reasons |= part
        good = [q for q in questions if q.audio not in reasons]
        for clip in list(reasons)[:20] if rank == 0 else []:
            log.warning("left out: %s: %s", clip, reasons[clip])
        if len(questions) - len(good) > config.max_bad * len(questions) or not good:
            first = next(iter(reasons.items()))
            raise InputError(
                f"{path}: {len(questions) - len(good)} of {len(questions)} questions have no readable clip under "
                f"{folder} (first: {first[0]}: {first[1]}); check --audio_dir, or raise --max_bad {config.max_bad}"
            )
        if rank == 0:
            log.info("%s: %d questions, %d left out", path, len(good), len(questions) - len(good))
        files.append(good)
    return files


class Questions(Dataset):
    """What this process is asked: item i is question k = (i mod A)·W + rank of step i div A + 1, encoded.

    All questions of a step come from one file, drawn by the shares, so that every rank runs the same modules. A clip
    that fails to decode is replaced by the next good question of an order that only (seed, step, k) decide.
    """

    def __init__(self, files, prompts, config, rank, world):
        self.files, self.prompts, self.config, self.rank, self.world = files, prompts, config, rank, world
        shares = np.array(config.shares or [1] * len(files), float)
        rng = np.random.default_rng([config.seed, 1])
        self.file_of_step = rng.choice(len(files), size=config.steps, p=shares / shares.sum())

    def __len__(self):
        return self.config.steps * self.config.accumulation

    def candidates(self, step, k):
        """Question k of the step (the file's permutation for this epoch), then what may stand in for it."""
        chosen = self.file_of_step[step - 1]
        questions, per_step = self.files[chosen], self.config.accumulation * self.world
        asked_before = int((self.file_of_step[: step - 1] == chosen).sum()) * per_step + k
        epoch, place = divmod(asked_before, len(questions))
        yield questions[
            np.random.default_rng([self.config.seed, 2, chosen, epoch]).permutation(len(questions))[place]
        ]
        for index in np.random.default_rng([self.config.seed, 3, step, k]).permutation(len(questions)):
            yield questions[index]

    def __getitem__(self, i):
        """-> (step, k, question, prompt or None, reasons why clips before it were passed over)."""
        step, micro = i // self.config.accumulation + 1, i % self.config.accumulation
        k, bad = micro * self.world + self.rank, []
        for question in self.candidates(step, k):
            try:
                return step, k, question, self.prompts.encode(question, not self.config.no_audio), bad
            except InputError as error:
                bad.append(str(error))
                if len(bad) > 20:
                    break
        return step, k, question, None, bad


# -------------------------------------------------------------------------------------------------- the run


class Run:
    """The state of a run: policy, reference, optimizer, data, and the number of steps taken."""

    def __init__(self, config, rank, world, device, files):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        dtype = config.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type != "cpu" and torch.cuda.is_bf16_supported() else "float32"
        self.dtype = getattr(torch, dtype)
        hears = not config.no_audio and any(q.audio is not None for questions in files for q in questions)
        plan = self.plan(hears)
        shape, names = (config.replicas, world // config.replicas), ("replicate", "shard")
        mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
        mesh = mesh if config.replicas > 1 else mesh["shard"]

        def prepare(lm, trained):
            if trained and plan.checkpointing:
                checkpoint_activations(lm)
            if world > 1 or (trained and (self.dtype != torch.float32 or plan.cpu_offload)):
                shard(lm, mesh, self.dtype, plan.reshard, plan.cpu_offload and trained)

        home = "cpu" if plan.cpu_offload else device
        self.policy = load_model(config.model, torch.float32, home, hears, lambda lm: prepare(lm, True))
        self.policy.dtype = self.dtype
        self.reference = None
        if config.beta:
            self.reference = load_model(
                config.model, self.dtype, device, hears, lambda lm: prepare(lm, False)
            )
            self.reference.requires_grad_(False)
        self.parameters = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.lr, weight_decay=0.0, fused=True
        )
        for p in (
            self.parameters.values()
        ):  # from the start: a parameter that has had no gradient yet is saved too
            self.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.step = self.nonfinite = self.bad_clips = 0
        self.questions = Questions(files, self.policy.prompts, config, rank, world)
        ids = json.dumps([[q.id for q in questions] for questions in files])
        self.fingerprint = {
            f.name: getattr(config, f.name) for f in fields(config) if not f.metadata.get("free")
        }
        self.fingerprint |= {
            "dtype": dtype,
            "questions per step (processes x accumulation)": world * config.accumulation,
            "questions": f"{sum(map(len, files))}, {hashlib.sha256(ids.encode()).hexdigest()[:12]}",
        }

    def loader(self):
        """Questions from the next step on, decoded ahead of time by worker processes."""
        todo = range(self.step * self.config.accumulation, len(self.questions))
        workers = {"prefetch_factor": 4, "worker_init_fn": ignore_signals} if self.config.workers else {}
        return iter(
            DataLoader(self.questions, None, sampler=todo, num_workers=self.config.workers, **workers)
        )

    def accumulate(self, batches):
        """Gradients of one step's questions: mean over processes by FSDP, over micro-batches here.

        Returns (this process's sums of metrics, what was asked and answered), or (None, _) after a signal.
        """
        totals, transcript = {}, []
        for _ in range(self.config.accumulation):
            if any(gather(STOP.signal)):
                return None, transcript
            started = clock()
            step, k, question, prompt, bad = next(batches)
            waited = clock() - started
            for reason in bad:
                log.warning("step %d: replaced: %s", step, reason)
            if prompt is None:
                raise InputError(f"{len(bad)} clips in a row cannot be decoded, the last: {bad[-1]}")
            seed = int(np.random.SeedSequence([self.config.seed, 4, step, k]).generate_state(1)[0])
            generator = torch.Generator(self.device).manual_seed(seed)
            loss, metrics, responses = question_loss(
                self.policy, self.reference, prompt, question, self.config, generator
            )
            transcript.append({"id": question.id, "question": question.question, "responses": responses})
            started = clock()
            (loss / self.config.accumulation).backward()
            metrics |= {"seconds_wait": waited, "seconds_update": clock() - started, "bad_clips": len(bad)}
            totals = {name: totals.get(name, 0.0) + value for name, value in metrics.items()}
        return totals, transcript

    def update(self, totals, transcript):
        """Clip, step, and the step's row for the log. A non-finite loss or gradient leaves the weights alone."""
        config, started = self.config, clock()
        everyone = gather(totals)
        row = {name: sum(t[name] for t in everyone) / self.world for name in totals}
        bad = row.pop("bad_clips") * self.world
        for name in row:
            row[name] /= 1 if name.startswith("seconds") else config.accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        rate = config.lr * (config.steps - self.step) / config.steps
        finite = all(np.isfinite([row["loss"], norm.item()]))
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        release(self.policy)
        self.step += 1
        self.bad_clips += int(bad)
        row["seconds_update"] += clock() - started
        row |= {
            "grad_norm": norm.item(),
            "learning_rate": rate,
            "peak_memory_mb": peak_memory_mb(self.device),
        }
        if not finite:
            self.give_up_or_skip(transcript)
        if self.bad_clips > config.max_bad * max(100, self.step * self.world * config.accumulation):
            raise InputError(f"{self.bad_clips} clips could not be decoded (named in the log); see --max_bad")
        return {"step": self.step, **row, "bad_clips": self.bad_clips}

    def give_up_or_skip(self, transcript):
        self.nonfinite += 1
        file = Path(self.config.out) / f"nonfinite-step-{self.step}-rank-{self.rank}.json"
        write(file, json.dumps(transcript, indent=1, ensure_ascii=False))
        asked = ", ".join(row["id"] for rows in gather(transcript) for row in rows)
        if self.nonfinite > self.config.max_nonfinite:
            raise InputError(
                f"step {self.step}: loss or gradient is not finite; the weights are as after step {self.step - 1}. "
                f"Questions: {asked}; asked and answered: {file}; --max_nonfinite N skips up to N such steps"
            )
        log.warning("step %d skipped: loss or gradient is not finite (questions %s)", self.step, asked)


# ---------------------------------------------------------------------------------------------- checkpoints


def training_state(run):
    """What a step changes, as tensors that are saved from and loaded into in place, under any number of processes."""
    state = {f"weights.{name}": p.detach() for name, p in run.parameters.items()}
    for name, p in run.parameters.items():
        state |= {f"{key}.{name}": value for key, value in run.optimizer.state[p].items()}
    return state


def save_checkpoint(run):
    """Write checkpoints/step-N beside its name and rename it; then remove all but the last `keep`."""
    folder = Path(run.config.out) / "checkpoints" / f"step-{run.step:06d}"
    scratch = folder.with_name("writing")
    if run.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    dcp.save(training_state(run), checkpoint_id=scratch)
    if run.rank == 0:
        about = {
            "step": run.step,
            "nonfinite": run.nonfinite,
            "bad_clips": run.bad_clips,
            "run": run.fingerprint,
        }
        write(scratch / "run.json", json.dumps(about, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        for old in checkpoints(run.config.out)[: -run.config.keep]:
            shutil.rmtree(old)
    dist.barrier()


def checkpoints(out):
    """Complete checkpoints, oldest first."""
    return sorted(f for f in Path(out).glob("checkpoints/step-*") if (f / "run.json").exists())


def resume(run):
    """Load the last checkpoint under `out`, if any. Raises InputError if it is of a run with other arguments."""
    found = checkpoints(run.config.out)
    if not found:
        return
    about = json.loads((found[-1] / "run.json").read_text())
    then, now = about["run"], json.loads(json.dumps(run.fingerprint))
    changed = [f"{key}: {then.get(key)} -> {now.get(key)}" for key in now if then.get(key) != now.get(key)]
    if changed:
        raise InputError(
            f"{run.config.out} holds another run ({'; '.join(changed)}): take another --out, or its options"
        )
    dcp.load(training_state(run), checkpoint_id=found[-1])
    run.step, run.nonfinite, run.bad_clips = about["step"], about["nonfinite"], about["bad_clips"]


def check_disk(run):
    """Refuse to start a run whose checkpoints will not fit."""
    bytes_each = 12 * sum(p.numel() for p in run.parameters.values())
    have = len(checkpoints(run.config.out))
    need = bytes_each * max(0, run.config.keep + 1 - have) + bytes_each // 3
    free = shutil.disk_usage(run.config.out).free
    if free < need:
        raise InputError(
            f"{run.config.out}: {free / 2**30:.1f} GiB free, {need / 2**30:.1f} GiB needed for --keep "
            f"{run.config.keep} checkpoints, one being written and the model"
        )


def write(path, text):
    """Write beside the name, then rename: a reader, or a kill, never meets half a file."""
    scratch = Path(f"{path}.writing")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


# ----------------------------------------------------------------------------------------------------- main


class Stop:
    """Remembers SIGTERM and SIGINT, so that a step is given up at a place where all processes can agree to."""

    signal = 0

    def __call__(self, number, frame):
        self.signal = number


STOP = Stop()


def ignore_signals(worker):
    """DataLoader workers end with their parent, not with the terminal's Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def peak_memory_mb(device):
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated(device) / 2**20


class Log:
    """log.jsonl, one row per step, each step once; TensorBoard events beside it where that is installed."""

    def __init__(self, out, step):
        self.path = Path(out) / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        write(
            self.path, "".join(f"{line}\n" for line in lines[:step])
        )  # rows after the checkpoint are done again
        self.file = self.path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out, purge_step=step + 1)
        except ImportError:
            self.board = None

    def write(self, row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name, value, row["step"])


def train(config):
    """The whole run, resumed where it was left. Returns the exit code."""
    check_arguments(config)
    if config.plan:
        choose_plan(config, config.world_size or 1, None, not config.no_audio, None, verbose=True)
        return 0
    rank, world, device = start_processes(config)
    out = Path(config.out)
    if (out / "model").exists():
        if rank == 0:
            print(f"{out}/model exists: this run is finished. Take another --out for a new one.")
        return 0
    files = load_questions(config, rank, world)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(config, rank, world, device, files)
    check_disk(run)
    resume(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, STOP)
    if rank == 0:
        write(out / "config.json", json.dumps(asdict(config), indent=1))
        journal, saved = Log(config.out, run.step), run.step
        print(json.dumps(asdict(config)), f"-> {out}, from step {run.step}", flush=True)
    bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=rank > 0, dynamic_ncols=True)
    batches = run.loader()
    saved = run.step
    while run.step < config.steps:
        totals, transcript = run.accumulate(batches)
        if totals is None:
            if run.step > saved:
                save_checkpoint(run)
            if rank == 0:
                print(
                    f"\nstopped by a signal after step {run.step}, saved; the same command goes on from there"
                )
            return 128 + max(gather(STOP.signal))
        row = run.update(totals, transcript)
        if rank == 0:
            journal.write(row)
            bar.set_postfix(reward=f"{row['reward']:.2f}", kl=f"{row['kl']:.3f}", refresh=False)
        bar.update()
        if run.step % config.save_every == 0 and run.step < config.steps:
            save_checkpoint(run)
            saved = run.step
    bar.close()
    run.policy.save(out / "model")
    if rank == 0:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        print(f"saved {out}/model")
    return 0


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    rank = int(os.environ.get("RANK", 0))
    try:
        code = train(parse())
    except (InputError, OSError) as error:  # OSError: a full disk, a read-only folder
        if rank == 0 or dist.is_initialized():
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
