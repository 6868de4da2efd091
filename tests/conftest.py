"""What tests share: the tiny world, kept in the system's temporary folder until what makes it changes, and processes
that need not import anything.
"""

import os
import re

# The laws hold in fp32 on a CPU (`bash run.sh test gpu` has a GPU's), and whatever this shell is set up for.
FOREIGN = r"(?i).*_proxy|HF_.*|HUGGINGFACE_.*|TRANSFORMERS_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC_.*"
for name in list(os.environ):
    if re.fullmatch(FOREIGN, name):
        del os.environ[name]
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import gc
import hashlib
import multiprocessing
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import tiny
import train
from files import one_writer

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("OMNI_R1_DATA", HERE.parent.parent / "shared" / "data"))  # real files, not ours

FORK = multiprocessing.get_context("fork")

gc.freeze()  # what is imported stays, and need not be looked through again
# So small a model is slower on two; and a process that has had several must not be forked.
torch.set_num_threads(1)
# In a shell's background Ctrl-C is ignored, and would be by all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_once(family, effort):
    home = Path(tempfile.gettempdir()) / f"omni-r1-tiny-{os.getuid()}"
    made_of = hashlib.sha256()
    for name in ("tests/tiny.py", "requirements.txt"):
        made_of.update((HERE.parent / name).read_bytes())
    world = home / f"{family}-{made_of.hexdigest()[:12]}"
    home.mkdir(exist_ok=True)
    with one_writer(home / f"{family}.lock", 3600):  # two test runs may start at once
        if world.exists():
            os.utime(world)  # in use
            return world
        yesterday = time.time() - 86400
        for old in home.glob(f"{family}-*"):
            if old.stat().st_mtime < yesterday:
                shutil.rmtree(old, ignore_errors=True)
        scratch = home / f"{family}-writing"
        tiny.make_world(scratch, family, effort=effort)
        return scratch.rename(world)


@pytest.fixture(scope="session")
def world():
    """A folder as `python tests/tiny.py` makes it. Read it; write elsewhere."""
    return make_once("omni", 1.0)


@pytest.fixture(scope="session")
def world_qwen2audio():
    """Its model has learned next to nothing: what is asked of it holds for any weights."""
    return make_once("qwen2audio", 0.1)


@pytest.fixture(autouse=True)
def nothing_hangs(request):
    """What waits for ever fails its own test, and the rest run."""
    seconds = 3600 if request.node.get_closest_marker("slow") else 600

    def fail(*_):
        raise AssertionError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a program may have set


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Processes:
    """Several processes, as torchrun would start each, which run one program after another.

    They are forks of this one: to import torch and transformers again takes as long as ten runs here.
    """

    def __init__(self, count):
        self.count = count
        self.jobs = []
        self.pipes = []

    def start(self, entry, *flags):
        if not self.jobs:
            for rank in range(self.count):
                here, there = FORK.Pipe()
                place = {"RANK": str(rank), "WORLD_SIZE": str(self.count), "MASTER_ADDR": "127.0.0.1"}
                self.jobs.append(FORK.Process(target=work, args=(place, there), daemon=True))
                self.jobs[-1].start()
                self.pipes.append(here)
                there.close()  # so that the process's end is the pipe's
        port = str(free_port())
        for pipe in self.pipes:
            pipe.send((port, entry, [*map(str, flags)]))

    def run(self, entry, *flags):
        """The program's `main` on all; each must end with 0 in five minutes."""
        self.start(entry, *flags)
        try:
            for pipe in self.pipes:
                assert pipe.poll(300) and pipe.recv() == 0
        except BaseException:
            self.stop()
            raise

    def train(self, out, *flags):
        self.run(train.main, "--out", out, *flags)

    def stop(self):
        for job in self.jobs:
            job.kill()
            job.join()
        self.__init__(self.count)


def work(place, pipe):
    torch.set_num_threads(max(1, 2 // int(place["WORLD_SIZE"])))  # alone with two, which may add in any order
    os.environ.update(place)
    while True:
        os.environ["MASTER_PORT"], entry, flags = pipe.recv()
        sys.argv = ["program", *flags]
        code = 0
        try:
            entry()
        except SystemExit as end:
            code = end.code
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how this one is ended when all is done
        pipe.send(code)


@pytest.fixture(scope="session")
def pair():
    return Processes(2)
