"""The published data sets, from the Hugging Face hub to data/, checked.

    python fetch.py                        (the table: what each set is, and what is there already)
    python fetch.py avqa mmar              (fetch them; killed at any moment, the same command goes on)
    python fetch.py audiomcq --limit 100   (its first 100 clips: a try on real data)
    python fetch.py --plan avqa mmar       (GB of disk; exit 2 where there are fewer)

A name with a slash is a model's. huggingface_hub downloads, resumes and skips what is there, with its
HF_ENDPOINT, HF_TOKEN and cache. A set comes to data/SET/download, is unpacked, read as a run reads it and
counted, and the download removed. What it lacks stands in data/SET/missing.txt.
"""

import fnmatch
import gzip
import io
import json
import re
import shutil
import signal
import sys
import tarfile
import time
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow  # for this file alone: the sets are parquet and Arrow files
import pyarrow.parquet
import soundfile
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from tqdm import tqdm

from data import MOST_BAD, clips_in, read_questions
from files import (
    WHOLE,
    InputError,
    Parser,
    first_line,
    one_writer,
    parse_json,
    read_text,
    rows_of,
    run_program,
    write_rows,
    write_text,
)

# The place to mend when a repository moves: set, repository, revision, files, rows and GB of it (about,
# unpacked), the question file and the clips' folder in data/.
TABLE = """
avqa         gijs/avqa-processed          main  train/*.arrow  40000  13  avqa/train_qa.json  avqa/audio
vggsound     txya900619/vggsound-16k      main  data/train-*.parquet,data/test-*.parquet  190000  30  vggsound/vggsound.csv  vggsound/audio
audiosetcaps baijs/AudioSetCaps           main  Dataset/VGGSound_AudioSetCaps_caption.csv,Dataset/VGGSound_Qwen-Audio_Q&A.csv  0  0.2  audiosetcaps/VGGSound_AudioSetCaps_caption.csv
arc          allenai/ai2_arc              main  ARC-Easy/train-*.parquet  2251  0.001  arc/ARC-Easy-Train.jsonl
audiomcq     Harland/AudioMCQ-StrongAC-GeminiCoT  main  data.jsonl,*.wav,*.mp3,*.flac  19480  9.7  audiomcq/data.jsonl  audiomcq
mmau-mini    lmms-lab/mmau                main  data/test_mini-*.parquet  1000  1.1  mmau/mmau-test-mini-original.json  mmau/original
mmau-full    lmms-lab/mmau                main  data/test-*.parquet  9000  10  mmau/mmau-test-original.json  mmau/original
mmau-mini-v2 gamma-lab-umd/MMAU-test-mini ccd9696c0111ea7060827598f310558df0b71b0a  *.parquet  1000  1.1  mmau/mmau-test-mini-v05.15.25.json  mmau/v05.15.25
mmau-full-v2 gamma-lab-umd/MMAU-test      8e835a9f64ed6c703b3c9ddb6d423d9ab697061e  *.parquet,test-audios.tar.gz  9000  12  mmau/mmau-test-v05.15.25.json  mmau/v05.15.25
mmar         BoJack/MMAR                  main  MMAR-meta.json,mmar-audio.tar.gz  1000  4.5  mmar/MMAR-meta.json  mmar/audio
"""  # noqa: E501
MODEL_FILES = "*.json,*.safetensors,*.txt,*.jinja,spk_dict.pt"  # what weights.py takes
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".aiff", ".opus")
PAUSES = [1, 10, 60, 0]  # seconds before each new try of what the network failed; after the last none is made


class Source(NamedTuple):
    """A row of the table."""

    name: str
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
    row_of_table = Source(*line.split())
    SETS[row_of_table.name] = row_of_table


def source_of(name: str) -> Source:
    """A set's row of the table, or a model's place on the hub. Raises ArgumentTypeError for neither."""
    if name in SETS:
        return SETS[name]
    if "/" not in name:
        sets = ", ".join(SETS)
        raise ArgumentTypeError(f"no set named {name}: give {sets}, or a model as owner/name")
    return Source(name, name, "main", MODEL_FILES, "0", "0", "", "", "model")


# --------------------------------------- a published row, and where it is -> ours, its clip's name, its bytes


def avqa(row: dict, where: str) -> tuple:
    """`"…?\\nChoices:\\nA. 3\\nB. One"`, answered `"B. One"` -> AVQA's own keys."""
    text, listed = row["question"].split("\nChoices:\n")
    lines = [line.strip() for line in listed.strip().split("\n")]
    name = PurePosixPath(row["file_name"]).stem
    question = {
        "id": where,
        "video_name": name,
        "question_text": text,
        "multi_choice": [line.split(". ", 1)[1] for line in lines],
        "answer": lines.index(row["answer"].strip()),
    }
    return question, name, row["audio"]["bytes"]


def vggsound(row: dict, where: str) -> tuple:
    """A line of VGGSound's own list: id, start second, class, split."""
    name = PurePosixPath(row["audio"]["path"]).stem.removesuffix("-0")
    identity, start = name.rsplit("_", 1)
    split = PurePosixPath(where).name.split("-")[0]
    return f'{identity},{int(start)},"{row["caption"]}",{split}', name, row["audio"]["bytes"]


