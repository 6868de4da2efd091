"""The codebase stays what the README says: links point at what they name, files and functions stay short."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_links_point_at_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 4
    for name, file, line in links:
        assert (
            (ROOT / file)
            .read_text()
            .splitlines()[int(line) - 1]
            .startswith((f"def {name}(", f"class {name}"))
        ), name


def test_files_and_functions_are_short():
    for file in ROOT.glob("*.py"):
        source = file.read_text()
        assert len(source.splitlines()) <= 400, file.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file.name}: {node.name}"


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    for file in ROOT.glob("*.py"):
        source = file.read_text()
        assert not re.search(r"trust_remote_code|pickle\.load|torch\.load\(", source), file.name


def test_run_time_packages_are_the_six_and_pyarrow():
    names = [re.split("[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()]
    assert sorted(names) == ["numpy", "pyarrow", "requests", "soundfile", "torch", "tqdm", "transformers"]
