"""LoRA (arXiv 2106.09685): low-rank pairs beside the decoder's linear layers. The paper trains all weights.

    python train.py --lora 64 --lr 1e-5 --out results/lora          (O/adapter, and O/model with it merged)
    python evaluate.py --model BASE --adapter results/lora/adapter --data F --out P

A linear layer W becomes W + (alpha / rank) B A: W frozen, A random, B zero at first. With its pairs off the
policy is the base, the reference of Eq. 4: no second model is held. O/adapter is in PEFT's published format.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from files import InputError
from model import AudioLM, Groups, Prompt, Scores
from weights import door, new_folder, read_small_file

TARGET = r"(.*\.)?language_model\.layers\.\d+\.\w+\.(q|k|v|o|gate|up|down)_proj"  # whole names, as in PEFT
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PLAIN = {"peft_type": "LORA", "bias": "none"}
OTHERS = ["alpha_pattern", "fan_in_fan_out", "modules_to_save", "rank_pattern", "use_dora", "use_rslora"]
PLAIN |= dict.fromkeys(OTHERS)  # what else PEFT can write is another function


class Pairs:
    """All pairs of a model: what they are scaled by, and their switch. A forward hook of each layer."""

    def __init__(self, lm: AudioLM, rank: int, alpha: float):
        self.lm = lm
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.are_on = True

    def __call__(self, linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """W x (..., out) -> W x + scale B A x, in the compute dtype: fp32 would keep x for backward twice."""
        if not self.are_on:
            return output
        x = inputs[0]
        A = linear.lora_A.to(x.dtype)
        B = linear.lora_B.to(x.dtype)
        low = self.scale * F.linear(x, A)  # (..., rank)
        return output + F.linear(low, B)

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A parameter of the base with its pair added, in fp32; as it is where it has none."""
        layer = name.removesuffix(".weight")
        if not re.fullmatch(TARGET, layer):
            return weight
        linear = self.lm.model.get_submodule(layer)
        product = linear.lora_B @ linear.lora_A
        return weight.float() + self.scale * product

    def score(self, prompts: list[Prompt], groups: Groups) -> Scores:
        """What the base says of the responses: the reference of grpo.score."""
        self.are_on = False
        try:
            return self.lm.score(prompts, groups)
        finally:
            self.are_on = True


def attach(
    lm: AudioLM,
    rank: int,
    alpha: float,
    *,
    seed: int = 0,
) -> Pairs:
    """Freeze a model whose weights are read, sharded or not; add fp32 pairs, whole in each process."""
    lm.requires_grad_(False)
    pairs = Pairs(lm, rank, alpha)
    numbers = torch.Generator().manual_seed(seed)  # on the CPU: the same A on all devices and processes
    for name, linear in list(lm.model.named_modules()):
        if not re.fullmatch(TARGET, name):
            continue
        bound = 1 / math.sqrt(linear.in_features)  # PEFT's
        A = torch.empty(rank, linear.in_features)
        A.uniform_(-bound, bound, generator=numbers)
        B = torch.zeros(linear.out_features, rank)
        linear.lora_A = nn.Parameter(A.to(lm.device))
        linear.lora_B = nn.Parameter(B.to(lm.device))
        linear.register_forward_hook(pairs)
    lm.merged = pairs.merged
    return pairs


def pair_weights(lm: AudioLM) -> dict[str, Tensor]:
    """PEFT's name -> A or B of a pair."""
    weights = {}
    for name, parameter in lm.model.named_parameters():
        if ".lora_" in name:
            weights[f"base_model.model.{name}.weight"] = parameter.detach()
    return weights


def save_adapter(pairs: Pairs, folder: Path, base: str) -> None:
    """A folder in PEFT's format, renamed into place. By one process. Raises OSError if the disk is full."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": pairs.rank,
        "lora_alpha": pairs.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": TARGET,
    }
    weights = save(pair_weights(pairs.lm), {"format": "pt"})
    with new_folder(folder) as scratch:
        (scratch / WEIGHTS).write_bytes(weights)
        (scratch / CONFIG).write_text(json.dumps(config, indent=2))


def load_adapter(lm: AudioLM, folder: Path) -> None:
    """Put a saved adapter's pairs beside the model's layers. InputError if they are of another base."""
    config = read_small_file(folder, CONFIG)
    unusual = [key for key, value in PLAIN.items() if (config.get(key) or None) != value]
    if unusual:
        raise InputError(f"{folder}/{CONFIG} is missing, or not of a plain LoRA adapter: {unusual}")
    with door(folder, "holds no adapter that can be read"):
        halves = load_file(folder / WEIGHTS)
        attach(lm, config["r"], config["lora_alpha"])
    wanted = {name: tuple(half.shape) for name, half in pair_weights(lm).items()}
    found = {name: tuple(half.shape) for name, half in halves.items() if half.is_floating_point()}
    if wanted != found:
        name, shape = min(wanted.items() ^ found.items())
        raise InputError(
            f"{folder}: {name} {list(shape)} and this model do not fit: another base or rank, or no floats?"
        )
    for name, half in pair_weights(lm).items():
        half.copy_(halves[name])
