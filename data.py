"""A question: read every dataset's published format, decode its audio, write its prompt text, order a run's.

    avqa        {"id", "video_name", "question_text", "multi_choice": [...], "answer": 1}; gen_qa.py's too
    arc         {"id", "question": {"stem", "choices": [{"text", "label"}, ...]}, "answerKey"}
    mmau        {"id", "audio_id", "question", "choices": [...], "answer": text or absent, "task"}
    mmar        {"id", "audio_path", "question", "choices": [...], "answer": text, "modality"}
    mmau-pro    the same with "audio_path" a list; rows of several clips or without choices are left out
    audiomcq    the same with "source_dataset", with or without "id"
    dcase       {"question_text", "multi_choice": [...], "audio_path", "answer": text}, DCASE 2026's ADQA
    choices_ad  {"question", "choice_a" ... "choice_d", "answer_gt": text} and "id", "audio_path" (MMSU), or
                "uniq_id", "path", "task_name", "dataset_name" (AIR-Bench Foundation)

each as a JSON list or one object a line. Audio is anything that soundfile reads, brought to 16 kHz mono.
"""

import hashlib
import json
import logging
import math
import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile

from files import InputError, first_line, parse_json, read_text, sha256

log = logging.getLogger("omni_r1")

RATE = 16_000
LOWEST_RATE = 1_000
HIGHEST_RATE = 384_000
MOST_CHANNELS = 64
LONGEST_TEXT = 20_000  # characters of a question, and of its choices together; real ones have a few hundred
LONGEST_NAME = 1_000  # characters of an id or a clip's name
MOST_CHOICES = 64  # the real ones have 2 to 8
MOST_EVALUATED = 200  # questions of --eval_data: their 95 % interval is about 7 points to either side


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    choices: tuple[str, ...]
    answer: str | None  # the text of the right choice; None where a benchmark hides it
    audio: str | None  # a path, which need not exist; None where the format has no audio
    meta: dict  # {"format", "row": 0-based row of the file, "source": the row as published}


# What --prompt adds to Section III-A's prompt: nothing (the paper), or r1-aqa's two instructions.
PROMPTS = {
    "direct": "",
    "answer": " Output the final answer in <answer> </answer>.",
    "think": " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
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
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except ValueError:
            rows.append(None)
    if not any(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: neither a JSON list nor JSON objects, one a line")
    return rows, True


def read_questions(path: Path | str, audio_dir: str | None = None, max_bad: float = 0.10) -> list[Question]:
    """Read a question file, its format told by its keys. Clips are looked up in `audio_dir` (or beside it).

    A malformed row is named in the log with its number and skipped; more than the share `max_bad` of them, or
    a file in no known format, raises InputError. A file hides its answers if no row at all has one.
    """
    rows, _ = read_rows(path)
    name = format_of_file(path, rows)
    folder = Path(path).parent if audio_dir is None else Path(audio_dir)
    questions = []
    bad = []
    left_out = 0
    row_of_id = {}
    for number, row in enumerate(rows, start=1):
        try:
            question = read_row(row, name, number, folder)
            first = row_of_id.setdefault(question.id, number)
            if first != number:
                raise ValueError(f"id {question.id!r:.80} is row {first}'s already")
            questions.append(question)
        except NotAsked:
            left_out += 1
        except KeyError as error:
            bad.append(f"{path}, row {number}: no {error}")
        except ValueError as error:
            bad.append(f"{path}, row {number}: {error}")
        except (TypeError, AttributeError, IndexError) as error:
            bad.append(f"{path}, row {number}: is not of the format {name} ({error})")
    answered = [question for question in questions if question.answer is not None]
    if answered:
        for question in questions:
            if question.answer is None:
                bad.append(f"{path}, row {question.meta['row'] + 1}: no answer, which other rows have")
        questions = answered
    if left_out:
        log.warning("%s: %d rows of several clips or without choices are left out", path, left_out)
    warn_of("skipped", bad)
    if len(bad) > max_bad * len(rows) or (bad and not questions):
        raise InputError(f"{len(bad)} of {len(rows)} rows are malformed (first: {bad[0]}); see --max_bad")
    if not questions:
        raise InputError(f"{path}: no question about one clip with choices to choose from")
    return questions


def warn_of(what: str, lines: list[str]) -> None:
    for line in lines[:20]:
        log.warning("%s: %s", what, line)
    if len(lines) > 20:
        log.warning("%s: %d more", what, len(lines) - 20)


def format_of_file(path: Path | str, rows: list) -> str:
    """The format that most rows are in. Raises InputError if none is known."""
    counts = Counter(map(format_of, rows))
    del counts[None]
    if not counts:
        keys = next((list(row) for row in rows if isinstance(row, dict)), [])
        known = ", ".join(FORMATS)
        raise InputError(f"{path}: in no known format ({known}); its first row has the keys {str(keys):.200}")
    return counts.most_common(1)[0][0]


def read_row(row: dict, name: str, number: int, folder: Path) -> Question:
    """Row `number` (from 1) in the format `name`. Raises ValueError or KeyError for what is malformed."""
    if not isinstance(row, dict):
        raise ValueError("is not JSON, no object, or nested too deeply")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate), which no file can hold") from None
    identity, text, choices, answer, clip = FORMATS[name](row)
    check_text(text)
    check_choices(choices)
    audio = None
    if name != "arc":
        audio = find_clip(clip, folder)
    if identity is None:  # the same whatever the order of the rows and what was added to them
        content = json.dumps([clip, text, choices])
        identity = sha256(content.encode())
    if type(identity) not in (str, int) or len(str(identity)) > LONGEST_NAME:
        raise ValueError(f"id {identity!r:.80} is neither text nor number, or longer than {LONGEST_NAME}")
    meta = {"format": name, "row": number - 1, "source": row}
    return Question(str(identity), text, tuple(choices), right_choice(answer, choices), audio, meta)


def check_text(text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the question is empty or no text")
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"the question has {len(text)} characters, more than {LONGEST_TEXT}")


def check_choices(choices: list[str]) -> None:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("the choices are no list of texts")
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise ValueError(f"{len(choices)} choice(s); a question needs two, and at most {MOST_CHOICES}")
    characters = sum(map(len, choices))
    if characters > LONGEST_TEXT:
        raise ValueError(f"the choices have {characters} characters, more than {LONGEST_TEXT}")


def right_choice(answer: str | None, choices: list[str]) -> str | None:
    """The choice that the answer names, spaces around it aside; None where it is hidden."""
    if answer is None or answer == "":
        return None
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"answer {answer!r:.80} is empty or no text")
    if answer in choices:
        return answer
    for choice in choices:
        if choice.strip() == answer.strip():
            return choice
    raise ValueError(f"answer {answer!r:.80} is none of the choices")


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


