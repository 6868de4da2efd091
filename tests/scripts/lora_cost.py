"""What a step of bench.py's middle model takes: python tests/scripts/lora_cost.py FOLDER RANK (0: all weights).

Prints one JSON object: "mb" (the peak above what the process had before the model was there, the system's own
count) and "seconds" (the best of some steps of one question, as in bench.py, with its 10 s clip, G = 4).
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import bench
import data
import fsdp
import train

STEPS = 6


def question_file(folder: Path) -> Path:
    """A question file with the bench's question."""
    question = bench.the_question(folder)
    path = folder / "questions.jsonl"
    row = {"id": "0", "question": question.question, "choices": list(question.choices)}
    path.write_text(json.dumps({**row, "answer": question.answer, "audio_id": "clip.wav"}))
    return path


def status(name: str) -> int:
    """MiB, from the kernel's own account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) // 1024


def main() -> None:
    folder = Path(sys.argv[1]) / "omni"
    if not folder.exists():
        bench.middle_model(Path(sys.argv[1]), "omni")
    config = train.parse(
        ["--model", str(folder), "--data", str(question_file(folder)), "--audio_dir", str(folder),
         "--lora", sys.argv[2], "--lr", "1e-5", "--steps", str(STEPS), "--batch", "1",
         "--max_new_tokens", "8", "--workers", "0", "--out", str(folder)]
    )  # fmt: skip
    rank, world, device = fsdp.start_processes()
    loaded = data.load_questions(config, data.check_clips)
    before = status("VmRSS")
    run = train.Run(config, rank=rank, world=world, device=device, loaded=loaded)
    batches = run.batches()
    times = []
    for _ in range(STEPS):
        asked = next(batches)
        started = time.perf_counter()
        run.take_step(asked)
        times.append(time.perf_counter() - started)
    print(json.dumps({"mb": status("VmHWM") - before, "seconds": min(times[1:])}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
