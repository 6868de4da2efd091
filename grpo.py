"""Group Relative Policy Optimization (Section III-B): Eq. 1, 3 and 4 as pure functions, then one step.

Departs from GRPO's original in what the paper leaves open: the advantage divides by (sample std + 1e-4), as
in the work that the paper builds on [7]; one update a rollout, so that the ratio of Eq. 3 is 1 and its
gradient the policy gradient; the clip is there for `--updates 2`. Log-probs are the policy's own, at
temperature 1, though responses are drawn at 1.2 (so does [7]; TRL divides by the temperature).

`step` is the paper's algorithm from top to bottom. It knows nothing of files, audio or processes.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reward import final_answer, format_reward, named_choices, string_match


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
    epsilon_high: float | None = None,
    length: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 3, negated to be minimised.

    logps, old_logps, ref_logps (N, T): log-probs under the policy, the policy that sampled, the reference
    (None when beta is 0). advantages (N,). mask (N, T) bool: the tokens of each response. `epsilon_high` is
    the clip's upper side where that differs (DAPO). Every response weighs the same, whatever its length; with
    `length` every token does: their sum is divided by N x length (DAPO: the mean length of a step's
    responses; Dr. GRPO: the longest allowed). Returns (scalar loss, dict of floats: kl, clip_ratio).
    """
    # Padding may hold anything, and what is put out of the sum only after exp() still sends back a NaN.
    logps = torch.where(mask, logps, 0.0)
    old_logps = torch.where(mask, old_logps, 0.0)
    advantages = advantages.unsqueeze(1)
    if epsilon_high is None:
        epsilon_high = epsilon
    ratio = (logps - old_logps).exp()  # rho_{i,t}
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages
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
    """(1/|o_i|) sum over t of Eq. 3: (N, T) -> (N,); 0 for a response whose tokens are all masked."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


# -------------------------------------------------------------------------------------------------- the step


@dataclass
class Rollout:
    """B questions of one pass and their B x G responses, on the way from sampling to the loss."""

    asked: list  # (B) of data.Asked: a question, its prompt, and its number k in step s
    responses: list[list[Tensor]]  # (B) of (G) of 1-D int64, the end token kept
    texts: list[list[str]]
    rewards: Tensor  # (B, G)
    advantages: Tensor  # (B, G)
    mask: Tensor | None = None  # (B * G, T) bool: the tokens that count
    old_logps: Tensor | None = None  # (B * G, T), of the policy that sampled
    ref_logps: Tensor | None = None  # (B * G, T)


def step(
    policy: Any,
    reference: Any,
    passes: list[list],
    config: Namespace,
    reward: Callable,
    update: Callable[[], None],
) -> tuple[dict[str, float], list[Rollout]]:
    """One step of Section III-B on this process's questions, in the paper's order.

    `policy` and `reference` (None when beta is 0) are model.AudioLM. `passes` splits the questions into what
    goes through the model at once: that changes memory, not the result. `reward` is Eq. 2; `update` moves the
    weights by the gradients added up. Returns the metrics as sums over questions, and all that was said.
    """
    count = sum(len(asked) for asked in passes)
    metrics = {}
    rollouts = []
    started = clock()
    for asked in passes:
        # Roll out: G responses to each question, drawn with the question's own random numbers.
        prompts = [one.prompt for one in asked]
        generators = [question_generator(config.seed, one, policy.device) for one in asked]
        responses = policy.generate(
            prompts,
            config.max_new_tokens,
            group_size=config.group_size,
            temperature=config.temperature,
            generators=generators,
        )
        texts = decode(policy, responses)
        # Reward, Eq. 2.
        rewards = group_rewards(asked, texts, config, reward)
        # Advantage, Eq. 1.
        advantages = group_advantages(rewards, scale=config.scale_rewards == "on")
        rollouts.append(Rollout(asked, responses, texts, rewards, advantages))
    add(metrics, {"seconds_rollout": clock() - started})
    for rollout in rollouts:
        add(metrics, rollout_metrics(rollout, policy.eos, config.prompt))
    length = loss_length(rollouts, config, policy)
    learning = [what_teaches(rollout, config.beta) for rollout in rollouts]
    for _ in range(config.updates):
        for rollout in learning:
            # Score: the log-probs of every response's tokens, under the reference and under the policy.
            started = clock()
            logps, entropy = score(policy, reference, rollout, config)
            # Loss, Eq. 3 and 4.
            loss, found = rollout_loss(logps, rollout, config, length)
            # Backward.
            scored = clock()
            (loss * len(rollout.asked) / count).backward()
            add(metrics, found, len(rollout.asked) / config.updates)
            taught = max(how_many_teach(rollout, config.beta), 1e-6)  # where none does, what was scored tells
            add(metrics, {"entropy": entropy, "taught": 1.0}, taught / config.updates)
            add(metrics, {"seconds_score": scored - started})
            add(metrics, {"seconds_update": clock() - scored})
        # Update.
        started = clock()
        update()
        add(metrics, {"seconds_update": clock() - started})
    return metrics, rollouts


def question_generator(seed: int, asked: Any, device: torch.device) -> torch.Generator:
    """Random numbers that follow from (seed, step, k): not from the process, nor from the other questions."""
    entropy = [seed, 4, asked.step, asked.k]
    number = np.random.SeedSequence(entropy).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(number))


def decode(policy: Any, responses: list[list[Tensor]]) -> list[list[str]]:
    texts = []
    for group in responses:
        texts.append([policy.decode(response) for response in group])
    return texts


def group_rewards(
    asked: list,
    texts: list[list[str]],
    config: Namespace,
    reward: Callable,
) -> Tensor:
    """Eq. 2 for B groups of G texts -> (B, G). What `--prompt` asks to be tagged is taken from its tag."""
    rewards = torch.zeros(len(asked), config.group_size)
    for b, one in enumerate(asked):
        question = one.question
        for g, text in enumerate(texts[b]):
            said = final_answer(text, config.prompt)
            value = reward(said, question.answer, list(question.choices))
            rewards[b, g] = value + config.format_weight * format_reward(text, config.prompt)
    return rewards


def how_many_teach(rollout: Rollout, beta: float) -> int:
    """Of a rollout's questions, those whose responses have a gradient."""
    if beta:
        return len(rollout.asked)
    return int(rollout.advantages.any(-1).sum())


