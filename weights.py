"""The model's weights: the hub's files to parameters and back, and the families of models.

Each process reads its own rows of each weight straight from the files. What is saved keeps the base's layout:
the hub's whole Qwen2.5-Omni gives a whole one again, with the parts that are never loaded (vision, talker,
token2wav, the voices) copied from file to file. What the weights compute is in model.py, who holds which rows
of them in fsdp.py.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
    WhisperFeatureExtractor,
    logging,
)

from files import InputError, first_line, parse_json, read_text, sha256

logging.set_verbosity_error()  # the hub's own Qwen2.5-Omni config draws a page of warnings

INDEX = "model.safetensors.index.json"
SMALL_FILES = (  # beside the weights; nothing else of a model folder is fetched, read or copied
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "spk_dict.pt",  # Qwen2.5-Omni's voices, a pickle: copied, never read
)
SMALL = 64 * 2**20  # bytes; the largest that is published, tokenizer.json, has 11 MB
MOST = {  # sizes that cost hours or terabytes before any weight's shape could contradict them
    "num_hidden_layers": 500,
    "encoder_layers": 500,
    "depth": 500,
    "n_window": 10_000,
    "max_source_positions": 100_000,
}
FILE_BYTES = 4 * 2**30
SCORES_HERE = "<!-- scores -->"  # in a model card; report.py writes the run's scores after it
WHOLE = "thinker."  # begins the names of the thinker's weights in the hub's whole Qwen2.5-Omni
NOT_LOADED = (
    "inv_freq",
    "audio_bos_eos_token.weight",
)  # ends of names: tables, and an embedding without a use


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
            wanted = [*SMALL_FILES, INDEX, "*.safetensors"]
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=wanted))
        except Exception as error:
            raise InputError(
                f"{path} is no local folder and cannot be fetched from the hub: {first_line(error)}"
            ) from None
    if not os.path.lexists(folder / "config.json"):
        raise InputError(f"{folder} has no config.json: not a checkpoint folder")
    for name in SMALL_FILES:
        if os.path.lexists(folder / name) and file_of(folder, name).stat().st_size > SMALL:
            raise InputError(f"{folder}/{name} is larger than {SMALL >> 20} MiB: not a checkpoint's")
    return folder


def file_of(folder: Path, name: Any) -> Path:
    """A regular file of a model folder. A link is followed within the folder or its hub cache only."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        path = (folder / name).resolve()
        leads_out = not any(path.parent == place for place in allowed)
        regular = path.is_file()
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: no file can have the name {name!r} ({first_line(error)})") from None
    if leads_out:
        raise InputError(f"{folder}/{name} leads out of the model folder: put the file itself there")
    if not regular:
        raise InputError(f"{folder}/{name} is missing, or no regular file: fetch the checkpoint again")
    return folder / name


