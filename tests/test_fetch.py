"""From the hub's published layouts to data/: whatever interrupts a fetch, the same files; nothing assumed."""

import argparse
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from huggingface_hub import constants, snapshot_download

import fetch
import hub
import tiny
from conftest import DATA
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
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "PAUSES", [0] * 20)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    sets = {name: source._replace(rows=0) for name, source in fetch.SETS.items()}
    monkeypatch.setattr(fetch, "SETS", sets)
    yield server
    server.shutdown()


def options(data, limit=0, keep=False):
    return argparse.Namespace(data=data, limit=limit, keep_downloads=keep, plan=False, reserve=0.0)


def tree(folder):
    """path -> hash of what a fetch is for: not of its own notes."""
    notes = ("lock", "done.jsonl", "complete.json", "listing.json")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in notes]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts(questions):
    return [(q.question, q.choices, q.answer) for q in questions]


# ------------------------------------------------------------------------------ every set, as published


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("avqa", "train_qa.json"),
        ("arc", "arc.jsonl"),
        ("mmau-mini", "mmau.json"),
        ("mmau-mini-v2", "mmau-v05.15.25.json"),
        ("mmau-full", "mmau-full.json"),
        ("mmau-full-v2", "mmau-full.json"),
        ("mmar", "mmar.jsonl"),
    ],
)
def test_a_set_becomes_the_questions_that_were_published(name, ours, small, server, tmp_path):
    world = small[0]
    fetch.fetch_set(name, options(tmp_path / "data"))
    source = fetch.SETS[name]
    clips = tmp_path / "data" / source.clips
    got = read_questions(tmp_path / "data" / source.questions, clips)
    want = read_questions(world / ours, world / "audio")
    assert texts(got) == texts(want)
    for mine, published in zip(got, want, strict=True):
        if published.audio is not None:
            assert Path(mine.audio).read_bytes() == Path(published.audio).read_bytes()
    assert (tmp_path / "data" / name / "missing.txt").read_text() == ""
    assert not (tmp_path / "data" / name / "download").exists()


def test_vggsounds_clips_get_its_own_list(small, server, tmp_path):
    fetch.fetch_set("vggsound", options(tmp_path))
    lines = (tmp_path / "vggsound/vggsound.csv").read_text().splitlines()
    assert len(lines) == SIZES["train"] + 1  # and one of the test split
    assert '-tiny0000003,3,"dog, barking",train' in lines
    assert '-tiny0000000,0,"dog, barking",test' in lines
    assert len(list((tmp_path / "vggsound/audio").iterdir())) == SIZES["train"]


def test_audiomcq_keeps_its_folders_and_its_rows(small, server, tmp_path):
    fetch.fetch_set("audiomcq", options(tmp_path))
    repo = server.root / "datasets/Harland/AudioMCQ-StrongAC-GeminiCoT"
    published = tree(repo)
    assert published.items() <= tree(tmp_path / "audiomcq").items()


def test_captions_come_as_two_tables(small, server, tmp_path):
    fetch.fetch_set("audiosetcaps", options(tmp_path))
    repo = server.root / "datasets/baijs/AudioSetCaps/Dataset"
    assert tree(repo).items() <= tree(tmp_path / "audiosetcaps").items()


def test_mmaus_thousand_published_rows_come_back(tmp_path):
    path = DATA / "mmau-test-mini-v05.15.25.json"
    if not path.exists():
        pytest.skip("no real data here")
    published = json.loads(path.read_text())
    hub.write_parquet(tmp_path / "rows.parquet", [hub.mmau_row(row, None) for row in published])
    source = fetch.SETS["mmau-mini-v2"]
    found = fetch.unpack("rows.parquet", tmp_path / "rows.parquet", source, data=tmp_path, limit=1e9)
    names = (
        "id",
        "audio_id",
        "question",
        "choices",
        "answer",
        "task",
        "difficulty",
        "category",
        "sub-category",
    )
    for got, want in zip(found["rows"], published, strict=True):
        assert {n: got[n] for n in names} == {n: want[n] for n in names}
    assert not found["broken"]


# ---------------------------------------------------------------------------- what goes wrong on the way


