"""For test_train.py: one step's gradients, responses, shard sizes and collectives, on any number of processes."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

import fsdp
import plan
from data import check_clips, load_questions
from train import Run, parse, set_batch


def count(name: str, calls: dict[str, int]) -> None:
    """torch.distributed's collective, counted from now on; FSDP2 looks it up there at every call."""
    original: Callable = getattr(dist, name)
    calls[name] = 0

    def counted(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    setattr(dist, name, counted)


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(fsdp.local(tensor).nbytes for tensor in tensors)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> None:
    config = parse()
    rank, world, device = fsdp.start_processes()
    set_batch(config, world)
    run = Run(config, load_questions(config, check_clips), device)
    sizes = {"weights, fp32 shards": local_bytes(run.policy.parameters())}
    sizes["reference"] = local_bytes(run.reference.parameters())
    calls = {}
    for name in ("all_gather_single", "reduce_scatter_single"):
        count(name, calls)
    asked = next(run.batches())
    run.update = lambda rollouts: None
    _, rollouts = run.take_step(asked)
    gradients = {}
    for name, p in run.parameters.items():
        if p.grad is not None:
            gradients[name] = whole(p.grad)
    said = {}
    for rollout in rollouts:
        for one, texts in zip(rollout.asked, rollout.texts, strict=True):
            said[one.k] = texts
    everything = {}
    for part in fsdp.gather_objects(said):
        everything.update(part)
    moments = [state[key] for state in run.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    sizes["gradients, fp32 shards"] = local_bytes(p.grad for p in run.parameters.values())
    sizes["AdamW moments, fp32 shards"] = local_bytes(moments)
    about = {
        "gradients": gradients,
        "responses": [everything[k] for k in sorted(everything)],
        "bytes": sizes,
        "plan": plan.lasting_bytes(run.plan),
        "passes": len(rollouts),
        **calls,
        "groups": len(fsdp.groups(run.policy.model)) + 1,  # and the rest
    }
    if rank == 0:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        torch.save(about, out / "step.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
