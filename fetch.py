"""The published data sets, from the Hugging Face hub to data/, checked.

    python fetch.py                        (the table: what each set is, and what is there already)
    python fetch.py avqa mmar              (fetch them; killed at any moment, the same command goes on)
    python fetch.py audiomcq --limit 100   (its first 100 clips: a try on real data)
    python fetch.py --plan avqa mmar       (GB of disk; exit 2 where there are fewer)

A name with a slash is a model's. huggingface_hub downloads, resumes and skips what is there, with its
HF_ENDPOINT, HF_TOKEN and cache. A set comes to data/SET/download, is unpacked (a clip that is there is
skipped) and counted, and the download removed. What it lacks stands in data/SET/missing.txt.
"""

import argparse
import fnmatch
import glob
import gzip
import io
import json
import math
import re
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow  # for this file alone: the sets are parquet and Arrow files
import pyarrow.parquet
import soundfile
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

from files import InputError, first_line, one_writer, parse_json, read_text, write_text

# The place to mend when a repository moves: set, repository, revision, files, rows and GB of it (about), the
# question file and the clips' folder in data/.
TABLE = """
avqa         gijs/avqa-processed          main  train/*.arrow  40000  13  avqa/train_qa.json  avqa/audio
vggsound     txya900619/vggsound-16k      main  data/train-*.parquet,data/test-*.parquet  190000  30  vggsound/vggsound.csv  vggsound/audio
audiosetcaps baijs/AudioSetCaps           main  Dataset/VGGSound_AudioSetCaps_caption.csv,Dataset/VGGSound_Qwen-Audio_Q&A.csv  0  0.2  audiosetcaps/VGGSound_AudioSetCaps_caption.csv
arc          allenai/ai2_arc              main  ARC-Easy/train-*.parquet  2251  0.001  arc/ARC-Easy-Train.jsonl
audiomcq     Harland/AudioMCQ-StrongAC-GeminiCoT  main  data.jsonl,*.wav,*.mp3,*.flac  19480  9.7  audiomcq/data.jsonl  audiomcq
mmau-mini    lmms-lab/mmau                main  data/test_mini-*.parquet  1000  1.1  mmau/mmau-test-mini-original.json  mmau/original
mmau-full    lmms-lab/mmau                main  data/test-*.parquet  9000  10  mmau/mmau-test-original.json  mmau/original
mmau-mini-v2 gamma-lab-umd/MMAU-test-mini ccd9696c0111ea7060827598f310558df0b71b0a  *.parquet  1000  1.1  mmau/mmau-test-mini-v05.15.25.json  mmau/v05.15.25
mmau-full-v2 gamma-lab-umd/MMAU-test      8e835a9f64ed6c703b3c9ddb6d423d9ab697061e  *.parquet,test-audios.tar.gz  9000  8  mmau/mmau-test-v05.15.25.json  mmau/v05.15.25
mmar         BoJack/MMAR                  main  MMAR-meta.json,mmar-audio.tar.gz  1000  3  mmar/MMAR-meta.json  mmar/audio
"""  # noqa: E501
MODEL_FILES = "*.json,*.safetensors,*.txt,*.jinja,spk_dict.pt"  # what weights.py takes
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".aiff", ".opus")
MAX_BAD = 0.1  # share of a set that may be missing or broken
PAUSES = [1, 4, 15, 60]  # seconds before each new try of what the network failed
LONGEST = 200 * 2**20  # bytes: a longer member of an archive is no clip; half an hour at 48 kHz
UNPACKED = 1.5  # times its download: an archive's clips; the others' are as long as their tables


class Source(NamedTuple):
    """A row of the table; of its text, what was a number or a list is one."""

    repo: str
    revision: str
    files: str  # patterns, with commas between
    rows: str
    gb: str
    questions: str
    clips: str = ""
    kind: str = "dataset"  # or model: the hub's word


SETS = {}
for line in TABLE.strip().split("\n"):
    set_name, *columns = line.split()
    SETS[set_name] = Source(*columns)


def source_of(name: str) -> Source:
    """A set's row of the table, or a model's place. Raises InputError for what is neither."""
    if name in SETS:
        return SETS[name]
    if "/" not in name:
        raise InputError(f"no set named {name}: give {', '.join(SETS)}, or a model as owner/name")
    return Source(name, "main", MODEL_FILES, "0", "20", "", "", "model")


