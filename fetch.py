"""The published data sets, from the Hugging Face hub to data/, checked.

    python fetch.py                        (the table: what each set is, and what is there already)
    python fetch.py avqa mmar              (fetch them; killed at any moment, the same command goes on)
    python fetch.py audiomcq --limit 100   (its first 100 clips: a try on real data)
    python fetch.py --plan avqa mmar       (GB to download and of disk; exit 2 where the disk is too small)

A name with a slash is a model's. huggingface_hub downloads, with its HF_ENDPOINT, HF_TOKEN and cache. A set
is taken file by file: downloaded, its clips written as they are, recorded in data/SET/done.jsonl, the file
removed; so a kill costs one file. What a set lacks stands in data/SET/missing.txt.
"""

import argparse
import csv
import errno
import fnmatch
import io
import json
import math
import re
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow  # for this file alone: the sets are parquet and Arrow files
import pyarrow.parquet
import soundfile
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

from data import read_rows
from files import InputError, one_writer, parse_json, read_text, write_text

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

MAX_BAD = 0.1  # share of a set that may be missing or broken
PAUSES = (1, 4, 15, 60)  # seconds before each new try of what the network failed
SHARD = 256 * 2**20  # bytes: smaller files are taken together up to this
ENDINGS = {"WAV": ".wav", "WAVEX": ".wav", "FLAC": ".flac", "OGG": ".ogg", "MP3": ".mp3", "AIFF": ".aiff"}
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".aiff", ".opus")
MALFORMED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
)  # soundfile's is a RuntimeError
DAMAGED = (pyarrow.ArrowException, tarfile.TarError, EOFError, zlib.error, OSError)


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
            repo, revision, files.split(","), int(rows), float(gb), questions, clips.strip("-")
        )
    return sets


SETS = read_table()


# ----------------------------------------------------------------------- published rows -> ours, clip, sound


def avqa(row: dict, file: str) -> tuple:
    """`"…?\\nChoices:\\nA. 3\\nB. One"`, answered `"B. One"` -> AVQA's own keys."""
    text, listed = row["question"].split("\nChoices:\n")
    choices = [line.split(". ", 1)[1].strip() for line in listed.strip().split("\n")]
    letter, right = row["answer"].split(". ", 1)
    index = ord(letter) - ord("A")
    if index < 0 or choices[index] != right.strip():
        raise ValueError(f"the answer {row['answer']!r} is none of the choices")
    name = stem(row["file_name"])
    question = {"video_name": name, "question_text": text, "multi_choice": choices, "answer": index}
    return question, name, row["audio"]["bytes"]


def vggsound(row: dict, file: str) -> tuple:
    """A row of VGGSound's own list: id, start second, class, split."""
    name = stem(row["audio"]["path"]).removesuffix("-0")
    identity, start = name.rsplit("_", 1)
    split = PurePosixPath(file).name.split("-")[0]
    return [identity, int(start), row["caption"], split], name, row["audio"]["bytes"]


def mmau(row: dict, file: str) -> tuple:
    """MMAU's own JSON, from both layouts: choices as JSON text, or "(A) " before each and the answer."""
    question = {**row, **parse_json(row.get("other_attributes") or "{}")}
    sound = question.pop("context", None) or question.pop("audio", None) or {}
    question.pop("other_attributes", None)
    question["question"] = question.pop("instruction", question.get("question"))
    choices = row["choices"]
    if isinstance(choices, str):
        choices = parse_json(choices)
    if all(choice.startswith(f"({chr(65 + i)}) ") for i, choice in enumerate(choices)):
        choices = [choice[4:] for choice in choices]
        question["answer"] = re.sub(r"^\([A-Z]\) ", "", row["answer"] or "")
    question["choices"] = choices
    if not question["answer"]:  # withheld
        del question["answer"]
    question["audio_id"] = f"./{question['split']}-audios/{question['id']}.wav"
    return question, question["id"], sound.get("bytes")


def arc(row: dict, file: str) -> tuple:
    """AI2's own JSON lines, where the choices are a list of {"text", "label"}."""
    listed = row["choices"]
    pairs = zip(listed["text"], listed["label"], strict=True)
    choices = [{"text": text, "label": label} for text, label in pairs]
    question = {"stem": row["question"], "choices": choices}
    return {"id": row["id"], "question": question, "answerKey": row["answerKey"]}, "", None


