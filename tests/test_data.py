"""Laws of reading: every published format, every real row, what hostile files get, and who is asked what."""

import json
import os
import random
import re
import tracemalloc
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
    check_clips,
    format_of,
    load_audio,
    load_questions,
    prompt_text,
    read_questions,
    resample,
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
DCASE = {"question_text": "Who speaks in the video?", "multi_choice": ["Man", "Woman"], "audio_path": "d1.wav",
         "answer": "Woman"}  # fmt: skip
MMSU = {"id": "s1", "task_name": "gender", "audio_path": "./audio/s1.wav", "question": "Who?", "choice_a": None,
        "choice_b": "male", "choice_c": None, "choice_d": "None", "answer_gt": "male", "category": "Perception",
        "sub-category": "Paralinguistics"}  # fmt: skip
AIR = {"path": "a1.wav", "question": "Who?", "choice_a": "Man", "choice_b": "Woman", "choice_c": "Dog", "choice_d": "",
       "answer_gt": "Dog", "task_name": "Speaker_Age", "dataset_name": "common_voice", "uniq_id": 12}  # fmt: skip
PLAIN = json.loads(data.PLAIN)
PUBLISHED = {  # name -> its format, the row, the answer, where its clip is looked for
    "avqa": ("avqa", AVQA, "Yacht consignment", "-HG3Omg_89c_000030.wav"),
    "r1-aqa": ("avqa", AVQA | {"audio_path": "x.wav"}, "Yacht consignment", "-HG3Omg_89c_000030.wav"),
    "arc": ("arc", ARC, "radio", None),
    "mmau": ("mmau", MMAU, "Man", "test-mini-audios/m1.wav"),
    "mmar": ("mmar", MMAR, "Woman", "audio/r1.wav"),
    "one's own": ("mmar", PLAIN, "a dog", "dog.wav"),
    "mmau-pro": ("mmau-pro", PRO, "Man", "data/p1.wav"),
    "audiomcq": ("audiomcq", MCQ, "Dog", "Clotho/c7.wav"),
    "dcase": ("dcase", DCASE, "Woman", "d1.wav"),
    "mmsu": ("choices_ad", MMSU, "male", "audio/s1.wav"),
    "air-bench": ("choices_ad", AIR, "Dog", "Speaker_Age_common_voice/a1.wav"),
}


def write(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))
    return path


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_format_is_read_as_itself(tmp_path, name):
    """Also where optional keys are missing, an evaluation added its own, or the keys stand in another order."""
    form, row, answer, clip = PUBLISHED[name]
    for lines in (False, True):
        (q,) = read_questions(write(tmp_path / "q.json", [row], lines))
        assert q.meta == {"format": form, "row": 0, "source": row}
        assert q.answer == answer and answer in q.choices and "" not in q.choices
        assert q.audio == (clip and str(tmp_path / clip))  # beside the file
    fewer = without(row, "category", "language", "source", "task", "question_type", "id", "uniq_id")
    more = row | dict.fromkeys(("model_prediction", "model_output", "response", "answer_prediction"), "Man")
    for variant in (fewer, more, dict(reversed(row.items()))):
        assert format_of(variant) == form
    assert {form for form, *_ in PUBLISHED.values()} == set(FORMATS)

    rows = []  # without ids: their own, in any order and after an evaluation
    for i in range(20):
        key = "question_text" if "question_text" in row else "question"
        said = {**row["question"], "stem": f"Who is {i}?"} if form == "arc" else f"Who is {i}?"
        rows.append(fewer | {key: said})
    ids = {q.question: q.id for q in read_questions(write(tmp_path / "q.jsonl", rows, True))}
    answered = [row | {"model_prediction": "Dog"} for row in rows]
    random.Random(0).shuffle(answered)
    assert ids == {q.question: q.id for q in read_questions(write(tmp_path / "q.jsonl", answered))}
    assert len(set(ids.values())) == 20


