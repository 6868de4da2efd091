"""The model's weights: the hub's files to parameters and back, and the families of models.

Each process reads its own rows of each weight straight from the files. What is saved is the base folder, file
for file, the trained weights in their places: the hub's whole Qwen2.5-Omni gives a whole one again, with the
parts that are never loaded (vision, talker, token2wav, the voices). What the weights compute is in model.py,
who holds which rows of them in fsdp.py.
"""

import functools
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AudioFlamingo3ForConditionalGeneration,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    logging,
)

from files import InputError, first_line, parse_json, read_text, sha256

logging.set_verbosity_error()  # the hub's own Qwen2.5-Omni config draws a page of warnings

# Beside the weights; nothing else of a model folder is fetched or copied. spk_dict.pt, Qwen2.5-Omni's voices,
# is a pickle: copied, never read.
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "spk_dict.pt")
CARD = """---
library_name: transformers
pipeline_tag: audio-text-to-text
{known}---

# {base}, fine-tuned with GRPO on audio questions (arXiv 2505.09439)

{made}
"""
WHOLE = "thinker."  # begins the names of the thinker's weights in the hub's whole Qwen2.5-Omni
NOT_LOADED = ("inv_freq", "audio_bos_eos_token.weight")  # ends of names: tables, an embedding without a use
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


@dataclass(frozen=True)
class Family:
    """What differs between the families of models."""

    model_class: type
    names: tuple  # of pairs (prefix of transformers' parameter names, prefix in the hub's files)
    before_audio: str  # chat template around the audio tokens, as published
    after_audio: str
    system: str = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # its template's own
    seconds: int = 300  # of a clip, which the published processor hears at most


OMNI_NAMES = (
    ("model.language_model.", "model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.visual.", "visual."),
)
OMNI = Family(Qwen2_5OmniThinkerForConditionalGeneration, OMNI_NAMES, "<|audio_bos|>", "<|audio_eos|>")
QWEN3_OMNI = Family(
    Qwen3OmniMoeThinkerForConditionalGeneration,
    OMNI_NAMES,
    "<|audio_start|>",
    "<|audio_end|>",
    system="",  # its template has none
    seconds=2400,  # what its card promises
)
WHISPER_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
QWEN2_AUDIO = Family(
    Qwen2AudioForConditionalGeneration,
    WHISPER_NAMES,
    "Audio 1: <|audio_bos|>",
    "<|audio_eos|>\n",
    seconds=30,
)
AUDIO_FLAMINGO3 = Family(AudioFlamingo3ForConditionalGeneration, WHISPER_NAMES, "", "", seconds=600)
FAMILIES = {
    "qwen2_5_omni": OMNI,
    "qwen2_5_omni_thinker": OMNI,
    "qwen2_audio": QWEN2_AUDIO,
    "audioflamingo3": AUDIO_FLAMINGO3,
    "qwen3_omni_moe": QWEN3_OMNI,
    "qwen3_omni_moe_thinker": QWEN3_OMNI,
}


# --------------------------------------------------------------------------------- a checkpoint's small files


@contextmanager
def door(path: Path | str, fault: str = "cannot be read: fetch the checkpoint again") -> Iterator[None]:
    """The one net around all reading of a checkpoint: whatever is raised within is a line about `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a malformed file makes the libraries raise
        raise InputError(f"{path} {fault} ({first_line(error)})") from None


def find_model(path: Path | str, config_only: bool = False) -> Path:
    """A local folder as it is, a hub name downloaded. Raises InputError if it is neither."""
    if os.path.isdir(path):
        return Path(path)
    wanted = ["config.json"]
    if not config_only:
        wanted = [*SMALL_FILES, "*.safetensors"]
    with door(path, "is no model folder here, and no name of the hub that can be fetched"):
        return Path(snapshot_download(str(path), allow_patterns=wanted))


def files_in(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """A model folder's files by pattern."""
    found = []
    for pattern in patterns:
        found += sorted(folder.glob(pattern))
    return found


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, renamed to `out` when all is in it. What fails within leaves `out` as it was."""
    scratch = out.with_name(out.name + ".writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        shutil.rmtree(out, ignore_errors=True)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_small_file(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint, {} where it is absent. Raises InputError if it holds no JSON object."""
    path = folder / name
    if not path.exists():
        return {}
    with door(path):
        return dict(parse_json(read_text(path)))