def format_of(row: dict) -> str | None:
    """The format whose mark a row bears, the first of MARKS that it has; None for what is no row."""
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("audio_path"), list):
        return "mmau-pro"
    for key, name in MARKS.items():
        if key in row:
            return name
    return None


def avqa(row: dict) -> tuple:
    """AVQA asks about videos; training on it replaces the word, as the work that the paper builds on does."""
    check_text(row["question_text"])
    text = row["question_text"].replace("video", "audio").replace("Video", "Audio")
    choices = row["multi_choice"]
    index = row["answer"]
    if type(index) is not int or not 0 <= index < len(choices):
        raise ValueError(f"answer {index!r:.80} is no index into its {len(choices)} choices")
    return row["id"], text, choices, choices[index], row["video_name"]


def arc(row: dict) -> tuple:
    texts = {}
    for choice in row["question"]["choices"]:
        texts[choice["label"]] = choice["text"]
    label = row["answerKey"]
    if label not in texts:
        raise ValueError(f"answerKey {label!r:.80} is none of the labels {str(list(texts)):.80}")
    return row["id"], row["question"]["stem"], list(texts.values()), texts[label], None


def mmau(row: dict) -> tuple:
    return row["id"], row["question"], row["choices"], row.get("answer"), row["audio_id"]


def mmar(row: dict) -> tuple:
    return row["id"], row["question"], row["choices"], row.get("answer"), row["audio_path"]


def mmau_pro(row: dict) -> tuple:
    clips = row["audio_path"]
    choices = row.get("choices") or []
    if not isinstance(clips, list):
        raise ValueError("audio_path is no list")
    if len(clips) != 1 or len(choices) < 2:
        raise NotAsked
    return row.get("id"), row["question"], choices, row.get("answer"), clips[0]


def audiomcq(row: dict) -> tuple:
    identity = row.get("id")
    if identity is not None:
        identity = f"{row['source_dataset']} {identity}"  # counted within one source
    return identity, row["question"], row["choices"], row.get("answer"), row["audio_path"]


def dcase(row: dict) -> tuple:
    answer = row.get("answer")
    return row.get("id"), row["question_text"], row["multi_choice"], answer, row["audio_path"]


