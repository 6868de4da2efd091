"""Laws of reading: every published format, every real row, what hostile files get, and who is asked what."""

import json
import os
import random
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data
from conftest import DATA, time_limit
from data import (
    FORMATS,
    PROMPTS,
    Question,
    Questions,
    check_clip,
    check_clips,
    format_of,
    load_audio,
    load_questions,
    prompt_text,
    read_questions,
    resample,
    sinc_filter,
)
from files import InputError

# One row of each format in the shape that it is published in, and what is read from it.
AVQA = {"id": 183, "video_name": "-HG3Omg_89c_000030", "video_id": 341, "question_text": "What happened in the video?",
        "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"], "answer": 1,
        "question_relation": "View", "question_type": "Happening"}  # fmt: skip
ARC = {"id": "MCAS_2000_4_6", "question": {"stem": "Which is newest?", "choices": [
    {"text": "cellular telephone", "label": "A"}, {"text": "television", "label": "B"}, {"text": "radio", "label": "C"}]},
    "answerKey": "C"}  # fmt: skip
MMAU = {"id": "m1", "audio_id": "./test-mini-audios/m1.wav", "question": "Who?", "choices": ["Man", "Woman"],
        "answer": "Man", "dataset": "AudioSet", "task": "sound", "split": "test-mini", "category": "Reasoning",
        "sub-category": "Acoustic Source Inference", "difficulty": "medium"}  # fmt: skip
MMAR = {"id": "r1", "audio_path": "./audio/r1.wav", "question": "Who?", "choices": ["Man", "Woman"], "answer": "Woman",
        "modality": "music", "category": "Cultural Layer", "language": None, "source": "youtube"}  # fmt: skip
PRO = {"id": "p1", "audio_path": ["data/p1.wav"], "question": "Who?", "choices": ["Man", "Woman"], "answer": "Man",
       "length_type": "short", "category": "sound", "perceptual_skills": ["pitch"], "task_identifier": None}  # fmt: skip
MCQ = {"source_dataset": "Clotho", "id": "7", "question_type": "sound", "audio_path": "Clotho/c7.wav", "question": "Who?",
       "choices": ["Man", "Woman", "Dog", "Cat"], "answer": "Dog", "audio-contribution": "strong"}  # fmt: skip
MCQ_NO_ID = {key: value for key, value in MCQ.items() if key != "id"}
DCASE = {"question_text": "Who speaks in the video?", "multi_choice": ["Man", "Woman"], "audio_path": "d1.wav",
         "answer": "Woman"}  # fmt: skip
MMSU = {"id": "s1", "task_name": "gender", "audio_path": "./audio/s1.wav", "question": "Who?", "choice_a": None,
        "choice_b": "male", "choice_c": None, "choice_d": "None", "answer_gt": "male", "category": "Perception",
        "sub-category": "Paralinguistics"}  # fmt: skip
AIR = {"path": "a1.wav", "question": "Who?", "choice_a": "Man", "choice_b": "Woman", "choice_c": "Dog", "choice_d": "",
       "answer_gt": "Dog", "task_name": "Speaker_Age", "dataset_name": "common_voice", "uniq_id": 12}  # fmt: skip
PUBLISHED = {  # name -> its format, the row, the answer, where its clip is looked for
    "avqa": ("avqa", AVQA, "Yacht consignment", "-HG3Omg_89c_000030.wav"),
    "r1-aqa": ("avqa", AVQA | {"audio_path": "x.wav"}, "Yacht consignment", "-HG3Omg_89c_000030.wav"),
    "arc": ("arc", ARC, "radio", None),
    "mmau": ("mmau", MMAU, "Man", "test-mini-audios/m1.wav"),
    "mmar": ("mmar", MMAR, "Woman", "audio/r1.wav"),
    "mmau-pro": ("mmau-pro", PRO, "Man", "data/p1.wav"),
    "audiomcq": ("audiomcq", MCQ, "Dog", "Clotho/c7.wav"),
    "audiomcq, no id": ("audiomcq", MCQ_NO_ID, "Dog", "Clotho/c7.wav"),
    "dcase": ("dcase", DCASE, "Woman", "d1.wav"),
    "mmsu": ("choices_ad", MMSU, "male", "audio/s1.wav"),
    "air-bench": ("choices_ad", AIR, "Dog", "Speaker_Age_common_voice/a1.wav"),
}


