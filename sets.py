"""The published sets: where on the hub each is, and what its rows become.

TABLE is the place to mend when a repository moves. A converter takes a row of a published table (a dict) and
the name of its file, and gives (our row, the clip's name, the clip's bytes or None); it raises ValueError,
KeyError and the like for a row that is not as published.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from files import InputError, parse_json

# Set, repository, revision, files, rows and GB (about), the question file and the clips' folder in data/.
TABLE = """
avqa         gijs/avqa-processed          main  train/*.arrow  40000  13  avqa/train_qa.json  avqa/audio
vggsound     txya900619/vggsound-16k      main  data/train-*.parquet,data/test-*.parquet  190000  30  vggsound/vggsound.csv  vggsound/audio
audiosetcaps baijs/AudioSetCaps           main  Dataset/VGGSound_AudioSetCaps_caption.csv,Dataset/VGGSound_Qwen-Audio_Q&A.csv  0  0.2  audiosetcaps/VGGSound_AudioSetCaps_caption.csv  -
arc          allenai/ai2_arc              main  ARC-Easy/train-*.parquet  2251  0.001  arc/ARC-Easy-Train.jsonl  -
audiomcq     Harland/AudioMCQ-StrongAC-GeminiCoT  main  data.jsonl,*.wav,*.mp3,*.flac  19480  9.7  audiomcq/data.jsonl  audiomcq
mmau-mini    lmms-lab/mmau                main  data/test_mini-*.parquet  1000  1.1  mmau/mmau-test-mini-original.json  mmau/original
mmau-full    lmms-lab/mmau                main  data/test-*.parquet  9000  10  mmau/mmau-test-original.json  mmau/original
mmau-mini-v2 gamma-lab-umd/MMAU-test-mini ccd9696c0111ea7060827598f310558df0b71b0a  *.parquet  1000  1.1  mmau/mmau-test-mini-v05.15.25.json  mmau/v05.15.25
mmau-full-v2 gamma-lab-umd/MMAU-test      8e835a9f64ed6c703b3c9ddb6d423d9ab697061e  *.parquet,test-audios.tar.gz  9000  8  mmau/mmau-test-v05.15.25.json  mmau/v05.15.25
mmar         BoJack/MMAR                  main  MMAR-meta.json,mmar-audio.tar.gz  1000  3  mmar/MMAR-meta.json  mmar/audio
"""  # noqa: E501
MODEL_FILES = "*.json,*.safetensors,*.txt,*.jinja,spk_dict.pt"  # what weights.find_model takes
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".aiff", ".opus")


class Source(NamedTuple):
    """A row of the table. `kind` is the hub's: dataset or model."""

    repo: str
    revision: str
    files: list[str]
    rows: int
    gb: float
    questions: str
    clips: str
    kind: str = "dataset"


def read_table() -> dict[str, Source]:
    sets = {}
    for line in TABLE.strip().splitlines():
        name, repo, revision, files, rows, gb, questions, clips = line.split()
        sets[name] = Source(
            repo=repo,
            revision=revision,
            files=files.split(","),
            rows=int(rows),
            gb=float(gb),
            questions=questions,
            clips=clips.strip("-"),
        )
    return sets


SETS = read_table()


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name`; ValueError for a name that leads elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name or len(name) > 200:
        raise ValueError(f"{name[:200]!r} is no name of a file in a folder")
    return folder / path


def stem(name: str) -> str:
    """A clip's name without folder and ending."""
    path = PurePosixPath(name)
    if path.suffix.lower() in SOUNDS:
        return path.stem
    return path.name


def clip_key(name: str, source: Source) -> str:
    """A clip's name without its ending; with its folder, where the set is a folder of clips as published."""
    if source.files[-1].endswith(SOUNDS):
        return str(PurePosixPath(name).parent / stem(name))
    return stem(name)


def clip_name(row: Any) -> str:
    """The clip that a question is about; empty where it is about none."""
    if isinstance(row, dict):
        for key in ("video_name", "audio_id", "audio_path"):
            if row.get(key):
                return str(row[key])
    return ""


def avqa(row: dict, file: str) -> tuple:
    """`"…?\\nChoices:\\nA. 3\\nB. One"`, answered `"B. One"` -> AVQA's own keys."""
    text, listed = row["question"].split("\nChoices:\n")
    choices = []
    for line in listed.strip().split("\n"):
        choices.append(line.split(". ", 1)[1].strip())
    letter, right = row["answer"].split(". ", 1)
    index = ord(letter) - ord("A")
    if index < 0 or choices[index] != right.strip():
        raise ValueError(f"the answer {row['answer']!r} is none of the choices")
    name = stem(row["file_name"])
    question = {
        "video_name": name,
        "question_text": text,
        "multi_choice": choices,
        "answer": index,
    }
    return question, name, row["audio"]["bytes"]


def vggsound(row: dict, file: str) -> tuple:
    """A row of VGGSound's own list: id, start second, class, split."""
    name = PurePosixPath(row["audio"]["path"]).stem.removesuffix("-0")
    identity, start = name.rsplit("_", 1)
    split = PurePosixPath(file).name.split("-")[0]
    listed = [identity, int(start), row["caption"], split]
    return listed, name, row["audio"]["bytes"]


def mmau(row: dict, file: str) -> tuple:
    """MMAU's own JSON, from both layouts: choices as JSON text, or "(A) " before each and the answer."""
    question = dict(row)
    attributes = question.pop("other_attributes", None) or "{}"
    question.update(parse_json(attributes))
    sound = question.pop("context", None) or question.pop("audio", None) or {}
    if "instruction" in question:
        question["question"] = question.pop("instruction")
    choices = row["choices"]
    if isinstance(choices, str):
        choices = parse_json(choices)
    answer = row.get("answer") or ""
    lettered = [choice.startswith(f"({chr(65 + i)}) ") for i, choice in enumerate(choices)]
    if all(lettered):
        choices = [choice[4:] for choice in choices]
        answer = re.sub(r"^\([A-Z]\) ", "", answer)
    question["choices"] = choices
    question["answer"] = answer
    if not answer:  # withheld
        del question["answer"]
    question["audio_id"] = f"./{question['split']}-audios/{question['id']}.wav"
    return question, question["id"], sound.get("bytes")


def arc(row: dict, file: str) -> tuple:
    """AI2's own JSON lines, where the choices are a list of {"text", "label"}."""
    listed = row["choices"]
    choices = []
    for text, label in zip(listed["text"], listed["label"], strict=True):
        choices.append({"text": text, "label": label})
    question = {
        "id": row["id"],
        "question": {"stem": row["question"], "choices": choices},
        "answerKey": row["answerKey"],
    }
    return question, "", None


CONVERT = {  # by the folder; the rest are copied as published
    "avqa": avqa,
    "vggsound": vggsound,
    "arc": arc,
    "mmau": mmau,
}


def source_of(name: str) -> Source:
    """A set's row of the table, or a model's place. Raises InputError for what is neither."""
    if name in SETS:
        return SETS[name]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"no set named {name}: give {', '.join(SETS)}, or a model as owner/name")
    return Source(
        repo=name,
        revision="main",
        files=MODEL_FILES.split(","),
        rows=0,
        gb=20,
        questions="",
        clips="",
        kind="model",
    )
