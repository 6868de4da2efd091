"""Fine-tune an audio LLM with GRPO (Sections III-B and IV-A). The defaults are the paper's AVQA run.

    torchrun --nproc_per_node 4 train.py
    python train.py --model M --data arc.jsonl --no_audio --out results/arc      (text only, Section IV-E)
    python train.py --plan --world_size 4 --gpu A6000                            (what it takes; no weights)
    python train.py --explain --model M --data F --audio_dir D                   (one question, step by step)

A run is a pure function of its arguments. Which question is number k of step s, and the random numbers that
its responses are drawn with, follow from (seed, s, k): not from the number of processes, and not from what
happened before. So two processes do what one does, and a checkpoint is weights, optimizer state and a step
number. `Run.take_step` is the paper's algorithm, from top to bottom.
"""

import fsdp  # isort: skip  (before torch: it sets what torch reads when it is imported)

import argparse
import json
import logging
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import grpo
import lora
from data import (
    PROMPTS,
    Asked,
    Loaded,
    Question,
    Questions,
    ahead,
    check_clips,
    load_questions,
    prompt_text,
    questions_hash,
)
from files import (
    InputError,
    LocalError,
    append_rows,
    parse_json,
    read_text,
    refuse_changes,
    rows_of,
    sha256,
    write_text,
)
from model import AudioLM, empty_lm, load_weights
from plan import choose_plan, plan_line, print_plan, set_batch
from report import wilson
from reward import final_answer, find_reward, string_match
from weights import checkpoint_hash, find_model

log = logging.getLogger("omni_r1")

# Options that may differ when a run is resumed: they change where and how it runs, not what it computes.
FREE = "out accumulation reshard checkpointing cpu_offload replicas save_every save_minutes keep"
FREE += " save_model_every plan explain world_size gpu"
AUTO = ["auto", "on", "off"]
MOST_BAD = 0.1  # share of the clips that may be replaced
FIRST_SAVE = 5  # minutes until the first checkpoint, where --save_minutes is more
WINDOW = 20  # steps of a moving average
DRIFT = 0.05  # by how much reward and official score may part
LEAP = 10.0  # a KL divergence, in nats a token, that no healthy run has


# -------------------------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """What is wrong with an option is one line, as for all other input."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see --help)")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every option's default."""


