"""Group Relative Policy Optimization (Section III-B): Eq. 1, 3 and 4 as pure functions; the parts of a step.

Departs from GRPO's original in what the paper leaves open: the advantage divides by (sample std + 1e-4), as
in the work that the paper builds on [7]; one update a rollout, so that the ratio of Eq. 3 is 1 and its
gradient the policy gradient; the clip is there for `--updates 2`. Log-probs are the policy's own, at
temperature 1, though responses are drawn at 1.2 (so does [7]; TRL divides by the temperature).

train.py puts `roll_out`, `score`, `rollout_loss` and the optimizer one after the other. Nothing here knows of
files, audio or processes.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward import final_answer, format_reward, named_choices, string_match

# ------------------------------------------------------------------------------------------- the equations


def group_advantages(rewards: Tensor, *, scale: bool = True) -> Tensor:
    """Eq. 1: how much better each response is than its group. rewards (..., G) -> advantages (..., G).

    `scale=False` leaves out the division by the group's standard deviation (Dr. GRPO).
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    are_equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    centred = centred.masked_fill(are_equal, 0.0)  # such a group teaches nothing, not even a mean's last bit
    if not scale:
        return centred
    return centred / (rewards.std(-1, keepdim=True) + 1e-4)


def kl_divergence(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Eq. 4, never negative: r - log r - 1 with r = pi_ref / pi. Twice (..., T) -> (..., T)."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    epsilon: float = 0.2,
    beta: float = 0.04,
    *,
    length: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 3, negated to be minimised.

    logps, old_logps, ref_logps (N, T): log-probs under the policy, the policy that sampled, the reference
    (None when beta is 0). advantages (N,). mask (N, T) bool: the tokens of each response. Every response
    weighs the same, whatever its length (the 1/|o_i| of Eq. 3); with `length` every token does: their sum is
    divided by N x length. Returns (scalar loss, dict of floats: kl, clip_ratio).
    """
    # Padding may hold anything, and what is put out of the sum only after exp() still sends back a NaN.
    logps = torch.where(mask, logps, 0.0)
    old_logps = torch.where(mask, old_logps, 0.0)
    advantages = advantages.unsqueeze(1)
    ratio = (logps - old_logps).exp()  # rho_{i,t}
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon) * advantages
    objective = torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(logps)
    if beta:
        kl = kl_divergence(logps, torch.where(mask, ref_logps, 0.0))
        objective = objective - beta * kl
    if length is None:
        loss = -response_mean(objective, mask).mean()
    else:
        loss = -(objective * mask).sum() / (len(mask) * length)
    was_clipped = (clipped < unclipped).float()
    metrics = {
        "kl": response_mean(kl.detach(), mask).mean().item(),
        "clip_ratio": response_mean(was_clipped, mask).mean().item(),
    }
    return loss, metrics


def response_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(1/|o_i|) sum over t of Eq. 3: (N, T) -> (N,)."""
    return (values * mask).sum(-1) / mask.sum(-1)


# ---------------------------------------------------------------------------------------- the parts of a step


@dataclass
class Rollout:
    """B questions of one pass and their B x G responses, on the way from sampling to the loss."""

    asked: list  # (B) of data.Asked: a question, its prompt, and its number k in step s
    responses: list[list[Tensor]]  # (B) of (G) of 1-D int64, the end token kept
    texts: list[list[str]]
    rewards: Tensor  # (B, G)
    advantages: Tensor  # (B, G)
    mask: Tensor | None = None  # (B * G, T) bool: the tokens of each response
    old_logps: Tensor | None = None  # (B * G, T), of the policy that sampled
    ref_logps: Tensor | None = None  # (B * G, T)


def roll_out(
    policy: Any,
    asked: list,
    config: Namespace,
    reward: Callable,
) -> Rollout:
    """G responses to each of B questions (policy: model.AudioLM), their rewards and their advantages."""
    generators = [question_generator(config.seed, one, policy.device) for one in asked]
    responses = policy.generate(
        [one.prompt for one in asked],
        config.max_new_tokens,
        group_size=config.group_size,
        temperature=config.temperature,
        generators=generators,
    )
    texts = []
    for group in responses:
        texts.append([policy.decode(response) for response in group])
    rewards = group_rewards(asked, texts, config, reward)
    advantages = group_advantages(rewards, scale=config.loss != "dr")
    return Rollout(asked, responses, texts, rewards, advantages)


def question_generator(seed: int, asked: Any, device: torch.device) -> torch.Generator:
    """Random numbers that follow from (seed, step, k): not from the process, nor from the other questions."""
    entropy = [seed, 4, asked.step, asked.k]
    number = np.random.SeedSequence(entropy).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(number))


