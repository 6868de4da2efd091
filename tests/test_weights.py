"""Laws of the files: what is saved has the base's layout and loads everywhere; what is malformed is one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
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
from weights import find_model

QUESTION = Question("1", "What sounds?", ("dog", "bird"), "dog", None, {})

# vllm/model_executor/models/qwen2_5_omni_thinker.py, hf_to_vllm_mapper (the last match in order wins a prefix
# once each), and load_weights' skip_prefixes.
VLLM_NAMES = {
    "thinker.lm_head.": "language_model.lm_head.",
    "thinker.model.": "language_model.model.",
    "thinker.": "",
}
VLLM_SKIPS = ("talker.", "token2wav.")


def small_files(source, folder):
    """The tokenizer and the like of a tiny model."""
    for path in weights.files_in(source, weights.SMALL_FILES):
        if path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A base as the hub has it, made by transformers' own class: thinker, talker, token2wav, voices."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    config = Qwen2_5OmniConfig.from_pretrained(world / "model")
    config.enable_audio_output = True
    dit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "emb_dim": 8}
    dit |= {"num_embeds": 9, "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 8]}
    dit |= {"enc_attention_channels": 4, "enc_res2net_scale": 2, "enc_se_channels": 4, "mel_dim": 8}
    vocoder = {"mel_dim": 8, "upsample_initial_channel": 64}
    raw = config.to_dict()
    raw["token2wav_config"] = {"dit_config": dit, "bigvgan_config": vocoder}
    torch.manual_seed(0)
    model = Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**raw))
    model.save_pretrained(folder, max_shard_size="300KB")
    torch.save({"Ethan": {"bos_token": 1, "cond": torch.zeros(2)}}, folder / "spk_dict.pt")
    small_files(world / "model", folder)
    return folder


def shapes(folder):
    """name -> (shape, dtype) of every weight in the folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no dict)
                part = opened.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def changed(folder):
    """A model as training leaves it: all that is loaded has moved."""
    lm = load_model(folder)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.01)
    return lm


def score(lm):
    prompt = lm.encode(QUESTION, waveform=torch.linspace(-0.1, 0.1, 8000).numpy())
    answer = torch.tensor(lm.prompts.template("dog bird"))
    return lm.score([prompt], [[answer]]).logps


def test_a_whole_base_gives_a_whole_model_that_everything_loads(whole, tmp_path):
    lm = changed(whole)
    lm.save(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert len(list(saved.glob("*.safetensors"))) > 3
    assert shapes(saved) == shapes(whole)
    names = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in saved.iterdir()) == names
    for name in names:
        if not name.endswith(".safetensors"):
            assert (saved / name).read_bytes() == (whole / name).read_bytes(), name

    theirs = Qwen2_5OmniForConditionalGeneration.from_pretrained(saved)  # a missing weight would be random
    base = tensors(whole)
    for name, value in theirs.state_dict().items():
        ours = name.removeprefix("thinker.")
        if name.startswith("thinker.") and ours in lm.model.state_dict():
            assert torch.equal(value, lm.model.state_dict()[ours]), name
        elif not name.startswith("thinker."):
            assert torch.equal(value, base[name]), name
    assert theirs.speaker_map.keys() == {"Ethan"}
    assert torch.equal(score(load_model(saved)), score(lm))

    mapped = set()
    for name in shapes(saved):
        for old, new in VLLM_NAMES.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        if not name.startswith(VLLM_SKIPS):
            mapped.add(name)
    expected = set()  # vLLM's thinker has visual, audio_tower and language_model
    for name, _ in theirs.thinker.named_parameters():
        if name.startswith("lm_head."):
            expected.add("language_model." + name)
        elif name.startswith("model.language_model."):
            expected.add("language_model.model." + name.removeprefix("model.language_model."))
        else:
            expected.add(name.removeprefix("model."))
    assert mapped == expected


def loaded(cls, folder):
    """The folder in transformers' own class, which must miss nothing and find nothing that it does not know."""
    theirs, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return theirs


