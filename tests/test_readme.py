"""README is a front door: its commands give options that their programs have, its files are there, it is short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands():
    """(program, its part of the line), of all the README's code; torchrun's own options stand before it."""
    found = []
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\b(python|torchrun|srun)\b", line):
                line = line.split("  #")[0]
                found += re.findall(r"\b((?:tests/)?\w+\.py)\b(.*)", line)
    for inline in re.findall(r"`(python [^`\n]+)`", TEXT):
        found += re.findall(r"\b((?:tests/)?\w+\.py)\b(.*)", inline)
    return found


def test_enough_commands_are_looked_at():
    programs = {program for program, _ in commands()}
    assert {"train.py", "evaluate.py", "report.py", "gen_qa.py", "fetch.py"} <= programs


@pytest.mark.parametrize(("program", "arguments"), commands())
def test_every_option_that_a_command_gives_exists(program, arguments):
    source = (ROOT / program).read_text()
    known = re.findall(r"\badd(?:_argument)?\(\s*\"--(\w+)\"", source)
    given = re.findall(r"(?<!\S)--(\w+)", arguments)
    assert set(given) <= {*known, "help"}, f"{program}: {set(given) - set(known)}"


def test_it_is_short_and_every_file_that_it_lists_is_there():
    assert TEXT.count("\n") <= 220
    (files,) = [block for block in BLOCKS if block.startswith("the paper:")]
    listed = set(re.findall(r"\b\w+\.py\b", files))
    assert listed == {file.name for file in ROOT.glob("*.py")}
    for name in re.findall(r"\b\w+\.(?:html|sh)\b", files):
        assert (ROOT / name).exists(), name