def at_least(
    least: float,
    kind: type = int,
) -> Callable[[str], float]:
    """An option's type: a finite number from `least` on; 0 exclusive is a float's smallest."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < 2**63:
            raise ValueError
        return value

    return number


COUNT = at_least(1)
WHOLE = at_least(0)
AMOUNT = at_least(0, float)
POSITIVE = at_least(1e-12, float)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add_recipe_options(parser)
    add_run_options(parser)
    return parser.parse_args(argv)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """What decides the result."""
    add = parser.add_argument_group("what is learned from").add_argument
    add("--model", default="Qwen/Qwen2.5-Omni-7B", help="checkpoint folder or hub name")
    add("--data", nargs="+", default=["data/avqa/train_qa.json"], help="question file(s) in any known format")
    add(
        "--audio_dir",
        nargs="+",
        default=[None],
        help="folder(s) of the clips (None: beside the questions, or in `audio` there)",
    )
    add("--shares", nargs="+", type=AMOUNT, default=[], help="each file's share of the steps (none: equal)")
    add("--no_audio", action="store_true", help="drop the audio tokens from every prompt (Section IV-E)")
    add("--prompt", choices=list(PROMPTS), default="direct", help="how the answer is asked for")
    add("--hold_out", type=WHOLE, default=0, help="questions kept from training and scored meanwhile")
    add("--eval_data", default="", help="a question file scored meanwhile instead, 200 of it at most")
    add("--eval_audio_dir", help="folder of its clips (None: beside the file)")
    add("--eval_every", type=COUNT, default=300, help="steps between held-out scores")
    add = parser.add_argument_group("the recipe").add_argument
    add("--steps", type=COUNT, default=1000, help="optimizer steps")
    add("--batch", type=COUNT, default=8, help="questions of a step, over all processes")
    add("--group_size", type=COUNT, default=4, help="responses per question, G")
    add("--temperature", type=POSITIVE, default=1.2, help="sampling temperature of the rollout")
    add("--max_new_tokens", type=COUNT, default=64, help="longest response, in tokens")
    add("--reward", default="exact", help="exact, official, contains, or FILE.py:function (see reward.py)")
    add("--format_weight", type=AMOUNT, default=0.0, help="reward for a reply in --prompt's form")
    add("--beta", type=AMOUNT, default=0.04, help="weight of the KL divergence; 0: no reference model")
    add("--epsilon", type=POSITIVE, default=0.2, help="clipping range of the probability ratio")
    losses = ["sequence", "token", "dr"]
    add("--loss", choices=losses, default="sequence", help="what weighs the same (grpo.rollout_loss)")
    add("--updates", type=COUNT, default=1, help="optimizer steps on each rollout")
    add("--lr", type=POSITIVE, default=1e-6, help="learning rate at the start; falls linearly to 0")
    add("--max_grad_norm", type=POSITIVE, default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=WHOLE, default=0, help="of the order of questions and of sampling")
    add("--lora", type=WHOLE, default=0, help="train low-rank pairs of this rank, nothing else; 0: all")
    dtypes = ["auto", "bfloat16", "float32"]
    add("--dtype", choices=dtypes, default="auto", help="of the computation; auto: bfloat16 on GPUs that can")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What decides where the result is computed, and what is written on the way."""
    add = parser.add_argument_group("where it runs").add_argument
    add("--accumulation", type=WHOLE, default=0, help="passes of a process a step (0: as few as fit)")
    add("--reshard", choices=AUTO, default="auto", help="free each layer's gathered weights after use")
    add("--checkpointing", choices=AUTO, default="auto", help="recompute activations in the backward pass")
    places = ["auto", "off", "moments", "on"]
    add(
        "--cpu_offload", choices=places, default="auto", help="what lies in host memory: AdamW's moments, all"
    )
    add("--replicas", type=COUNT, default=1, help="copies of the shards: one a node, say")
    add("--plan", action="store_true", help="print the memory, time and disk that the run takes, and stop")
    add("--world_size", type=WHOLE, default=0, help="--plan: number of GPUs (0: as found)")
    add("--gpu", default="", help="--plan: the card's name, or its GiB (as found)")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", default="results/omni-avqa", help="the run's folder: log, samples, checkpoints, model")
    add("--save_minutes", type=POSITIVE, default=20, help="minutes between checkpoints; the first after 5")
    add("--save_every", type=WHOLE, default=0, help="steps between checkpoints instead (0: by minutes)")
    add("--keep", type=COUNT, default=2, help="checkpoints kept (12 bytes a parameter each)")
    add("--save_model_every", type=WHOLE, default=0, help="steps between model folders (0: the last alone)")
    add("--explain", action="store_true", help="print one question's step with all its numbers, and stop")


