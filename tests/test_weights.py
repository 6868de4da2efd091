"""Laws of the files: what is saved has the base's layout and loads everywhere; what is malformed is one line."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)

import weights
from data import Question
from files import InputError
from model import load_model
from tiny import numbers
from weights import find_model

CONFIG = "config.json"
QUESTION = Question("1", "What sounds?", ("dog", "bird"), "dog", None, {})


def small_files(source, folder):
    """The tokenizer and the like of a tiny model."""
    for path in weights.files_in(source, weights.SMALL_FILES):
        if path.name != CONFIG:
            shutil.copyfile(path, folder / path.name)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A base as the hub has it, made by transformers' own class: thinker, talker, token2wav, voices."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    config = Qwen2_5OmniConfig.from_pretrained(world / "model")
    config.enable_audio_output = True
    dit = numbers(
        "hidden_size 16 num_hidden_layers 1 num_attention_heads 2 head_dim 8 emb_dim 8 num_embeds 9"
    )
    dit |= numbers("enc_emb_dim 8 enc_dim 8 enc_attention_channels 4 enc_res2net_scale 2 enc_se_channels 4")
    dit |= {"mel_dim": 8, "enc_channels": [8] * 5}
    vocoder = numbers("mel_dim 8 upsample_initial_channel 64")
    raw = config.to_dict()
    raw["token2wav_config"] = {"dit_config": dit, "bigvgan_config": vocoder}
    torch.manual_seed(0)
    model = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**raw))
    model.save_pretrained(folder, max_shard_size="300KB")
    torch.save({"Ethan": {"bos_token": 1, "cond": torch.zeros(2)}}, folder / "spk_dict.pt")
    small_files(world / "model", folder)
    return folder


def own_layout(whole, folder):
    """The thinker of a whole model alone, in its own layout, with one weight in bfloat16."""
    folder.mkdir()
    small_files(whole, folder)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((whole / CONFIG).read_text())["thinker_config"]
    (folder / CONFIG).write_text(json.dumps(config))
    stored = {}
    for name, weight in tensors(whole).items():
        if name.startswith("thinker."):
            stored[name.removeprefix("thinker.")] = weight
    stored["lm_head.weight"] = stored["lm_head.weight"].bfloat16()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def shapes(folder):
    return {name: (weight.shape, weight.dtype) for name, weight in tensors(folder).items()}


def changed(folder):
    """A model as training leaves it: all that is loaded has moved."""
    lm = load_model(folder)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.01)
    return lm


def check_saved(folder, out, model_class):
    """A trained model is saved as the base, file for file and name for name, and its class loads what was trained."""
    lm = changed(folder)
    lm.save(out)
    assert shapes(out) == shapes(folder)
    base = {path.name: path for path in folder.iterdir()}
    assert {path.name for path in out.iterdir()} == base.keys()
    for path in out.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == base[path.name].read_bytes(), path
    untrained = tensors(folder)
    for name, weight in tensors(out).items():
        if name.startswith(("talker.", "token2wav.", "code2wav.", "thinker.visual.", "visual.")):
            assert torch.equal(weight, untrained[name]), name
    theirs = model_class.from_pretrained(out)  # a missing weight would be random
    thinker = getattr(theirs, "thinker", theirs)
    if "thinker.lm_head.weight" in tensors(out):
        check_vllm(out, thinker)
    parameters = dict(thinker.named_parameters())
    for name, weight in lm.model.named_parameters():
        if not torch.equal(parameters[name], weight):
            assert shapes(out)[name][1] == torch.bfloat16, name
            assert torch.equal(parameters[name].bfloat16(), weight.bfloat16()), name
    return theirs


# hf_to_vllm_mapper of vLLM's Omni thinkers, which load the hub's whole layout, and how Qwen3's hold experts.
VLLM = {
    r"^thinker\.(model|lm_head)\.": r"language_model.\1.",
    r"^thinker\.": "",
    r"experts\.\d+\.(gate|up)_proj\.weight": "experts.gate_up_proj",
    r"experts\.\d+\.down_proj\.weight": "experts.down_proj",
}
VLLM_OF_TRANSFORMERS = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.": "",
}


def renamed(names, patterns):
    for name in names:
        for pattern, other in patterns.items():
            name = re.sub(pattern, other, name)
        if not name.startswith(("talker.", "token2wav.", "code2wav.")):  # its skip_prefixes
            yield name


def check_vllm(folder, thinker):
    """vLLM knows every name of a whole model's folder, and misses none."""
    parameters = [name for name, _ in thinker.named_parameters()]
    assert set(renamed(shapes(folder), VLLM)) == set(renamed(parameters, VLLM_OF_TRANSFORMERS))


