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
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import soundfile

from files import InputError, LocalError, first_line, parse_json, read_text, sha256

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
    meta: dict  # {"format", "row": 0-based row of the file, "source": the row as published}


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
    options = list(question.choices)
    asked = f"{question.question} Please choose the answer from the following options: {options}."
    return asked + PROMPTS[prompt]


# ------------------------------------------------------------------------------------------- question files


def read_rows(path: Path | str) -> tuple[list, bool]:
    """A JSON list or JSON lines -> (rows, whether it was lines). A line that is not JSON gives None.

    Raises InputError for a file that is missing, not UTF-8, or a list that is cut off.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            return parse_json(text), False
        except ValueError as error:
            raise InputError(f"{path}: not a whole JSON list (cut off?): {error}") from None
    rows = []
    for line in text.split("\n"):  # not splitlines(), which also splits at U+2028 inside a text
        try:
            rows.append(parse_json(line))
        except ValueError:
            if line.strip():
                rows.append(None)
    if not any(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: neither a JSON list nor JSON objects, one a line, such as {PLAIN}")
    return rows, True


def read_questions(path: Path | str, audio_dir: str | None = None) -> list[Question]:
    """Read a question file, its format told by its keys. Clips are looked up in `audio_dir` (or beside it).

    This is the one door of a row: whatever is wrong in it, the row is named in the log with its number and
    skipped. More than a tenth of them, a file in no known format, or two names that one clip would be heard
    for raise InputError. A file hides its answers if no row at all has one.
    """
    rows, _ = read_rows(path)
    form = format_of_file(path, rows)
    folder = Path(audio_dir or Path(path).parent)
    questions = []
    bad = []
    left_out = 0
    row_of_id = {}
    for number, row in enumerate(rows, start=1):
        try:
            question = read_row(row, form, number, folder)
            first = row_of_id.setdefault(question.id, number)
            if first != number:
                raise ValueError(f"id {question.id} is row {first}'s already")
            questions.append(question)
        except NotAsked:
            left_out += 1
        except Exception as error:
            why = first_line(error)
            if not isinstance(error, ValueError):
                why = f"is not of the format {form}: {type(error).__name__} {why}"
            bad.append(f"{path}, row {number}: {why:.300}")
    answered = [question for question in questions if question.answer is not None]
    for question in questions:
        if answered and question.answer is None:
            bad.append(f"{path}, row {question.meta['row'] + 1}: no answer, which other rows have")
    questions = answered or questions
    if left_out:
        log.warning("%s: %d rows of several clips or without choices are left out", path, left_out)
    warn_of("skipped", bad)
    if len(bad) > MOST_BAD * len(rows) or not questions:
        counts = f"{len(bad)} of {len(rows)} rows are malformed, {left_out} left out"
        raise InputError(f"{path}: no tenth may be: {counts} {bad[:1]}")
    if form == "arc":
        return questions
    return find_clips(path, questions, folder)


def warn_of(what: str, lines: list[str]) -> None:
    for line in lines[:20]:
        log.warning("%s: %s", what, line)
    if len(lines) > 20:
        log.warning("%s: %d more", what, len(lines) - 20)


def format_of_file(path: Path | str, rows: list) -> str:
    """The format that most rows are in. Raises InputError if none is known."""
    objects = [row for row in rows if isinstance(row, dict)]
    counts = Counter(map(format_of, objects))
    del counts[None]
    if not counts:
        raise InputError(
            f"{path}: in no known format: {str(objects[:1]):.200}; such a row is enough: {PLAIN}"
        )
    return counts.most_common(1)[0][0]


def read_row(row: dict, form: str, number: int, folder: Path) -> Question:
    """Row `number` (from 1) in the format `form`, its clip's path still relative to `folder`.

    Guards what would raise nothing and be asked all the same; anything else raises what it raises.
    """
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    identity, text, choices, answer, clip = FORMATS[form][1](row)
    if not text.strip() or not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"needs a question and a list of two choices or more, has {text!r:.80}, {choices}")
    "\n".join([text, str(clip), str(identity), *choices]).encode()  # all are texts, of whole characters
    if identity in (None, ""):  # the same whatever the order of the rows and what was added to them
        identity = sha256(json.dumps([clip, text, choices]).encode())
    audio = None
    if form != "arc":
        audio = clip_path(clip, folder)
    meta = {"format": form, "row": number - 1, "source": row}
    return Question(str(identity), text, tuple(choices), right_choice(answer, choices), audio, meta)


def right_choice(answer: str | None, choices: list[str]) -> str | None:
    """The choice that the answer names, spaces around it aside; None where it is hidden."""
    if answer in (None, ""):
        return None
    for choice in choices:
        if isinstance(answer, str) and choice.strip() == answer.strip():
            return choice
    raise ValueError(f"answer {answer!r:.80} is none of the choices: write the text of one of {choices}")


def questions_hash(questions: list[Question]) -> str:
    """Another one where a text, a choice, an answer or a clip's name is."""
    rows = []
    for question in questions:
        clip = Path(question.audio or "").stem  # a converted clip is the same clip
        rows.append([question.id, question.question, question.choices, question.answer, clip])
    return sha256(json.dumps(rows).encode())


