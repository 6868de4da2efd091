"""Files that matter: read with a bound, written whole or not at all, one writer at a time.

Every other file of the project stands on this one. It knows nothing of questions, models or processes.
"""

import fcntl
import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import IO, Any

DEEPEST = 64  # levels of brackets in one JSON value; real rows have 4
STARTED = time.monotonic()  # the program; importing torch takes seconds of its patience


class InputError(Exception):
    """What is wrong with the user's input, in one line. Command lines print it and exit with 2."""


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises InputError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"cannot read {path}: not a regular file")  # a FIFO would be waited for
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def parse_json(text: str) -> Any:
    """json.loads that turns NaN and infinity into None and too deep a nesting into a ValueError."""
    try:
        value = json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return value
        level = inner
    raise ValueError("nested too deeply")


def as_object(row: Any) -> dict:
    """A JSON object, or its text, as a dict; {} for anything else."""
    if isinstance(row, str):
        try:
            row = parse_json(row)
        except ValueError:
            return {}
    if not isinstance(row, dict):
        return {}
    return row


def write_text(path: Path | str, text: str) -> None:
    """Write beside the name, then rename: a reader, or a kill, never meets half a file."""
    scratch = Path(f"{path}.writing")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def append_rows(path: Path | str, rows: list[dict]) -> None:
    """Append JSON lines. The newline before them ends a line that a kill cut off."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + text)


def rows_of(path: Path | str) -> list[dict]:
    """The whole rows of a file that `append_rows` wrote; half a row, which a kill can leave, is none."""
    rows = []
    if not Path(path).exists():
        return rows
    for line in Path(path).read_text("utf-8", "replace").split("\n"):
        row = as_object(line)
        if row:
            rows.append(row)
    return rows


def first_line(error: Exception) -> str:
    """What a library says is wrong, which may be a page or nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def refuse_changes(out: Path, *, then: dict, now: dict) -> None:
    """InputError where what `out` holds was made with other settings than these."""
    now = json.loads(json.dumps(now))
    changed = []
    for name in now:
        if then.get(name) != now[name]:
            changed.append(f"{name}: {then.get(name)} -> {now[name]}")
    if changed:
        raise InputError(f"{out} is of other arguments ({'; '.join(changed)}); take another --out")


def one_writer(path: Path | str, shared: bool = False, patience: float = 4.0) -> IO:
    """Hold the lock file `path` until the process ends, so that no second run writes to the same place.

    Waits `patience` seconds from the program's start, since a dying worker may still hold it. `shared` lets
    other holders in that also asked for a shared hold. Keep what this returns: closing it gives the lock
    back. Raises InputError that names the holder, or that `path` is a file of the user's.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    file = open(handle, "a+", errors="replace")  # noqa: SIM115 (held for the life of the process)
    file.seek(0)
    if file.read(8) not in ("", "process "):
        raise InputError(f"{path} is no lock of ours: move it away")
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = max(STARTED + patience, time.monotonic() + 0.2)
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise InputError(f"{path} is held by {holder}: one run writes to a place at a time") from None
            time.sleep(0.1)
    if not shared:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
    return file
