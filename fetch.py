"""The published data sets, from the Hugging Face hub to data/, checked (where each is: sets.py).

    python fetch.py                        (the table: what each set is, and what is there already)
    python fetch.py avqa mmar              (fetch them; killed at any moment, the same command goes on)
    python fetch.py audiomcq --limit 100   (its first 100 clips: a try on real data)
    python fetch.py --plan avqa mmar       (GB to download and of disk; exit 2 where the disk is too small)

A name with a slash is a model's. huggingface_hub downloads, with its HF_ENDPOINT, HF_TOKEN and cache. A set
is taken file by file: downloaded, its clips written as they are, recorded in data/SET/done.jsonl, the
download removed; so a kill costs one file. What a set lacks stands in data/SET/missing.txt.
"""

import argparse
import csv
import errno
import fnmatch
import io
import json
import math
import mmap
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow  # for this file alone: the sets are parquet and Arrow files
import pyarrow.parquet
import soundfile
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

from data import read_rows
from files import InputError, one_writer, parse_json, read_text, write_text
from sets import CONVERT, SETS, SOUNDS, Source, inside, source_of, stem

MAX_BAD = 0.1  # share of a set that may be missing or broken
PAUSES = (1, 4, 15, 60)  # seconds before each new try of what the network failed
SMALL = 8 * 2**20  # bytes: files that are smaller on average are downloaded 500 at a time
LONGEST = 2**30  # bytes: a longer member of an archive is no clip
ENDINGS = {  # by soundfile's name of the format
    "WAV": ".wav",
    "WAVEX": ".wav",
    "FLAC": ".flac",
    "OGG": ".ogg",
    "MP3": ".mp3",
    "AIFF": ".aiff",
}
MALFORMED = (  # a row or a clip; soundfile raises a RuntimeError
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
)
DAMAGED = (  # a downloaded file
    pyarrow.ArrowException,
    tarfile.TarError,
    EOFError,
    zlib.error,
    OSError,
)


# --------------------------------------------------------------------------------------------- the hub


def from_hub(source: Source, what: str, ask: Callable, **options: Any) -> Any:
    """What `ask` gives; a cut connection or a busy server is asked again. InputError names what failed."""
    for pause in (*PAUSES, None):
        try:
            return ask(source.repo, repo_type=source.kind, **options)
        except Exception as error:  # the client's errors are of several packages
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            response = getattr(error, "response", None)
            refused = getattr(response, "status_code", None) in (400, 401, 403, 404)
            full = getattr(error, "errno", None) == errno.ENOSPC
            if pause is None or refused or full or constants.HF_HUB_OFFLINE:
                place = f"{source.repo} ({source.revision}, {constants.ENDPOINT})"
                raise InputError(f"cannot fetch {what} of {place}: {reason}") from None
            print(f"  {what}: {reason}; again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def list_files(source: Source) -> dict:
    """{"revision": commit, "files": [[name, bytes], ...]} of what the set takes of its repository."""
    options = {"revision": source.revision, "files_metadata": True}
    info = from_hub(source, "the list of files", HfApi().repo_info, **options)
    sizes = {file.rfilename: file.size for file in info.siblings}
    files = []
    for pattern in source.files:
        names = fnmatch.filter(sorted(sizes), pattern)
        if not names and not pattern.startswith("*") and source.kind == "dataset":
            raise InputError(f"{source.repo} ({info.sha}) has no file {pattern}: its layout has changed")
        for name in names:
            inside(Path(), name)
            files.append([name, sizes[name]])
    return {"revision": info.sha, "files": files}


def download(source: Source, commit: str, names: list[str], folder: Path) -> list[Path]:
    """The files in `folder`; one that the hub's own cache has is read where it is."""

    def one(name: str) -> Path:
        cached = try_to_load_from_cache(source.repo, name, revision=commit, repo_type=source.kind)
        if isinstance(cached, str):
            return Path(cached)
        options = {"filename": name, "revision": commit, "local_dir": folder}
        return Path(from_hub(source, name, hf_hub_download, **options))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, names))