def test_the_thinkers_own_layout_gives_the_thinkers_and_each_weight_keeps_the_bases_dtype(whole, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    small_files(whole, base)
    (base / weights.INDEX).unlink()
    thinker = json.loads((whole / "config.json").read_text())["thinker_config"]
    (base / "config.json").write_text(json.dumps(thinker))
    halves = {}
    for name, weight in tensors(whole).items():
        if name.startswith("thinker."):
            halves[name.removeprefix("thinker.")] = weight
    halves["lm_head.weight"] = halves["lm_head.weight"].bfloat16()
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    lm = changed(base)
    lm.save(tmp_path / "saved")
    assert shapes(tmp_path / "saved") == shapes(base)
    theirs = loaded(Qwen2_5OmniThinkerForConditionalGeneration, tmp_path / "saved")
    assert torch.equal(theirs.lm_head.weight.bfloat16(), lm.model.lm_head.weight.bfloat16())
    assert (score(load_model(tmp_path / "saved")) - score(lm)).abs().max() <= 0.1  # rounded


def test_qwen2_audio_loads_where_its_base_did(world_qwen2audio, tmp_path):
    lm = changed(world_qwen2audio / "model")
    lm.save(tmp_path / "saved")
    assert shapes(tmp_path / "saved") == shapes(world_qwen2audio / "model")
    state = lm.model.state_dict()
    for name, value in loaded(Qwen2AudioForConditionalGeneration, tmp_path / "saved").state_dict().items():
        assert torch.equal(value, state[name]), name


def test_tied_embeddings_are_one_parameter_loaded_and_saved(world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world / "model", base)
    edit("config.json", thinker_config__tie_word_embeddings=True)(base)
    edit("config.json", thinker_config__text_config__tie_word_embeddings=True)(base)
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


CONFIG = "config.json"
TEXT = "thinker_config__text_config__"


def edit(name, **values):
    """Change values of a JSON file; a key with __ is a path."""

    def apply(folder):
        content = json.loads((folder / name).read_text())
        for path, value in values.items():
            *parents, key = path.split("__")
            place = content
            for parent in parents:
                place = place[parent]
            place[key] = value
        (folder / name).write_text(json.dumps(content))

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


def layers(count):
    values = {TEXT + "num_hidden_layers": count, TEXT + "layer_types": ["full_attention"] * count}
    return edit(CONFIG, **values)


def cut_off_part(folder):
    """Of a part that is not loaded, and is written again after the last step."""
    save_file({"talker.more": torch.zeros(99)}, folder / "talker.safetensors")
    os.truncate(folder / "talker.safetensors", 200)


def absent(name):
    return lambda folder: (folder / name).unlink()


NORM = "thinker.model.norm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4986211280\n"
MALFORMED = {
    "config: absent": (absent(CONFIG), "config.json cannot be read"),
    "config: a list": (write(CONFIG, "[1]"), "config.json cannot be read"),
    "config: another model": (edit(CONFIG, model_type="bert"), "'bert'; supported"),
    "config: remote code": (edit(CONFIG, model_type="x", auto_map={"AutoConfig": "e.C"}), "cannot be read"),
    "config: no heads": (edit(CONFIG, **{TEXT + "num_attention_heads": 0}), "config.json"),
    "config: 384 TB": (edit(CONFIG, **{TEXT + "vocab_size": 10**12}), "config.json says"),
    "config: a layer less": (layers(2), "config.json has no place"),
    "config: a layer more": (layers(4), "no weight named"),
    "tokenizer: absent": (absent("tokenizer.json"), "tokenizer"),
    "extractor: a text": (write("preprocessor_config.json", '"x"'), "feature extractor"),
    "ends: texts": (write("generation_config.json", '{"eos_token_id": ["a"]}'), "generation_config"),
    "weights: absent": (absent("model.safetensors"), "no weight named .*no other format is read"),
    "weights: cut off": (lambda f: os.truncate(f / "model.safetensors", 9999), "no whole safetensors file"),
    "weights: a pointer": (write("model.safetensors", POINTER), "git-lfs pointer"),
    "weights: a part that is not loaded": (cut_off_part, "talker.safetensors is no whole safetensors file"),
    "weights: integers": (rewrite(lambda c: c.update({NORM: c[NORM].to(torch.int8)})), "is I8 .*quantized"),
    "weights: one missing": (rewrite(lambda c: c.pop(NORM)), "no weight named thinker"),
    "weights: twice": (lambda f: shutil.copy(f / "model.safetensors", f / "old.safetensors"), "both hold"),
    "index: absent file": (write(weights.INDEX, '{"weight_map": {"a": "7.safetensors"}}'), "lacks 7.safe"),
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
    edit(CONFIG, attn_implementation="eager", thinker_config__attn_implementation="eager")(folder)
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