def checkpoint_hash(folder: Path) -> str:
    """Of a model's files: names, sizes and 64 pieces of 4 KB of each, so that other weights differ too."""
    pieces = []
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors") or not path.is_file():
            continue
        size = path.stat().st_size
        pieces.append(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for piece in range(64):
                file.seek(piece * max(0, size - 4096) // 63)
                pieces.append(file.read(4096))
    return sha256(b"".join(pieces))


def read_small_file(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint, {} where it is absent. Raises InputError if it holds no JSON object."""
    if not os.path.lexists(folder / name):
        return {}
    path = file_of(folder, name)
    if path.stat().st_size > SMALL:
        raise InputError(f"{path} is larger than {SMALL >> 20} MiB: not a checkpoint's")
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def read_config(folder: Path) -> PreTrainedConfig:
    """The language side's config: for the hub's whole Qwen2.5-Omni, its thinker's. Raises InputError."""
    raw = read_small_file(folder, "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{folder} holds a model of type {kind!r}; supported: {', '.join(FAMILIES)}")
    check_sizes(raw, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        config = getattr(config, "thinker_config", config)
        text = config.text_config
        sizes = (text.vocab_size, config.audio_config.num_mel_bins, config.audio_token_id)
        half = text.hidden_size // text.num_attention_heads // 2
        sections = text.rope_parameters.get("mrope_section", [half])
        adds_up = sum(sections) == half and min(sections) > 0 and set(map(type, sections)) == {int}
        full = set(text.layer_types) == {"full_attention"}
        sane = full and 0 < text.rms_norm_eps < 1
    except Exception as error:  # whatever a malformed file makes the library raise
        raise InputError(f"{folder}/config.json cannot be read: {first_line(error)}") from None
    if not all(type(size) is int and size > 0 for size in sizes) or sizes[2] >= sizes[0]:
        raise InputError(f"{folder}/config.json: vocab_size, num_mel_bins or audio_token_id makes no sense")
    if not adds_up:
        raise InputError(f"{folder}/config.json: mrope_section {sections} does not make up half of a head")
    if not sane:
        raise InputError(
            f"{folder}/config.json: layer_types or rms_norm_eps is of no model that is read here"
        )
    return config


def check_sizes(config: dict[str, Any], folder: Path) -> None:
    """Refuse sizes outside 1 to `MOST`, at any level of the config."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, folder)
        elif key in MOST and not (type(value) is int and 1 <= value <= MOST[key]):
            raise InputError(f"{folder}/config.json: {key} is {value!r}, not between 1 and {MOST[key]}")


def read_extractor(folder: Path, mels: int) -> WhisperFeatureExtractor:
    """Whisper's feature extractor; InputError where the checkpoint's is of other numbers."""
    values = read_small_file(folder, "preprocessor_config.json")
    values = values or read_small_file(folder, "processor_config.json").get("feature_extractor")
    if not values or not isinstance(values, dict):
        raise InputError(f"{folder} has no preprocessor_config.json with a feature extractor")
    published = {"feature_size": mels, "sampling_rate": 16_000, "hop_length": 160, "n_fft": 400, "dither": 0}
    for key, value in published.items():
        if values.get(key, value) != value:
            raise InputError(f"{folder}: the feature extractor's {key} is {values[key]!r}, not {value}")
    seconds = values.get("chunk_length", 30)
    if type(seconds) is not int or not 1 <= seconds <= 3600:
        raise InputError(f"{folder}: the feature extractor's chunk_length is {seconds!r}, not 1 to 3600 s")
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)


# ---------------------------------------------------------------------------------------- files to parameters


def weight_files(folder: Path) -> dict[str, Path]:
    """Every weight's name in the folder's safetensors files -> its file. Raises InputError."""
    if not os.path.lexists(folder / INDEX):
        if not os.path.lexists(folder / "model.safetensors"):
            raise InputError(f"{folder} has no safetensors weights (other formats are not read)")
        path = file_of(folder, "model.safetensors")
        return dict.fromkeys(opened(path).keys(), path)
    listed = read_small_file(folder, INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{folder}/{INDEX} has no weight_map")
    paths = {}
    for name in listed.values():
        if not isinstance(name, str):
            raise InputError(f"{folder}/{INDEX} names a file {name!r}")
        if name not in paths:
            paths[name] = file_of(folder, name)
    return {weight: paths[name] for weight, name in listed.items()}


def opened(path: Path) -> safe_open:
    """A safetensors file, its header checked against its length. Raises InputError that names it."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is no whole safetensors file ({first_line(error)}): cut off, or a git-lfs pointer? "
            "Fetch it again"
        ) from None


class Weights:
    """A checkpoint's weights by name, its files opened once each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = weight_files(folder)
        self.is_whole = any(name.startswith(WHOLE) for name in self.files)
        self.handles = {}

    def rows(self, name: str) -> Any:
        """safetensors' slice of a weight: its shape and dtype, and any rows of it. Raises InputError."""
        if name not in self.files:
            raise InputError(
                f"{self.folder} has no weight named {name}: incomplete, or of another kind of model"
            )
        path = self.files[name]
        if path not in self.handles:
            self.handles[path] = opened(path)
        try:
            return self.handles[path].get_slice(name)
        except SafetensorError:
            raise InputError(f"{path} has no weight named {name}, though the index says so") from None

    def stored_name(self, name: str, family: Family) -> str:
        """transformers' parameter name -> the name in these files."""
        prefix = WHOLE if self.is_whole else ""
        return prefix + hub_name(name, family)


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
    try:
        with torch.device("meta"):
            model = FAMILIES[config.model_type].model_class(config)
    except Exception as error:  # sizes that do not fit together
        raise InputError(f"{folder}/config.json describes no model: {first_line(error)}") from None
    unused = [(model.model, "visual"), (model.model.audio_tower, "audio_bos_eos_token")]
    if not audio:
        unused += [(model.model, "audio_tower"), (model.model, "multi_modal_projector")]
    for parent, part in unused:
        if hasattr(parent, part):
            delattr(parent, part)
    return model


def check_weights(model: nn.Module, family: Family, folder: Path) -> None:
    """Compare the parameters with the files' headers, before they get any memory. Raises InputError."""
    weights = Weights(folder)
    wanted = set()
    for name, parameter in model.named_parameters():
        stored = weights.stored_name(name, family)
        rows = weights.rows(stored)
        wanted.add(stored)
        if rows.get_shape() != list(parameter.shape):
            raise InputError(
                f"{folder}: {stored} is {rows.get_shape()}, config.json says {list(parameter.shape)}"
            )
        if rows.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise InputError(
                f"{folder}: {stored} is stored as {rows.get_dtype()}: quantized weights are not read"
            )
    head = weights.stored_name("lm_head.weight", family)
    if head not in wanted and head in weights.files:
        table = weights.stored_name("model.language_model.embed_tokens.weight", family)
        if not torch.equal(weights.rows(head)[:], weights.rows(table)[:]):
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
    """Copy each weight, or this process's rows of it, from its file: FSDP splits dimension 0 evenly."""
    weights = Weights(lm.folder)
    for name, parameter in lm.model.named_parameters():  # a tied lm_head is in it once, as the embedding
        stored = weights.stored_name(name, lm.prompts.family)
        rows = weights.rows(stored)
        target = parameter
        start = 0
        if isinstance(parameter, DTensor):
            target = parameter.to_local()
            mesh = parameter.device_mesh
            each = -(-parameter.shape[0] // mesh.size(mesh.ndim - 1))
            start = mesh.get_local_rank(mesh.ndim - 1) * each
        if target.numel():
            target.copy_(rows[start : start + target.shape[0]])


# ---------------------------------------------------------------------------------------- parameters to files


@torch.no_grad()
def save_model(
    lm: nn.Module,
    out: Path,
    dtype: torch.dtype,
    parts: str = "all",
    card: dict[str, Any] | None = None,
) -> None:
    """A checkpoint folder in the base's layout, the trained weights in `dtype`; renamed into place.

    parts="thinker" leaves the talker and the like away: the thinker's own layout. What was not loaded is
    copied from the base's files as it is. Collective: gathers one weight at a time, the first process writes.
    Raises InputError, in all processes and without touching `out`, if the disk is full or a weight is not
    finite.
    """
    base = Weights(lm.folder)
    strip = WHOLE if base.is_whole and parts == "thinker" else ""
    names = [name for name in base.files if name.startswith(strip)]
    weights = whole_weights(lm, base, names)
    scratch = out.with_name(out.name + ".writing")
    failures = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            write_weights(weights, base, scratch, dtype, strip)
            write_small_files(lm, scratch, dtype, strip, card)
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


def whole_weights(lm: nn.Module, base: Weights, names: list[str]) -> Iterator[tuple[str, Tensor | None]]:
    """Each of the files' names with the trained weight, None where it was not loaded. A gather each."""
    trained = {}
    for name, parameter in lm.model.named_parameters(remove_duplicate=False):
        trained[base.stored_name(name, lm.prompts.family)] = (name, parameter)
    for stored in names:
        weight = None
        if stored in trained:
            name, parameter = trained[stored]
            weight = parameter.detach()
            if isinstance(weight, DTensor):
                weight = weight.full_tensor()
            weight = lm.merged(name, weight)
        yield stored, weight


def write_weights(
    weights: Iterator[tuple[str, Tensor | None]],
    base: Weights,
    folder: Path,
    dtype: torch.dtype,
    strip: str,
) -> None:
    """Files of at most `FILE_BYTES` (a larger weight has its own), and their index."""
    where = {}
    batch = {}
    size = 0
    total = 0
    for stored, weight in weights:
        if weight is None:
            weight = base.rows(stored)[:]
        else:
            weight = weight.to("cpu", dtype, copy=True).contiguous()  # no memory under two names in a file
            if not weight.isfinite().all():
                raise InputError(f"{stored} has values that are not finite numbers")
        if batch and size + weight.nbytes > FILE_BYTES:
            write_batch(batch, folder, where)
            batch = {}
            size = 0
        batch[stored.removeprefix(strip)] = weight
        size += weight.nbytes
        total += weight.nbytes
    write_batch(batch, folder, where)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def write_batch(batch: dict[str, Tensor], folder: Path, where: dict[str, str]) -> None:
    """One safetensors file, noted in `where`."""
    file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
    save_file(batch, folder / file, metadata={"format": "pt"})
    where.update(dict.fromkeys(batch, file))


def write_small_files(
    lm: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    strip: str,
    card: dict[str, Any] | None,
) -> None:
    """The base's config with the new dtype, its tokenizer and the like as they are, and the model card."""
    for name in SMALL_FILES[1:]:
        if os.path.lexists(lm.folder / name):
            shutil.copyfile(file_of(lm.folder, name), folder / name)
    config = read_small_file(lm.folder, "config.json")
    thinker = config.get("thinker_config", config)
    if strip:
        (folder / "spk_dict.pt").unlink(missing_ok=True)
        thinker["architectures"] = [lm.prompts.family.model_class.__name__]
        config = thinker
    named = str(dtype).removeprefix("torch.")
    for part in (config, thinker):
        key = "dtype"
        if "torch_dtype" in part:  # its name until 2025
            key = "torch_dtype"
        part[key] = named
    for part in (thinker["text_config"], thinker["audio_config"]):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                part[key] = named
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if card is not None:
        (folder / "README.md").write_text(model_card(card), encoding="utf-8", errors="replace")


# --------------------------------------------------------------------------------------------- the model card


def model_card(card: dict[str, Any]) -> str:
    """README.md of a saved folder: base, data, steps and settings as they were given, for people and the hub.

    The front matter names hub repositories only: the hub refuses a base or data set that it does not know.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["audio", "audio-question-answering", "grpo", "omni-r1"],
    }
    bases = hub_repositories([card["base"]])
    if bases:
        front["base_model"] = bases[0]
    datasets = hub_repositories(card["data"])
    if datasets:
        front["datasets"] = datasets
    lines = ["---"]
    for key, value in front.items():
        lines.append(f"{key}: {json.dumps(value)}")  # JSON is YAML
    lines += [
        "---",
        "",
        f"# {card['base']}, fine-tuned with GRPO on audio questions",
        "",
        f"- base: `{card['base']}`",
        f"- data: {', '.join(f'`{name}`' for name in card['data'])}",
        f"- steps: {card['steps']}",
        "- recipe: GRPO with a reward for the right answer, after Omni-R1 (arXiv 2505.09439), Eq. 1 to 4",
        "",
        "| setting | value |",
        "|---|---|",
    ]
    for key, value in card["settings"].items():
        lines.append(f"| {key} | `{value}` |")
    lines += ["", "## Scores", "", SCORES_HERE]
    return "\n".join(lines) + "\n"


def hub_repositories(names: list[str]) -> list[str]:
    """Those that are owner/name on the hub and no path here."""
    found = []
    for name in names:
        is_file = name.endswith((".json", ".jsonl", ".csv")) or os.path.exists(name)
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not is_file:
            found.append(name)
    return found