def mmau(row: dict, where: str) -> tuple:
    """MMAU's own JSON, from the original's columns or the current ones, with "(A) " before each choice."""
    if "instruction" in row:
        row |= parse_json(row.pop("other_attributes"))
        row["question"] = row.pop("instruction")
        sound = row.pop("context")
    else:
        row["choices"] = parse_json(row["choices"])
        sound = row.pop("audio")
    letter = re.compile(r"^\([A-Z]\) ")
    row["choices"] = [letter.sub("", choice) for choice in row["choices"]]
    row["answer"] = letter.sub("", row["answer"] or "")  # empty: it is withheld
    row["audio_id"] = f"./{row['split']}-audios/{row['id']}.wav"
    return row, PurePosixPath(row["audio_id"]).stem, sound and sound["bytes"]


def arc(row: dict, where: str) -> tuple:
    """AI2's own JSON lines, where the choices are a list of {"text", "label"}."""
    asked = {"stem": row["question"], "choices": pyarrow.table(row["choices"]).to_pylist()}
    return {"id": row["id"], "question": asked, "answerKey": row["answerKey"]}, "", None


CONVERT = {"avqa": avqa, "vggsound": vggsound, "arc": arc, "mmau": mmau}  # by folder; the rest are copied


# --------------------------------------------------------------------------------------------- the hub


