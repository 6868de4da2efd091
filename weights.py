"""The model's weights: the hub's files to parameters and back, and the families of models.

Each process reads its own rows of each weight straight from the files. What is saved is the base folder, file
for file, the trained weights in their places: the hub's whole Qwen2.5-Omni gives a whole one again, with the
parts that are never loaded (vision, talker, token2wav, the voices). What the weights compute is in model.py,
who holds which rows of them in fsdp.py.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AudioFlamingo3ForConditionalGeneration,
    AutoConfig,
    PreTrainedConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    logging,
)

from files import InputError, first_line, parse_json, read_text, sha256

logging.set_verbosity_error()  # the hub's own Qwen2.5-Omni config draws a page of warnings

INDEX = "model.safetensors.index.json"
# Beside the weights; nothing else of a model folder is fetched or copied. spk_dict.pt, Qwen2.5-Omni's voices,
# is a pickle: copied, never read.
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "spk_dict.pt")
SCORES_HERE = "<!-- scores -->"  # in a model card; report.py writes the run's scores after it
WHOLE = "thinker."  # begins the names of the thinker's weights in the hub's whole Qwen2.5-Omni
NOT_LOADED = ("inv_freq", "audio_bos_eos_token.weight")  # ends of names: tables, an embedding without a use
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


@dataclass(frozen=True)
class Family:
    """What differs between the families of models."""

    model_class: type
    names: tuple[tuple[str, str], ...]  # (prefix of transformers' parameter names, prefix in the hub's files)
    before_audio: str  # chat template around the audio tokens, as published
    after_audio: str
    windows: int = 1  # how many times the feature extractor's length the processor hears


OMNI = Family(
    Qwen2_5OmniThinkerForConditionalGeneration,
    (
        ("model.language_model.", "model."),
        ("model.audio_tower.", "audio_tower."),
        ("model.visual.", "visual."),
    ),
    "<|audio_bos|>",
    "<|audio_eos|>",
)
WHISPER_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
QWEN2_AUDIO = Family(
    Qwen2AudioForConditionalGeneration, WHISPER_NAMES, "Audio 1: <|audio_bos|>", "<|audio_eos|>\n"
)
AUDIO_FLAMINGO3 = Family(AudioFlamingo3ForConditionalGeneration, WHISPER_NAMES, "", "", windows=20)
FAMILIES = {
    "qwen2_5_omni": OMNI,
    "qwen2_5_omni_thinker": OMNI,
    "qwen2_audio": QWEN2_AUDIO,
    "audioflamingo3": AUDIO_FLAMINGO3,
}


# --------------------------------------------------------------------------------- a checkpoint's small files


@contextlib.contextmanager
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
    folder = Path(path)
    if not os.path.isdir(folder):
        if os.path.exists(folder) or len(folder.parts) != 2 or str(path).startswith((".", "/", "~")):
            raise InputError(
                f"no model folder at {path}: give a checkpoint folder, or a hub name as owner/name"
            )
        wanted = ["config.json"]
        if not config_only:
            wanted = [*SMALL_FILES, "*.safetensors"]
        with door(path, "is no local folder and cannot be fetched from the hub"):
            folder = Path(snapshot_download(str(path), allow_patterns=wanted))
    files_in(folder, SMALL_FILES)
    if not os.path.lexists(folder / "config.json"):
        raise InputError(f"{folder} has no config.json: not a checkpoint folder")
    return folder


def files_in(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """A model folder's files by pattern. A link is followed within the folder or its hub cache only."""
    home = folder.resolve()
    places = (home, home.parent.parent / "blobs")
    found = []
    for pattern in patterns:
        found += sorted(folder.glob(pattern))
    for path in found:
        if path.resolve().parent not in places or not path.is_file():
            raise InputError(
                f"{path} is no regular file or leads out of the model folder: put the file there"
            )
    return found


