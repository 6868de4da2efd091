"""Laws of LoRA: merged = switched on = PEFT's, switched off = the base, and the run's laws hold for the pairs."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_train import arguments, log, stop_at, train_here, weights
from torch.distributed.checkpoint import FileSystemReader

import fsdp
import lora
from data import read_questions
from files import InputError
from model import load_model

WORLDS = {"omni": "world", "qwen2audio": "world_qwen2audio"}
RANK = 4
PARTS = 7  # of a layer: q, k, v, o, gate, up, down


def trained(lm):
    """Pairs as after some training: B is not zero."""
    pairs = lora.attach(lm, RANK, 8.0)
    numbers = torch.Generator().manual_seed(1)
    for name, half in lora.pair_weights(lm).items():
        if "lora_B" in name:
            half.copy_(0.05 * torch.randn(half.shape, generator=numbers))
    return pairs


@pytest.fixture(scope="module", params=WORLDS)
def adapted(request, tmp_path_factory):
    """(the tiny world, its model with trained pairs, the pairs, what is scored, the saved adapter)."""
    folder = request.getfixturevalue(WORLDS[request.param])
    lm = load_model(folder / "model")
    questions = read_questions(folder / "mmau.json", folder / "audio")[:3]
    prompts = [lm.encode(question) for question in questions]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    groups = lm.generate(prompts, 6, group_size=2, temperature=1.2, generators=generators)
    pairs = trained(lm)
    adapter = tmp_path_factory.mktemp(request.param) / "adapter"
    lora.save_adapter(pairs, adapter, str(folder / "model"))
    return folder, lm, pairs, (prompts, groups), adapter


@torch.no_grad()
def logps(lm, asked):
    return lm.score(*asked).logps


def test_merged_is_switched_on_and_switched_off_is_the_base_bit_for_bit(adapted, tmp_path):
    folder, lm, pairs, asked, adapter = adapted
    lm.save(tmp_path / "merged")
    on = logps(lm, asked)
    assert (on - logps(load_model(tmp_path / "merged"), asked)).abs().max() <= 1e-5
    without = logps(load_model(folder / "model"), asked)
    assert (on - without).abs().max() > 0.1  # the pairs do something
    with torch.no_grad():
        assert torch.equal(pairs.score(*asked).logps, without)
    assert torch.equal(logps(lm, asked), on)  # and are on again
    loaded = load_model(folder / "model")
    lora.load_adapter(loaded, adapter)
    assert torch.equal(logps(loaded, asked), on)


def test_a_new_pair_changes_nothing_and_all_that_learns_is_in_the_decoder(adapted):
    folder, _, _, asked, _ = adapted
    lm = load_model(folder / "model")
    before = logps(lm, asked)
    lora.attach(lm, RANK, 8.0)
    assert torch.equal(logps(lm, asked), before)
    learning = [name for name, p in lm.model.named_parameters() if p.requires_grad]
    assert len(learning) == 2 * len(lm.model.model.language_model.layers) * PARTS
    assert all(name.startswith("model.language_model.layers.") and ".lora_" in name for name in learning)


def test_peft_reads_our_adapter_and_we_read_its_own(adapted, tmp_path):
    folder, lm, _, asked, adapter = adapted
    base = lm.prompts.family.model_class.from_pretrained(folder / "model").eval()
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    assert sum("lora_" in name for name, _ in theirs.named_parameters()) == len(lora.pair_weights(lm))
    question = read_questions(folder / "mmau.json", folder / "audio")[0]
    prompt = lm.encode(question, use_audio=False)
    response = asked[1][0][0]
    ids = torch.cat([prompt.input_ids, response])[None]
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    places = slice(len(prompt.input_ids) - 1, -1)
    expected = logits[places].log_softmax(-1).gather(-1, response[:, None])[:, 0]
    assert (logps(lm, ([prompt], [[response]]))[0] - expected).abs().max() <= 1e-5

    theirs.save_pretrained(tmp_path)
    again = load_model(folder / "model")
    lora.load_adapter(again, tmp_path)
    assert torch.equal(logps(again, asked), logps(lm, asked))


# ------------------------------------------------------------------------------------------------- the run


def options(world, **more):
    return arguments(world, **({"lora": RANK, "lr": 5e-3, "save_minutes": 1e-9} | more))


@pytest.fixture(scope="module")
def one(world, tmp_path_factory):
    """One process's run of three steps."""
    out = tmp_path_factory.mktemp("one")
    assert train_here(out, *options(world)) == 0
    return out


