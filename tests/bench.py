"""Ratios against the published style of training and evaluation, both sides in one run.

    python tests/bench.py                       # everything, about 15 minutes on 2 cores
    python tests/bench.py speed memory --repeat 5

The model is random and of middle size (50-75M parameters, vocabulary 32,000), the clip 10 s of noise, the
responses 8 tokens each. "Published style" is a loop over plain transformers as GRPO trainers for audio LLMs
have it: the prompt repeated G times, `generate`, logits at every position, the reference the same way.
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence

import fsdp
import grpo
from data import Asked, Question
from gpu import make_checkpoint, make_questions
from model import load_model
from reward import accuracy_reward
from tiny import make_world
from train import parse

NEW_TOKENS = 8
AUDIO = {"d_model": 384, "encoder_layers": 6, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
TEXT = {"hidden_size": 512, "vocab_size": 32_000, "num_attention_heads": 8}
SIZES = {
    "omni": TEXT | {"intermediate_size": 2048, "num_hidden_layers": 8, "num_key_value_heads": 2},
    "qwen2audio": TEXT | {"intermediate_size": 1376, "num_hidden_layers": 4, "num_key_value_heads": 8},
}


def middle_model(folder, family):
    """A random model of middle size with the tiny world's tokenizer, and a clip of 10 s."""
    make_world(folder / "tiny", family, effort=0)
    make_checkpoint(folder / family, folder / "tiny", SIZES[family], AUDIO, torch.float32)
    make_questions(folder / family, 1, 10)
    return folder / family


def the_question(folder):
    text = "What is the source of the sound in the audio, and what happens after it?"
    choices = ("motorboat", "sailing boat", "dog", "car")
    return Question("1", text, choices, "dog", str(folder / "0.wav"), {})


class Published:
    """One question in the published style."""

    def __init__(self, folder):
        self.lm = load_model(folder)  # for the tokens of the prompt, the same as ours
        self.cls = self.lm.prompts.family.model_class
        self.model = self.cls.from_pretrained(folder).eval()
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-6, weight_decay=0.0, fused=True)
        self.ids = self.lm.encode(the_question(folder)).input_ids[None]
        self.audio = self.features([folder / "0.wav"])
        del self.lm.model

    def features(self, clips):
        """Padded to the longest that the family takes, as its processor does."""
        batch = self.lm.prompts.extractor(
            [soundfile.read(clip, dtype="float32")[0] for clip in clips],
            sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        return {"input_features": batch.input_features, "feature_attention_mask": batch.attention_mask}

    def log_probs(self, model, ids, group):
        audio = {name: x.repeat_interleave(group, 0) for name, x in self.audio.items()}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **audio).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return logps[:, self.ids.shape[1] - 1 :]

    def generate(self, ids, mask, audio, **how):
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        with torch.no_grad():
            return self.model.generate(input_ids=ids, attention_mask=mask, **audio, **length, **how)

    def question(self, group):
        sampling = {"do_sample": True, "temperature": 1.2, "top_k": 0, "num_return_sequences": group}
        ids = self.generate(self.ids, torch.ones_like(self.ids), self.audio, **sampling)
        logps = self.log_probs(self.model, ids, group)
        with torch.no_grad():
            ref_logps = self.log_probs(self.reference, ids, group)
        plain_loss(logps, ref_logps, group).backward()
        optimizer_step(self.model, self.optimizer)


def plain_loss(logps, ref_logps, group):
    advantages = torch.arange(group, device=logps.device).float() % 2 * 2 - 1
    kl = (ref_logps - logps).exp() - (ref_logps - logps) - 1
    return -((logps - logps.detach()).exp() * advantages[:, None] - 0.04 * kl).mean()


def optimizer_step(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class Ours:
    """A question through the project's own path, from rollout to update."""

    def __init__(self, folder):
        fsdp.be_deterministic()
        self.policy, self.reference = load_model(folder), load_model(folder).requires_grad_(False)
        self.policy.eos = torch.tensor([-1])  # every response has all its tokens, as on the other side
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), 1e-6, weight_decay=0.0, fused=True)
        question = the_question(folder)
        self.asked = [Asked(1, 0, question, self.policy.encode(question), ())]

    def question(self, group):
        config = parse(["--group_size", str(group), "--max_new_tokens", str(NEW_TOKENS)])
        rollout = grpo.roll_out(self.policy, self.asked, config, accuracy_reward)
        scores = grpo.score(self.policy, self.reference, rollout)
        loss, _ = grpo.rollout_loss(scores, rollout, config, 0.0)
        loss.backward()
        optimizer_step(self.policy, self.optimizer)


