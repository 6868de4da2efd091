"""Fine-tune an audio LLM with GRPO (Sections III-B and IV-A). The defaults are the paper's AVQA run.

    torchrun --nproc_per_node 4 train.py
    python train.py --model M --data arc.jsonl --no_audio --out results/arc      (text only, Section IV-E)
    python train.py --plan --world_size 4 --gpu_memory 48                        (what it takes; no weights)

A run is a pure function of its arguments. Which question is number k of step s, and the random numbers that
its responses are drawn with, follow from (seed, s, k): not from the number of processes, and not from what
happened before. So two processes do what one does, and a checkpoint is weights, optimizer state and a step
number.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import weights
from data import Questions, load_questions
from files import InputError, write_text
from grpo import clock, question_loss
from model import load_model
from plan import choose_plan, plan_table, print_plan

log = logging.getLogger("omni_r1")


def option(default, help, **more):
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": help, **more})


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
AUTO = {"choices": ["auto", "on", "off"], "free": True}
FREE = {"free": True}  # may differ when a run is resumed


@dataclass
class Config:
    """One field, one command-line option."""

    model: str = option("Qwen/Qwen2.5-Omni-7B", "checkpoint folder or hub name")
    data: list = option(["data/avqa/train_qa.json"], "question file(s): AVQA, generated, ARC, MMAU or MMAR")
    audio_dir: list = option(["data/vggsound/audio"], "folder of the clips, one for all files or one each")
    shares: list = option([], "share of the steps of each of several files (default: equal)", type=float)
    out: str = option("results/omni-avqa", "folder of the run: log.jsonl, checkpoints, model", **FREE)
    no_audio: bool = option(False, "drop the audio tokens from every prompt (Section IV-E)")
    steps: int = option(1000, "optimizer steps")
    accumulation: int = option(2, "questions per process and step", **FREE)
    group_size: int = option(4, "responses per question, G")
    temperature: float = option(1.2, "sampling temperature of the rollout")
    max_new_tokens: int = option(64, "longest response, in tokens")
    beta: float = option(0.04, "weight of the KL divergence; 0 loads no reference model")
    epsilon: float = option(0.2, "clipping range of the probability ratio")
    strict: bool = option(False, "no reward for a response that contains a wrong choice beside the right one")
    lr: float = option(1e-6, "learning rate at the start; falls linearly to 0")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    seed: int = option(0, "of the order of questions and of sampling")
    dtype: str = option("auto", "compute; auto: bfloat16 where a GPU has it", choices=["auto", *DTYPES])
    reshard: str = option("auto", "free each layer's gathered weights after use", **AUTO)
    checkpointing: str = option("auto", "recompute activations in the backward pass", **AUTO)
    cpu_offload: str = option("auto", "keep shards, gradients and optimizer in host memory", **AUTO)
    replicas: int = option(1, "2-D mesh: so many copies of the shards (several nodes: one per node)", **FREE)
    save_every: int = option(100, "steps between checkpoints (12 bytes a parameter each)", **FREE)
    keep: int = option(2, "checkpoints kept", **FREE)
    workers: int = option(1, "processes per GPU that decode audio ahead of time", **FREE)
    max_bad: float = option(0.1, "share of malformed rows or unreadable clips that stops the run", **FREE)
    max_nonfinite: int = option(0, "steps with a non-finite loss or gradient that are skipped", **FREE)
    timeout: float = option(30.0, "minutes after which a hung collective ends the run", **FREE)
    plan: bool = option(False, "print the memory and disk that the run takes, and stop", **FREE)
    world_size: int = option(0, "--plan: number of GPUs (default: as found)", **FREE)
    gpu_memory: float = option(0, "GiB per GPU (default: as found)", **FREE)


def default_of(f):
    return f.default if f.default is not MISSING else f.default_factory()


def parse(argv=None) -> Config:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    for f in fields(Config):
        default = default_of(f)
        kwargs = {"help": f"{f.metadata['help']} (default: {default})", "default": default}
        if f.type is bool:
            kwargs["action"] = "store_true"
        else:
            kwargs["type"] = f.metadata.get("type", str if f.type is list else f.type)
            kwargs |= {"choices": f.metadata.get("choices"), "nargs": "+" if f.type is list else None}
        parser.add_argument(f"--{f.name}", **kwargs)
    return Config(**vars(parser.parse_args(argv)))


# ------------------------------------------------------------------------------------------ before the run


def check_arguments(config):
    """Raise InputError for values that make no sense, before anything is read."""
    for name in ("steps", "accumulation", "max_new_tokens", "save_every", "keep", "replicas"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least 1")
    if config.group_size < 2:
        raise InputError(f"--group_size {config.group_size}: an advantage needs a group of at least 2")
    if not (config.temperature > 0 and config.lr > 0 and config.beta >= 0 and 0 < config.epsilon < 1):
        raise InputError("--temperature and --lr must be above 0, --beta at least 0, --epsilon in (0, 1)")
    files = len(config.data)
    if len(config.audio_dir) not in (1, files):
        raise InputError(f"--audio_dir: {len(config.audio_dir)} folders for {files} files; give 1 or {files}")
    if config.shares and (len(config.shares) != files or min(config.shares) < 0 or not sum(config.shares)):
        raise InputError(f"--shares: give {files} numbers, one for each file, none negative")


# ------------------------------------------------------------------------------------------------- the run


class Run:
    """Policy, reference, optimizer and data of a run, and the number of steps taken."""

    def __init__(self, config, rank, world, device, files):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = config.dtype if config.dtype != "auto" else "bfloat16" if bfloat16 else "float32"
        self.dtype = DTYPES[name]
        self.hears = not config.no_audio and any(q.audio is not None for file in files for q in file)
        self.load_models()
        self.parameters = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), config.lr, weight_decay=0.0, fused=True)
        for p in self.parameters.values():  # from the start, so that one without a gradient yet is saved too
            self.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.step = self.nonfinite = self.bad_clips = 0
        self.questions = Questions(files, self.policy.prompts, config, rank, world)
        ids = json.dumps([[q.id for q in file] for file in files])
        self.fingerprint = {
            f.name: getattr(config, f.name) for f in fields(config) if "free" not in f.metadata
        }
        self.fingerprint |= {
            "dtype": name,
            "processes x accumulation": world * config.accumulation,
            "questions": f"{sum(map(len, files))}, {hashlib.sha256(ids.encode()).hexdigest()[:12]}",
        }

    def load_models(self):
        """The policy in fp32 shards, and the reference in the compute dtype; nothing whole in any process."""
        config, world = self.config, self.world
        shape = (config.replicas, world // config.replicas)
        model = weights.empty_model(weights.find_model(config.model), self.hears)
        self.plan = plan = choose_plan(model, shape[1], self.dtype, config, self.device)
        if self.rank == 0:
            log.info(plan_table(plan))
        mesh = dist.init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        mesh = mesh if config.replicas > 1 else mesh["shard"]

        def prepare_policy(lm):
            if plan.checkpointing:
                weights.checkpoint_activations(lm)
            if world > 1 or self.dtype != torch.float32 or plan.cpu_offload:
                weights.shard(lm, mesh, self.dtype, plan.reshard, plan.cpu_offload)

        def prepare_reference(lm):
            if world > 1:
                weights.shard(lm, mesh, self.dtype, plan.reshard)

        home = "cpu" if plan.cpu_offload else self.device
        self.policy = load_model(config.model, torch.float32, home, self.hears, prepare_policy)
        self.policy.dtype = self.dtype
        self.reference = None
        if config.beta:
            self.reference = load_model(config.model, self.dtype, self.device, self.hears, prepare_reference)
            self.reference.requires_grad_(False)

    def batches(self):
        """This process's questions from the next step on, decoded ahead of time by worker processes."""
        todo = range(self.step * self.config.accumulation, len(self.questions))
        workers = self.config.workers
        ahead = {"prefetch_factor": 4, "worker_init_fn": weights.ignore_signals} if workers else {}
        return iter(DataLoader(self.questions, None, sampler=todo, num_workers=workers, **ahead))

    def accumulate(self, batches):
        """Gradients of one step's questions: their mean over processes (by FSDP) and micro-batches (here).

        Returns (sums of this process's metrics, what was asked and answered); None for both after a signal.
        """
        totals, transcript = {}, []
        for _ in range(self.config.accumulation):
            started = clock()
            step, k, question, prompt, bad = next(batches)
            waited = clock() - started
            for reason in bad:
                log.warning("step %d: replaced: %s", step, reason)
            signals, undecoded = zip(
                *weights.gather((weights.STOP.signal, [] if prompt else bad)), strict=True
            )
            if any(signals):
                return None, None
            if any(undecoded):
                bad = next(filter(None, undecoded))
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
        """Clip and step; returns the step's row for the log. Not finite: no step is taken."""
        config, started, parts = self.config, clock(), weights.gather(totals)
        row = {name: sum(part[name] for part in parts) / self.world for name in totals}
        bad_clips = self.bad_clips + round(row.pop("bad_clips") * self.world)
        row = {n: v if n.startswith("seconds") else v / config.accumulation for n, v in row.items()}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        rate = config.lr * (config.steps - self.step) / config.steps
        finite = np.isfinite(row["loss"]) and np.isfinite(norm)
        if finite:
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        weights.release(self.policy)
        if not finite:
            self.report_nonfinite(transcript)
        self.step, self.bad_clips = self.step + 1, bad_clips
        if bad_clips > config.max_bad * max(100, self.step * self.world * config.accumulation):
            raise InputError(f"{bad_clips} clips could not be decoded, each named above; see --max_bad")
        row["seconds_update"] += clock() - started
        row |= {"grad_norm": norm, "learning_rate": rate, "peak_memory_mb": peak_memory_mb(self.device)}
        return {"step": self.step, **row, "bad_clips": bad_clips}

    def report_nonfinite(self, transcript):
        """Write down what was asked and answered; give up unless --max_nonfinite allows another such step."""
        self.nonfinite, step = self.nonfinite + 1, self.step + 1
        file = Path(self.config.out) / f"nonfinite-step-{step}-rank-{self.rank}.json"
        write_text(file, json.dumps(transcript, indent=1, ensure_ascii=False))
        asked = ", ".join(row["id"] for rows in weights.gather(transcript) for row in rows)
        wrong = f"step {step}: loss or gradient is not finite for questions {asked}; see {file}"
        log.warning("%s: no step taken", wrong)
        if self.nonfinite > self.config.max_nonfinite:
            self.save()
            raise InputError(f"{wrong}. Step {self.step} is saved; --max_nonfinite N skips N such steps")

    def state(self):
        """What a step changes: tensors, saved from and loaded into in place."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        return tensors

    def save(self):
        about = {"step": self.step, "nonfinite": self.nonfinite, "bad_clips": self.bad_clips}
        about |= {"run": self.fingerprint}
        weights.save_checkpoint(self.config.out, self.step, self.state(), about, self.config.keep)

    def resume(self):
        """Load the last checkpoint under --out, if any. InputError if it is of a run with other arguments."""
        found = weights.checkpoints(self.config.out)
        need = sum(self.plan.disk.values()) * (1 if not found else 0.5)
        free = shutil.disk_usage(self.config.out).free
        if free < need:
            needed = f"{need / 2**30:.1f} GiB for --keep {self.config.keep} checkpoints and the model"
            raise InputError(f"{self.config.out}: {free / 2**30:.1f} GiB free of {needed}")
        if not found:
            return
        about = json.loads((found[-1] / "run.json").read_text())
        then, now = about["run"], json.loads(json.dumps(self.fingerprint))
        changed = [f"{name}: {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            raise InputError(f"{self.config.out} holds a run with other arguments ({'; '.join(changed)})")
        weights.load_checkpoint(found[-1], self.state())
        self.step, self.nonfinite, self.bad_clips = about["step"], about["nonfinite"], about["bad_clips"]


# ---------------------------------------------------------------------------------------------------- main


def peak_memory_mb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Journal:
    """log.jsonl, one row per step, each step once; TensorBoard events beside it where that is installed."""

    def __init__(self, out, step):
        path = Path(out) / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines[:step]))  # later rows will be written again
        self.file = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(out, purge_step=step + 1)

    def write(self, row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name, value, row["step"])


def train(config):
    """The whole run, from where it was left. Returns the exit code."""
    check_arguments(config)
    if config.plan:
        return print_plan(config)
    rank, world, device = weights.start_processes(config.timeout, config.replicas)
    out = Path(config.out)
    if (out / "model").exists():
        if rank == 0:
            print(f"{out}/model exists, so this run is finished; take another --out for a new one")
        return 0
    files = load_questions(config, rank, world, weights.gather)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(config, rank, world, device, files)
    run.resume()
    saved = run.step
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, weights.STOP)
    if rank == 0:
        write_text(out / "config.json", json.dumps(asdict(config), indent=1))
        changed = {f.name: v for f in fields(config) if (v := getattr(config, f.name)) != default_of(f)}
        log.info("settings beside the defaults: %s", changed)
        journal = Journal(out, run.step)
    bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=rank > 0, dynamic_ncols=True)
    batches = run.batches()
    while run.step < config.steps:
        totals, transcript = run.accumulate(batches)
        if totals is None:
            if run.step > saved:
                run.save()
            if rank == 0:
                bar.close()
                print(f"stopped by a signal; step {run.step} is saved, the same command goes on from there")
            return 128 + max(weights.gather(weights.STOP.signal))
        row = run.update(totals, transcript)
        if rank == 0:
            journal.write(row)
            bar.set_postfix(reward=f"{row['reward']:.2f}", kl=f"{row['kl']:.3f}", refresh=False)
        bar.update()
        if run.step % config.save_every == 0 and run.step < config.steps:
            run.save()
            saved = run.step
    bar.close()
    run.policy.save(out / "model")
    if rank == 0:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        print(f"saved {out / 'model'}")
    return 0


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code = train(parse())
    except (InputError, OSError) as error:  # OSError: a full disk, a read-only folder
        if isinstance(error, OSError) or int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except RuntimeError as error:
        if not re.search(r"timed? ?out|connection (closed|reset)", str(error), re.I):
            raise
        print(
            f"error: another process died or hangs: {str(error).splitlines()[0]}", file=sys.stderr, flush=True
        )
        os._exit(3)  # leaving the group in order would wait for it
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
