"""Laws of reading: every published format, every real row, what hostile files get, and who is asked what."""

import json
import os
import random
import re
import time
import tracemalloc
from argparse import Namespace

import numpy as np
import pytest
import soundfile

import data
from conftest import DATA
from data import (
    PROMPTS,
    Question,
    Questions,
    check_clips,
    load_audio,
    load_questions,
    prompt_text,
    read_questions,
    resample,
)
from files import InputError

# Who publishes it | its format | the answer | where its clip is looked for | a row in the shape that it is published in
PUBLISHED = """
avqa | avqa | Yacht consignment | -HG3Omg_89c_000030.wav | {"id": 183, "video_name": "-HG3Omg_89c_000030", "video_id": 341, "question_text": "What happened in the video?", "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"], "answer": 1, "question_relation": "View", "question_type": "Happening"}
r1-aqa | avqa | motorboat | x_000001.wav | {"id": 1, "video_name": "x_1", "question_text": "What?", "multi_choice": ["motorboat", "boat"], "answer": 0, "audio_path": "y.wav"}
arc | arc | radio | - | {"id": "MCAS_2000_4_6", "question": {"stem": "Which is newest?", "choices": [{"text": "telephone", "label": "A"}, {"text": "television", "label": "B"}, {"text": "radio", "label": "C"}]}, "answerKey": "C"}
mmau | mmau | Man | test-mini-audios/m1.wav | {"id": "m1", "audio_id": "./test-mini-audios/m1.wav", "question": "Who?", "choices": ["Man", "Woman"], "answer": "Man", "dataset": "AudioSet", "task": "sound", "split": "test-mini", "category": "Reasoning", "sub-category": "Acoustic Source Inference", "difficulty": "medium"}
mmar | mmar | Woman | audio/r1.wav | {"id": "r1", "audio_path": "./audio/r1.wav", "question": "Who?", "choices": ["Man", "Woman"], "answer": "Woman", "modality": "music", "category": "Cultural Layer", "language": null, "source": "youtube"}
own | mmar | a dog | dog.wav | {"audio_path": "dog.wav", "question": "Who barks?", "choices": ["a dog", "a fox"], "answer": "a dog"}
mmau-pro | mmau-pro | Man | data/p1.wav | {"id": "p1", "audio_path": ["data/p1.wav"], "question": "Who?", "choices": ["Man", "Woman"], "answer": "Man", "length_type": "short", "category": "sound", "perceptual_skills": ["pitch"], "task_identifier": null}
audiomcq | audiomcq | Dog | Clotho/c7.wav | {"source_dataset": "Clotho", "id": "7", "question_type": "sound", "audio_path": "Clotho/c7.wav", "question": "Who?", "choices": ["Man", "Woman", "Dog", "Cat"], "answer": "Dog", "audio-contribution": "strong"}
dcase | dcase | Woman | d1.wav | {"question_text": "Who speaks in the video?", "multi_choice": ["Man", "Woman"], "audio_path": "d1.wav", "answer": "Woman"}
mmsu | choices_ad | male | audio/s1.wav | {"id": "s1", "task_name": "gender", "audio_path": "./audio/s1.wav", "question": "Who?", "choice_a": null, "choice_b": "male", "choice_c": null, "choice_d": "None", "answer_gt": "male", "category": "Perception"}
air-bench | choices_ad | Dog | Speaker_Age_common_voice/a1.wav | {"path": "a1.wav", "question": "Who?", "choice_a": "Man", "choice_b": "Woman", "choice_c": "Dog", "choice_d": "", "answer_gt": "Dog", "task_name": "Speaker_Age", "dataset_name": "common_voice", "uniq_id": 12}
"""
ROWS = {}


def cells_of(table):
    return [[cell.strip() for cell in line.split(" | ")] for line in table.strip().splitlines()]