def from_hub(ask: Callable, source: Source, **options: Any) -> Any:
    """The one door of the hub: what `ask` gives. What the network fails is asked again; then InputError."""
    for pause in PAUSES:
        try:
            return ask(source.repo, repo_type=source.kind, **options)
        except Exception as error:  # the client's errors are of several packages
            reason = f"{source.repo} ({constants.ENDPOINT}): {first_line(error)}"
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if not pause or status < 408:  # no such place, or not for you
                raise InputError(f"cannot fetch {reason}") from None
            print(f"  {reason}; again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def download(source: Source, folder: Path, limit: int) -> Iterator[str]:
    """The set's files in the table's order, each in `folder` once it is named: with a limit, fetched then."""
    info = from_hub(HfApi().repo_info, source, revision=source.revision)
    print(f"{source.name}: {source.repo}, commit {info.sha}", flush=True)
    fetch = partial(from_hub, source=source, revision=info.sha, local_dir=folder)
    patterns = source.files.split(",")
    if not limit:
        fetch(snapshot_download, allow_patterns=patterns)
    names = sorted(file.rfilename.lstrip("/") for file in info.siblings)
    for pattern in patterns:
        for name in fnmatch.filter(names, pattern):
            fetch(hf_hub_download, filename=name)
            yield name


# ---------------------------------------------------------------------------- downloaded files to clips


def contents(file: str, path: Path) -> Iterator[tuple]:
    """(where, a table's row or None, a clip's name, its bytes) of what is in a downloaded file."""
    if file.endswith(SOUNDS):
        yield file, None, file.rsplit(".", 1)[0], path.read_bytes()
    elif file.endswith(".tar.gz"):
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                # Its folders may lead anywhere; macOS adds ._x.wav to x.wav.
                name = PurePosixPath(member.name)
                if member.isfile() and name.suffix in SOUNDS and not name.name.startswith("."):
                    yield member.name, None, name.stem, archive.extractfile(member).read()
            while stream.read(2**20):
                pass  # to the end, where gzip's checksum is
    else:
        for number, row in enumerate(rows_in(path), 1):
            yield f"{file}, row {number}", row, "", None


def rows_in(path: Path) -> Iterator[dict]:
    """Of a parquet file or an Arrow stream, a batch at a time; memory does not grow with the file."""
    if path.suffix == ".parquet":
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(16)
    else:
        batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    for batch in batches:
        yield from batch.to_pylist()


def write_clip(folder: Path, name: str, sound: bytes) -> None:
    """A clip as it is, its ending told by its header. ValueError and the like for what is no sound."""
    info = soundfile.info(io.BytesIO(sound))
    ending = "." + info.format.lower().removesuffix("ex")  # WAVEX
    path = folder / (name + ending)
    if not info.frames or ending not in SOUNDS or len(path.name.encode()) > 255:
        raise ValueError(f"{info.frames} samples of {info.format} named {name:.300}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sound)


def unpack(source: Source, file: str, data: Path, rows: list, wrong: list[str]) -> Iterator[None]:
    """Yields once for each clip of a downloaded file that is written.

    Adds our rows to `rows`, and what is broken to `wrong`. Raises InputError for a file that is no such file.
    """
    path = data / source.name / "download" / file
    if file.endswith((".json", ".jsonl", ".csv")):
        shutil.copy(path, data / source.name)
        return
    try:
        for where, row, clip, sound in contents(file, path):
            try:
                if row:
                    row, clip, sound = CONVERT[source.questions.split("/")[0]](row, where)
                if sound is not None:
                    write_clip(data / source.clips, clip, sound)
            except OSError:  # the disk's
                raise
            except Exception as error:
                reason = getattr(error, "error_string", error)  # soundfile's text has an address in memory
                wrong.append(f"{where}: {type(error).__name__}: {reason}")
                continue
            if row:
                rows.append(row)
            if sound is not None:
                yield
    except Exception as error:  # pyarrow's, tarfile's, gzip's; the disk's have a number
        if not getattr(error, "errno", None):
            path.unlink()
        reason = f"{path} is damaged or the disk full ({first_line(error)})"
        raise InputError(f"{reason}: the same command goes on") from None


# ------------------------------------------------------------------------------------------------ a set


def fetch_set(source: Source, options: Namespace) -> None:
    """Download, unpack, count. Raises InputError."""
    folder = options.data / source.name / "download"
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(options.data / source.name / "lock"):
        if not found_before(source, options):
            rows = []
            wrong = []
            files = download(source, folder, options.limit)
            unpacked = (unpack(source, file, options.data, rows, wrong) for file in files)
            clips = islice(chain.from_iterable(unpacked), options.limit or None)
            for _ in tqdm(clips, source.name, unit=" clips", disable=None):
                pass  # it is written by now
            finish(source, options, rows, wrong)
        shutil.rmtree(folder)  # though it was complete: a kill can have left it


def finish(source: Source, options: Namespace, rows: list, wrong: list[str]) -> None:
    """Write the question file; read it as a run will; count what has its clip, and name what has not."""
    target = options.data / source.questions
    if rows:
        write_rows(target, rows)
    if target.suffix == ".csv":
        whole = read_text(target).splitlines()
    else:
        whole = []
        clips_in.cache_clear()  # clips have come since
        for question in read_questions(target, options.data / source.clips):
            if Path(question.audio or target).exists():
                whole.append(question.meta["source"])
            elif not options.limit:
                wrong.append(f"{question.audio}: no such clip (row {question.meta['row'] + 1} of {target})")
        if options.limit:
            write_rows(target, whole)
    missing = options.data / source.name / "missing.txt"
    write_text(missing, "".join(line + "\n" for line in wrong))
    found = f"{len(whole)} rows, {len(wrong)} missing or broken"
    print(f"{source.name}: {found}; {target}, {missing}", flush=True)
    if len(whole) <= (1 - MOST_BAD) * int(source.rows) * (not options.limit):
        raise InputError(f"{source.name}: {found}, where about {source.rows} are published {wrong[:1]}")
    write_text(missing.with_name("complete.json"), json.dumps({"limit": options.limit, "found": found}))


def found_before(source: Source, options: Namespace) -> str:
    """What `finish` found, if the set is complete (with this --limit, or without one); else empty."""
    if (options.data / source.questions).exists():
        for state in rows_of(options.data / source.name / "complete.json"):
            if state["limit"] in (0, options.limit):
                return state["found"]
    return ""


# ------------------------------------------------------------------------------------------- all sets


def print_plan(sources: list[Source], options: Namespace) -> None:
    """What each takes, and what is there of it. Raises InputError where a disk is too small."""
    need = Counter()  # GB
    for source in sources:
        there = found_before(source, options)
        place = options.data
        size = float(source.gb)
        if source.kind == "model":
            place = Path(constants.HF_HUB_CACHE)
            there = try_to_load_from_cache(source.name, "model.safetensors.index.json")
            if not there:
                info = from_hub(HfApi().repo_info, source, files_metadata=True)
                size = sum(file.size or 0 for file in info.siblings) / 1e9
        if not there:
            folder = options.data / source.name
            held = sum(path.stat().st_size for path in folder.rglob("*"))
            need[place] += size + float(source.gb) - held / 1e9  # a download goes once it is unpacked
        print(f"{source.name:<28} {source.rows:>6} rows {size:8.3f} GB  {there or source.repo}")
    for place, size in need.items():
        place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place).free / 1e9
        print(f"{place}: {size:.1f} GB to come at most, {free:.1f} GB are free")
        if size > free and options.sets and not options.limit:
            raise InputError(f"{size:.1f} GB are needed at {place}, {free:.1f} GB are free")


def fetch_all(options: Namespace) -> None:
    """Fetch one after the other, whatever happens to those before; InputError at the end if one failed."""
    failed = []
    for source in options.sets:
        try:
            if source.kind == "dataset":
                fetch_set(source, options)
            else:
                from_hub(snapshot_download, source, allow_patterns=source.files.split(","))
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(source.name)
    if failed:
        raise InputError(f"not fetched: {', '.join(failed)}; the same command goes on")


def program() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("sets", nargs="*", type=source_of, help="sets, or models as owner/name (none: list them)")
    add("--data", type=Path, default=Path("data"), help="folder of the data (default: data)")
    add("--limit", type=WHOLE, default=0, help="the first N clips of each set (default: 0, all)")
    add("--plan", action="store_true", help="print what it will take, and stop")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: threads may be downloading
    options = parser.parse_args()
    print_plan(options.sets or SETS.values(), options)
    if not options.plan:
        fetch_all(options)


main = partial(run_program, program)

if __name__ == "__main__":
    sys.exit(main())
