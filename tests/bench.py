"""Ratios against the published style of training and against the floor of the arithmetic. Both sides in one
run.

    python tests/bench.py                       # everything, about 12 minutes on 2 cores
    python tests/bench.py speed memory --repeat 5
    python tests/bench.py plan                  # no timing: what 7B and 3B take on 24 to 80 GB

The model is random and of middle size (50-75M parameters, vocabulary 32,000), the clip 10 s of noise, the
responses 8 tokens each. "Published style" is a loop over plain transformers as GRPO trainers for audio LLMs
have it: the prompt repeated G times, `generate`, logits at every position, the reference the same way.
"Floor" is the least arithmetic of one question, bare: one prefill, the decode steps, one forward and backward
over prompt and responses, one reference forward, clipping and the optimizer's step.
"""

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import soundfile
import torch
from transformers import AutoConfig

from data import Question
from grpo import question_loss
from model import load_model
from tiny import make_world
from train import Config
from weights import FAMILIES

NEW_TOKENS = 8
SIZES = {
    "omni": {
        "audio_config": {
            "d_model": 384,
            "encoder_layers": 6,
            "encoder_attention_heads": 6,
            "encoder_ffn_dim": 1536,
        },
        "text_config": {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "vocab_size": 32000,
        },
        "heads": {"num_attention_heads": 8, "num_key_value_heads": 2},
    },
    "qwen2audio": {
        "audio_config": {
            "d_model": 384,
            "encoder_layers": 6,
            "encoder_attention_heads": 6,
            "encoder_ffn_dim": 1536,
        },
        "text_config": {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 4,
            "vocab_size": 32000,
        },
        "heads": {"num_attention_heads": 8, "num_key_value_heads": 8},
    },
}


def middle_model(folder, family):
    """A random model of middle size in `folder`, with the tiny world's tokenizer, and a 10 s clip beside
    it.
    """
    world, folder = folder / "tiny", folder / family
    make_world(world, family, train=False)
    config = json.loads((world / "model" / "config.json").read_text())
    inner = config.get("thinker_config", config)
    sizes = SIZES[family]
    inner["audio_config"].update(sizes["audio_config"])
    inner["text_config"].update(sizes["text_config"], **sizes["heads"])
    inner["text_config"].pop("layer_types", None)
    if family == "omni":
        inner["audio_config"]["output_dim"] = inner["text_config"]["hidden_size"]
        inner["vision_config"]["out_hidden_size"] = inner["text_config"]["hidden_size"]
        rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
        inner["text_config"]["rope_parameters"] = rope
    shutil.copytree(world / "model", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "config.json").write_text(json.dumps(inner))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    FAMILIES[config.model_type].model_class(config).save_pretrained(folder)
    noise = np.random.default_rng(0).standard_normal(160_000).astype("float32") * 0.1
    soundfile.write(folder / "clip.wav", noise, 16_000)
    return folder


def the_question(folder):
    text = "What is the source of the sound in the audio, and what happens after it?"
    return Question(
        "1", text, ("motorboat", "sailing boat", "dog", "car"), "dog", str(folder / "clip.wav"), {}
    )


class Published:
    """One question in the published style."""

    def __init__(self, folder):
        self.lm = load_model(folder)  # for the tokens of the prompt, the same as ours
        self.cls = self.lm.prompts.family.model_class
        self.model = self.cls.from_pretrained(folder).eval()
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-6, weight_decay=0.0, fused=True)
        prompt, clip = (
            self.lm.encode(the_question(folder)),
            soundfile.read(folder / "clip.wav", dtype="float32")[0],
        )
        extractor = self.lm.prompts.extractor
        batch = extractor(
            clip, sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        self.ids = prompt.input_ids[None]
        self.audio = {
            "input_features": batch.input_features,
            "feature_attention_mask": batch.attention_mask,
        }
        del self.lm.model

    def log_probs(self, model, ids, group):
        audio = {name: x.repeat_interleave(group, 0) for name, x in self.audio.items()}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **audio).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return logps[:, self.ids.shape[1] - 1 :]

    def question(self, group):
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        with torch.no_grad():
            ids = self.model.generate(
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids), **self.audio, **length,
                do_sample=True, temperature=1.2, top_k=0, num_return_sequences=group,
            )  # fmt: skip
        logps = self.log_probs(self.model, ids, group)
        with torch.no_grad():
            ref_logps = self.log_probs(self.reference, ids, group)
        plain_loss(logps, ref_logps, group).backward()
        optimizer_step(self.model, self.optimizer)