def write(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_format_is_read_as_itself(tmp_path, name, lines):
    form, row, answer, clip = PUBLISHED[name]
    (q,) = read_questions(write(tmp_path / "q.json", [row], lines), tmp_path)
    assert q.meta == {"format": form, "row": 0, "source": row}
    assert q.answer == answer and answer in q.choices and "" not in q.choices
    assert q.audio == (clip and str(tmp_path / clip))
    if form == "avqa":
        assert "happened in the audio?" in q.question


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_format_is_mistaken_for_another(name):
    """Nor where optional keys are missing, an evaluation added its own, or the keys stand in another order."""
    form, row, *_ = PUBLISHED[name]
    optional = {
        "category",
        "language",
        "source",
        "task",
        "question_type",
        "sub-category",
        "perceptual_skills",
    }
    fewer = {key: value for key, value in row.items() if key not in optional}
    more = row | {
        "model_prediction": "Man",
        "model_output": "Man",
        "response": "Man",
        "answer_prediction": "Man",
    }
    for variant in (row, fewer, more, dict(reversed(row.items()))):
        assert format_of(variant) == form
    assert {form for form, *_ in PUBLISHED.values()} == set(FORMATS)


def test_a_file_is_in_the_format_of_most_of_its_rows(tmp_path, caplog):
    rows = [AVQA, *[MMAU | {"id": f"{i}"} for i in range(20)]]
    questions = read_questions(write(tmp_path / "q.json", rows))
    assert {q.meta["format"] for q in questions} == {"mmau"} and len(questions) == 20
    assert "row 1: no 'question'" in caplog.text


def test_mmau_pros_other_kinds_of_rows_are_counted_and_are_not_malformed(tmp_path, caplog):
    others = [{"audio_path": ["a.wav", "b.wav"]}, {"choices": None}, {"choices": []}, {"choices": ["open"]}]
    rows = [PRO | {"id": f"other{i}"} | change for i, change in enumerate(others)]
    assert len(read_questions(write(tmp_path / "q.json", [*rows, PRO]), max_bad=0)) == 1
    assert "4 rows of several clips or without choices" in caplog.text and "skipped" not in caplog.text
    with pytest.raises(InputError, match="no question about one clip"):
        read_questions(write(tmp_path / "q.json", rows))


def test_ids_of_rows_without_are_their_own_in_any_order_and_after_an_evaluation(tmp_path):
    rows = [MCQ_NO_ID | {"question": f"Who is {i}?"} for i in range(20)]
    ids = {q.question: q.id for q in read_questions(write(tmp_path / "q.jsonl", rows, True))}
    answered = [row | {"model_prediction": "Dog"} for row in rows]
    random.Random(0).shuffle(answered)
    again = {q.question: q.id for q in read_questions(write(tmp_path / "q.jsonl", answered, True))}
    assert ids == again and len(set(ids.values())) == 20
    twice = [MCQ, MCQ | {"source_dataset": "AudioCaps"}]  # ids that count within a source
    assert len(read_questions(write(tmp_path / "q.json", twice))) == 2


def test_the_prompt_is_the_papers():
    q = Question("1", "What is it?", ("a dog", "it's a cat"), "a dog", None, {})
    expected = """What is it? Please choose the answer from the following options: ['a dog', "it's a cat"]."""
    assert prompt_text(q) == prompt_text(q, "direct") == expected
    assert prompt_text(q, "answer") == f"{expected} Output the final answer in <answer> </answer>."
    thinking = "Output the thinking process in <think> </think> and final answer in <answer> </answer>."
    assert prompt_text(q, "think") == f"{expected} {thinking}"
    assert list(PROMPTS) == ["direct", "answer", "think"]


def test_empty_answers_hide_a_file_only_if_all_are_empty(tmp_path, caplog):
    hidden = [
        {key: value for key, value in MMAU.items() if key != "answer"} | {"id": f"{i}"} for i in range(20)
    ]
    for empty in ({}, {"answer": ""}, {"answer": None}):
        questions = read_questions(write(tmp_path / "q.json", [row | empty for row in hidden]))
        assert len(questions) == 20 and {q.answer for q in questions} == {None}
    one_empty = [row | {"answer": "Man"} for row in hidden[:19]] + hidden[19:]
    assert len(read_questions(write(tmp_path / "q.json", one_empty))) == 19
    assert "row 20: no answer, which other rows have" in caplog.text


@pytest.mark.parametrize("stem", ["-HG3Omg_89c_000030", "-HG3Omg_89c_30"])
@pytest.mark.parametrize("ending", [".wav", ".flac", ".mp3", ".ogg"])
def test_avqas_clips_are_found_under_all_their_names(tmp_path, stem, ending):
    (tmp_path / f"{stem}{ending}").touch()
    for name in ("-HG3Omg_89c_000030", "-HG3Omg_89c_30"):
        (q,) = read_questions(
            write(tmp_path / f"{name}{ending}.json", [AVQA | {"video_name": name}]), tmp_path
        )
        assert q.audio == str(tmp_path / f"{stem}{ending}")


def test_a_clip_is_looked_for_by_name_then_by_path_and_never_outside_the_folder(tmp_path):
    inside = tmp_path / "clips"
    (inside / "a").mkdir(parents=True)
    for place in ("deep.flac", "a/deep.wav", "a/only.mp3", "../secret.wav", "two.wav", "two.mp4", "film.mp4"):
        (inside / place).touch()
    (inside / "link.wav").symlink_to(tmp_path / "secret.wav")
    found = {
        "./x/y/deep.wav": "deep.flac", "a/only.wav": "a/only.mp3", "a/only": "a/only.mp3", "b/none.ogg": "b/none.ogg",
        "../secret.wav": "secret.wav", "a/../../secret.wav": "secret.wav", str(tmp_path / "secret.wav"): "secret.wav",
        "/etc/passwd": "passwd.wav", "link.wav": "link.wav", "two.mp4": "two.wav", "film": "film.mp4",
    }  # fmt: skip
    for name, expected in found.items():
        assert data.find_clip(name, inside) == str(inside / expected), name
    for name in ("", ".", "..", "a/..", "/", "a\0b", None, 7, ["x.wav"]):
        with pytest.raises(ValueError, match="is no clip name"):
            data.find_clip(name, inside)


@pytest.mark.skipif(not DATA.exists(), reason=f"real questions are not at {DATA}")
@pytest.mark.parametrize(
    "file", ["mmau-test-mini-original.json", "mmau-test-mini-v05.15.25.json", "MMAR-meta.jsonl"]
)
def test_every_real_row_is_read(file):
    questions = read_questions(DATA / file, DATA / "audio")
    assert len(questions) == 1000 and all(
        q.answer in q.choices and 2 <= len(q.choices) <= 8 for q in questions
    )


@pytest.mark.skipif(not DATA.exists(), reason=f"real clips are not at {DATA}")
def test_real_clips_are_16_khz_mono():
    for clip in sorted((DATA / "audio").iterdir()):
        samples = load_audio(clip)
        seconds = soundfile.info(clip).duration
        assert samples.dtype == np.float32 and samples.ndim == 1 and 0.01 < np.abs(samples).max() <= 1
        assert abs(len(samples) / 16_000 - seconds) < 0.1


@pytest.mark.parametrize("rate", [8_000, 11_025, 12_345, 22_050, 32_000, 44_100, 48_000, 192_000, 384_000])
def test_resampling_is_exact_on_tones_in_the_pass_band(rate):
    """Against the tone itself, sampled at 16 kHz, and against scipy's resampler: below -60 dB inside the clip."""
    from scipy.signal import firwin, resample_poly

    for tone in np.linspace(50, min(7_000, 0.44 * rate), 5):
        ours = resample(np.sin(2 * np.pi * tone * np.arange(rate) / rate).astype("float32"), rate)
        exact = np.sin(2 * np.pi * tone * np.arange(len(ours)) / 16_000)
        inside = slice(1000, -1000)
        assert len(ours) == 16_000
        assert 20 * np.log10(np.abs(ours - exact)[inside].max()) < -60, tone
        if rate != 12_345:
            up, down = 16_000 // np.gcd(rate, 16_000), rate // np.gcd(rate, 16_000)
            filter = firwin(256 * max(up, down) + 1, 0.95 / max(up, down), window=("kaiser", 10.0))
            theirs = resample_poly(np.sin(2 * np.pi * tone * np.arange(rate) / rate), up, down, window=filter)
            assert 20 * np.log10(np.abs(ours - theirs)[inside].max()) < -60, tone


def test_odd_rates_cost_no_more_than_usual_ones():
    """Whose ratio to 16 kHz has large terms: few weights, and the tone itself, its pitch within 0.025 %."""
    for rate in (1_009, 15_991, 44_101, 192_007, 383_987):
        up, down, _, weights = sinc_filter(rate)
        assert max(weights.numel(), up * down / 64) < 2**22, rate
        assert abs(up / down * rate / 16_000 - 1) < 2.5e-4
        ours = resample(np.sin(2 * np.pi * 300 * np.arange(rate) / rate).astype("float32"), rate)
        exact = np.sin(2 * np.pi * 300 * np.arange(len(ours)) * down / up / rate)
        assert len(ours) == 16_000 and np.abs(ours - exact)[1000:-1000].max() < 2e-3, rate


def test_resampling_lets_nothing_alias():
    loud = np.sin(2 * np.pi * 9_500 * np.arange(48_000) / 48_000).astype(
        "float32"
    )  # above what 16 kHz can hold
    assert np.abs(resample(loud, 48_000)[1000:-1000]).max() < 1e-3


# what each hostile clip gets: None is read, else words of the reason
def hostile_clips(folder):
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(16_000) * 0.1).astype("float32")
    made = {}

    def put(name, words, samples=None, rate=16_000, **more):
        if samples is not None:
            soundfile.write(folder / name, samples, rate, **more)
        made[name] = words

    put("empty.wav", "no audio")
    (folder / "empty.wav").touch()
    put("header only.wav", "no samples", np.zeros(0, "float32"))
    put("one sample.wav", None, noise[:1])
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        put(f"{name}.wav", "not finite", np.where(np.arange(16_000) == 99, value, noise), subtype="FLOAT")
    huge = np.full((16_000, 2), 3e38, "float32")  # finite, but their sum is not
    put("huge.wav", "not finite", huge, subtype="FLOAT")
    put("huge at 44.1 kHz.wav", "not finite", huge, 44_100, subtype="FLOAT")
    put("192 kHz.wav", None, noise, 192_000)
    put("192.007 kHz.wav", None, noise, 192_007)
    put("1 kHz.wav", None, noise, 1_000)
    put("999 Hz.wav", "999 Hz is outside", noise, 999)
    put("9999991 Hz.wav", "9999991 Hz is outside", noise, 9_999_991)
    put("8 channels.wav", None, np.stack([noise] * 8, 1))
    put("65 channels.wav", "65 channels", np.stack([noise[:99]] * 65, 1))
    put("8 bit.wav", None, noise, subtype="PCM_U8")
    put("beyond one.wav", None, noise * 100, subtype="FLOAT")
    put("mac.aiff", None, noise)
    put("talk.opus", None, noise, format="OGG", subtype="OPUS")
    for ending in ("m4a", "mp4", "webm"):
        put(f"film {ending}.{ending}", f"cannot read .{ending}: convert it")
        (folder / f"film {ending}.{ending}").write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0" * 9)
    put("text.wav", "no audio")
    (folder / "text.wav").write_text("this is no audio at all")
    put("folder.wav", "a folder")
    (folder / "folder.wav").mkdir()
    put("pipe.wav", "not a regular file")
    os.mkfifo(folder / "pipe.wav")
    put("loop.wav", "no such file|no audio|levels of symbolic")
    os.symlink(folder / "loop.wav", folder / "loop.wav")
    put("link.wav", None)
    os.symlink(folder / "8 bit.wav", folder / "link.wav")
    put("cut.flac", "no audio|decoded", noise)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:3000])
    put('it\'s a "name"\nünï.wav', None, noise)
    put("missing.wav", "no such file")
    return made