# ---------------------------------------------------------------------------- downloaded files to clips


def contents(name: str, path: Path) -> Iterator[tuple]:
    """(where, a table's row or None, a clip's name, its bytes) of what is in a downloaded file."""
    if name.endswith(SOUNDS):
        yield name, None, name, path.read_bytes()
    elif name.endswith(".tar.gz"):
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile() and member.size <= LONGEST:
                    yield member.name, None, member.name, archive.extractfile(member).read()
                elif not member.isdir():
                    yield f"{member.name} (no regular file, or too large)", None, member.name, b""
    else:
        number = 0
        for batch in open_table(path):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row, "", None


def open_table(path: Path) -> Iterator:
    """A parquet file or an Arrow stream, 16 rows at a time; memory does not grow with the file."""
    if path.suffix == ".parquet":
        table = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        yield from table.iter_batches(16)
        return
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for batch in pyarrow.ipc.open_stream(pyarrow.py_buffer(pages)):
        for first in range(0, batch.num_rows, 16):
            yield batch.slice(first, 16)
            pages.madvise(mmap.MADV_DONTNEED)  # else what was read stays resident


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
            found["taken"] += sound is not None or not source.clips
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
    lock = one_writer(folder / "lock")
    if read_state(name, options):
        print(f"{name}: there already")
        return
    listing = folder / "listing.json"
    if not listing.exists():
        write_text(listing, json.dumps(list_files(source)))
    listed = parse_json(read_text(listing))
    print(f"{name}: {source.repo}, commit {listed['revision']}", flush=True)
    done = read_done(folder, options.limit)
    taken = sum(file["taken"] for file in done.values())
    limit = options.limit or math.inf
    left = {file: size for file, size in listed["files"] if file not in done}
    if left and not options.limit:
        need_room(options.data, disk_bytes(left.items()) + max(left.values()))
    for half in downloads.rglob("*.incomplete"):  # a killed download's
        half.unlink()
    together = 1
    if sum(left.values()) < SMALL * len(left):
        together = min(limit, 500)
    names = list(left)
    while names and taken < limit:
        paths = download(source, listed["revision"], names[:together], downloads)
        for path in paths:
            file = names.pop(0)
            try:
                found = unpack(file, path, source, options.data, limit - taken)
            except DAMAGED as error:
                if downloads in path.parents:
                    path.unlink()
                raise InputError(f"{path} is damaged ({error}): the same command fetches it again") from None
            done[file] = {"file": file, "limit": options.limit, **found}
            taken += found["taken"]
            with open(folder / "done.jsonl", "a", encoding="utf-8") as record:
                record.write("\n")  # ends a line that a kill cut off
                record.write(json.dumps(done[file]) + "\n")
            if not options.keep_downloads:
                (downloads / file).unlink(missing_ok=True)
        print(f"  {file}: {taken} taken", flush=True)
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
        rows = target.read_text("utf-8").splitlines()[1:]
    elif copied:
        rows = read_rows(target)[0]
    there = {stem(path.name) for path in (options.data / source.clips).rglob("*.*")}
    kept = []
    for number, row in enumerate(rows):
        clip = ""
        if isinstance(row, dict):
            row.setdefault("id", number)  # AVQA's rows have none
            clip = stem(clip_name(row))
        if clip and clip not in there:
            wrong.append(f"{clip}: no such clip (row {number + 1} of {target})")
        if not clip or clip in there or not options.limit:
            kept.append(row)
    if not copied or len(kept) < len(rows):
        write_rows(target, kept)
    folder = options.data / name
    missing = folder / "missing.txt"
    write_text(missing, "\n".join([*wrong, ""]).lstrip())
    state = {
        "limit": options.limit,
        "rows": len(kept),
        "clips": sum(file["taken"] for file in done),
        "wrong": len(wrong),
    }
    print(f"{name}: {describe(state)}; {target}, {missing}", flush=True)
    if not options.limit:
        check_counts(name, len(rows), wrong)
    write_text(folder / "complete.json", json.dumps(state))


