"""SPPO in verl, for large language models: the loss of `sppo_rlhf.py`, per token.

verl keeps a registry of policy losses. This file adds `sppo` to it and starts verl's own trainer
with it: FSDP or Megatron, vLLM or SGLang, many GPUs. α, β, Z are flags of verl's `policy_loss`:

    python engines/verl_sppo.py actor_rollout_ref.model.path=MODEL critic.model.path=MODEL \
        data.train_files=PROMPTS.parquet +actor_rollout_ref.actor.policy_loss.beta=0.4 ...
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.torch_functional import masked_mean
from verl.workers.config import PolicyLossConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the script is
from sppo_rlhf import symmetric_ppo_loss


@dataclass
class SymmetricLossConfig(PolicyLossConfig):
    """verl's `actor.policy_loss` with the fields that the loss needs; defaults as in the script.
    A process that reads the actor's settings imports this file, and so registers the loss."""

    alpha: float = 0.5  # weight of the forward (PPO) term
    beta: float = 0.4  # weight of the reverse term
    Z: float = -1.0  # stands in for log 0, negative; only beta * Z matters
    importance_weighted_reverse: bool = True  # divide the reverse term by the old probability


@register_policy_loss("sppo")
def sppo_loss(
    old_log_prob,
    log_prob,
    advantages,
    response_mask,
    loss_agg_mode="token-mean",
    config=None,
    rollout_is_weights=None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The symmetric loss, aggregated as verl does, and what is logged. All tensors are of shape
    (batch, response length). ValueError: a clip range with two ends, which the loss lacks."""
    if not config.clip_ratio_low == config.clip_ratio_high == config.clip_ratio:
        raise ValueError("clip_ratio, clip_ratio_low and clip_ratio_high must be equal")

    def token_loss(logprob, old_logprob, advantage):
        return symmetric_ppo_loss(
            logprob, old_logprob, advantage, config.clip_ratio, config.policy_loss
        )

    tokens = [x.reshape(-1, 1) for x in (log_prob, old_log_prob, advantages)]
    per_token = torch.vmap(token_loss)(*tokens)  # each token is a batch of one, its own mean
    terms = [x.view_as(log_prob) for x in per_token]
    if rollout_is_weights is not None:  # corrects for what the inference engine computes otherwise
        terms = [x * rollout_is_weights for x in terms]
    policy_loss, forward_loss, reverse_loss = [
        agg_loss(x, response_mask, loss_agg_mode, **config.global_batch_info) for x in terms
    ]
    ratio = (log_prob - old_log_prob).detach().exp()
    clipped = ((ratio - 1).abs() > config.clip_ratio).float()
    return policy_loss, {
        "actor/forward_loss": forward_loss.item(),
        "actor/reverse_loss": reverse_loss.item(),
        "actor/ppo_kl": masked_mean(old_log_prob - log_prob, response_mask).item(),
        "actor/pg_clipfrac": masked_mean(clipped, response_mask).item(),
    }


if __name__ == "__main__":
    from verl.trainer.main_ppo import main

    flag = "actor_rollout_ref.actor.policy_loss"
    sys.argv[1:1] = [f"{flag}._target_=verl_sppo.SymmetricLossConfig", f"{flag}.loss_mode=sppo"]
    main()