def what_teaches(rollout: Rollout, beta: float) -> Rollout:
    """Without a KL divergence, groups of equal rewards have no gradient: they need not be scored.

    One is kept where there is no other, since all processes must make the same passes.
    """
    if how_many_teach(rollout, beta) == len(rollout.asked):
        return rollout
    kept = []
    for b, advantages in enumerate(rollout.advantages):
        if advantages.any():
            kept.append(b)
    kept = kept or [0]
    return Rollout(
        [rollout.asked[b] for b in kept],
        [rollout.responses[b] for b in kept],
        [rollout.texts[b] for b in kept],
        rollout.rewards[kept],
        rollout.advantages[kept],
    )


def score(
    policy: Any,
    reference: Any,
    rollout: Rollout,
    config: Namespace,
) -> tuple[Tensor, float]:
    """Log-probs (B * G, T) of the rollout's responses under the policy, with their graph, and its entropy.

    What does not change from update to update (the reference's log-probs, those of the policy that sampled,
    the mask) is put into the rollout the first time.
    """
    prompts = [one.prompt for one in rollout.asked]
    if reference is not None and rollout.ref_logps is None:
        with torch.no_grad():
            rollout.ref_logps = reference.score(prompts, rollout.responses).logps
    scores = policy.score(prompts, rollout.responses)
    if rollout.old_logps is None:
        rollout.old_logps = scores.logps.detach()
        rollout.mask = scores.mask
        if config.mask_truncated:
            ended = has_ended(rollout.responses, policy.eos)
            ended = ended.flatten().unsqueeze(1).to(scores.mask.device)  # (B * G, 1)
            rollout.mask = scores.mask & ended
    return scores.logps, scores.entropy.mean().item()


def rollout_loss(
    logps: Tensor,
    rollout: Rollout,
    config: Namespace,
    length: float | None,
) -> tuple[Tensor, dict[str, float]]:
    """Eq. 3 and 4 on a rollout's (B * G, T) log-probs. Returns the loss with its graph, and metrics."""
    loss, found = grpo_loss(
        logps,
        rollout.old_logps,
        rollout.ref_logps,
        rollout.advantages.flatten().to(logps.device),
        rollout.mask,
        config.epsilon,
        config.beta,
        epsilon_high=config.epsilon_high,
        length=length,
    )
    found["loss"] = loss.item()
    return loss, found


def loss_length(
    rollouts: list[Rollout],
    config: Namespace,
    policy: Any,
) -> float | None:
    """What `--loss` divides the sum over a response's tokens by: None for Eq. 3's own length of each."""
    if config.loss == "sequence":
        return None
    if config.loss == "dr":
        return config.max_new_tokens
    lengths = []  # of those that --mask_truncated leaves out too, as in TRL
    for rollout in rollouts:
        for group in rollout.responses:
            lengths += map(len, group)
    return policy.average(sum(lengths) / len(lengths))


# ------------------------------------------------------------------------------------------------ the metrics


def has_ended(responses: list[list[Tensor]], eos: Tensor) -> Tensor:
    """(B, G) bool: whether each response came to its end; if not, `max_new_tokens` cut it."""
    last = []
    for group in responses:
        last.append(torch.stack([response[-1] for response in group]))
    return torch.isin(torch.stack(last), eos)


def rollout_metrics(rollout: Rollout, eos: Tensor, prompt: str) -> dict[str, float]:
    """What a person wants to know of the responses, each a mean over its group summed over the questions.

    `official` is the share that the benchmarks' string match finds right, `hedged` the share that names more
    than one choice: a reward that rises without the first, or with the second, is being gamed.
    """
    alike = ~rollout.advantages.any(-1)
    cut = ~has_ended(rollout.responses, eos)
    metrics = {
        "reward": rollout.rewards.mean(-1).sum().item(),
        "reward_std": rollout.rewards.std(-1).sum().item(),
        "frac_reward_zero_std": alike.sum().item(),
        "cut_ratio": cut.float().mean(-1).sum().item(),
    }
    for one, responses, texts in zip(rollout.asked, rollout.responses, rollout.texts, strict=True):
        choices = list(one.question.choices)
        for response, text in zip(responses, texts, strict=True):
            said = final_answer(text, prompt)
            named = len(named_choices(said, choices))
            found = {
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


def clock() -> float:
    """Seconds, once the device has done what it was asked: kernels run behind Python's back."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
