"""Laws of reading: every published format, every real row, and what hostile files get."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import DATA
from data import InputError, Question, check_clip, load_audio, prompt_text, read_questions, resample

AVQA = {"id": 183, "video_name": "-HG3Omg_89c_000030", "video_id": 341, "question_text": "What happened in the video?",
        "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"], "answer": 1}  # fmt: skip
ARC = {"id": "MCAS_2000_4_6", "question": {"stem": "Which is newest?", "choices": [
    {"text": "cellular telephone", "label": "A"}, {"text": "television", "label": "B"}, {"text": "radio", "label": "C"}]},
    "answerKey": "C"}  # fmt: skip
MMAU = {
    "id": "m1",
    "audio_id": "./test-mini-audios/m1.wav",
    "question": "Who?",
    "choices": ["Man", "Woman"],
    "answer": "Man",
}
MMAR = {
    "id": "r1",
    "audio_path": "./audio/r1.wav",
    "question": "Who?",
    "choices": ["Man", "Woman"],
    "answer": "Woman",
}


def write(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("lines", [False, True])
def test_every_format_is_known_by_its_keys(tmp_path, lines):
    for row, answer in ((AVQA, "Yacht consignment"), (ARC, "radio"), (MMAU, "Man"), (MMAR, "Woman")):
        (q,) = read_questions(write(tmp_path / "q.json", [row], lines), tmp_path)
        assert q.answer == answer and answer in q.choices and q.id == str(row["id"])
    assert "happened in the audio?" in read_questions(write(tmp_path / "q.json", [AVQA], lines))[0].question
    hidden = {k: v for k, v in MMAU.items() if k != "answer"}
    assert read_questions(write(tmp_path / "q.json", [hidden], lines))[0].answer is None


def test_the_prompt_is_the_papers():
    q = Question("1", "What is it?", ("a dog", "it's a cat"), "a dog", None, {})
    expected = """What is it? Please choose the answer from the following options: ['a dog', "it's a cat"]."""
    assert prompt_text(q) == expected


@pytest.mark.parametrize("stem", ["-HG3Omg_89c_000030", "-HG3Omg_89c_30"])
@pytest.mark.parametrize("ending", [".wav", ".flac", ".mp3", ".ogg"])
def test_avqas_clips_are_found_under_all_their_names(tmp_path, stem, ending):
    (tmp_path / f"{stem}{ending}").touch()
    for name in ("-HG3Omg_89c_000030", "-HG3Omg_89c_30"):
        (q,) = read_questions(
            write(tmp_path / f"{name}{ending}.json", [AVQA | {"video_name": name}]), tmp_path
        )
        assert q.audio == str(tmp_path / f"{stem}{ending}")


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


@pytest.mark.parametrize("rate", [8_000, 11_025, 12_345, 22_050, 32_000, 44_100, 48_000, 192_000])
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
    put("192 kHz.wav", None, noise, 192_000)
    put("8 channels.wav", None, np.stack([noise] * 8, 1))
    put("8 bit.wav", None, noise, subtype="PCM_U8")
    put("beyond one.wav", None, noise * 100, subtype="FLOAT")
    put("text.wav", "no audio")
    (folder / "text.wav").write_text("this is no audio at all")
    put("folder.wav", "a folder")
    (folder / "folder.wav").mkdir()
    put("loop.wav", "no such file|no audio|levels of symbolic")
    os.symlink(folder / "loop.wav", folder / "loop.wav")
    put("cut.flac", "no audio|decoded", noise)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:3000])
    put('it\'s a "name"\nünï.wav', None, noise)
    put("missing.wav", "no such file")
    return made


def test_hostile_clips_are_read_or_named(tmp_path):
    for name, words in hostile_clips(tmp_path).items():
        path = tmp_path / name
        if words is None:
            samples = load_audio(path)
            assert check_clip(path) is None and np.isfinite(samples).all() and np.abs(samples).max() <= 1, (
                name
            )
        else:
            with pytest.raises(InputError, match=words) as error:
                load_audio(path)
            assert str(path) in str(error.value)


def test_an_hour_of_audio_is_decoded_only_as_far_as_it_is_heard(tmp_path):
    soundfile.write(tmp_path / "hour.flac", np.zeros((3600 * 8000,), "int16"), 8000)
    assert len(load_audio(tmp_path / "hour.flac", max_seconds=31)) == 31 * 16_000


HOSTILE_ROWS = {  # what is wrong with a row -> (the row, words of the reason)
    "answer of -1": (AVQA | {"answer": -1}, "no index"),
    "answer beyond": (AVQA | {"answer": 4}, "no index"),
    "answer a bool": (AVQA | {"answer": True}, "no index"),
    "choices a string": (MMAU | {"choices": "Man"}, "no list|none of the choices"),
    "one choice": (MMAU | {"choices": ["Man"]}, "needs two"),
    "no choices": (MMAU | {"choices": []}, "none of the choices|needs two"),
    "answer outside": (MMAU | {"answer": "Dog"}, "none of the choices"),
    "question of 100 kB": (MMAU | {"question": "a" * 100_000}, "characters"),
    "no question": (MMAU | {"question": None}, "empty"),
    "choice no text": (MMAU | {"choices": ["Man", 3]}, "no list of texts"),
    "clip no text": (MMAU | {"audio_id": None}, "no clip name"),
    "label unknown": (ARC | {"answerKey": "E"}, "none of the labels"),
    "a number": (7, "."),
    "missing keys": ({"audio_id": "x"}, "no 'question'|no "),
}


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_a_malformed_row_is_named_and_skipped_and_many_stop(tmp_path, caplog, name):
    row, words = HOSTILE_ROWS[name]
    form = next(
        (r for r in (AVQA, ARC, MMAU) if isinstance(row, dict) and set(r) & set(row) - {"id", "question"}),
        MMAU,
    )
    good = [form | {"id": f"good{i}"} for i in range(19)]
    questions = read_questions(write(tmp_path / "q.json", [*good, row]), tmp_path)
    assert len(questions) == 19 and "q.json, row 20:" in caplog.text
    assert pytest.raises(InputError, read_questions, write(tmp_path / "q.json", [*good[:5], row])).match(
        "1 of 6 rows"
    )


def test_duplicate_ids_are_named(tmp_path, caplog):
    rows = [MMAU | {"id": f"{i}"} for i in range(20)] + [MMAU | {"id": "3"}]
    assert len(read_questions(write(tmp_path / "q.json", rows))) == 20
    assert "row 21: id '3' is row 4's already" in caplog.text


HOSTILE_FILES = {
    "cut off": (json.dumps([MMAU, MMAU])[:-20].encode(), "cut off"),
    "not UTF-8": (json.dumps([MMAU]).replace("Who", "Wh\xe9").encode("latin-1"), "UTF-8"),
    "deeply nested": (b"[" * 100_000, "nested|cut off"),
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
    for name in ("missing.json", "."):
        with pytest.raises(InputError, match="cannot read"):
            read_questions(Path(tmp_path) / name)
