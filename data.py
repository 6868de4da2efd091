"""A question: read every dataset's published format, decode its audio, write its prompt text.

    AVQA   {"id", "video_name", "question_text", "multi_choice": [...], "answer": 1, ...}; gen_qa.py's too
    ARC    {"id", "question": {"stem", "choices": [{"text", "label"}, ...]}, "answerKey"}
    MMAU   {"id", "audio_id", "question", "choices": [...], "answer": text or absent, "task", ...}
    MMAR   {"id", "audio_path", "question", "choices": [...], "answer": text, "modality", ...}

each as a JSON list or one object a line. Audio is anything that soundfile reads, brought to 16 kHz mono.
"""

import logging
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from files import InputError, parse_json, read_text

log = logging.getLogger("omni_r1")

RATE = 16_000
LONGEST_QUESTION = 20_000  # characters; the real ones have a few hundred


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    choices: tuple[str, ...]
    answer: str | None  # the text of the right choice; None where a benchmark hides it
    audio: str | None  # a path, which need not exist; None where the format has no audio
    meta: dict  # {"format", "row": 0-based row of the file, "source": the row as published}


def prompt_text(question) -> str:
    """Section III-A's prompt; the choices are a Python list's text, as in the work it builds on [7]."""
    return (
        f"{question.question} Please choose the answer from the following options: {list(question.choices)}."
    )


# ------------------------------------------------------------------------------------------- question files


def read_rows(path):
    """A JSON list or JSON lines -> (rows, whether it was lines). A line that is not JSON gives None in its
    place.

    Raises InputError for a file that is missing, not UTF-8, or a list that is cut off.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            return parse_json(text), False
        except ValueError as error:
            raise InputError(f"{path}: not a whole JSON list (cut off?): {error}") from None
    rows = []
    for line in text.splitlines():
        try:
            rows += [parse_json(line)] if line.strip() else []
        except ValueError:
            rows.append(None)
    if not any(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: neither a JSON list nor JSON objects, one a line")
    return rows, True


def read_questions(path, audio_dir=None, max_bad=0.10) -> list[Question]:
    """Read a question file, its format told by its keys. Clips are looked up in `audio_dir` (or beside the
    file).

    A malformed row is named in the log with its number and skipped; more than the share `max_bad` of them, or
    a file in no known format, raises InputError.
    """
    rows, _ = read_rows(path)
    name = next((name for row in rows if (name := format_of(row))), None)
    if name is None:
        keys = sorted(next((row for row in rows if isinstance(row, dict)), {}))[:12]
        raise InputError(
            f"{path}: in no known format (AVQA, ARC, MMAU, MMAR); its first row has the keys {keys}"
        )
    folder = Path(audio_dir) if audio_dir is not None else Path(path).parent
    questions, bad, seen = [], [], {}
    for number, row in enumerate(rows):
        try:
            question = checked(FORMATS[name](row, folder), name, number, row)
            if seen.setdefault(question.id, number) != number:
                raise ValueError(f"id {question.id!r} is row {seen[question.id] + 1}'s already")
            questions.append(question)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            bad.append(f"{path}, row {number + 1}: {reason(error)}")
    for line in bad[:20]:
        log.warning("skipped: %s", line)
    if len(bad) > 20:
        log.warning("skipped: %d more rows of %s", len(bad) - 20, path)
    if not questions or len(bad) > max_bad * len(rows):
        raise InputError(f"{len(bad)} of {len(rows)} rows are malformed (first: {bad[0]}); see --max_bad")
    return questions


def reason(error):
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def format_of(row):
    if not isinstance(row, dict):
        return None
    marks = {"multi_choice": "avqa", "answerKey": "arc", "audio_id": "mmau", "audio_path": "mmar"}
    return next((name for key, name in marks.items() if key in row), None)


def avqa(row, folder):
    """AVQA asks about videos; training on it replaces the word, as the work that the paper builds on does."""
    text = row["question_text"].replace("video", "audio").replace("Video", "Audio")
    index = row["answer"]
    if type(index) is not int or not 0 <= index < len(row["multi_choice"]):
        raise ValueError(f"answer {index!r} is no index into its {len(row['multi_choice'])} choices")
    return (
        row["id"],
        text,
        row["multi_choice"],
        row["multi_choice"][index],
        find_clip(row["video_name"], folder),
    )


def arc(row, folder):
    choices = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
    if row["answerKey"] not in choices:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of the labels {list(choices)}")
    return row["id"], row["question"]["stem"], list(choices.values()), choices[row["answerKey"]], None


def benchmark(row, folder, clip_key):
    answer = row.get("answer") or None  # test-full hides it
    if answer is not None and answer not in row["choices"]:
        same = [choice for choice in row["choices"] if choice.strip() == answer.strip()]
        if not same:
            raise ValueError(f"answer {answer!r} is none of the choices")
        answer = same[0]
    return row["id"], row["question"], row["choices"], answer, find_clip(row[clip_key], folder)


FORMATS = {
    "avqa": avqa,
    "arc": arc,
    "mmau": lambda row, folder: benchmark(row, folder, "audio_id"),
    "mmar": lambda row, folder: benchmark(row, folder, "audio_path"),
}


def checked(parsed, name, number, row):
    """The parsed fields as a Question, or ValueError for what no format may have."""
    identity, text, choices, answer, audio = parsed
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the question is empty or no text")
    if len(text) > LONGEST_QUESTION:
        raise ValueError(f"the question has {len(text)} characters, more than {LONGEST_QUESTION}")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("the choices are no list of texts")
    if len(choices) < 2:
        raise ValueError(f"{len(choices)} choice(s); a question needs two")
    if answer is not None and not answer.strip():
        raise ValueError("the right choice is empty")
    meta = {"format": name, "row": number, "source": row}
    return Question(str(identity), text, tuple(choices), answer, audio, meta)


# ---------------------------------------------------------------------------------------------------- clips

ENDINGS = (".wav", ".flac", ".mp3", ".ogg")


@lru_cache(maxsize=8)
def clips_in(folder):
    """stem -> file name of every clip, by one listing: a folder holds up to 182,000."""
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except OSError:
        return {}
    return {Path(name).stem: name for name in names if name.lower().endswith(ENDINGS)}


def find_clip(name, folder) -> str:
    """The file of a clip in `folder`, or where it was expected, if there is none.

    `name` is a path as MMAU and MMAR give it (taken by its file name, then as a path under the folder), or
    AVQA's clip name, whose start second stands with or without leading zeros (-HG3Omg_89c_000030,
    -HG3Omg_89c_30).
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{name!r} is no clip name")
    listed = clips_in(str(folder))
    stem = Path(name).stem if name.lower().endswith(ENDINGS) else Path(name).name
    names = [stem]
    if match := re.fullmatch(r"(.+)_(\d+)", stem):
        names += [f"{match[1]}_{int(match[2])}", f"{match[1]}_{int(match[2]):06d}"]
    for candidate in names:
        if candidate in listed:
            return str(folder / listed[candidate])
    expected = folder / (name if name.lower().endswith(ENDINGS) else f"{name}.wav")
    return str(expected)