def test_a_server_that_fails_changes_nothing(small, server, tmp_path):
    """Connections cut, 5xx, parts sent as the whole: half of all downloads."""
    names = ["avqa", "mmau-mini", "mmar"]
    for name in names:
        fetch.fetch_set(name, options(tmp_path / "undisturbed"))
    server.fail = 0.5
    for name in names:
        fetch.fetch_set(name, options(tmp_path / "disturbed"))
    assert tree(tmp_path / "disturbed") == tree(tmp_path / "undisturbed")


def run_and_kill(data, after):
    """A fetch that is killed after some seconds -> its exit code (-9 if it was)."""
    command = [
        sys.executable,
        "-c",
        "import fetch; fetch.SETS = {n: s._replace(rows=0) for n, s in fetch.SETS.items()}; fetch.main()",
    ]
    command += ["avqa", "vggsound", "mmar", "audiomcq", "--data", str(data)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return -9
    assert process.returncode == 0, said
    return 0


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_files(kills, small, server, tmp_path):
    for name in ("avqa", "vggsound", "mmar", "audiomcq"):
        fetch.fetch_set(name, options(tmp_path / "undisturbed"))
    rng = random.Random(0)
    started = time.monotonic()
    run_and_kill(tmp_path / "once", None)
    whole = time.monotonic() - started
    data = tmp_path / "killed"
    for _ in range(kills):
        done = {
            line
            for record in data.glob("*/done.jsonl")
            for line in re.findall(r'"file": "(.+?)"', record.read_text())
        }
        for path in data.glob("*/download/**/*.*"):
            if ".cache" not in path.parts and path.is_file():
                done.add(path.relative_to(next(p for p in path.parents if p.name == "download")).as_posix())
        server.asked.clear()
        run_and_kill(data, rng.uniform(0.3, 1) * whole)
        assert not done & set(server.asked), "what was whole was fetched again"
    assert run_and_kill(data, None) == 0
    assert tree(data) == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["avqa", "mmar"])
@pytest.mark.parametrize("damage", ["truncated", "other bytes"])
def test_a_damaged_file_is_named_and_fetched_again(name, damage, small, server, tmp_path):
    fetch.fetch_set(name, options(tmp_path / "undisturbed"))
    file = {"avqa": "train/data-00001-of-00003.arrow", "mmar": "mmar-audio.tar.gz"}[name]
    path = server.root / "datasets" / fetch.SETS[name].repo / file
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2] if damage == "truncated" else b"\xff" * len(good))
    with pytest.raises(InputError, match=f"{path.name} is damaged"):
        fetch.fetch_set(name, options(tmp_path / "data"))
    path.write_bytes(good)
    server.asked.clear()
    fetch.fetch_set(name, options(tmp_path / "data"))
    assert server.asked == [file]
    assert tree(tmp_path / "data") == tree(tmp_path / "undisturbed")


