"""From the hub's published layouts to data/: whatever interrupts a fetch, the same files; run.sh's stages."""

import argparse
import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from operator import attrgetter
from pathlib import Path

import pytest
from huggingface_hub import constants

import fetch
import hub
import tiny
from data import read_questions
from files import InputError

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")  # a process that has imported everything already
fetch.tqdm.set_lock(threading.RLock())  # its own is shared with a fork, and would stay held by a killed one
SIZES = {"train": 24, "arc": 12, "mmau": 16, "mmar": 12}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(an untrained world, the folder of its repositories)."""
    folder = tmp_path_factory.mktemp("hub")
    tiny.make_world(folder / "world", effort=0, sizes=SIZES)
    hub.publish([folder / "world"], folder / "root")
    return folder / "world", folder / "root"


@pytest.fixture
def server(small, tmp_path, monkeypatch):
    """The stand-in hub on a copy of the repositories, asked by this process; no set is too small."""
    root = tmp_path / "root"
    shutil.copytree(small[1], root, symlinks=True)
    server = hub.Hub(root)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "PAUSES", [1e-9] * 20)
    monkeypatch.setattr(fetch, "SETS", fetch.SETS.copy())
    for name in fetch.SETS:
        change(name, rows="0", gb="0")
    yield server
    server.shutdown()


def change(name, **columns):
    """Another row of the table."""
    fetch.SETS[name] = fetch.SETS[name]._replace(**columns)


def get(name, data, limit=0):
    fetch.fetch_set(fetch.SETS[name], argparse.Namespace(data=data, limit=limit))


def tree(folder):
    """path -> hash of what a fetch is for: not of its own notes."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("lock", "complete.json")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ------------------------------------------------------------------------------ every set, as published


OURS = """{"avqa": "train_qa.json", "arc": "arc.jsonl", "mmau-mini": "mmau.json", "mmau-mini-v2": "mmau-v05.15.25.json",
           "mmau-full": "mmau-full.json", "mmau-full-v2": "mmau-full.json", "mmar": "mmar.jsonl"}"""


def test_every_set_becomes_what_was_published(small, server, tmp_path):
    """Questions, clips and tables; under a --limit the first clips and their questions, and then all."""
    world = small[0]
    ours = json.loads(OURS)
    asked = attrgetter("question", "choices", "answer")
    for name, source in fetch.SETS.items():
        data = tmp_path / name
        for limit in (5, 0):
            if limit and (name == "vggsound" or not source.clips):
                continue
            get(name, data, limit)  # what a limit leaves out is not missing
            assert f"{limit or ''} rows, 0 missing" in (data / name / "complete.json").read_text()
        assert not (data / name / "download").exists()
        if name in ours:
            got = read_questions(data / source.questions, data / source.clips)
            want = read_questions(world / ours[name], world / "audio")
            for mine, theirs in zip(got, want, strict=True):
                assert asked(mine) == asked(theirs)
                assert not mine.audio or Path(mine.audio).read_bytes() == Path(theirs.audio).read_bytes()
    sets = server.root / "datasets"
    assert tree(sets / fetch.SETS["audiomcq"].repo).items() <= tree(tmp_path / "audiomcq/audiomcq").items()
    captions = tree(sets / "baijs/AudioSetCaps/Dataset")
    assert captions.items() <= tree(tmp_path / "audiosetcaps/audiosetcaps").items()
    data = tmp_path / "vggsound/vggsound"
    lines = (data / "vggsound.csv").read_text().splitlines()
    assert len(lines) == len(list((data / "audio").iterdir())) + 1  # and one of the test split
    assert {'-tiny0000003,3,"dog, barking",train', '-tiny0000000,0,"dog, barking",test'} <= set(lines)


# ---------------------------------------------------------------------------- what goes wrong on the way


@pytest.fixture
def undisturbed(server, tmp_path):
    """undisturbed(name...) gets the sets and gives their tree."""

    def undisturbed(*names):
        for name in names:
            get(name, tmp_path / "undisturbed")
        return tree(tmp_path / "undisturbed")

    return undisturbed


def test_a_server_that_fails_changes_nothing(server, tmp_path, undisturbed):
    """Connections cut, 5xx, parts sent as the whole: half of all downloads."""
    calm = undisturbed("avqa", "mmar")
    server.fail = 0.5
    for name in ("avqa", "mmar"):
        get(name, tmp_path / "disturbed")
    assert tree(tmp_path / "disturbed") == calm


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_files(kills, server, tmp_path, monkeypatch, undisturbed):
    names = ["avqa", "vggsound", "mmar", "audiomcq"]
    calm = undisturbed(*names)
    monkeypatch.setattr(sys, "argv", ["fetch.py", *names, "--data", str(tmp_path / "killed")])
    for left in range(kills, -1, -1):
        server.asked.clear()
        process = FORK.Process(target=fetch.main)
        process.start()
        if left:
            while not server.asked and process.is_alive():
                time.sleep(0.01)
            time.sleep(server.random.uniform(0, 0.3))
            process.kill()
        process.join()
    assert process.exitcode == 0
    assert tree(tmp_path / "killed") == calm


