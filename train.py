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

import json
import logging
import math
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import grpo
import lora
from data import (
    MOST_BAD,
    PROMPTS,
    Asked,
    Loaded,
    Questions,
    ahead,
    check_clips,
    load_questions,
    prompt_text,
    questions_hash,
)
from files import (
    COUNT,
    WHOLE,
    InputError,
    LocalError,
    Parser,
    append_rows,
    at_least,
    made_before,
    one_writer,
    parse_json,
    read_text,
    rows_of,
    sha256,
    write_text,
)
from model import AudioLM, empty_lm
from plan import choose_plan, plan_line, print_plan, set_batch
from report import WINDOW, doubts, mean, wilson
from reward import final_answer, find_reward, string_match
from weights import checkpoint_hash, find_model, load_weights

log = logging.getLogger("omni_r1")

# Options that may differ when a run is resumed: they change where and how it runs, not what it computes.
FREE = """out accumulation reshard checkpointing cpu_offload replicas save_minutes save_every keep
save_model_every plan world_size gpu explain"""
AUTO = ["auto", "on", "off"]
PLACES = ["auto", "off", "moments", "on"]
FIRST_SAVE = 5  # minutes until the first checkpoint, where --save_minutes is more
SHOWN = ["reward", "official", "kl", "frac_reward_zero_std"]  # ten times a run


AMOUNT = at_least(0, float)
POSITIVE = at_least(1e-12, float)  # a logit divided by it is far from fp32's end


def parse(argv: list[str] | None = None) -> Namespace:
    parser = Parser(__doc__)
    parser.table(
        "what is learned from",
        [
            ("--model", str, "Qwen/Qwen2.5-Omni-7B", "checkpoint folder or hub name"),
            ("--data", str, ["data/avqa/train_qa.json"], "question file(s) in any known format"),
            ("--audio_dir", str, [None], "folder(s) of the clips (None: beside the questions)"),
            ("--shares", POSITIVE, [1.0], "each file's share of the steps"),
            ("--no_audio", bool, False, "drop the audio tokens from every prompt (Section IV-E)"),
            ("--prompt", list(PROMPTS), "direct", "how the answer is asked for"),
            ("--hold_out", WHOLE, 0, "questions kept from training and scored meanwhile"),
            ("--eval_data", str, None, "a question file scored instead of --hold_out, 200 of it at most"),
            ("--eval_audio_dir", str, None, "folder of its clips (None: beside the file)"),
            ("--eval_every", COUNT, 300, "steps between held-out scores"),
        ],
    )
    parser.table(
        "the recipe",
        [
            ("--steps", COUNT, 1000, "optimizer steps"),
            ("--batch", COUNT, 8, "questions of a step, over all processes"),
            ("--group_size", at_least(2), 4, "responses per question, G"),
            ("--temperature", POSITIVE, 1.2, "sampling temperature of the rollout"),
            ("--max_new_tokens", COUNT, 64, "longest response, in tokens"),
            ("--reward", str, "exact", "exact, official, contains, or FILE.py:function (see reward.py)"),
            ("--format_weight", AMOUNT, 0.0, "reward for the form that --prompt asks for"),
            ("--beta", AMOUNT, 0.04, "weight of the KL divergence; 0: no reference model"),
            ("--epsilon", POSITIVE, 0.2, "clipping range of the probability ratio"),
            ("--loss", ["sequence", "token", "dr"], "sequence", "what weighs the same"),
            ("--updates", COUNT, 1, "optimizer steps on each rollout"),
            ("--lr", POSITIVE, 1e-6, "learning rate at the start; falls linearly to 0"),
            ("--max_grad_norm", POSITIVE, 1.0, "gradients are clipped to this norm"),
            ("--seed", WHOLE, 0, "of the order of questions and of sampling"),
            ("--lora", WHOLE, 0, "train low-rank pairs of this rank, nothing else; 0: all"),
            ("--dtype", fsdp.DTYPES, "auto", "of the computation; auto: bfloat16 on GPUs that can"),
        ],
    )
    parser.table(
        "where it runs, what is written",
        [
            ("--accumulation", WHOLE, 0, "passes of a process a step (0: as few as fit)"),
            ("--reshard", AUTO, "auto", "free each layer's gathered weights after use"),
            ("--checkpointing", AUTO, "auto", "recompute activations in the backward pass"),
            ("--cpu_offload", PLACES, "auto", "to host memory: AdamW's moments, or all"),
            ("--replicas", COUNT, 1, "copies of the shards: one a node, say"),
            ("--plan", bool, False, "print the memory, time and disk that the run takes, and stop"),
            ("--world_size", WHOLE, 0, "--plan: number of GPUs (0: as found)"),
            ("--gpu", str, "", "--plan: the card's name, or its GiB (as found)"),
            ("--out", str, "results/omni-avqa", "the run's folder; checkpoints in it must be your own"),
            ("--save_minutes", POSITIVE, 20, "minutes between checkpoints; the first after 5"),
            ("--save_every", WHOLE, 0, "steps between checkpoints instead (0: by minutes)"),
            ("--keep", COUNT, 2, "checkpoints kept (12 bytes a parameter each)"),
            ("--save_model_every", WHOLE, 0, "steps between model folders (0: the last alone)"),
            ("--explain", bool, False, "print one question's step with all its numbers, and stop"),
        ],
    )
    return parser.parse_args(argv)


