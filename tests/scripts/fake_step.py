"""For test_plan.py: the peak memory of a whole step at a model's real size, on tensors that have no data.

    python tests/scripts/fake_step.py GPUS PROMPT_TOKENS CLIP_SECONDS --out FILE [options of train.py]

One process of a fake process group runs train.Run's own step. Weights and what is computed with them are fake
(a shape and a device); token ids and what is computed of them alone are real, so that prompts, masks and
responses are packed as in a run. Every answer is as long as --max_new_tokens, of which two are drawn. The bytes
of all live storages are counted after every operation. What the run keeps in host memory is left out, what it
copies to the GPU on the way is added: all of it is on the "cpu" here. Writes one JSON object: the plan's bytes of
the rollout and of what follows it, and the most that was measured there.
"""

import gc
import json
import math
import sys
import weakref
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_collectives as collectives
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_group
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fsdp  # first of ours: it sets what torch reads when it is imported
import model
import plan
import weights
from data import Asked, Question
from reward import accuracy_reward
from train import Run, parse

aten = torch.ops.aten


class Memory:
    """Bytes of the live storages on the GPU, and the most there have been."""

    def __init__(self):
        self.now = 0
        self.peak = 0
        self.sizes = {}
        self.hosts = set()  # storages that a run has in host memory

    def track(self, tensor: torch.Tensor) -> None:
        storage = fsdp.local(tensor).untyped_storage()
        key = storage._cdata
        if key in self.hosts:
            return
        if key not in self.sizes:
            weakref.finalize(storage, self.free, key)
        self.now += storage.nbytes() - self.sizes.get(key, 0)
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
        self.hosts.discard(key)

    def on_host(self, tensor: torch.Tensor) -> None:
        key = fsdp.local(tensor).untyped_storage()._cdata
        self.now -= self.sizes.pop(key, 0)
        self.hosts.add(key)

    def most(self) -> int:
        """Since this was last asked."""
        peak = self.peak
        self.peak = self.now
        return peak


class Watch(TorchDispatchMode):
    """Runs what comes from real tensors alone for real, all else without data, and keeps count."""

    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is aten.multinomial.default:
            return for_real(torch.zeros, (*args[0].shape[:-1], args[1]), dtype=torch.int64)
        if operation is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0 if args[0].dtype in (torch.int64, torch.bool) else 0.0
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(fsdp.local(t), FakeTensor) or t.is_meta for t in tensors):
            return for_real(operation, *args, **kwargs)
        result = operation(*args, **kwargs)
        if not tensors and isinstance(result, torch.Tensor) and not result.is_floating_point():
            return for_real(operation, *args, **kwargs)  # made of nothing: positions, masks, counts
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and isinstance(fsdp.local(leaf), FakeTensor):
                self.memory.track(leaf)
        return result


def for_real(operation, *args, **kwargs):
    with unset_fake_temporarily():
        return operation(*args, **kwargs)


def watch_fsdp(memory: Memory) -> None:
    """FSDP resizes storages behind the dispatcher, and copies from and to the host where there is one."""
    for name in ("alloc_storage", "free_storage"):
        for place in (fsdp_param, fsdp_group):
            if hasattr(place, name):
                setattr(place, name, partial(track_after, getattr(fsdp_param, name), memory))
    inputs = fsdp_param.FSDPParam.all_gather_inputs.fget

    def copied_inputs(self):
        if not self.offload_to_cpu:
            return inputs(self)
        shard = self._sharded_param_data.clone()  # the copy on the GPU, in fp32, that is then cast
        return [shard.to(self.param_dtype or shard.dtype)]

    fsdp_param.FSDPParam.all_gather_inputs = property(copied_inputs)
    reduce = collectives.foreach_reduce

    def reduced(parameters, *args, **kwargs):
        result = reduce(parameters, *args, **kwargs)
        for parameter in parameters:
            if parameter.offload_to_cpu:
                memory.on_host(parameter.sharded_param.grad)
        return result

    fsdp_group.foreach_reduce = reduced


