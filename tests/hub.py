"""A stand-in for the Hugging Face hub: serves the tiny world in the published layouts, for tests and the demo.

    python tests/hub.py --worlds DIR/omni [DIR/qwen2audio ...] --port_file FILE

huggingface_hub works with it unchanged through HF_ENDPOINT. Every repository has one commit. It can fail as real
servers do: cut a connection, be busy, send a part of a file as if it were the whole.
"""

import argparse
import csv
import hashlib
import json
import shutil
import tarfile
import urllib.parse
from pathlib import Path

import pyarrow
import pyarrow.parquet

from chat_server import Handler, Server

COMMIT = "c0ffee" + "0" * 34
MODELS = {"omni": "Qwen/Qwen2.5-Omni-7B", "qwen2audio": "Qwen/Qwen2-Audio-7B-Instruct"}


# -------------------------------------------------------------------------------- the published layouts


def find(world: Path, name: str) -> Path:
    """The clip of this name, whatever its ending and however its start second is written."""
    short = name
    if name[-6:].isdigit():
        short = f"{name[:-6]}{int(name[-6:])}"
    return next(path for stem in (name, short) for path in (world / "audio").glob(f"{stem}.*"))


def sound(world: Path, name: str, path: str | None) -> dict:
    return {"bytes": find(world, name).read_bytes(), "path": path}


def read_rows(path: Path) -> list[dict]:
    text = path.read_text()
    if path.suffix == ".jsonl":
        text = f"[{','.join(text.splitlines())}]"
    return json.loads(text)


def write_table(path: Path, rows: list[dict]) -> None:
    """A parquet file, or an Arrow stream as datasets.save_to_disk writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=100)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, 100)


def write_shards(form: str, rows: list[dict], count: int) -> None:
    size = -(-len(rows) // count)
    for i in range(count):
        path = Path(form.format(f"{i:05d}-of-{count:05d}"))
        write_table(path, rows[i * size : (i + 1) * size])


def write_archive(path: Path, clips: list[Path]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for clip in clips:
            archive.add(clip, f"audio/{clip.stem}.wav")
            archive.addfile(tarfile.TarInfo(f"__MACOSX/audio/._{clip.stem}.wav"))
        archive.addfile(tarfile.TarInfo("audio/.DS_Store"))


def publish_avqa(world: Path, repo: Path) -> None:
    rows = []
    for row in read_rows(world / "train_qa.json"):
        name = row["video_name"] + ".wav"
        choices = [f"{'ABCDEFGH'[i]}. {choice}" for i, choice in enumerate(row["multi_choice"])]
        question = {"question": row["question_text"] + "\nChoices:\n" + "\n".join(choices)}
        question |= {"file_name": name, "answer": choices[row["answer"]]}
        rows.append(question | {"audio": sound(world, row["video_name"], name)})
    write_shards(f"{repo}/train/data-{{}}.arrow", rows, 3)
    write_shards(f"{repo}/val/data-{{}}.arrow", rows[:2], 1)
    (repo / "train" / "state.json").write_text("{}")


def publish_vggsound(world: Path, repo: Path) -> None:
    rows = []
    for row in read_rows(world / "train_qa.json"):
        name = row["video_name"]
        ending = ("-0.wav", ".wav", "-0.mp4")[row["id"] % 3]
        rows.append({"audio": sound(world, name, name + ending), "caption": "dog, barking"})
    write_shards(f"{repo}/data/train-{{}}.parquet", rows, 3)
    write_shards(f"{repo}/data/test-{{}}.parquet", rows[:1], 1)


def publish_captions(world: Path, repo: Path) -> None:
    """Two tables, to be joined by id."""
    with open(world / "captions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    heard = ["id", "question_1", "answer_1", "question_2", "answer_2", "question_3", "answer_3"]
    tables = {"AudioSetCaps_caption": ["id", "caption"], "Qwen-Audio_Q&A": heard}
    (repo / "Dataset").mkdir(parents=True)
    for table, columns in tables.items():
        with open(repo / f"Dataset/VGGSound_{table}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="Describe this audio.", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def publish_arc(world: Path, repo: Path) -> None:
    rows = read_rows(world / "arc.jsonl")
    for row in rows:
        listed = row["question"]["choices"]
        row["choices"] = {name: [choice[name] for choice in listed] for name in ("text", "label")}
        row["question"] = row["question"]["stem"]
    write_shards(f"{repo}/ARC-Easy/train-{{}}.parquet", rows, 1)
    write_shards(f"{repo}/ARC-Easy/test-{{}}.parquet", rows[:1], 1)


def mmau_row(row: dict, audio: dict | None) -> dict:
    """The current repositories' columns: letters before the choices, the rest as JSON text."""
    choices = [f"({'ABCDEFGH'[i]}) {choice}" for i, choice in enumerate(row["choices"])]
    answer = ""
    if row.get("answer"):
        answer = choices[row["choices"].index(row["answer"])]
    others = {name: row[name] for name in row if name not in ("question", "choices", "answer", "audio_id")}
    published = {"context": audio, "instruction": row["question"], "choices": choices, "answer": answer}
    return published | {"other_attributes": json.dumps(others)}