def score(lm):
    prompt = lm.encode(QUESTION, waveform=torch.linspace(-0.1, 0.1, 8000).numpy())
    answer = torch.tensor(lm.prompts.template("dog bird"))
    return lm.score([prompt], [[answer]]).logps


def test_a_whole_base_gives_a_whole_model_with_its_voices(whole, tmp_path):
    theirs = check_saved(whole, tmp_path / "saved", Qwen2_5OmniForConditionalGeneration)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert theirs.speaker_map.keys() == {"Ethan"}


def test_the_thinkers_own_layout_gives_the_thinkers_and_each_weight_keeps_the_bases_dtype(whole, tmp_path):
    thinker = own_layout(whole, tmp_path / "base")
    check_saved(thinker, tmp_path / "saved", Qwen2_5OmniThinkerForConditionalGeneration)


def test_qwen2_audio_loads_where_its_base_did(world_qwen2audio, tmp_path):
    check_saved(world_qwen2audio / "model", tmp_path / "saved", Qwen2AudioForConditionalGeneration)


def test_tied_embeddings_are_one_parameter_loaded_and_saved(world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world / "model", base)
    edit(tie_word_embeddings=True)(base)
    with pytest.raises(InputError, match="a weight thinker.lm_head.weight, for which"):
        load_model(base)
    rewrite(lambda content: content.pop("thinker.lm_head.weight"))(base)
    lm = changed(base)
    table = lm.model.model.language_model.embed_tokens.weight
    assert lm.model.lm_head.weight is table
    score(lm).sum().backward()
    assert table.grad.abs().sum() > 0
    lm.save(tmp_path / "saved")
    assert shapes(tmp_path / "saved") == shapes(base)
    assert torch.equal(score(load_model(tmp_path / "saved")), score(lm))
    theirs = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(theirs.lm_head.weight, table)


def test_without_audio_the_audio_side_is_not_loaded_but_saved_with_a_card(whole, tmp_path):
    deaf = load_model(whole, audio=False)
    assert not any("audio_tower" in name for name, _ in deaf.named_parameters())
    settings = {"model": "Qwen/Qwen2.5-Omni-7B", "data": ["\udcff.json"], "lr": 1e-6, "out": "\udcff"}
    deaf.save(tmp_path / "saved", settings)
    base = tensors(whole)
    for name, value in tensors(tmp_path / "saved").items():
        assert torch.equal(value, base[name]), name
    text = (tmp_path / "saved" / "README.md").read_text()
    assert 'base_model: "Qwen/Qwen2.5-Omni-7B"' in text.split("---")[1]
    assert "- lr: `1e-06`" in text and "- out: `?`" in text
    assert "base_model" not in weights.model_card({"model": str(whole)})


