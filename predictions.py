"""The predictions of a benchmark: whose they are, kept line by line as they come, written in its own form.

P.json is the benchmark's rows with the keys that its official script reads. P.meta, beside it, says what was
asked of which model. P.json.part-* hold the answers meanwhile, and for as long as some are missing.
"""

import json
import os
import re
from pathlib import Path

from data import Question, read_rows
from files import InputError, as_object, parse_json, read_text, refuse_changes, sha256
from reward import final_answer

Key = tuple[int, int]  # (the question's number, the order of its choices: 0 is the published one)
Row = tuple[Key, str, str | None]  # an answer, or "" and why there is none

UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # MMAU's own ids
# Of 16 test-mini questions that MMAU's revision of May 2025 rewrote: the start of the id, then of the SHA-256
# of the original text and of the revised one. A file's name tells nothing: the published one kept its name.
MMAU_REWRITTEN = """
a1a3d478:75a42b:f38f5c b56ff02c:34d949:3f88e0 4e2e7c16:6345e1:9b7538 16d39319:2a1455:3f336a
c678230c:be131b:e183ef 04dcb6a3:86eb00:9091fc 04fef74e:b939dd:6742e3 8e190f87:b7cef9:a34253
0935573e:8cde56:073a58 6d1ab354:96f4c8:26a20e 65e456b9:a26a28:eb29f2 eb102acc:7d14b0:544ff0
60b5e67c:3a6b90:f98389 e33c1c3d:3939e1:13838a d00ff58e:6e59ae:7381b7 19051f5d:5902de:813894
"""

# The keys that official scripts read: MMAR's, those of MMSU and AIR-Bench, and of MMAU's two versions.
OFFICIAL = {"mmar": ["answer_prediction"], "choices_ad": ["response", "model_prediction"]}
MMAU_KEYS = ["model_output", "model_prediction"]


# ------------------------------------------------------------------------------------------- whose they are


def mmau_version(questions: list[Question]) -> str | None:
    """ "mmau-mini" or "mmau-mini-v2" by the questions' text; None if no question is one that tells.

    Raises InputError where they are of both versions, or of neither.
    """
    names = {}
    for entry in MMAU_REWRITTEN.split():
        start, original, revised = entry.split(":")
        names[start] = {original: "mmau-mini", revised: "mmau-mini-v2"}
    found = set()
    for question in questions:
        if question.id[:8] in names:
            text = " ".join(question.question.casefold().split())
            found.add(names[question.id[:8]].get(sha256(text.encode())[:6]))
    if not found:
        return None
    if len(found) > 1 or None in found:
        raise InputError(
            "these are neither MMAU's original questions nor v05.15.25's: name them with --bench"
        )
    return found.pop()


def bench_name(questions: list[Question], given: str | None) -> str:
    """What the report calls the benchmark: `given` (--bench), unless the questions' text says otherwise."""
    form = questions[0].meta["format"]
    if form != "mmau" or (given and not given.startswith("mmau")):
        return given or form
    version = mmau_version(questions)
    if version and given and given != version:
        raise InputError(f"--bench {given}: by their text these questions are {version}")
    if given or version:
        return given or version
    if any(re.fullmatch(UUID, question.id) for question in questions):
        raise InputError(
            "none of these questions tells which version of MMAU they are of: give --bench mmau-mini or "
            "mmau-mini-v2 (of the full test set: mmau-full or mmau-full-v2)"
        )
    hidden = all(question.answer is None for question in questions)
    return "mmau-full" if hidden else "mmau-mini"


# -------------------------------------------------------------------------------------------------- P.meta


def meta_path(out: Path) -> Path:
    """P.json -> P.meta; any other name -> name.meta, so that no two predictions share one."""
    if out.suffix == ".json":
        return out.with_suffix(".meta")
    return Path(f"{out}.meta")


def refuse_foreign(out: Path) -> None:
    """InputError if `out` exists and no evaluation says that it wrote it."""
    meta = meta_path(out)
    if os.path.lexists(out) and not meta.exists():
        raise InputError(f"{out} exists, and no {meta.name} says that evaluate.py wrote it: another --out")