def check_arguments(config: Namespace) -> None:
    """InputError for options that contradict one another, before anything is read."""
    files = len(config.data)
    for name in ("audio_dir", "shares"):
        given = len(getattr(config, name))
        if given not in (1, files):
            raise InputError(f"--{name}: {given} for {files} files; give 1 or {files}")


# ------------------------------------------------------------------------------------------------- the run


class Run:
    """Policy, reference, optimizer and data of a run, and the number of steps taken."""

    def __init__(self, config: Namespace, loaded: Loaded, device: torch.device):
        self.config = config
        self.out = Path(config.out)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.device = device
        self.dtype = getattr(torch, fsdp.compute_dtype(config.dtype, device))
        self.reward = find_reward(config.reward)
        self.held_out = loaded.held_out
        self.hears = not config.no_audio and loaded.longest_clip > 0
        self.load_models(loaded.longest_clip)
        self.step = 0
        self.bad_clips = 0
        self.journal = None  # rank 0's
        self.questions = Questions(
            loaded.files,
            self.policy.prompts.encode,
            config,
            rank=self.rank,
            world=self.world,
        )

    def load_models(self, longest_clip: float) -> None:
        """The policy in fp32, the reference in the compute dtype, and AdamW on what learns.

        With --lora there is one model in the compute dtype, frozen: without its pairs it is the reference.
        """
        config = self.config
        stored = self.dtype if config.lora else torch.float32
        policy = empty_lm(config.model, stored, self.hears, config.prompt)
        longest = min(longest_clip, policy.prompts.seconds)  # what is longer is cut
        self.plan = choose_plan(
            policy.model,
            self.world // config.replicas,
            self.dtype,
            config,
            self.device,
            longest,
        )
        layout = self.plan.layout
        self.layout = layout
        log.info(plan_line(self.plan))
        if layout.checkpointing:
            fsdp.checkpoint_activations(policy)
        self.mesh = fsdp.make_mesh(self.device, config.replicas)
        on_host = layout.offload.startswith("on")
        self.policy = self.place(policy, layout.reshard, on_host=on_host)
        self.reference = None
        if config.lora:
            self.pairs = lora.attach(self.policy, config.lora, 2 * config.lora, seed=config.seed)
        if config.lora and config.beta:
            self.reference = self.pairs
        elif config.beta:
            reference = empty_lm(config.model, self.dtype, self.hears, config.prompt)
            # no backward comes: each layer's gathered weights go once they were used
            self.place(reference, True, on_host="reference" in layout.offload)
            self.reference = reference.requires_grad_(False)
        self.parameters = {}
        for name, p in self.policy.named_parameters():
            if p.requires_grad:
                self.parameters[name] = p
        learning = list(self.parameters.values())
        self.optimizer = fsdp.make_optimizer(learning, config.lr, layout.offload == "moments")

    def place(self, lm: AudioLM, reshard: bool, *, on_host: bool) -> AudioLM:
        """An empty model as shards where that is of use, then its weights; never whole in any process."""
        several = self.world > 1 and (reshard or not self.config.lora)
        if several or on_host or lm.model.dtype != self.dtype:
            fsdp.shard(
                lm,
                self.mesh,
                self.dtype,
                reshard=reshard,
                gathered_rollout=self.layout.gathered_rollout,
                cpu_offload=on_host,
            )
        return load_weights(lm, "cpu" if on_host else self.device, compute=self.device)

    def batches(self) -> Iterator:
        """This process's questions of each step left, decoded ahead by a thread; replaced clips are named."""
        each = self.questions.each
        numbers = range(self.step * each, self.config.steps * each)
        stream = ahead(self.questions.__getitem__, numbers, 4 * each)
        for batch in zip(*[stream] * each, strict=True):
            for one in batch:
                for why in one.bad:
                    log.warning("step %d: replaced: %s", one.step, why)
            yield batch

    def take_step(self, asked: Sequence[Asked]) -> tuple[dict, list]:
        """One step of Section III-B on this process's questions, in the paper's order -> the metrics as sums
        over the questions, and all that was said."""
        config = self.config
        totals = {}
        rollouts = []
        size = self.layout.questions_per_pass  # what goes through at once changes memory, not the result
        with fsdp.timed(totals, "seconds_rollout"):
            for first in range(0, len(asked), size):
                # Roll out G responses to each question; rewards, Eq. 2; advantages, Eq. 1.
                some = asked[first : first + size]
                rollouts.append(grpo.roll_out(self.policy, some, config, self.reward))
        for rollout in rollouts:
            metrics = grpo.rollout_metrics(rollout, self.policy.eos, config.prompt)
            grpo.add(totals, metrics)
        length = totals["completion_length"] / len(asked)
        if config.loss == "token":
            length = sum(fsdp.gather_objects(length)) / self.world
        for _ in range(config.updates):
            for rollout in rollouts:
                share = len(rollout.asked) / len(asked)
                with fsdp.timed(totals, "seconds_score"):
                    # Score: the log-probs of every response's tokens, under the reference and the policy.
                    scores = grpo.score(self.policy, self.reference, rollout)
                    # Loss, Eq. 3 and 4.
                    loss, found = grpo.rollout_loss(scores, rollout, config, length)
                with fsdp.timed(totals, "seconds_update"):
                    (loss * share).backward()
                grpo.add(totals, found, len(rollout.asked) / config.updates)
            with fsdp.timed(totals, "seconds_update"):
                self.update(asked)
        self.step += 1
        return totals, rollouts

    def update(self, asked: Sequence[Asked]) -> None:
        """Clip the gradients and step; LocalError, before any weight moves, where they are not finite."""
        config = self.config
        learning = list(self.parameters.values())
        if config.lora:
            fsdp.average_gradients(learning)
        self.grad_norm = fsdp.clip_gradients(learning, config.max_grad_norm)
        if not math.isfinite(self.grad_norm):
            ids = [one.question.id for one in asked]
            raise LocalError(f"step {self.step + 1}: loss or gradient is not finite; asked here: {ids}")
        self.lr = config.lr * (config.steps - self.step) / config.steps  # linear to 0
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        fsdp.release(self.policy)

    def row(self, parts: list[dict]) -> dict[str, float]:
        """The step's row for the log, from the sums of all processes."""
        row = {"step": self.step}
        for name in parts[0]:
            count = self.config.batch
            if name.startswith("seconds"):  # of a process, not of a question
                count = self.world
            row[name] = sum(part[name] for part in parts) / count
        row["grad_norm"] = self.grad_norm
        row["learning_rate"] = self.lr
        row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20  # 0 on a CPU
        row["bad_clips"] = self.bad_clips
        return row

    def score_held_out(self) -> None:
        """Log the share of the held-out questions answered right, greedily, by the benchmarks' string match.

        All processes answer all of them: their collectives pair up, and it is seconds of a run of hours.
        """
        count = len(self.held_out)
        if count == 0:
            return
        started = time.perf_counter()
        right = 0
        for first in range(0, count, 16):
            questions = self.held_out[first : first + 16]
            prompts = []
            for question in questions:
                try:
                    prompts.append(self.policy.encode(question, self.hears))
                except InputError as error:
                    log.warning("held out, asked without its clip: %s", error)
                    prompts.append(self.policy.encode(question, use_audio=False))
            answers = self.policy.generate(prompts, self.config.max_new_tokens)
            for question, (answer,) in zip(questions, answers, strict=True):
                said = final_answer(self.policy.decode(answer), self.config.prompt)
                right += string_match(question.answer, said, question.choices)
        fsdp.release(self.policy)
        if self.journal:
            low, high = wilson(right, count)
            row = {
                "step": self.step,
                "eval_accuracy": right / count,
                "eval_low": low,
                "eval_high": high,
                "seconds_eval": time.perf_counter() - started,
            }
            log.info(f"step {self.step}: held out {right / count:.3f} ({right} of {count})")
            self.journal.write(row)

    def state(self) -> dict[str, Tensor]:
        """What a step changes: tensors, saved from and loaded into in place."""
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"weights.{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def save(self) -> None:
        about = {
            "step": self.step,
            "bad_clips": self.bad_clips,
        }
        fsdp.save_checkpoint(self.out, self.step, self.state(), about, keep=self.config.keep)

    def resume(self) -> None:
        """Go on from --out's newest whole checkpoint, if any. InputError where the disk has no room."""
        found = fsdp.newest_checkpoint(self.out)
        need = sum(self.plan.disk.values()) / 2**30
        free = shutil.disk_usage(self.out).free / 2**30
        if free < need and not found:
            raise InputError(f"{self.out}: {need:.1f} GiB are needed (--keep), {free:.1f} are free")
        if found:
            about = parse_json(read_text(found / "run.json"))
            dcp.load(self.state(), checkpoint_id=found)  # in place
            self.step = about["step"]
            self.bad_clips = about["bad_clips"]
        if self.rank > 0:
            return
        for name in ("log.jsonl", "samples.jsonl"):  # up to this step, whatever has happened to them since
            (self.out / name).unlink(missing_ok=True)
            if found and (found / name).exists():
                shutil.copy(found / name, self.out)
        self.journal = Journal(self.config, self.step)

    def save_model(self, suffix: str = "") -> None:
        """O/model or O/model-step-N, with a model card; with --lora, O/adapter as well. Collective."""
        config = self.config
        if config.lora and self.rank == 0:
            lora.save_adapter(self.pairs, self.out / f"adapter{suffix}", config.model)
        card = {**vars(config), "steps": self.step}
        self.policy.save(self.out / f"model{suffix}", card)  # last: with it the run is finished


