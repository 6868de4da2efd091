"""For test_train.py: one step's accumulated gradients, responses, shard sizes and collectives, on any number of processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from data import load_questions
from train import Run, parse
from weights import gather, groups, start_processes

COLLECTIVES = {"all_gather_single": 0, "reduce_scatter_single": 0}


def counting(name):
    """torch.distributed's collective, counted; FSDP2 looks it up there at every call."""
    original = getattr(dist, name)

    def counted(*args, **kwargs):
        COLLECTIVES[name] += 1
        return original(*args, **kwargs)

    setattr(dist, name, counted)


def local_bytes(tensors):
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


if __name__ == "__main__":
    config = parse()
    rank, world, device = start_processes()
    run = Run(config, rank, world, device, load_questions(config, rank, world, gather))
    sizes = {"weights, fp32 shards": local_bytes(run.policy.parameters())}
    sizes["reference"] = local_bytes(run.reference.parameters())
    for name in COLLECTIVES:
        counting(name)
    _, transcript = run.accumulate(run.batches())
    gradients = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
        for name, p in run.parameters.items()
        if p.grad is not None
    }
    responses = [part[i] for i in range(config.accumulation) for part in gather(transcript)]
    moments = [s[key] for s in run.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    about = {
        "gradients": gradients,
        "responses": responses,
        "bytes": sizes
        | {
            "gradients, fp32 shards": local_bytes(p.grad for p in run.parameters.values()),
            "AdamW moments, fp32 shards": local_bytes(moments),
        },
        "plan": run.plan.gpu,
        "collectives": dict(COLLECTIVES),
        "groups": len(groups(run.policy.model)) + 1,  # and the rest
    }
    if rank == 0:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        torch.save(about, out / "step.pt")
    dist.destroy_process_group()