def pairs_of(out):
    return load_file(out / "adapter" / lora.WEIGHTS)


def test_the_run_saves_an_adapter_and_the_merged_model_and_moves_nothing_else(world, one):
    rows = log(one)
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0  # exactly 0 before the first update
    base, merged, halves = weights(world / "model"), weights(one / "model"), pairs_of(one)
    assert not (one / "checkpoints").exists()
    for name, weight in merged.items():
        hub = name.removeprefix("model.").removesuffix(".weight")
        key = f"base_model.model.model.language_model.{hub}.lora_%s.weight"
        expected = base[name].float()
        if key % "A" in halves:
            assert halves[key % "B"].any()
            expected = expected + 2 * halves[key % "B"] @ halves[key % "A"]
        assert torch.allclose(weight, expected, rtol=0, atol=1e-6), name


def test_resumed_is_uninterrupted_and_a_checkpoint_is_the_pairs(world, one, tmp_path, capsys):
    stop_at(2, tmp_path, options(world))
    saved = fsdp.newest_checkpoint(tmp_path)
    tensors = FileSystemReader(saved).read_metadata().state_dict_metadata
    assert len(tensors) == 4 * len(pairs_of(one))  # a half, its two moments and their count
    assert all(".lora_" in name for name in tensors)
    assert train_here(tmp_path, *options(world, lora=0)) == 2  # a full run cannot go on here
    assert "lora: 4 -> 0" in capsys.readouterr().err
    assert train_here(tmp_path, *options(world)) == 0
    whole, resumed = pairs_of(one), pairs_of(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["loss"] for row in log(one)] == [row["loss"] for row in log(tmp_path)]


def test_in_bfloat16_without_audio_the_first_kl_is_0_and_pairs_are_fp32(world, tmp_path):
    flags = options(world, steps=2, dtype="bfloat16", no_audio=True, checkpointing="on")
    assert train_here(tmp_path, *flags) == 0
    first, second = log(tmp_path)
    assert first["kl"] == 0 < second["kl"] and first["grad_norm"] > 0
    assert all(half.dtype == torch.float32 for half in pairs_of(tmp_path).values())


# -------------------------------------------------------------------------------------------------- bad input


def edit_config(**more):
    def spoil(folder):
        path = folder / lora.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return spoil


def rewrite(change):
    """Save what `change` makes of the first half."""

    def spoil(folder):
        halves = load_file(folder / lora.WEIGHTS)
        name, half = halves.popitem()
        save_file({**halves, **change(name, half)}, folder / lora.WEIGHTS)

    return spoil


BAD_ADAPTERS = {
    "another rank": (edit_config(r=3), "do not fit: another base or rank"),
    "no scale": (edit_config(lora_alpha="x"), "no adapter that can be read"),
    "another method": (edit_config(use_dora=True), "plain LoRA adapter: .'use_dora'"),
    "no LoRA": (edit_config(peft_type="IA3"), "'peft_type'"),
    "biases": (edit_config(bias="all"), "'bias'"),
    "turned": (edit_config(fan_in_fan_out=True), "'fan_in_fan_out'"),
    "other layers": (rewrite(lambda name, half: {"other": half}), "other .* do not fit"),
    "another shape": (rewrite(lambda name, half: {name: half[:, :3].clone()}), "do not fit"),
    "integers": (rewrite(lambda name, half: {name: half.to(torch.int8)}), "or no floats"),
    "half a file": (lambda f: os.truncate(f / lora.WEIGHTS, 1000), "no adapter that can be read"),
    "no folder": (shutil.rmtree, "adapter_config.json is missing"),
}


def test_a_bad_adapter_is_refused_in_one_line(world, tmp_path):
    adapter = tmp_path / "adapter"
    lm = load_model(world / "model")
    lora.save_adapter(lora.attach(lm, RANK, 8.0), adapter, "base")
    for name, (spoil, expected) in BAD_ADAPTERS.items():
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        spoil(folder)
        with pytest.raises(InputError, match=expected) as error:
            lora.load_adapter(lm, folder)
        assert "\n" not in str(error.value)
