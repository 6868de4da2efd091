"""For test_train.py: what loading takes beyond the shards, summed over processes, as a share of a bf16 copy of the weights."""

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

from fsdp import gather_objects, shard, start_processes
from model import empty_lm, load_weights


def anonymous_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def main(path, small):
    rank, world, device = start_processes()
    mesh = dist.init_device_mesh("cpu", (world,))

    def load(folder):
        lm = empty_lm(folder)
        shard(lm, mesh, torch.float32, reshard=False)
        return load_weights(lm, device, compute=device)

    load(small)  # what imports and first calls take
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    lm = load(path)
    done.set()
    thread.join()
    shards = sum(p.to_local().nbytes for p in lm.parameters())
    beyond = sum(gather_objects(peak - before - shards))
    if rank == 0:
        print(beyond / sum(2 * p.numel() for p in lm.parameters()))


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads of the two meshes can abort Python's own way out
