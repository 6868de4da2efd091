"""What tests share: the tiny world, kept in the system's temporary folder until what makes it changes, and two
processes that are started once.
"""

import os
import re

# The laws hold in fp32 on a CPU (`bash run.sh test gpu` has a GPU's), and whatever this shell is set up for.
FOREIGN = r"(?i).*_proxy|HF_.*|HUGGINGFACE_.*|TRANSFORMERS_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC_.*"
for name in list(os.environ):
    if re.fullmatch(FOREIGN, name):
        del os.environ[name]
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import contextlib
import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import tiny

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("OMNI_R1_DATA", HERE.parent.parent / "shared" / "data"))  # real files, not ours

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

torch.set_num_threads(2)  # not what the machine has: a container may have less
# In a shell's background Ctrl-C is ignored, and would be by all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_once(family, effort):
    home = Path(tempfile.gettempdir()) / f"omni-r1-tiny-{os.getuid()}"
    made_of = hashlib.sha256()
    for name in ("tests/tiny.py", "requirements.txt"):
        made_of.update((HERE.parent / name).read_bytes())
    world = home / f"{family}-{made_of.hexdigest()[:12]}"
    if world.exists():
        os.utime(world)  # in use
    else:
        yesterday = time.time() - 86400
        for old in home.glob(f"{family}-*"):
            if old.stat().st_mtime < yesterday:
                shutil.rmtree(old, ignore_errors=True)
        scratch = world.with_name(f"{family}-writing-{os.getpid()}")  # two test runs may start at once
        tiny.make_world(scratch, family, effort=effort)
        try:
            scratch.rename(world)
        except OSError:
            shutil.rmtree(scratch)
    return world


@pytest.fixture(scope="session")
def world():
    """A folder as `python tests/tiny.py` makes it. Read it; write elsewhere."""
    return make_once("omni", 1.0)


@pytest.fixture(scope="session")
def world_qwen2audio():
    """Its model has learned next to nothing: what is asked of it holds for any weights."""
    return make_once("qwen2audio", 0.1)


@contextlib.contextmanager
def time_limit(seconds):
    def fail(*_):
        raise AssertionError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def nothing_hangs(request):
    """What waits for ever fails its own test, and the rest run."""
    with time_limit(3600 if request.node.get_closest_marker("slow") else 600):
        yield


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Pair:
    """Two processes that are started once: a launch of torchrun costs as much as a run here."""

    def __init__(self, folder):
        self.folder, self.count, self.job = folder, 0, None

    def start(self):
        for job in self.folder.glob("*.json"):
            job.unlink()
        self.count = 0
        with open(self.folder / "log", "w") as log:
            self.job = subprocess.Popen(
                [*TORCHRUN, "--nproc_per_node", "2", HERE / "scripts" / "pair.py", self.folder],
                cwd=HERE.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def stop(self):
        if self.job:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.job.pid, signal.SIGKILL)
            self.job.wait()
        self.job = None

    def run(self, module, *arguments):
        """The program's `main` on both; they must end with 0 in five minutes."""
        if not self.job:
            self.start()
        job = self.folder / f"{self.count}.json"
        ends = [self.folder / f"{self.count}.{rank}" for rank in range(2)]
        for end in ends:
            end.unlink(missing_ok=True)
        job.with_suffix(".writing").write_text(json.dumps([free_port(), module, [*map(str, arguments)]]))
        job.with_suffix(".writing").rename(job)
        self.count += 1
        deadline = time.time() + 300
        while self.job.poll() is None and time.time() < deadline:
            if all(end.exists() for end in ends):
                break
            time.sleep(0.01)
        said = [end.exists() and end.read_text() for end in ends]
        if said != ["exit 0", "exit 0"]:
            self.stop()
        assert said == ["exit 0", "exit 0"], (self.folder / "log").read_text()[-3000:]

    def train(self, out, *arguments):
        self.run("train", "--out", out, *arguments)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    two = Pair(tmp_path_factory.mktemp("pair"))
    yield two
    two.stop()