def check_arguments(config: argparse.Namespace) -> None:
    """InputError for options that contradict one another, before anything is read."""
    if config.format_weight and config.prompt == "direct":
        raise InputError("--format_weight: --prompt direct asks for no form; give another --prompt")
    if config.group_size < 2:
        raise InputError(f"--group_size {config.group_size}: an advantage needs a group of at least 2")
    files = len(config.data)
    if config.audio_dir == [None]:  # beside the questions, where fetch.py puts the clips of a set
        folders = [Path(data).parent / "audio" for data in config.data]
        config.audio_dir = [str(folder) if folder.is_dir() else None for folder in folders]
    if len(config.audio_dir) not in (1, files):
        raise InputError(f"--audio_dir: {len(config.audio_dir)} folders for {files} files; give 1 or {files}")
    shares = config.shares or [1.0] * files
    if len(shares) != files or sum(shares) == 0:
        raise InputError(f"--shares: give {files} numbers, one for each file")
    if config.hold_out and config.eval_data:
        raise InputError("--hold_out and --eval_data: give one of them")
    if config.lora and config.cpu_offload in ("moments", "on"):
        raise InputError(f"--cpu_offload {config.cpu_offload}: with --lora there is nothing worth offloading")


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

    def load_models(self, longest_clip: float) -> None:
        """The policy in fp32 shards, and the reference in the compute dtype; nothing whole in any process.

        With --lora there is one model in the compute dtype, frozen: without its pairs it is the reference.
        """
        config = self.config
        stored = self.dtype if config.lora else torch.float32
        self.policy = empty_lm(config.model, stored, self.hears, config.prompt)
        longest = min(longest_clip, self.policy.prompts.seconds)  # what is longer is cut
        self.plan = choose_plan(
            self.policy.model, self.world // config.replicas, self.dtype, config, self.device, longest
        )
        layout = self.plan.layout
        self.layout = layout
        if self.rank == 0:
            log.info(plan_line(self.plan))
        if layout.checkpointing:
            fsdp.checkpoint_activations(self.policy)
        mesh = fsdp.make_mesh(self.device, config.replicas)
        offload = layout.offload.startswith("on")
        sharded = self.world > 1 and (layout.reshard or not config.lora)
        if sharded or stored != self.dtype or offload:
            how = {"reshard": layout.reshard, "gathered_rollout": layout.gathered_rollout}
            fsdp.shard(self.policy, mesh, self.dtype, **how, cpu_offload=offload)
        load_weights(self.policy, "cpu" if offload else self.device, compute=self.device)
        self.reference = None
        if config.lora:
            self.pairs = lora.attach(self.policy, config.lora, 2 * config.lora, seed=config.seed)
            self.reference = self.pairs
        elif config.beta:
            self.reference = self.load_reference(mesh)
        if config.beta == 0:
            self.reference = None

    def load_reference(self, mesh: DeviceMesh) -> AudioLM:
        """No backward comes: each layer's gathered weights go once they were used."""
        reference = empty_lm(self.config.model, self.dtype, self.hears, self.config.prompt)
        on_host = "reference" in self.layout.offload
        if self.world > 1 or on_host:
            fsdp.shard(reference, mesh, self.dtype, reshard=True, cpu_offload=on_host)
        load_weights(reference, "cpu" if on_host else self.device, compute=self.device)
        return reference.requires_grad_(False)

    def make_optimizer(self) -> None:
        """AdamW on the parameters that learn."""
        self.parameters = {}
        for name, p in self.policy.named_parameters():
            if p.requires_grad:
                self.parameters[name] = p
        learning = list(self.parameters.values())
        self.optimizer = fsdp.make_optimizer(learning, self.config.lr, self.layout.offload == "moments")

    def batches(self) -> Iterator[list[Asked]]:
        """This process's questions of each step from the next on, decoded ahead by a thread."""
        each = self.config.batch // self.world
        batch = []
        for asked in ahead(
            self.questions.__getitem__, range(self.step * each, len(self.questions)), 4 * each
        ):
            batch.append(asked)
            if len(batch) == each:
                yield batch
                batch = []

    # ------------------------------------------------------------------------------------------ one step

    def take_step(self, asked: list[Asked]) -> tuple[dict[str, float], list[grpo.Rollout]]:
        """One step of Section III-B on this process's questions, in the paper's order.

        Returns the metrics as sums over the questions, and all that was said.
        """
        config = self.config
        totals = {}
        started = clock()
        rollouts = []
        size = self.layout.questions_per_pass  # what goes through at once changes memory, not the result
        for first in range(0, len(asked), size):
            # Roll out G responses to each question; rewards, Eq. 2; advantages, Eq. 1.
            rollouts.append(grpo.roll_out(self.policy, asked[first : first + size], config, self.reward))
        grpo.add(totals, {"seconds_rollout": clock() - started})
        for rollout in rollouts:
            grpo.add(totals, grpo.rollout_metrics(rollout, self.policy.eos, config.prompt))
        length = self.mean_length(rollouts)
        for _ in range(config.updates):
            for rollout in rollouts:
                share = len(rollout.asked) / len(asked)
                # Score: the log-probs of every response's tokens, under the reference and the policy.
                started = clock()
                logps, entropy = grpo.score(self.policy, self.reference, rollout)
                # Loss, Eq. 3 and 4; backward.
                loss, found = grpo.rollout_loss(logps, rollout, config, length)
                scored = clock()
                (loss * share).backward()
                grpo.add(totals, {**found, "entropy": entropy}, len(rollout.asked) / config.updates)
                grpo.add(totals, {"seconds_score": scored - started, "seconds_update": clock() - scored})
            # Update.
            started = clock()
            self.update(rollouts)
            grpo.add(totals, {"seconds_update": clock() - started})
        self.step += 1
        return totals, rollouts

    def update(self, rollouts: list[grpo.Rollout]) -> None:
        """Clip the gradients and step; InputError, before any weight moves, where they are not finite."""
        if self.config.lora:
            fsdp.average_gradients(list(self.parameters.values()))
        self.grad_norm = fsdp.clip_gradients(list(self.parameters.values()), self.config.max_grad_norm)
        if not math.isfinite(self.grad_norm):
            file = Path(self.config.out) / f"nonfinite-rank-{self.rank}.jsonl"
            append_rows(file, [row for rollout in rollouts for row in sample_rows(rollout)])
            raise InputError(
                f"step {self.step + 1}: loss or gradient is not finite; {file} has the questions and answers"
            )
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        fsdp.release(self.policy)

    def learning_rate(self) -> float:
        """Of the next step: linear to 0."""
        return self.config.lr * (self.config.steps - self.step) / self.config.steps

    def mean_length(self, rollouts: list[grpo.Rollout]) -> float:
        """Tokens of a response of this step, over all processes; only `--loss token` needs it."""
        if self.config.loss != "token":
            return 0.0
        lengths = torch.cat([rollout.response_lengths() for rollout in rollouts])
        means = fsdp.gather_objects(lengths.float().mean().item())
        return sum(means) / self.world

    def name_bad_clips(self, asked: list[Asked]) -> int:
        """Name the clips that were replaced. Returns their number."""
        bad = 0
        for one in asked:
            bad += len(one.bad)
            for why in one.bad:
                log.warning("step %d: replaced: %s", one.step, why)
            if one.prompt is None:
                raise LocalError(f"{len(one.bad)} clips in a row cannot be decoded, the last: {one.bad[-1]}")
        return bad

    def row(self, parts: list[dict]) -> dict[str, float]:
        """The step's row for the log, from the sums of all processes."""
        row = {"step": self.step}
        for name in parts[0]:
            row[name] = sum(part[name] for part in parts) / self.config.batch
            if name.startswith("seconds"):  # of a process, not of a question
                row[name] *= self.config.batch / self.world
        row["grad_norm"] = self.grad_norm
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row["peak_memory_mb"] = peak_memory_mb(self.device)
        row["bad_clips"] = self.bad_clips
        return row

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

    def count_right(
        self,
        questions: list[Question],
        with_audio: bool,
    ) -> int:
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
        about = {"step": self.step, "bad_clips": self.bad_clips}
        fsdp.save_checkpoint(out, self.step, self.state(), about, keep=self.config.keep)

    def resume(self) -> None:
        """Load the newest whole checkpoint under --out, if any. InputError if it is of other arguments."""
        out = Path(self.config.out)
        found = fsdp.newest_checkpoint(out)
        need = sum(self.plan.disk.values())
        if found:
            need /= 2
        free = shutil.disk_usage(out).free
        if free < need:
            needed = f"{need / 2**30:.1f} GiB for --keep {self.config.keep} checkpoints and the model"
            raise InputError(f"{out}: {free / 2**30:.1f} GiB free of {needed}")
        if found:
            about = parse_json(read_text(found / "run.json"))
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
        settings = {**vars(config), "steps": self.step}
        self.policy.save(out / f"model{suffix}", settings)
        if config.lora and self.rank == 0:
            lora.save_adapter(self.pairs, out / f"adapter{suffix}", config.model)


