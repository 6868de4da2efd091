"""The audio LLM: load it, encode a prompt, sample a group of responses, score them, shard it, save it.

Qwen2.5-Omni's thinker and Qwen2-Audio (Section III-A) behind the same few methods. What differs from the
usual way:

- The prompt (250 audio tokens for 10 s) is computed once for all G responses (4 to 8 tokens each). The
  responses continue from its keys and values, packed one after the other in a single row, behind a mask that
  lets each see the prompt and itself only. It is the same function as one row per response
  (tests/test_model.py), several times cheaper.
- `prefill` keeps its graph, so that the rollout's prefill can also be the prompt half of the policy's
  scoring.
- Features come from the feature extractor alone, on the clip as long as it is, not padded to 30 or 300 s.
- Weights go from the safetensors files straight into each process's shards; no process ever holds the whole
  model.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, WhisperFeatureExtractor

from data import load_audio, prompt_text
from files import InputError
from weights import FAMILIES, OMNI, empty_model, find_model, read_config, read_weights, save_model

log = logging.getLogger("omni_r1")

HOP = 160  # samples between two mel frames at 16 kHz


# ------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """One question as the model reads it. The audio placeholder stands once per audio embedding."""

    input_ids: torch.Tensor  # (P,) int64
    input_features: torch.Tensor | None  # (mels, frames) float32 log-mel spectrogram, 100 frames a second


def audio_tokens(frames: int) -> int:
    """Audio embeddings for so many mel frames: a stride-2 convolution, then pooling by 2 (25 a second)."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