def test_a_full_disk_is_one_line_and_loses_nothing(small, server, tmp_path, monkeypatch):
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
    with pytest.raises(InputError, match="cannot write .*No space left"):
        fetch.fetch_set("mmar", options(tmp_path / "data"))
    server.asked.clear()
    fetch.fetch_set("mmar", options(tmp_path / "data"))
    assert server.asked == []  # the archive is still there, whole
    assert tree(tmp_path / "data") == tree(tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------- nothing is assumed


def test_no_name_leads_out_of_the_folder(tmp_path, small):
    """Archive members with .., an absolute path, links, a device; names in tables."""
    sound = hub.find(small[0], "tiny-0000").read_bytes()
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        for name in ("../../out.wav", str(tmp_path / "absolute.wav"), "audio/good.wav"):
            member = tarfile.TarInfo(name)
            member.size = len(sound)
            archive.addfile(member, io.BytesIO(sound))
        for name, kind in {
            "link.wav": tarfile.SYMTYPE,
            "hard.wav": tarfile.LNKTYPE,
            "dev.wav": tarfile.CHRTYPE,
        }.items():
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "/etc/passwd"
            archive.addfile(member)
    rows = []
    for name in ("../../../up.wav", "/root/abs.wav", "..", "a\0b.wav", "fine.wav"):
        audio = {"bytes": sound, "path": name}
        rows.append(
            {"file_name": name, "question": "q?\nChoices:\nA. a\nB. b", "answer": "A. a", "audio": audio}
        )
    hub.write_stream(tmp_path / "evil.arrow", rows)
    data = tmp_path / "in" / "data"
    found = fetch.unpack("evil.tar.gz", tmp_path / "evil.tar.gz", fetch.SETS["mmar"], data=data, limit=1e9)
    assert len(found["broken"]) == 3
    found = fetch.unpack("evil.arrow", tmp_path / "evil.arrow", fetch.SETS["avqa"], data=data, limit=1e9)
    assert len(found["broken"]) == 1
    outside = [p.name for p in tmp_path.rglob("*.wav") if data not in p.parents]
    assert outside == []
    assert sorted(p.name for p in data.rglob("*.*")) == [
        "...wav",
        "abs.wav",
        "absolute.wav",
        "fine.wav",
        "good.wav",
        "out.wav",
        "up.wav",
    ]
    with pytest.raises(ValueError, match="no name of a file"):
        fetch.inside(data, "AudioSet/../../x.wav")


def test_broken_clips_and_rows_are_named_and_too_many_stop(small, server, tmp_path):
    rows = json.loads((small[0] / "train_qa.json").read_text())
    published = []
    for row in rows * 2:
        name = f"clip{len(published)}_000000.wav"
        audio = {"bytes": hub.find(small[0], row["video_name"]).read_bytes(), "path": name}
        choices = "A. a\nB. b"
        published.append(
            {"file_name": name, "question": f"q?\nChoices:\n{choices}", "answer": "B. b", "audio": audio}
        )
    published[3]["audio"]["bytes"] = b"<html>video unavailable</html>"
    published[5]["answer"] = "C. c"
    empty = io.BytesIO()
    soundfile.write(empty, [], 16000, format="WAV")
    published[7]["audio"]["bytes"] = empty.getvalue()
    file = server.root / "datasets/gijs/avqa-processed/train/data-00000-of-00003.arrow"
    good = file.read_bytes()
    hub.write_stream(file, published)
    fetch.fetch_set("avqa", options(tmp_path / "data"))
    missing = (tmp_path / "data/avqa/missing.txt").read_text()
    assert "row 4: ValueError: clip3_000000: Format not recognised" in missing
    assert "0x" not in missing
    for number in (4, 6, 8):
        assert f"data-00000-of-00003.arrow, row {number}: " in missing
    for row in published[8:16]:
        row["audio"]["bytes"] = b"no sound"
    hub.write_stream(file, published)
    with pytest.raises(InputError, match=r"avqa: \d+ missing or broken"):
        fetch.fetch_set("avqa", options(tmp_path / "again"))
    assert not (tmp_path / "again/avqa/complete.json").exists()
    file.write_bytes(good)
    server.asked.clear()
    fetch.fetch_set("avqa", options(tmp_path / "again"))  # the same command asks again for what was broken
    assert server.asked == ["train/data-00000-of-00003.arrow"]


def test_a_table_cut_off_is_refused_and_asked_for_again(small, server, tmp_path):
    path = server.root / "datasets/BoJack/MMAR/MMAR-meta.json"
    good = path.read_bytes()
    path.write_bytes(good[:1000])
    with pytest.raises(InputError, match=r"MMAR-meta.json: not a whole JSON list"):
        fetch.fetch_set("mmar", options(tmp_path))
    path.write_bytes(good)
    server.asked.clear()
    fetch.fetch_set("mmar", options(tmp_path))
    assert server.asked == ["MMAR-meta.json"]


def test_another_layout_is_told_by_its_first_row(small, server, tmp_path):
    for file in (server.root / "datasets/allenai/ai2_arc/ARC-Easy").glob("train-*"):
        table = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(table.rename_columns({"answerKey": "label"}), file)
    with pytest.raises(InputError, match="arc: no row is as published .*row 1: KeyError: 'answerKey'"):
        fetch.fetch_set("arc", options(tmp_path))


def test_a_pointer_of_git_lfs_is_no_table(small, server, tmp_path):
    name = "VGGSound_AudioSetCaps_caption.csv"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 36000000\n"
    (server.root / "datasets/baijs/AudioSetCaps/Dataset" / name).write_text(pointer)
    with pytest.raises(InputError, match=f"{name} is damaged .a git-lfs pointer"):
        fetch.fetch_set("audiosetcaps", options(tmp_path))


def test_one_flipped_bit_in_an_archive_is_damage(small, tmp_path):
    """Of a clip's samples, which look like any others: gzip's checksum tells."""
    sound = hub.find(small[0], "tiny-0000").read_bytes()
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=0) as archive:
        member = tarfile.TarInfo("audio/x.wav")
        member.size = len(sound)
        archive.addfile(member, io.BytesIO(sound))
    assert fetch.unpack(path.name, path, fetch.SETS["mmar"], data=tmp_path, limit=1e9)["taken"] == 1
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(OSError, match="CRC check failed"):
        fetch.unpack(path.name, path, fetch.SETS["mmar"], data=tmp_path, limit=1e9)