def sample_rows(rollout: grpo.Rollout) -> list[dict]:
    """A rollout's questions with all that was said to them, rows of samples.jsonl."""
    rows = []
    for b, one in enumerate(rollout.asked):
        question = one.question
        row = {
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
        rows.append(row)
    return rows


def settings(
    config: argparse.Namespace,
    loaded: Loaded,
    device: torch.device,
) -> dict:
    """What decides a run's result: options, and what stands in the files that they name."""
    decisive = {}
    for name, value in vars(config).items():
        if name not in FREE.split():
            decisive[name] = value
    decisive["dtype"] = str(fsdp.compute_dtype(config.dtype, device)).removeprefix("torch.")
    decisive["weights"] = checkpoint_hash(find_model(config.model))
    decisive["questions"] = []
    for questions in [*loaded.files, loaded.held_out]:
        decisive["questions"].append(f"{len(questions)}, {questions_hash(questions)}")
    file, _, _ = config.reward.rpartition(":")
    if file:
        decisive["reward"] += f" {sha256(read_text(file).encode())}"
    return decisive


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock() -> float:
    """Seconds, once the device has done what it was asked: kernels run behind Python's back."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------------------- what is written


class Journal:
    """log.jsonl, a row a step and one a held-out score; samples.jsonl; TensorBoard where that is installed.

    A rising reward proves nothing: what would make it look good without being good is told in words, once.
    """

    def __init__(self, config: argparse.Namespace, step: int):
        self.out = Path(config.out)
        self.format_weight = config.format_weight
        self.rows = [row for row in rows_of(self.out / "log.jsonl") if "loss" in row]  # of the steps
        self.told = set()
        self.board = tensorboard(self.out, step)

    def write(
        self,
        row: dict,
        samples: Iterable[dict] = (),
    ) -> None:
        append_rows(self.out / "log.jsonl", [row])
        append_rows(self.out / "samples.jsonl", samples)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])
            self.board.flush()
        if "loss" not in row:
            return
        self.rows.append(row)
        for name, words in warnings_of(self.rows, self.format_weight).items():
            if name not in self.told:
                log.warning("step %d: %s", row["step"], words)
            self.told.add(name)


def warnings_of(
    rows: list[dict],
    format_weight: float = 0.0,
) -> dict[str, str]:
    """What the last rows of the log give reason to doubt: name -> words.

    Reward and official score part where their distance has grown by more than DRIFT, from the first 10 steps
    to the last 20; only the growth counts, and not what --format_weight pays for the form.
    """
    told = {}
    last = rows[-WINDOW:]
    recent = rows[-WINDOW // 2 :]
    if len(recent) == WINDOW // 2 and mean(recent, "frac_reward_zero_std") == 1:
        told["nothing"] = (
            f"nothing is learned: in {len(recent)} steps no group's rewards differ (reward "
            f"{mean(recent, 'reward'):.2f}; {mean(recent, 'named_none'):.0%} of the answers name no choice). "
            "Read samples.jsonl, and try --explain"
        )
    if rows[-1]["kl"] > LEAP:
        told["leap"] = f"the KL divergence leaps to {rows[-1]['kl']:.1f}: a smaller --lr, or a larger --beta"
    if len(rows) < WINDOW:
        return told
    gaps = []
    for some in (rows[: WINDOW // 2], last):
        form = format_weight * mean(some, "asked_form")
        gaps.append(mean(some, "reward") - form - mean(some, "official"))
    if gaps[1] - gaps[0] > DRIFT:
        reasons = []
        for name, what in SIGNS.items():
            reasons.append(f"{what} {mean(rows[: WINDOW // 2], name):.2f} -> {mean(last, name):.2f}")
        told["drift"] = (
            f"reward and score part: over the last {WINDOW} steps the reward is {mean(last, 'reward'):.2f}, "
            f"but the benchmarks' rule finds {mean(last, 'official'):.2f} of the answers right "
            f"({'; '.join(reasons)}). Read samples.jsonl; --reward official pays what the score counts"
        )
    return told


SIGNS = {
    "hedged": "naming several choices",
    "named_none": "naming none",
    "completion_length": "tokens of an answer",
}


def mean(
    rows: list[dict],
    name: str,
) -> float:
    return sum(row.get(name, 0.0) for row in rows) / len(rows)


def tensorboard(
    out: Path,
    step: int,
) -> Any:
    """A writer of TensorBoard's events that forgets later steps, which will come again; None without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out), purge_step=step + 1)


# ---------------------------------------------------------------------------------------------------- main


def train(config: argparse.Namespace) -> int:
    """The whole run, from where it was left. Returns the exit code."""
    check_arguments(config)
    if config.plan:
        print_plan(config)
        return 0
    rank, world, device = fsdp.start_processes()
    if config.explain:
        config.batch = 1  # which several processes cannot share
    set_batch(config, world)
    out = Path(config.out)
    if not config.explain:
        held = fsdp.hold(out)  # noqa: F841 (until the process ends)
    loaded = load_questions(config, check_clips_together)
    if config.explain:
        explain(Run(config, rank=rank, world=world, device=device, loaded=loaded))
        return 0
    now = settings(config, loaded, device)
    if is_finished(config, now):
        if rank == 0:
            print(f"{result(config)} exists, so this run is finished; take another --out for a new one")
        return 0
    run = Run(config, rank=rank, world=world, device=device, loaded=loaded)
    run.resume()
    journal = None
    if rank == 0:
        about = {
            **vars(config),
            "layout": str(run.layout),
            "parameters": run.plan.whole,
            "settings": now,
        }
        write_text(out / "config.json", json.dumps(about, indent=1))
        journal = Journal(config, run.step)
    with logging_redirect_tqdm(), closing(fsdp.Stop()) as stop:
        return learn(run, journal, stop)


def check_clips_together(clips: list[str]) -> dict[str, str | float]:
    """data.check_clips, shared over the processes. Collective."""
    mine = clips[dist.get_rank() :: dist.get_world_size()]
    found = {}
    for part in fsdp.gather_objects(check_clips(mine)):
        found.update(part)
    return found


def is_finished(
    config: argparse.Namespace,
    now: dict,
) -> bool:
    """Whether --out holds a finished run. InputError if it holds anything of other settings."""
    out = Path(config.out)
    if not any((out / name).exists() for name in ("model", "adapter", "checkpoints", "log.jsonl")):
        return False
    try:
        then = parse_json(read_text(out / "config.json"))["settings"]
        refuse_changes(out, then=then, now=now)
    except (ValueError, TypeError, LookupError):
        raise InputError(f"{out} holds no run of this program's; take another --out") from None
    return result(config).exists()


def result(config: argparse.Namespace) -> Path:
    """What a run writes last."""
    name = "adapter" if config.lora else "model"
    return Path(config.out) / name


def learn(
    run: Run,
    journal: Journal | None,
    stop: fsdp.Stop,
) -> int:
    """Step after step until the last, or until a signal. Returns the exit code."""
    config = run.config
    saved_at = time.monotonic() - 60 * max(0, config.save_minutes - FIRST_SAVE)
    if run.step == 0:
        write_held_out(run, journal)
    bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=run.rank > 0)
    ready = time.perf_counter()
    for asked in run.batches():
        waited = time.perf_counter() - ready
        bad = run.name_bad_clips(asked)
        totals, rollouts = run.take_step(asked)
        totals["seconds_wait"] = waited
        bar.update()
        samples = [row for rollout in rollouts for row in sample_rows(rollout) if row["k"] == 0]
        mine = (
            totals,
            samples,
            bad,
            stop.signal,
            time.monotonic() - saved_at,
        )
        totals, samples, bad, signals, unsaved = zip(*fsdp.gather_objects(mine), strict=True)
        run.bad_clips += sum(bad)
        if run.rank == 0:
            journal.write(run.row(totals), sum(samples, []))
            say(journal.rows, config.steps)
        if run.bad_clips > MOST_BAD * max(100, run.step * config.batch):
            raise InputError(f"{run.bad_clips} clips could not be decoded, each named above")
        if run.step == config.steps:
            break
        if run.step % config.eval_every == 0:
            write_held_out(run, journal)
        if config.save_model_every and run.step % config.save_model_every == 0:
            run.save_model(f"-step-{run.step}")
        due = unsaved[0] > 60 * config.save_minutes  # rank 0's clock decides for all
        if config.save_every:
            due = run.step % config.save_every == 0
        if any(signals):
            stop.close()  # all have come to the end of the step, and may take their time
        if due or any(signals):
            run.save()
            saved_at = time.monotonic()
        if any(signals):
            bar.close()
            if run.rank == 0:
                print(f"stopped by a signal; step {run.step} is saved, the same command goes on from there")
            return 128 + max(signals)
        ready = time.perf_counter()
    bar.close()
    write_held_out(run, journal)
    run.save_model()
    if run.rank == 0:
        drop_checkpoints(config)
        print(summary(run, journal))
    return 0


