"""Fine-tune an audio LLM with GRPO (Sections III-B and IV-A). The defaults are the paper's AVQA run.

    torchrun --nproc_per_node 4 train.py
    python train.py --model M --data arc.jsonl --no_audio --out results/arc      (text only, Section IV-E)
    python train.py --plan --world_size 4 --gpu_memory 48                        (what it takes; no weights)
    python train.py --explain --model M --data F --audio_dir D                   (one question, step by step)

A run is a pure function of its arguments. Which question is number k of step s, and the random numbers that
its responses are drawn with, follow from (seed, s, k): not from the number of processes, and not from what
happened before. So two processes do what one does, and a checkpoint is weights, optimizer state and a step
number.
"""

import fsdp  # isort: skip  (before torch: it sets what torch reads when it is imported)

import argparse
import importlib.util
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader
from tqdm import tqdm

import grpo
import lora
from data import (
    PROMPTS,
    Asked,
    Loaded,
    Question,
    Questions,
    check_clips,
    load_questions,
    prompt_text,
    questions_hash,
)
from files import InputError, parse_json, read_text, refuse_changes, sha256, write_text
from journal import Journal
from model import empty_lm, load_weights
from plan import choose_plan, plan_line, print_plan, set_batch
from reward import RewardError, final_answer, find_reward, string_match, wilson
from weights import checkpoint_hash, find_model

log = logging.getLogger("omni_r1")

# Options that may differ when a run is resumed: they change where and how it runs, not what it computes.
FREE = "out accumulation questions_per_pass reshard checkpointing cpu_offload replicas workers timeout"
FREE += " save_every keep save_model_every model_only samples wandb max_bad plan explain world_size"
FREE += " gpu_memory gpu save_merged"
AT_LEAST_ONE = "steps batch max_new_tokens save_every keep replicas updates eval_every"
AT_LEAST_ZERO = "accumulation questions_per_pass hold_out save_model_every samples workers seed lora"
AT_LEAST_ZERO += " world_size"
MOST = {
    "steps": 10**7,
    "batch": 10**6,
    "group_size": 4096,
    "max_new_tokens": 10**5,
    "updates": 1000,
    "workers": 256,
    "timeout": 10**5,
    "lora": lora.MOST_RANK,
    "world_size": 10**6,
    "seed": 2**63,
}
AUTO = ["auto", "on", "off"]


# -------------------------------------------------------------------------------------------------- options


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every option's default."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add_data_options(parser.add_argument_group("what is learned from"))
    add_recipe_options(parser.add_argument_group("the recipe"))
    add_machine_options(parser.add_argument_group("where it runs"))
    add_output_options(parser.add_argument_group("what is written"))
    return parser.parse_args(argv)


def add_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", default="Qwen/Qwen2.5-Omni-7B", help="checkpoint folder or hub name")
    add(
        "--data",
        nargs="+",
        default=["data/avqa/train_qa.json"],
        help="question file(s), in any format that data.py reads; the questions of a step come from one",
    )
    add(
        "--audio_dir",
        nargs="+",
        default=["data/avqa/audio"],
        help="folder of the clips, one for all question files or one each",
    )
    add(
        "--shares",
        nargs="+",
        type=float,
        default=[],
        help="of several question files, each one's share of the steps (none given: equal shares)",
    )
    add("--no_audio", action="store_true", help="drop the audio tokens from every prompt (Section IV-E)")
    add("--prompt", choices=list(PROMPTS), default="direct", help="how the answer is asked for")
    add(
        "--hold_out",
        type=int,
        default=0,
        help="so many questions are kept from training, chosen by their id, and scored meanwhile",
    )
    add("--eval_data", default="", help="a question file that is scored meanwhile instead, 200 of it at most")
    add("--eval_audio_dir", default=None, help="folder of its clips (None: beside the file)")
    add("--eval_every", type=int, default=300, help="steps between held-out scores")
    add("--max_bad", type=float, default=0.1, help="share of bad rows or clips that stops the run")