# -------------------------------------------------------------------------------------------------- formats
# Each takes a row to (id or None, question, choices, text of the answer or None, name of the clip).


class NotAsked(Exception):
    """A well-formed row of a kind that is not asked here: about several clips, or without choices."""


def plain(row: dict, text: str = "question", *, choices: str = "choices", clip: str = "audio_path") -> tuple:
    return row.get("id"), row[text], row[choices], row.get("answer"), row[clip]


def avqa(row: dict) -> tuple:
    """AVQA asks about videos; training on it replaces the word, as the work that the paper builds on does."""
    text = row["question_text"]
    for word, instead in (("video", "audio"), ("Video", "Audio")):
        text = re.sub(rf"\b{word}\b(?!.[Gg]am)", instead, text)  # not that of a video game
    choices = row["multi_choice"]
    index = row["answer"]
    if type(index) is not int or not 0 <= index < len(choices):
        raise ValueError(
            f"answer {index!r:.80} is no index: write 0 to {len(choices) - 1} for one of {choices}"
        )
    # one clip, whether its start second is named with leading zeros (-HG3Omg_89c_000030) or not
    clip = re.sub(r"(?<=_)\d+$", lambda second: second[0].zfill(6), row["video_name"])
    return row.get("id"), text, choices, choices[index], clip


def arc(row: dict) -> tuple:
    listed = row["question"]["choices"]
    texts = {choice["label"]: choice["text"] for choice in listed}
    if len(texts) < len(listed):
        raise ValueError(f"has a label twice: {listed}")
    return row.get("id"), row["question"]["stem"], list(texts.values()), texts[row["answerKey"]], None


def mmau_pro(row: dict) -> tuple:
    clips = row["audio_path"]
    if len(clips) != 1 or len(row.get("choices") or []) < 2:
        raise NotAsked
    return plain(row | {"audio_path": clips[0]})


def audiomcq(row: dict) -> tuple:
    identity = row.get("id")
    if identity is not None:
        identity = f"{row['source_dataset']} {identity}"  # counted within one source
    return plain(row | {"id": identity})


def choices_ad(row: dict) -> tuple:
    choices = []
    for letter in "abcd":
        choice = row.get(f"choice_{letter}")
        if choice not in (None, ""):  # MMSU's questions with two choices leave any two of the four out
            choices.append(choice)
    identity = row.get("id")
    clip = row.get("audio_path")
    if "path" in row:
        identity = row.get("uniq_id")
        clip = f"{row['task_name']}_{row['dataset_name']}/{row['path']}"  # AIR-Bench: a folder a task
    return identity, row["question"], choices, row.get("answer_gt"), clip


FORMATS = {  # name -> (a key that tells it from those below it, its reader)
    "arc": ("answerKey", arc),
    "avqa": ("video_name", avqa),
    "choices_ad": ("choice_a", choices_ad),
    "mmau": ("audio_id", partial(plain, clip="audio_id")),
    "dcase": ("multi_choice", partial(plain, text="question_text", choices="multi_choice")),
    "audiomcq": ("source_dataset", audiomcq),
    "mmar": ("audio_path", plain),
    "mmau-pro": ("audio_path", mmau_pro),
}