def test_a_full_disk_is_one_line_and_leaves_what_was_there(world, tmp_path, monkeypatch):
    lm = load_model(world / "model")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "kept.txt").write_text("of a run before")

    def no_space(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", no_space)
    with pytest.raises(InputError, match="cannot be saved to .*No space left"):
        lm.save(tmp_path / "saved")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["saved", "saved/kept.txt"]


# ---------------------------------------------------------------------------------------- malformed checkpoints


def edit(**values):
    """Change config.json wherever it has such keys; what it has nowhere is put at its top."""

    def change(part):
        return part | {key: values[key] for key in part.keys() & values}

    def apply(folder):
        content = json.loads((folder / CONFIG).read_text(), object_hook=change)
        (folder / CONFIG).write_text(json.dumps(content | values))

    return apply


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def rewrite(change):
    """Save what `change` makes of the weights by name."""

    def apply(folder):
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return apply


def cut_off_part(folder):
    """Of a part that is not loaded, and is written again after the last step."""
    save_file({"talker.more": torch.zeros(99)}, folder / "talker.safetensors")
    os.truncate(folder / "talker.safetensors", 200)


def absent(name):
    return lambda folder: (folder / name).unlink()


NORM = "thinker.model.norm.weight"
MALFORMED = {
    "config: absent": (absent(CONFIG), "config.json cannot be read"),
    "config: another model": (edit(model_type="bert"), "'bert'; supported"),
    "config: remote code": (edit(model_type="x", auto_map={"AutoConfig": "e.C"}), "cannot be read"),
    "config: no heads": (edit(num_attention_heads=0), "config.json"),
    "config: 384 TB": (edit(vocab_size=10**12), "config.json says"),
    "config: a layer less": (edit(num_hidden_layers=2, layer_types=["full_attention"] * 2), "has no place"),
    "tokenizer: absent": (absent("tokenizer.json"), "tokenizer"),
    "ends: texts": (write("generation_config.json", '{"eos_token_id": ["a"]}'), "generation_config"),
    "weights: absent": (absent("model.safetensors"), "no weight named .*no other format is read"),
    "weights: cut off": (lambda f: os.truncate(f / "model.safetensors", 9999), "no whole safetensors file"),
    "weights: a part that is not loaded": (cut_off_part, "talker.safetensors is no whole safetensors file"),
    "weights: integers": (rewrite(lambda c: c.update({NORM: c[NORM].to(torch.int8)})), "is I8 .*quantized"),
    "weights: one missing": (rewrite(lambda c: c.pop(NORM)), "no weight named thinker"),
    "weights: twice": (lambda f: shutil.copy(f / "model.safetensors", f / "old.safetensors"), "both hold"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_checkpoint_is_one_line(case, world, tmp_path):
    damage, words = MALFORMED[case]
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    damage(folder)
    with pytest.raises(InputError, match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_wrong_folder_is_named(tmp_path):
    for path in (tmp_path / "nothing", "x" * 5000, "a/b/c"):
        with pytest.raises(InputError, match="is no model folder here"):
            find_model(path)


def test_the_kind_of_attention_is_ours_and_other_weights_have_another_hash(world, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    before = weights.checkpoint_hash(folder)
    assert before == weights.checkpoint_hash(world / "model")
    expected = score(load_model(folder))
    edit(attn_implementation="eager")(folder)
    assert torch.equal(score(load_model(folder)), expected)
    assert weights.checkpoint_hash(folder) != before
    shutil.copyfile(world / "model" / CONFIG, folder / CONFIG)
    rewrite(lambda content: content["thinker.model.norm.weight"].add_(1))(folder)
    assert weights.checkpoint_hash(folder) != before


def test_a_hub_name_is_fetched_without_pickles_that_are_read(world, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(world / "model")

    monkeypatch.setattr(weights, "snapshot_download", snapshot_download)
    assert find_model("Qwen/Qwen2.5-Omni-7B") == world / "model"
    find_model("Qwen/Qwen2.5-Omni-7B", config_only=True)
    assert asked[1] == ("Qwen/Qwen2.5-Omni-7B", ["config.json"])
    assert asked[0][1] == [*weights.SMALL_FILES, "*.safetensors"]  # "*.bin" and "*.py" are not