def test_only_avqas_questions_have_their_video_replaced_and_no_video_game(tmp_path):
    said = {"What is in the video?": "What is in the audio?", "Video 2, videotape": "Audio 2, videotape",
            "Which video game is in the video?": "Which video game is in the audio?"}  # fmt: skip
    rows = [AVQA | {"id": i, "question_text": text} for i, text in enumerate(said)]
    assert [q.question for q in read_questions(write(tmp_path / "q.json", rows))] == list(said.values())
    (q,) = read_questions(write(tmp_path / "d.json", [DCASE]))
    assert q.question == "Who speaks in the video?"


def test_a_file_is_in_the_format_of_most_of_its_rows(tmp_path, caplog):
    rows = [AVQA, *[MMAU | {"id": f"{i}"} for i in range(20)]]
    questions = read_questions(write(tmp_path / "q.json", rows))
    assert {q.meta["format"] for q in questions} == {"mmau"} and len(questions) == 20
    assert "row 1: is not of the format mmau: KeyError 'question'" in caplog.text


def test_mmau_pros_other_kinds_of_rows_are_counted_and_are_not_malformed(tmp_path, caplog):
    others = [{"audio_path": ["a.wav", "b.wav"]}, {"choices": None}, {"choices": []}, {"choices": ["open"]}]
    rows = [PRO | {"id": f"other{i}"} | change for i, change in enumerate(others)]
    assert len(read_questions(write(tmp_path / "q.json", [*rows, PRO]))) == 1
    assert "4 rows of several clips or without choices" in caplog.text and "skipped" not in caplog.text
    with pytest.raises(InputError, match="0 of 4 rows are malformed, 4 left out"):
        read_questions(write(tmp_path / "q.json", rows))


def test_the_prompt_is_the_papers():
    q = Question("1", "What is it?", ("a dog", "it's a cat"), "a dog", None, {})
    expected = """What is it? Please choose the answer from the following options: ['a dog', "it's a cat"]."""
    assert prompt_text(q) == prompt_text(q, "direct") == expected
    assert prompt_text(q, "answer") == f"{expected} Output the final answer in <answer> </answer>."
    thinking = "in <think> </think> and final answer in <answer> </answer>."
    assert prompt_text(q, "think") == f"{expected} Output the thinking process {thinking}"
    assert prompt_text(q, "brief") == f"{expected} Output the thinking process (at most 50 words) {thinking}"
    assert list(PROMPTS) == ["direct", "answer", "think", "brief"]


def test_empty_answers_hide_a_file_only_if_all_are_empty(tmp_path, caplog):
    hidden = [without(MMAU, "answer") | {"id": f"{i}"} for i in range(20)]
    for empty in ({}, {"answer": ""}, {"answer": None}):
        questions = read_questions(write(tmp_path / "q.json", [row | empty for row in hidden]))
        assert len(questions) == 20 and {q.answer for q in questions} == {None}
    one_empty = [row | {"answer": "Man"} for row in hidden[:19]] + hidden[19:]
    assert len(read_questions(write(tmp_path / "q.json", one_empty))) == 19
    assert "row 20: no answer, which other rows have" in caplog.text


# ---------------------------------------------------------------------------------------------------- clips


def clips_of(folder, names, kind="audio_path"):
    """Where the clips of rows with these names are looked for."""
    base = MMAR if kind == "audio_path" else AVQA
    rows = [base | {"id": i, kind: name} for i, name in enumerate(names)]
    questions = read_questions(write(folder.parent / "q.json", rows), str(folder))
    return [os.path.relpath(q.audio, folder) for q in questions]


@pytest.fixture
def clips(tmp_path):
    """put(names): a folder of its own with such files."""

    def put(*names):
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "clips"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    return put