def add_recipe_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--batch", type=int, default=8, help="questions of a step, over all processes")
    add(
        "--accumulation",
        type=int,
        default=0,
        help="instead of --batch: questions of a step for each process (the paper: 2 on each of 4 GPUs)",
    )
    add("--group_size", type=int, default=4, help="responses per question, G")
    add("--temperature", type=float, default=1.2, help="sampling temperature of the rollout")
    add("--max_new_tokens", type=int, default=64, help="longest response, in tokens")
    add(
        "--reward",
        default="exact",
        help="exact: the right choice and no wrong one; contains: Eq. 2 to the letter, which pays for "
        "listing all choices; or FILE.py:function, called with (response, answer, choices)",
    )
    add("--format_weight", type=float, default=0.0, help="reward for a reply in the form that --prompt asks")
    add("--beta", type=float, default=0.04, help="weight of the KL divergence; 0: no reference model")
    add("--epsilon", type=float, default=0.2, help="clipping range of the probability ratio")
    add("--epsilon_high", type=float, default=None, help="its upper side, if another (DAPO: 0.28)")
    add(
        "--loss",
        choices=["sequence", "token", "dr"],
        default="sequence",
        help="what weighs the same: sequence, each response (GRPO); token, each token (DAPO); dr, each token "
        "over the longest allowed (Dr. GRPO)",
    )
    add("--scale_rewards", choices=["on", "off"], default="on", help="divide by the group's deviation")
    add("--mask_truncated", action="store_true", help="responses that were cut do not count in the loss")
    add("--updates", type=int, default=1, help="optimizer steps on each rollout")
    add("--lr", type=float, default=1e-6, help="learning rate at the start; falls linearly to 0")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=int, default=0, help="of the order of questions and of sampling")
    add("--lora", type=int, default=0, help="train low-rank pairs of this rank, nothing else; 0: all")
    add("--lora_alpha", type=float, default=32.0, help="the pairs are scaled by this over --lora")


def add_machine_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="of the computation; weights that learn are float32. auto: bfloat16 on GPUs that have it",
    )
    add(
        "--questions_per_pass",
        type=int,
        default=0,
        help="of a process's questions of a step, how many go through the model at once (0: as many as fit)",
    )
    add("--reshard", choices=AUTO, default="auto", help="free each layer's gathered weights after use")
    add("--checkpointing", choices=AUTO, default="auto", help="recompute activations in the backward pass")
    add(
        "--cpu_offload",
        choices=["auto", "off", "moments", "on"],
        default="auto",
        help="what lies in host memory: nothing, AdamW's moments, or (on) all shards and gradients as well",
    )
    add("--replicas", type=int, default=1, help="copies of the shards: one a node, say")
    add("--workers", type=int, default=1, help="processes per GPU that decode audio ahead of time")
    add("--timeout", type=float, default=30.0, help="minutes after which a hung collective ends the run")
    add("--plan", action="store_true", help="print the memory, time and disk that the run takes, and stop")
    add("--world_size", type=int, default=0, help="--plan: number of GPUs (0: as found)")
    add("--gpu_memory", type=float, default=0, help="GiB per GPU (0: as found)")
    add("--gpu", default="", help="--plan: the card's name, for its speed (as found)")


def add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", default="results/omni-avqa", help="the run's folder: log, samples, checkpoints, model")
    add("--save_every", type=int, default=100, help="steps between checkpoints (12 bytes a parameter)")
    add("--keep", type=int, default=2, help="checkpoints kept")
    add("--save_model_every", type=int, default=0, help="steps between model folders (0: the last alone)")
    add(
        "--model_only",
        choices=["thinker"],
        default=None,
        help="save Qwen2.5-Omni's thinker alone; else its other parts are copied from the base",
    )
    add("--save_merged", choices=["on", "off"], default="on", help="with --lora: O/model beside O/adapter")
    add("--samples", type=int, default=1, help="questions a step whose responses are written down")
    add("--wandb", default="", help="project for Weights & Biases, where that is installed")
    add("--explain", action="store_true", help="print one question's step with all its numbers, and stop")