CONVERT = {"avqa": avqa, "vggsound": vggsound, "arc": arc, "mmau": mmau}  # the rest are copied as published


# --------------------------------------------------------------------------------------------- the hub


def from_hub(source: Source, what: str, ask: Callable, **options: Any) -> Any:
    """What `ask` gives; a cut connection or a busy server is asked again. InputError names what failed."""
    for pause in (*PAUSES, None):
        try:
            return ask(source.repo, repo_type=source.kind, **options)
        except Exception as error:  # the client's errors are of several packages
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", None)
            final = status in (400, 401, 403, 404) or getattr(error, "errno", None) == errno.ENOSPC
            if pause is None or final or constants.HF_HUB_OFFLINE:
                place = f"{source.repo} ({source.revision}, {constants.ENDPOINT})"
                raise InputError(f"cannot fetch {what} of {place}: {reason}") from None
            print(f"  {what}: {reason}; again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def list_files(source: Source) -> dict:
    """{"revision": commit, "files": [[name, bytes], ...]} of what the set takes of its repository."""
    info = from_hub(
        source, "the list of files", HfApi().repo_info, revision=source.revision, files_metadata=True
    )
    sizes = {file.rfilename: file.size for file in info.siblings}
    files = []
    for pattern in source.files:
        names = fnmatch.filter(sorted(sizes), pattern)
        if not names and not pattern.startswith("*"):
            raise InputError(f"{source.repo} ({info.sha}) has no file {pattern}: its layout has changed")
        files += [[name, sizes[name]] for name in names]
    return {"revision": info.sha, "files": files}


def shards(files: list, most: int) -> Iterator[list[str]]:
    """The files' names one by one, small files together, `most` at most."""
    names: list[str] = []
    total = 0
    for name, size in files:
        if names and (total + size > SHARD or len(names) == most):
            yield names
            names = []
            total = 0
        names.append(name)
        total += size
    yield names


def download(source: Source, commit: str, names: list[str], folder: Path) -> list[Path]:
    """A shard's files in `folder`; one that the hub's own cache has is read where it is."""

    def one(name: str) -> Path:
        cached = try_to_load_from_cache(source.repo, name, revision=commit, repo_type=source.kind)
        if isinstance(cached, str):
            return Path(cached)
        options = {"filename": name, "revision": commit, "local_dir": folder}
        return Path(from_hub(source, name, hf_hub_download, **options))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, names))