def settings(config: Namespace, loaded: Loaded) -> dict:
    """What decides a run's result: options, and what stands in the files that they name."""
    decisive = vars(config).copy()
    for name in FREE.split():
        del decisive[name]
    decisive["weights"] = checkpoint_hash(find_model(config.model))
    decisive["questions"] = questions_hash(sum(loaded.files, loaded.held_out))
    file, _, _ = config.reward.rpartition(":")
    if file:
        decisive["reward"] += f" {sha256(read_text(file).encode())}"
    return decisive


class Journal:
    """What rank 0 writes: log.jsonl and samples.jsonl, lines on the terminal, TensorBoard's events if it can.

    A rising reward proves nothing: what would make it look good without being good is told in words, once.
    """

    def __init__(self, config: Namespace, step: int):
        self.config = config
        self.out = Path(config.out)
        rows = rows_of(self.out / "log.jsonl")
        self.rows = [row for row in rows if "loss" in row]  # of the steps
        self.told = {}  # doubts, in words
        self.board = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out, purge_step=step + 1)  # later steps will come again

    def write(self, row: dict) -> None:
        append_rows(self.out / "log.jsonl", [row])
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["step"])

    def write_step(self, row: dict, rollout: grpo.Rollout) -> None:
        """A step, and of its first question all that was said."""
        self.write(row)
        self.rows.append(row)
        one = rollout.asked[0]
        sample = {
            "step": one.step,
            "k": one.k,
            **vars(one.question),
        }
        del sample["meta"]
        sample["responses"] = rollout.texts[0]
        sample["rewards"] = rollout.rewards[0].tolist()
        sample["advantages"] = rollout.advantages[0].tolist()
        append_rows(self.out / "samples.jsonl", [sample])
        for name, words in doubts(self.rows, self.config.format_weight).items():
            if name not in self.told:
                self.told[name] = f"step {row['step']}: {words} (an answer: {rollout.texts[0][0]!r:.80})"
                log.warning(self.told[name])
        if row["step"] % math.ceil(self.config.steps / 10) == 0:
            last = self.rows[-WINDOW:]
            shown = [f"{name} {row[name]:.2f} (mean {mean(last, name):.2f})" for name in SHOWN]
            pace = sum(mean(last, name) for name in row if name.startswith("seconds"))
            hours = pace * (self.config.steps - row["step"]) / 3600
            shown.append(f"{pace:.2g} s a step, {hours:.1f} hours left")
            log.info("step %d: %s", row["step"], ", ".join(shown))

    def summary(self) -> None:
        """The run's last words: what is doubtful, and what to do next."""
        print(f"saved {self.out}/model", *self.told.values(), sep="\n")
        print(f"next: python evaluate.py --model {self.out}/model --data BENCHMARK.json --audio_dir CLIPS")
        print(f"      python report.py {self.out.parent}")


