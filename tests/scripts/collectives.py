"""For test_gpu.py: the collectives of one step under several layouts, counted.

    torchrun --nproc_per_node 2 tests/scripts/collectives.py OUT.json '["--model", "M", ...]' '[...]' ...

Writes a list with, for each list of train.py's options: all-gathers, reduce-scatters, sharded groups, passes.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist
from dump_gradients import COLLECTIVES, count_collectives
from torch.distributed.fsdp import FSDPModule

import fsdp
from data import check_clips, load_questions
from train import Run, parse, set_batch


def main() -> None:
    rank, world, device = fsdp.start_processes()
    found = []
    for options in sys.argv[2:]:
        config = parse(json.loads(options))
        set_batch(config, world)
        run = Run(config, load_questions(config, check_clips), device)
        asked = next(run.batches())
        norms = {}
        clip = fsdp.clip_gradients

        def both(parameters, most, norms=norms, clip=clip):
            whole = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            norms["norm of torch"] = whole.full_tensor().item()
            norms["norm"] = clip(parameters, most)
            return norms["norm"]

        fsdp.clip_gradients = both
        count_collectives()
        run.take_step(asked)
        fsdp.clip_gradients = clip
        groups = [module for module in run.policy.modules() if isinstance(module, FSDPModule)]
        passes = -(-len(asked) // run.layout.questions_per_pass)
        found.append({**COLLECTIVES, **norms, "groups": len(groups), "passes": passes})
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