def plain_loss(logps, ref_logps, group):
    advantages = torch.arange(group).float() % 2 * 2 - 1
    kl = (ref_logps - logps).exp() - (ref_logps - logps) - 1
    return -((logps - logps.detach()).exp() * advantages[:, None] - 0.04 * kl).mean()


def optimizer_step(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class Ours:
    """One question through the project's own path: encode, question_loss, backward, step."""

    def __init__(self, folder):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        self.policy, self.reference = load_model(folder), load_model(folder).requires_grad_(False)
        self.policy.eos = torch.tensor(
            [-1]
        )  # so that every response has all its tokens, as on the other side
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), 1e-6, weight_decay=0.0, fused=True)
        self.asked = the_question(folder)
        self.prompt = self.policy.encode(self.asked)

    def question(self, group):
        config = Config(group_size=group, max_new_tokens=NEW_TOKENS)
        generator = torch.Generator().manual_seed(0)
        loss, _, _ = question_loss(self.policy, self.reference, self.prompt, self.asked, config, generator)
        loss.backward()
        optimizer_step(self.policy, self.optimizer)


class Floor(Ours):
    """The arithmetic alone, on the same modules."""

    def question(self, group):
        lm, n = self.policy, len(self.prompt.input_ids)
        with torch.no_grad():
            prefill = lm.prefill([self.prompt])
            cache, eye = prefill.cache.detach(), torch.eye(group, dtype=torch.bool)
            tokens = prefill.logits.argmax(-1).expand(1, group)
            said = [tokens]
            for step in range(NEW_TOKENS - 1):
                mask = torch.cat([torch.ones(group, n, dtype=torch.bool)] + [eye] * (step + 1), 1)[None, None]
                cache = type(cache)(prefix=cache)
                tokens = lm(tokens, torch.full((1, group), n + step), mask, cache).argmax(-1)
                said.append(tokens)
        responses = list(torch.stack(said, -1)[0])
        logps, _ = lm.log_probs(self.prompt, responses)
        with torch.no_grad():
            ref_logps, _ = self.reference.log_probs(self.prompt, responses)
        plain_loss(logps, ref_logps, group).backward()
        optimizer_step(lm, self.optimizer)


SIDES = {"published": Published, "ours": Ours, "floor": Floor}


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
    sides = {name: side(folder) for name, side in SIDES.items()}
    calls = {name: (lambda s=side: s.question(4)) for name, side in sides.items()}
    calls["ours, G = 16"] = lambda: sides["ours"].question(16)
    t = seconds(calls, repeat)
    goal = {"omni": "≥ 4.0", "qwen2audio": "≥ 6"}[family]
    row(f"seconds a question, published / ours, {family}", t["published"], t["ours"], goal)
    row(f"ours / floor, {family}", t["ours"], t["floor"], "≤ 1.12")
    row(f"ours at G = 16 / at G = 4, {family}", t["ours, G = 16"], t["ours"], "≤ 1.5")


def bench_memory(folder, family, repeat):
    """Peak resident memory of a question above what weights, reference and optimizer take, in fresh
    processes.
    """

    def peak(side, group):
        command = [
            sys.executable,
            __file__,
            "peak",
            "--folder",
            str(folder),
            "--side",
            side,
            "--group",
            str(group),
        ]
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


def bench_features(folder, family, repeat):
    lm = load_model(folder)
    clip = soundfile.read(folder / "clip.wav", dtype="float32")[0]
    published = {}

    def theirs():
        published["features"] = lm.prompts.extractor(
            clip, sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )

    torch.set_num_threads(1)  # as in a DataLoader worker
    t = seconds({"published": theirs, "ours": lambda: lm.prompts.features(clip)}, max(repeat, 5))
    ours, frames = lm.prompts.features(clip), int(published["features"].attention_mask.sum())
    error = (published["features"].input_features[0, :, :frames] - ours[:, :frames]).abs().max().item()
    goal = "≥ 20" if family == "omni" else "-"
    row(f"seconds a clip's features, published / ours, {family}", t["published"], t["ours"], goal)
    print(f"    largest difference of the features: {error:.1e}")


def row(what, left, right, goal):
    print(f"| {what} | {left:.3g} | {right:.3g} | {left / right:.2f} | {goal} |", flush=True)


BENCHES = {"speed": bench_speed, "memory": bench_memory, "features": bench_features}


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
