"""For test_train.py: one optimizer step's accumulated gradients and responses, under any number of
processes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from train import Run, gather, load_questions, parse, start_processes

if __name__ == "__main__":
    config = parse()
    rank, world, device = start_processes()
    run = Run(config, rank, world, device, load_questions(config, rank, world))
    _, transcript = run.accumulate(run.batches())
    gradients = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
        for name, p in run.parameters.items()
        if p.grad is not None
    }
    responses = [part[i] for i in range(config.accumulation) for part in gather(transcript)]
    if rank == 0:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        torch.save({"gradients": gradients, "responses": responses}, out / "gradients.pt")
    torch.distributed.destroy_process_group()