SIDES = {"published": Published, "ours": Ours}


def seconds(calls, repeat):
    """{name: call} -> {name: median seconds}, the sides taking turns since the machine is noisy."""
    times = {name: [] for name in calls}
    for _ in range(repeat + 1):  # the first round warms up
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def bench_speed(folder, family, repeat):
    published, ours = Published(folder), Ours(folder)
    calls = {"published": lambda: published.question(4), "ours": lambda: ours.question(4)}
    calls["G = 16"] = lambda: ours.question(16)
    t = seconds(calls, repeat)
    goal = {"omni": "≥ 5.2", "qwen2audio": "≥ 14"}[family]
    row(f"seconds a question, published / ours, {family}", t["published"], t["ours"], goal)
    row(f"ours at G = 16 / at G = 4, {family}", t["G = 16"], t["ours"], "≤ 1.5")


def bench_memory(folder, family, repeat):
    """Peak resident memory of a question above what weights, reference and optimizer take, in fresh
    processes.
    """

    def peak(side, group):
        command = [sys.executable, __file__, "peak", "--folder", str(folder), "--side", side]
        command += ["--group", str(group)]
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)

    ours = {group: peak("ours", group) for group in (4, 8, 16)}
    row(f"MB above weights and optimizer, G = 16 / G = 4, {family}", ours[16], ours[4], "≤ 1.4")
    row(f"the same, published / ours, G = 8, {family}", peak("published", 8), ours[8], "≥ 5")


def print_peak(folder, side, group):
    side = SIDES[side](folder)
    side.question(2)  # the optimizer's state exists from here on; gradients are freed

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    side.question(group)
    print(status("VmHWM") - before)


def bench_evaluation(folder, family, repeat):
    """The published evaluation loop (features padded as its processor does, left-padded batches of 16 in the
    benchmark's order, generate) and ours. 32 clips: half of 10 s, half between 2 and 30 s.
    """
    published, ours, rng = Published(folder), load_model(folder), np.random.default_rng(0)
    ours.eos = torch.tensor([-1])
    questions = []
    for i, length in enumerate(np.where(np.arange(32) % 2, 10, rng.uniform(2, 30, 32))):
        clip = folder / f"eval-{i}.wav"
        soundfile.write(clip, rng.standard_normal(int(16_000 * length)).astype("float32") * 0.1, 16_000)
        questions.append(replace(the_question(folder), id=str(i), audio=str(clip)))
    ids_of = {q.id: ours.encode(q).input_ids for q in questions}  # tokens are not what is measured
    questions.sort(key=lambda question: os.path.getsize(question.audio))  # as evaluate.py does

    def all_of_theirs():
        for batch in (questions[:16], questions[16:]):
            ids = [ids_of[question.id].flip(0) for question in batch]
            padded = pad_sequence(ids, batch_first=True, padding_value=-1).flip(1)
            audio = published.features([question.audio for question in batch])
            published.generate(padded.clamp(min=0), (padded >= 0).long(), audio, do_sample=False)

    def all_of_ours():
        for b in range(0, 32, 4):  # 32 in batches of 4 lie as close in length as 1,000 in batches of 64
            prompts = [ours.encode(question) for question in questions[b : b + 4]]
            ours.generate(prompts, NEW_TOKENS)

    t = seconds({"published": all_of_theirs, "ours": all_of_ours}, repeat)
    what = f"questions a second in evaluation, ours / published, {family}"
    row(what, 32 / t["ours"], 32 / t["published"], "≥ 3")


def row(what, left, right, goal):
    print(f"| {what} | {left:.3g} | {right:.3g} | {left / right:.2f} | {goal} |", flush=True)


BENCHES = {"speed": bench_speed, "memory": bench_memory, "evaluation": bench_evaluation}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=list(BENCHES), help=f"of {', '.join(BENCHES)} (all)")
    parser.add_argument("--family", default="omni qwen2audio", help="family or families")
    parser.add_argument("--repeat", type=int, default=3)
    for name in ("folder", "side", "group"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == ["peak"]:
        return print_peak(Path(args.folder), args.side, int(args.group))
    with tempfile.TemporaryDirectory() as scratch:
        print("| what | left | right | ratio | goal |\n|---|---|---|---|---|")
        for family in args.family.split():
            folder = middle_model(Path(scratch) / family, family)
            for what in args.what:
                BENCHES[what](folder, family, args.repeat)


if __name__ == "__main__":
    main()
