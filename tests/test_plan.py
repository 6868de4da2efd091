"""What a run takes, known before it starts: the arithmetic of the published models, and what the plan chooses."""

import json
import sys

import pytest
import torch

from conftest import DATA
from data import InputError
from plan import choose_plan, make_plan
from train import Config, main
from weights import empty_model

GIB = 2**30
GB_48 = 47.5 * GIB  # what a 48 GB card reports
CPU = torch.device("cpu")


@pytest.fixture(
    scope="module", params=["Qwen/Qwen2.5-Omni-7B", "Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2-Audio-7B-Instruct"]
)
def published(request, tmp_path_factory):
    """(name, folder with its config.json alone, the model on the meta device)."""
    if not DATA.exists():
        pytest.skip(f"dimensions of the published models are not at {DATA}")
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text(
        json.dumps(json.loads((DATA / "model-dimensions.json").read_text())[request.param])
    )
    return request.param, folder, empty_model(folder)


def test_the_papers_run_fits_four_gpus_of_48_gb(published):
    name, _, model = published
    plan = choose_plan(model, 4, torch.bfloat16, Config(gpu_memory=47.5), CPU)
    assert sum(plan.gpu.values()) <= GB_48
    kept = make_plan(
        model, 4, torch.bfloat16, Config(), reshard=False, checkpointing=False, cpu_offload=False
    )
    if name.endswith(
        "Omni-7B"
    ):  # DESIGN.md's arithmetic: 33.3 GiB of fp32 state, 4.2 of reference, 16.6 gathered
        state = sum(value for what, value in kept.gpu.items() if "fp32 shards" in what)
        assert state / GIB == pytest.approx(33.3 - 2.5, rel=0.01)
        assert kept.gpu["reference"] / GIB == pytest.approx(4.2 - 0.3, rel=0.03)
        assert kept.gpu["gathered weights"] / GIB == pytest.approx(16.6 - 1.3, rel=0.01)
        assert sum(kept.gpu.values()) > GB_48 and plan.reshard
        assert plan.disk["checkpoints"] / 3 == pytest.approx(100e9, rel=0.1)  # one checkpoint is about 100 GB


def test_more_is_given_up_only_where_memory_asks_for_it(published):
    _, _, model = published
    given_up = []
    for memory in (640, 80, 48, 24):
        try:
            plan = choose_plan(model, 4, torch.bfloat16, Config(gpu_memory=memory), CPU)
        except InputError:
            break
        given_up.append((plan.reshard, plan.checkpointing, plan.cpu_offload))
    assert given_up == sorted(given_up) and given_up[0] == (False, False, False) and len(given_up) >= 3


def test_what_cannot_fit_is_refused_with_what_would_help(published, monkeypatch, capsys):
    name, folder, _ = published
    arguments = ["--plan", "--model", str(folder), "--world_size", "1", "--gpu_memory", "6"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and "does not fit" in error and "--cpu_offload on" in error


def test_plan_prints_a_table_without_weights(published, monkeypatch, capsys):
    _, folder, _ = published
    monkeypatch.setattr(
        sys, "argv", f"train.py --plan --model {folder} --world_size 4 --gpu_memory 80".split()
    )
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().out
    assert end.value.code == 0 and all(
        word in printed for word in ("each GPU", "host memory", "disk", "activations")
    )