def format_of(row: dict) -> str | None:
    """The format whose mark a row bears, the first that it has."""
    if isinstance(row.get("audio_path"), list):
        return "mmau-pro"
    for name, (key, _) in FORMATS.items():
        if key in row:
            return name
    return None


# ---------------------------------------------------------------------------------------------------- clips

# An audio file's name ends so. Of several the first is taken; libsndfile knows none of the last six.
ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".WAV")
ENDINGS += (".m4a", ".mp4", ".webm", ".aac", ".wma", ".mkv")
BLOCK = 2**16  # frames decoded at a time: 1 MB of FLAC can hold gigabytes of eight channels
LONGEST = 2**24  # samples transformed at once, in 400 MB: 350 s at 48 kHz


def clip_path(name: str, folder: Path) -> str:
    """A clip's name as a path relative to `folder`; of one that leads out of it, the part that does not."""
    parts = Path(os.path.relpath(folder / name, folder)).parts
    path = Path(*[part for part in parts if part != ".."])
    if path.suffix not in ENDINGS:
        path = path.with_name(f"{path.name}.wav")
    return str(path)


def find_clips(path: Path | str, questions: list[Question], folder: Path) -> list[Question]:
    """Each question's clip as its file in `folder`, or where that was expected. Raises InputError.

    A bare name is looked up only where it is one clip's alone, and no file is heard for two names.
    """
    bare = Counter(Path(name).stem for name in {question.audio for question in questions})
    first = {}
    found = []
    for question in questions:
        name = Path(question.audio)
        alone = bare[name.stem] == 1
        file = find_clip(name, folder, alone)
        other = first.setdefault(file, question)
        if other.audio != question.audio:
            rows = f"rows {other.meta['row'] + 1} and {question.meta['row'] + 1}"
            why = f"{other.audio} and {name} are both {file}: check --audio_dir"
            raise InputError(f"{path}, {rows}: {why}")
        found.append(replace(question, audio=file))
    return found


def find_clip(name: Path, folder: Path, alone: bool) -> str:
    """The file of this name, with another ending or without leading zeros; `alone`: of its bare name too."""
    short = re.sub(r"_0+(\d+)$", r"_\1", name.stem)
    places = [folder / name.parent, folder / "audio" / name.parent]
    if alone:
        places.append(folder)
    for place in places:
        names = clips_in(str(place))
        for stem in (name.stem, short):
            for ending in (name.suffix, *ENDINGS):
                file = stem + ending
                if file in names:
                    return str(place / file)
    return str(folder / name)