def check_clip(path):
    """Why a clip cannot be read, as far as existence and header tell; None if nothing is wrong with them."""
    try:
        if not os.path.isfile(path):
            return "a folder" if os.path.isdir(path) else "no such file"
        info = soundfile.info(path)
    except (OSError, RuntimeError, ValueError) as error:
        return f"no audio that can be read ({first_line(error)})"
    return None if info.frames > 0 else "has no samples"


def load_audio(path, max_seconds=None) -> np.ndarray:
    """Decode a clip to float32 (n,), 16 kHz, channels averaged, within ±1; at most `max_seconds` of it are
    decoded.

    Raises InputError naming the file if it cannot be read, has no samples, or has samples that are not
    finite.
    """
    if wrong := check_clip(path):
        raise InputError(f"{path}: {wrong}")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            samples = file.read(
                -1 if max_seconds is None else int(max_seconds * rate), dtype="float32", always_2d=True
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: cannot be decoded ({first_line(error)})") from None
    if not samples.size:
        raise InputError(f"{path}: has no samples")
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: has samples that are not finite")
    return np.clip(resample(samples.mean(axis=1), rate), -1, 1)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------- resampling


@lru_cache(maxsize=8)
def sinc_filter(rate):
    """Windowed-sinc weights from `rate` to 16 kHz: (up, down, offsets (up,), weights (up, taps)).

    Output n lies at input time n * down / up, whose fraction takes `up` values, each with its own weights: a
    sinc that cuts at half the lower rate under a Kaiser window (90 dB, pass band to 0.44 of the lower rate).
    """
    import torch  # not at the top: gen_qa.py does without, in a quarter of the memory

    common = math.gcd(rate, RATE)
    up, down = RATE // common, rate // common
    lower = min(rate, RATE) / rate
    half = math.ceil(0.5 * (90 - 8) / (2.285 * 2 * math.pi * 0.12 * lower)) + 1
    times = torch.arange(up, dtype=torch.float64) * down / up
    offsets = times.floor()
    distance = torch.arange(-half, half + 1) - (times - offsets)[:, None]  # from each tap to the output
    window = torch.special.i0(9.0 * (1 - (distance / (half + 1)) ** 2).clamp(min=0).sqrt())
    weights = torch.sinc(lower * distance) * window
    return up, down, offsets.long(), (weights / weights.sum(1, keepdim=True)).float()


def resample(samples, rate):
    """(n,) at `rate` -> (ceil(n * 16000 / rate),) at 16 kHz: a strided convolution with a row per phase."""
    if rate == RATE:
        return samples
    import torch

    up, down, offsets, weights = sinc_filter(rate)
    taps, length = weights.shape[1], math.ceil(len(samples) * RATE / rate)
    blocks = math.ceil(length / up)  # each gives `up` outputs from `down` inputs
    padded = torch.nn.functional.pad(
        torch.from_numpy(samples), (taps // 2, blocks * down + taps - len(samples))
    )
    phases = []
    for rows in torch.arange(up).split(max(1, 2**22 // (down + taps))):  # odd rates have thousands of phases
        kernel = torch.zeros(len(rows), down + taps)
        kernel.scatter_(1, offsets[rows, None] + torch.arange(taps), weights[rows])
        phases.append(
            torch.nn.functional.conv1d(padded[None, None], kernel[:, None], stride=down)[0, :, :blocks]
        )
    return torch.cat(phases).T.reshape(-1)[:length].numpy()


# -------------------------------------------------------------------------------------- questions of a run


def load_questions(config, rank, world, gather):
    """The question files, each a list of the questions whose clip exists and has a readable header.

    The others are named in the log and left out; more than `max_bad` of a file raises InputError.
    """
    folders = config.audio_dir * len(config.data) if len(config.audio_dir) == 1 else config.audio_dir
    files = []
    for path, folder in zip(config.data, folders, strict=True):
        questions = read_questions(path, folder, config.max_bad)
        if any(q.answer is None for q in questions):
            raise InputError(f"{path} hides its answers: a benchmark's test set, not to be trained on")
        reasons = {}
        if not config.no_audio:
            clips = {q.audio for q in questions[rank::world] if q.audio is not None}
            for part in gather({clip: why for clip in clips if (why := check_clip(clip))}):
                reasons |= part
        good = [q for q in questions if q.audio not in reasons]
        missing = len(questions) - len(good)
        for clip in sorted(reasons)[:20] if rank == 0 else ():
            log.warning("left out: %s: %s", clip, reasons[clip])
        if missing > config.max_bad * len(questions) or not good:
            clip = min(reasons)
            raise InputError(
                f"{path}: {missing} of {len(questions)} questions have no readable clip in {folder} (such as "
                f"{clip}: {reasons[clip]}); check --audio_dir, or raise --max_bad (now {config.max_bad})"
            )
        if rank == 0:
            log.info("%s: %d questions, %d left out", path, len(good), missing)
        files.append(good)
    return files


class Questions:
    """A Dataset of what a process is asked: item i is question k = (i mod A) W + rank of step i div A + 1.

    All questions of a step come from one file, drawn by the shares, so that all ranks run the same modules. A
    clip that fails to decode is replaced by the next good question of an order that (seed, step, k) decide.
    """

    def __init__(self, files, prompts, config, rank, world):
        self.files, self.prompts, self.config, self.rank, self.world = files, prompts, config, rank, world
        shares = np.array(config.shares or [1] * len(files), float)
        rng = np.random.default_rng([config.seed, 1])
        self.file_of_step = rng.choice(len(files), size=config.steps, p=shares / shares.sum())

    def __len__(self):
        return self.config.steps * self.config.accumulation

    def candidates(self, step, k):
        """Question k of the step, from the file's permutation of this epoch; then what may replace it."""
        file = self.file_of_step[step - 1]
        questions, per_step = self.files[file], self.config.accumulation * self.world
        asked_before = int((self.file_of_step[: step - 1] == file).sum()) * per_step + k
        epoch, place = divmod(asked_before, len(questions))
        order = np.random.default_rng([self.config.seed, 2, file, epoch]).permutation(len(questions))
        yield questions[order[place]]
        for index in np.random.default_rng([self.config.seed, 3, step, k]).permutation(len(questions)):
            yield questions[index]

    def __getitem__(self, i):
        """-> (step, k, question, prompt, why the clips before failed); prompt is None after 20 of them."""
        step, micro = i // self.config.accumulation + 1, i % self.config.accumulation
        k, bad = micro * self.world + self.rank, []
        for question in self.candidates(step, k):
            try:
                return step, k, question, self.prompts.encode(question, not self.config.no_audio), bad
            except InputError as error:
                bad.append(str(error))
                if len(bad) == 20:
                    break
        return step, k, question, None, bad
