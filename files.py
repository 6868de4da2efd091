"""What every program stands on: options, and files that matter.

Those are read whole, written whole or not at all; rows survive a kill; one process writes at a time. Nothing
here knows of questions, models or processes.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


class InputError(Exception):
    """What is wrong with the user's input, in one line. Command lines print it and exit with 2."""


class LocalError(InputError):
    """What is wrong in one process alone, which says it whatever its rank."""


def run_program(program: Callable) -> int:
    """A program from its log to its exit code; what is wrong is one line and a 2."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("omni_r1").setLevel(logging.INFO)  # ours; httpx tells every request
    try:
        return program() or 0
    except (InputError, OSError, KeyboardInterrupt) as error:  # OSError: a full disk, a read-only folder
        words = str(error) or "interrupted; what was written is kept, the same command goes on"
        if os.environ.get("RANK", "0") == "0" or type(error) is not InputError:
            print(f"error: {words}", file=sys.stderr, flush=True)
        return 2


class Parser(argparse.ArgumentParser):
    """A program's options, from tables; what is wrong with one is one line, as for all other input."""

    def __init__(self, text: str):
        super().__init__(
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see --help)")

    def table(self, title: str, rows: list[tuple]) -> None:
        """Rows of name, type or choices, default, help; bool is a switch, a list as default takes several."""
        add = self.add_argument_group(title).add_argument
        for name, kind, default, text in rows:
            more = {"type": kind}
            if kind is not bool and default is not None:
                text += " (default: %(default)s)"
            if kind is bool:
                more = {"action": "store_true"}
            elif isinstance(kind, list):
                more = {"choices": kind}
            elif isinstance(default, list):
                more["nargs"] = "+"
            add(name, default=default, help=text, **more)


def at_least(least: float, kind: type = int) -> Callable:
    """An option's type: a finite number from `least` on."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < 2**63:
            raise ValueError
        return value

    return number


COUNT = at_least(1)
WHOLE = at_least(0)


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises InputError."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None


def parse_json(text: str) -> Any:
    """json.loads that turns NaN and infinity into None, and too deep a nesting into a ValueError."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_text(path: Path | str, text: str) -> None:
    """Write beside the name, then rename: a reader, or a kill, never meets half a file."""
    scratch = Path(f"{path}.writing")
    scratch.write_text(text, "utf-8")
    scratch.replace(path)


def write_rows(path: Path, rows: list) -> None:
    """A JSON list or JSON lines by the name's ending (.csv: the rows are lines); makes the folder."""
    lines = map(json.dumps, rows)
    if path.suffix == ".json":
        lines = [json.dumps(rows, indent=1)]
    elif path.suffix == ".csv":
        lines = rows
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))


def append_rows(path: Path | str, rows: list[dict]) -> None:
    """Append JSON lines; what a kill has left of a line before them is ended first."""
    with open(path, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):
            file.write(b"\n")
        for row in rows:
            file.write(f"{json.dumps(row)}\n".encode())


def parse_lines(text: str) -> list:
    """JSON lines; None for each that is not JSON."""
    rows = []
    for line in filter(str.strip, text.split("\n")):  # splitlines() also splits at U+2028 inside a text
        try:
            rows.append(parse_json(line))
        except ValueError:
            rows.append(None)
    return rows


def rows_of(path: Path | str) -> list[dict]:
    """The whole rows of a file that `append_rows` wrote; half a row, which a kill can leave, is none."""
    with suppress(FileNotFoundError):  # asked of the reading itself: a run that resumes replaces its log
        return list(filter(None, parse_lines(Path(path).read_text("utf-8", "replace"))))
    return []


def first_line(error: Exception) -> str:
    """What a library says is wrong, which may be a page or nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def made_before(about: Path, written: list[Path], now: dict) -> dict:
    """What `about` says of how the files `written` were made; {} where there are none.

    InputError where it was with other settings than `now`, or by another program.
    """
    if not any(path.exists() for path in written):
        return {}
    try:
        then = dict(parse_json(read_text(about)))
    except (InputError, ValueError, TypeError):
        raise InputError(f"{about} does not say how what is there was made; take another --out") from None
    now = json.loads(json.dumps(now))
    changed = [f"{name}: {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        raise InputError(f"{about} is of other arguments ({'; '.join(changed)}); take another --out")
    return then


def one_writer(path: Path | str, patience: float = 5.0) -> IO:
    """Hold the lock file `path` until the process ends, so that no second run writes to the same place.

    Waits `patience` seconds, since a dying worker may still hold it. Keep what this returns: closing it gives
    the lock back. Raises InputError that names the holder.
    """
    file = open(path, "a")  # noqa: SIM115 (held for the life of the process)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = read_text(path).strip()
                raise InputError(f"{path} is held by {holder}: one run writes to a place at a time") from None
            time.sleep(0.1)
    Path(path).write_text(f"process {os.getpid()} on {os.uname().nodename}\n")
    return file
