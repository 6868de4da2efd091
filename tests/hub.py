"""A stand-in for the Hugging Face hub: serves the tiny world in the published layouts, for tests and the demo.

    python tests/hub.py --worlds DIR/omni [DIR/qwen2audio ...] --port_file FILE

huggingface_hub works with it unchanged through HF_ENDPOINT. Every repository has one commit. It can fail as real
servers do: cut a connection, be busy, send a part of a file as if it were the whole.
"""

import argparse
import csv
import hashlib
import json
import random
import shutil
import tarfile
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet

COMMIT = "c0ffee" + "0" * 34
AUDIO = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
MODELS = {"omni": "Qwen/Qwen2.5-Omni-7B", "qwen2audio": "Qwen/Qwen2-Audio-7B-Instruct"}


# -------------------------------------------------------------------------------- the published layouts


def find(world: Path, name: str) -> Path:
    """The clip of this name, whatever its ending and however its start second is written."""
    names = [name]
    if name[-6:].isdigit():
        names.append(f"{name[:-6]}{int(name[-6:])}")
    for stem in names:
        for ending in (".wav", ".flac"):
            if (world / "audio" / (stem + ending)).exists():
                return world / "audio" / (stem + ending)
    raise FileNotFoundError(name)


def sound(world: Path, name: str, path: str | None) -> dict:
    return {"bytes": find(world, name).read_bytes(), "path": path}


