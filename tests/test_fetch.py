"""From the hub's published layouts to data/: whatever interrupts a fetch, the same files; run.sh's stages."""

import argparse
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

import fetch
import hub
import tiny
from data import read_questions
from files import InputError

ROOT = Path(__file__).resolve().parent.parent
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
    """The stand-in hub on a copy of the repositories, asked by this process and by those that it starts."""
    root = tmp_path / "root"
    shutil.copytree(small[1], root, symlinks=True)
    server = hub.Hub(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "PAUSES", [0] * 20)
    monkeypatch.setattr(fetch, "SETS", {n: s._replace(rows="0", gb="0") for n, s in fetch.SETS.items()})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield server
    server.shutdown()


def options(data, limit=0, plan=False):
    return argparse.Namespace(data=data, limit=limit, plan=plan)


def tree(folder):
    """path -> hash of what a fetch is for: not of its own notes."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("lock", "complete.json")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ------------------------------------------------------------------------------ every set, as published


def test_every_set_becomes_what_was_published(small, server, tmp_path):
    """Questions, clips and tables; under a --limit the first clips and their questions, and then all."""
    world = small[0]
    ours = {"avqa": "train_qa.json", "arc": "arc.jsonl", "mmau-mini": "mmau.json", "mmar": "mmar.jsonl"}
    ours |= {
        "mmau-mini-v2": "mmau-v05.15.25.json",
        "mmau-full": "mmau-full.json",
        "mmau-full-v2": "mmau-full.json",
    }
    for name, source in fetch.SETS.items():
        data = tmp_path / name
        if source.clips and name != "vggsound":
            fetch.fetch_set(name, options(data, limit=5))
            assert (data / name / "missing.txt").read_text() == ""  # what the limit left out is not missing
            assert "5 rows" in (data / name / "complete.json").read_text()
        fetch.fetch_set(name, options(data))
        assert (data / name / "missing.txt").read_text() == ""
        assert not (data / name / "download").exists()
        if name not in ours:
            continue
        got = read_questions(data / source.questions, data / source.clips)
        want = read_questions(world / ours[name], world / "audio")
        assert [(q.question, q.choices, q.answer) for q in got] == [
            (q.question, q.choices, q.answer) for q in want
        ]
        for mine, published in zip(got, want, strict=True):
            if published.audio:
                assert Path(mine.audio).read_bytes() == Path(published.audio).read_bytes()
    sets = server.root / "datasets"
    assert (
        tree(sets / "Harland/AudioMCQ-StrongAC-GeminiCoT").items()
        <= tree(tmp_path / "audiomcq/audiomcq").items()
    )
    assert (
        tree(sets / "baijs/AudioSetCaps/Dataset").items()
        <= tree(tmp_path / "audiosetcaps/audiosetcaps").items()
    )
    data = tmp_path / "vggsound"
    lines = (data / "vggsound/vggsound.csv").read_text().splitlines()
    assert len(lines) == len(list((data / "vggsound/audio").iterdir())) + 1  # and one of the test split
    assert {'-tiny0000003,3,"dog, barking",train', '-tiny0000000,0,"dog, barking",test'} <= set(lines)


# ---------------------------------------------------------------------------- what goes wrong on the way


def test_a_server_that_fails_changes_nothing(server, tmp_path):
    """Connections cut, 5xx, parts sent as the whole: half of all downloads."""
    for folder, share in {"undisturbed": 0, "disturbed": 0.5}.items():
        server.fail = share
        for name in ("avqa", "mmau-mini", "mmar"):
            fetch.fetch_set(name, options(tmp_path / folder))
    assert tree(tmp_path / "disturbed") == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_files(kills, server, tmp_path):
    names = ["avqa", "vggsound", "mmar", "audiomcq"]
    for name in names:
        fetch.fetch_set(name, options(tmp_path / "undisturbed"))
    code = "import fetch; fetch.SETS = {n: s._replace(rows='0', gb='0') for n, s in fetch.SETS.items()}; fetch.main()"
    command = [sys.executable, "-c", code, *names, "--data", tmp_path / "killed"]
    rng = random.Random(0)
    for left in range(kills, -1, -1):
        server.asked.clear()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if left:
            while not server.asked and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
        code = process.wait()
    assert code == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", ["truncated", "other bytes", "one bit"])
@pytest.mark.parametrize("name", ["avqa", "mmar"])
def test_a_damaged_file_is_named_and_fetched_again(name, damage, server, tmp_path):
    if (name, damage) == ("avqa", "one bit"):
        pytest.skip("Arrow has no checksum")
    fetch.fetch_set(name, options(tmp_path / "undisturbed"))
    file = {"avqa": "train/data-00001-of-00003.arrow", "mmar": "mmar-audio.tar.gz"}[name]
    path = server.root / "datasets" / fetch.SETS[name].repo / file
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-6] ^= 1  # of gzip's checksum
    bad = {"truncated": good[: len(good) // 2], "other bytes": b"\xff" * len(good), "one bit": flipped}
    path.write_bytes(bad[damage])
    with pytest.raises(InputError, match=f"{path.name} is damaged"):
        fetch.fetch_set(name, options(tmp_path / "data"))
    path.write_bytes(good)
    server.asked.clear()
    fetch.fetch_set(name, options(tmp_path / "data"))
    assert server.asked == [file]
    assert tree(tmp_path / "data") == tree(tmp_path / "undisturbed")


def test_a_full_disk_is_one_line_and_loses_nothing(server, tmp_path, monkeypatch):
    fetch.fetch_set("mmar", options(tmp_path / "undisturbed"))
    writes = []
    whole = Path.write_bytes

    def full_at_the_fifth(path, content):
        writes.append(path)
        if len(writes) == 5:
            whole(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_at_the_fifth)
    with pytest.raises(InputError, match="No space left"):
        fetch.fetch_set("mmar", options(tmp_path / "data"))
    server.asked.clear()
    fetch.fetch_set("mmar", options(tmp_path / "data"))
    assert server.asked == []  # the archive is still there, whole
    assert tree(tmp_path / "data") == tree(tmp_path / "undisturbed")


def test_the_disk_is_checked_first_and_what_is_there_counts(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(fetch.SETS, "mmar", fetch.SETS["mmar"]._replace(gb="1e9"))
    for start in (fetch.fetch_set, lambda name, asked: fetch.print_sets({name: fetch.SETS[name]}, asked)):
        with pytest.raises(InputError, match="GB are needed at"):
            start("mmar", options(tmp_path, plan=True))
    assert server.asked == []
    fetch.fetch_set("mmar", options(tmp_path, limit=3))
    fetch.print_sets({"mmar": fetch.SETS["mmar"]}, options(tmp_path, limit=3, plan=True))
    assert "BoJack/MMAR: 3 rows, 0 missing or broken" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- nothing is assumed


def test_no_name_leads_out_of_the_folder(tmp_path, small):
    """Archive members with .., an absolute path, links, a device, a name that no disk holds; names in tables."""
    sound = hub.find(small[0], "tiny-0000").read_bytes()
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        for name in ("../../out.wav", str(tmp_path / "absolute.wav"), "audio/good.wav", "ä" * 140 + ".wav"):
            member = tarfile.TarInfo(name)
            member.size = len(sound)
            archive.addfile(member, io.BytesIO(sound))
        kinds = {"link.wav": tarfile.SYMTYPE, "hard.wav": tarfile.LNKTYPE, "dev.wav": tarfile.CHRTYPE}
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "/etc/passwd"
            archive.addfile(member)
    rows = []
    for name in ("../../../up.wav", "/root/abs.wav", "..", "a\0b.wav", "fine.wav"):
        row = {"file_name": name, "question": "q?\nChoices:\nA. a\nB. b", "answer": "A. a"}
        rows.append(row | {"audio": {"bytes": sound, "path": name}})
    hub.write_stream(tmp_path / "evil.arrow", rows)
    data = tmp_path / "in" / "data"
    for file, source, count in (("evil.tar.gz", "mmar", 4), ("evil.arrow", "avqa", 1)):
        found = list(fetch.unpack(file, tmp_path / file, fetch.SETS[source], data=data))
        assert sum(bool(wrong) for _, _, wrong in found) == count
    assert [p.name for p in tmp_path.rglob("*.wav") if data not in p.parents] == []
    names = ["...wav", "abs.wav", "absolute.wav", "fine.wav", "good.wav", "out.wav", "up.wav"]
    assert sorted(p.name for p in data.rglob("*.*")) == names
    with pytest.raises(ValueError, match="no name of a file"):
        fetch.inside(data, "AudioSet/../../x.wav")


def test_broken_rows_are_named_and_too_many_or_too_few_stop(small, server, tmp_path, monkeypatch):
    file = server.root / "datasets/gijs/avqa-processed/train/data-00000-of-00003.arrow"
    sound = hub.find(small[0], "tiny-0000").read_bytes()
    rows = []
    for number in range(40):
        row = {"file_name": f"clip{number}_0.wav", "question": "q?\nChoices:\nA. a\nB. b", "answer": "B. b"}
        rows.append(row | {"audio": {"bytes": sound, "path": ""}})
    rows[3]["audio"] = {"bytes": b"<html>video unavailable</html>", "path": ""}
    rows[5]["answer"] = "B. c"
    hub.write_stream(file, rows)
    fetch.fetch_set("avqa", options(tmp_path / "few"))
    missing = (tmp_path / "few/avqa/missing.txt").read_text().splitlines()
    assert ["row 4" in missing[0], "row 6" in missing[1], "0x" in missing[0]] == [True, True, False]
    for row in rows[8:16]:
        row["audio"] = {"bytes": b"no sound", "path": ""}
    hub.write_stream(file, rows)
    with pytest.raises(InputError, match=r"avqa: \d+ missing or broken"):
        fetch.fetch_set("avqa", options(tmp_path / "many"))
    assert not (tmp_path / "many/avqa/complete.json").exists()
    monkeypatch.setitem(fetch.SETS, "arc", fetch.SETS["arc"]._replace(rows="2251"))
    with pytest.raises(InputError, match="arc: 12 rows, where about 2251 are published"):
        fetch.fetch_set("arc", options(tmp_path))


def test_a_set_that_fails_does_not_stop_the_others(server, tmp_path, capsys):
    shutil.rmtree(server.root / "datasets/BoJack")
    assert not fetch.fetch_all({name: fetch.SETS[name] for name in ("mmar", "arc")}, options(tmp_path))
    assert capsys.readouterr().err.startswith("error: cannot fetch BoJack/MMAR")
    assert (tmp_path / "arc/complete.json").exists()
    with pytest.raises(InputError, match="no set named nothing: give avqa, "):
        fetch.source_of("nothing")


# --------------------------------------------------------------------------------------------- run.sh


def stage(script, **places):
    """Run a function of run.sh, whose variables `places` gives, in a folder that is not the repository."""
    script = f"source {ROOT}/run.sh help >/dev/null; NAME=omni-avqa; {script}"
    environment = os.environ | {"LC_ALL": "C"} | {name: str(value) for name, value in places.items()}
    command = ["bash", "-c", script, str(ROOT / "run.sh")]
    return subprocess.run(command, cwd="/tmp", capture_output=True, text=True, env=environment)


def test_a_stage_asks_again_what_is_unanswered_and_paths_may_have_blanks(tmp_path):
    data, results = tmp_path / "my data", tmp_path / "my results"
    evaluated = results / "omni-avqa/eval"
    evaluated.mkdir(parents=True)
    (data / "mmar").mkdir(parents=True)
    (data / "mmar/MMAR-meta.json").write_text("[]")
    for audio, unanswered in {"real": {"q1": "no such file"}, "none": {}}.items():
        (evaluated / f"mmar.{audio}.json").write_text("[]")
        (evaluated / f"mmar.{audio}.meta").write_text(json.dumps({"unanswered": unanswered}, indent=1))
    places = {
        "DATA": data,
        "RESULTS": os.path.relpath(results, "/tmp"),
        "BENCHES": "mmar",
        "AUDIO": "real none",
    }
    said = stage('launch() { printf "%s\\n" "$@"; }; evaluate MODEL', **places).stdout.splitlines()
    assert str(data / "mmar/MMAR-meta.json") in said
    assert any(line.endswith("my results/omni-avqa/eval/mmar.real.json") for line in said)
    assert not any("mmar.none.json" in line for line in said)


def test_a_steps_questions_are_a_multiple_of_the_processes(tmp_path):
    script = (
        'launch() { printf "%s " "$@"; }; any_bench() { :; }; evaluate() { :; }; train MODEL Q.json CLIPS'
    )
    for gpus, nodes, batch in ((4, 1, 8), (3, 1, 9), (8, 2, 16), (5, 1, 10)):
        said = stage(script, GPUS=gpus, NODES=nodes, RESULTS=tmp_path).stdout
        assert f" --batch {batch} " in said
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
