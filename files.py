"""Files that matter: read whole, written whole or not at all, rows that survive a kill, one writer at a time.

Every other file of the project stands on this one. It knows nothing of questions, models or processes.
"""

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import IO, Any


class InputError(Exception):
    """What is wrong with the user's input, in one line. Command lines print it and exit with 2."""


class LocalError(InputError):
    """What is wrong in one process alone, which says it whatever its rank."""


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises InputError."""
    try:
        if Path(path).is_fifo():
            raise OSError(0, "it is a pipe")  # reading would wait for a writer
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def parse_json(text: str) -> Any:
    """json.loads that turns NaN and infinity into None, and too deep a nesting into a ValueError."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_text(path: Path | str, text: str) -> None:
    """Write beside the name, then rename: a reader, or a kill, never meets half a file."""
    scratch = Path(f"{path}.writing")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def append_rows(path: Path | str, rows: list[dict]) -> None:
    """Append JSON lines; what a kill has left of a line before them is ended first."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if file.read() not in (b"", b"\n"):
            text = "\n" + text
        file.write(text.encode())


def rows_of(path: Path | str) -> list[dict]:
    """The whole rows of a file that `append_rows` wrote; half a row, which a kill can leave, is none."""
    rows = []
    if not Path(path).exists():
        return rows
    for line in Path(path).read_text("utf-8", "replace").split("\n"):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
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


def one_writer(path: Path | str, patience: float = 5.0) -> IO:
    """Hold the lock file `path` until the process ends, so that no second run writes to the same place.

    Waits `patience` seconds, since a dying worker may still hold it. Keep what this returns: closing it gives
    the lock back. Raises InputError that names the holder.
    """
    file = open(path, "a+", errors="replace")  # noqa: SIM115 (held for the life of the process)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise InputError(f"{path} is held by {holder}: one run writes to a place at a time") from None
            time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file