def read_config(folder: Path) -> PreTrainedConfig:
    """The language side's config: for the hub's whole Qwen2.5-Omni, its thinker's. Raises InputError."""
    with door(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        kind = config.model_type
        if kind not in FAMILIES:
            raise InputError(f"{folder} holds a model of type {kind!r}; supported: {', '.join(FAMILIES)}")
        if hasattr(config, "thinker_config"):
            dict(read_small_file(folder, "config.json")["thinker_config"])  # which transformers would make up
            config = config.thinker_config
        # Whatever the file says: "eager" would add our bool masks to the logits as numbers, without a word.
        config._attn_implementation = "sdpa"
    return config


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids that end a response: <|im_end|> and what the checkpoint's generation config names."""
    named = read_small_file(folder, "generation_config.json").get("eos_token_id", [])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return torch.as_tensor(np.append(named, end), dtype=torch.int64)  # to one id, or to a list


def checkpoint_hash(folder: Path) -> str:
    """Of a model's JSON files, and of its weights' names and first 256 numbers each."""
    pieces = [path.read_bytes() for path in files_in(folder, ("*.json",))]
    for name, stored in Weights(folder).stored.items():
        first = stored[...].flatten()[:256]  # of a mapped file: no more is read
        pieces.append(f"{name} {first.tolist()}".encode())
    return sha256(b"".join(pieces))


# ---------------------------------------------------------------------------------------- files to parameters


class Weights:
    """What a checkpoint's files hold, by name. Opening checks each file's header against its length."""

    def __init__(self, folder: Path):
        self.files = {}
        self.stored = {}  # safetensors' slices: shape and dtype, and [...] reads one
        for path in files_in(folder, ("*.safetensors",)):
            with door(path, "is no whole safetensors file: cut off, or a git-lfs pointer? Fetch it again"):
                file = safe_open(path, "pt")
                for name in file.keys():  # noqa: SIM118 (no dict)
                    if name in self.files:  # which would be the right one?
                        raise InputError(f"{path} and {self.files[name]} both hold {name}: move one away")
                    self.files[name] = path
                    self.stored[name] = file.get_slice(name)
        self.prefix = ""
        if any(name.startswith(WHOLE) for name in self.files):
            self.prefix = WHOLE

    def stored_name(self, name: str, family: Family) -> str:
        """transformers' parameter name -> the name in these files."""
        for ours, theirs in family.names:
            if name.startswith(ours):
                return self.prefix + theirs + name.removeprefix(ours)
        return self.prefix + name

    def part(self, stored: str) -> str:
        """The part of a model that a weight is of: model, audio_tower, talker, ..."""
        return stored.removeprefix(self.prefix).split(".")[0]


def pieces(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A parameter as views by the names of the files, where each expert of a layer is apart.

    transformers holds them together: gate_up_proj (experts, 2 x width, hidden), down_proj (experts, hidden,
    width). Of shards, which are whole experts, those that are here.
    """
    layer, fused, kind = name.partition(".experts.")
    if not fused:
        return {name: weight}
    first = 0
    if isinstance(weight, DTensor):
        first = weight.__create_chunk_list__()[0].offsets[0]
        weight = weight.to_local()
    parts = kind.removesuffix("_proj").split("_")
    found = {}
    for i, expert in enumerate(weight, first):
        for part, piece in zip(parts, expert.chunk(len(parts)), strict=True):
            found[f"{layer}.experts.{i}.{part}_proj.weight"] = piece
    return found


def empty_model(folder: Path, audio: bool = True) -> nn.Module:
    """The model on the meta device (shapes, no memory), without the parts that no question of ours can use.

    The vision tower, the unused begin/end-of-audio embedding and, with audio=False, the audio side can never
    get a gradient: they are not loaded at all, and `save_model` copies them from the base checkpoint's files.
    """
    config = read_config(folder)
    with door(folder / "config.json", "describes no model"), torch.device("meta"):
        model = FAMILIES[config.model_type].model_class(config)
    unused = [(model.model, "visual"), (model.model.audio_tower, "audio_bos_eos_token")]
    if not audio:
        unused += [(model.model, "audio_tower"), (model.model, "multi_modal_projector")]
    for parent, part in unused:
        setattr(parent, part, None)
    return model


def check_weights(model: nn.Module, family: Family, folder: Path) -> None:
    """Compare the parameters with all files' headers, before they get any memory. Raises InputError."""
    weights = Weights(folder)
    wanted = {}
    for name, parameter in model.named_parameters():
        for piece, view in pieces(name, parameter).items():
            wanted[weights.stored_name(piece, family)] = list(view.shape)
    for name, shape in wanted.items():
        if name not in weights.stored:
            raise InputError(
                f"{folder} has no weight named {name} in *.safetensors (no other format is read): "
                "incomplete, or of another kind of model"
            )
        kind = weights.stored[name].get_dtype()
        found = weights.stored[name].get_shape()
        if kind not in FLOATS or found != shape:
            raise InputError(
                f"{folder}: {name} is {kind} of shape {found}, config.json says {shape}, "
                "and integers (quantized weights) are not read"
            )
    parts = {weights.part(name) for name in wanted}
    parts.add("lm_head")  # of tied embeddings, which the file must not hold twice
    for name in weights.stored.keys() - wanted.keys():
        if weights.part(name) in parts and not name.endswith(NOT_LOADED):
            raise InputError(f"{folder} has a weight {name}, for which config.json has no place")


@torch.no_grad()
def read_weights(lm: nn.Module) -> None:
    """Each process reads its own rows of each weight straight from the hub's files. No collective."""
    weights = Weights(lm.folder)
    wanted = {}
    for name, parameter in lm.model.named_parameters():  # a tied lm_head is in it once, as the embedding
        for piece, view in pieces(name, parameter.data).items():
            wanted[weights.stored_name(piece, lm.prompts.family)] = view
    reader = dcp.HuggingFaceStorageReader(str(lm.folder))
    with door(lm.folder), warnings.catch_warnings(action="ignore"):  # it says that no processes are asked
        dcp.load(wanted, storage_reader=reader, no_dist=True)


def load_weights(
    lm: nn.Module,
    storage: torch.device | str,
    *,
    compute: torch.device | str,
) -> nn.Module:
    """Give an empty model, sharded or not, its memory on `storage` and read the weights into it.

    It computes on `compute`, where its tables are; the two differ where shards lie in host memory.
    """
    lm.device = torch.device(compute)
    lm.to_empty(device=storage)
    lm.model.tie_weights()  # where config.json says so: to_empty has made two parameters of one
    for module in lm.model.modules():
        if list(module.buffers(recurse=False)):  # rotary and sinusoid tables are in no file
            lm.model._init_weights(module)
        for name, table in list(module.named_buffers(recurse=False)):
            setattr(module, name, table.to(compute))
    read_weights(lm)
    return lm


# ---------------------------------------------------------------------------------------- parameters to files


@torch.no_grad()
def save_model(lm: nn.Module, out: Path, settings: dict[str, Any] | None = None) -> None:
    """The base's folder again, file for file, the trained weights in their places; renamed into place.

    Each weight has the dtype of the base's. Collective: gathers one weight at a time, the first process
    writes. Raises InputError, in all processes and without touching `out`, if the disk is full.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    files = saved_files(lm, writes)
    failures = [None]
    if writes:
        try:
            with new_folder(out) as scratch:
                for path in files_in(lm.folder, SMALL_FILES):
                    shutil.copyfile(path, scratch / path.name)
                for name, tensors in files:
                    save_file(tensors, scratch / name, metadata={"format": "pt"})
                if settings:
                    card = model_card(settings)
                    (scratch / "README.md").write_text(card, encoding="utf-8", errors="replace")
        except Exception as error:  # a full disk, in whatever library's words
            failures = [f"the model cannot be saved to {out}: {first_line(error)}"]
    for _ in files:  # a gather needs all processes, whether anything is written or not
        pass
    if dist.is_initialized():
        dist.broadcast_object_list(failures)
    if failures[0]:
        raise InputError(failures[0])


def saved_files(lm: nn.Module, writes: bool) -> Iterator[tuple[str, dict]]:
    """The base's files one by one: (name, {name: tensor}), trained ones if this process `writes` them."""
    base = Weights(lm.folder)
    parameters = dict(lm.model.named_parameters())
    trained = {}
    for name, parameter in parameters.items():
        for piece in pieces(name, torch.empty(parameter.shape, device="meta")):
            trained[base.stored_name(piece, lm.prompts.family)] = (name, piece)

    @functools.lru_cache(2)  # the two of a layer's experts
    def whole(name: str) -> dict[str, Tensor]:
        weight = parameters[name].detach()
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        if writes:
            weight = lm.merged(name, weight)
        return pieces(name, weight)

    for file, names in groupby(base.files, base.files.get):
        tensors = {}
        for stored in names:
            tensors[stored] = base.stored[stored][...]  # of a mapped file: not read before it is written
            if stored in trained:
                name, piece = trained[stored]
                weight = whole(name)[piece]
                if writes:
                    tensors[stored] = weight.to("cpu", tensors[stored].dtype)
        yield file.name, tensors


def model_card(settings: dict[str, Any]) -> str:
    """README.md of a saved folder: what it was made of."""
    base = settings["model"]
    known = ""
    if not os.path.isdir(base):
        known = f'base_model: "{base}"\n'  # the hub refuses a base that it does not know
    made = "\n".join(f"- {key}: `{value}`" for key, value in settings.items())
    return CARD.format(known=known, base=base, made=made)
