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
import gzip
import io
import json
import math
import mmap
import os
import shutil
import signal
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
from huggingface_hub.errors import LocalEntryNotFoundError

from data import read_rows
from files import InputError, as_object, one_writer, read_text, write_text
from sets import CONVERT, SETS, SOUNDS, Source, clip_key, clip_name, inside, source_of, stem

MAX_BAD = 0.1  # share of a set that may be missing or broken
PAUSES = [1, 4, 15, 60]  # seconds before each new try of what the network failed
SMALL = 8 * 2**20  # bytes: files that are smaller on average are downloaded 500 at a time
LONGEST = 200 * 2**20  # bytes: a longer member of an archive is no clip; half an hour at 48 kHz
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
    ValueError,
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
            if pause is None:
                PAUSES.clear()  # a hub that stayed away so long is not waited for again, set after set
            if pause is None or refused or full or constants.HF_HUB_OFFLINE:
                place = f"{source.repo} ({source.revision}, {constants.ENDPOINT})"
                raise InputError(f"cannot fetch {what} of {place}: {reason}") from None
            print(f"  {what}: {reason}; again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def list_files(source: Source) -> dict:
    """{"revision": commit, "files": [[name, bytes], ...]} of what the set takes of its repository."""
    sizes = {}
    options = {"revision": source.revision}
    if constants.HF_HUB_OFFLINE:
        options["allow_patterns"] = source.files
        folder = Path(from_hub(source, "the files in the hub's cache", snapshot_download, **options))
        commit = folder.name
        for path in folder.rglob("*.*"):
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    else:
        info = from_hub(source, "the list of files", HfApi().repo_info, files_metadata=True, **options)
        commit = info.sha
        for file in info.siblings:
            sizes[file.rfilename] = file.size
    files = []
    for pattern in source.files:
        names = fnmatch.filter(sorted(sizes), pattern)
        if not names and not pattern.startswith("*") and source.kind == "dataset":
            raise InputError(f"{source.repo} ({commit}) has no file {pattern}: its layout has changed")
        for name in names:
            inside(Path(), name)
            files.append([name, sizes[name]])
    return {"revision": commit, "files": files}


def in_cache(model: Source) -> bool:
    """Whether the hub's cache has all of a model: `train.py --plan` leaves its config.json there."""
    try:
        folder = snapshot_download(model.repo, allow_patterns=model.files, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return any(Path(folder).glob("*.safetensors"))


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
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if not member.name.lower().endswith(SOUNDS) or Path(member.name).name.startswith("."):
                    continue  # a folder, a list; macOS puts a hidden ._x.wav beside each x.wav
                if member.isfile() and member.size <= LONGEST:
                    yield member.name, None, member.name, archive.extractfile(member).read()
                else:
                    yield f"{member.name} (no regular file, or too large)", None, member.name, b""
            while stream.read(2**20):
                pass  # to the end, where gzip's checksum is
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
    try:
        info = soundfile.info(io.BytesIO(sound))
    except soundfile.LibsndfileError as error:  # its own text has an address in memory
        raise ValueError(f"{name}: {error.error_string}") from None
    if not info.frames:
        raise ValueError(f"{name}: no samples")
    if not as_published:
        ending = "." + info.format.lower().removesuffix("ex")  # WAVEX
        if ending not in SOUNDS:
            raise ValueError(f"{name}: {info.format}")
        name = stem(name) + ending
    write_bytes(inside(folder, name), sound)


def write_bytes(path: Path, content: bytes) -> None:
    """Not renamed into place: until its download is recorded, it is written again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def unpack(name: str, path: Path, source: Source, *, data: Path, limit: float) -> dict:
    """One downloaded file -> {"rows", "taken", "broken"}; `limit` clips (or rows) are taken at most."""
    convert = CONVERT.get(source.questions.split("/")[0])
    found = {"rows": [], "taken": 0, "broken": []}
    if not name.endswith((".parquet", ".arrow", ".tar.gz", *SOUNDS)):
        content = path.read_bytes()
        if content.startswith(b"version https://git-lfs"):
            raise ValueError("a git-lfs pointer in the file's place")
        write_bytes((data / source.questions).parent / path.name, content)
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
    listed, done, left = start_from(name, source, options)
    write_text(folder / "listing.json", json.dumps(listed))
    print(f"{name}: {source.repo}, commit {listed['revision']}", flush=True)
    taken = sum(file["taken"] for file in done.values())
    limit = options.limit or math.inf
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
                found = unpack(file, path, source, data=options.data, limit=limit - taken)
            except DAMAGED as error:
                if downloads in path.parents:
                    path.unlink()
                (folder / "listing.json").unlink()
                raise InputError(f"{path} is damaged ({error}): the same command fetches it again") from None
            done[file] = {"file": file, "limit": options.limit, "commit": listed["revision"], **found}
            taken += found["taken"]
            with open(folder / "done.jsonl", "a", encoding="utf-8") as record:
                record.write("\n")  # ends a line that a kill cut off
                record.write(json.dumps(done[file]) + "\n")
            if not options.keep_downloads:
                (downloads / file).unlink(missing_ok=True)
        print(f"  {file}: {taken} taken", flush=True)
    try:
        finish(name, source, options, list(done.values()))
    except InputError:
        forget(folder, done)
        raise
    if not options.keep_downloads:
        shutil.rmtree(downloads)
    lock.close()


def start_from(name: str, source: Source, options: argparse.Namespace) -> tuple[dict, dict, dict]:
    """(the list of files, as an earlier start found it; what is done of them; {file: bytes} of the rest)."""
    folder = options.data / name
    listed = read_notes(folder / "listing.json") or list_files(source)
    done = read_done(folder, options.limit, listed["revision"])
    left = {file: size for file, size in listed["files"] if file not in done}
    return listed, done, left


def read_notes(path: Path) -> dict:
    """What an earlier start wrote there; {} if that is nothing that a fetch writes."""
    try:
        return as_object(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def read_done(folder: Path, limit: int, commit: str) -> dict[str, dict]:
    """What was recorded of each file of this commit, under this --limit. Half a line counts for nothing."""
    done = {}
    record = folder / "done.jsonl"
    if not record.exists():
        return done
    for line in read_text(record).split("\n"):
        row = as_object(line)
        if "file" in row and row.get("limit") == limit and row.get("commit") == commit:
            done[row["file"]] = row
    return done


def forget(folder: Path, done: dict[str, dict]) -> None:
    """After a refusal: the same command asks the hub anew for all but the files whose every clip is good."""
    lines = []
    for file, found in done.items():
        if found["taken"] and not found["broken"]:
            lines.append(json.dumps(found) + "\n")
        else:
            (folder / "download" / file).unlink(missing_ok=True)
    write_text(folder / "done.jsonl", "".join(lines))
    (folder / "listing.json").unlink()


def finish(name: str, source: Source, options: argparse.Namespace, done: list[dict]) -> None:
    """Write the question file; count it, and its clips, against the table; name what is missing or broken."""
    target = options.data / source.questions
    rows = []
    wrong = []
    for file in done:
        rows += file["rows"]
        wrong += file["broken"]
    copied = source.questions.split("/")[0] not in CONVERT
    if copied and target.suffix == ".csv":
        rows = read_text(target).splitlines()[1:]
    elif copied:
        rows = read_rows(target)[0]
    if not rows:
        reason = [*wrong, "there is none"][0]
        raise InputError(f"{name}: no row is as published ({reason})")
    clips = options.data / source.clips
    there = set()
    for path in clips.rglob("*.*"):
        there.add(clip_key(path.relative_to(clips).as_posix(), source))
    kept = []
    for number, row in enumerate(rows):
        clip = clip_name(row)
        missing = clip and clip_key(clip, source) not in there
        if missing and options.limit:
            continue
        if missing:
            wrong.append(f"{clip}: no such clip (row {number + 1} of {target})")
        if clip and not copied:
            row.setdefault("id", number)  # AVQA's rows have none
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
    found = read_notes(options.data / name / "complete.json")
    if found.get("limit", -1) not in (0, options.limit):
        return None
    if not (options.data / SETS[name].questions).exists():
        return None
    return found


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
    """The table, with what is there. With --plan, what it takes; InputError where a disk is too small."""
    total = 0.0
    models = 0.0  # of the total: in the hub's cache
    disk = options.reserve * 1e9
    for name, source in sources.items():
        size = source.gb * 1e9
        state = read_state(name, options)
        there = "-"
        if state:
            there = describe(state)
        elif source.kind == "model" and in_cache(source):
            there = "in the hub's cache"
        elif options.plan:
            left = {"": size}
            try:
                left = start_from(name, source, options)[2]
                there = f"{len(left)} files to download"
            except InputError as error:  # fetching goes on without this one too
                there = str(error)
            size = sum(left.values())
            total += size
            disk += disk_bytes(left.items())
            models += size * (source.kind == "model")
        print(f"{name:<28} {source.rows:>7,} rows {size / 1e9:8.3f} GB  {source.repo}: {there}")
    if options.plan:
        print(f"to download: {total / 1e9:.1f} GB; on disk: {disk / 1e9:.1f} GB, results included")
        need_room(Path(constants.HF_HUB_CACHE), models)
        need_room(options.data, disk)


def fetch_all(sources: dict[str, Source], options: argparse.Namespace) -> bool:
    """Fetch one after the other, whatever happens to those before; whether all are there."""
    good = True
    for name, source in sources.items():
        try:
            if source.kind == "model":
                from_hub(source, "the model", snapshot_download, allow_patterns=source.files)
                print(f"{name}: there")
            else:
                fetch_set(name, options)
        except (InputError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            good = False
    return good


def stop(*_: Any) -> None:
    """Ctrl-C, at once: threads may be downloading."""
    os.write(2, b"stopped; the same command goes on\n")
    os._exit(130)


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
    signal.signal(signal.SIGINT, stop)
    try:
        if options.limit < 0:
            raise InputError(f"--limit {options.limit}: must be at least 0")
        sources = {}
        for name in options.sets:
            if name in SETS or not Path(name).is_dir():  # else a model that is here
                sources[name] = source_of(name)
        if options.plan or not options.sets:
            print_sets(sources or SETS, options)
        elif not fetch_all(sources, options):
            sys.exit(2)
    except (InputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
