"""The audio LLM: encode a prompt, sample a group of responses, score them.

Qwen2.5-Omni's thinker, Qwen2-Audio (Section III-A) and two more families behind the same few methods. The
prompt (250 audio tokens for 10 s) is computed once for all G responses (4 to 8 tokens each), in sampling and
in scoring: the same function as one row per response (tests/test_model.py), several times cheaper.

Scoring packs a prompt and its responses into one row. Each response's positions start again at the prompt's
end, and the mask lets it see the prompt and itself only; here with a prompt p of 3 tokens and two responses:

            p p p a a b b b
        p   x
        p   x x
        p   x x x              the last p predicts the first token of both responses
        a   x x x x
        a   x x x x x
        b   x x x     x
        b   x x x     x x
        b   x x x     x x x
"""

import contextlib
import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, DynamicCache, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni3

from data import Question, load_audio, prompt_text
from files import InputError
from weights import (
    FAMILIES,
    OMNI,
    QWEN3_OMNI,
    check_weights,
    door,
    empty_model,
    end_tokens,
    find_model,
    load_weights,
    read_config,
    save_model,
)

log = logging.getLogger("omni_r1")

HOP = 160  # samples between two mel frames at 16 kHz
LOOK_AHEAD = 2  # frames after the clip that the last embedding depends on: two convolutions look one ahead
WINDOW = 3000  # frames of the 30 s that a Whisper encoder takes at once
USER = "<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
Groups = list[list[Tensor]]  # B of G responses, each 1-D int64


@dataclass(frozen=True, eq=False)  # eq: one is the other only if it is the same object
class Prompt:
    """One question as the model reads it. The audio placeholder stands once per audio embedding."""

    input_ids: Tensor  # (P,) int64
    input_features: Tensor | None  # (mels, frames and up to LOOK_AHEAD more) float32, 100 frames a second
    frames: int = 0  # of the clip itself


def audio_tokens(frames: int) -> int:
    """Audio embeddings for so many mel frames: a stride-2 convolution, then pooling by 2 (25 a second)."""
    convolved = (frames - 1) // 2 + 1
    return (convolved - 2) // 2 + 1


