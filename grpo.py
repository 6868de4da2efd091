"""Group Relative Policy Optimization (Section III-B): Eq. 1, 3 and 4 as pure functions, then one question's
step.

Departs from GRPO's original in what the paper leaves open: the advantage divides by (sample std + 1e-4), as
in the work that the paper builds on [7]; one update per rollout, so the ratio of Eq. 3 is 1 and its gradient
is the policy gradient; the clip is there for callers that update more often.
"""

import time

import torch

from reward import accuracy_reward


def group_advantages(rewards):
    """Eq. 1: how much better each response is than its group. rewards (..., G) -> advantages (..., G)."""
    mean, std = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)  # 1e-4: a group of equal rewards teaches nothing


def kl_divergence(logps, ref_logps):
    """Eq. 4, never negative: r - log r - 1 with r = pi_ref / pi. Twice (..., T) -> (..., T)."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, epsilon=0.2, beta=0.04):
    """Eq. 3 for one group, negated to be minimised.

    logps, old_logps, ref_logps (N, T): log-probs under the policy, the policy that sampled, the reference
    (None when beta is 0). advantages (N,). mask (N, T) bool: the tokens of each response. Every response
    weighs the same, whatever its length. Returns (scalar loss, dict of floats: kl, clip_ratio).
    """
    # Padding may hold anything, and what is put out of the sum only after exp() still sends back a NaN.
    logps, old_logps = torch.where(mask, logps, 0.0), torch.where(mask, old_logps, 0.0)
    ratio = (logps - old_logps).exp()  # rho_{i,t}
    advantages = advantages.unsqueeze(1)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    objective = torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(logps)
    if beta:
        kl = kl_divergence(logps, torch.where(mask, ref_logps, 0.0))
        objective = objective - beta * kl
    loss = -response_mean(objective, mask).mean()
    clip_ratio = response_mean((clipped < unclipped).float(), mask).mean()
    return loss, {"kl": response_mean(kl.detach(), mask).mean().item(), "clip_ratio": clip_ratio.item()}


def response_mean(values, mask):
    """(1/|o_i|) sum over t of Eq. 3: (N, T) -> (N,)."""
    return (values * mask).sum(-1) / mask.sum(-1)


def question_loss(policy, reference, prompt, question, config, generator):
    """One question from prompt to loss: rollout, rewards (Eq. 2), advantages (Eq. 1), log-probs, Eq. 3.

    `policy` and `reference` (None when beta is 0) are model.AudioLM; `config` has group_size, max_new_tokens,
    temperature, epsilon, beta and strict. Returns (loss with its graph, metrics, response texts). Where the
    policy's weights stay gathered, the rollout's prefill keeps its graph and is the prompt half of the
    scoring; the reference is then scored in the same two parts, so that the KL of the first step is exactly
    0.
    """
    started = clock()
    prefill = None if policy.lockstep else policy.prefill([prompt])
    sampling = (config.group_size, config.max_new_tokens, config.temperature, generator)
    responses = policy.sample_from(prefill, *sampling)[0] if prefill else policy.sample(prompt, *sampling)
    rolled_out = clock()

    texts = [policy.decode(response) for response in responses]
    rewards = torch.tensor(
        [accuracy_reward(t, question.answer, question.choices, config.strict) for t in texts]
    )
    advantages = group_advantages(rewards).to(policy.device)

    logps, mask, entropy = policy.score(prompt, responses, prefill)
    ref_logps = None
    if reference is not None:
        with torch.no_grad():
            ref_prefill = reference.prefill([prompt]) if prefill else None
            ref_logps = reference.score(prompt, responses, ref_prefill)[0]
    loss, metrics = grpo_loss(logps, logps.detach(), ref_logps, advantages, mask, config.epsilon, config.beta)
    lengths = [float(len(response)) for response in responses]
    ended = [bool(torch.isin(response[-1], policy.eos)) for response in responses]
    metrics |= {
        "loss": loss.item(),
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "frac_reward_zero_std": float(rewards.std() == 0),
        "entropy": entropy.item(),
        "completion_length": sum(lengths) / len(lengths),
        "cut_ratio": 1 - sum(ended) / len(ended),  # the share of responses that max_new_tokens ended
        "seconds_rollout": rolled_out - started,
        "seconds_score": clock() - rolled_out,
    }
    return loss, metrics, texts


def clock():
    """Seconds, once the device has done what it was asked: kernels run behind Python's back."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
