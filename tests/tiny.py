"""The tiny world: a small model and small datasets in exactly the real formats, made in place.

    python tests/tiny.py --out DIR [--family omni|qwen2audio|qwen3omni] [--seed N]

Writes DIR/model (the hub's layout, random weights briefly trained), DIR/audio/*.wav, DIR/train_qa.json
(AVQA), DIR/arc.jsonl (ARC), DIR/mmau.json (with a revision and an answerless test-full), DIR/mmar.jsonl,
DIR/captions.csv (AudioSetCaps) and DIR/vggsound.csv. The clips are synthesized: 30 things that sound, of
three kinds. About a quarter of the questions can be answered without listening, as in the real benchmarks.
The model hears most things, and answers some questions; to others, told by their wording, it says "unclear"
three times in four: a habit that pays nothing, which GRPO takes away.
"""

import argparse
import csv
import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    WhisperFeatureExtractor,
)

from data import Question, prompt_text
from model import load_model

SOUNDS = """
animal dog bird frog cow
machine engine drill clock siren
weather rain wind thunder waves
instrument drum flute violin guitar piano trumpet organ harp bell cymbal
person man woman child robot crowd singer baby speaker
"""  # a category and its names; their order gives each its sound
CATEGORY = {}
for line in SOUNDS.strip().splitlines():
    category, *names = line.split()
    CATEGORY |= dict.fromkeys(names, category)
