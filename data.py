"""A question: read every dataset's published format, decode its audio, write its prompt text, order a run's.

    avqa        {"id", "video_name", "question_text", "multi_choice": [...], "answer": 1}; gen_qa.py's too
    arc         {"id", "question": {"stem", "choices": [{"text", "label"}, ...]}, "answerKey"}
    mmau        {"id", "audio_id", "question", "choices": [...], "answer": text or absent, "task"}
    mmar        {"id", "audio_path", "question", "choices": [...], "answer": text, "modality"}
    mmau-pro    the same with "audio_path" a list; rows of several clips or without choices are left out
    audiomcq    the same with "source_dataset"
    dcase       {"question_text", "multi_choice": [...], "audio_path", "answer": text}, DCASE 2026's ADQA
    choices_ad  {"question", "choice_a" ... "choice_d", "answer_gt": text} and "id", "audio_path" (MMSU), or
                "uniq_id", "path", "task_name", "dataset_name" (AIR-Bench Foundation)

each as a JSON list or one object a line; "id" may be absent, and PLAIN below is enough of one's own data.
Audio is anything that soundfile reads, brought to 16 kHz mono.
"""

import json
import logging
import math
import os
import re
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
import soundfile

from files import InputError, LocalError, first_line, parse_json, parse_lines, read_text, sha256

log = logging.getLogger("omni_r1")

RATE = 16_000
MOST_BAD = 0.1  # of a file's rows, or of its questions' clips: with more that cannot be read it is refused
MOST_EVALUATED = 200  # questions of --eval_data: their 95 % interval is about 7 points to either side
PLAIN = (
    '{"audio_path": "dog.wav", "question": "Who barks?", "choices": ["a dog", "a fox"], "answer": "a dog"}'
)


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    choices: tuple[str, ...]
    answer: str | None  # the text of the right choice; None where a benchmark hides it
    audio: str | None  # a path, which need not exist; None where the format has no audio
    # {"format", "row": 0-based, "source": it as published, "name": its clip's, find_clip's "clip" and "own"}
    meta: dict


# What --prompt adds to Section III-A's prompt: nothing (the paper), r1-aqa's two instructions, Ke-Omni-R's.
PROMPTS = {
    "direct": "",
    "answer": " Output the final answer in <answer> </answer>.",
    "think": " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
    "brief": " Output the thinking process (at most 50 words) in <think> </think>"
    " and final answer in <answer> </answer>.",
}


def prompt_text(question: Question, prompt: str = "direct") -> str:
    """Section III-A's prompt; the choices are a Python list's text, as in the work it builds on [7]."""
    asked = f"{question.question} Please choose the answer from the following options: {[*question.choices]}."
    return asked + PROMPTS[prompt]


# ------------------------------------------------------------------------------------------- question files


def read_rows(path: Path | str) -> tuple:
    """A JSON list or JSON lines -> (rows, whether it was lines). A line that is not JSON gives None.

    Raises InputError for a file that is missing, not UTF-8, or a list that is cut off.
    """
    path = Path(path)
    if not path.exists():
        name = path.parent.name if "data" in path.parts else "SET"
        hint = f"a published set: python fetch.py {name} (python fetch.py: their GB); else give --data"
        raise InputError(f"cannot read {path}: no such file; {hint}")
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            return parse_json(text), False
        except ValueError as error:
            raise InputError(f"{path}: not a whole JSON list (cut off?): {error}") from None
    return parse_lines(text), True