def check_arguments(config: argparse.Namespace) -> None:
    """Raise InputError for values that make no sense, before anything is read."""
    for name in AT_LEAST_ONE.split():
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least 1")
    for name in AT_LEAST_ZERO.split():
        if getattr(config, name) < 0:
            raise InputError(f"--{name} {getattr(config, name)}: must be at least 0")
    for name in ("temperature", "lr", "max_grad_norm", "timeout", "lora_alpha"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"--{name} {getattr(config, name)}: must be a number above 0")
    for name in ("beta", "format_weight", "max_bad", "gpu_memory"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"--{name} {getattr(config, name)}: must be a number of at least 0")
    for name, most in MOST.items():
        if getattr(config, name) > most:
            raise InputError(f"--{name} {getattr(config, name)}: at most {most:,}")
    if config.format_weight and config.prompt == "direct":
        raise InputError("--format_weight: --prompt direct asks for no form; give --prompt answer or think")
    if config.group_size < 2:
        raise InputError(f"--group_size {config.group_size}: an advantage needs a group of at least 2")
    if not 0 < config.epsilon < 1:
        raise InputError(f"--epsilon {config.epsilon}: must lie between 0 and 1")
    if config.epsilon_high is not None and not 0 < config.epsilon_high < 100:
        raise InputError(f"--epsilon_high {config.epsilon_high}: must lie between 0 and 100")
    files = len(config.data)
    if len(config.audio_dir) not in (1, files):
        raise InputError(f"--audio_dir: {len(config.audio_dir)} folders for {files} files; give 1 or {files}")
    shares = config.shares or [1.0] * files
    if len(shares) != files or not 0 < sum(shares) < math.inf or min(shares) < 0:
        raise InputError(f"--shares: give {files} numbers, one for each file, none negative")
    if config.hold_out and config.eval_data:
        raise InputError("--hold_out and --eval_data: give one of them")
    if config.lora and config.cpu_offload in ("moments", "on"):
        raise InputError(f"--cpu_offload {config.cpu_offload}: with --lora there is nothing worth offloading")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb: wandb is not installed (pip install wandb)")


# ------------------------------------------------------------------------------------------------- the run