def read_meta(out: Path, about: dict) -> dict:
    """What an earlier start wrote, or {}. InputError if that is of anything else than `about`."""
    meta = meta_path(out)
    refuse_foreign(out)
    if not meta.exists():
        return {}
    before = as_object(read_text(meta))
    if not before:
        raise InputError(f"{meta} is damaged or another program's: move it and {out.name} away")
    refuse_changes(out, then=before, now=about)
    return before


# ------------------------------------------------------------------------------------------------ the answers


def parts_of(out: Path) -> list[Path]:
    parts = []
    for name in sorted(os.listdir(out.parent)):
        path = out.parent / name
        if re.fullmatch(rf"{re.escape(out.name)}\.part-\d+", name) and path.is_file():
            parts.append(path)
    return parts


class Answers:
    """{key: answer} of all OUT.part-* together; what `write` is given goes to OUT.part-RANK at once.

    A part's first line says what was asked of which model; every other is [number, order, answer, why there
    is none]. Half a line, which a kill leaves, is asked again.
    """

    def __init__(self, out: Path, about: dict, rank: int):
        self.given: dict[Key, str] = {}
        self.missing: dict[Key, str] = {}  # why there is no answer
        self.own = out.parent / f"{out.name}.part-{rank}"
        self.header = json.dumps({"asked": sha256(json.dumps(about).encode())})
        self.started = False  # whether our own part has its first line
        for part in parts_of(out):
            self.read(part)

    def read(self, part: Path) -> None:
        lines = part.read_bytes().decode("utf-8", "replace").split("\n")
        if len(lines) == 1:
            return  # cut off in its first line
        if lines[0] != self.header:
            raise InputError(f"{part} holds answers to something else, or is damaged: remove it")
        if part == self.own:
            self.started = True
        for line in lines[1:]:
            try:
                i, order, text, why = parse_json(line)
                self.add((int(i), int(order)), str(text), why)
            except (ValueError, TypeError, OverflowError):
                continue

    def add(self, key: Key, text: str, why: str | None) -> None:
        if why:
            self.missing[key] = why
        else:
            self.given[key] = text

    def write(self, rows: list[Row]) -> None:
        mode = "a"
        first = "\n"  # ends what a kill cut off
        if not self.started:
            mode = "w"
            first = f"{self.header}\n"
        with open(self.own, mode, encoding="utf-8") as file:
            file.write(first)
            for key, text, why in rows:
                file.write(json.dumps([*key, text, why]) + "\n")
                self.add(key, text, why)
        self.started = True


# ----------------------------------------------------------------------------------------------------- P.json


def in_own_form(data: str, questions: list[Question], said: list[list[str]], *, prompt: str) -> str:
    """The rows of the file `data`, in its order, plus the keys that its official script reads.

    said: each question's answers, one an order. The keys hold the final answer; where it stood in more text
    (--prompt think), that is `raw_output`.
    """
    rows, is_lines = read_rows(data)
    form = questions[0].meta["format"]
    for question, texts in zip(questions, said, strict=True):
        place = question.meta["row"]
        if place >= len(rows) or rows[place] != question.meta["source"]:
            raise InputError(f"{data} was changed meanwhile: put it back, and the same command goes on")
        row = rows[place]
        final = [final_answer(text, prompt) for text in texts]
        if not row.keys() & {"id", "uniq_id"}:
            row["id"] = question.id  # made from the row as it came
        for key in OFFICIAL.get(form, MMAU_KEYS):
            row[key] = final[0]
        if final != texts:
            row["raw_output"] = texts[0]
        if len(texts) > 1:
            row["order_predictions"] = final
    rows = [row for row in rows if row is not None]
    if is_lines and form not in ("mmau", "mmar"):  # whose scripts read a list, even if lines are published
        return "".join(readable_json(row) + "\n" for row in rows)
    return readable_json(rows, indent=1)


def readable_json(value: object, indent: int | None = None) -> str:
    """JSON whose letters stand as they are, but for half a surrogate pair, which UTF-8 cannot hold."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
