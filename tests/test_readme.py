"""README is a front door: its commands run, its files are there, it is short."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from test_train import here

from chat_server import serving
from data import PLAIN
from files import write_text

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands():
    """(program, its part of the line), of all the README's code; torchrun's own options stand before it."""
    found = []
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\b(python|torchrun|srun)\b", line):
                line = line.split("  #")[0].rstrip("' ")  # srun's command is quoted
                found += re.findall(r"\b((?:tests/)?\w+\.py)\b(.*)", line)
    for inline in re.findall(r"`([^`\n]*python [^`\n]+)`", TEXT):
        found += re.findall(r"\b((?:tests/)?\w+\.py)\b(.*)", inline)
    return found


def test_every_option_that_a_command_gives_exists():
    assert len(commands()) >= 18
    for program, arguments in commands():
        known = re.findall(r"\(\s*\"--(\w+)\"", (ROOT / program).read_text())
        given = re.findall(r"(?<!\S)--(\w+)", arguments)
        assert set(given) <= {*known, "help", "and"}, f"{program}: {set(given) - set(known)}"


def test_it_is_short_and_every_file_that_it_lists_is_there():
    assert TEXT.count("\n") <= 220
    (files,) = [block for block in BLOCKS if block.startswith("the paper:")]
    listed = set(re.findall(r"\b\w+\.py\b", files))
    assert listed == {file.name for file in ROOT.glob("*.py")}
    for name in re.findall(r"\b\w+\.(?:html|sh)\b", files):
        assert (ROOT / name).exists(), name


CHANGED = {  # what a command names, in the tiny world
    "$M": "world",
    "$C": "captions.csv",
    "BENCH.real": "mmar.real",
    "BENCH.silence": "mmar.silence",  # the benchmark that BENCH.json is
    "--hold_out 200": "--hold_out 40",
    "http://localhost:8000/v1/chat/completions": "URL",
}
SMALL = {  # options given after a command's own: the tiny model, and little of it
    "train.py": "--steps 2 --batch 4 --max_new_tokens 4 --replicas 1 --cpu_offload off",
    "evaluate.py": "--max_new_tokens 4",
}


LINKS = """
world .
BASE model
clips audio
CLIPS audio
a audio
b audio
a.json train_qa.json
mine.json mmau.json
arc.jsonl arc.jsonl
train_qa.json train_qa.json
captions.csv captions.csv
data/avqa/audio audio
data/avqa/train_qa.json train_qa.json
"""


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A folder that holds what the README's commands name."""
    (tmp_path / "data/avqa").mkdir(parents=True)
    for name, target in map(str.split, LINKS.strip().splitlines()):
        (tmp_path / name).symlink_to(world / target)
    rows = [json.loads(line) for line in (world / "mmar.jsonl").read_text().splitlines()]
    write_text(tmp_path / "BENCH.json", json.dumps(rows[:40]))
    plain = [json.dumps({key: row[key] for key in json.loads(PLAIN)}) for row in rows]
    for name in ("train_qa.jsonl", "b.jsonl"):
        write_text(tmp_path / name, "\n".join(plain).replace("./audio/", ""))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(place, capsys):
    """In the README's order, where a CPU and no network are enough: later ones read what earlier ones wrote."""
    with serving() as server:
        for program, line in commands():
            if program == "fetch.py" or program.startswith("tests/"):  # test_fetch.py's, test_gpu.py's
                continue
            for old, new in (CHANGED | {"URL": server.url}).items():
                line = line.replace(old, new)
            small = SMALL.get(program, "").split()
            options = [*small, *shlex.split(line), *small]  # before an --and, too
            if program == "train.py" and "--model" not in options:
                options += ["--model", "BASE"]
            code = here(importlib.import_module(program.removesuffix(".py")).main, *options)
            assert not code, f"{program} {line}: {capsys.readouterr().err[-2000:]}"
    assert (place / "results/report.html").exists()