def read_small_file(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint, {} where it is absent. Raises InputError if it holds no JSON object."""
    path = folder / name
    if not path.exists():
        return {}
    with door(path):
        return dict(parse_json(read_text(path)))


def read_config(folder: Path) -> PreTrainedConfig:
    """The language side's config: for the hub's whole Qwen2.5-Omni, its thinker's. Raises InputError."""
    kind = read_small_file(folder, "config.json").get("model_type")
    with door(folder / "config.json"):
        if kind not in FAMILIES:
            raise InputError(f"{folder} holds a model of type {kind!r}; supported: {', '.join(FAMILIES)}")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = getattr(config, "thinker_config", config)
        # Whatever the file says: "eager" would add our bool masks to the logits as numbers, without a word.
        config._attn_implementation = "sdpa"
    return config


def checkpoint_hash(folder: Path) -> str:
    """Of a model's JSON files, and of its weights' names, shapes and first 4 KB each."""
    pieces = []
    for path in files_in(folder, ("*.json",)):
        pieces.append(path.read_bytes())
    for path in files_in(folder, ("*.safetensors",)):
        with door(path), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            pieces.append(header)
            for tensor in json.loads(header).values():
                if "data_offsets" in tensor:
                    file.seek(8 + length + tensor["data_offsets"][0])
                    pieces.append(file.read(4096))
    return sha256(b"".join(pieces))


# ---------------------------------------------------------------------------------------- files to parameters


class Weights:
    """What a checkpoint's files hold, by name. Opening checks each file's header against its length."""

    def __init__(self, folder: Path):
        self.files = {}
        self.shapes = {}
        self.dtypes = {}
        for path in files_in(folder, ("*.safetensors",)):
            with door(path, "is no whole safetensors file: cut off, or a git-lfs pointer? Fetch it again"):
                self.read_header(path)
        with door(folder / INDEX):
            listed = read_small_file(folder, INDEX).get("weight_map", {})
            for name, file in listed.items():
                if self.files.get(name) != folder / file:
                    raise InputError(f"{folder} has no {name} in a file {file}, though {INDEX} says so")
        if not self.files:
            raise InputError(f"{folder} has no safetensors weights (other formats are not read)")
        self.prefix = ""
        if any(name.startswith(WHOLE) for name in self.files):
            self.prefix = WHOLE

    def read_header(self, path: Path) -> None:
        """Raises InputError where another file holds the same name: which would be the right one?"""
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                if name in self.files:
                    raise InputError(f"{path} and {self.files[name]} both hold {name}: move one away")
                weight = file.get_slice(name)
                self.files[name] = path
                self.shapes[name] = weight.get_shape()
                self.dtypes[name] = weight.get_dtype()

    def stored_name(self, name: str, family: Family) -> str:
        """transformers' parameter name -> the name in these files."""
        return self.prefix + hub_name(name, family)

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def hub_name(name: str, family: Family) -> str:
    """transformers' parameter name -> the name in the hub's files (without Qwen2.5-Omni's "thinker.")."""
    for ours, theirs in family.names:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


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
        if hasattr(parent, part):
            delattr(parent, part)
    return model


def check_weights(model: nn.Module, family: Family, folder: Path) -> None:
    """Compare the parameters with all files' headers, before they get any memory. Raises InputError."""
    weights = Weights(folder)
    wanted = set()
    for name, parameter in model.named_parameters():
        stored = weights.stored_name(name, family)
        wanted.add(stored)
        if stored not in weights.files:
            raise InputError(
                f"{folder} has no weight named {stored}: incomplete, or of another kind of model"
            )
        shape = weights.shapes[stored]
        if shape != list(parameter.shape):
            raise InputError(f"{folder}: {stored} is {shape}, config.json says {list(parameter.shape)}")
        if weights.dtypes[stored] not in FLOATS:
            raise InputError(
                f"{folder}: {stored} is stored as {weights.dtypes[stored]}: quantized weights are not read"
            )
    head = weights.stored_name("lm_head.weight", family)
    if head not in wanted and head in weights.files:
        table = weights.stored_name("model.language_model.embed_tokens.weight", family)
        if not torch.equal(weights.tensor(head), weights.tensor(table)):
            raise InputError(f"{folder}: tie_word_embeddings is true, but {head} and {table} differ")
    for ours, _ in family.names:
        prefix = weights.stored_name(ours, family)
        if not any(name.startswith(prefix) for name in wanted):
            continue
        for name in weights.files:
            if name.startswith(prefix) and name not in wanted and not name.endswith(NOT_LOADED):
                raise InputError(f"{folder} has a weight {name}, for which config.json has no place")


@torch.no_grad()
def read_weights(lm: nn.Module) -> None:
    """Each process reads its own rows of each weight straight from the hub's files. No collective."""
    weights = Weights(lm.folder)
    wanted = {}
    for name, parameter in lm.model.named_parameters():  # a tied lm_head is in it once, as the embedding
        wanted[weights.stored_name(name, lm.prompts.family)] = parameter.data
    reader = dcp.HuggingFaceStorageReader(str(lm.folder))
    with door(lm.folder), warnings.catch_warnings(action="ignore"):  # it says that no processes are asked
        dcp.load(wanted, storage_reader=reader, no_dist=True)


# ---------------------------------------------------------------------------------------- parameters to files


@torch.no_grad()
def save_model(lm: nn.Module, out: Path, card: dict[str, Any] | None = None) -> None:
    """The base's folder again, file for file, the trained weights in their places; renamed into place.

    Each weight has the dtype of the base's. Collective: gathers one weight at a time, the first process
    writes. Raises InputError, in all processes and without touching `out`, if the disk is full or a weight is
    not finite.
    """
    base = Weights(lm.folder)
    weights = whole_weights(lm, base)
    scratch = out.with_name(out.name + ".writing")
    failures = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            for path in files_in(lm.folder, SMALL_FILES):
                shutil.copyfile(path, scratch / path.name)
            write_weights(weights, base, scratch)
            if card is not None:
                (scratch / "README.md").write_text(model_card(card), encoding="utf-8", errors="replace")
            shutil.rmtree(out, ignore_errors=True)
            scratch.rename(out)
        except (InputError, SafetensorError, OSError) as error:
            failures = [f"the model cannot be saved to {out}: {first_line(error)}"]
            shutil.rmtree(scratch, ignore_errors=True)
    for _ in weights:  # a gather needs all processes, whether anything is written or not
        pass
    if dist.is_initialized():
        dist.broadcast_object_list(failures)
    if failures[0]:
        raise InputError(failures[0])


def whole_weights(lm: nn.Module, base: Weights) -> Iterator[tuple[str, Tensor | None]]:
    """Each of the files' names with the trained weight, None where it was not loaded. A gather each."""
    trained = {}
    for name, parameter in lm.model.named_parameters(remove_duplicate=False):
        trained[base.stored_name(name, lm.prompts.family)] = (name, parameter.detach())
    for stored in base.files:
        weight = None
        if stored in trained:
            name, weight = trained[stored]
            if isinstance(weight, DTensor):
                weight = weight.full_tensor()
            weight = lm.merged(name, weight)
        yield stored, weight


def write_weights(weights: Iterator[tuple[str, Tensor | None]], base: Weights, folder: Path) -> None:
    """The base's files one by one, as it names them. `weights` come in the files' order."""
    last = {file: name for name, file in base.files.items()}  # of each file's names
    tensors = {}
    for stored, weight in weights:
        tensors[stored] = base.tensor(stored)
        if weight is not None:
            dtype = tensors[stored].dtype
            tensors[stored] = weight.to("cpu", dtype, copy=True).contiguous()  # tied: no memory twice
            if not tensors[stored].isfinite().all():
                raise InputError(f"{stored} has values that are not finite numbers")
        file = base.files[stored]
        if last[file] == stored:
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            tensors = {}


def model_card(card: dict[str, Any]) -> str:
    """README.md of a saved folder: what it was made of, and where report.py puts its scores."""
    base = card["base"]
    lines = ["---", "library_name: transformers", "pipeline_tag: audio-text-to-text"]
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) and not os.path.exists(base):
        lines.append(f'base_model: "{base}"')  # the hub refuses a base that it does not know
    lines += ["---", "", f"# {base}, fine-tuned with GRPO on audio questions (arXiv 2505.09439)", ""]
    lines += [f"- data: {', '.join(card['data'])}", f"- steps: {card['steps']}"]
    for key, value in card["settings"].items():
        lines.append(f"- {key}: `{value}`")
    lines += ["", "## Scores", "", SCORES_HERE, ""]
    return "\n".join(lines)