def publish_mmau(world: Path, root: Path) -> None:
    """Original: parquet with everything. v05.15.25: test-mini as one parquet, test with an archive beside."""
    full = read_rows(world / "mmau-full.json")
    for split, rows in {"test_mini": read_rows(world / "mmau.json"), "test": full}.items():
        published = []
        for row in rows:
            texts = row | {"choices": json.dumps(row["choices"]), "answer": row.get("answer", "")}
            published.append(texts | {"audio": sound(world, row["id"], None)})
        write_shards(f"{root}/lmms-lab/mmau/data/{split}-{{}}.parquet", published, 2)
    current = read_rows(world / "mmau-v05.15.25.json")
    published = [mmau_row(row, sound(world, row["id"], None)) for row in current]
    write_table(root / "gamma-lab-umd/MMAU-test-mini/test_mini.parquet", published)
    test = root / "gamma-lab-umd/MMAU-test"
    write_table(test / "test.parquet", [mmau_row(row | {"split": "test"}, None) for row in full])
    write_archive(test / "test-audios.tar.gz", [find(world, row["id"]) for row in full])


def publish_mmar(world: Path, repo: Path) -> None:
    rows = read_rows(world / "mmar.jsonl")
    repo.mkdir(parents=True)
    (repo / "MMAR-meta.json").write_text(json.dumps(rows))
    write_archive(repo / "mmar-audio.tar.gz", [find(world, Path(row["audio_path"]).stem) for row in rows])


def publish_audiomcq(world: Path, repo: Path) -> None:
    """One line a question, every clip beside it in folders by their source; some rows have an id."""
    lines = []
    for row in read_rows(world / "train_qa.json")[:120]:
        clip = find(world, row["video_name"])
        source = ("Clotho/sub", "AudioSet")[row["id"] % 2]
        question = {
            "question": row["question_text"],
            "choices": row["multi_choice"],
            "answer": row["multi_choice"][row["answer"]],
            "audio_path": f"{source}/{clip.name}",
            "source_dataset": source,
        }
        if row["id"] % 3:
            question["id"] = row["id"] // 2  # counted within its source
        lines.append(json.dumps(question))
        (repo / source).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, repo / source)
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
        name = MODELS["omni"]
        if "qwen2_audio" in (world / "model/config.json").read_text():
            name = MODELS["qwen2audio"]
        (root / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "models" / name).symlink_to((world / "model").resolve())


# ----------------------------------------------------------------------------------------- the server


class HubHandler(Handler):
    """The calls that huggingface_hub makes: a repository's files, HEAD with ETag, GET."""

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        parts = path.removeprefix("api/").split("/")
        kind = "models"
        if parts[0] in ("models", "datasets"):
            kind = parts.pop(0)
        folder = self.server.root / kind / "/".join(parts[:2])
        if path.startswith("api/"):
            self.describe(folder, "tree" in parts)
        else:
            self.send_file(folder, "/".join(parts[4:]))

    do_HEAD = do_GET

    def describe(self, folder: Path, tree: bool) -> None:
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if not files:
            self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        listed = []
        for file in files:  # a size may be null at the hub
            size = (folder / file).stat().st_size if file.endswith(".safetensors") else None
            listed.append({"type": "file", "path": file, "rfilename": file, "size": size, "oid": "0" * 40})
        body = {"id": folder.name, "sha": COMMIT, "siblings": listed}
        if tree:
            body = listed
        self.reply(200, body, {"Content-Type": "application/json"})

    def send_file(self, folder: Path, name: str) -> None:
        if not (folder / name).is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        replies = [(200, data, headers)]
        if self.command == "GET":
            self.server.asked.append(name)
            if self.server.random.random() < self.server.fail:
                replies = [(503, b"busy", {}), (500, b"<html>oops</html>", {})]
                replies.append((200, data[::2], headers))  # a proxy gives a part for the whole
                replies.append((200, data, headers, 0.5))  # the connection is cut
        self.reply(*self.server.random.choice(replies))


class Hub(Server):
    def __init__(self, root: Path):
        super().__init__(HubHandler)
        self.root = root
        self.asked: list[str] = []  # the file of every GET


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