def drop_checkpoints(config: argparse.Namespace) -> None:
    """Once the disk has what they led to."""
    saved = result(config)
    for path in [*saved.iterdir(), saved, saved.parent]:
        fsdp.sync(path)
    shutil.rmtree(Path(config.out) / "checkpoints", ignore_errors=True)


def say(
    rows: list[dict],
    steps: int,
) -> None:
    """Ten times a run, what a person who watches wants to know: means of the last steps."""
    step = rows[-1]["step"]
    if step % math.ceil(steps / 10):
        return
    last = rows[-WINDOW:]
    seconds = sum(mean(last, f"seconds_{part}") for part in ("wait", "rollout", "score", "update"))
    shown = f"reward {mean(last, 'reward'):.2f}, official {mean(last, 'official'):.2f}, "
    shown += f"kl {mean(last, 'kl'):.3f}, groups that teach {1 - mean(last, 'frac_reward_zero_std'):.0%}"
    left = (steps - step) * seconds / 3600
    log.info("step %d: %s; %.2f s a step, %.1f h left", step, shown, seconds, left)


def summary(
    run: Run,
    journal: Journal,
) -> str:
    """The run's last words: what it learned, what is doubtful, what to do next."""
    out = Path(run.config.out)
    first = mean(journal.rows[: WINDOW // 2], "reward")
    lines = [
        f"saved {result(run.config)}; reward {first:.2f} -> {mean(journal.rows[-WINDOW:], 'reward'):.2f}"
    ]
    for words in warnings_of(journal.rows, run.config.format_weight).values():
        lines.append(f"but {words}")
    lines.append(f"next: python evaluate.py --model {out / 'model'} --data BENCHMARK.json --audio_dir CLIPS")
    lines.append(f"      python report.py {out.parent}")
    return "\n".join(lines)


def write_held_out(
    run: Run,
    journal: Journal | None,
) -> None:
    """The held-out score of this step, where there are questions held out."""
    if not run.held_out:
        return
    row = run.score_held_out()
    if run.rank == 0:
        journal.write(row)
        low, high = row["eval_low"], row["eval_high"]
        log.info("step %d: held out %.3f (%.3f to %.3f)", run.step, row["eval_accuracy"], low, high)


def explain(run: Run) -> None:
    """--explain: one question's step with all its numbers; the weights do not move."""
    config = run.config
    asked = next(run.batches())
    run.name_bad_clips(asked)
    question = asked[0].question
    ids = asked[0].prompt.input_ids
    heard = int((ids == run.policy.prompts.audio_token_id).sum())
    print(f"question  {question.id}, clip {question.audio}, right answer {question.answer!r}")
    print(f"prompt    {len(ids)} tokens, of which {heard} audio ({heard / 25:.1f} s); its text:")
    print(f"          {prompt_text(question, config.prompt)}")
    rollout = grpo.roll_out(run.policy, asked, config, run.reward)
    logps, entropy = grpo.score(run.policy, run.reference, rollout)
    _, metrics = grpo.rollout_loss(logps, rollout, config, run.mean_length([rollout]))
    (row,) = sample_rows(rollout)
    for g, tokens in enumerate(rollout.responses[0]):
        print(f"answer {g + 1}  {row['responses'][g]!r}")
        print(
            f"          reward {row['rewards'][g]:g} (Eq. 2), advantage {row['advantages'][g]:+.2f} (Eq. 1)"
        )
        for token, logp in zip(tokens, logps[g]):  # noqa: B905 (logps has padding behind)
            print(f"          {run.policy.prompts.tokenizer.decode([token])!r:20} log-prob {logp:8.4f}")
    print(f"kl        {metrics['kl']:.6f}\nentropy   {entropy:.6f}\nloss      {metrics['loss']:.6f}")


def main() -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)  # ours; httpx tells every request
    code = 2
    try:
        code = train(parse())
    except (InputError, OSError) as error:  # OSError: a full disk, a read-only folder
        if os.environ.get("RANK", "0") == "0" or type(error) is not InputError:
            print(f"error: {error}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