FILES = [("avqa", "train/data-00001-of-00003.arrow"), ("mmar", "mmar-audio.tar.gz")]


@pytest.mark.parametrize("name, file", FILES)
def test_a_damaged_file_is_named_and_fetched_again(name, file, server, tmp_path, undisturbed):
    calm = undisturbed(name)
    path = server.root / "datasets" / fetch.SETS[name].repo / file
    good = path.read_bytes()
    damaged = [good[: len(good) // 2]]
    if name == "mmar":  # a bit of gzip's checksum; Arrow has none
        damaged.append(good[:-6] + bytes([good[-6] ^ 1]) + good[-5:])
    for i, bad in enumerate(damaged):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=f"{path.name} is damaged"):
            get(name, tmp_path / f"{i}")
        path.write_bytes(good)
        server.asked.clear()
        get(name, tmp_path / f"{i}")
        assert server.asked == [file]
        assert tree(tmp_path / f"{i}") == calm


def test_a_full_disk_is_one_line_and_loses_nothing(server, tmp_path, monkeypatch, undisturbed):
    calm = undisturbed("mmar")
    whole = Path.write_bytes

    def full(path, content):
        whole(path, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match="No space left"):
            get("mmar", tmp_path / "data")
    server.asked.clear()
    get("mmar", tmp_path / "data")
    assert server.asked == []  # the archive is still there, whole
    assert tree(tmp_path / "data") == calm


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(argument...) is fetch.py's main in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fetch.py", "--data", str(tmp_path / "data"), *arguments])
        return fetch.main(), *capsys.readouterr()

    return run


def test_the_disk_is_checked_first_and_what_is_there_counts(server, run):
    model = hub.MODELS["omni"]
    weights = (server.root / "models" / model).glob("*.safetensors")
    code, said, _ = run("--plan", "mmar", model)
    stated = re.search(rf"{model} .* (\S+) GB  ", said)[1]
    assert code == 0 and float(stated) == pytest.approx(next(weights).stat().st_size / 1e9, abs=0.001)
    change("mmar", gb="1e9")
    server.asked.clear()
    for options in (["--plan"], []):
        code, _, said = run("mmar", *options)
        assert code == 2 and "GB are needed at" in said and server.asked == []
    assert run("mmar", "--limit", "3")[0] == 0
    assert "3 rows, 0 missing or broken" in run("mmar", "--limit", "3", "--plan")[1]
    assert run("mmar")[0] == 2


def test_a_set_that_fails_does_not_stop_the_others(server, run, tmp_path):
    shutil.rmtree(server.root / "datasets/BoJack")
    code, _, said = run("mmar", "arc")
    assert code == 2 and "error: cannot fetch BoJack/MMAR" in said and "not fetched: mmar" in said
    assert (tmp_path / "data/arc/complete.json").exists()
    code, _, said = run("nothing")
    assert code == 2 and "no set named nothing: give avqa, " in said


# ---------------------------------------------------------------------------------- nothing is assumed


def avqa_row(name, sound):
    row = {"file_name": name, "question": f"{name}?\nChoices:\nA. a\nB. b", "answer": "A. a"}
    return row | {"audio": {"bytes": sound, "path": name}}


# A member of an archive, and its type: a file, a hard link, a symbolic link, a device
MEMBERS = (
    "../../out.wav 0, HERE/absolute.wav 0, a/good.wav 0, LONG.wav 0, hard.wav 1, link.wav 2, device.wav 3"
)


def test_no_name_leads_out_of_the_folder(tmp_path, small):
    """Archive members with .., an absolute path, links, a device, a name that no disk holds; names in tables."""
    sound = hub.find(small[0], "tiny-0000").read_bytes()
    data = tmp_path / "in" / "data"
    for name in ("mmar", "avqa"):
        (data / name / "download").mkdir(parents=True)
    with tarfile.open(data / "mmar/download/evil.tar.gz", "w:gz") as archive:
        for written in MEMBERS.replace("HERE", str(tmp_path)).replace("LONG", "ä" * 140).split(", "):
            name, kind = written.split()
            member = tarfile.TarInfo(name)
            member.type = kind.encode()
            member.linkname = "/etc/passwd"
            member.size = len(sound) * (kind == "0")
            archive.addfile(member, io.BytesIO(sound))
    names = ("../../../up.wav", "/root/abs.wav", "..", "a\0b.wav", "fine.wav")
    hub.write_table(data / "avqa/download/evil.arrow", [avqa_row(name, sound) for name in names])
    for file, source, count in (("evil.tar.gz", "mmar", 3), ("evil.arrow", "avqa", 4)):
        wrong = []
        clips = fetch.unpack(fetch.SETS[source], file, data, [], wrong)
        assert len(list(clips)) == count and len(wrong) == 1
    assert all(data in path.parents for path in tmp_path.rglob("*.wav"))
    names = " ".join(sorted(path.name for path in data.rglob("*.wav")))
    assert names == "...wav abs.wav absolute.wav fine.wav good.wav out.wav up.wav"


def test_broken_rows_are_named_and_less_than_nine_tenths_stop(small, server, tmp_path):
    shard = server.root / "datasets/gijs/avqa-processed/train/data-00000-of-00003.arrow"
    sound = hub.find(small[0], "tiny-0000").read_bytes()
    rows = [avqa_row(f"clip{number}_0.wav", sound) for number in range(40)]
    rows[3]["audio"] = {"bytes": b"<html>video unavailable</html>", "path": ""}
    rows[5]["answer"] = "B. c"
    rows[7]["audio"] = {"bytes": None, "path": ""}
    change("avqa", rows="40", files=f"train/{shard.name}")
    hub.write_table(shard, rows)
    get("avqa", tmp_path / "few")
    missing = (tmp_path / "few/avqa/missing.txt").read_text()
    assert re.fullmatch(".*row 4:.*\n.*row 6:.*\n.*clip7_000000.wav: no such clip.*\n", missing)
    assert "0x" not in missing  # an address in memory
    rows[9]["audio"] = {"bytes": b"no sound", "path": ""}
    hub.write_table(shard, rows)
    with pytest.raises(InputError, match="avqa: 36 rows, 4 missing or broken, where about 40 are published"):
        get("avqa", tmp_path / "many")
    assert not (tmp_path / "many/avqa/complete.json").exists()


# --------------------------------------------------------------------------------------------- run.sh


def stage(script, **places):
    """Run a function of run.sh, whose variables `places` gives, in a folder that is not the repository."""
    script = f"source {ROOT}/run.sh help >/dev/null; NAME=omni-avqa; {script}"
    environment = os.environ | {"LC_ALL": "C"} | {name: str(value) for name, value in places.items()}
    command = ["bash", "-c", script, str(ROOT / "run.sh")]
    return subprocess.run(command, cwd="/tmp", capture_output=True, text=True, env=environment)


def test_a_stage_asks_again_what_is_unanswered_and_paths_may_have_blanks(tmp_path):
    evaluated = tmp_path / "my results/omni-avqa/eval"
    questions = tmp_path / "my data/mmar/MMAR-meta.json"
    for folder in (evaluated, questions.parent):
        folder.mkdir(parents=True)
    questions.write_text("[]")
    for audio, unanswered in {"real": '{"q1": "no such file"}', "none": "{}"}.items():
        (evaluated / f"mmar.{audio}.json").write_text("[]")
        (evaluated / f"mmar.{audio}.meta").write_text(f'"unanswered": {unanswered}')
    places = {"RESULTS": os.path.relpath(tmp_path / "my results", "/tmp"), "DATA": tmp_path / "my data"}
    said = stage('launch() { printf "%s\\n" "$@"; }; BENCHES=mmar; evaluate MODEL', **places).stdout
    assert f"\n{questions}\n" in said
    assert "my results/omni-avqa/eval/mmar.real.json\n" in said and "mmar.none.json" not in said


def test_a_steps_questions_are_a_multiple_of_the_processes(tmp_path):
    script = (
        'launch() { printf "%s " "$@"; }; any_bench() { :; }; evaluate() { :; }; train MODEL Q.json CLIPS'
    )
    models = (
        ("Qwen/Qwen3-Omni", "Qwen3-Omni/"),
        ("/x/model", ""),
        ("/x/Mine/", "Mine/"),
    )  # a paper's row is its model's
    for gpus, nodes, batch, (model, folder) in zip((4, 3, 8), (1, 1, 2), (8, 9, 16), models, strict=True):
        said = stage(script, GPUS=gpus, NODES=nodes, RESULTS=tmp_path, OMNI=model).stdout
        assert f" --batch {batch} " in said and f" --out {tmp_path}/{folder}omni-avqa " in said
        assert (f"--batch {batch}, since" in said) == (batch != 8)


def test_a_stage_without_any_question_fails(tmp_path):
    for command in ("evaluate MODEL", "GPUS=1; train MODEL Q.json CLIPS"):
        result = stage(command, DATA=tmp_path, RESULTS=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: omni-avqa: no questions of mmau-mini ")


def test_stages_are_named_literally_and_other_nodes_wait(tmp_path):
    for name in (".*", "omni", "omni.avqa"):
        assert f"error: no stage named {name};" in stage(f"run '{name}'").stderr
    waiting = 'sleep() { echo waits; mkdir -p "$DATA/mmar"; touch "$DATA/mmar/complete.json"; }; '
    result = stage(waiting + "ASKED=report; fetch; echo goes on", DATA=tmp_path, NODE_RANK=1, BENCHES="mmar")
    assert result.stdout == "waits\ngoes on\n"
    fails = "python() { echo fetching; return 2; }; setup() { :; }; run fetch report"
    result = stage(fails, DATA=tmp_path, GPUS=1)
    assert result.stdout == "fetching\n"
    assert "error: fetch stopped" in result.stderr
    said = stage("PLAN=1; generate IDS", DATA=tmp_path)
    assert said.stdout == "omni-avqa: its price is known once its captions are fetched\n"
