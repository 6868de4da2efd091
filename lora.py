"""LoRA (arXiv 2106.09685): low-rank pairs beside the decoder's linear layers. The paper trains all weights.

    python train.py --lora 16 --lr 1e-4 --out results/lora          (O/adapter, and O/model with it merged)
    python evaluate.py --model BASE --adapter results/lora/adapter --data F --out P

A linear layer W becomes W + (alpha / rank) B A: W frozen, A (rank, in) random, B (out, rank) zero at first.
With its pairs switched off the policy is the base, which is the reference of Eq. 4: no second model is held.
O/adapter is in PEFT's published format, whose names follow the real class's modules; peft is not needed.
"""

import json
import math
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from files import InputError
from model import AudioLM, Scores
from weights import file_of, first_line, opened, read_small_file

TARGET = r"(.*\.)?language_model\.layers\.\d+\.\w+\.(q|k|v|o|gate|up|down)_proj"  # a whole module's name
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
UNUSUAL = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


class Pairs:
    """All pairs of a model: what they are scaled by, and their switch. Called after each linear layer."""

    def __init__(self, lm: AudioLM, rank: int, alpha: float):
        self.lm = lm
        self.rank = rank
        self.alpha = alpha
        self.are_on = True

    def __call__(self, linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """W x (..., out) -> W x + (alpha / rank) B A x, in the compute dtype as the master weights' own."""
        if not self.are_on:
            return output
        (x,) = inputs
        low = F.linear(x, linear.lora_A.weight.to(x.dtype)) * (self.alpha / self.rank)
        return output + F.linear(low, linear.lora_B.weight.to(x.dtype))

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A parameter of the base with its pair added, in fp32; as it is where it has none."""
        module, _, kind = name.rpartition(".")
        linear = self.lm.model.get_submodule(module)
        if kind != "weight" or not hasattr(linear, "lora_A"):
            return weight
        product = linear.lora_B.weight.detach() @ linear.lora_A.weight.detach()
        return weight.float() + product * (self.alpha / self.rank)

    def score(self, prompts: list, groups: list[list[Tensor]]) -> Scores:
        """What the base says of the responses: a reference for grpo.step."""
        self.are_on = False
        try:
            return self.lm.score(prompts, groups)
        finally:
            self.are_on = True


def linear_layers(lm: AudioLM) -> dict[str, nn.Linear]:
    """Module name -> each linear layer that gets a pair: the decoder's, not the audio tower's of like names."""
    layers = {}
    for name, module in lm.model.named_modules():
        if re.fullmatch(TARGET, name):
            layers[name] = module
    return layers


def attach(lm: AudioLM, rank: int, alpha: float, seed: int = 0) -> Pairs:
    """Freeze a model whose weights are read, sharded or not; add fp32 pairs, whole in each process."""
    lm.requires_grad_(False)
    numbers = torch.Generator().manual_seed(seed)  # on the CPU: the same A on all devices and processes
    pairs = Pairs(lm, rank, alpha)
    for linear in linear_layers(lm).values():
        linear.lora_A = nn.Linear(linear.in_features, rank, bias=False, device=lm.device)
        linear.lora_B = nn.Linear(rank, linear.out_features, bias=False, device=lm.device)
        bound = 1 / math.sqrt(linear.in_features)  # PEFT's
        first = torch.empty(linear.lora_A.weight.shape).uniform_(-bound, bound, generator=numbers)
        linear.lora_A.weight.data.copy_(first)
        linear.lora_B.weight.data.zero_()
        linear.register_forward_hook(pairs)
    lm.merged = pairs.merged
    return pairs


def pair_weights(lm: AudioLM) -> dict[str, Tensor]:
    """PEFT's name -> A or B of a pair."""
    weights = {}
    for name, parameter in lm.model.named_parameters():
        if ".lora_" in name:
            weights[f"base_model.model.{name}"] = parameter.detach()
    return weights


def save_adapter(pairs: Pairs, folder: Path, base: str) -> None:
    """A folder in PEFT's format, renamed into place. By one process. InputError if the disk is full."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": pairs.rank,
        "lora_alpha": pairs.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": TARGET,
        "inference_mode": True,
    }
    scratch = folder.with_name(folder.name + ".writing")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        save_file(pair_weights(pairs.lm), scratch / WEIGHTS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except (SafetensorError, OSError) as error:
        raise InputError(f"the adapter cannot be saved to {folder}: {first_line(error)}") from None


def load_adapter(lm: AudioLM, folder: Path) -> None:
    """Put a saved adapter's pairs beside the model's layers. InputError if they are of another base."""
    config = read_small_file(folder, CONFIG)
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    unusual = [option for option in UNUSUAL if config.get(option)]
    if unusual or type(rank) is not int or type(alpha) not in (int, float):
        why = ", ".join(unusual) or "no r or lora_alpha"
        raise InputError(f"{folder}/{CONFIG} is missing, or of no plain LoRA adapter ({why})")
    check_base(folder, config.get("base_model_name_or_path"), lm.folder)
    path = file_of(folder, WEIGHTS)
    check_shapes(lm, path, rank)
    attach(lm, rank, alpha)
    saved = load_file(path)
    for name, weight in pair_weights(lm).items():
        weight.copy_(saved[name])


def check_base(folder: Path, named: str, base: Path) -> None:
    """Compare the adapter's base with the model's folder: the same one or, elsewhere, one of its name."""
    named = Path(str(named))
    parts = [part.split("--")[-1] for part in base.resolve().parts]  # hub cache: models--owner--name
    same = named.name in parts
    if named.is_dir():
        same = named.samefile(base)
    if not same:
        raise InputError(f"{folder} is an adapter of {named}, not of {base}: give that --model")


def check_shapes(lm: AudioLM, path: Path, rank: int) -> None:
    """Compare the file's header with the model's layers, before the pairs get any memory."""
    shapes = {}
    for name, linear in linear_layers(lm).items():
        shapes[f"base_model.model.{name}.lora_A.weight"] = [rank, linear.in_features]
        shapes[f"base_model.model.{name}.lora_B.weight"] = [linear.out_features, rank]
    file = opened(path)
    found = dict.fromkeys(file.keys())
    for name in found:
        found[name] = file.get_slice(name).get_shape()
    for name in sorted(shapes | found):
        if found.get(name) != shapes.get(name):
            saved = found.get(name, "missing")
            wanted = shapes.get(name, "without it")
            raise InputError(f"{path}: {name} is {saved}, the model {wanted}: an adapter of another model")