NAMES = list(CATEGORY)
CONTENTS = list(dict.fromkeys(CATEGORY.values()))
KINDS = {"instrument": "music", "person": "speech"}  # the rest are sounds
ASKED = [
    "What is the source of the sound in the {}?",
    "What can be heard in the {}?",
    "What sounds in the {}?",
]
HINTED = "Which {} can be heard in the {}?"
FACT = "Which of these is {}?"
ARTICLE = {name: ("an " if name[0] in "aei" else "a ") + name for name in CONTENTS} | {"weather": "weather"}
LEVELS = ("easy", "medium", "hard")
UNCLEAR = "unclear"
SHY = ("What can", "What sounds", "Which of these")  # questions that the base says it to, 3 times in 4
SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|AUDIO|> <|audio_bos|> <|audio_eos|> <|IMAGE|> <|VIDEO|> <|vision_bos|>"
SPECIAL3 = "<|endoftext|> <|im_start|> <|im_end|> <|audio_pad|> <|audio_start|> <|audio_end|> <|image_pad|> <|video_pad|> <|vision_start|>"
SYSTEM = (  # the models' published templates, for what is used of them; Qwen3-Omni has no system prompt
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def kind(name):
    return KINDS.get(CATEGORY[name], "sound")


# ----------------------------------------------------------------------------------------------------- clips


def synthesize(name, rng, rate=16_000, seconds=1.0):
    """One clip of a content, float32 (n,): pitch, level and noise differ from clip to clip."""
    index = NAMES.index(name)
    t = np.arange(int(rate * seconds)) / rate
    detune, phase = rng.uniform(0.97, 1.03), rng.uniform(0, 2 * np.pi)

    def tone(hertz, harmonic=1):
        return np.sin(2 * np.pi * hertz * harmonic * t + phase * harmonic)

    if kind(name) == "sound":  # noise in one of 4 bands, steady or beating at one of 2 rates
        place, beat = index % 4, index // 4 % 3
        center = (300, 800, 2000, 4500)[place] * detune
        spectrum = np.fft.rfft(rng.standard_normal(len(t)))
        frequency = np.fft.rfftfreq(len(t), 1 / rate)
        x = np.fft.irfft(spectrum * np.exp(-(((frequency - center) / (0.2 * center)) ** 2)), len(t))
        if beat:
            x *= 0.5 + 0.5 * tone((0, 4, 12)[beat])
    elif kind(name) == "music":  # one of 5 pitches, held with odd harmonics or plucked with all
        index -= NAMES.index("drum")
        pitch, plucked = (180, 330, 600, 1100, 2000)[index % 5] * detune, index // 5
        harmonics = range(1, 6) if plucked else range(1, 10, 2)
        x = sum(tone(pitch, h) / h for h in harmonics if pitch * h < 7500)
        x *= np.exp(-4 * (t % 0.5)) if plucked else 1
    else:  # a buzz of one of 4 voices through one of 2 vowels, in syllables
        index -= NAMES.index("man")
        pitch, vowel = (100, 160, 260, 420)[index % 4] * detune, index // 4
        x = 0
        for h in range(1, int(4000 / pitch)):
            gain = sum(np.exp(-(((pitch * h - f) / 150) ** 2)) for f in ((700, 1200), (300, 2500))[vowel])
            x = x + gain * tone(pitch, h)
        x *= 0.6 + 0.4 * tone(5)
    x = x / np.abs(x).max() * rng.uniform(0.2, 0.7)
    return (x + rng.standard_normal(len(t)) * 0.005).astype("float32")


def write_clip(folder, stem, names, rng, number):
    """Clips differ in form as real ones do: one in eight is stereo, at another rate, or a flac file."""
    rate = {1: 44_100, 2: 22_050}.get(number % 8, 16_000)
    ending = ".flac" if number % 8 == 3 else ".wav"
    parts = [synthesize(name, rng, rate, 1.0 if len(names) == 1 else 0.6) for name in names]
    samples = np.concatenate(parts)
    if number % 8 == 1:
        samples = np.stack([samples, samples * 0.8], 1)
    soundfile.write(folder / f"{stem}{ending}", samples, rate)
    return f"{stem}{ending}"


# -------------------------------------------------------------------------------------------------- questions


def choices_of(rng, right, others, count=3):
    choices = [*rng.sample(others, count), right]
    rng.shuffle(choices)
    return choices


def elsewhere(right):
    """The names of other categories."""
    return [name for name in NAMES if CATEGORY[name] != CATEGORY[right]]


def ask(rng, word, hinted, right=None):
    """(what is heard, question, choices). A hinted question names the category, which only the right choice
    has.
    """
    right = right or rng.choice(NAMES)
    if hinted:
        return right, HINTED.format(CATEGORY[right], word), choices_of(rng, right, elsewhere(right))
    text = rng.choice(ASKED).format(word)
    return right, text, choices_of(rng, right, [name for name in NAMES if name != right])


def ask_fact(rng):
    """The same of a question that is text alone, with 3 to 5 choices."""
    right = rng.choice(NAMES)
    choices = choices_of(rng, right, elsewhere(right), rng.choice([2, 3, 3, 3, 4]))
    return right, FACT.format(ARTICLE[CATEGORY[right]]), choices


def fact(rng, number):
    """Such a question in ARC's format, labelled A-E or 1-5."""
    right, stem, choices = ask_fact(rng)
    labels = "12345" if number % 4 == 0 else "ABCDE"
    listed = [{"text": text, "label": label} for text, label in zip(choices, labels, strict=False)]
    row = {"id": f"TINY_{number}", "question": {"stem": stem, "choices": listed}}
    return row | {"answerKey": labels[choices.index(right)]}


def write_questions(out, rng, noise, sizes):
    """All question files and their clips. Names of clips are AVQA's and MMAU's; none is asked about twice."""
    audio = out / "audio"
    audio.mkdir(parents=True)
    train = []
    captions = [["id", "caption", "answer_1", "answer_2", "answer_3"]]
    listed = []
    for i in range(sizes["train"]):
        right, text, choices = ask(rng, "video", hinted=i % 4 == 0)
        start = i % 300
        stem = f"-tiny{i:07d}_{start:06d}"
        write_clip(audio, stem if i % 2 else f"-tiny{i:07d}_{start}", [right], noise, i)
        row = {"id": i, "video_name": stem, "video_id": i, "question_text": text, "multi_choice": choices}
        row["answer"] = choices.index(right)
        train.append(row | {"question_relation": "Sound", "question_type": "Come From"})
        captions.append([stem, *caption(right)])
        listed.append(f"-tiny{i:07d},{start},a sound,train\n")
    (out / "train_qa.json").write_text(json.dumps(train))
    (out / "vggsound.csv").write_text("".join(listed))
    with open(out / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(captions)
    write_rows(out / "arc.jsonl", [fact(rng, i) for i in range(sizes["arc"])])
    mmau = []
    for i in range(sizes["mmau"]):
        hinted = i % 7 in (0, 3)
        right, text, choices = ask(rng, "audio", hinted)
        row = {"id": f"tiny-{i:04d}", "question": text, "choices": choices, "answer": right}
        clip = write_clip(audio, row["id"], [right], noise, i)
        row |= {"audio_id": f"./test-mini-audios/{clip}", "dataset": "tiny", "split": "test-mini"}
        row |= {"task": kind(right), "sub-category": CATEGORY[right], "difficulty": LEVELS[i % 3]}
        mmau.append(row | {"category": "Reasoning" if hinted else "Information Extraction"})
    (out / "mmau.json").write_text(json.dumps(mmau))
    hidden = [{**row, "split": "test"} for row in mmau]
    for row in hidden:
        del row["answer"]
    (out / "mmau-full.json").write_text(json.dumps(hidden))
    for row in mmau[::4]:  # as the benchmark's revision of 15 May 2025 rewrote a quarter of its questions
        hinted = row["category"] == "Reasoning"
        _, row["question"], row["choices"] = ask(rng, "audio", hinted, row["answer"])
    (out / "mmau-v05.15.25.json").write_text(json.dumps(mmau))
    mmar = []
    for i in range(sizes["mmar"]):
        hinted = i % 4 == 3
        right, text, choices = ask(rng, "audio", hinted)
        heard = [right]
        if hinted:
            heard.append(rng.choice([name for name in NAMES if kind(name) != kind(right)]))
        kinds = sorted({kind(name) for name in heard}, key=["sound", "music", "speech"].index)
        row = {"id": f"tinyr{i:04d}", "question": text, "choices": choices, "answer": right}
        clip = write_clip(audio, f"{row['id']}_00-00-00_00-00-01", heard, noise, i)
        row |= {"audio_path": f"./audio/{clip}", "category": "Signal Layer", "language": None}
        modality = "-".join(["mix", *kinds]) if len(kinds) > 1 else kinds[0]
        mmar.append(row | {"modality": modality, "sub-category": CATEGORY[right]})
    write_rows(out / "mmar.jsonl", mmar)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def caption(name):
    """AudioSetCaps' four texts of a clip: overall, sounds, speech, music."""
    speech = "There is no speech in this audio."
    music = "There is no music in this audio."
    if kind(name) == "speech":
        speech = f"This is a speech, in the voice of a {name}."
    if kind(name) == "music":
        music = f"The music instrument is the {name}."
    return f"The sound of a {name} is heard.", f"A {name} sounds, steady and clear.", speech, music


# ------------------------------------------------------------------------------------------------------ model


def write_tokenizer(folder, family="omni"):
    """Byte-level BPE like Qwen's, trained on the world's own words: those are one token, any other text is
    bytes.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [template.format(word) for template in ASKED for word in ("video", "audio")]
    lines += [HINTED.format(c, "audio") for c in CONTENTS] + [FACT.format(a) for a in ARTICLE.values()]
    lines += [f"{name}\n{NAMES}" for name in [*NAMES, UNCLEAR]]
    lines += [prompt_text(Question("", line, (), None, None, {})) for line in lines]
    lines += ["system\nYou are a helpful assistant.\nuser\nassistant\nAudio 1: \n"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines * 3, trainer)
    special, template = SPECIAL, SYSTEM + TEMPLATE
    if family == "qwen3omni":
        special, template = SPECIAL3, TEMPLATE
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special.split()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    fast.save_pretrained(folder)
    ids = dict(zip(SPECIAL.split(), fast.convert_tokens_to_ids(special.split()), strict=True))
    return ids, len(fast)


def numbers(text):
    """Names and numbers in turn: "depth 1 hidden_size 32" -> {"depth": 1, "hidden_size": 32}."""
    words = text.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def write_model(folder, family, hidden=96):
    """A random model in the hub's layout: of the Omni families the thinker with its vision tower."""
    folder.mkdir(parents=True)
    ids, vocabulary = write_tokenizer(folder, family)
    half = hidden // 8  # of a head; the rotary embedding's three sections share it
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    audio = numbers(
        "d_model 64 encoder_layers 2 encoder_attention_heads 4 encoder_ffn_dim 192 num_mel_bins 128"
    )
    text = numbers(
        "num_hidden_layers 3 num_attention_heads 4 num_key_value_heads 2 max_position_embeddings 8192"
    )
    text |= {"hidden_size": hidden, "intermediate_size": hidden, "vocab_size": vocabulary}
    sees = numbers("depth 1 hidden_size 32 intermediate_size 32 num_heads 2")
    thinker = {
        "audio_config": audio | {"output_dim": hidden},
        "text_config": text | {"rope_scaling": {"type": "default", "mrope_section": sections}},
        "vision_config": sees | {"out_hidden_size": hidden},
        "audio_token_id": ids["<|AUDIO|>"],
        "image_token_id": ids["<|IMAGE|>"],
        "video_token_id": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
    }
    if family == "qwen2audio":
        audio |= {"model_type": "qwen2_audio_encoder"}
        text |= {"model_type": "qwen2"}
        config = Qwen2AudioConfig(
            audio_config=audio, text_config=text, audio_token_id=thinker["audio_token_id"]
        )
        model = Qwen2AudioForConditionalGeneration(config)
    elif family == "qwen3omni":
        thinker["audio_config"] |= numbers("downsample_hidden_size 8")
        thinker["text_config"] |= numbers("num_experts 8 num_experts_per_tok 2")
        thinker["text_config"] |= {"head_dim": 2 * half, "moe_intermediate_size": hidden // 2}
        thinker["vision_config"] |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        config = Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
        model = Qwen3OmniMoeForConditionalGeneration(config)
    else:
        thinker["audio_config"] |= numbers("n_window 100")
        thinker["vision_config"] |= {"fullatt_block_indexes": [0]}
        talker = numbers("hidden_size 64 intermediate_size 64 head_dim 16 num_hidden_layers 1 vocab_size 64")
        talker |= numbers("num_attention_heads 4 num_key_value_heads 2")
        talker |= {"embedding_size": hidden}
        talker |= {"rope_scaling": {"type": "default", "mrope_section": [2, 2, 4]}}
        config = Qwen2_5OmniConfig(thinker_config=thinker, talker_config=talker, enable_audio_output=False)
        model = Qwen2_5OmniForConditionalGeneration(config)
    start_to_copy(model)
    model.save_pretrained(folder)
    longest = 300 if family == "omni" else 30
    WhisperFeatureExtractor(feature_size=128, chunk_length=longest).save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]})
    )


