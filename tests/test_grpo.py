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