def group_rewards(
    asked: list,
    texts: list[list[str]],
    config: Namespace,
    reward: Callable,
) -> Tensor:
    """Eq. 2 for B groups of G texts -> (B, G). What `--prompt` asks to be tagged is taken from its tag."""
    rewards = []
    for one, group in zip(asked, texts, strict=True):
        question = one.question
        for text in group:
            said = final_answer(text, config.prompt)
            value = reward(said, question.answer, list(question.choices))
            rewards.append(value + config.format_weight * format_reward(text, config.prompt))
    return torch.tensor(rewards).view(len(asked), -1)  # beyond fp32 it is infinite, and the loss says so


def score(
    policy: Any,
    reference: Any,
    rollout: Rollout,
) -> Any:
    """model.Scores of the rollout's responses: log-probs (B * G, T) under the policy, with their graph.

    What does not change from update to update (the reference's log-probs, those of the policy that sampled,
    the mask) is put into the rollout the first time. `reference` is None when beta is 0.
    """
    prompts = [one.prompt for one in rollout.asked]
    if reference is not None and rollout.ref_logps is None:
        with torch.no_grad():
            rollout.ref_logps = reference.score(prompts, rollout.responses).logps
    scores = policy.score(prompts, rollout.responses)
    if rollout.old_logps is None:
        rollout.old_logps = scores.logps.detach()
        rollout.mask = scores.mask
    return scores


def rollout_loss(
    scores: Any,
    rollout: Rollout,
    config: Namespace,
    mean_length: float,
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 3 and 4 on what `score` returned of a rollout. Returns the loss with its graph, and metrics.

    `--loss` says what weighs the same: sequence, each response (Eq. 3); token, each token of the step, whose
    responses have `mean_length` (DAPO); dr, each token over the longest allowed length (Dr. GRPO).
    """
    lengths = {"sequence": None, "token": mean_length, "dr": config.max_new_tokens}
    logps = scores.logps
    loss, metrics = grpo_loss(
        logps,
        rollout.old_logps,
        rollout.ref_logps,
        rollout.advantages.flatten().to(logps.device),
        rollout.mask,
        config.epsilon,
        config.beta,
        length=lengths[config.loss],
    )
    metrics["loss"] = loss.item()
    metrics["entropy"] = scores.entropy.mean().item()
    return loss, metrics


# ------------------------------------------------------------------------------------------------ the metrics


def rollout_metrics(rollout: Rollout, eos: Tensor, prompt: str) -> dict[str, float]:
    """What a person wants to know of the responses, each a mean over its group summed over the questions.

    `official` is the share that the benchmarks' string match finds right, `hedged` the share that names more
    than one choice: a reward that rises without the first, or with the second, is being gamed.
    """
    metrics = {
        "reward": rollout.rewards.mean(-1).sum().item(),
        "reward_std": rollout.rewards.std(-1).sum().item(),
        "frac_reward_zero_std": (~rollout.advantages.any(-1)).sum().item(),
    }
    for one, responses, texts in zip(rollout.asked, rollout.responses, rollout.texts, strict=True):
        choices = list(one.question.choices)
        for response, text in zip(responses, texts, strict=True):
            said = final_answer(text, prompt)
            named = len(named_choices(said, choices))
            found = {
                "cut_ratio": response[-1] not in eos,  # max_new_tokens cut it
                "completion_length": len(response),
                "asked_form": format_reward(text, prompt),
                "hedged": named > 1,
                "named_none": named == 0,
                "official": string_match(one.question.answer, said, choices),
            }
            add(metrics, found, 1 / len(texts))
    return metrics


def add(totals: dict[str, float], values: dict[str, float], weight: float = 1.0) -> None:
    """totals += weight * values, name by name."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + weight * value