class PromptEncoder:
    """Question -> Prompt. Only tokenizer and feature extractor, so that a thread can be ahead."""

    def __init__(self, path: Path | str, prompt: str = "direct"):
        folder = find_model(path)
        config = read_config(folder)
        self.prompt = prompt
        self.family = FAMILIES[config.model_type]
        self.audio_token_id = config.audio_token_id
        with door(f"{folder}: tokenizer or feature extractor"):
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            self.extractor = WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
            # Once: to switch between template and text would set the tokenizer's state, which threads share.
            self.head = self.template(self.family.system + USER)
            self.before_audio = self.template(self.family.before_audio)
            self.after_audio = self.template(self.family.after_audio)
            self.tail = self.template(TAIL)
            used = self.head + self.before_audio + self.after_audio + self.tail
            self.controls = set(used) & self.tokenizer.added_tokens_decoder.keys() | {self.audio_token_id}
        self.seconds = self.family.seconds

    def encode(
        self,
        question: Question,
        use_audio: bool = True,
        waveform: np.ndarray | None = None,
    ) -> Prompt:
        """The prompt of Section III-A in the family's chat template, audio first. InputError for a bad clip.

        use_audio=False drops the audio tokens, markers included (Section IV-E). `waveform` (float32, 16 kHz)
        is heard in place of the clip, which is cut where the published processor stops.
        """
        heard = []
        features = None
        frames = 0
        if use_audio and waveform is None and question.audio is not None:
            samples = load_audio(question.audio, self.seconds + 1)
            waveform = samples[: self.seconds * 16_000]
            if len(waveform) < len(samples):
                log.warning("%s is longer than %d s: cut there", question.audio, self.seconds)
        if use_audio and waveform is not None:
            features, frames = self.features(waveform)
            count = audio_tokens(frames)
            if self.family is QWEN3_OMNI:
                count = omni3._get_feat_extract_output_lengths(frames)
            placeholders = [self.audio_token_id] * count
            heard = self.before_audio + placeholders + self.after_audio
        asked = self.plain(prompt_text(question, self.prompt))
        ids = self.head + heard + asked + self.tail
        return Prompt(torch.tensor(ids), features, frames)

    def features(self, waveform: np.ndarray) -> tuple[Tensor, int]:
        """(n,) samples at 16 kHz -> ((mels, frames + look-ahead), frames), as the published processor's.

        It pads every clip to 30 or 300 s, and takes a longer one apart (Audio Flamingo 3). Some zeros are
        enough: no frame looks further, and what scales the features, each window's maximum, is in the clip.
        """
        longest = self.extractor.chunk_length * 16_000
        silence = 5 * HOP
        if self.family is QWEN3_OMNI:  # its processor pads nothing, and takes no clip apart
            longest = self.seconds * 16_000
            silence = 0
        samples = max(len(waveform), 3 * HOP)  # which give one audio embedding
        padding = samples + silence - len(waveform)
        padded = np.pad(waveform, (0, padding))
        windows = []
        for start in range(0, samples, longest):
            batch = self.extractor(
                padded[start : start + longest],
                sampling_rate=16_000,
                padding="longest",
                truncation=False,
                return_tensors="pt",
            )
            windows.append(batch.input_features[0])
        features = torch.cat(windows, dim=1)
        frames = min(math.ceil(samples / HOP), features.shape[1])
        return features[:, : frames + LOOK_AHEAD], frames

    def template(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def plain(self, text: str) -> list[int]:
        """Tokens of a text in which nothing is a control token, whatever the tokenizer calls special."""
        for pieces in ([text], re.split("(?<=<)", text)):  # no such token goes on over a "<"
            ids = []
            for piece in pieces:
                ids += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
            if self.controls.isdisjoint(ids):
                break
        return ids


# ---------------------------------------------------------------------------------------------------- tokens


@dataclass
class Tokens:
    """What one forward pass reads: B rows of L tokens, and which of them logits are wanted after."""

    ids: Tensor  # (B, L) int64
    positions: Tensor  # (B, L) int64
    mask: Tensor  # (B, 1, R, keys) bool, on the device: what the last R see; those before are causal
    rows: Tensor  # (K,) int64: logits are computed after token (rows[k], columns[k])
    columns: Tensor  # (K,) int64
    clips: list[Prompt] = field(default_factory=list)  # in the order of their placeholders
    placeholders: Tensor | None = None  # (B, L) bool


def lengths_of(rows: list[Tensor]) -> Tensor:
    return torch.tensor([len(row) for row in rows])


def pack(
    prompts: list[Prompt],
    groups: Groups,
    audio_token_id: int,
    device: torch.device,
) -> Tokens:
    """B rows [prompt, r1, ..., rG] (the picture above); logits where each token of a response is predicted.

    All responses begin after the longest prompt, so that what comes before is causal (`attend_in_two`). The
    last token of each predicts nothing and is left out: with responses of one token the rows are the prompts.
    """
    lengths = lengths_of([prompt.input_ids for prompt in prompts])
    longest = int(lengths.max())
    all_ids = []
    all_positions = []
    owners = []  # whose each token is: i of response i
    rows = []
    columns = []
    for b, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        n = len(prompt.input_ids)
        ids = [F.pad(prompt.input_ids, (0, longest - n))]
        positions = [torch.arange(longest)]
        end = longest
        for response in group:
            start = end
            end += len(response) - 1
            ids.append(response[:-1])
            positions.append(torch.arange(n, n + end - start))
            rows += [b] * len(response)
            columns += [n - 1, *range(start, end)]
        all_ids.append(torch.cat(ids))
        all_positions.append(torch.cat(positions))
        owners.append(torch.arange(len(group)).repeat_interleave(lengths_of(group) - 1))
    ids = pad_sequence(all_ids, batch_first=True)
    placeholders = ids == audio_token_id
    placeholders[:, longest:] = False  # a response may say the token
    owners = pad_sequence(owners, batch_first=True, padding_value=-1).to(device)
    own = owners.unsqueeze(1) == owners.unsqueeze(2)
    return Tokens(
        ids=ids,
        positions=pad_sequence(all_positions, batch_first=True),
        mask=after_prompts(lengths, own.tril()),
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        clips=[prompt for prompt in prompts if prompt.input_features is not None],
        placeholders=placeholders,
    )


def after_prompts(lengths: Tensor, own: Tensor) -> Tensor:
    """(B, R, keys): what R tokens see of the responses' -> (B, 1, R, longest prompt + keys)."""
    in_prompt = torch.arange(int(lengths.max())) < lengths[:, None, None]
    in_prompt = in_prompt.to(own.device).expand(-1, own.shape[1], -1)
    return torch.cat([in_prompt, own], dim=-1).unsqueeze(1)


def attend_in_two(
    layer: nn.Module,
    *projected: Tensor,
    **others: Any,
) -> tuple[Tensor, None]:
    """The prompts' tokens causally, by the flash kernel, which takes no mask; then the responses' by theirs.

    Three (B, heads, tokens, size) and the mask (B, 1, responses' tokens, keys) -> (B, tokens, heads, size).
    """
    query, *keys, mask = projected
    attend = omni.ALL_ATTENTION_FUNCTIONS["sdpa"]
    longest = query.shape[2] - mask.shape[2]
    parts = []
    if longest:  # without a mask it takes as many of the keys
        read, _ = attend(layer, query[:, :, :longest], *keys, None, **others)
        parts.append(read)
    if longest < query.shape[2]:
        said, _ = attend(layer, query[:, :, longest:], *keys, mask, **others)
        parts.append(said)
    return torch.cat(parts, dim=1), None


omni.ALL_ATTENTION_FUNCTIONS.register("in_two", attend_in_two)


# --------------------------------------------------------------------------------------------------- model


@dataclass
class Scores:
    """What `AudioLM.score` says of B x G responses; T is the longest's length."""

    logps: Tensor  # (B * G, T) log-probs at temperature 1
    mask: Tensor  # (B * G, T) bool: real tokens, the end token included
    entropy: Tensor  # (B * G,) mean over each response's tokens of the prediction's entropy; no gradient


class AudioLM(nn.Module):
    """A causal language model that hears. Always in eval mode: rollout and scoring are the same policy."""

    def __init__(self, model: nn.Module, prompts: PromptEncoder, folder: Path):
        super().__init__()
        self.model = model
        model.model.language_model.config._attn_implementation = "in_two"
        self.prompts = prompts
        self.folder = folder
        self.device = torch.device("cpu")  # where it computes; sharded weights may lie elsewhere
        with door(folder / "generation_config.json"):
            self.eos = end_tokens(folder, prompts.tokenizer)
        self.encode = prompts.encode  # question -> Prompt
        self.gathered = contextlib.nullcontext  # fsdp.shard: keeps the weights whole while drawing
        self.lockstep = False  # fsdp.shard: a forward pass is a collective, so ranks must do equally many
        self.merged = lambda name, weight: weight  # lora.attach: a parameter's whole weight -> what is saved
        self.eval()

    def decode(self, tokens: Tensor) -> str:
        return self.prompts.tokenizer.decode(tokens, skip_special_tokens=True)

    def forward(self, tokens: Tokens, cache: DynamicCache | None = None) -> Tensor:
        """Logits (K, vocabulary) in fp32 where `tokens` wants them. The one entry for all computing."""
        device = self.device
        network = self.model.model.language_model
        embeddings = network.embed_tokens(tokens.ids.to(device))
        if tokens.clips:
            heard = self.hear(tokens.clips)  # (placeholders, hidden)
            places = tokens.placeholders.to(device).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(places, heard.to(embeddings.dtype))
        hidden = network(
            inputs_embeds=embeddings,
            attention_mask=tokens.mask,  # of four dimensions: handed on as it is
            position_ids=tokens.positions.to(device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        wanted = hidden[tokens.rows.to(device), tokens.columns.to(device)]
        return self.model.lm_head(wanted).float()

    def hear(self, clips: list[Prompt]) -> Tensor:
        """Clips -> (all their audio tokens, hidden), computed over what is heard and nothing else."""
        network = self.model.model
        if self.prompts.family is OMNI:
            return hear_omni(network.audio_tower, clips, self.device)
        if self.prompts.family is QWEN3_OMNI:
            return hear_omni3(network.audio_tower, clips, self.device)
        return network.multi_modal_projector(hear_whisper(network.audio_tower, clips, self.device))

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        max_new_tokens: int = 64,
        *,
        group_size: int = 1,
        temperature: float = 0.0,
        generators: list[torch.Generator] | None = None,
    ) -> Groups:
        """Continue each of B prompts G times, EOS kept, by draws from softmax(logits / temperature), each
        prompt's with its own generator; 0 takes the most likely."""
        B = len(prompts)
        G = group_size
        device = self.device
        prefill = pack(prompts, [[self.eos[:1]]] * B, self.prompts.audio_token_id, device)
        lengths = prefill.columns + 1
        # The responses of a prompt grow by G tokens of one row at every step, so that the prompt's keys are
        # stored and read once, not G times: the keys are [prompt, step 1's G tokens, step 2's, ...].
        own = torch.eye(G, dtype=torch.bool, device=device).expand(B, G, G)
        rows = torch.arange(B).repeat_interleave(G)
        columns = torch.arange(G).repeat(B)
        eos = self.eos.to(device)
        done = torch.zeros(B, G, dtype=torch.bool, device=device)
        said = []
        with self.gathered():
            cache = DynamicCache()
            logits = self(prefill, cache)  # (B, V)
            if temperature == 0 and not logits.isfinite().all():  # argmax would answer all the same
                raise InputError(f"{self.folder}: the model's predictions are not finite numbers")
            logits = logits.unsqueeze(1).expand(-1, G, -1)  # (B, G, V)
            for count in range(1, max_new_tokens + 1):
                newest = draw(logits, temperature, generators)
                said.append(newest)
                done = done | torch.isin(newest, eos)
                if count == max_new_tokens or self.all_done(done):
                    break
                positions = (lengths + count - 1).unsqueeze(1).expand(B, G)
                mask = after_prompts(lengths, own.repeat(1, 1, count))
                logits = self(Tokens(newest, positions, mask, rows, columns), cache)
                logits = logits.view(B, G, -1)
        drawn = torch.stack(said, dim=-1).flatten(0, 1).cpu()  # (B * G, T)
        ends = torch.isin(drawn, self.eos).int()
        is_said = ends.cumsum(-1) - ends == 0  # all before the first end, and that one
        responses = drawn[is_said].split(is_said.sum(-1).tolist())
        return [list(responses[b * G : (b + 1) * G]) for b in range(B)]

    def all_done(self, done: Tensor) -> bool:
        finished = done.all().int()
        if self.lockstep:
            dist.all_reduce(finished, dist.ReduceOp.MIN)
        return bool(finished)

    def score(
        self,
        prompts: list[Prompt],
        groups: Groups,
    ) -> Scores:
        """log pi(o_t | q, o_<t) of Eq. 3 for B groups of G responses, in one pass over B rows."""
        packed = pack(
            prompts,
            groups,
            self.prompts.audio_token_id,
            self.device,
        )
        logits = self(packed)  # (tokens of all responses, vocabulary)
        responses = sum(groups, [])
        mask = torch.arange(max(map(len, responses))) < lengths_of(responses).unsqueeze(1)  # (B * G, T)
        mask = mask.to(self.device)
        tokens = torch.cat(responses).to(self.device)
        logps = -F.cross_entropy(logits, tokens, reduction="none")
        entropies = []
        for part in logits.detach().split(64):  # an entropy needs some more arrays of its logits' size
            predicted = Categorical(logits=part, validate_args=False)  # to look would wait for the device
            entropies.append(predicted.entropy())
        empty = logps.new_zeros(mask.shape)
        entropy = empty.masked_scatter(mask, torch.cat(entropies))
        return Scores(
            logps=empty.masked_scatter(mask, logps),
            mask=mask,
            entropy=entropy.sum(-1) / mask.sum(-1),
        )

    def save(self, out: Path | str, settings: dict[str, Any] | None = None) -> None:
        """A folder in the base's layout, with a card of the settings. Collective. `weights.save_model`."""
        save_model(self, Path(out), settings)


def draw(
    logits: Tensor,
    temperature: float,
    generators: list[torch.Generator | None] | None,
) -> Tensor:
    """(B, G, vocabulary) -> one token each, (B, G); row b with generator b."""
    if temperature == 0:
        return logits.argmax(-1)
    # A NaN stops multinomial (and with it a GPU for good); let the loss be NaN instead, which is reported.
    probabilities = (logits / temperature).softmax(-1)
    probabilities = probabilities.nan_to_num(nan=1.0)
    drawn = []
    for row, generator in zip(probabilities, generators or [None] * len(logits), strict=True):
        drawn.append(torch.multinomial(row, 1, generator=generator))
    return torch.stack(drawn).squeeze(-1)


# ------------------------------------------------------------------------------------------------- hearing


def in_chunks(
    clips: list[Prompt],
    n_window: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each clip's frames; (chunks, mels, 2 n_window frames at most); each chunk's. Lengths are on the CPU."""
    heard = [clip.input_features[:, : clip.frames] for clip in clips]
    features = torch.cat(heard, dim=1).to(device)
    lengths = torch.tensor([clip.frames for clip in clips])
    return lengths, *omni.chunk_and_pad_features(features, lengths, n_window)


def hear_omni(
    tower: nn.Module,
    clips: list[Prompt],
    device: torch.device,
) -> Tensor:
    """Qwen2.5-Omni's encoder on clips of any length, side by side: (all audio tokens, hidden).

    Where its chunks of 2 s begin is told, from the CPU: else each layer would wait for the GPU three times.
    """
    lengths, chunks, chunk_lengths = in_chunks(clips, tower.n_window, device)
    places = omni.get_valid_indices(chunk_lengths).to(device)
    convolved = (chunk_lengths - 1) // 2 + 1
    is_heard = torch.arange((chunks.shape[2] + 1) // 2) < convolved.unsqueeze(1)  # (chunks, longest)
    tokens = is_heard.flatten().cumsum(0).view_as(is_heard) - 1  # in the padding, the one before it again
    bias = torch.where(is_heard, 0.0, -math.inf)  # as numbers: of a bool each layer would make them anew
    tower.config._attn_implementation = "chunks"
    return tower(
        padded_feature=chunks,
        chunk_lengths=chunk_lengths.to(device),
        valid_indices=places,
        pool_indices=omni.get_pool_indices(lengths).to(device),
        cu_seqlens=torch.tensor([0, len(places)]),  # one piece, which attend_in_chunks takes apart
        feature_lens=lengths,
        places=places,
        tokens=tokens.to(device),
        bias=bias[:, None, None].to(device),
    ).last_hidden_state


def attend_in_chunks(
    layer: nn.Module,
    *projected: Tensor,
    places: Tensor,
    tokens: Tensor,
    bias: Tensor,
    **others: Any,
) -> tuple[Tensor, None]:
    """One call for all chunks of 2 s, padded to the longest; transformers makes one for each.

    Three (1, heads, L, size), chunk after chunk -> (1, L, heads, size). `tokens` (chunks, longest) are those
    of L in each padded place, `places` (L,) the way back; `bias` is -inf for padding.
    """
    packed = torch.cat(projected).transpose(1, 2)  # (3, L, heads, size)
    padded = packed[:, tokens].transpose(2, 3)  # (3, chunks, heads, longest, size)
    said = F.scaled_dot_product_attention(
        *padded,
        bias.to(packed.dtype),
        scale=layer.scaling,
    )
    said = said.transpose(1, 2).flatten(0, 1)
    return said[None, places], None


omni.ALL_ATTENTION_FUNCTIONS.register("chunks", attend_in_chunks)


def hear_omni3(
    tower: nn.Module,
    clips: list[Prompt],
    device: torch.device,
) -> Tensor:
    """Qwen3-Omni's encoder on clips side by side: (all audio tokens, hidden)."""
    lengths, chunks, chunk_lengths = in_chunks(clips, tower.n_window, device)
    whole = 2 * tower.n_window  # to which all are padded, or a clip under 1 s would be another beside others
    padded = F.pad(chunks, (0, whole - chunks.shape[2]))
    with_a_whole_one = F.pad(chunk_lengths, (0, 1), value=whole)
    places = omni3.get_valid_indices(with_a_whole_one, tower.n_window)[:-13]  # without that one's
    return tower(
        padded_feature=padded,
        chunk_lengths=chunk_lengths,
        valid_indices=places.to(device),
        feature_lens=lengths,
    ).last_hidden_state


def hear_whisper(
    tower: nn.Module,
    clips: list[Prompt],
    device: torch.device,
) -> Tensor:
    """A Whisper encoder on clips, their windows of 30 s side by side: (all audio tokens, encoder's size).

    transformers' own computes all 3000 frames of a window, of which it pads the end with zeros, as the
    convolutions do here. One call of each layer, whatever the clips: with shards it is a collective.
    """
    windows = []
    lengths = []  # embeddings of each, before every two are averaged
    for clip in clips:
        for start in range(0, clip.frames, WINDOW):
            frames = min(clip.frames - start, WINDOW)
            if audio_tokens(frames) == 0:  # 10 or 20 ms after a full window
                break
            end = start + min(frames + LOOK_AHEAD, WINDOW)
            windows.append(clip.input_features[:, start:end].T)
            lengths.append((frames - 1) // 2 + 1)
    x = pad_sequence(windows, batch_first=True).transpose(1, 2)  # (windows, mels, frames)
    x = x.to(device, tower.conv1.weight.dtype)
    x = F.gelu(tower.conv1(x))
    x = F.gelu(tower.conv2(x))
    longest = max(lengths)
    x = x.transpose(1, 2)[:, :longest]
    x = (x + tower.embed_positions.weight[:longest]).to(x.dtype)
    mask = None
    if min(lengths) < longest:
        is_heard = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
        is_heard = is_heard[:, None, None].to(device)
        mask = is_heard.expand(-1, 1, longest, -1)
    for layer in tower.layers:
        x = layer(x, attention_mask=mask)
    x = tower.avg_pooler(x.transpose(1, 2))
    x = tower.layer_norm(x.transpose(1, 2))
    return torch.cat([row[: length // 2] for row, length in zip(x, lengths, strict=True)])


# ------------------------------------------------------------------------------------------------- loading


def empty_lm(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    audio: bool = True,
    prompt: str = "direct",
) -> AudioLM:
    """The model of a checkpoint folder or hub name, of the right shapes and without memory (meta device)."""
    folder = find_model(path)
    model = empty_model(folder, audio)
    prompts = PromptEncoder(folder, prompt)
    check_weights(model, prompts.family, folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return AudioLM(model, prompts, folder)


def load_model(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    audio: bool = True,
    prompt: str = "direct",
) -> AudioLM:
    """A checkpoint folder or hub name (the hub's layouts, and what `save` writes), whole. Or InputError."""
    return load_weights(empty_lm(path, dtype, audio, prompt), device, compute=device)