for name, *_, row in cells_of(PUBLISHED):
    ROWS[name] = json.loads(row)


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def numbered(name, count):
    return [ROWS[name] | {"id": f"{i}"} for i in range(count)]


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def test_every_format_is_read_as_itself(tmp_path):
    """Also where ids and optional keys are missing, an evaluation added its own, or the keys are in another order."""
    for name, form, answer, clip, _ in cells_of(PUBLISHED):
        row = ROWS[name]
        answered = row | dict.fromkeys(("model_prediction", "response", "answer_prediction"), "Man")
        fewer = without(row, "category", "language", "source", "task", "question_type", "id", "uniq_id")
        for variant in (row, answered, fewer, dict(reversed(row.items()))):
            (q,) = read_questions(write(tmp_path / "q.json", [variant]))
            assert (q.meta["format"], q.meta["row"], q.meta["source"]) == (form, 0, variant), name
            assert q.answer == answer and answer in q.choices
            assert q.audio == (None if form == "arc" else str(tmp_path / clip))  # beside the file
    assert {q[1] for q in cells_of(PUBLISHED)} == set(data.FORMATS)


def test_ids_of_rows_without_are_their_own_in_any_order_and_after_an_evaluation(tmp_path):
    rows = [without(ROWS["mmar"], "id") | {"question": f"Who is {i}?"} for i in range(20)]
    answered = [row | {"model_prediction": "Dog"} for row in reversed(rows)]
    files = write(tmp_path / "q.json", rows), write(tmp_path / "p.json", answered)
    first, second = ({q.question: q.id for q in read_questions(file)} for file in files)
    assert first == second and len(set(first.values())) == 20


def test_only_avqas_questions_have_their_video_replaced_and_no_video_game(tmp_path):
    asked = "Video 2, videotape: which video game is in the video?"
    (q,) = read_questions(write(tmp_path / "q.json", [ROWS["avqa"] | {"question_text": asked}]))
    assert q.question == "Audio 2, videotape: which video game is in the audio?"
    (q,) = read_questions(write(tmp_path / "q.json", [ROWS["dcase"]]))
    assert q.question == "Who speaks in the video?"


def test_mmau_pros_other_kinds_of_rows_are_counted_and_are_not_malformed(tmp_path, caplog):
    others = [{"audio_path": ["a.wav", "b.wav"]}, {"choices": None}, {"choices": ["open"]}]
    rows = [ROWS["mmau-pro"] | {"id": i} | change for i, change in enumerate(others)]
    assert len(read_questions(write(tmp_path / "q.json", [*rows, ROWS["mmau-pro"]]))) == 1
    assert "3 rows of several clips or without choices" in caplog.text and "malformed" not in caplog.text
    with pytest.raises(InputError, match="no question is left of 3"):
        read_questions(write(tmp_path / "q.json", rows))


def test_the_prompt_is_the_papers():
    q = Question("1", "What is it?", ("a dog", "it's a cat"), "a dog", None, {})
    expected = """What is it? Please choose the answer from the following options: ['a dog', "it's a cat"]."""
    assert prompt_text(q) == expected
    thinking = " and final answer in <answer> </answer>."
    ends = {"direct": "", "answer": " Output the final answer in <answer> </answer>.",
            "think": f" Output the thinking process in <think> </think>{thinking}",
            "brief": f" Output the thinking process (at most 50 words) in <think> </think>{thinking}"}  # fmt: skip
    assert {name: prompt_text(q, name).removeprefix(expected) for name in PROMPTS} == ends


def test_empty_answers_hide_a_file_if_all_are_empty(tmp_path):
    for empty in ("", None):
        hidden = [row | {"answer": empty} for row in numbered("mmau", 20)]
        assert {q.answer for q in read_questions(write(tmp_path / "q.json", hidden))} == {None}


# ---------------------------------------------------------------------------------------------------- clips


def clips_of(folder, names, row=ROWS["mmar"], key="audio_path"):
    """Where the clips of rows with these names are looked for."""
    rows = [row | {"id": i, key: name} for i, name in enumerate(names)]
    questions = read_questions(write(folder.parent / "q.json", rows), str(folder))
    return [os.path.relpath(q.audio, folder) for q in questions]


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


FOUND = """
./a/deep.wav | a/deep.wav
x/y/deep.wav | deep.flac
a/only.wav | a/only.mp3
a/only | a/only.mp3
b/none.ogg | b/none.ogg
../../secret.wav | secret.wav
two | two.wav
a/../two.mp4 | two.mp4
/no/such/film | film.mp4
fetched.wav | audio/fetched.flac
c/fetched.wav | audio/c/fetched.wav
c/both.wav | audio/c/both.wav
"""