# ------------------------------------------------------------------------------------------------ names


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name`; ValueError for a name that leads elsewhere, or is longer than disks hold."""
    path = PurePosixPath(name)
    for part in path.parts:
        if part in ("/", "..") or "\0" in part or len(part.encode()) > 200:
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
    if source.files.endswith(SOUNDS):
        return str(PurePosixPath(name).parent / stem(name))
    return stem(name)


def clip_name(row: Any) -> str:
    """The clip that a question is about; empty where it is about none."""
    if isinstance(row, dict):
        for key in ("video_name", "audio_id", "audio_path"):
            if row.get(key):
                return str(row[key])
    return ""


# ------------------------------------------------- a published row -> ours, its clip's name, its clip's bytes


def avqa(row: dict, file: str) -> tuple:
    """`"…?\\nChoices:\\nA. 3\\nB. One"`, answered `"B. One"` -> AVQA's own keys."""
    text, listed = row["question"].split("\nChoices:\n")
    choices = []
    for line in listed.strip().split("\n"):
        choices.append(line.split(". ", 1)[1].strip())
    letter, right = row["answer"].split(". ", 1)
    index = ord(letter) - ord("A")
    if choices[index] != right.strip():
        raise ValueError(f"the answer {row['answer']!r} is none of the choices")
    name = stem(row["file_name"])
    question = {"video_name": name, "question_text": text, "multi_choice": choices, "answer": index}
    return question, name, row["audio"]["bytes"]


def vggsound(row: dict, file: str) -> tuple:
    """A line of VGGSound's own list: id, start second, class, split."""
    name = PurePosixPath(row["audio"]["path"]).stem.removesuffix("-0")
    identity, start = name.rsplit("_", 1)
    split = PurePosixPath(file).name.split("-")[0]
    return f'{identity},{int(start)},"{row["caption"]}",{split}', name, row["audio"]["bytes"]


def mmau(row: dict, file: str) -> tuple:
    """MMAU's own JSON, from both layouts: choices as JSON text, or "(A) " before each and the answer."""
    question = row | parse_json(row.pop("other_attributes", "{}"))
    sound = question.pop("context", None) or question.pop("audio", None) or {"bytes": None}
    if "instruction" in question:
        question["question"] = question.pop("instruction")
    choices = row["choices"]
    if isinstance(choices, str):
        choices = parse_json(choices)
    answer = row["answer"]
    if all(choice.startswith(f"({chr(65 + i)}) ") for i, choice in enumerate(choices)):
        choices = [choice[4:] for choice in choices]
        answer = re.sub(r"^\([A-Z]\) ", "", answer)
    question["choices"] = choices
    question["answer"] = answer
    if not answer:  # withheld
        del question["answer"]
    question["audio_id"] = f"./{question['split']}-audios/{question['id']}.wav"
    return question, question["id"], sound["bytes"]


def arc(row: dict, file: str) -> tuple:
    """AI2's own JSON lines, where the choices are a list of {"text", "label"}."""
    choices = []
    for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True):
        choices.append({"text": text, "label": label})
    asked = {"stem": row["question"], "choices": choices}
    return {"id": row["id"], "question": asked, "answerKey": row["answerKey"]}, "", None


CONVERT = {"avqa": avqa, "vggsound": vggsound, "arc": arc, "mmau": mmau}  # by folder; the rest are copied


# --------------------------------------------------------------------------------------------- the hub


def from_hub(ask: Callable, source: Source, **options: Any) -> Any:
    """The one door of the hub: what `ask` gives. What the network fails is asked again; then InputError."""
    for pause in (*PAUSES, None):
        try:
            return ask(source.repo, repo_type=source.kind, **options)
        except Exception as error:  # the client's errors are of several packages
            reason = f"{source.repo} ({constants.ENDPOINT}): {first_line(error)}"
            status = getattr(getattr(error, "response", None), "status_code", None)
            if pause is None:
                PAUSES.clear()  # a hub that stayed away so long is not waited for again, set after set
            if pause is None or status in (400, 401, 403, 404) or constants.HF_HUB_OFFLINE:
                raise InputError(f"cannot fetch {reason}") from None
            print(f"  {reason}; again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def list_files(source: Source) -> tuple[str, list[str], list[str]]:
    """(commit, the files that the set takes of it, those whose names no folder holds)."""
    info = from_hub(HfApi().repo_info, source, revision=source.revision)
    names = sorted(file.rfilename for file in info.siblings)
    taken = []
    skipped = []
    for pattern in source.files.split(","):
        for name in fnmatch.filter(names, pattern):
            try:
                inside(Path(), name)
                taken.append(name)
            except ValueError:
                skipped.append(name)
    return info.sha, taken, skipped


# ---------------------------------------------------------------------------- downloaded files to clips


def contents(file: str, path: Path) -> Iterator[tuple]:
    """(where, a table's row or None, a clip's name, its bytes) of what is in a downloaded file."""
    if file.endswith(SOUNDS):
        yield file, None, file, path.read_bytes()
    elif file.endswith(".tar.gz"):
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if not member.name.lower().endswith(SOUNDS) or Path(member.name).name.startswith("."):
                    continue  # a folder, a list; macOS puts a hidden ._x.wav beside each x.wav
                sound = b""
                if member.isfile() and member.size < LONGEST:
                    sound = archive.extractfile(member).read()
                yield member.name, None, member.name, sound
            while stream.read(2**20):
                pass  # to the end, where gzip's checksum is
    else:
        for number, row in enumerate(rows_in(path), 1):
            yield f"{file}, row {number}", row, "", None


def rows_in(path: Path) -> Iterator[dict]:
    """Of a parquet file or an Arrow stream, 16 at a time; memory does not grow with the file."""
    if path.suffix == ".parquet":
        table = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        batches = table.iter_batches(16)
    else:
        batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    for batch in batches:
        for first in range(0, len(batch), 16):
            yield from batch.slice(first, 16).to_pylist()


def write_clip(folder: Path, name: str, sound: bytes, as_published: bool) -> None:
    """A clip as it is, its ending told by its header. ValueError and the like for what is no sound."""
    info = soundfile.info(io.BytesIO(sound))
    if not as_published:
        name = f"{stem(name)}.{info.format.lower().removesuffix('ex')}"  # WAVEX
    if not info.frames or not name.endswith(SOUNDS):
        raise ValueError(f"{info.frames} samples of {info.format}")
    path = inside(folder, name)
    if path.exists() and path.stat().st_size == len(sound):
        return  # what a kill cut short has another size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sound)


def unpack(file: str, path: Path, source: Source, *, data: Path) -> Iterator[tuple]:
    """Of each row and clip of a downloaded file: (our row or None, whether it counts, what is wrong or "").

    Writes the clips, and a table that is copied as published.
    """
    convert = CONVERT.get(source.questions.split("/")[0])
    if file.endswith((".json", ".jsonl", ".csv")):
        (data / source.questions).with_name(path.name).write_bytes(path.read_bytes())
        return
    for where, row, clip, sound in contents(file, path):
        wrong = ""
        try:
            if row:
                row, clip, sound = convert(row, file)
            if sound is not None:
                write_clip(data / source.clips, clip, sound, file.endswith(SOUNDS))
        except OSError:  # the disk's
            raise
        except Exception as error:
            row = None
            reason = getattr(error, "error_string", error)  # soundfile's own text has an address in memory
            wrong = f"{where}: {type(error).__name__}: {reason}"
        yield row, not wrong and (sound is not None or not source.clips), wrong


# ------------------------------------------------------------------------------------------------ a set


def fetch_set(name: str, options: argparse.Namespace) -> None:
    """Download, unpack, count. Raises InputError."""
    source = SETS[name]
    downloads = options.data / name / "download"
    downloads.mkdir(parents=True, exist_ok=True)
    lock = one_writer(options.data / name / "lock")
    if read_state(name, options):
        print(f"{name}: there already")
        return
    commit, files, wrong = list_files(source)
    print(f"{name}: {source.repo}, commit {commit}", flush=True)
    asked = {"revision": commit, "local_dir": downloads}
    if not options.limit:
        need_room(options.data, float(source.gb) * (1 + UNPACKED) - held_gb(name, options))
        asked["ignore_patterns"] = [glob.escape(file) for file in wrong]
        from_hub(snapshot_download, source, allow_patterns=source.files.split(","), **asked)
    rows = []
    taken = 0
    enough = options.limit or math.inf
    for file in files:
        if options.limit:  # one after the other, until there are enough
            from_hub(snapshot_download, source, allow_patterns=glob.escape(file), **asked)
        try:
            for row, counts, problem in unpack(file, downloads / file, source, data=options.data):
                rows += [row] * bool(row)
                wrong += [problem] * bool(problem)
                taken += counts
                if taken == enough:
                    break
        except Exception as error:  # pyarrow's, tarfile's, gzip's; the disk's have a number
            if not getattr(error, "errno", None):
                (downloads / file).unlink()
            reason = f"{downloads / file} is damaged or the disk full ({first_line(error)})"
            raise InputError(f"{reason}: the same command goes on") from None
        if taken == enough:
            break
    finish(name, options, rows, wrong)
    shutil.rmtree(downloads)
    lock.close()


def finish(name: str, options: argparse.Namespace, rows: list, wrong: list[str]) -> None:
    """Write the question file; count it, and its clips, against the table; name what is missing or broken."""
    source = SETS[name]
    target = options.data / source.questions
    converted = source.questions.split("/")[0] in CONVERT
    if not converted:
        rows = read_copied(target)
    clips = options.data / (source.clips or name)
    there = {clip_key(path.relative_to(clips).as_posix(), source) for path in clips.rglob("*.*")}
    kept = []
    for number, row in enumerate(rows):
        clip = clip_name(row)
        missing = clip and clip_key(clip, source) not in there
        if missing and options.limit:
            continue
        if missing:
            wrong.append(f"{clip}: no such clip (row {number + 1} of {target})")
        if clip and converted:
            row.setdefault("id", number)  # AVQA's rows have none
        kept.append(row)
    if converted or len(kept) < len(rows):
        write_rows(target, kept)
    found = f"{len(kept)} rows, {len(wrong)} missing or broken"
    write_text(options.data / name / "missing.txt", "".join(line + "\n" for line in wrong))
    print(f"{name}: {found}; {target}, {options.data / name / 'missing.txt'}", flush=True)
    if not options.limit and len(wrong) > MAX_BAD * len(rows):
        raise InputError(f"{name}: {len(wrong)} missing or broken in {len(rows)} rows (first: {wrong[0]})")
    if not rows or (not options.limit and len(rows) < (1 - MAX_BAD) * int(source.rows)):
        raise InputError(f"{name}: {len(rows)} rows, where about {source.rows} are published")
    state = {"limit": options.limit, "found": found}
    write_text(options.data / name / "complete.json", json.dumps(state))


def read_copied(path: Path) -> list:
    """The rows of a table that was copied as published: dicts, or a CSV's lines. Raises InputError."""
    lines = read_text(path).strip().split("\n")
    try:
        if path.suffix == ".json":
            return parse_json("\n".join(lines))
        if path.suffix == ".jsonl":
            return [parse_json(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path} is damaged ({first_line(error)}): remove it and its download") from None
    return lines


def write_rows(path: Path, rows: list) -> None:
    """Questions as a JSON list, or a line each."""
    if path.suffix == ".json":
        text = json.dumps(rows, ensure_ascii=False, indent=1)
    else:
        text = ""
        for row in rows:
            text += (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def read_state(name: str, options: argparse.Namespace) -> str:
    """What `finish` found, if the set is complete (with this --limit, or without one); else empty."""
    path = options.data / name / "complete.json"
    if path.exists() and (options.data / SETS[name].questions).exists():
        state = parse_json(read_text(path))
        if state["limit"] in (0, options.limit):
            return state["found"]
    return ""


# ------------------------------------------------------------------------------------------- all sets


def held_gb(name: str, options: argparse.Namespace) -> float:
    """What is there of a set already, downloads and clips."""
    clips = options.data / (SETS[name].clips or name)
    paths = {*(options.data / name).rglob("*"), *clips.rglob("*")}
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e9


def need_room(folder: Path, size: float) -> None:
    """InputError if the disk of `folder` has less than `size` GB free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    if size > free:
        raise InputError(f"{size:.1f} GB are needed at {folder}, {free:.1f} GB are free")


def print_sets(sources: dict[str, Source], options: argparse.Namespace) -> None:
    """The table, with what is there. With --plan, what it takes; InputError where a disk is too small."""
    models = 0.0  # GB
    data = 0.0
    largest = 0.0
    for name, source in sources.items():
        size = float(source.gb)
        if source.kind == "model":
            there = try_to_load_from_cache(name, "model.safetensors.index.json") or ""
            models += size * (not there)
        else:
            there = read_state(name, options)
            if not there:
                data += size * UNPACKED - held_gb(name, options)
                largest = max(largest, size)  # download, which goes once it is unpacked
        print(f"{name:<28} {int(source.rows):>7,} rows {size:8.3f} GB  {source.repo}: {there or '-'}")
    if options.plan:
        print(f"to come: {data + largest:.1f} GB of data, {models:.1f} GB of models")
        if not options.limit:
            need_room(Path(constants.HF_HUB_CACHE), models)
            need_room(options.data, data + largest)


def fetch_all(sources: dict[str, Source], options: argparse.Namespace) -> bool:
    """Fetch one after the other, whatever happens to those before; whether all are there."""
    good = True
    for name, source in sources.items():
        try:
            if source.kind == "model":
                from_hub(snapshot_download, source, allow_patterns=source.files.split(","))
                print(f"{name}: there")
            else:
                fetch_set(name, options)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            good = False
    return good


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    add("sets", nargs="*", help="sets, or models as owner/name (none: list them)")
    add("--data", type=Path, default=Path("data"), help="folder of the data (%(default)s)")
    add("--limit", type=int, default=0, help="the first N clips of each set, and their questions (0: all)")
    add("--plan", action="store_true", help="print what it will take, and stop")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: threads may be downloading
    try:
        sources = {}
        for name in options.sets:
            if name in SETS or not Path(name).is_dir():  # else a model that is here
                sources[name] = source_of(name)
        if options.plan or not options.sets:
            print_sets(sources or SETS, options)
        elif not fetch_all(sources, options):
            sys.exit(2)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
