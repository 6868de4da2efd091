"""Laws of Qwen3-Omni, whose thinker has experts: it is transformers' own class, and the files are the hub's."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_model import one_by_one
from test_plan import check_step, choose
from test_train import arguments, distance, log, same_run, stop_at, train_here, weights
from test_weights import check_saved, own_layout
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration, WhisperFeatureExtractor

import lora
import tiny
from data import read_questions
from files import InputError
from model import Prompt, hear_omni3, load_model
from plan import GIB
from weights import empty_model

SIZES = {"train": 24, "arc": 2, "mmau": 6, "mmar": 2}
# Of Qwen3-Omni-30B-A3B-Instruct's config.json, where it differs from transformers' defaults.
TEXT = tiny.numbers(
    "hidden_size 2048 intermediate_size 768 moe_intermediate_size 768 num_hidden_layers 48 num_attention_heads 32 "
    "num_key_value_heads 4 head_dim 128 vocab_size 152064 num_experts 128 num_experts_per_tok 8"
) | {"rope_scaling": {"mrope_section": [24, 20, 20]}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny world; beside the thinker its model has a talker and code2wav, of which nothing is read."""
    folder = tmp_path_factory.mktemp("qwen3omni") / "world"
    tiny.make_world(folder, "qwen3omni", effort=0, sizes=SIZES)
    file = folder / "model/model.safetensors"
    others = {"talker.model.norm.weight": torch.ones(3), "code2wav.decoder.weight": torch.ones(2, 2)}
    save_file(load_file(file) | others, file, metadata={"format": "pt"})
    return folder


def asked(lm, folder):
    questions = read_questions(folder / "mmau.json", folder / "audio")[:2]
    prompts = [lm.encode(question, use_audio=heard) for question in questions for heard in (True, False)]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    return prompts, lm.generate(prompts, 5, group_size=3, temperature=1.2, generators=generators)


def singles(model, prompts, groups):
    """transformers' log-probs of one answer at a time."""
    for prompt, group in zip(prompts, groups, strict=True):
        heard = {}
        if prompt.input_features is not None:
            heard["input_features"] = prompt.input_features[None]
            heard["feature_attention_mask"] = torch.ones(1, prompt.frames, dtype=torch.int64)
        for logps, _ in one_by_one(model, prompt, group, **heard):
            yield logps


@pytest.mark.parametrize("layout", ["whole", "thinker"])
@torch.no_grad()
def test_a_groups_log_probs_are_transformers_own_of_one_answer_at_a_time(layout, whole, tmp_path):
    folder = whole / "model"
    if layout == "thinker":
        folder = own_layout(folder, tmp_path / "model")
    lm = load_model(folder)
    prompts, groups = asked(lm, whole)
    theirs = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder)
    rows = lm.score(prompts, groups).logps
    for row, expected in zip(rows, singles(theirs, prompts, groups), strict=True):
        assert (row[: len(expected)] - expected).abs().max() <= 1e-5
    text = lm.decode(prompts[1].input_ids)
    assert text.startswith("user\nW") and text.endswith("].\nassistant\n")  # no system prompt


@pytest.mark.parametrize("lengths", [6, pytest.param(40, marks=pytest.mark.slow)])
@torch.no_grad()
def test_what_is_heard_is_its_own_feature_extractors_and_towers_whatever_is_beside_it(whole, lengths):
    lm = load_model(whole / "model")
    extractor = WhisperFeatureExtractor.from_pretrained(whole / "model")
    theirs = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(whole / "model")
    numbers = np.random.default_rng(0)
    noise = numbers.standard_normal(33 * 16_000).astype("float32") / 9
    clips = []
    expected = []
    for samples in (480, 8_000, 16_000, 16_160, len(noise), *numbers.integers(500, 160_000, lengths - 5)):
        batch = extractor(
            noise[:samples], sampling_rate=16_000, padding=True, truncation=False, return_attention_mask=True,
            return_tensors="pt",
        )  # fmt: skip
        alone = theirs.get_audio_features(batch.input_features, batch.attention_mask).last_hidden_state
        frames = batch.input_features.shape[2]
        room = max(frames, 100)  # its tower makes another of a shorter clip where no longer one is beside it
        two = F.pad(batch.input_features, (0, room - frames)).expand(2, -1, -1)
        are_heard = torch.arange(room) < torch.tensor([[frames], [room]])
        heard = theirs.get_audio_features(two, are_heard).last_hidden_state
        prompt = lm.encode(read_questions(whole / "mmau.json")[0], waveform=noise[:samples])
        assert (prompt.input_ids == lm.prompts.audio_token_id).sum() == len(alone)
        assert samples < 16_000 or (heard[: len(alone)] - alone).abs().max() <= 1e-5
        expected.append(heard[: len(alone)])
        clips.append(Prompt(prompt.input_ids, prompt.input_features, prompt.frames))
    together = hear_omni3(lm.model.model.audio_tower, clips, lm.device)
    assert (together - torch.cat(expected)).abs().max() <= 1e-5