def train(config: Namespace) -> int:
    """The whole run, from where it was left. Returns the exit code."""
    if config.plan:
        print_plan(config)
        return 0
    check_arguments(config)
    rank, world, device = fsdp.start_processes()
    if config.explain:
        config.batch = 1  # which several processes cannot share
    set_batch(config, world)
    config.dtype = fsdp.compute_dtype(config.dtype, device)
    out = Path(config.out)
    if rank == 0 and not config.explain:
        out.mkdir(parents=True, exist_ok=True)
        held = one_writer(out / ".lock")  # noqa: F841 (until the process ends)
    dist.barrier()  # nothing is read before
    loaded = load_questions(config, partial(fsdp.share_out, check_clips))
    now = settings(config, loaded)
    written = [out / name for name in ("config.json", "log.jsonl", "model", "adapter")]
    if not config.explain and made_before(out / "config.json", written, now) and written[2].exists():
        log.info("%s/model exists, so this run is finished; take another --out for a new one", out)
        return 0
    run = Run(config, loaded, device)
    if config.explain:
        explain(run)
        return 0
    run.resume()
    if rank == 0:
        about = {
            **vars(config),
            **now,
            "layout": str(run.layout),
            "parameters": run.plan.whole,
        }
        write_text(out / "config.json", json.dumps(about, indent=1))
    with logging_redirect_tqdm(), closing(fsdp.Stop()) as stop:
        return learn(run, stop)