def write_parquet(path: Path, rows: list[dict], audio: str | None = None, group: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if audio and rows and any(row[audio] for row in rows):
        place = table.column_names.index(audio)
        table = table.set_column(place, audio, pyarrow.array([row[audio] for row in rows], AUDIO))
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def write_stream(path: Path, rows: list[dict], batch: int = 100) -> None:
    """An Arrow stream file, as datasets.save_to_disk writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = [(name, pyarrow.string()) for name in ("file_name", "question", "answer")]
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema([*schema, ("audio", AUDIO)]))
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        for part in table.to_batches(batch):
            stream.write(part)


def write_archive(path: Path, folder: str, clips: list[Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for clip in clips:
            archive.add(clip, f"{folder}/{clip.stem}.wav")
            archive.addfile(tarfile.TarInfo(f"__MACOSX/{folder}/._{clip.stem}.wav"))
        archive.addfile(tarfile.TarInfo(f"{folder}/.DS_Store"))


def publish_avqa(world: Path, repo: Path, shards: int = 3) -> None:
    rows = []
    for row in json.loads((world / "train_qa.json").read_text()):
        choices = [f"{'ABCDEFGH'[i]}. {choice}" for i, choice in enumerate(row["multi_choice"])]
        question = {"question": row["question_text"] + "\nChoices:\n" + "\n".join(choices)}
        question["file_name"] = row["video_name"] + ".wav"
        question["answer"] = choices[row["answer"]]
        question["audio"] = sound(world, row["video_name"], row["video_name"] + ".wav")
        rows.append(question)
    size = -(-len(rows) // shards)
    for i in range(shards):
        write_stream(repo / f"train/data-{i:05d}-of-{shards:05d}.arrow", rows[i * size : (i + 1) * size])
    write_stream(repo / "val/data-00000-of-00001.arrow", rows[:2])
    (repo / "train" / "state.json").write_text("{}")


def publish_vggsound(world: Path, repo: Path, shards: int = 3) -> None:
    rows = []
    for row in json.loads((world / "train_qa.json").read_text()):
        ending = ("-0.wav", ".wav", "-0.mp4")[row["id"] % 3]
        name = row["video_name"]
        rows.append({"audio": sound(world, name, name + ending), "caption": "dog, barking"})
    for i in range(shards):
        name = f"data/train-{i:05d}-of-{shards:05d}.parquet"
        write_parquet(repo / name, rows[i::shards], "audio")
    write_parquet(repo / "data/test-00000-of-00001.parquet", rows[:1], "audio")


def publish_captions(world: Path, repo: Path) -> None:
    """Two tables, to be joined by id."""
    with open(world / "captions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    heard = ["id"]
    for i in (1, 2, 3):
        heard += [f"question_{i}", f"answer_{i}"]
    tables = {"AudioSetCaps_caption": ["id", "caption"], "Qwen-Audio_Q&A": heard}
    (repo / "Dataset").mkdir(parents=True)
    for table, columns in tables.items():
        with open(repo / f"Dataset/VGGSound_{table}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                asked = {"question_1": "Describe this audio according to the sounds in it."}
                asked["question_2"] = "Based on the QAs, give some information about the speech."
                asked["question_3"] = "Based on the QAs, give some information about the music."
                writer.writerow(row | asked)


def publish_arc(world: Path, repo: Path) -> None:
    rows = []
    for line in (world / "arc.jsonl").read_text().splitlines():
        row = json.loads(line)
        listed = row["question"]["choices"]
        choices = {name: [choice[name] for choice in listed] for name in ("text", "label")}
        answered = {"answerKey": row["answerKey"]}
        rows.append({"id": row["id"], "question": row["question"]["stem"], "choices": choices} | answered)
    write_parquet(repo / "ARC-Easy/train-00000-of-00001.parquet", rows)
    write_parquet(repo / "ARC-Easy/test-00000-of-00001.parquet", rows[:1])


def mmau_row(row: dict, audio: dict | None) -> dict:
    """The current repositories' columns: letters before the choices, the rest as JSON text."""
    lettered = [f"({'ABCDEFGH'[i]}) {choice}" for i, choice in enumerate(row["choices"])]
    answer = ""
    if row.get("answer"):
        answer = lettered[row["choices"].index(row["answer"])]
    names = ("id", "task", "dataset", "split", "category", "sub-category", "difficulty")
    others = {name: row[name] for name in names if name in row}
    published = {"context": audio, "instruction": row["question"], "choices": lettered, "answer": answer}
    return published | {"other_attributes": json.dumps(others)}


def publish_mmau(world: Path, root: Path) -> None:
    """Original: parquet with everything. v05.15.25: test-mini as one parquet, test with an archive beside."""
    mini = json.loads((world / "mmau.json").read_text())
    full = json.loads((world / "mmau-full.json").read_text())
    for split, rows in {"test_mini": mini, "test": full}.items():
        published = []
        for row in rows:
            texts = row | {"choices": json.dumps(row["choices"]), "answer": row.get("answer", "")}
            published.append(texts | {"audio": sound(world, row["id"], None)})
        for i in range(2):
            name = f"lmms-lab/mmau/data/{split}-{i:05d}-of-00002.parquet"
            half = -(-len(published) // 2)
            write_parquet(root / name, published[i * half : (i + 1) * half], "audio")
    current = json.loads((world / "mmau-v05.15.25.json").read_text())
    published = [mmau_row(row, sound(world, row["id"], None)) for row in current]
    write_parquet(root / "gamma-lab-umd/MMAU-test-mini/test_mini.parquet", published, "context")
    published = [mmau_row(row | {"split": "test"}, None) for row in full]
    write_parquet(root / "gamma-lab-umd/MMAU-test/test.parquet", published)
    clips = [find(world, row["id"]) for row in full]
    write_archive(root / "gamma-lab-umd/MMAU-test/test-audios.tar.gz", "test-audios", clips)


def publish_mmar(world: Path, repo: Path) -> None:
    rows = [json.loads(line) for line in (world / "mmar.jsonl").read_text().splitlines()]
    repo.mkdir(parents=True)
    (repo / "MMAR-meta.json").write_text(json.dumps(rows))
    clips = [find(world, Path(row["audio_path"]).stem) for row in rows]
    write_archive(repo / "mmar-audio.tar.gz", "audio", clips)


def publish_audiomcq(world: Path, repo: Path, count: int = 120) -> None:
    """One line a question, every clip beside it in folders by their source; some rows have an id."""
    rows = []
    for row in json.loads((world / "train_qa.json").read_text())[:count]:
        clip = find(world, row["video_name"])
        path = f"AudioSet/{clip.name}" if row["id"] % 2 else f"Clotho/sub/{clip.name}"
        question = {"question": row["question_text"], "choices": row["multi_choice"]}
        question["answer"] = row["multi_choice"][row["answer"]]
        question["audio_path"] = path
        question["source_dataset"] = path.split("/")[0]
        if row["id"] % 3:
            question["id"] = row["id"] // 2  # counted within its source
        rows.append(question)
        (repo / path).parent.mkdir(parents=True, exist_ok=True)
        (repo / path).write_bytes(clip.read_bytes())
    lines = [json.dumps(row) for row in rows]
    (repo / "data.jsonl").write_text("\n".join(lines) + "\n")


def publish(worlds: list[Path], root: Path) -> None:
    """The worlds as the hub's repositories under `root`; the sets are the first world's."""
    world = worlds[0]
    sets = root / "datasets"
    publish_avqa(world, sets / "gijs/avqa-processed")
    publish_vggsound(world, sets / "txya900619/vggsound-16k")
    publish_captions(world, sets / "baijs/AudioSetCaps")
    publish_arc(world, sets / "allenai/ai2_arc")
    publish_mmau(world, sets)
    publish_mmar(world, sets / "BoJack/MMAR")
    publish_audiomcq(world, sets / "Harland/AudioMCQ-StrongAC-GeminiCoT")
    for world in worlds:
        family = json.loads((world / "model/config.json").read_text())["model_type"]
        name = MODELS["qwen2audio" if family == "qwen2_audio" else "omni"]
        (root / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "models" / name).symlink_to((world / "model").resolve())


# ----------------------------------------------------------------------------------------- the server


class Handler(BaseHTTPRequestHandler):
    """The calls that huggingface_hub makes: a repository's files, HEAD with ETag, GET with Range."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        parts = path.split("/")
        if parts[0] == "api":
            self.describe(parts[1], "/".join(parts[2:4]), parts[4:5] == ["tree"])
            return
        if parts[0] == "datasets":
            parts = parts[1:]
            kind = "datasets"
        else:
            kind = "models"
        self.send_file(kind, "/".join(parts[:2]), "/".join(parts[4:]))

    do_HEAD = do_GET

    def describe(self, kind: str, repo: str, tree: bool) -> None:
        folder = self.server.root / kind / repo
        if not folder.is_dir():
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if tree:
            body = [{"type": "file", "path": f, "size": None, "oid": "0" * 40} for f in files]
        else:
            listed = [{"rfilename": f} for f in files]  # a size may be null or absent at the hub
            body = {"id": repo, "sha": COMMIT, "siblings": listed}
        self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def send_file(self, kind: str, repo: str, name: str) -> None:
        path = self.server.root / kind / repo / name
        if not path.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        status = 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first = int(asked[6:].split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data = data[first:]
            status = 206
        if self.command == "GET":
            self.server.asked.append(name)
            if self.server.random.random() < self.server.fail:
                self.misbehave(self.server.random.choice(self.server.ways), data, headers)
                return
        self.reply(status, data, headers)

    def misbehave(self, way: str, data: bytes, headers: dict) -> None:
        half = data[: len(data) // 2]
        if way == "busy":
            self.reply(503, b"busy")
        elif way == "error":
            self.reply(500, b"<html>oops</html>")
        elif way == "part":  # a proxy that gives a part for the whole
            self.reply(200, half, headers)
        else:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(half)
            self.close_connection = True

    def reply(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Hub(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.fail = 0.0  # share of the downloads that fail
        self.ways = ["busy", "error", "part", "cut"]
        self.random = random.Random(0)
        self.asked: list[str] = []  # the file of every GET
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--worlds", nargs="+", type=Path, required=True, help="worlds as tests/tiny.py makes them")
    add("--root", type=Path, required=True, help="folder of the repositories, made from the worlds if absent")
    add("--port_file", type=Path, required=True, help="file to write the URL to, once it listens")
    args = parser.parse_args()
    if not args.root.exists():
        scratch = args.root.with_name(args.root.name + ".writing")
        shutil.rmtree(scratch, ignore_errors=True)
        publish(args.worlds, scratch)
        scratch.rename(args.root)
    server = Hub(args.root)
    args.port_file.write_text(server.url)
    server.serve_forever()