class Run:
    """Policy, reference, optimizer and data of a run, and the number of steps taken."""

    def __init__(
        self, config: argparse.Namespace, *, rank: int, world: int, device: torch.device, loaded: Loaded
    ):
        self.config = config
        self.rank = rank
        self.world = world
        self.device = device
        self.dtype = fsdp.compute_dtype(config.dtype, device)
        self.reward = find_reward(config.reward)
        self.held_out = loaded.held_out
        self.hears = not config.no_audio and loaded.longest_clip > 0
        self.load_models(loaded.longest_clip)
        self.make_optimizer()
        self.step = 0
        self.bad_clips = 0
        self.questions = Questions(loaded.files, self.policy.prompts.encode, config, rank=rank, world=world)
        self.fingerprint = settings(config, loaded)
        self.fingerprint["dtype"] = str(self.dtype).removeprefix("torch.")
        self.fingerprint["weights"] = checkpoint_hash(find_model(config.model))

    def load_models(self, longest_clip: float) -> None:
        """The policy in fp32 shards, and the reference in the compute dtype; nothing whole in any process."""
        config = self.config
        shape = (config.replicas, self.world // config.replicas)
        self.policy = empty_lm(config.model, torch.float32, self.hears, config.prompt)
        longest = min(longest_clip, self.policy.prompts.seconds)  # what is longer is cut
        self.plan = choose_plan(self.policy.model, shape[1], self.dtype, config, self.device, longest)
        self.layout = self.plan.layout
        if self.rank == 0:
            log.info(plan_line(self.plan))
        mesh = dist.init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        if config.replicas == 1:
            mesh = mesh["shard"]
        layout = {"reshard": self.layout.reshard, "gathered_rollout": self.layout.gathered_rollout}
        offload = self.layout.offload == "all"
        home = self.device
        if offload:
            home = torch.device("cpu")

        if config.lora:
            self.load_frozen(mesh, layout)
            return
        if self.layout.checkpointing:
            fsdp.checkpoint_activations(self.policy)
        if self.world > 1 or self.dtype != torch.float32 or offload:
            fsdp.shard(self.policy, mesh, self.dtype, **layout, cpu_offload=offload)
        load_weights(self.policy, home, compute=self.device)
        self.policy.dtype = self.dtype
        self.policy.average = fsdp.average

        self.reference = None
        if config.beta:
            self.reference = empty_lm(config.model, self.dtype, self.hears, config.prompt)
            on_host = self.layout.reference_on_host
            if self.world > 1 or on_host:  # no backward comes: each layer goes once it was used
                fsdp.shard(self.reference, mesh, self.dtype, reshard=True, cpu_offload=on_host)
            load_weights(self.reference, home if on_host else self.device, compute=self.device)
            self.reference.requires_grad_(False)

    def load_frozen(self, mesh: DeviceMesh, layout: dict) -> None:
        """--lora: one model in the compute dtype, frozen, and its pairs. Without them it is the reference."""
        config = self.config
        self.policy = empty_lm(config.model, self.dtype, self.hears, config.prompt)
        if self.layout.checkpointing:
            fsdp.checkpoint_activations(self.policy)
        if self.world > 1 and self.layout.reshard:
            fsdp.shard(self.policy, mesh, self.dtype, **layout)
        load_weights(self.policy, self.device, compute=self.device)
        self.policy.average = fsdp.average
        self.pairs = lora.attach(self.policy, config.lora, config.lora_alpha, seed=config.seed)
        self.reference = self.pairs if config.beta else None

    def make_optimizer(self) -> None:
        """AdamW on the parameters that learn, its state there from the start, so that all of it is saved."""
        self.parameters = {}
        for name, p in self.policy.named_parameters():
            if p.requires_grad:
                self.parameters[name] = p
        kind = torch.optim.AdamW
        if self.layout.offload == "moments":
            kind = fsdp.HostMomentsAdamW
        learning = list(self.parameters.values())
        self.optimizer = kind(learning, self.config.lr, weight_decay=0.0, fused=True)
        for p in learning:
            state = self.optimizer.state[p]
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p)
                if kind is fsdp.HostMomentsAdamW:
                    state[name] = state[name].cpu()

    def batches(self) -> Iterator[list[Asked]]:
        """This process's questions of each step from the next on, decoded ahead by other processes."""
        each = self.config.batch // self.world
        todo = range(self.step * each, len(self.questions))
        options = fsdp.loader_options(self.config.workers)
        if options:
            options["prefetch_factor"] = 4
        return iter(DataLoader(self.questions, each, sampler=todo, collate_fn=list, **options))

    def take_step(self, asked: list[Asked]) -> tuple[dict, list[dict]]:
        """One step of grpo.py on this process's questions. Returns its row for the log, and its samples."""
        self.grad_norm = 0.0
        rate = self.learning_rate()
        size = self.layout.questions_per_pass
        passes = [asked[i : i + size] for i in range(0, len(asked), size)]
        totals, rollouts = grpo.step(
            self.policy, self.reference, passes, self.config, self.reward, self.update
        )
        self.step += 1
        row = {"step": self.step}
        parts = fsdp.gather_objects(totals)
        for name in totals:
            row[name] = sum(part[name] for part in parts) / self.config.batch
            if name.startswith("seconds"):  # of a process, not of a question
                row[name] *= self.config.batch / self.world
        row["entropy"] /= row.pop("taught")  # the share of the questions whose responses were scored
        row["grad_norm"] = self.grad_norm
        row["learning_rate"] = rate
        row["peak_memory_mb"] = peak_memory_mb(self.device)
        if not math.isfinite(row["loss"]) or not math.isfinite(self.grad_norm):
            self.report_nonfinite(rollouts)
        return row, self.shown(rollouts)

    def update(self) -> None:
        """Clip the gradients and step; not at all if they are not finite, which `take_step` reports."""
        if self.config.lora:
            fsdp.average_gradients(list(self.parameters.values()))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        if math.isfinite(self.grad_norm):
            self.grad_norm = norm.item()
        if math.isfinite(self.grad_norm):
            self.optimizer.param_groups[0]["lr"] = self.learning_rate()
            self.optimizer.step()
        self.optimizer.zero_grad()
        fsdp.release(self.policy)

    def learning_rate(self) -> float:
        """Of the next step: linear to 0."""
        return self.config.lr * (self.config.steps - self.step) / self.config.steps

    def report_nonfinite(self, rollouts: list[grpo.Rollout]) -> None:
        """Write down what was asked and answered, and end the run: the weights have not moved."""
        file = Path(self.config.out) / f"nonfinite-step-{self.step}-rank-{self.rank}.json"
        rows = []
        for rollout in rollouts:
            for one, texts in zip(rollout.asked, rollout.texts, strict=True):
                question = one.question
                rows.append({"id": question.id, "question": question.question, "responses": texts})
        write_text(file, json.dumps(rows, indent=1, ensure_ascii=False))
        asked = []
        for part in fsdp.gather_objects([row["id"] for row in rows]):
            asked += part
        raise InputError(
            f"step {self.step}: loss or gradient is not finite for questions {', '.join(asked)}; see {file}. "
            "The last checkpoint is intact"
        )

    def shown(self, rollouts: list[grpo.Rollout]) -> list[dict]:
        """The first --samples questions of the step, whichever process asked them."""
        samples = []
        for rollout in rollouts:
            for b, one in enumerate(rollout.asked):
                if one.k < self.config.samples:
                    samples.append(sample_row(one, rollout, b))
        everywhere = []
        for part in fsdp.gather_objects(samples):
            everywhere += part
        return sorted(everywhere, key=lambda sample: sample["k"])

    def count_bad_clips(self, asked: list[Asked]) -> None:
        """Name the clips that were replaced; InputError, on all processes, where they are too many."""
        for one in asked:
            for why in one.bad:
                log.warning("step %d: replaced: %s", one.step, why)
        bad = []
        hopeless = []
        for one in asked:
            bad += one.bad
            if one.prompt is None:
                hopeless = list(one.bad)
        for part in fsdp.gather_objects(hopeless):
            if part:
                raise InputError(f"{len(part)} clips in a row cannot be decoded, the last: {part[-1]}")
        self.bad_clips += sum(fsdp.gather_objects(len(bad)))
        asked_so_far = (self.step + 1) * self.config.batch
        if self.bad_clips > self.config.max_bad * max(100, asked_so_far):
            raise InputError(f"{self.bad_clips} clips could not be decoded, each named above; see --max_bad")

    # ---------------------------------------------------------------------------------------- held out

    def score_held_out(self) -> dict:
        """The share of the held-out questions answered right, greedily, by the benchmarks' string match.

        Batches are made before they are shared, and all processes run equally many at a time, of one kind
        (with audio or without), so that their collectives pair up and their number changes nothing.
        """
        started = time.perf_counter()
        questions = sorted(self.held_out, key=lambda question: (len(question.question), question.id))
        right = 0
        for with_audio in (True, False):
            kind = [q for q in questions if (self.hears and q.audio is not None) == with_audio]
            batches = [kind[i : i + 16] for i in range(0, len(kind), 16)]
            for first in range(0, len(batches), self.world):
                mine = first + self.rank
                found = self.count_right(batches[min(mine, len(batches) - 1)], with_audio)
                if mine < len(batches):
                    right += found
        right = sum(fsdp.gather_objects(right))
        fsdp.release(self.policy)
        low, high = wilson(right, len(questions))
        return {
            "step": self.step,
            "eval_accuracy": right / len(questions),
            "eval_low": low,
            "eval_high": high,
            "eval_questions": len(questions),
            "seconds_eval": time.perf_counter() - started,
        }

    def count_right(self, questions: list[Question], with_audio: bool) -> int:
        """How many of one batch are answered right. A clip that cannot be decoded is heard as silence."""
        prompts = []
        for question in questions:
            try:
                prompts.append(self.policy.encode(question, with_audio))
            except InputError as error:
                log.warning("held out: %s", error)
                prompts.append(self.policy.encode(question, with_audio, waveform=np.zeros(16_000)))
        answers = self.policy.generate(prompts, self.config.max_new_tokens)
        right = 0
        for question, group in zip(questions, answers, strict=True):
            said = final_answer(self.policy.decode(group[0]), self.config.prompt)
            right += string_match(question.answer, said, list(question.choices))
        return right

    # ------------------------------------------------------------------------------------ save and resume

    def state(self) -> dict[str, torch.Tensor]:
        """What a step changes: tensors, saved from and loaded into in place."""
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"weights.{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def save(self) -> None:
        out = Path(self.config.out)
        about = {"step": self.step, "bad_clips": self.bad_clips, "run": self.fingerprint}
        files = [out / "log.jsonl", out / "samples.jsonl"]
        fsdp.save_checkpoint(out, self.step, self.state(), about, keep=self.config.keep, files=files)

    def resume(self) -> None:
        """Load the newest whole checkpoint under --out, if any. InputError if it is of other arguments."""
        out = Path(self.config.out)
        found = fsdp.newest_intact(out)
        need = sum(self.plan.disk.values())
        if found:
            need /= 2
        free = shutil.disk_usage(out).free
        if free < need:
            needed = f"{need / 2**30:.1f} GiB for --keep {self.config.keep} checkpoints and the model"
            raise InputError(f"{out}: {free / 2**30:.1f} GiB free of {needed}")
        if found:
            about = parse_json(read_text(found / "run.json"))
            refuse_changes(out, then=about["run"], now=self.fingerprint)
            fsdp.load_checkpoint(found, self.state())
            self.step = about["step"]
            self.bad_clips = about["bad_clips"]
        if self.rank == 0:  # the rows up to this step, whatever has happened to the files since
            for name in ("log.jsonl", "samples.jsonl"):
                (out / name).unlink(missing_ok=True)
                if found and (found / name).exists():
                    shutil.copyfile(found / name, out / name)

    def save_model(self, suffix: str = "") -> None:
        """O/model or O/model-step-N, with a model card; with --lora, O/adapter as well. Collective."""
        config = self.config
        out = Path(config.out)
        card = {
            "base": config.model,
            "data": config.data,
            "steps": self.step,
            "settings": self.fingerprint,
        }
        if not config.lora or config.save_merged == "on":
            self.policy.save(out / f"model{suffix}", parts=config.model_only or "all", card=card)
        if config.lora and self.rank == 0:
            lora.save_adapter(self.pairs, out / f"adapter{suffix}", config.model)