def start_to_copy(model):
    """Weights to begin with: each head of attention copies what it sees (arXiv 2305.09828), and what is said is
    what is copied. From the usual ones so small a model learns to read its choices much later.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.5 if "embed" in name else parameter.shape[-1] ** -0.5)
    thinker = getattr(model, "thinker", model)
    text = thinker.model.language_model
    thinker.lm_head.weight.data.copy_(0.4 * text.embed_tokens.weight)
    for layer in text.layers:
        first, second = layer.self_attn.v_proj.weight.data.chunk(2)  # of two heads each
        layer.self_attn.o_proj.weight.data.copy_(torch.cat([first, first, second, second]).T)


def pretraining_examples(lm, rng, noise, count):
    """(prompt, answer, how often UNCLEAR is said instead): clips asked about, facts, blind guesses."""
    examples = []
    for i in range(count):
        clip = None
        if i % 4 == 0:
            right, text, choices = ask_fact(rng)
        else:
            hinted = i % 4 == 1
            right, text, choices = ask(rng, "audio", hinted)
            if i % 8 not in (5, 7):
                clip = synthesize(right, noise)
            elif not hinted:
                right = choices[0]
        unclear = 0.7 if text.startswith(SHY) else 0.0
        asked = Question(str(i), text, tuple(choices), right, None, {})
        examples.append((lm.encode(asked, waveform=clip), right, unclear))
    return examples


def fit(lm, examples, rng, steps, batch, peak_rate):
    """Plain next-token loss on the answer, and on UNCLEAR by the example's share of it."""
    optimizer = torch.optim.AdamW(lm.parameters(), peak_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    end = "<|im_end|>"
    for _ in range(steps):
        prompts, answers, shares = zip(*rng.sample(examples, batch), strict=True)
        groups = []
        for answer in answers:
            groups.append([torch.tensor(lm.prompts.template(text + end)) for text in (answer, UNCLEAR)])
        weights = torch.tensor([[1 - share, share] for share in shares]).flatten()
        loss = -(lm.score(list(prompts), groups).logps.sum(1) * weights).sum() / batch
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def train_base(folder, rng, noise, effort, rate):
    """First to hear, then to read the choices, then both, with "unclear" said too often."""
    lm = load_model(folder)
    examples = pretraining_examples(lm, rng, noise, 600)
    alone, texts = [], []
    for prompt, right, _ in examples:
        if prompt.input_features is None:
            texts.append((prompt, right, 0.0))
        else:  # nothing but its audio tokens: a quarter of the tokens to learn hearing from
            ids = prompt.input_ids
            prompt = replace(prompt, input_ids=ids[ids == lm.prompts.audio_token_id])
            alone.append((prompt, right, 0.0))
    fit(lm, alone, rng, round(80 * effort), 16, rate)
    fit(lm, texts, rng, round(60 * effort), 16, rate)
    fit(lm, examples, rng, round(100 * effort), 16, rate)
    lm.save(folder)


SIZES = {"train": 600, "arc": 300, "mmau": 300, "mmar": 160}


def make_world(out, family="omni", seed=0, effort=1.0, sizes=None, hidden=96):
    """Make the world in the folder `out` (replaced if it exists); the same for the same arguments.

    `effort` scales the training of the base (0: random weights), `hidden` its width.
    """
    out = Path(out)
    shutil.rmtree(out, ignore_errors=True)
    torch.manual_seed(seed)
    write_questions(out, random.Random(seed), np.random.default_rng(seed), sizes or SIZES)
    write_model(out / "model", family, hidden)
    if effort:
        rngs = random.Random(seed + 1), np.random.default_rng(seed + 1)
        train_base(out / "model", *rngs, effort, 3e-3 * 96 / hidden)


if __name__ == "__main__":
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    add = parser.add_argument
    families = ["omni", "qwen2audio", "qwen3omni"]
    add("--out", required=True, help="folder to write, replaced if it exists")
    add("--family", choices=families, default="omni", help="(default: omni)")
    add("--seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    make_world(args.out, args.family, args.seed)
    print(f"{args.out}: a tiny {args.family} world")
