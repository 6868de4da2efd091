"""The tiny world, made once and kept in the system's temporary folder until tests/tiny.py changes."""

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch

import tiny

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("OMNI_R1_DATA", HERE.parent.parent / "shared" / "data"))  # real files, not ours

torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2 * 2))


def make_once(family):
    home = Path(tempfile.gettempdir()) / f"omni-r1-tiny-{os.getuid()}"
    world = home / f"{family}-{hashlib.sha256(Path(tiny.__file__).read_bytes()).hexdigest()[:12]}"
    if not world.exists():
        yesterday = time.time() - 86400
        for old in home.glob(f"{family}-*"):
            if old.stat().st_mtime < yesterday:
                shutil.rmtree(old, ignore_errors=True)
        scratch = world.with_name(f"{family}-writing-{os.getpid()}")  # two test runs may start at once
        tiny.make_world(scratch, family)
        try:
            scratch.rename(world)
        except OSError:
            shutil.rmtree(scratch)
    return world


@pytest.fixture(scope="session")
def world():
    """A folder as `python tests/tiny.py` makes it. Read it; write elsewhere."""
    return make_once("omni")


@pytest.fixture(scope="session")
def world_qwen2audio():
    return make_once("qwen2audio")