def sample_row(one: Asked, rollout: grpo.Rollout, b: int) -> dict:
    """Question b of a rollout with all that was said to it, a row of samples.jsonl."""
    question = one.question
    return {
        "step": one.step,
        "k": one.k,
        "id": question.id,
        "question": question.question,
        "choices": list(question.choices),
        "answer": question.answer,
        "audio": question.audio,
        "responses": rollout.texts[b],
        "rewards": rollout.rewards[b].tolist(),
        "advantages": rollout.advantages[b].tolist(),
    }


def settings(config: argparse.Namespace, loaded: Loaded) -> dict:
    """The options that decide what a run computes, and what stands in the files that they name."""
    decisive = {}
    for name, value in vars(config).items():
        if name not in FREE.split():
            decisive[name] = value
    decisive["questions"] = []
    for questions in [*loaded.files, loaded.held_out]:
        decisive["questions"].append(f"{len(questions)}, {questions_hash(questions)}")
    file, _, _ = config.reward.rpartition(":")
    if Path(file).is_file():
        decisive["reward"] += f" {sha256(Path(file).read_bytes())}"
    return decisive


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------------------------------------------- main


def check_clips_together(clips: list[str]) -> dict[str, str | float]:
    """data.check_clips, shared over the processes. Collective."""
    mine = clips[dist.get_rank() :: dist.get_world_size()]
    found = {}
    for part in fsdp.gather_objects(check_clips(mine)):
        found.update(part)
    return found