def choices_ad(row: dict) -> tuple:
    choices = []
    for letter in "abcd":
        choice = row.get(f"choice_{letter}")
        if choice not in (None, ""):  # MMSU's questions with two choices leave any two of the four out
            choices.append(choice)
    answer = row.get("answer_gt")
    if "uniq_id" not in row:
        return row["id"], row["question"], choices, answer, row["audio_path"]
    clip = f"{row['task_name']}_{row['dataset_name']}/{row['path']}"  # AIR-Bench: a folder a task
    return row["uniq_id"], row["question"], choices, answer, clip


FORMATS = {
    "avqa": avqa,
    "arc": arc,
    "mmau": mmau,
    "mmar": mmar,
    "mmau-pro": mmau_pro,
    "audiomcq": audiomcq,
    "dcase": dcase,
    "choices_ad": choices_ad,
}
MARKS = {  # a key that tells a format from those below it
    "answerKey": "arc",
    "video_name": "avqa",
    "choice_a": "choices_ad",
    "audio_id": "mmau",
    "multi_choice": "dcase",
    "source_dataset": "audiomcq",
    "audio_path": "mmar",
}


# ---------------------------------------------------------------------------------------------------- clips

READABLE = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif")
UNREADABLE = (".m4a", ".mp4", ".webm", ".aac", ".wma", ".mkv")  # libsndfile knows none of them
ENDINGS = READABLE + UNREADABLE


@lru_cache(maxsize=256)
def clips_in(folder: str) -> dict[str, str]:
    """stem -> file name of every clip, by one listing: a folder holds up to 182,000."""
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except OSError:
        return {}
    clips = {}
    for endings in (UNREADABLE, READABLE):
        for name in names:
            if name.lower().endswith(endings):
                clips[Path(name).stem] = name
    return clips


def find_clip(name: str, folder: Path) -> str:
    """The file of a clip in `folder`, or where it was expected, if there is none; never one outside.

    `name` is a path as the benchmarks give it (taken by its file name, then as a path under the folder), or
    AVQA's clip name, whose start second stands with or without leading zeros (-HG3Omg_89c_000030,
    -HG3Omg_89c_30).
    """
    if not isinstance(name, str) or "\0" in name or PurePosixPath(name).name in ("", ".."):
        raise ValueError(f"{name!r:.80} is no clip name")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{name!r:.80} is no clip name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        path = PurePosixPath(path.name)
    stem = path.name
    if path.suffix.lower() in ENDINGS:
        stem = path.stem
    else:
        path = path.with_name(f"{path.name}.wav")
    stems = [stem]
    seconds = re.fullmatch(r"(.+)_(\d{1,9})", stem)
    if seconds:
        start = int(seconds[2])
        stems += [f"{seconds[1]}_{start}", f"{seconds[1]}_{start:06d}"]
    for place in (folder, folder / path.parent):
        listed = clips_in(str(place))
        for candidate in stems:
            if candidate in listed:
                return str(place / listed[candidate])
    return str(folder / path)


def read_header(path: Path | str) -> str | float:
    """Why a clip cannot be read, as far as existence and header tell, or its length in seconds."""
    if os.path.isdir(path):
        return "a folder"
    if not os.path.exists(path):
        return "no such file"
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        return "not a regular file"
    try:
        info = soundfile.info(path)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        ending = Path(path).suffix.lower()
        if ending in UNREADABLE:
            return f"soundfile cannot read {ending}: convert it, to .flac for example"
        return f"no audio that can be read ({first_line(error)})"
    if not LOWEST_RATE <= info.samplerate <= HIGHEST_RATE:
        return f"{info.samplerate} Hz is outside {LOWEST_RATE} to {HIGHEST_RATE} Hz"
    if info.channels > MOST_CHANNELS:
        return f"{info.channels} channels, more than {MOST_CHANNELS}"
    if info.frames <= 0:
        return "has no samples"
    return info.frames / info.samplerate


def check_clip(path: Path | str) -> str | None:
    """Why a clip cannot be read, as far as existence and header tell; None if nothing is wrong with them."""
    found = read_header(path)
    if isinstance(found, str):
        return found
    return None


def check_clips(clips: list[str]) -> dict[str, str | float]:
    """clip -> why it cannot be read, or its seconds. What load_questions takes, for one process."""
    found = {}
    for clip in clips:
        found[clip] = read_header(clip)
    return found