def test_a_clip_is_found_by_its_whole_path_or_a_name_that_is_its_alone(clips):
    folder = clips("deep.flac", "a/deep.wav", "a/only.mp3", "../secret.wav", "two.wav", "two.mp4", "film.mp4",
                   "dog/001.wav", "cat/001.wav", "x.wav", "x.mp3", "link.wav")  # fmt: skip
    found = {
        "./a/deep.wav": "a/deep.wav", "x/y/deep.wav": "deep.flac", "a/only.wav": "a/only.mp3", "a/only": "a/only.mp3",
        "b/none.ogg": "b/none.ogg", "../../secret.wav": "secret.wav", str(folder / "a/deep.wav"): "a/deep.wav",
        "two": "two.wav", "film": "film.mp4", "a/../x.wav": "x.wav", "/no/such/film": "film.mp4", "x.mp3": "x.mp3",
    }  # fmt: skip
    for name, expected in found.items():
        assert clips_of(folder, [name]) == [expected], name
    assert "secret" not in clips_of(folder, [str(folder.parent / "secret.wav")])[0].removesuffix("secret.wav")
    both = ["dog/001.wav", "cat/001.wav"]
    absolute = [str(folder / name) for name in both]
    assert clips_of(folder, both) == clips_of(folder, absolute) == both
    assert clips_of(folder, ["x.wav", "x.mp3", "x.mp3"]) == ["x.wav", "x.mp3", "x.mp3"]
    assert clips_of(folder / "dog", both) == both  # neither is there, and 001 is not one clip's alone
    assert clips_of(folder / "dog", absolute) == ["001.wav", "cat/001.wav"]


def test_two_names_that_would_be_heard_as_one_file_are_refused_with_both_rows(clips):
    folder = clips("x.wav", "001.wav")
    for names in (["x.wav", "y.wav", "x.flac"], ["x", "y", "./x.mp3"]):
        with pytest.raises(
            InputError, match=r"rows 1 and 3: x.wav and x.\w+ are both .*x.wav: check --audio_dir"
        ):
            clips_of(folder, names)
    assert clips_of(folder, ["dog/001.wav", "cat/001.wav"]) == ["dog/001.wav", "cat/001.wav"]


@pytest.mark.parametrize("stem", ["-HG3Omg_89c_000030", "-HG3Omg_89c_30"])
def test_avqas_clips_are_found_under_all_their_names_and_are_one(clips, stem):
    for ending in (".wav", ".flac", ".mp3", ".ogg"):
        folder = clips(f"{stem}{ending}")
        names = ["-HG3Omg_89c_000030", "-HG3Omg_89c_30"]
        assert clips_of(folder, names, "video_name") == [f"{stem}{ending}"] * 2


@pytest.mark.skipif(not DATA.exists(), reason=f"real questions are not at {DATA}")
def test_every_real_row_and_clip_is_read():
    for file in ("mmau-test-mini-original.json", "mmau-test-mini-v05.15.25.json", "MMAR-meta.jsonl"):
        questions = read_questions(DATA / file, DATA / "audio")
        assert len(questions) == 1000
        assert all(q.answer in q.choices and 2 <= len(q.choices) <= 8 for q in questions)
    for clip in sorted((DATA / "audio").iterdir()):
        samples = load_audio(clip)
        assert samples.dtype == np.float32 and samples.ndim == 1 and 0.01 < np.abs(samples).max() <= 1
        assert abs(len(samples) / 16_000 - soundfile.info(clip).duration) < 0.1


RATES = (8_000, 11_025, 12_345, 22_050, 32_000, 44_100, 48_000, 192_000, 44_099, 11_024)