@pytest.fixture(autouse=True)
def nothing_hangs():
    """What waits for ever here is a pipe that is opened: that is known after 30 s."""
    with time_limit(30):
        yield


def test_hostile_clips_are_read_or_named(tmp_path):
    for name, words in hostile_clips(tmp_path).items():
        path = tmp_path / name
        if words is None:
            samples = load_audio(path)
            assert check_clip(path) is None and samples.dtype == np.float32, name
            assert np.isfinite(samples).all() and np.abs(samples).max() <= 1, name
            seconds = soundfile.info(path).duration
            assert check_clips([path]) == {path: pytest.approx(seconds)}
            assert len(samples) == pytest.approx(16_000 * seconds, abs=1), name
        else:
            with pytest.raises(InputError, match=words) as error:
                load_audio(path)
            assert str(path) in str(error.value) and "Traceback" not in str(error.value)
        assert data.find_clip(name, tmp_path) == str(path)


def test_a_clip_that_does_not_fit_in_memory_is_named(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(data, "resample", full)
    with pytest.raises(InputError, match="a.wav: does not fit in memory"):
        load_audio(tmp_path / "a.wav")


def test_an_hour_of_audio_is_decoded_only_as_far_as_it_is_heard(tmp_path):
    soundfile.write(tmp_path / "hour.flac", np.zeros((3600 * 8000,), "int16"), 8000)
    assert len(load_audio(tmp_path / "hour.flac", max_seconds=31)) == 31 * 16_000


NESTED: dict = {}
for _ in range(900):
    NESTED = {"in": NESTED}
HOSTILE_ROWS = {  # what is wrong with a row -> (the row, words of the reason)
    "answer of -1": (AVQA | {"answer": -1}, "no index"),
    "answer beyond": (AVQA | {"answer": 4}, "no index"),
    "answer a bool": (AVQA | {"answer": True}, "no index"),
    "answer a text": (AVQA | {"answer": "motorboat"}, "no index"),
    "answer an index": (MMAU | {"answer": 1}, "no text"),
    "answer a blank": (MMAU | {"answer": " "}, "is empty"),
    "no answer": (MMAU | {"answer": ""}, "no answer"),
    "choices a string": (MMAU | {"choices": "Man"}, "no list"),
    "one choice": (MMAU | {"choices": ["Man"]}, "needs two"),
    "no choices": (MMAU | {"choices": []}, "needs two"),
    "65 choices": (MMAU | {"choices": ["Man"] * 65}, "at most 64"),
    "100,000 choices": (MMAU | {"choices": ["Man"] * 100_000}, "at most 64"),
    "choice of 1 MB": (MMAU | {"choices": ["Man", "a" * 1_000_000]}, "the choices have"),
    "answer outside": (MMAU | {"answer": "Dog" * 999}, "none of the choices"),
    "question of 100 kB": (MMAU | {"question": "a" * 100_000}, "characters"),
    "no question": (MMAU | {"question": None}, "empty"),
    "question no text": (AVQA | {"question_text": 7}, "no text"),
    "choice no text": (MMAU | {"choices": ["Man", 3]}, "no list of texts"),
    "clip no text": (MMAU | {"audio_id": None}, "no clip name"),
    "clip outside": (MMAU | {"audio_id": ".."}, "no clip name"),
    "clip of 1 MB": (MMAU | {"audio_id": "\0" * 1_000_000}, "no clip name"),
    "id no text": (MMAU | {"id": ["x"]}, "neither text nor number"),
    "half a character": (MMAU | {"task": {"\ud800": 1}}, "surrogate"),
    "half a character said": (MMAU | {"question": "Who?\udfff"}, "surrogate"),
    "label unknown": (ARC | {"answerKey": "E"}, "none of the labels"),
    "label no text": (ARC | {"answerKey": ["E"]}, "not of the format arc"),
    "stem missing": (ARC | {"question": "Who?"}, "not of the format arc"),
    "several clips": (MMAR | {"audio_path": ["a.wav", "b.wav"]}, "no clip name"),
    "one clip": (PRO | {"audio_path": "a.wav"}, "no list"),
    "two answers": (MMSU | {"choice_b": None}, "needs two"),
    "of another format": (DCASE, "no 'id'"),
    "a number": (7, "is not JSON, no object"),
    "null": (None, "is not JSON, no object"),
    "missing keys": ({"audio_id": "x"}, "no 'question'|no "),
}


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_a_malformed_row_is_named_and_skipped_and_many_stop(tmp_path, caplog, name):
    row, words = HOSTILE_ROWS[name]
    form = MMAU
    for published in (AVQA, ARC, MMAR, PRO, MMSU):
        if isinstance(row, dict) and "id" in row and set(row) == set(published):
            form = published
    good = [form | {"id": f"good{i}"} for i in range(19)]
    questions = read_questions(write(tmp_path / "q.json", [*good, row]), tmp_path)
    assert len(questions) == 19
    (line,) = caplog.messages
    assert re.search(f"q.json, row 20: .*({words})", line) and len(line) < 400
    with pytest.raises(InputError, match="1 of 6 rows"):
        read_questions(write(tmp_path / "q.json", [*good[:5], row]))


def test_a_broken_line_is_named(tmp_path, caplog):
    """Cut off, not JSON, or nested 900 deep: that row alone, by its number."""
    lines = [json.dumps(MMAU | {"id": f"{i}"}) for i in range(40)]
    for number, broken in ((9, lines[9][:30]), (19, "{}}"), (29, json.dumps(MMAU | {"task": NESTED}))):
        lines[number] = broken
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert len(read_questions(tmp_path / "q.jsonl")) == 37
    assert [m.split(": ")[1:] for m in caplog.messages[:2]] == [
        [f"{tmp_path / 'q.jsonl'}, row 10", "is not JSON, no object, or nested too deeply"],
        [
            f"{tmp_path / 'q.jsonl'}, row 20",
            "is not JSON, no object, or nested too deeply",
        ],
    ]
    assert "row 30: is not JSON" in caplog.text


def test_lines_end_at_line_feeds_alone(tmp_path):
    """U+2028, U+0085 and the form feed stand inside texts; carriage returns before line feeds are white space."""
    rows = [MMAU | {"id": f"{i}", "question": "Who\u2028spoke\x85in\x0bit?"} for i in range(3)]
    (tmp_path / "q.jsonl").write_bytes("\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    questions = read_questions(tmp_path / "q.jsonl", max_bad=0)
    assert [q.question for q in questions] == [row["question"] for row in rows]


def test_duplicate_ids_are_named(tmp_path, caplog):
    rows = [MMAU | {"id": f"{i}"} for i in range(20)] + [MMAU | {"id": "3"}]
    assert len(read_questions(write(tmp_path / "q.json", rows))) == 20
    assert "row 21: id '3' is row 4's already" in caplog.text


HOSTILE_FILES = {
    "cut off": (json.dumps([MMAU, MMAU])[:-20].encode(), "cut off"),
    "not UTF-8": (json.dumps([MMAU]).replace("Who", "Wh\xe9").encode("latin-1"), "UTF-8"),
    "deeply nested": (b"[" * 100_000, "nested|cut off"),
    "a row nested 900 deep": (json.dumps([MMAU, MMAU | {"task": NESTED}]).encode(), "nested too deeply"),
    "numbers": (b"[1, 2]", "no known format"),
    "an empty list": (b"[]", "no known format"),
    "empty": (b"", "neither"),
    "a number": (b"7", "neither"),
    "no known format": (b'[{"a": 1}]', "no known format"),
    "binary": (bytes(range(256)) * 10, "UTF-8|neither"),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_hostile_file_is_one_error(tmp_path, name):
    content, words = HOSTILE_FILES[name]
    (tmp_path / "q.json").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_questions(tmp_path / "q.json")


def test_what_only_looks_hostile_is_read(tmp_path):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([MMAU]).encode())
    assert len(read_questions(tmp_path / "bom.json")) == 1
    (tmp_path / "nan.json").write_text(json.dumps([MMAU | {"score": float("nan")}]))
    assert read_questions(tmp_path / "nan.json")[0].meta["source"]["score"] is None
    lines = [json.dumps(MMAU | {"id": str(i)}) for i in range(20)]
    (tmp_path / "half.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:30])
    assert len(read_questions(tmp_path / "half.jsonl")) == 20
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("missing.json", ".", "pipe.json"):
        with pytest.raises(InputError, match="cannot read"):
            read_questions(Path(tmp_path) / name)


# -------------------------------------------------------------------------------------- questions of a run


def make_run(folder, **options):
    """A file of 60 questions about 30 clips, and a run's options that train on it."""
    (folder / "clips").mkdir(exist_ok=True)
    for i in range(30):
        soundfile.write(folder / "clips" / f"{i}.wav", np.zeros(800 + 80 * i), 8000)
    rows = [MMAU | {"id": f"{i}", "audio_id": f"{i % 30}.wav", "question": f"Who is {i}?"} for i in range(60)]
    defaults = {"data": [str(write(folder / "q.json", rows))], "audio_dir": [str(folder / "clips")], "max_bad": 0.1,
                "no_audio": False, "hold_out": 0, "eval_data": "", "eval_audio_dir": None, "seed": 3, "shares": [],
                "steps": 9, "batch": 8}  # fmt: skip
    return Namespace(**defaults | options), rows


def test_a_runs_questions_are_those_whose_clip_can_be_read(tmp_path, caplog):
    config, _ = make_run(tmp_path)
    (tmp_path / "clips" / "7.wav").write_text("no audio")
    loaded = load_questions(config, check_clips)
    (file,) = loaded.files
    assert len(file) == 58 and not loaded.held_out and loaded.longest_clip == (800 + 80 * 29) / 8000
    assert f"left out: {tmp_path / 'clips' / '7.wav'}: no audio" in caplog.text
    config.max_bad = 0.01
    with pytest.raises(InputError, match="2 of 60 questions have no readable clip .*7.wav: no audio"):
        load_questions(config, check_clips)

    def nothing(clips):
        assert not clips
        return {}

    config.no_audio = True
    assert len(load_questions(config, nothing).files[0]) == 60


def test_questions_held_out_are_the_same_in_every_run_and_in_no_file(tmp_path):
    config, rows = make_run(tmp_path, hold_out=10)
    first = load_questions(config, check_clips)
    random.Random(0).shuffle(rows)
    write(tmp_path / "q.json", rows)
    second = write(tmp_path / "second.json", [row for row in rows if int(row["id"]) % 2])
    config.data.append(str(second))
    config.seed = 4
    again = load_questions(config, check_clips)
    held = [q.id for q in first.held_out]
    assert len(set(held)) == 10 and held == [q.id for q in again.held_out]
    assert held != sorted(held, key=int)
    for file in (*first.files, *again.files):
        assert file and not {q.id for q in file} & set(held)
    assert len(first.files[0]) == len(again.files[0]) == 50
    more = Namespace(**vars(config) | {"hold_out": 12})
    assert [q.id for q in load_questions(more, check_clips).held_out][:10] == held
    config.hold_out = 60
    with pytest.raises(InputError, match="--hold_out 60 leaves nothing"):
        load_questions(config, check_clips)


def test_a_file_of_its_own_is_scored_up_to_200_and_hidden_answers_are_refused(tmp_path):
    config, rows = make_run(tmp_path)
    many = [rows[i % 60] | {"id": f"own {i}"} for i in range(250)]
    config.eval_data = str(write(tmp_path / "own.json", many))
    config.eval_audio_dir = str(tmp_path / "clips")
    loaded = load_questions(config, check_clips)
    assert len(loaded.files[0]) == 60 and len({q.id for q in loaded.held_out}) == 200
    hidden = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    for name in ("eval_data", "data"):
        path = str(write(tmp_path / "hidden.json", hidden))
        changed = Namespace(**vars(config) | {name: path if name == "eval_data" else [path]})
        with pytest.raises(InputError, match="hidden.json hides its answers"):
            load_questions(changed, check_clips)


def test_who_is_asked_what_does_not_depend_on_the_number_of_processes(tmp_path):
    """Two files with shares: question k of step s is the same on 1, 2, 4 and 8 processes, and of one file."""
    config, rows = make_run(tmp_path, shares=[1.0, 2.0], steps=40)
    config.data.append(str(write(tmp_path / "facts.json", [ARC | {"id": f"fact {i}"} for i in range(20)])))
    files = load_questions(config, check_clips).files

    def asked(world):
        found = {}
        for rank in range(world):
            questions = Questions(
                files, lambda question, use_audio: use_audio, config, rank=rank, world=world
            )
            assert len(questions) == 40 * 8 // world
            for one in map(questions.__getitem__, range(len(questions))):
                assert one.prompt is True and one.bad == ()
                found[one.step, one.k] = one.question.id
        return found

    one = asked(1)
    assert sorted(one) == [(step, k) for step in range(1, 41) for k in range(8)]
    for world in (2, 4, 8):
        assert asked(world) == one
    kinds = [{one[step, k].startswith("fact") for k in range(8)} for step in range(1, 41)]
    assert all(len(kind) == 1 for kind in kinds) and 20 <= sum(kind == {True} for kind in kinds) <= 33
    about_clips = [one[key] for key in sorted(one) if not one[key].startswith("fact")]
    assert sorted(about_clips[:60], key=int) == [
        row["id"] for row in rows
    ]  # each once before one comes again


def test_a_clip_that_fails_is_replaced_by_the_same_question_in_every_run(tmp_path):
    config, _ = make_run(tmp_path, no_audio=True)
    files = load_questions(config, check_clips).files

    def encode(question, use_audio):
        assert not use_audio
        if int(question.id) % 2:
            raise InputError(f"{question.id} is odd")
        return question.id

    whole = Questions(files, encode, config, rank=0, world=1)
    half = Questions(files, encode, config, rank=1, world=2)
    assert whole[3] == half[1] and any(whole[i].bad for i in range(8))
    for i in range(72):
        assert int(whole[i].question.id) % 2 == 0 and whole[i].prompt == whole[i].question.id
        assert all("is odd" in line for line in whole[i].bad)

    def never(question, use_audio):
        raise InputError("gone")

    assert Questions(files, never, config, rank=0, world=1)[0].prompt is None
    assert len(Questions(files, never, config, rank=0, world=1)[0].bad) == 20