PUT = """deep.flac a/deep.wav a/only.mp3 ../secret.wav two.wav two.mp4 film.mp4 dog/001.wav cat/001.wav
         audio/fetched.flac audio/c/fetched.wav both.wav audio/c/both.wav 001.wav"""


def test_a_clip_is_found_by_its_whole_path_or_else_its_bare_name_and_never_as_anothers(tmp_path):
    folder = put(tmp_path / "clips", *PUT.split())
    for name, expected in cells_of(FOUND):
        assert clips_of(folder, [name]) == [expected], name
    both = ["dog/001.wav", "cat/001.wav", "dog/001.wav"]
    absolute = [str(folder / name) for name in both]
    assert clips_of(folder, both) == clips_of(folder, absolute) == both
    with pytest.raises(InputError, match="rows 1 and 2: 001.wav and cat/001.wav have one name.*--audio_dir"):
        clips_of(folder / "dog", absolute)  # the folder above both was meant
    with pytest.raises(InputError, match="rows 1 and 3: dog/001.wav and fox/001.wav have one name"):
        clips_of(folder, [*both[:2], "fox/001.wav"])  # 001.wav may be any fox's, or a third
    assert clips_of(folder, ["two.wav", "./two.mp4", "two"]) == ["two.wav", "two.mp4", "two.wav"]
    with pytest.raises(InputError, match="rows 2 and 3: two.wav and two.mp3 have one name"):
        clips_of(put(tmp_path / "more", "a/two.wav", "two.wav"), ["a/two", "two", "./two.mp3"])
    started = time.process_time()
    clips_of(folder, ["_" + "0" * 60_000 + "x"])
    assert time.process_time() - started < 5


def test_avqas_clips_are_found_under_all_their_names_and_are_one(tmp_path):
    names = ["-HG3Omg_89c_000030", "-HG3Omg_89c_30"]
    for name in (f"{stem}{ending}" for stem in names for ending in (".wav", ".flac")):
        folder = put(tmp_path / name / "clips", name)
        assert clips_of(folder, names, ROWS["avqa"], "video_name") == [name] * 2


@pytest.mark.skipif(not DATA.exists(), reason=f"real clips are not at {DATA}")
def test_every_real_clip_is_read():
    for clip in sorted((DATA / "audio").iterdir()):
        samples = load_audio(clip)
        assert samples.ndim == 1 and 0.01 < np.abs(samples).max() <= 1
        assert abs(len(samples) / 16_000 - soundfile.info(clip).duration) < 0.1


def test_resampling_is_exact_on_tones_in_the_pass_band():
    def sampled(tone, rate):
        times = np.arange(rate) / rate
        return np.sin(2 * np.pi * tone * times) * np.sin(np.pi * times) ** 2

    for rate in (8_000, 11_025, 12_345, 22_050, 32_000, 44_100, 48_000, 192_000, 44_099, 11_024):
        for tone in np.linspace(50, min(7_000, 0.44 * rate), 4):
            ours = resample(sampled(tone, rate).astype("float32"), rate)
            assert len(ours) == 16_000 and ours.dtype == np.float32
            assert 20 * np.log10(np.abs(ours - sampled(tone, 16_000)).max()) < -100, (rate, tone)