def read_questions(path: Path | str, audio_dir: str | None = None) -> list[Question]:
    """Read a question file, its format told by its keys. Clips are looked up in `audio_dir` (or beside it).

    This is the one door of a row: whatever is wrong in it, the row is named in the log with its number and
    skipped. More than a tenth of them raises InputError, and so does a clip found by its bare name where
    another row's has the same. A file hides its answers if no row at all has one.
    """
    rows, _ = read_rows(path)
    forms = Counter(format_of(row) for row in rows if isinstance(row, dict))
    if not forms:
        raise InputError(f"{path}: no JSON objects, in a list or one a line, such as {PLAIN}")
    form = max(forms, key=forms.get)  # that of most rows
    folder = Path(audio_dir or Path(path).parent)
    questions: dict[str, Question] = {}
    bad = []
    left_out = 0
    for i, row in enumerate(rows):
        try:
            question = read_row(row, form, i, folder)
            first = questions.setdefault(question.id, question)
            if first is not question:
                raise ValueError(f"id {question.id} is row {first.meta['row'] + 1}'s already")
        except NotAsked:
            left_out += 1
        except Exception as error:
            why = first_line(error)
            if isinstance(error, KeyError):
                why = f"has no {why}; such a row is enough: {PLAIN}"
            bad.append(f"row {i + 1}, read as {form}: {why:.300}")
    hidden = [question for question in questions.values() if question.answer is None]
    if len(hidden) < len(questions):
        for question in hidden:
            bad.append(f"row {question.meta['row'] + 1}: no answer, which other rows have")
            del questions[question.id]
    leave_out(path, bad, len(rows), "rows are malformed")
    if left_out:
        log.warning("%s: %d rows of several clips or without choices are left out", path, left_out)
    if not questions:
        raise InputError(f"{path}: no question is left of {len(rows)} rows")
    first_of = {}  # by the clips' files, and by their bare names
    for question in questions.values():
        clip = question.meta["clip"]
        for key in (question.audio, Path(question.audio or "").stem):
            first = first_of.setdefault(key, question)
            if clip != first.meta["clip"] and (
                key == question.audio or not question.meta["own"] & first.meta["own"]
            ):
                raise InputError(
                    f"{path}, rows {first.meta['row'] + 1} and {question.meta['row'] + 1}: "
                    f"{first.meta['clip']} and {clip} have one name, and not both are where they say: "
                    "check --audio_dir"
                )
    return list(questions.values())


def leave_out(path: Path | str, bad: list[str], total: int, what: str) -> None:
    """Name in the log what is left out of a file. InputError where it is more than a tenth of `total`."""
    said = f"{path}: {len(bad)} of {total} {what}"
    if len(bad) > MOST_BAD * total:
        raise InputError(f"{said}, more than a tenth (such as {bad[0]})")
    if bad:
        log.warning("%s, left out:\n%s", said, "\n".join(bad[:20]))


def read_row(row: dict, form: str, i: int, folder: Path) -> Question:
    """Row `i` in the format `form`, its clip looked up in `folder`.

    Guards what would raise nothing and be asked all the same; anything else raises what it raises.
    """
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    renamed = {plain: row[name] for name, plain in NAMES.items() if name in row}
    asked = FORMATS[form][1](row | renamed)
    text = asked["question"]
    choices = asked["choices"]
    clip = asked["audio_path"]
    identity = asked.get("id")
    if not text.strip() or not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"needs a question and a list of two choices or more, has {text!r:.80}, {choices}")
    "\n".join([text, f"{clip} {identity}", *choices]).encode()  # all are texts, of whole characters
    if identity in (None, ""):  # the same whatever the order of the rows and what was added to them
        identity = sha256(json.dumps([clip, text, choices]).encode())
    meta = {"format": form, "row": i, "source": row, "name": clip}
    meta["clip"] = audio = None
    if form != "arc":
        meta["clip"], audio, meta["own"] = find_clip(clip, folder)
    answer = right_choice(asked.get("answer"), choices)
    return Question(str(identity), text, tuple(choices), answer, audio, meta)


def right_choice(answer: str | None, choices: list[str]) -> str | None:
    """The choice that the answer names, spaces around it aside; None where it is hidden."""
    if answer in (None, ""):
        return None
    for choice in choices:
        if isinstance(answer, str) and choice.strip() == answer.strip():
            return choice
    raise ValueError(f"answer {answer!r:.80} is none of the choices: write the text of one of {choices}")


def questions_hash(questions: list[Question]) -> str:
    """Another one where a text, a choice, an answer or a clip's name is; a converted clip is the same one."""
    asked = [
        [q.id, q.question, q.choices, q.answer, os.path.splitext(q.meta["name"] or "")[0]] for q in questions
    ]
    return sha256(json.dumps(asked).encode())


# -------------------------------------------------------------------------------------------------- formats
# Each takes a row to one that has the keys of one's own format: id, question, choices, answer, audio_path.