def track_after(change, memory: Memory, tensor: torch.Tensor) -> None:
    change(tensor)
    memory.track(tensor)


def to_empty(lm, *, device) -> None:
    """nn.Module.to_empty swaps tensors, which fake ones that are not sharded do not allow."""
    if any(hasattr(p, "to_local") for p in lm.parameters()):
        torch.nn.Module.to_empty(lm, device=device)
        return
    for module in lm.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                empty = None if tensor is None else torch.empty_like(tensor, device=device)
                if tensors is module._parameters and empty is not None:
                    empty = torch.nn.Parameter(empty, tensor.requires_grad)
                tensors[name] = empty


def shorten_rollout(policy, memory: Memory, measured: dict) -> None:
    """Of the rollout run the prefill and one token; the others are made up."""
    generate = policy.generate

    def short(prompts, max_new_tokens, group_size, **named):
        memory.most()
        generate(prompts, 2, group_size=group_size, **named)
        measured["rollout"] = max(measured.get("rollout", 0), memory.most())
        with unset_fake_temporarily():
            response = torch.zeros(max_new_tokens, dtype=torch.int64)
        return [[response] * group_size] * len(prompts)

    policy.generate = short


def question(lm, tokens: int, seconds: float) -> Asked:
    frames = round(100 * seconds)
    count = model.audio_tokens
    if lm.prompts.family is model.QWEN3_OMNI:
        count = model.omni3._get_feat_extract_output_lengths
    heard = count(frames) if frames else 0
    ids = torch.ones(tokens, dtype=torch.int64)
    ids[5 : 5 + heard] = lm.prompts.audio_token_id
    features = None
    if frames:
        mels = lm.model.config.audio_config.num_mel_bins
        features = torch.zeros(mels, frames + model.LOOK_AHEAD)
    asked = Question("1", "?", ("a", "b"), "a", None, {})
    return Asked(1, 0, asked, model.Prompt(ids, features, frames), ())


def main() -> None:
    gpus, tokens, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    config = parse(sys.argv[4:])
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    memory = Memory()
    watch_fsdp(memory)
    weights.read_weights = lambda lm: None
    model.AudioLM.to_empty = to_empty
    model.check_weights = lambda *checked: None
    fsdp.gather_objects = lambda value: [value] * gpus
    plan.available_host_memory = lambda: math.inf
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False

    run = Run.__new__(Run)
    run.config = config
    run.rank = run.step = 0
    run.world = gpus
    run.device = torch.device("cpu")
    run.dtype = torch.bfloat16
    run.hears = seconds > 0
    run.reward = accuracy_reward
    measured = {}
    with FakeTensorMode(allow_non_fake_inputs=True), Watch(memory):
        run.load_models(seconds)
        kept = []
        for state in run.optimizer.state.values():
            kept += [state["exp_avg"], state["exp_avg_sq"]]
        if run.layout.offload.startswith("on"):
            kept += run.policy.parameters()
        if "reference" in run.layout.offload:
            kept += run.reference.parameters()
        for tensor in kept * (run.layout.offload != "off"):
            memory.on_host(tensor)
        for lm in (run.policy, run.reference):
            for parameter in getattr(lm, "parameters", list)():  # LoRA's reference has none of its own
                memory.track(parameter)
        gc.collect()
        shorten_rollout(run.policy, memory, measured)
        count = config.batch // gpus
        with unset_fake_temporarily():
            asked = [question(run.policy, tokens, seconds) for _ in range(count)]
        run.take_step(asked)
        measured["training"] = memory.most()
    passing = plan.passing_bytes(run.plan)
    lasting = sum(run.plan.gpu.values()) - max(passing.values())
    training = lasting + max(passing["backward"], passing["end"])
    planned = {"rollout": lasting + passing["rollout"], "training": training}
    found = {"layout": str(run.layout), "planned": planned, "measured": measured}
    Path(config.out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