def test_a_huge_member_is_no_clip(small, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "LONGEST", 1000)
    path = server.root / "datasets/BoJack/MMAR/mmar-audio.tar.gz"
    found = fetch.unpack(path.name, path, fetch.SETS["mmar"], data=tmp_path, limit=1e9)
    assert len(found["broken"]) == SIZES["mmar"]
    assert "too large" in found["broken"][0]


def test_clips_of_one_name_in_two_folders_are_two(small, server, tmp_path):
    repo = server.root / "datasets/Harland/AudioMCQ-StrongAC-GeminiCoT"
    clip = sorted(repo.glob("Clotho/sub/*"))[0]
    clip.rename(repo / "AudioSet" / clip.name)
    fetch.fetch_set("audiomcq", options(tmp_path))
    missing = (tmp_path / "audiomcq/missing.txt").read_text()
    assert missing.startswith(f"Clotho/sub/{clip.name}: no such clip")


def test_notes_that_no_fetch_wrote_count_for_nothing(small, server, tmp_path):
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc/complete.json").write_text("{}")
    (tmp_path / "arc/done.jsonl").write_text('5\n{"limit": 0}\n')
    (tmp_path / "arc/listing.json").write_text("[")
    fetch.fetch_set("arc", options(tmp_path))
    assert len(read_questions(tmp_path / fetch.SETS["arc"].questions)) == SIZES["arc"]


def test_fewer_rows_than_published_stop(small, server, tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.SETS, "arc", fetch.SETS["arc"]._replace(rows=2251))
    with pytest.raises(InputError, match="arc: 12 rows, where about 2251 are published"):
        fetch.fetch_set("arc", options(tmp_path))


@pytest.mark.parametrize("name", ["avqa", "mmau-full-v2", "mmar", "audiomcq"])
def test_limit_takes_the_first_clips_and_their_questions(name, small, server, tmp_path):
    fetch.fetch_set(name, options(tmp_path, limit=5))
    source = fetch.SETS[name]
    questions = read_questions(tmp_path / source.questions, tmp_path / source.clips)
    assert len(questions) == 5
    assert (tmp_path / name / "missing.txt").read_text() == ""  # what the limit left out is not missing
    assert all(os.path.isfile(q.audio) for q in questions)
    fetch.fetch_set(name, options(tmp_path))  # and then all of it
    assert len(read_questions(tmp_path / source.questions, tmp_path / source.clips)) > 5


# --------------------------------------------------------------------------------------- command line