class PromptEncoder:
    """Question -> Prompt. Only tokenizer and feature extractor, so DataLoader workers get a light copy."""

    def __init__(self, path):
        folder = find_model(path)
        config = read_config(folder)
        self.family = FAMILIES[config.model_type]
        self.audio_token_id = config.audio_token_id
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.extractor = WhisperFeatureExtractor.from_pretrained(folder)
        except (OSError, ValueError):
            raise InputError(f"{folder} has no tokenizer or no feature extractor that can be read") from None
        self.longer_clips = 0

    def features(self, waveform):
        """(n,) samples at 16 kHz -> (mels, frames), equal to the published processor's without its padding.

        The published processor pads every clip to 30 or 300 s first. 400 zeros after the clip are enough: no
        frame of the clip looks further, and the maximum that the features are scaled by is the clip's own.
        """
        samples = max(len(waveform), 4 * HOP)  # the shortest clip that gives one audio embedding
        padded = torch.zeros(samples + 400)
        padded[: len(waveform)] = torch.as_tensor(waveform)
        batch = self.extractor(
            padded.numpy(), sampling_rate=16000, padding="longest", truncation=False, return_tensors="pt"
        )
        return batch.input_features[0, :, : math.ceil(samples / HOP) + self.family.padding_frames]

    def encode(self, question, use_audio=True, waveform=None) -> Prompt:
        """The prompt of Section III-A in the family's chat template, audio first.

        use_audio=False drops the audio tokens, markers included (Section IV-E). `waveform` (float32, 16 kHz)
        is heard in place of the question's clip. Raises data.InputError if the clip cannot be read. The
        question's text is tokenized apart, as text: "<|im_end|>" inside a question ends nothing, "<|AUDIO|>"
        stands for no audio.
        """
        features, audio_ids = None, []
        if use_audio and (waveform is not None or question.audio is not None):
            if waveform is None:
                longest = self.extractor.chunk_length + 1
                waveform = self.cut(load_audio(question.audio, longest), question.audio)
            features = self.features(waveform)
            placeholders = audio_tokens(features.shape[1] - self.family.padding_frames)
            audio_ids = [self.audio_token_id] * placeholders
            audio_ids = (
                self.template(self.family.before_audio) + audio_ids + self.template(self.family.after_audio)
            )
        text_ids = self.tokenizer(
            prompt_text(question), add_special_tokens=False, split_special_tokens=True
        ).input_ids
        head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        tail = "<|im_end|>\n<|im_start|>assistant\n"
        ids = self.template(head) + audio_ids + text_ids + self.template(tail)
        return Prompt(torch.tensor(ids), features)

    def cut(self, waveform, path):
        """The clip as far as the published processor hears it (300 or 30 s), with a warning."""
        seconds = self.extractor.chunk_length
        if len(waveform) > seconds * 16000:
            self.longer_clips += 1
            log.warning("%s is longer than %d s: cut there (%d so far)", path, seconds, self.longer_clips)
        return waveform[: seconds * 16000]

    def template(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids


# --------------------------------------------------------------------------------------------------- model


class KVCache:
    """Keys and values of one forward pass by layer, behind those of an optional prefix.

    transformers' attention calls `update`. The prefix is read, never written, so that one prompt serves the
    rollout and the scoring, and a layer that runs twice (activation checkpointing) does the same both times.
    """

    def __init__(self, prefix=None):
        self.prefix = prefix.layers if prefix else None
        self.layers = {}

    def update(self, keys, values, layer, *args, **kwargs):  # (B, heads, tokens, head size)
        if self.prefix:
            keys = torch.cat([self.prefix[layer][0], keys], dim=2)
            values = torch.cat([self.prefix[layer][1], values], dim=2)
        self.layers[layer] = (keys, values)
        return keys, values

    def detach(self):
        copy = KVCache()
        copy.layers = {
            layer: (keys.detach(), values.detach()) for layer, (keys, values) in self.layers.items()
        }
        return copy


@dataclass
class Prefill:
    """What remains of B prompts after their forward pass."""

    cache: KVCache
    logits: torch.Tensor  # (B, vocabulary): the first response token's
    lengths: torch.Tensor  # (B,)


class AudioLM(nn.Module):
    """A causal language model that hears. Always in eval mode: rollout and scoring are the same policy."""

    def __init__(self, model, prompts, folder, dtype):
        super().__init__()
        self.model = model
        self.prompts = prompts
        self.encode = prompts.encode
        self.folder = folder
        self.dtype = dtype
        self.lockstep = (
            False  # True when re-sharding: a forward pass is a collective, so ranks must do equally many
        )
        self.eos = end_tokens(folder, prompts.tokenizer)
        self.eval()

    @property
    def device(self):
        return next(self.model.model.language_model.rotary_emb.buffers()).device

    def forward(self, input_ids, positions, mask, cache, features=(), places=None, keep=slice(None)):
        """Logits after the tokens that `keep` selects, fp32. One entry for prefill, decoding and scoring.

        input_ids, positions: (B, L). mask: bool (B, 1, L, keys) or None for causal. features: one (mels,
        frames) per clip, in the order of the placeholders. keep: a slice of L, or (B,) with one index a row.
        """
        model = self.model.model
        embeddings = model.language_model.embed_tokens(input_ids)
        if features:
            heard = self.hear(features).to(embeddings.dtype)  # (placeholders, hidden)
            embeddings = embeddings.masked_scatter(places.unsqueeze(-1), heard)
        hidden = model.language_model(
            inputs_embeds=embeddings,
            attention_mask={"full_attention": mask},  # a dict is taken as it is; None means causal
            position_ids=positions,
            past_key_values=cache,
        ).last_hidden_state
        if isinstance(keep, slice):
            hidden = hidden[:, keep]
        else:
            hidden = hidden[torch.arange(len(keep), device=keep.device), keep]
        return self.model.lm_head(hidden).float()

    def hear(self, features):
        """Clips -> (total audio tokens, hidden), computed over what is heard and nothing else."""
        tower = self.model.model.audio_tower
        if self.prompts.family is OMNI:
            frames = torch.tensor([f.shape[1] for f in features], device=self.device)
            after_convolution = (frames - 1) // 2 + 1
            return tower(
                torch.cat(features, dim=1), feature_lens=frames, aftercnn_lens=after_convolution
            ).last_hidden_state
        return torch.cat([self.hear_qwen2_audio(tower, f) for f in features])

    def hear_qwen2_audio(self, tower, features):
        """Qwen2AudioEncoder.forward on the clip's own frames; it wants 3000 itself and masks the rest."""
        frames = features.shape[1] - self.prompts.family.padding_frames
        x = features.unsqueeze(0).to(tower.conv1.weight.dtype)  # (1, mels, frames + padding)
        x = F.gelu(tower.conv2(F.gelu(tower.conv1(x)))).transpose(1, 2)[:, : (frames - 1) // 2 + 1]
        x = (x + tower.embed_positions.weight[: x.shape[1]]).to(x.dtype)
        for layer in tower.layers:
            x = layer(x, attention_mask=None)
        x = tower.avg_pooler(x.transpose(1, 2)).transpose(1, 2)
        return self.model.model.multi_modal_projector(tower.layer_norm(x))[0]

    def prefill(self, prompts) -> Prefill:
        """Run B prompts, right-padded: a causal mask hides the padding, later `sample_from` does."""
        lengths = torch.tensor([len(p.input_ids) for p in prompts])
        ids = pad_sequence([p.input_ids for p in prompts], batch_first=True).to(self.device)
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        features = [p.input_features.to(self.device) for p in prompts if p.input_features is not None]
        places, cache, lengths = ids == self.prompts.audio_token_id, KVCache(), lengths.to(self.device)
        return Prefill(cache, self(ids, positions, None, cache, features, places, lengths - 1), lengths)

    @torch.no_grad()
    def sample_from(self, prefill, group_size, max_new_tokens, temperature, generator=None):
        """Continue each of B prompts G times: a list (B) of lists (G) of 1-D int64 tensors, EOS kept.

        Tokens are drawn from softmax(logits / temperature); temperature 0 takes the most likely. The G
        responses of a prompt are G tokens of one row at every step: the prompt's keys are stored and read
        once, not G times.
        """
        B, G = len(prefill.lengths), group_size
        cache = prefill.cache.detach()
        logits = prefill.logits.unsqueeze(1).expand(B, G, -1)
        in_prompt = (
            torch.arange(int(prefill.lengths.max()), device=self.device) < prefill.lengths[:, None, None]
        )
        in_prompt = in_prompt.expand(B, G, -1)
        same_response = torch.eye(G, dtype=torch.bool, device=self.device).expand(B, G, G)
        eos, tokens = self.eos.to(self.device), []
        done = torch.zeros(B, G, dtype=torch.bool, device=self.device)
        for step in range(max_new_tokens):
            tokens.append(draw(logits, temperature, generator))
            done |= torch.isin(tokens[-1], eos)
            if step + 1 == max_new_tokens or self.all_done(done):
                break
            mask = torch.cat([in_prompt] + [same_response] * (step + 1), dim=-1).unsqueeze(1)
            cache = KVCache(prefix=cache)
            logits = self(tokens[-1], (prefill.lengths[:, None] + step).expand(B, G), mask, cache)
        responses = torch.stack(tokens, dim=-1).cpu()  # (B, G, T)
        return [[until_eos(response, self.eos) for response in group] for group in responses]

    def all_done(self, done):
        done = done.all().int()
        if self.lockstep:
            dist.all_reduce(done, dist.ReduceOp.MIN)
        return bool(done)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens=64, group_size=1, temperature=0.0, generator=None):
        """B prompts -> list (B) of lists (G) of 1-D int64 tensors, EOS kept. Greedy by default."""
        responses = self.sample_from(
            self.prefill(prompts), group_size, max_new_tokens, temperature, generator
        )
        if self.lockstep:  # or FSDP would prefetch for the backward in the order of these forward passes
            self.reset_iter_state()
        return responses

    def sample(self, prompt, group_size, max_new_tokens, temperature, generator=None):
        """G responses to one prompt, each a 1-D int64 tensor, EOS kept."""
        return self.generate([prompt], max_new_tokens, group_size, temperature, generator)[0]

    def score(self, prompt, responses, prefill=None):
        """Log-probs of G responses under this model at temperature 1, and the mean entropy of its
        predictions.

        Returns logps (G, T), mask (G, T) bool, entropy (scalar, no gradient); T is the longest response. One
        row: [prompt, r1, ..., rG] without each response's last token, which predicts nothing. Positions start
        again at the prompt's end for each. With `prefill` (this model's, of this prompt) only the responses
        are computed.
        """
        n, lengths = len(prompt.input_ids), [len(r) for r in responses]
        packed = torch.cat([prompt.input_ids] + [r[:-1] for r in responses])
        positions = torch.cat([torch.arange(n)] + [torch.arange(n, n + length - 1) for length in lengths])
        segment = torch.cat([torch.full((n,), -1)] + [torch.full((k - 1,), i) for i, k in enumerate(lengths)])
        mask = (segment == -1) | (segment == segment.unsqueeze(1))
        mask = mask.tril().view(1, 1, len(packed), len(packed))
        if prefill is None:
            features = [] if prompt.input_features is None else [prompt.input_features.to(self.device)]
            places = (packed == self.prompts.audio_token_id) & (segment == -1)  # a response may say the token
            inputs = [x.to(self.device) for x in (packed[None], positions[None], mask, places[None])]
            logits = self(*inputs[:3], KVCache(), features, inputs[3], slice(n - 1, None))[0]
        elif len(packed) > n:
            inputs = [x.to(self.device) for x in (packed[None, n:], positions[None, n:], mask[:, :, n:])]
            logits = torch.cat([prefill.logits, self(*inputs, KVCache(prefill.cache))[0]])
        else:
            logits = prefill.logits
        return group_log_probs(logits, responses)

    def log_probs(self, prompt, responses):
        """log pi(o_t | q, o_<t) of Eq. 3: (G, T), and the mask (G, T) of real tokens, EOS included."""
        return self.score(prompt, responses)[:2]

    def decode(self, tokens) -> str:
        return self.prompts.tokenizer.decode(tokens, skip_special_tokens=True)

    def save(self, out, dtype=None):
        """Write a folder that plain `from_pretrained` loads. Collective. See `weights.save_model`."""
        save_model(self, Path(out), dtype or self.dtype)


def draw(logits, temperature, generator):
    """(B, G, vocabulary) -> one token each, (B, G)."""
    if temperature == 0:
        return logits.argmax(-1)
    # A NaN stops multinomial (and with it a GPU for good); let the loss be NaN instead, which is reported.
    probabilities = (logits / temperature).softmax(-1).nan_to_num(nan=1.0)
    return torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(logits.shape[:2])


def until_eos(response, eos):
    ends = torch.isin(response, eos).nonzero()
    return response[: int(ends[0]) + 1] if len(ends) else response


def group_log_probs(logits, responses):
    """Logits (1 + sum(len - 1), V): the prompt's last, then each response's -> see AudioLM.score."""
    device, lengths = logits.device, [len(r) for r in responses]
    first = torch.stack([r[0] for r in responses]).to(device)
    rest = torch.cat([r[1:] for r in responses]).to(device)
    # All first tokens share one row. Expanding it sums their gradients in a fixed order; indexing it G times
    # would add them atomically, in another order every run.
    first_logps = -F.cross_entropy(logits[:1].expand(len(responses), -1), first, reduction="none")
    rest_logps = -F.cross_entropy(logits[1:], rest, reduction="none")
    rest_logps = rest_logps.split([length - 1 for length in lengths])
    logps = pad_sequence(
        [torch.cat([first_logps[i : i + 1], r]) for i, r in enumerate(rest_logps)], batch_first=True
    )
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    with torch.no_grad():  # 64 rows at a time: an entropy needs three more arrays of the logits' size
        entropies = torch.cat(
            [-(p.exp() * p).sum(-1) for p in (F.log_softmax(rows, -1) for rows in logits.split(64))]
        )
        entropy = (entropies.sum() + entropies[0] * (len(responses) - 1)) / mask.sum()
    return logps, mask, entropy


def end_tokens(folder, tokenizer):
    """Ids that end a response: <|im_end|> and what the checkpoint's generation config names."""
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    file = folder / "generation_config.json"
    if file.exists():
        named = json.loads(file.read_text()).get("eos_token_id")
        ends |= set(named if isinstance(named, list) else [] if named is None else [named])
    return torch.tensor(sorted(ends))


def load_model(path, dtype=torch.float32, device="cpu", audio=True, prepare=None) -> AudioLM:
    """Load a checkpoint folder or hub name (the hub's layouts, and what `save` writes).

    `prepare(lm)` is called while the model has no memory yet: sharded there, each process reads its own rows
    only. Raises InputError if the folder is missing, of another kind, or lacks a weight.
    """
    folder = find_model(path)
    model = empty_model(folder, audio)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    lm = AudioLM(model, PromptEncoder(folder), folder, dtype)
    if prepare:
        prepare(lm)
    lm.to_empty(device=device)
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:  # rotary and sinusoid tables are in no file
            model._init_weights(module)
    read_weights(lm)
    return lm