def learn(run: Run, stop: fsdp.Stop) -> int:
    """Step after step until the last, or until a signal -> the exit code. What is due after a step is done
    before the next one, so that a run which goes on from its checkpoint does it too."""
    config = run.config
    saved_at = time.monotonic() - 60 * max(0, config.save_minutes - FIRST_SAVE)
    ready = time.perf_counter()
    bar = tqdm(
        total=config.steps,
        initial=run.step,
        unit="step",
        disable=run.rank > 0,
    )
    with bar:  # so that it ends before an error is told
        for asked in run.batches():
            waited = time.perf_counter() - ready
            if run.step % config.eval_every == 0:
                run.score_held_out()
            if run.step and config.save_model_every and run.step % config.save_model_every == 0:
                run.save_model(f"-step-{run.step}")
            totals, rollouts = run.take_step(asked)
            totals["seconds_wait"] = waited
            totals["bad_clips"] = sum(len(one.bad) for one in asked)
            bar.update()
            is_due = time.monotonic() - saved_at > 60 * config.save_minutes
            if config.save_every:
                is_due = run.step % config.save_every == 0
            mine = (totals, is_due, stop.signal)
            shared = fsdp.gather_objects(mine)
            parts, due, signals = zip(*shared, strict=True)
            for part in parts:
                run.bad_clips += part["bad_clips"]
            if run.journal:
                run.journal.write_step(run.row(parts), rollouts[0])
            if run.bad_clips > MOST_BAD * max(100, run.step * config.batch):
                raise InputError(f"{run.bad_clips} clips could not be decoded, each named above")
            signal = max(signals)
            if signal:
                stop.close()  # all have come to the end of the step, and may take their time
            if signal or (due[0] and run.step < config.steps):  # rank 0's clock decides for all
                run.save()
                saved_at = time.monotonic()
            if signal:
                log.info("stopped by a signal; step %d is saved, the same command goes on", run.step)
                return 128 + signal
            ready = time.perf_counter()
    run.score_held_out()
    run.save_model()
    if run.journal:
        os.sync()  # the disk has what the checkpoints led to
        shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
        run.journal.summary()
    return 0


def explain(run: Run) -> None:
    """--explain: one question's step with all its numbers; nothing is written."""
    (one,) = next(run.batches())
    question = one.question
    ids = one.prompt.input_ids
    heard = int((ids == run.policy.prompts.audio_token_id).sum())
    print(f"question  {question.id}, clip {question.audio}, right answer {question.answer!r}")
    print(f"prompt    {len(ids)} tokens, of which {heard} audio ({one.prompt.frames / 100:.1f} s); its text:")
    print(f"          {prompt_text(question, run.config.prompt)}")
    totals, (rollout,) = run.take_step([one])
    for g, tokens in enumerate(rollout.responses[0]):
        print(f"answer {g + 1}  {rollout.texts[0][g]!r}")
        print(
            f"          reward {rollout.rewards[0, g]:g} (Eq. 2), "
            f"advantage {rollout.advantages[0, g]:+.2f} (Eq. 1)"
        )
        for token, logp in zip(tokens, rollout.old_logps[g], strict=False):  # padding behind
            text = run.policy.prompts.tokenizer.decode([token])
            print(f"          {text!r:20} log-prob {logp:8.4f}")
    for name in ("kl", "entropy", "loss"):
        print(f"{name:9} {totals[name]:.6f}")


def main() -> None:
    fsdp.run(lambda: train(parse()))


if __name__ == "__main__":
    main()