NAMES = {  # of the same in the published files
    "question_text": "question",
    "multi_choice": "choices",
    "answer_gt": "answer",
    "audio_id": "audio_path",
    "uniq_id": "id",
}


class NotAsked(Exception):
    """A well-formed row of a kind that is not asked here: about several clips, or without choices."""


def avqa(row: dict) -> dict:
    """AVQA asks about videos; training on it replaces the word, as the work that the paper builds on does."""
    text = re.sub(r"\bvideo\b(?!.[Gg]am)", "audio", row["question"])  # not that of a video game
    text = re.sub(r"\bVideo\b(?!.[Gg]am)", "Audio", text)
    answer = dict(enumerate(row["choices"])).get(row["answer"], row["answer"])
    # one clip, whether its start second is named with leading zeros (-HG3Omg_89c_000030) or not
    clip = re.sub(r"(?<=_)\d+$", lambda second: second[0].zfill(6), row["video_name"])
    return row | {"question": text, "answer": answer, "audio_path": clip}


def arc(row: dict) -> dict:
    listed = row["question"]["choices"]
    texts = {choice["label"]: choice["text"] for choice in listed}
    if len(texts) < len(listed):
        raise ValueError(f"has a label twice: {listed}")
    return row | {
        "question": row["question"]["stem"],
        "choices": list(texts.values()),
        "answer": texts[row["answerKey"]],
        "audio_path": None,
    }


def choices_ad(row: dict) -> dict:
    letters = map(row.get, ("choice_a", "choice_b", "choice_c", "choice_d"))
    row["choices"] = list(filter(None, letters))  # MMSU's with two leave any two of the four out
    if "path" in row:  # AIR-Bench: a folder a task
        row["audio_path"] = f"{row['task_name']}_{row['dataset_name']}/{row['path']}"
    return row


def audiomcq(row: dict) -> dict:
    if "id" in row:  # counted within one source
        row["id"] = f"{row['source_dataset']} {row['id']}"
    return row


def mmau_pro(row: dict) -> dict:
    clips = row["audio_path"]
    if len(clips) != 1 or len(row["choices"] or []) < 2:
        raise NotAsked
    return row | {"audio_path": clips[0]}


FORMATS = {  # name -> (a key that tells it from those below it, its reader)
    "arc": ("answerKey", arc),
    "avqa": ("video_name", avqa),
    "choices_ad": ("choice_a", choices_ad),
    "mmau": ("audio_id", dict),
    "dcase": ("multi_choice", dict),
    "audiomcq": ("source_dataset", audiomcq),
    "mmau-pro": ("length_type", mmau_pro),
    "mmar": ("audio_path", dict),  # and one's own
}


def format_of(row: dict) -> str:
    """The format whose mark a row bears, the first that it has."""
    for name, (mark, _) in FORMATS.items():
        if mark in row:
            return name
    return "mmar"


# ---------------------------------------------------------------------------------------------------- clips

# An audio file's name ends so. Of several the first is taken; libsndfile knows none of the last six.
ENDINGS = ".wav .flac .mp3 .ogg .opus .aiff .aif .WAV .m4a .mp4 .webm .aac .wma .mkv"
BLOCK = 2**16  # frames decoded at a time: 1 MB of FLAC can hold gigabytes of eight channels


def find_clip(name: str, folder: Path) -> tuple:
    """A clip's path below `folder`; its file: there, or of its bare name; False if by that name alone.

    Also below `audio` in the folder. Of a name that leads out of the folder the part that does not is taken.
    The file may have another ending, or lack the leading zeros of the second after "_".
    """
    inside = os.path.relpath(folder / name, folder)
    path = Path(os.path.normpath(f"/{inside}")[1:])
    if path.suffix not in ENDINGS.split():
        path = path.with_name(f"{path.name}.wav")
    short = re.sub(r"(?<=_)\d+$", lambda second: second[0].lstrip("0") or "0", path.stem)
    audio = folder / "audio"  # where fetch.py puts the clips of a set
    own = folder / path.parent, audio / path.parent
    for place in (*own, folder, audio):
        names = clips_in(place)
        for stem, ending in product((path.stem, short), (path.suffix, *ENDINGS.split())):
            if stem + ending in names:
                return str(path), str(place / (stem + ending)), place in own
    return str(path), str(folder / path), True


