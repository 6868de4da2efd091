"""Tables of captions, whichever columns hold them, joined by the clip's id: one clip at a time.

AudioSetCaps publishes two for VGGSound: `VGGSound_AudioSetCaps_caption.csv` (id, caption) and
`VGGSound_Qwen-Audio_Q&A.csv` (id, answer_1 on sounds, answer_2 on speech, answer_3 on music, questions).
What is left out is counted and named: `Captions.print_left_out`.
"""

import collections
import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from files import InputError, as_object, parse_json, read_text

CLIP = r"\S+_\d+(_\d+)?(\.\w+)?"  # a clip's name: YouTube id, start second, perhaps its end
PUBLISHED = [  # names of the columns of A1 to A4
    ("caption",),
    ("sound", "answer_1"),
    ("speech", "answer_2"),
    ("music", "answer_3"),
]


def table_rows(path: Path | str) -> Iterator[dict]:
    """The rows of a CSV, JSON-lines or JSON-list file, one at a time: the tables have 100,000s of rows.

    {} stands for what is no JSON object. Raises InputError.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            start = file.read(1000).lstrip()
            file.seek(0)
            if start.startswith("["):
                for row in parse_json(read_text(path)):
                    yield as_object(row)
            elif start.startswith("{"):
                for line in file:
                    if line.strip():
                        yield as_object(line)
            else:
                yield from csv_rows(file)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV or JSON table: {error}") from None


def csv_rows(file: Iterable[str]) -> Iterator[dict]:
    """The columns of a table without a header are named "column 1", "column 2", ..."""
    reader = csv.reader(file)
    names = next(reader, [])
    first = next(reader, [])
    rows = itertools.chain([first], reader)
    for name, value in zip(names, first, strict=False):
        if re.fullmatch(CLIP, name) and re.fullmatch(CLIP, value):  # a clip where its column's name would be
            rows = itertools.chain([names], rows)
            names = [f"column {i}" for i in range(1, len(names) + 1)]
            break
    for row in rows:
        if row:
            yield dict(zip(names, row, strict=False))


def one_line(value: Any) -> str:
    """A table's value as text without line breaks, nor halves of a surrogate pair, which no file can hold."""
    text = " ".join(str(value or "").split())
    if text.isascii():
        return text
    return text.encode("utf-8", "replace").decode()


def first_values(path: Path) -> dict[str, list[str]]:
    """Column -> what it holds in the table's first rows."""
    columns = collections.defaultdict(list)
    for row in itertools.islice(table_rows(path), 200):
        for name, value in row.items():
            text = one_line(value)
            columns[name].append(text)
    return columns


def share(values: list[str], pattern: str) -> float:
    """The share of the values in which the pattern occurs."""
    found = 0
    for value in values:
        found += bool(re.search(pattern, value, re.I))
    return found / len(values)


def id_column(path: Path, columns: dict[str, list[str]]) -> str:
    for name, values in columns.items():
        if share(values, f"^{CLIP}$") > 0.9:
            return name
    if "id" in columns:
        return "id"
    raise InputError(f"{path}: no column of clips' ids among {list(columns)}")


def find_columns(paths: list[Path]) -> tuple[list[str], list[tuple[int, str]]]:
    """Where things stand: each table's column of ids; and of the captions A1 to A4, (table, column) each.

    By the names that AudioSetCaps gives them, or else by what the first rows hold. An answer may follow its
    question: a column that never changes and tells what the answer is about. Raises InputError.
    """
    keys = []
    texts = {}  # (table, column) -> its first values
    asked = {}  # (table, column) -> the question that stands before it
    for table, path in enumerate(paths):
        columns = first_values(path)
        keys.append(id_column(path, columns))
        question = ""
        for name, values in columns.items():
            constant = len(values) > 1 and len(set(values)) == 1
            if constant and share(values, r"\?$|describe|give"):
                question = values[0].lower()
            elif name != keys[table]:
                texts[table, name] = values
                asked[table, name] = question
                question = ""
    published = []
    for names in PUBLISHED:
        for place in texts:
            if place[1] in names:
                published.append(place)
                break
    if len(published) == 4:
        return keys, published
    for place, values in list(texts.items()):
        sentences = share(values, r"\w+\W+\w+\W+\w+")
        if sentences <= 0.5:
            del texts[place]
    music = take_column(texts, asked, "music")
    speech = take_column(texts, asked, "speech|speak|voice")
    rest = sorted(texts, key=lambda place: (asked[place] != "", "caption" not in place[1].lower()))
    if music is None or speech is None or len(rest) < 2:
        among = [column for _, column in asked]
        files = " + ".join(map(str, paths))
        raise InputError(f"{files}: need columns of overall caption, sounds, speech and music among {among}")
    return keys, [rest[0], rest[1], speech, music]  # the overall caption comes before the sounds