def test_a_saved_model_has_the_bases_names_and_what_was_trained(whole, tmp_path):
    check_saved(whole / "model", tmp_path / "saved", Qwen3OmniMoeThinkerForConditionalGeneration)


def test_a_missing_expert_and_a_missing_thinker_are_named(whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole / "model", folder)
    content = load_file(folder / "model.safetensors")
    name = "thinker.model.layers.1.mlp.experts.3.up_proj.weight"
    del content[name]
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=name):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["thinker_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json .*'thinker_config'"):
        load_model(folder)


@torch.no_grad()
def test_lora_is_on_attention_alone_and_pefts(whole, tmp_path):
    lm = load_model(whole / "model")
    prompts, groups = asked(lm, whole)
    pairs = lora.attach(lm, 4, 8.0)
    for name, half in lora.pair_weights(lm).items():
        assert ".self_attn." in name
        half.copy_(torch.randn(half.shape) / 20)
    lora.save_adapter(pairs, tmp_path / "adapter", str(whole / "model"))
    base = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(whole / "model")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    lm.save(tmp_path / "merged")
    merged = load_model(tmp_path / "merged").score(prompts, groups).logps
    for row, expected in zip(merged, singles(theirs, prompts, groups), strict=True):
        assert (row[: len(expected)] - expected).abs().max() <= 1e-5
    assert (merged - load_model(whole / "model").score(prompts, groups).logps).abs().max() > 0.01


RUN = {"steps": 2, "batch": 2, "max_new_tokens": 4}


def test_two_processes_are_one_resumed_is_uninterrupted_and_experts_learn(whole, pair, tmp_path):
    reward = tmp_path / "reward.py"  # which random weights can earn
    reward.write_text("def odd(response, answer, choices): return float(len(response) % 2)")
    options = RUN | {"reward": f"{reward}:odd"}
    assert train_here(tmp_path / "one", *arguments(whole, **options)) == 0
    pair.train(tmp_path / "two", *arguments(whole, **options, reshard="on"))
    for row, other in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5) and row["reward"] == other["reward"]
    assert same_run(whole, tmp_path / "one", tmp_path / "two")
    stop_at(1, tmp_path / "stopped", arguments(whole, **options))
    assert train_here(tmp_path / "stopped", *arguments(whole, **options)) == 0
    moved = weights(tmp_path / "one/model")
    assert all(torch.equal(t, moved[name]) for name, t in weights(tmp_path / "stopped/model").items())
    experts = {name: t for name, t in weights(whole / "model").items() if ".experts." in name}
    assert distance(experts, moved) > 0


def published(folder):
    """The 30B's folder without its weights."""
    ids, _ = tiny.write_tokenizer(folder, "qwen3omni")
    inner = {
        "text_config": TEXT,
        "audio_config": {"output_dim": 2048},
        "vision_config": {"out_hidden_size": 2048},
        "audio_token_id": ids["<|AUDIO|>"],
    }
    config = {"model_type": "qwen3_omni_moe", "thinker_config": inner}
    (folder / "config.json").write_text(json.dumps(config))
    WhisperFeatureExtractor(feature_size=128, chunk_length=30).save_pretrained(folder)
    return folder


def test_the_30b_fits_one_card_with_lora_and_eight_whole(tmp_path):
    model = empty_model(published(tmp_path))
    pairs = choose(model, 1, "--gpu", "H100", "--lora", 64)
    assert pairs.whole / 1e9 == pytest.approx(31.2, abs=0.3) and pairs.active / 1e9 == pytest.approx(
        4, abs=0.3
    )
    assert pairs.trained == 64 * 48 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert 58 <= sum(pairs.gpu.values()) / GIB <= 70
    assert not choose(model, 8, "--gpu", "H100").why_not()


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "options"), [(1, "--gpu H100 --lora 64"), (8, "--gpu H100")])
def test_a_step_takes_what_the_plan_says_of_the_30b(gpus, options, tmp_path):
    check_step(published(tmp_path), gpus, 10, options)


@pytest.mark.slow
def test_a_step_takes_at_most_twice_a_dense_models_of_the_active_size(whole, tmp_path):
    tiny.make_world(tmp_path / "dense", effort=0, sizes=SIZES)
    best = {}
    for folder in (whole, tmp_path / "dense"):
        lm = load_model(folder / "model")
        prompts, groups = asked(lm, folder)
        times = []
        for _ in range(5):
            started = time.process_time()
            lm.score(prompts, groups).logps.sum().backward()
            times.append(time.process_time() - started)
        best[folder] = min(times)
    assert best[whole] <= 2 * best[tmp_path / "dense"]