@lru_cache(maxsize=256)
def clips_in(folder: str) -> set[str]:
    """The names in a folder, by one listing: it may hold 182,000."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


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


def check_clips(clips: list[str]) -> dict[str, str | float]:
    """clip -> why its header says that it cannot be read, or its seconds."""
    found = {}
    for clip in clips:
        try:
            with open_clip(clip) as file:
                found[clip] = file.frames / file.samplerate
        except Exception as error:  # the door of a clip's header
            found[clip] = first_line(error)
    return found


def load_audio(path: Path | str, max_seconds: float | None = None) -> np.ndarray:
    """Decode a clip to float32 (n,), 16 kHz, channels averaged, within ±1; at most `max_seconds` of it.

    The door of a clip: raises InputError that names it if it cannot be read, is cut off, has no samples, or
    has samples that are not finite.
    """
    try:
        with open_clip(path) as file:
            frames = int(min(file.frames, (max_seconds or math.inf) * file.samplerate))
            mono = np.zeros(frames, "float32")
            there = 0
            for start in range(0, frames, BLOCK):
                count = min(BLOCK, frames - start)
                block = file.read(count, dtype="float32", always_2d=True)
                mono[there : there + len(block)] = block.mean(axis=1)
                there += len(block)
            # not to a frame: without a Xing header an MP3's length is a guess
            if there < 0.98 * frames - 0.1 * file.samplerate:
                raise ValueError(f"is cut off: {there} of {frames} frames can be decoded")
            mono = resample(mono[:there], file.samplerate)
        if not np.isfinite(mono).all():  # looked at last: sums of huge samples overflow
            raise ValueError("has samples that are not finite")
        return np.clip(mono, -1, 1)
    except Exception as error:
        raise InputError(f"{path}: {first_line(error)}") from None


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """(n,) at `rate` -> (ceil(n * 16000 / rate),) at 16 kHz, by cutting or extending the spectrum.

    Zeros at both ends keep the transform's wrap-around out. Tones come within -100 dB at any rate, but where
    one breaks off: what the filter makes of that rings on, with -56 dB for 3.5 kHz at 8 kHz after 60 ms.
    """
    if rate == RATE:
        return samples
    if len(samples) > max(LONGEST, 8 * rate):  # halves that overlap by two seconds
        half = len(samples) // 2 // rate
        first = resample(samples[: (half + 1) * rate], rate)[: half * RATE]
        second = resample(samples[(half - 1) * rate :], rate)[RATE:]
        return np.concatenate([first, second])
    ratio = Fraction(RATE, rate).limit_denominator(2**16)  # exact up to 65 kHz and for usual rates
    step = ratio.denominator  # so many samples are a whole number at 16 kHz
    # some such steps: 0.2 s or more, and 1/64 of the clip, so that no large prime slows the transform
    pad = step << max((rate // (5 * step)).bit_length(), (len(samples) // step).bit_length() - 6)
    padded = np.pad(samples, (pad, pad + -len(samples) % pad))
    count = int(len(padded) * ratio)
    spectrum = np.fft.rfft(padded)[: count // 2 + 1]
    out = np.fft.irfft(spectrum, count) * float(ratio)
    start = int(pad * ratio)
    return out[start : start + math.ceil(len(samples) * RATE / rate)]


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
    folders = config.audio_dir or [None]
    if len(folders) == 1:
        folders = folders * len(config.data)
    sources = list(zip(config.data, folders, strict=True))
    if config.eval_data:
        sources.append((config.eval_data, config.eval_audio_dir))
    files = []
    longest = 0.0
    for path, folder in sources:
        questions = read_questions(path, folder)
        if questions[0].answer is None:
            raise InputError(f"{path} hides its answers: a benchmark's test set, not to be trained on")
        found = {}
        if not config.no_audio:
            clips = {question.audio for question in questions} - {None}
            found = check(sorted(clips))
        good = []
        bad = []
        for question in questions:
            seconds = found.get(question.audio, 0.0)
            if isinstance(seconds, str):
                bad.append(f"{question.audio}: {seconds}")
                continue
            good.append(question)
            longest = max(longest, seconds)
        warn_of("left out", sorted(set(bad)))
        counts = f"{len(bad)} of {len(questions)} questions have no readable clip"
        if len(bad) > MOST_BAD * len(questions):
            raise InputError(f"{path}: {counts} (such as {bad[0]}); check --audio_dir")
        log.info("%s: %s", path, counts)
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
    """A Dataset of what a process is asked: item i is question k = (i mod A) W + rank of step i div A + 1.

    (Each of W processes asks A questions a step.) All questions of a step come from one file, drawn by the
    shares, so that all processes run the same modules. A clip that fails to decode is replaced by the next
    good question of an order that (seed, step, k) decide.
    """

    files: list[list[Question]]
    encode: Callable  # (question, use_audio) -> a prompt, or InputError
    config: Namespace
    rank: int = field(kw_only=True)
    world: int = field(kw_only=True)

    def __post_init__(self):
        config = self.config
        self.each = config.batch // self.world
        shares = np.resize(config.shares or [1.0], len(self.files))
        rng = np.random.default_rng([config.seed, 1])
        self.file_of_step = rng.choice(len(self.files), size=config.steps, p=shares / shares.sum())

    def __len__(self) -> int:
        return self.config.steps * self.each

    def __getitem__(self, i: int) -> Asked:
        """Of the file's permutation of this epoch; then what may replace it."""
        step = i // self.each + 1
        k = i % self.each * self.world + self.rank
        file = self.file_of_step[step - 1]
        questions = self.files[file]
        steps_before = int((self.file_of_step[: step - 1] == file).sum())
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
    waiting = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
