"""Laws of the equations (Section III-B): vectorised = written out, and what they say about groups."""

import math
import statistics

import pytest
import torch

from grpo import group_advantages, grpo_loss, kl_divergence

LONGEST = 16  # what dr_grpo divides by


def written_out(kind, logps, old_logps, ref_logps, advantages, lengths, epsilon, beta):
    """Eq. 3 and 4 as loops over numbers; and what GRPOTrainer._compute_loss of TRL 0.24 makes of the sums over
    tokens with loss_type "dapo" (of one process) and "dr_grpo".
    """
    total = 0.0
    for i, length in enumerate(lengths):
        over_tokens = 0.0
        for t in range(length):
            rho = (logps[i, t] - old_logps[i, t]).exp()
            clipped = min(max(rho, 1 - epsilon), 1 + epsilon)
            over_tokens += min(rho * advantages[i], clipped * advantages[i])
            if beta:
                ratio = (ref_logps[i, t] - logps[i, t]).exp()
                over_tokens -= beta * (ratio - ratio.log() - 1)
        total += over_tokens / {"grpo": length, "dapo": statistics.mean(lengths), "dr_grpo": LONGEST}[kind]
    return -total / len(lengths)


@pytest.mark.parametrize("updated", [False, True], ids=["first update", "second update"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.04, 0.0])
def test_loss_and_gradient_equal_eq_3_written_out_and_trls_variants(kind, updated, beta):
    lengths = [1, 7, 4, 6, 3]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(1)
    old, ref, now = (-2 * torch.rand(3, 5, 7, dtype=torch.float64, generator=generator)).unbind()
    logps = now if updated else old
    logps = logps.where(mask, math.nan).requires_grad_()  # padding may hold anything
    if not beta:
        ref = None
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64))
    expected = written_out(kind, logps, old, ref, advantages, lengths, 0.2, beta)
    length = {"grpo": None, "dapo": statistics.mean(lengths), "dr_grpo": LONGEST}[kind]
    loss, metrics = grpo_loss(logps, old, ref, advantages, mask, 0.2, beta, length=length)
    assert abs(loss - expected) <= 1e-12
    (theirs,) = torch.autograd.grad(expected, logps)
    (ours,) = torch.autograd.grad(loss, logps)
    assert (ours - theirs).abs().max() <= 1e-12 and theirs.abs().max() > 0
    assert (metrics["clip_ratio"] > 0) == updated and (metrics["kl"] > 0) == (beta > 0)


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_are_eq_1_or_dr_grpos_and_equal_rewards_teach_exactly_nothing(scale):
    rewards = [1.0, 0, 0, 1, 0.5, 0]
    advantages = group_advantages(torch.tensor([rewards, [0.3] * 6, [0.1] * 6, [1e5 / 3] * 6]), scale=scale)
    divisor = statistics.stdev(rewards) + 1e-4 if scale else 1
    expected = [(reward - statistics.mean(rewards)) / divisor for reward in rewards]
    assert advantages[0].tolist() == pytest.approx(expected)
    assert not advantages[1:].any()


def test_kl_estimate_is_zero_only_where_the_policies_agree_and_unbiased():
    logits = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logps, ref = logits.log_softmax(-1)
    estimate = kl_divergence(logps, ref)
    assert (estimate > 0).all() and not kl_divergence(logps, logps).any()
    mean, divergence = (logps.exp() * torch.stack([estimate, logps - ref])).sum(-1)
    assert mean == pytest.approx(divergence.item())  # KL(pi || ref)