def command(*arguments):
    return subprocess.run(
        [sys.executable, "fetch.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_a_set_that_fails_does_not_stop_the_others(small, server, tmp_path, capsys):
    shutil.rmtree(server.root / "datasets/BoJack")
    assert not fetch.fetch_all({name: fetch.SETS[name] for name in ("mmar", "arc")}, options(tmp_path))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: cannot fetch the list of files of BoJack/MMAR")
    assert (tmp_path / "arc/complete.json").exists()


def test_offline_it_reads_the_hubs_cache(small, server, tmp_path, monkeypatch):
    source = fetch.SETS["mmar"]
    snapshot_download(source.repo, repo_type="dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    fetch.fetch_set("mmar", options(tmp_path))
    assert not server.asked
    with pytest.raises(InputError, match="cannot fetch the files in the hub's cache of allenai/ai2_arc"):
        fetch.fetch_set("arc", options(tmp_path))


def test_the_plan_counts_what_is_left(small, server, tmp_path, capsys):
    """A model of which `train.py --plan` cached config.json alone; a set of which a shard is damaged."""
    model = fetch.source_of("Qwen/Qwen2.5-Omni-7B")
    snapshot_download(model.repo, allow_patterns=["config.json"])
    (server.root / "datasets/gijs/avqa-processed/train/data-00002-of-00003.arrow").write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        fetch.fetch_set("avqa", options(tmp_path))
    asked = options(tmp_path)
    asked.plan = True
    capsys.readouterr()
    fetch.print_sets({"model": model, "avqa": fetch.SETS["avqa"]}, asked)
    said = capsys.readouterr().out.splitlines()
    assert not said[0].endswith("in the hub's cache")
    assert said[1].endswith(": 1 files to download")
    snapshot_download(model.repo)
    fetch.print_sets({"model": model}, asked)
    assert "in the hub's cache" in capsys.readouterr().out


def test_ctrl_c_ends_it_at_once(small, server, tmp_path):
    server.fail = 1.0
    server.ways = ["stall"]
    process = subprocess.Popen(
        [sys.executable, "fetch.py", "mmar", "--data", tmp_path], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not server.asked and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped; the same command goes on"


def test_the_table_says_what_is_there(small, server, tmp_path):
    fetch.fetch_set("arc", options(tmp_path))
    said = command("--data", tmp_path).stdout
    assert re.search(r"arc .*2,251 rows.*allenai/ai2_arc: 12 rows", said)
    assert re.search(r"avqa .*gijs/avqa-processed: -", said)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nothing"], "no set named nothing: give avqa, "),
        (["arc", "--limit", "-1"], "--limit -1: must be at least 0"),
        (["nobody/nothing"], r"cannot fetch the model of nobody/nothing"),
        (["--plan", "arc", "--reserve", "1e9"], "GB are needed at"),
    ],
)
def test_bad_input_gets_one_line(arguments, reason, small, server, tmp_path):
    result = command("--data", tmp_path / "data", *arguments)
    assert result.returncode == 2
    assert re.search(rf"^error: .*{reason}", result.stderr, re.M), result.stderr
    assert "Traceback" not in result.stderr


def test_two_fetches_of_one_set_do_not_mix(small, server, tmp_path):
    (tmp_path / "arc").mkdir()
    held = fetch.one_writer(tmp_path / "arc" / "lock")
    with pytest.raises(InputError, match="is held by"):
        fetch.fetch_set("arc", options(tmp_path))
    held.close()


@pytest.mark.skipif(not (ROOT / ".venv/ready").exists(), reason="run.sh would install first")
def test_a_stage_that_fails_stops_the_rest(small, server, tmp_path):
    shutil.rmtree(server.root / "datasets/BoJack")
    places = {
        "DATA": str(tmp_path / "data"),
        "RESULTS": str(tmp_path / "results"),
        "BENCHES": "mmar",
        "RESERVE": "1",
    }
    result = subprocess.run(
        ["bash", "run.sh", "fetch", "base-omni"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | places | {"GPUS": "1"},
    )
    assert result.returncode == 2
    assert "BoJack/MMAR" in result.stderr
    assert "error: fetch stopped" in result.stderr
    assert not list(tmp_path.glob("results/*"))


def stage(script, **places):
    """Run a function of run.sh, whose variables `places` gives."""
    script = f"source ./run.sh help >/dev/null; NAME=omni-avqa; {script}"
    environment = os.environ | {"LC_ALL": "C"} | {name: str(value) for name, value in places.items()}
    return subprocess.run(
        ["bash", "-c", script, "run.sh"], cwd=ROOT, capture_output=True, text=True, env=environment
    )


def test_a_stage_asks_again_what_is_unanswered(tmp_path):
    evaluated = tmp_path / "results/omni-avqa/eval"
    evaluated.mkdir(parents=True)
    (tmp_path / "mmar").mkdir()
    (tmp_path / "mmar/MMAR-meta.json").write_text("[]")
    places = {"DATA": tmp_path, "RESULTS": tmp_path / "results", "BENCHES": "mmar", "AUDIO": "real none"}
    for audio, unanswered in {"real": {"q1": "no such file"}, "none": {}}.items():
        (evaluated / f"mmar.{audio}.json").write_text("[]")
        meta = json.dumps({"prompt": "direct", "unanswered": unanswered}, indent=1)
        (evaluated / f"mmar.{audio}.meta").write_text(meta)
    said = stage('launch() { echo "$@"; }; evaluate MODEL', **places).stdout
    assert "mmar.real.json" in said
    assert "mmar.none.json" not in said


def test_a_stage_without_any_question_fails(tmp_path):
    for command in ("evaluate MODEL", "GPUS=1; train MODEL Q.json CLIPS"):
        result = stage(command, DATA=tmp_path, RESULTS=tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith("error: omni-avqa: no questions of mmau-mini ")
        assert len(result.stderr.splitlines()) == 1


def test_other_nodes_wait_for_the_first_ones_fetch(tmp_path):
    waiting = 'sleep() { echo waits; mkdir -p "$DATA/mmar"; touch "$DATA/mmar/complete.json"; }; '
    result = stage(waiting + "ASKED=report; fetch; echo goes on", DATA=tmp_path, NODE_RANK=1, BENCHES="mmar")
    assert result.stdout == "waits\ngoes on\n"


def test_the_plan_reserves_what_the_results_do_not_take_up(tmp_path):
    stubs = 'du() { printf "250000000\\t."; }; python() { echo "$@"; }; PLAN=1; ASKED=report; '
    said = stage(stubs + "fetch", RESULTS=tmp_path, RESERVE=600, BENCHES="mmar").stdout
    assert "--reserve 350 mmar" in said


def test_a_price_is_known_once_the_captions_are_there(tmp_path):
    (tmp_path / "ids.json").write_text("[]")
    said = stage(f"PLAN=1; generate {tmp_path}/ids.json", DATA=tmp_path)
    assert said.stdout == "omni-avqa: its price is known once its captions are fetched\n"


def plainly(path, folder):
    """What unpacking is measured against: pyarrow reads the clips, which are written as they are."""
    folder.mkdir()
    if path.suffix == ".parquet":
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(16)
    else:
        batches = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    number = 0
    for batch in batches:
        for sound in batch.column("audio").field("bytes"):
            (folder / f"{number}.wav").write_bytes(sound.as_py())
            number += 1


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_unpacking_is_as_fast_as_plain_pyarrow_and_memory_stays_flat(ending, tmp_path):
    """50 MB and 1 GB of embedded clips: the same peak, and seconds near those of reading and writing alone."""
    sound = io.BytesIO()
    soundfile.write(sound, [0.1] * 160_000, 16000, format="WAV")
    header = sound.getvalue()[:44]
    peaks = []
    for count in (160, 3200):
        rows = []
        for i in range(count):
            row = {
                "file_name": f"c{i}.wav",
                "question": "q?\nChoices:\nA. a\nB. b",
                "answer": "A. a",
                "audio": {"bytes": header + os.urandom(320_000), "path": None},
            }
            rows.append(row)
        path = tmp_path / f"train-{count}{ending}"
        if ending == ".arrow":
            hub.write_stream(path, rows)
        else:
            hub.write_parquet(path, rows, "audio")
        code = "import fetch, pathlib, time; "
        code += f"p = pathlib.Path({str(path)!r}); started = time.monotonic(); "
        code += "fetch.unpack(p.name, p, fetch.SETS['avqa'], data=p.parent / 'out', limit=1e9); "
        code += "print('seconds:', time.monotonic() - started, open('/proc/self/status').read())"
        seconds = []
        plain = []
        for _ in range(2):
            started = time.monotonic()
            plainly(path, tmp_path / "plain")
            plain.append(time.monotonic() - started)
            said = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
            seconds.append(float(re.search(r"seconds: (\S+)", said)[1]))
            shutil.rmtree(tmp_path / "plain")
            shutil.rmtree(tmp_path / "out")
        peaks.append(int(re.search(r"VmHWM:\s+(\d+)", said)[1]) / 1024)
    ratio = min(seconds) / min(plain)
    print(f"{ending}: {min(seconds):.1f} s, {min(plain):.1f} s plainly: {ratio:.2f}; peaks {peaks} MB")
    assert ratio <= 2.5
    assert max(peaks) < 500
    assert peaks[1] < peaks[0] + 60