@pytest.mark.parametrize("rate", RATES)
def test_resampling_is_exact_on_tones_in_the_pass_band(rate):
    """Against the tone itself, sampled at 16 kHz, and scipy's resampler."""
    from scipy.signal import firwin, resample_poly

    def sampled(tone, rate):
        times = np.arange(rate) / rate
        return np.sin(2 * np.pi * tone * times) * np.sin(np.pi * times) ** 2

    up, down = 16_000 // np.gcd(rate, 16_000), rate // np.gcd(rate, 16_000)
    for tone in np.linspace(50, min(7_000, 0.44 * rate), 4):
        samples = sampled(tone, rate).astype("float32")
        ours = resample(samples, rate)
        assert len(ours) == 16_000 and ours.dtype == np.float32
        others = [sampled(tone, 16_000)]
        if down < 2_000:
            filter = firwin(512 * max(up, down) + 1, 0.97 / max(up, down), window=("kaiser", 12.0))
            others.append(resample_poly(samples.astype(float), up, down, window=filter))
        for other in others:
            assert 20 * np.log10(np.abs(ours - other).max()) < -100, tone


def test_resampling_lets_nothing_alias_and_no_rate_or_length_blows_up():
    loud = np.sin(2 * np.pi * 9_500 * np.arange(48_000) / 48_000).astype(
        "float32"
    )  # more than 16 kHz can hold
    assert np.abs(resample(loud, 48_000)[1000:-1000]).max() < 1e-4
    noise = np.random.default_rng(0).standard_normal(30 * 192_007).astype("float32")
    with time_limit(25):
        for rate in (1, 1_009, 11_024, 22_050, 44_099, 192_007):
            for length in (1, 7_919, 30 * rate + 1):
                seconds = min(length / rate, 40)
                part = noise[: int(seconds * rate) + 1]
                assert len(resample(part, rate)) == pytest.approx(len(part) * 16_000 / rate, abs=1.01), rate