def take_column(texts: dict, asked: dict, pattern: str) -> tuple[int, str] | None:
    """Remove from `texts` the column that is most about `pattern`, and return its place."""
    fit = {}
    for place, values in texts.items():
        is_asked = re.search(pattern, asked[place]) is not None
        fit[place] = (is_asked, share(values, pattern))
    best = max(fit, key=fit.get, default=None)
    if best is None or max(fit[best]) <= 0.5:
        return None
    del texts[best]
    return best


def same_clip(name: str) -> str:
    """The names of one clip as one: a YouTube id of 11 characters and a start second, whatever follows."""
    name = re.sub(r"\.(wav|flac|mp3|ogg|mp4)$", "", name)
    match = re.fullmatch(r"(.{11})_(\d{1,9})(_\d+)?", name)
    if not match:
        return name
    return f"{match[1]}_{int(match[2])}"


def wanted_clips(path: str) -> dict[str, str]:
    """--ids: AVQA's questions, VGGSound's list (its train rows) or names, one a line -> {same_clip: name}."""
    text = read_text(path)
    names = []
    if text.lstrip().startswith(("[", "{")):
        for row in table_rows(path):
            names.append(row.get("video_name") or row.get("id"))
    else:
        for line in text.split("\n"):
            row = line.strip().split(",")
            if len(row) > 1 and re.fullmatch("[0-9]{1,9}", row[1]):
                row[0] = f"{row[0]}_{int(row[1]):06d}"
            if len(row) < 4 or row[-1].strip('"') != "test":
                name = row[0].strip('"')
                names.append(name)
    wanted = {}
    for name in names:
        if isinstance(name, str) and name:
            clip = same_clip(name)
            wanted[clip] = one_line(name)
    if not wanted:
        raise InputError(f"{path}: no clip names found")
    return wanted


class Captions:
    """The clips of one table, or of several that are joined by id; those of the list `ids` only, if given.

    The largest table is read row by row, at each pass; the captions of the others are held in memory.
    """

    def __init__(self, paths: list[Path], ids: str | None = None):
        self.names = " + ".join(map(str, paths))
        self.wanted = None  # {same_clip: the name that --ids has for it}
        if ids:
            self.wanted = wanted_clips(ids)
        keys, self.columns = find_columns(paths)
        sizes = [path.stat().st_size for path in paths]
        self.main = sizes.index(max(sizes))
        self.path = paths[self.main]
        self.key = keys[self.main]
        self.held = {}  # (table, column) -> {clip: caption}
        self.left_out = {}  # why -> names; each pass fills it
        used = {table for table, _ in self.columns}
        for table, path in enumerate(paths):
            if table not in used:
                raise InputError(f"{path}: the other tables hold all captions already; leave it out")
            if table != self.main:
                self.hold(table, path, keys[table])

    def hold(self, table: int, path: Path, key: str) -> None:
        places = [place for place in self.columns if place[0] == table]
        for place in places:
            self.held[place] = {}
        for row in table_rows(path):
            name = one_line(row.get(key))
            clip = same_clip(name)
            if not clip or (self.wanted is not None and clip not in self.wanted):
                continue
            for place in places:
                text = one_line(row.get(place[1]))
                self.held[place].setdefault(clip, text)

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """(clip's name, [A1, A2, A3, A4]) one at a time, each clip once."""
        self.left_out = collections.defaultdict(list)
        wanted = self.wanted or {}
        met = set()
        for number, row in enumerate(table_rows(self.path), 1):
            name = one_line(row.get(self.key))
            clip = same_clip(name)
            if not name:
                self.left_out["no id, or no row of a table"].append(f"row {number}")
            elif self.wanted is not None and clip not in wanted:
                continue
            elif clip in met:
                self.left_out["a clip met before"].append(name)
            else:
                met.add(clip)
                texts = self.texts_of(clip, row)
                if texts is None:
                    self.left_out["not in every table"].append(name)
                elif not texts[0]:
                    self.left_out["no overall caption"].append(name)
                else:
                    yield wanted.get(clip, name), texts
        for captions in self.held.values():
            missing = captions.keys() - met
            self.left_out["not in every table"] += sorted(missing)
            met |= missing
        missing = sorted(wanted.keys() - met)
        self.left_out["of --ids, without captions"] += map(wanted.get, missing)

    def texts_of(self, clip: str, row: dict) -> list[str] | None:
        texts = []
        for place in self.columns:
            if place not in self.held:
                texts.append(one_line(row.get(place[1])))
            elif clip in self.held[place]:
                texts.append(self.held[place][clip])
            else:
                return None
        return texts

    def print_left_out(self) -> None:
        for why, names in self.left_out.items():
            if names:
                shown = names[:10]
                if len(names) > 10:
                    shown.append("...")
                print(f"{len(names):,} left out, {why}: {', '.join(shown)}")