def check_counts(name: str, rows: int, wrong: list[str]) -> None:
    about = SETS[name].rows
    if len(wrong) > MAX_BAD * rows:
        raise InputError(f"{name}: {len(wrong)} missing or broken in {rows} rows (first: {wrong[0]})")
    if rows < (1 - MAX_BAD) * about:
        raise InputError(f"{name}: {rows} rows, where about {about} are published")


def clip_name(row: dict) -> str:
    """The clip that a question is about; empty where it is about none."""
    for key in ("video_name", "audio_id", "audio_path"):
        if row.get(key):
            return str(row[key])
    return ""


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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def read_state(name: str, options: argparse.Namespace) -> dict | None:
    """What `finish` found, if the set is complete (with this --limit, or without one)."""
    state = options.data / name / "complete.json"
    if name not in SETS or not state.exists():
        return None
    found = parse_json(read_text(state))
    questions = options.data / SETS[name].questions
    if found["limit"] in (0, options.limit) and questions.exists():
        return found
    return None


def describe(state: dict) -> str:
    return f"{state['rows']} rows, {state['clips']} clips, {state['wrong']} missing or broken"


# ------------------------------------------------------------------------------------------- all sets


def disk_bytes(files: list) -> float:
    """What becomes of downloaded (name, bytes), when it is unpacked."""
    total = 0.0
    for name, size in files:
        total += size
        if name.endswith(".tar.gz"):
            total += size / 2
    return total


def need_room(folder: Path, size: float) -> None:
    """InputError if the disk of `folder`, which need not exist, has less than `size` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise InputError(f"{size / 1e9:.1f} GB are needed at {folder}, {free / 1e9:.1f} GB are free")


def print_sets(sources: dict[str, Source], options: argparse.Namespace) -> None:
    """The table, with what is there. With --plan, what it takes; InputError where the disk is too small."""
    total = 0.0
    disk = options.reserve * 1e9
    for name, source in sources.items():
        size = source.gb * 1e9
        state = read_state(name, options)
        there = "-"
        if state:
            there = describe(state)
        elif isinstance(try_to_load_from_cache(source.repo, "config.json"), str):
            there = "in the hub's cache"
        elif options.plan:
            files = list_files(source)["files"]
            size = sum(size for _, size in files)
            there = f"{len(files)} files to download"
            total += size
            disk += disk_bytes(files)
        print(f"{name:<28} {source.rows:>7,} rows {size / 1e9:8.3f} GB  {source.repo}: {there}")
    if options.plan:
        print(f"to download: {total / 1e9:.1f} GB; on disk: {disk / 1e9:.1f} GB, results included")
        need_room(options.data, disk)


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape, allow_abbrev=False)
    add = parser.add_argument
    add("sets", nargs="*", help="sets, or models as owner/name (none: list them)")
    add("--data", type=Path, default=Path("data"), help="folder of the data (%(default)s)")
    add("--limit", type=int, default=0, help="the first N clips of each set, and their questions (all)")
    add("--keep_downloads", action="store_true", help="keep the hub's files beside what was made of them")
    add("--plan", action="store_true", help="print what is to be downloaded, and stop")
    add("--reserve", type=float, default=0.0, help="--plan: GB that the results will take besides (0)")
    options = parser.parse_args()
    try:
        if options.limit < 0:
            raise InputError(f"--limit {options.limit}: must be at least 0")
        sources = {}
        for name in options.sets:
            if name in SETS or not Path(name).is_dir():  # else a model that is here
                sources[name] = source_of(name)
        if options.plan or not options.sets:
            print_sets(sources or SETS, options)
            return
        for name, source in sources.items():
            if source.kind == "model":
                from_hub(source, "the model", snapshot_download, allow_patterns=source.files)
                print(f"{name}: there")
            else:
                fetch_set(name, options)
    except (InputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