# what each hostile clip gets: None is read, else words of the reason
def hostile_clips(folder):
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(64_000) * 0.1).astype("float32")
    made = {}

    def put(name, words, samples=None, rate=16_000, **more):
        if samples is not None:
            soundfile.write(folder / name, samples, rate, **more)
        made[name] = words

    for name in ("empty.wav", "text.wav", "film.mp4"):
        put(name, "Format not recognised|unknown format")
        (folder / name).write_bytes(b"this is no audio at all" if name > "f" else b"")
    put("header only.wav", "no samples", noise[:0])
    put("one sample.wav", None, noise[:1])
    for name, value in (("nan", np.nan), ("infinite", np.inf)):
        put(f"{name}.wav", "not finite", np.where(np.arange(64_000) == 99, value, noise), subtype="FLOAT")
    huge = np.full((16_000, 2), 3e38, "float32")  # finite, but their sum is not
    put("huge.wav", "not finite", huge, subtype="FLOAT")
    for rate in (999, 192_000, 192_007, 9_999_991):
        put(f"{rate} Hz.wav", None, noise, rate)
    put("8 channels.wav", None, np.stack([noise] * 8, 1))
    put("8 bit.wav", None, noise, subtype="PCM_U8")
    put("beyond one.wav", None, noise * 100, subtype="FLOAT")
    put("mac.aiff", None, noise)
    put("talk.opus", None, noise, format="OGG", subtype="OPUS")
    put("folder.wav", "no such file")
    (folder / "folder.wav").mkdir()
    put("pipe.wav", "no such file")
    os.mkfifo(folder / "pipe.wav")
    put("loop.wav", "no such file")
    os.symlink(folder / "loop.wav", folder / "loop.wav")
    put("link.wav", None)
    os.symlink(folder / "8 bit.wav", folder / "link.wav")
    for ending, words in (
        ("wav", "cut off"),
        ("aiff", "cut off"),
        ("mp3", "cut off"),
        ("flac", "lost sync|decod"),
    ):
        put(f"cut.{ending}", words, noise)
        whole = (folder / f"cut.{ending}").read_bytes()
        (folder / f"cut.{ending}").write_bytes(whole[: len(whole) // 2])
    put("piped.wav", None, noise)  # by a program that knows no length beforehand
    whole = (folder / "piped.wav").read_bytes()
    (folder / "piped.wav").write_bytes(whole[:40] + b"\xff" * 4 + whole[44:])
    put('it\'s a "name"\nünï.wav', None, noise)
    put("missing.wav", "no such file")
    return made


@pytest.fixture(autouse=True)
def nothing_hangs():
    """What waits for ever here is a pipe that is opened: that is known after 30 s."""
    with time_limit(30):
        yield


@pytest.mark.filterwarnings("ignore:overflow")
def test_hostile_clips_are_read_or_named(tmp_path):
    for name, words in hostile_clips(tmp_path).items():
        path = str(tmp_path / name)
        found = check_clips([path])[path]
        if words is None:
            samples = load_audio(path)
            assert samples.dtype == np.float32, name
            assert np.isfinite(samples).all() and np.abs(samples).max() <= 1, name
            assert len(samples) == pytest.approx(16_000 * found, abs=1), name
            assert found == pytest.approx(soundfile.info(path).duration)
        else:
            with pytest.raises(InputError, match=words) as error:
                load_audio(path)
            assert path in str(error.value) and "\n" not in str(error.value)
            if isinstance(found, str):
                assert re.search(words, found)


def test_a_long_clip_is_decoded_as_far_as_it_is_heard_and_in_little_memory(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "hour.flac", np.zeros((3600 * 8000,), "int16"), 8000)
    assert len(load_audio(tmp_path / "hour.flac", max_seconds=31)) == 31 * 16_000
    with soundfile.SoundFile(tmp_path / "wide.flac", "w", 384_000, 8) as file:
        for _ in range(10):
            file.write(np.zeros((384_000, 8), "int16"))
    tracemalloc.start()
    assert len(load_audio(tmp_path / "wide.flac", max_seconds=300)) == 10 * 16_000
    assert (
        tracemalloc.get_traced_memory()[1] < 9 * 10 * 384_000 * 4
    )  # in units of the mean; all channels are 8
    tracemalloc.stop()
    noise = np.random.default_rng(0).standard_normal(30 * 16_384).astype("float32")
    whole = resample(noise, 16_384)
    monkeypatch.setattr(data, "LONGEST", 0)
    assert np.abs(resample(noise, 16_384) - whole).max() < 3e-3 * np.abs(whole).max()  # in parts


# ------------------------------------------------------------------------------------------------ bad input

NESTED: dict = {}
for _ in range(900):
    NESTED = {"in": NESTED}
HOSTILE_ROWS = {  # what is wrong with a row -> (the row, words of the reason)
    "answer of -1": (AVQA | {"answer": -1}, "no index: write 0 to 3"),
    "answer beyond": (AVQA | {"answer": 4}, "no index"),
    "answer a bool": (AVQA | {"answer": True}, "no index"),
    "answer a text": (AVQA | {"answer": "motorboat"}, "no index"),
    "answer an index": (MMAU | {"answer": 1}, r"1 is none .* write the text of one of \['Man', 'Woman'\]"),
    "answer a letter": (MMAU | {"answer": "B"}, r"'B' is none .* write the text of one of \['Man', 'Woman'\]"),
    "answer a blank": (MMAU | {"answer": " "}, "none of the choices"),
    "no answer": (MMAU | {"answer": ""}, "no answer"),
    "choices a string": (MMAU | {"choices": "Man"}, "list of two choices"),
    "one choice": (MMAU | {"choices": ["Man"]}, "list of two choices"),
    "choice of 1 MB": (MMAU | {"choices": ["Woman", "a" * 1_000_000]}, "none of the choices"),
    "answer outside": (MMAU | {"answer": "Dog" * 999}, "none of the choices"),
    "no question": (MMAU | {"question": None}, "not of the format mmau"),
    "a blank question": (MMAU | {"question": " "}, "needs a question"),
    "question no text": (AVQA | {"question_text": 7}, "not of the format avqa"),
    "choice no text": (MMAU | {"choices": ["Man", 3]}, "not of the format mmau"),
    "clip no text": (MMAU | {"audio_id": None}, "not of the format mmau"),
    "clip the folder": (MMAU | {"audio_id": ".."}, "empty name"),
    "half a character": (MMAU | {"question": "Who?\udfff"}, "surrogate"),
    "label unknown": (ARC | {"answerKey": "E"}, "KeyError 'E'"),
    "label no text": (ARC | {"answerKey": ["E"]}, "not of the format arc"),
    "label twice": (ARC | {"question": {"stem": "Who?", "choices": [*ARC["question"]["choices"],
                                                                    {"text": "book", "label": "A"}]}}, "label twice"),
    "stem missing": (ARC | {"question": "Who?"}, "not of the format arc"),
    "several clips": (MMAR | {"audio_path": ["a.wav", "b.wav"]}, "not of the format mmar"),
    "two answers": (MMSU | {"choice_b": None}, "list of two choices"),
    "of another format": (DCASE, "KeyError 'question'"),
    "a number": (7, "is no JSON object"),
    "an id again": (MMAU | {"id": "good3"}, "id good3 is row 4's already"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_a_malformed_row_is_named_and_skipped_and_many_stop(tmp_path, caplog, name):
    row, words = HOSTILE_ROWS[name]
    form = MMAU
    for published in (AVQA, ARC, MMAR, MMSU):
        if isinstance(row, dict) and "id" in row and set(row) == set(published):
            form = published
    good = [form | {"id": f"good{i}"} for i in range(19)]
    assert len(read_questions(write(tmp_path / "q.json", [*good, row]))) == 19
    (line,) = caplog.messages
    assert re.search(f"q.json, row 20: .*({words})", line) and len(line) < 500
    with pytest.raises(InputError, match="1 of 6 rows are malformed"):
        read_questions(write(tmp_path / "q.json", [*good[:5], row]))


def test_lines_end_at_line_feeds_alone_and_a_broken_one_is_named(tmp_path, caplog):
    """U+2028, U+0085 and the form feed stand inside texts; carriage returns before line feeds are white space."""
    rows = [MMAU | {"id": f"{i}", "question": "Who\u2028spoke\x85in\x0bit?"} for i in range(40)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "q.jsonl").write_bytes("\r\n".join(lines).encode())
    assert [q.question for q in read_questions(tmp_path / "q.jsonl")] == [row["question"] for row in rows]
    lines[9] = lines[9][:30]
    lines[19] = "{}}"
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert len(read_questions(tmp_path / "q.jsonl")) == 38
    for number in (10, 20):
        assert f"q.jsonl, row {number}: is no JSON object" in caplog.text


HOSTILE_FILES = {
    "cut off": (json.dumps([MMAU, MMAU])[:-20].encode(), "cut off"),
    "not UTF-8": (json.dumps([MMAU]).replace("Who", "Wh\xe9").encode("latin-1"), "UTF-8"),
    "deeply nested": (b"[" * 100_000, "nested|cut off"),
    "numbers": (b"[1, 2]", "no known format"),
    "an empty list": (b"[]", "no known format"),
    "empty": (b"", "neither"),
    "a table": (b"audio_path,question\ndog.wav,Who?", "neither .* such as .*audio_path"),
    "no known format": (b'[{"audio": 1}]', "no known format: .*'audio': 1.* is enough: .*audio_path"),
    "binary": (bytes(range(256)) * 10, "UTF-8|neither"),
}


def test_a_hostile_file_is_one_error(tmp_path):
    for name, (content, words) in HOSTILE_FILES.items():
        (tmp_path / "q.json").write_bytes(content)
        with pytest.raises(InputError, match=words) as error:
            read_questions(tmp_path / "q.json")
        assert "\n" not in str(error.value), name
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("missing.json", ".", "pipe.json"):
        with pytest.raises(InputError, match="cannot read"):
            read_questions(Path(tmp_path) / name)


def test_what_only_looks_hostile_is_read(tmp_path):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([MMAU]).encode())
    assert len(read_questions(tmp_path / "bom.json")) == 1
    (tmp_path / "nan.json").write_text(json.dumps([MMAU | {"score": float("nan")}]))
    assert read_questions(tmp_path / "nan.json")[0].meta["source"]["score"] is None


# -------------------------------------------------------------------------------------- questions of a run


def make_run(folder, **options):
    """A file of 60 questions about 30 clips, and a run's options that train on it."""
    (folder / "clips").mkdir(exist_ok=True)
    for i in range(30):
        soundfile.write(folder / "clips" / f"{i}.wav", np.zeros(800 + 80 * i), 8000)
    rows = [MMAU | {"id": f"{i}", "audio_id": f"{i % 30}.wav", "question": f"Who is {i}?"} for i in range(60)]
    defaults = {"data": [str(write(folder / "q.json", rows))], "audio_dir": [str(folder / "clips")], "no_audio": False,
                "hold_out": 0, "eval_data": "", "eval_audio_dir": None, "seed": 3, "shares": [], "steps": 9, "batch": 8}  # fmt: skip
    return Namespace(**defaults | options), rows


def test_a_runs_questions_are_those_whose_clip_can_be_read(tmp_path, caplog):
    config, _ = make_run(tmp_path)
    (tmp_path / "clips" / "7.wav").write_text("no audio")
    loaded = load_questions(config, check_clips)
    (file,) = loaded.files
    assert len(file) == 58 and not loaded.held_out and loaded.longest_clip == (800 + 80 * 29) / 8000
    assert re.search("left out: .*7.wav: .*Format not recognised", caplog.text)
    for i in range(9, 13):
        (tmp_path / "clips" / f"{i}.wav").write_text("no audio")
    with pytest.raises(InputError, match="10 of 60 questions have no readable clip .*7.wav: "):
        load_questions(config, check_clips)
    config.no_audio = True
    assert len(load_questions(config, None).files[0]) == 60


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
    path = str(write(tmp_path / "hidden.json", [without(row, "answer") for row in rows]))
    for change in ({"eval_data": path}, {"data": [path]}):
        with pytest.raises(InputError, match="hidden.json hides its answers"):
            load_questions(Namespace(**vars(config) | change), check_clips)


def test_who_is_asked_what_does_not_depend_on_the_number_of_processes(tmp_path):
    """Two files with shares: question k of step s is the same on 1, 2, 4 and 8 processes, and of one file."""
    config, rows = make_run(tmp_path, shares=[1.0, 2.0], steps=40)
    config.data.append(str(write(tmp_path / "facts.json", [ARC | {"id": f"fact {i}"} for i in range(20)])))
    files = load_questions(config, check_clips).files

    def asked(world):
        found = {}
        for rank in range(world):
            questions = Questions(files, lambda question, heard: heard, config, rank=rank, world=world)
            assert len(questions) == 40 * 8 // world
            for one in map(questions.__getitem__, range(len(questions))):
                assert one.prompt is True and one.bad == ()
                found[one.step, one.k] = one.question.id
        return found

    one = asked(1)
    assert sorted(one) == [(step, k) for step in range(1, 41) for k in range(8)]
    assert data.sha256(json.dumps(sorted(one.items())).encode()) == "38ceab56e3618924"  # and in every version
    for world in (2, 4, 8):
        assert asked(world) == one
    kinds = [{one[step, k].startswith("fact") for k in range(8)} for step in range(1, 41)]
    assert all(len(kind) == 1 for kind in kinds) and 20 <= sum(kind == {True} for kind in kinds) <= 33
    about_clips = [one[key] for key in sorted(one) if not one[key].startswith("fact")]
    assert sorted(about_clips[:60], key=int) == [row["id"] for row in rows]  # each once before one again


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
    ids = [one.question.id for one in map(whole.__getitem__, range(72))]
    assert data.sha256(json.dumps(ids).encode()) == "65c1a39fa09a51c4"

    def never(question, use_audio):
        raise InputError("gone")

    with pytest.raises(InputError, match="20 clips in a row cannot be decoded"):
        Questions(files, never, config, rank=0, world=1)[0]