def test_resampling_lets_nothing_alias_and_no_rate_or_length_blows_up():
    loud = np.sin(2 * np.pi * 9_500 * np.arange(48_000) / 48_000)  # more than 16 kHz can hold
    assert np.abs(resample(loud, 48_000)[1000:-1000]).max() < 1e-4
    noise = np.random.default_rng(0).standard_normal(12 * 44_099).astype("float32")
    for rate in (1, 1_009, 44_099, 192_007):
        for length in (1, 7_919, len(noise)):
            part = noise[: min(length, 40 * rate)]
            assert len(resample(part, rate)) == -(-len(part) * 16_000 // rate)


# File | its samples | how they are written | words of the reason (-: it is read)
CLIPS = """
header.wav | none | {} | no samples
sample.wav | one | {} | -
nan.wav | nan | {"subtype": "FLOAT"} | not finite
huge.wav | huge | {"subtype": "FLOAT"} | not finite
loud.wav | loud | {"subtype": "FLOAT"} | -
rate.wav | noise | {"samplerate": 1000003} | -
talk.opus | noise | {"format": "OGG", "subtype": "OPUS"} | -
cut.wav | noise | {} | cut off
cut.aiff | noise | {} | cut off
cut.ogg | noise | {} | cut off
cut.opus | noise | {"format": "OGG", "subtype": "OPUS"} | cut off
cut.mp3 | noise | {} | cut off
cut.flac | noise | {} | lost sync|decod
piped.wav | noise | {} | -
text.wav | noise | {} | Format not recognised
"""


@pytest.mark.filterwarnings("ignore:overflow")
def test_hostile_clips_are_read_or_named(tmp_path):
    noise = (np.random.default_rng(0).standard_normal(64_000) * 0.1).astype("float32")
    samples = {"noise": noise, "none": noise[:0], "one": noise[:1], "loud": noise * 100}
    samples["nan"] = np.append(noise, np.nan)
    samples["huge"] = np.full((16_000, 2), 3e38)  # their sum is infinite
    clips = cells_of(CLIPS)
    for name, kind, how, _ in clips:
        soundfile.write(tmp_path / name, samples[kind], **{"samplerate": 16_000} | json.loads(how))
        whole = (tmp_path / name).read_bytes()
        if name.startswith("cut"):
            (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    whole = (tmp_path / "piped.wav").read_bytes()  # by a program that knows no length beforehand
    (tmp_path / "piped.wav").write_bytes(whole[:40] + b"\xff" * 4 + whole[44:])
    (tmp_path / "text.wav").write_text("no audio")
    os.mkfifo(tmp_path / "pipe.wav")
    for name, *_, words in [*clips, ("pipe.wav", "no such file"), ("none.wav", "no such file")]:
        path = str(tmp_path / name)
        if words == "-":
            heard = load_audio(path)
            assert heard.dtype == np.float32 and np.abs(heard).max() <= 1, name
            assert len(heard) == pytest.approx(16_000 * check_clips([path])[path], abs=1)
        else:
            with pytest.raises(InputError, match=f"^{path}: .*({words}).*$"):
                load_audio(path)


def test_a_long_clip_is_decoded_as_far_as_it_is_heard_and_block_by_block(tmp_path):
    level = np.full((40 * 192_000, 2), 0.5)  # 1 MB can hold 300 s of 8 channels at 384 kHz
    soundfile.write(tmp_path / "wide.flac", level, 192_000)
    assert len(load_audio(tmp_path / "wide.flac", longest=1)) == 16_000
    tracemalloc.start()
    heard = load_audio(tmp_path / "wide.flac")
    assert len(heard) == 640_000 and np.ptp(heard[9_000:-9_000]) < 1e-3  # over all its pieces
    assert tracemalloc.get_traced_memory()[1] < 24 * 40 * 192_000  # bytes: 44 a frame without pieces
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------ bad input

# Whose row | what is changed in it | words of the reason
BAD_ROWS = r"""
avqa | {"answer": -1} | -1 is none .* write the text of one of
avqa | {"answer": 4} | 4 is none
avqa | {"question_text": 7} | expected string
mmau | {"answer": 1} | 1 is none .* write the text of one of \['Man', 'Woman'\]
mmau | {"answer": "B"} | 'B' is none .* write the text of one of \['Man', 'Woman'\]
mmau | {"answer": " "} | none of the choices
mmau | {"answer": ""} | no answer
mmau | {"choices": "Man"} | list of two choices
mmau | {"choices": ["Man"]} | list of two choices
mmau | {"choices": ["LONG", "Woman"]} | none of the choices
mmau | {"question": null} | 'NoneType'
mmau | {"question": " "} | needs a question
mmau | {"choices": ["Man", 3]} | int found
mmau | {"audio_id": null} | NoneType
mmau | {"audio_id": ".."} | empty name
mmau | {"question": "Who?\udfff"} | surrogate
mmau | {"id": "3"} | id 3 is row 4's already
mmau | {"audio_path": "a.wav", "multi_choice": ["a", "b"]} | none of the choices
mmau | 7 | is no JSON object
arc | {"answerKey": "E"} | has no 'E'
arc | {"question": {"stem": "Who?", "choices": [{"text": "tree", "label": "C"}, {"text": "book", "label": "C"}]}} | label twice
arc | {"question": "Who?"} | indices
mmar | {"audio_path": ["a.wav", "b.wav"]} | list
mmsu | {"choice_b": null} | list of two choices
dcase | {"question_text": "", "question": "Who?"} | needs a question
"""


def test_a_malformed_row_is_named_and_left_out_and_more_than_a_tenth_stop(tmp_path, caplog):
    for name, change, words in cells_of(BAD_ROWS):
        good, row = numbered(name, 19), json.loads(change.replace("LONG", "long" * 99_999))
        if row != 7:
            row = ROWS[name] | row
        caplog.clear()
        assert len(read_questions(write(tmp_path / "q.json", [*good, row]))) == 19
        assert re.search(
            rf"q.json: 1 of 20 rows are malformed, left out:\nrow 20.*: .*({words})", caplog.text
        )
        assert len(caplog.text) < 500
        with pytest.raises(
            InputError, match=rf"^.*1 of 6 rows are malformed, more .* row 6.*: .*({words}).*$"
        ):
            read_questions(write(tmp_path / "q.json", [*good[:5], row]))
    rows = [ROWS["avqa"], *numbered("mmau", 20)]  # the format is that of most
    assert len(read_questions(write(tmp_path / "q.json", rows))) == 20
    assert "row 1, read as mmau: has no 'audio_path'" in caplog.text


def test_lines_end_at_line_feeds_alone_and_a_broken_one_is_named(tmp_path, caplog):
    """U+2028, U+0085 and the form feed stand inside texts; blank lines, carriage returns, a byte order mark do not count."""
    rows = [row | {"question": "Who\u2028spoke\x85in\x0bit?", "score": None} for row in numbered("mmau", 40)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\ufeff" + "\r\n\n".join(lines).replace("null", "NaN")
    (tmp_path / "q.jsonl").write_bytes(text.encode())
    assert [q.meta["source"] for q in read_questions(tmp_path / "q.jsonl")] == rows
    lines[9] = lines[9][:30]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert len(read_questions(tmp_path / "q.jsonl")) == 39
    assert "row 10, read as mmau: is no JSON object" in caplog.text


BAD_FILES = r"""
[{"audio_path": "dog.wav", "quest | not a whole JSON list
[[[[ | nested|cut off
[1, 2] | no JSON objects
[] | no JSON objects
b | no JSON objects
audio_path,question,answer | no JSON objects, in a list or one a line, such as {"audio_path"
{"audio": "dog.wav", "question": "Who?", "choices": ["a", "b"], "answer": "a"} | has no 'audio_path'; such a row is enough: {"audio_path".*"a dog"}
"""


def test_a_hostile_file_is_one_line_that_says_what_is_wanted(tmp_path):
    for content, words in cells_of(BAD_FILES):
        (tmp_path / "q.json").write_text(content.replace("[[[[", "[" * 100_000))
        with pytest.raises(InputError, match=f"^.*q.json: .*({words}).*$"):
            read_questions(tmp_path / "q.json")
    (tmp_path / "q.json").write_bytes(b'[{"question": "Wh\xe9"}]')
    for name, words in ((tmp_path / "q.json", "utf-8"), (tmp_path, "directory"), ("Harland/AudioMCQ", "python fetch.py SET"),
                        ("data/avqa/train_qa.json", "python fetch.py avqa")):  # fmt: skip
        with pytest.raises(InputError, match=f"^cannot read {name}: .*{words}.*$"):
            read_questions(name)


# -------------------------------------------------------------------------------------- questions of a run


def make_run(folder, **options):
    """A file of 60 questions about 30 clips, and a run's options that train on it."""
    put(folder, "clips/7.wav")
    for i in range(30):
        soundfile.write(folder / "clips" / f"{i}.wav", np.zeros(800 + 80 * i), 8000)
    rows = [row | {"audio_id": f"clips/{i % 30}.wav"} for i, row in enumerate(numbered("mmau", 60))]
    return rows, settings(data=[str(write(folder / "q.json", rows))], **options)


DEFAULTS = """{"audio_dir": [null], "no_audio": false, "hold_out": 0, "eval_data": "", "eval_audio_dir": null,
               "seed": 3, "shares": [], "steps": 9, "batch": 8}"""


def settings(**options):
    return Namespace(**json.loads(DEFAULTS) | options)


def test_a_runs_questions_are_those_whose_clip_can_be_read(tmp_path, caplog):
    _, config = make_run(tmp_path)
    (tmp_path / "clips" / "7.wav").write_text("no audio")
    loaded = load_questions(config, check_clips)
    (file,) = loaded.files
    assert len(file) == 58 and not loaded.held_out and loaded.longest_clip == (800 + 80 * 29) / 8000
    assert re.search("q.json: 2 of 60 .*, left out:\n.*7.wav: .*Format not recognised", caplog.text)
    for i in range(9, 13):
        (tmp_path / "clips" / f"{i}.wav").write_text("no audio")
    with pytest.raises(InputError, match="10 of 60 questions have no readable clip .*7.wav: "):
        load_questions(config, check_clips)
    config.no_audio = True
    assert len(load_questions(config, None).files[0]) == 60


def test_questions_held_out_are_the_same_in_every_run_and_in_no_file(tmp_path):
    rows, config = make_run(tmp_path, hold_out=10)
    first = load_questions(config, check_clips)
    random.Random(0).shuffle(rows)
    write(tmp_path / "q.json", rows)
    config.data.append(str(write(tmp_path / "second.json", rows[::2])))
    config.seed = 4
    again = load_questions(config, check_clips)
    held = [q.id for q in first.held_out]
    assert len(set(held)) == 10 and held == [q.id for q in again.held_out] != sorted(held, key=int)
    for file in (*first.files, *again.files):
        assert file and not {q.id for q in file} & set(held)
    assert len(first.files[0]) == len(again.files[0]) == 50
    config.hold_out = 60
    with pytest.raises(InputError, match="--hold_out 60 leaves nothing"):
        load_questions(config, check_clips)


def test_a_file_of_its_own_is_scored_up_to_200_and_hidden_answers_are_refused(tmp_path):
    rows, config = make_run(tmp_path)
    many = [rows[i % 60] | {"id": f"own {i}"} for i in range(250)]
    config.eval_data = str(write(tmp_path / "own.json", many))
    loaded = load_questions(config, check_clips)
    assert len(loaded.files[0]) == 60 and len({q.id for q in loaded.held_out}) == 200
    config.data.append(str(write(tmp_path / "hidden.json", [without(row, "answer") for row in rows])))
    with pytest.raises(InputError, match="hidden.json hides its answers"):
        load_questions(config, check_clips)


def named(ids, count):
    return [Question(ids.format(i), "", (), "", None, {}) for i in range(count)]


def test_who_is_asked_what_does_not_depend_on_the_number_of_processes():
    """Two files with shares: question k of step s is the same on 1, 2, 4 and 8 processes, and of one file."""
    files = [named("{}", 60), named("fact {}", 20)]
    config = settings(shares=[1.0, 2.0], steps=40)

    def asked(world):
        found = {}
        for rank in range(world):
            questions = Questions(files, lambda question, heard: heard, config, rank=rank, world=world)
            for one in map(questions.__getitem__, range(config.steps * questions.each)):
                assert one.prompt is True
                found[one.step, one.k] = one.question.id
        return found

    one = asked(1)
    assert data.sha256(json.dumps(sorted(one.items())).encode()) == "38ceab56e3618924"  # and in every version
    for world in (2, 4, 8):
        assert asked(world) == one
    for step in range(1, 41):
        assert len({one[step, k].startswith("fact") for k in range(8)}) == 1
    first = [one[key] for key in sorted(one) if not one[key].startswith("fact")][:60]
    assert sorted(first, key=int) == [q.id for q in files[0]]  # each once before one again


def test_a_clip_that_fails_is_replaced_by_the_same_question_in_every_run():
    def encode(question, heard):
        if heard or int(question.id) % 2:
            raise InputError(f"{question.id} is odd")
        return question.id

    files = [named("{}", 60)]
    config = settings(no_audio=True)
    whole = Questions(files, encode, config, rank=0, world=1)
    half = Questions(files, encode, config, rank=1, world=2)
    asked = list(map(whole.__getitem__, range(72)))
    assert asked[3] == half[1] and sum(len(one.bad) for one in asked) > 20
    ids = [one.question.id for one in asked]
    assert ids == [one.prompt for one in asked]
    assert data.sha256(json.dumps(ids).encode()) == "65c1a39fa09a51c4"
    with pytest.raises(InputError, match="clips in a row cannot be decoded, the last: 1 is odd"):
        Questions([files[0][1:2]], encode, config, rank=0, world=1)[0]