def load_audio(path: Path | str, max_seconds: float | None = None) -> np.ndarray:
    """Decode a clip to float32 (n,), 16 kHz, channels averaged, within ±1; at most `max_seconds` of it.

    Raises InputError naming the file if it cannot be read, has no samples, or has samples that are not
    finite.
    """
    wrong = check_clip(path)
    if wrong:
        raise InputError(f"{path}: {wrong}")
    try:
        with soundfile.SoundFile(path) as file:
            frames = -1
            if max_seconds is not None:
                frames = int(max_seconds * file.samplerate)
            samples = file.read(frames, dtype="float32", always_2d=True)
            with np.errstate(over="ignore", invalid="ignore"):
                mono = samples.mean(axis=1)
            mono = resample(mono, file.samplerate)
    except MemoryError:
        raise InputError(f"{path}: does not fit in memory; cut it") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: cannot be decoded ({first_line(error)})") from None
    if not mono.size:
        raise InputError(f"{path}: has no samples")
    if not np.isfinite(mono).all():  # looked at last: sums of huge samples overflow
        raise InputError(f"{path}: has samples that are not finite")
    return np.clip(mono, -1, 1)


# --------------------------------------------------------------------------------------------- resampling


@lru_cache(maxsize=8)
def sinc_filter(rate: int) -> tuple:
    """Windowed-sinc weights from `rate` to 16 kHz: (up, down, offsets (up,), weights (up, taps)).

    Output n lies at input time n * down / up, whose fraction takes `up` values, each with its own weights: a
    sinc that cuts at half the lower rate under a Kaiser window (90 dB, pass band to 0.44 of the lower rate).
    """
    import torch  # not at the top: gen_qa.py does without, in a quarter of the memory

    ratio = Fraction(RATE, rate).limit_denominator(4096)  # exact for usual rates, else within 0.025 %
    up = ratio.numerator
    down = ratio.denominator
    lower = min(rate, RATE) / rate
    half = math.ceil(0.5 * (90 - 8) / (2.285 * 2 * math.pi * 0.12 * lower)) + 1
    times = torch.arange(up, dtype=torch.float64) * down / up
    offsets = times.floor()
    distance = torch.arange(-half, half + 1) - (times - offsets)[:, None]  # from each tap to the output
    window = torch.special.i0(9.0 * (1 - (distance / (half + 1)) ** 2).clamp(min=0).sqrt())
    weights = torch.sinc(lower * distance) * window
    return up, down, offsets.long(), (weights / weights.sum(1, keepdim=True)).float()


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """(n,) at `rate` -> (ceil(n * 16000 / rate),) at 16 kHz: a strided convolution with a row per phase."""
    if rate == RATE or not len(samples):
        return samples
    import torch

    up, down, offsets, weights = sinc_filter(rate)
    taps = weights.shape[1]
    length = math.ceil(len(samples) * RATE / rate)
    blocks = math.ceil(length / up)  # each gives `up` outputs from `down` inputs
    after = blocks * down + taps - len(samples)
    padded = torch.nn.functional.pad(torch.from_numpy(samples), (taps // 2, after))
    phases = []
    for rows in torch.arange(up).split(max(1, 2**22 // (down + taps))):  # odd rates have thousands of phases
        kernel = torch.zeros(len(rows), down + taps)
        kernel.scatter_(1, offsets[rows, None] + torch.arange(taps), weights[rows])
        phase = torch.nn.functional.conv1d(padded[None, None], kernel[:, None], stride=down)
        phases.append(phase[0, :, :blocks])
    return torch.cat(phases).T.reshape(-1)[:length].numpy()


# -------------------------------------------------------------------------------------- questions of a run


@dataclass(frozen=True)
class Loaded:
    files: list[list[Question]]  # one list a question file, to train on
    held_out: list[Question]  # never trained on, scored meanwhile
    longest_clip: float  # seconds


Check = Callable[[list[str]], dict[str, str | float]]  # check_clips, or what shares its work out


def load_questions(config: Namespace, check: Check) -> Loaded:
    """The questions of a run, those left out whose clip has no readable header.

    --hold_out takes questions from the first file, and what has their ids from every file; of --eval_data, a
    file of its own, at most 200 are taken. Raises InputError.
    """
    folders = config.audio_dir
    if len(folders) == 1:
        folders = folders * len(config.data)
    files = []
    longest = 0.0
    for path, folder in zip(config.data, folders, strict=True):
        questions, seconds = usable_questions(path, folder, config, check)
        files.append(questions)
        longest = max(longest, seconds)
    held_out = []
    if config.hold_out:
        held_out = in_order_of_ids(files[0])[: config.hold_out]
        ids = {question.id for question in held_out}
        for i, questions in enumerate(files):
            files[i] = [question for question in questions if question.id not in ids]
            if not files[i]:
                raise InputError(f"--hold_out {config.hold_out} leaves nothing of {config.data[i]}")
    if config.eval_data:
        questions, seconds = usable_questions(config.eval_data, config.eval_audio_dir, config, check)
        held_out = in_order_of_ids(questions)[:MOST_EVALUATED]
        longest = max(longest, seconds)
        learned = {question.id for file in files for question in file}
        both = sum(question.id in learned for question in held_out)
        if both:
            log.warning("%s: %d of its %d are learned from as well", config.eval_data, both, len(held_out))
    return Loaded(files, held_out, longest)


def in_order_of_ids(questions: list[Question]) -> list[Question]:
    """In the order of a hash of their ids: as good as random, and the same in every run."""
    return sorted(questions, key=lambda question: hashlib.sha256(question.id.encode()).digest())


def usable_questions(
    path: str, folder: str | None, config: Namespace, check: Check
) -> tuple[list[Question], float]:
    """A file's questions that can be asked, and the seconds of their longest clip; the others are logged.

    Raises InputError for hidden answers, or more than the share `max_bad` of clips that cannot be read.
    """
    questions = read_questions(path, folder, config.max_bad)
    if questions[0].answer is None:
        raise InputError(f"{path} hides its answers: a benchmark's test set, not to be trained on")
    clips = set()
    if not config.no_audio:
        clips = {question.audio for question in questions} - {None}
    reasons = {}
    longest = 0.0
    for clip, found in check(sorted(clips)).items():
        if isinstance(found, str):
            reasons[clip] = found
        else:
            longest = max(longest, found)
    good = [question for question in questions if question.audio not in reasons]
    missing = len(questions) - len(good)
    named = [f"{clip}: {reasons[clip]}" for clip in sorted(reasons)]
    warn_of("left out", named)
    if missing > config.max_bad * len(questions) or not good:
        raise InputError(
            f"{path}: {missing} of {len(questions)} questions have no readable clip (such as {named[0]}); "
            f"check --audio_dir, or raise --max_bad (now {config.max_bad})"
        )
    log.info("%s: %d questions, %d left out", path, len(good), missing)
    return good, longest


@dataclass(frozen=True)
class Asked:
    """Question number k of a step, on its way to a process."""

    step: int
    k: int
    question: Question
    prompt: object  # model.Prompt; None where 20 clips in a row could not be decoded
    bad: tuple[str, ...]  # why the questions before this one could not be asked


class Questions:
    """A Dataset of what a process is asked: item i is question k = (i mod A) W + rank of step i div A + 1.

    (Each of W processes asks A questions a step.) All questions of a step come from one file, drawn by the
    shares, so that all processes run the same modules. A clip that fails to decode is replaced by the next
    good question of an order that (seed, step, k) decide.
    """

    def __init__(self, files: list, encode: Callable, config: Namespace, *, rank: int, world: int):
        self.files = files
        self.encode = encode
        self.config = config
        self.rank = rank
        self.world = world
        self.each = config.batch // world
        shares = np.array(config.shares or [1] * len(files), float)
        rng = np.random.default_rng([config.seed, 1])
        self.file_of_step = rng.choice(len(files), size=config.steps, p=shares / shares.sum())

    def __len__(self) -> int:
        return self.config.steps * self.each

    def candidates(self, step: int, k: int) -> Iterator[Question]:
        """Question k of the step, from the file's permutation of this epoch; then what may replace it."""
        file = self.file_of_step[step - 1]
        questions = self.files[file]
        steps_before = int((self.file_of_step[: step - 1] == file).sum())
        epoch, place = divmod(steps_before * self.config.batch + k, len(questions))
        order = np.random.default_rng([self.config.seed, 2, file, epoch]).permutation(len(questions))
        yield questions[order[place]]
        others = np.random.default_rng([self.config.seed, 3, step, k]).permutation(len(questions))
        for index in others:
            yield questions[index]

    def __getitem__(self, i: int) -> Asked:
        step = i // self.each + 1
        k = (i % self.each) * self.world + self.rank
        bad = []
        for question in self.candidates(step, k):
            try:
                prompt = self.encode(question, not self.config.no_audio)
                return Asked(step, k, question, prompt, tuple(bad))
            except InputError as error:
                bad.append(str(error))
                if len(bad) == 20:
                    break
        return Asked(step, k, question, None, tuple(bad))