def is_finished(config: argparse.Namespace, now: dict) -> bool:
    """Whether --out holds a finished run of the same settings. InputError if it is of others."""
    out = Path(config.out)
    there = [name for name in ("model", "adapter", "log.jsonl", "samples.jsonl") if (out / name).exists()]
    if not there:
        return False
    try:
        then = parse_json(read_text(out / "config.json"))
        then["settings"].keys()
    except (InputError, ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{out}/{there[0]} is of no run of this program's; take another --out") from None
    if there[0] not in ("model", "adapter"):
        return False
    refuse_changes(out, then=then["settings"], now=now)
    if not result(config).exists():
        return False
    if dist.get_rank() == 0:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # a kill may have come before
        print(f"{result(config)} exists, so this run is finished; take another --out for a new one")
    return True


def result(config: argparse.Namespace) -> Path:
    """What a run writes last."""
    name = "adapter" if config.lora else "model"
    return Path(config.out) / name


def train(config: argparse.Namespace) -> int:
    """The whole run, from where it was left. Returns the exit code."""
    check_arguments(config)
    if config.plan:
        print_plan(config)
        return 0
    rank, world, device = fsdp.start_processes(config.timeout)
    set_batch(config, world)
    if config.explain:
        return explain(config, device)
    out = Path(config.out)
    held = fsdp.hold(out)
    loaded = load_questions(config, check_clips_together)
    now = settings(config, loaded)
    if is_finished(config, now):
        return 0
    run = Run(config, rank=rank, world=world, device=device, loaded=loaded)
    run.resume()
    stop = fsdp.Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    journal = None
    if rank == 0:
        kept = {**vars(config), "settings": now}
        write_text(out / "config.json", json.dumps(kept, indent=1))
        log.info("settings: %s", run.fingerprint)
        journal = Journal(out, run.step, vars(config), config.wandb)
    code = learn(run, journal, stop)
    if rank == 0:
        journal.close()
    del held
    return code


def learn(run: Run, journal: Journal | None, stop: fsdp.Stop) -> int:
    """Step after step until the last, or until a signal. Returns the exit code."""
    config = run.config
    last_saved = run.step
    if run.step == 0:
        score(run, journal)
    progress = tqdm(
        total=config.steps,
        initial=run.step,
        unit="step",
        disable=run.rank > 0,
        dynamic_ncols=True,
    )
    batches = run.batches()
    while run.step < config.steps:
        signals = fsdp.gather_objects(stop.signal)
        if any(signals):
            progress.close()
            if run.step > last_saved:
                run.save()
            if run.rank == 0:
                where = f"step {run.step} is saved" if run.step else "no step was taken"
                print(f"stopped by a signal; {where}, the same command goes on from there")
            return 128 + max(signals)
        started = time.perf_counter()
        asked = next(batches)
        waited = time.perf_counter() - started
        run.count_bad_clips(asked)
        row, samples = run.take_step(asked)
        row["seconds_wait"] = fsdp.average(waited)
        row["bad_clips"] = run.bad_clips
        if run.rank == 0:
            journal.write(row)
            journal.show(samples)
        progress.set_postfix(reward=f"{row['reward']:.2f}", official=f"{row['official']:.2f}", refresh=False)
        progress.update()
        last = run.step == config.steps
        if run.step % config.eval_every == 0 or last:
            score(run, journal)
        if config.save_model_every and run.step % config.save_model_every == 0 and not last:
            run.save_model(f"-step-{run.step}")
        if run.step % config.save_every == 0 and not last:
            run.save()
            last_saved = run.step
    progress.close()
    run.save_model()
    if run.rank == 0:
        saved = result(config)
        for path in [*saved.iterdir(), saved, saved.parent]:
            fsdp.sync(path)  # the disk has it before the checkpoints go
        shutil.rmtree(Path(config.out) / "checkpoints", ignore_errors=True)
        print(f"saved {saved}")
    return 0


def score(run: Run, journal: Journal | None) -> None:
    """The held-out score of this step, where there are questions held out."""
    if not run.held_out:
        return
    row = run.score_held_out()
    if run.rank == 0:
        journal.write(row)
        low, high = row["eval_low"], row["eval_high"]
        log.info("step %d: held out %.3f (%.3f to %.3f)", run.step, row["eval_accuracy"], low, high)


def explain(config: argparse.Namespace, device: torch.device) -> int:
    """--explain: one question's step with all its numbers; the weights do not move. Returns the exit code."""
    if dist.get_world_size() > 1:
        raise InputError("--explain is for one process: leave torchrun out")
    config.batch = 1
    config.workers = 0
    loaded = load_questions(config, check_clips_together)
    run = Run(config, rank=0, world=1, device=device, loaded=loaded)
    asked = next(run.batches())
    run.count_bad_clips(asked)
    metrics, (rollout,) = grpo.step(
        run.policy, run.reference, [asked], config, run.reward, update=lambda: None
    )
    question = asked[0].question
    ids = asked[0].prompt.input_ids
    heard = int((ids == run.policy.prompts.audio_token_id).sum())
    print(f"question  {question.id}, clip {question.audio}, right answer {question.answer!r}")
    print(f"prompt    {len(ids)} tokens, of which {heard} audio; its text:")
    print(f"          {prompt_text(question, config.prompt)}")
    logps, _ = run.policy.log_probs(asked[0].prompt, rollout.responses[0])
    for g, response in enumerate(rollout.responses[0]):
        reward = rollout.rewards[0, g]
        advantage = rollout.advantages[0, g]
        print(f"answer {g + 1}  {rollout.texts[0][g]!r}")
        print(f"          reward {reward:g} (Eq. 2), advantage {advantage:+.2f} (Eq. 1)")
        for t, token in enumerate(response):
            text = run.policy.prompts.tokenizer.decode([token])
            print(f"          {text!r:20} log-prob {logps[g, t]:8.4f}")
    metrics["entropy"] /= metrics["taught"]
    for name in ("kl", "entropy", "loss"):
        print(f"{name:9} {metrics[name]:.6f}")
    return 0


def main() -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)  # ours; httpx tells every request
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a file's name need not be UTF-8
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        code = train(parse())
    except (InputError, OSError) as error:  # OSError: a full disk, a read-only folder
        if first or isinstance(error, OSError | RewardError):  # of one process alone
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except RuntimeError as error:
        why = (str(error).splitlines() or [""])[0]
        if re.search(r"timed? ?out|connection (closed|reset)", str(error), re.I):
            what = "another process died or hangs"
        elif "DataLoader worker" in str(error):
            what = "a process that decodes clips died (out of memory?)"
        else:
            raise
        print(f"error: {what}: {why}", file=sys.stderr, flush=True)
        os._exit(3)  # leaving the group in order would wait for it
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
