"""Laws of the equations (Section III-B): vectorised = written out, and what they say about groups."""

import math

import pytest
import torch

from grpo import group_advantages, grpo_loss, kl_divergence


def written_out(logps, old_logps, ref_logps, advantages, lengths, epsilon, beta):
    """Eq. 3 and 4 with plain Python loops over plain Python lists."""
    total = 0.0
    for i, length in enumerate(lengths):
        over_tokens = 0.0
        for t in range(length):
            rho = math.exp(logps[i][t] - old_logps[i][t])
            clipped = min(max(rho, 1 - epsilon), 1 + epsilon)
            surrogate = min(rho * advantages[i], clipped * advantages[i])
            ratio = math.exp(ref_logps[i][t] - logps[i][t])
            over_tokens += surrogate - beta * (ratio - math.log(ratio) - 1)
        total += over_tokens / length
    return -total / len(lengths)


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_eq_3_written_out(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths, T = [1, 7, 4, 6], 7
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    logps, old, ref = (-torch.rand(3, 4, T, generator=generator, dtype=torch.float64) * 2).unbind()
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 1], dtype=torch.float64))
    logps = logps.where(mask, math.nan).requires_grad_()  # padding may hold anything
    loss, metrics = grpo_loss(logps, old, ref, advantages, mask, epsilon=0.2, beta=0.04)
    args = (old.tolist(), ref.tolist(), advantages.tolist(), lengths, 0.2, 0.04)
    assert loss.item() == pytest.approx(written_out(logps.tolist(), *args), rel=1e-12)
    assert 0 < metrics["clip_ratio"] < 1 and metrics["kl"] > 0

    (gradient,) = torch.autograd.grad(loss, logps)
    assert (gradient[~mask] == 0).all()
    for i, length in enumerate(lengths):
        for t in range(length):
            nudged = {}
            for step in (-1e-6, 1e-6):
                values = logps.tolist()
                values[i][t] += step
                nudged[step] = written_out(values, *args)
            slope = (nudged[1e-6] - nudged[-1e-6]) / 2e-6
            assert gradient[i, t].item() == pytest.approx(slope, abs=1e-8)


def test_advantages_are_centred_scaled_and_vanish_for_equal_rewards():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    advantages = group_advantages(rewards)
    assert advantages.sum(-1).abs().max() < 1e-5
    assert (advantages[1:3] == 0).all()
    assert advantages[0, 0] == pytest.approx(0.75 / (0.5 + 1e-4))  # sample std of (1, 0, 0, 0) is 0.5
    assert torch.equal(advantages, torch.stack([group_advantages(group) for group in rewards]))


def test_kl_estimate_is_zero_only_where_the_policies_agree_and_unbiased():
    logits, ref_logits = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, logps, ref = logits.softmax(-1), logits.log_softmax(-1), ref_logits.log_softmax(-1)
    estimate = kl_divergence(logps, ref)
    assert (estimate >= 0).all() and (kl_divergence(logps, logps) == 0).all()
    assert (p * estimate).sum() == pytest.approx(
        (p * (logps - ref)).sum().item()
    )  # its mean is KL(pi || ref)


def test_without_beta_no_reference_is_needed():
    logps = torch.randn(2, 3, requires_grad=True)
    loss, metrics = grpo_loss(
        logps, logps.detach(), None, torch.tensor([1.0, -1.0]), torch.ones(2, 3) > 0, beta=0
    )
    assert loss.item() == pytest.approx(0, abs=1e-7) and metrics["kl"] == 0


def trl_loss(kind, logps, old_logps, ref_logps, advantages, mask, lengths, settings):
    """GRPOTrainer._compute_loss of TRL 0.24 (trl/trainer/grpo_trainer.py), its branches written out."""
    coef_1 = torch.exp(logps - old_logps)
    coef_2 = torch.clamp(coef_1, 1 - settings["epsilon"], 1 + settings["epsilon"])
    per_token_loss = -torch.min(coef_1 * advantages.unsqueeze(1), coef_2 * advantages.unsqueeze(1))
    if settings["beta"] != 0.0:
        per_token_kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
        per_token_loss = per_token_loss + settings["beta"] * per_token_kl
    if kind == "grpo":
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if kind == "dr_grpo":
        return (per_token_loss * mask).sum() / (per_token_loss.size(0) * settings["max_completion_length"])
    assert kind == "dapo"
    # num_items_in_batch / num_processes, of one process
    return (per_token_loss * mask).sum() / lengths.sum()


@pytest.mark.parametrize("updated", [False, True], ids=["first update", "second update"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.04, 0.0])
def test_loss_and_gradient_of_each_variant_are_trls(kind, updated, beta):
    lengths = torch.tensor([1, 7, 4, 6, 3])
    mask = torch.arange(7) < lengths[:, None]
    old, ref, now = (
        -torch.rand(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ).unbind()
    logps = (now if updated else old).clone().requires_grad_()
    advantages = group_advantages(
        torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64), scale=kind != "dr_grpo"
    )
    settings = {"epsilon": 0.2, "beta": beta, "max_completion_length": 16}
    expected = trl_loss(kind, logps, old, ref, advantages, mask.double(), lengths, settings)
    length = {"grpo": None, "dr_grpo": 16, "dapo": lengths.sum().item() / 5}[kind]
    loss, metrics = grpo_loss(logps, old, ref, advantages, mask, 0.2, beta, length=length)
    assert abs(loss - expected) <= 1e-12
    (theirs,) = torch.autograd.grad(expected, logps)
    (ours,) = torch.autograd.grad(loss, logps)
    assert (ours - theirs).abs().max() <= 1e-12 and theirs.abs().max() > 0
    assert (metrics["clip_ratio"] > 0) == updated


def test_a_group_of_equal_rewards_teaches_exactly_nothing():
    for value in (0.3, 0.1, 1e5 / 3):
        for scale in (True, False):
            assert not group_advantages(torch.full((6,), value), scale=scale).any()


def test_without_scaling_the_advantage_is_dr_grpos():
    rewards = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]])
    assert torch.equal(group_advantages(rewards, scale=False), expected)