@lru_cache(maxsize=256)
def clips_in(folder: Path) -> set[str]:
    """The names in a folder, by one listing: it may hold 182,000."""
    return set(os.listdir(folder)) if folder.is_dir() else set()


def open_clip(path: Path | str) -> soundfile.SoundFile:
    """Raises whatever tells why, as far as a header can, the clip cannot be read whole."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise ValueError("no such file")
    file = soundfile.SoundFile(path)
    if not file.frames:
        raise ValueError("has no samples")
    # WAV and the like say how many bytes follow; a program that writes to a pipe says 2 GB or more
    for promised, there in re.findall(r": (\d+) \(should be (\d+)\)", file.extra_info):
        if int(there) + 1024 < int(promised) < 2_000_000_000:
            raise ValueError(f"is cut off: {there} of {promised} bytes are there")
    return file


def check_clips(clips: list[str]) -> dict:
    """clip -> why its header says that it cannot be read, or its seconds."""
    found = {}
    for clip in clips:
        try:
            with open_clip(clip) as file:
                found[clip] = file.frames / file.samplerate
        except Exception as error:  # the door of a clip's header
            found[clip] = first_line(error)
    return found


def load_audio(path: Path | str, longest: float = math.inf) -> np.ndarray:
    """Decode a clip to float32 (n,), 16 kHz, channels averaged, within ±1; at most `longest` seconds of it.

    The door of a clip: raises InputError that names it if it cannot be read, is cut off, has no samples, or
    has samples that are not finite.
    """
    try:
        with open_clip(path) as file:
            frames = int(min(file.frames, longest * file.samplerate))
            mono = []
            for start in range(0, frames, BLOCK):
                block = file.read(min(BLOCK, frames - start), dtype="float32", always_2d=True)
                mono.append(block.mean(axis=1))
            mono = np.concatenate(mono)
            # not to a frame: without a Xing header an MP3's length is a guess
            if len(mono) < 0.98 * frames - 0.1 * file.samplerate:
                raise ValueError(f"is cut off: {len(mono)} of {frames} frames can be decoded")
            if file.format == "OGG":  # whose header promises nothing
                page = Path(path).read_bytes().rpartition(b"OggS")[2]
                body = 23 + page[22]  # behind the lengths of its segments
                if len(page) < body + sum(page[23:body]):
                    raise ValueError("is cut off: its last page is not whole")
        mono = resample(mono, file.samplerate)
        if not np.isfinite(mono).all():  # looked at last: sums of huge samples overflow
            raise ValueError("has samples that are not finite")
        return np.clip(mono, -1, 1)
    except Exception as error:
        raise InputError(f"{path}: {first_line(error)}") from None


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """(n,) at `rate` -> (ceil(n * 16000 / rate),) at 16 kHz, by cutting or extending the spectrum.

    In pieces of 16 s or more with a second of what is beside them, zeros at the ends, which keeps the
    transform's wrap-around out. Tones come within -100 dB, those near the highest frequency at a piece's end
    within -75 dB, but where one breaks off: what the filter makes of that rings on, with -56 dB for 3.5 kHz
    at 8 kHz after 60 ms.
    """
    if rate == RATE:
        return samples
    ratio = Fraction(RATE, rate).limit_denominator(2**16)  # exact up to 65 kHz and for usual rates
    step = ratio.denominator  # so many samples are a whole number at 16 kHz
    pad = step << (rate // step).bit_length()  # 1 s or more; no large prime slows it at usual rates
    padded = np.pad(samples, (pad, pad + -len(samples) % pad))
    edge = int(pad * ratio)
    parts = []
    for start in range(0, len(samples), 16 * pad):
        piece = padded[start : start + 18 * pad]
        count = int(len(piece) * ratio)  # of them, as many frequencies as there is room for
        part = np.fft.irfft(np.fft.rfft(piece), count)
        parts.append(float(ratio) * part[edge:-edge])
    return np.concatenate(parts)[: math.ceil(len(samples) * RATE / rate)]


# -------------------------------------------------------------------------------------- questions of a run


@dataclass(frozen=True)
class Loaded:
    files: list[list[Question]]  # one list a question file, to train on
    held_out: list[Question]  # never trained on, scored meanwhile
    longest_clip: float  # seconds


def load_questions(config: Namespace, check: Callable) -> Loaded:
    """The questions of a run, those left out whose clip has no readable header.

    `check` is check_clips, or what shares its work out. --hold_out takes questions from the first file, and
    what has their ids from every file; of --eval_data, a file of its own, at most 200 are taken. Raises
    InputError for hidden answers, and where more than a tenth of a file has no clip that can be read.
    """
    sources = list(zip_longest(config.data, config.audio_dir, fillvalue=config.audio_dir[0]))
    if config.eval_data:
        sources.append((config.eval_data, config.eval_audio_dir))
    files = []
    longest = 0.0
    for path, folder in sources:
        questions = read_questions(path, folder)
        if questions[0].answer is None:
            raise InputError(f"{path} hides its answers: a benchmark's test set, not to be trained on")
        clips = {question.audio for question in questions if question.audio}
        found = {} if config.no_audio else check(sorted(clips))
        good = []
        bad = []
        for question in questions:
            seconds = found.get(question.audio, 0.0)
            if isinstance(seconds, str):
                bad.append(f"{question.audio}: {seconds}")
            else:
                good.append(question)
                longest = max(longest, seconds)
        leave_out(path, bad, len(questions), "questions have no readable clip in --audio_dir")
        files.append(good)
    source = files[0]
    count = config.hold_out
    if config.eval_data:
        source = files.pop()
        count = MOST_EVALUATED
    # in the order of a hash of their ids: as good as random, and the same in every run
    held_out = sorted(source, key=lambda question: sha256(question.id.encode()))[:count]
    ids = {question.id for question in held_out}
    for i, questions in enumerate(files):
        if config.hold_out:
            files[i] = [question for question in questions if question.id not in ids]
        if not files[i]:
            raise InputError(f"--hold_out {count} leaves nothing of {config.data[i]}")
    return Loaded(files, held_out, longest)


@dataclass(frozen=True)
class Asked:
    """Question number k of a step, on its way to a process."""

    step: int
    k: int
    question: Question
    prompt: object  # model.Prompt
    bad: tuple[str, ...]  # why the questions before this one could not be asked


@dataclass
class Questions:
    """What a process is asked: item i is question k = (i mod A) W + rank of step i div A + 1.

    (Each of W processes asks A questions a step.) All questions of a step come from one file, drawn by the
    shares, so that all processes run the same modules. A clip that fails to decode is replaced by the next
    good question of an order that (seed, step, k) decide.
    """

    files: list[list[Question]]
    encode: Callable  # (question, use_audio) -> a prompt, or InputError
    config: Namespace
    rank: int
    world: int

    def __post_init__(self):
        config = self.config
        self.each = config.batch // self.world
        shares = np.resize(config.shares or [1.0], len(self.files))
        rng = np.random.default_rng([config.seed, 1])
        self.file_of_step = rng.choice(len(self.files), size=config.steps, p=shares / shares.sum())

    def __getitem__(self, i: int) -> Asked:
        """Of the file's permutation of this epoch; then what may replace it."""
        step = i // self.each + 1
        k = i % self.each * self.world + self.rank
        file = self.file_of_step[step - 1]
        questions = self.files[file]
        steps_before = (self.file_of_step[: step - 1] == file).sum()
        epoch, place = divmod(steps_before * self.config.batch + k, len(questions))
        order = np.random.default_rng([self.config.seed, 2, file, epoch]).permutation(len(questions))
        others = np.random.default_rng([self.config.seed, 3, step, k]).permutation(len(questions))
        bad = []
        for index in [order[place], *others[:19]]:
            question = questions[index]
            try:
                prompt = self.encode(question, not self.config.no_audio)
                return Asked(step, k, question, prompt, tuple(bad))
            except InputError as error:
                bad.append(str(error))
        raise LocalError(f"{len(bad)} clips in a row cannot be decoded, the last: {bad[-1]}")


def ahead(make: Callable, items: Iterable, depth: int) -> Iterator:
    """make(item) of each, in order, by a thread that is up to `depth` of them ahead of who asks.

    A thread and not a process: nothing goes through shared memory (64 MB in a default container), nothing is
    forked while AdamW's moments lie there, and decoding releases Python's lock.
    """
    pool = ThreadPoolExecutor(1)
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