# ------------------------------------------------------------------------------------- shards to clips


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name`; ValueError for a name that leads elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name or len(name) > 200:
        raise ValueError(f"{name[:200]!r} is no name of a file in a folder")
    return folder / path


def stem(name: str) -> str:
    """A clip's name without folder and ending."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in SOUNDS else path.name


def contents(name: str, path: Path) -> Iterator[tuple]:
    """(where, a table's row or None, a clip's name, its bytes) of what is in a downloaded file.

    16 rows at most are Python objects at once. An archive gives regular files alone.
    """
    if name.endswith(SOUNDS):
        yield name, None, name, path.read_bytes()
    elif name.endswith(".tar.gz"):
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, None, member.name, archive.extractfile(member).read()
                elif not member.isdir():
                    yield f"{member.name} (no regular file)", None, member.name, b""
    else:
        number = 0
        for batch in open_table(path):
            for first in range(0, batch.num_rows, 16):
                for row in batch.slice(first, 16).to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row, "", None


def open_table(path: Path) -> Iterator:
    """Record batches of a parquet file or an Arrow stream."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(path, buffer_size=2**20).iter_batches(16)
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))


def write_clip(folder: Path, name: str, sound: bytes, as_published: bool) -> None:
    """A clip as it is, its ending told by its header. ValueError and the like for what is no sound."""
    info = soundfile.info(io.BytesIO(sound))
    if not info.frames:
        raise ValueError("no samples")
    if not as_published:
        name = stem(name) + ENDINGS[info.format]
    write_bytes(inside(folder, name), sound)


def write_bytes(path: Path, content: bytes) -> None:
    """Not renamed into place: until its download is recorded, it is written again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def unpack(name: str, path: Path, source: Source, data: Path, limit: float) -> dict:
    """One downloaded file -> {"rows", "taken", "broken"}; `limit` clips (or rows) are taken at most."""
    convert = CONVERT.get(source.questions.split("/")[0])
    found = {"rows": [], "taken": 0, "broken": []}
    if not name.endswith((".parquet", ".arrow", ".tar.gz", *SOUNDS)):
        write_bytes((data / source.questions).parent / path.name, path.read_bytes())
        return found
    for where, row, clip, sound in contents(name, path):
        if found["taken"] >= limit:
            break
        try:
            if row is not None:
                question, clip, sound = convert(row, name)
            if sound is not None:
                write_clip(data / source.clips, clip, sound, name.endswith(SOUNDS))
            if row is not None:
                found["rows"].append(question)
            if sound is not None or not source.clips:
                found["taken"] += 1
        except MALFORMED as error:
            found["broken"].append(f"{where}: {type(error).__name__}: {error}")
    return found


# ------------------------------------------------------------------------------------------------ a set


def fetch_set(name: str, options: argparse.Namespace) -> None:
    """Download, unpack and record file after file; then write the questions and check. Raises InputError."""
    source = SETS[name]
    folder = options.data / name
    downloads = folder / "download"
    downloads.mkdir(parents=True, exist_ok=True)
    (options.data / source.questions).parent.mkdir(parents=True, exist_ok=True)
    lock = one_writer(folder / "lock")
    if is_complete(name, options):
        print(f"{name}: there already")
        return
    listing = folder / "listing.json"
    if not listing.exists():
        write_text(listing, json.dumps(list_files(source)))
    listed = parse_json(read_text(listing))
    print(f"{name}: {source.repo}, commit {listed['revision']}", flush=True)
    done = read_done(folder, options.limit)
    left = [file for file in listed["files"] if file[0] not in done]
    if not options.limit:
        need_room(options.data, disk_bytes(left) + max((size for _, size in left), default=0))
    for half in downloads.rglob("*.incomplete"):  # a killed download's
        half.unlink()
    limit = options.limit or math.inf
    taken = sum(file["taken"] for file in done.values())
    for names in shards(left, options.limit or 1000):
        if taken >= limit:
            break
        paths = download(source, listed["revision"], names, downloads)
        for file, path in zip(names, paths, strict=True):
            try:
                done[file] = {"file": file, "limit": options.limit}
                done[file].update(unpack(file, path, source, options.data, limit - taken))
            except DAMAGED as error:
                if downloads in path.parents:
                    path.unlink()
                raise InputError(f"{path} is damaged ({error}): the same command fetches it again") from None
            taken += done[file]["taken"]
            with open(folder / "done.jsonl", "a", encoding="utf-8") as record:
                record.write(
                    "\n" + json.dumps(done[file]) + "\n"
                )  # the first ends a line that a kill cut off
            if not options.keep_downloads:
                (downloads / file).unlink(missing_ok=True)
        print(f"  {names[-1]}: {taken} taken", flush=True)
    finish(name, source, options, list(done.values()))
    if not options.keep_downloads:
        shutil.rmtree(downloads)
    lock.close()


def read_done(folder: Path, limit: int) -> dict[str, dict]:
    """What was recorded of each file, under this --limit. A line that a kill cut off counts for nothing."""
    done = {}
    record = folder / "done.jsonl"
    record.touch()
    for line in record.read_text("utf-8").split("\n"):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if row["limit"] == limit:
            done[row["file"]] = row
    return done


def finish(name: str, source: Source, options: argparse.Namespace, done: list[dict]) -> None:
    """Write the question file; count it, and its clips, against the table; name what is missing or broken."""
    target = options.data / source.questions
    rows = []
    wrong = []
    for file in done:
        rows += file["rows"]
        wrong += file["broken"]
    copied = not rows
    if copied and target.suffix == ".csv":
        rows = target.read_text("utf-8").splitlines()
    elif copied:
        rows = read_rows(target)[0]
    there = {stem(path.name) for path in (options.data / source.clips).rglob("*.*")}
    kept = []
    for number, row in enumerate(rows):
        clip = ""
        if isinstance(row, dict):
            row.setdefault("id", number)  # AVQA's rows have none
            clip = stem(row.get("video_name") or row.get("audio_id") or row.get("audio_path") or "")
        if clip and clip not in there:
            wrong.append(f"{clip}: no such clip (row {number + 1} of {target})")
        if not clip or clip in there or not options.limit:
            kept.append(row)
    if not copied or len(kept) < len(rows):
        write_rows(target, kept)
    missing = options.data / name / "missing.txt"
    write_text(missing, "".join(f"{line}\n" for line in wrong))
    state = {"limit": options.limit, "rows": len(kept), "clips": sum(file["taken"] for file in done)}
    state["wrong"] = len(wrong)
    print(f"{name}: {describe(state)}; {target}, {missing}", flush=True)
    if not options.limit and len(wrong) > MAX_BAD * len(rows):
        raise InputError(f"{name}: {len(wrong)} missing or broken in {len(rows)} rows (first: {wrong[0]})")
    if not options.limit and len(rows) < (1 - MAX_BAD) * source.rows:
        raise InputError(f"{name}: {len(rows)} rows, where about {source.rows} are published")
    write_text(options.data / name / "complete.json", json.dumps(state))


def describe(state: dict) -> str:
    return f"{state['rows']} rows, {state['clips']} clips, {state['wrong']} missing or broken"


def write_rows(path: Path, rows: list) -> None:
    """Questions as a JSON list or JSON lines, VGGSound's list as CSV, as the ending says."""
    text = io.StringIO()
    if path.suffix == ".csv":
        csv.writer(text, lineterminator="\n").writerows(rows)
    elif path.suffix == ".json":
        json.dump(rows, text, ensure_ascii=False, indent=1)
    else:
        for row in rows:
            text.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, text.getvalue())


def is_complete(name: str, options: argparse.Namespace) -> bool:
    state = options.data / name / "complete.json"
    if not state.exists() or not (options.data / SETS[name].questions).exists():
        return False
    return parse_json(read_text(state))["limit"] in (0, options.limit)


# ------------------------------------------------------------------------------------------- all sets


def disk_bytes(files: list) -> float:
    """What becomes of downloaded [name, bytes], when it is unpacked."""
    return sum(size * 1.5 if name.endswith(".tar.gz") else size for name, size in files)


def need_room(folder: Path, size: float) -> None:
    """InputError if the disk of `folder`, which need not exist, has less than `size` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise InputError(f"{size / 1e9:.1f} GB are needed at {folder}, {free / 1e9:.1f} GB are free")


def source_of(name: str) -> Source:
    """A set's row of the table, or a model's place. Raises InputError for what is neither."""
    if name in SETS:
        return SETS[name]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"no set named {name}: give {', '.join(SETS)}, or a model as owner/name")
    return Source(name, "main", MODEL_FILES.split(","), 0, 20, "", "", "model")


def print_sets(names: list[str], options: argparse.Namespace) -> None:
    """The table, with what is there. With --plan, what it takes; InputError where the disk is too small."""
    total = 0.0
    disk = options.reserve * 1e9
    for name in names:
        source = source_of(name)
        size = source.gb * 1e9
        there = "-"
        if name in SETS and is_complete(name, options):
            there = describe(parse_json(read_text(options.data / name / "complete.json")))
        elif (options.data / name / "done.jsonl").exists():
            there = "begun"
        elif options.plan and not constants.HF_HUB_OFFLINE:
            files = list_files(source)["files"]
            size = sum(size for _, size in files)
            there = f"{len(files)} files"
        print(f"{name:<28} {source.rows:>7,} rows {size / 1e9:8.3f} GB  {source.repo}: {there}")
        if there == "-" or there.endswith("files") or there == "begun":
            total += size
            disk += size
    if options.plan:
        print(f"to download: {total / 1e9:.1f} GB; on disk: {disk / 1e9:.1f} GB, results included")
        need_room(options.data, disk)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sets", nargs="*", help="sets, or models as owner/name (none: list them)")
    add("--data", type=Path, default=Path("data"), help="folder of the data (%(default)s)")
    add("--limit", type=int, default=0, help="the first N clips of each set, and their questions (all)")
    add("--keep_downloads", action="store_true", help="keep the hub's files beside what was made of them")
    add("--plan", action="store_true", help="print what is to be downloaded, and stop")
    add(
        "--reserve",
        type=float,
        default=0.0,
        help="--plan: GB that the results will take besides (%(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    try:
        if options.limit < 0:
            raise InputError(f"--limit {options.limit}: must be at least 0")
        names = [name for name in options.sets if name in SETS or not Path(name).is_dir()]  # a model's folder
        sources = [source_of(name) for name in names]
        if options.plan or not options.sets:
            print_sets(names or list(SETS), options)
            return
        for name, source in zip(names, sources, strict=True):
            if source.kind == "model":
                from_hub(source, "the model", snapshot_download, allow_patterns=source.files)
                print(f"{name}: there")
            else:
                fetch_set(name, options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
