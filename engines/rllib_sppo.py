"""SPPO in RLlib: a PPO learner of its new API stack, with the loss of `sppo_continuous.py`.

`SPPOLearner` takes PPO's own loss and exchanges the policy loss in it. All else is RLlib's: many
processes that act, several that learn, on several machines. In a `PPOConfig` of your own, change
`learners(learner_class=SPPOLearner, learner_config_dict=...)`, as below.

    python engines/rllib_sppo.py --env-id CartPole-v1 --total-timesteps 50000
    python engines/rllib_sppo.py --address auto --num-env-runners 64 --num-learners 4
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
import tyro
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the script is
from sppo_continuous import symmetric_ppo_loss


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # the environment; its actions are discrete
    seed: int = 1  # seed of weights, environments and actions
    total_timesteps: int = 50_000  # environment steps; the last batch is played to its end
    address: str = "local"  # the Ray cluster; auto: the one this machine belongs to
    num_env_runners: int = 2  # processes that act
    num_learners: int = 2  # processes that learn, each from its share of a batch
    num_gpus_per_learner: float = 0  # 0: a CPU each
    alpha: float = 0.5  # weight of the forward (PPO) term
    beta: float = 20.0  # weight of the reverse term


class SPPOLearner(PPOTorchLearner):
    """PPO with the policy loss α · forward + β · reverse. `learner_config_dict` holds alpha, beta,
    Z and importance_weighted_reverse; without the latter, actions must be of one dimension."""

    def compute_loss_for_module(self, *, module_id, config, batch, fwd_out) -> torch.Tensor:
        """PPO's loss, minus its policy loss, which is `forward`, plus the symmetric loss."""
        ppo_loss = super().compute_loss_for_module(
            module_id=module_id, config=config, batch=batch, fwd_out=fwd_out
        )
        distribution = self.module[module_id].unwrapped().get_train_action_dist_cls()
        policy = distribution.from_logits(fwd_out[Columns.ACTION_DIST_INPUTS])
        logprob = policy.logp(batch[Columns.ACTIONS])
        valid = batch.get(Columns.LOSS_MASK, torch.ones_like(logprob).bool())  # others are padding
        policy_loss, forward_loss, reverse_loss = symmetric_ppo_loss(
            logprob[valid].unsqueeze(1),  # (batch, 1): a single column, since they are joint
            batch[Columns.ACTION_LOGP][valid].unsqueeze(1),
            batch[Postprocessing.ADVANTAGES][valid],
            config.clip_param,
            SimpleNamespace(**config.learner_config_dict),
        )
        terms = {"symmetric_policy_loss": policy_loss, "reverse_loss": reverse_loss}
        self.metrics.log_dict(terms, key=module_id, window=1)
        return ppo_loss - forward_loss + policy_loss


def make_config(args: Args) -> PPOConfig:
    """PPO's settings of `sppo_continuous.py`, as far as RLlib has them."""
    symmetric = dict(alpha=args.alpha, beta=args.beta, Z=-1.0, importance_weighted_reverse=True)
    return (
        PPOConfig()
        .environment(args.env_id)
        .env_runners(num_env_runners=args.num_env_runners, sample_timeout_s=600)
        .learners(
            num_learners=args.num_learners,
            num_gpus_per_learner=args.num_gpus_per_learner,
            learner_class=SPPOLearner,
            learner_config_dict=symmetric,
        )
        .training(
            train_batch_size_per_learner=1024,
            minibatch_size=64,
            num_epochs=10,
            lr=3e-4,
            gamma=0.99,
            lambda_=0.95,
            clip_param=0.2,
            use_kl_loss=False,
            vf_loss_coeff=0.5,
            vf_clip_param=float("inf"),
            grad_clip=0.5,
        )
        .evaluation(
            evaluation_num_env_runners=1,
            evaluation_duration=10,
            evaluation_config={"explore": False},
        )
        .debugging(seed=args.seed)
    )


def main(args: Args) -> None:
    cpus = args.num_env_runners + args.num_learners + 2 if args.address == "local" else None
    script = Path(__file__).resolve().parents[1] / "sppo_continuous.py"  # sent to every machine
    ray.init(args.address, num_cpus=cpus, runtime_env={"py_modules": [str(script)]})
    algorithm = make_config(args).build_algo()
    steps = 0
    while steps < args.total_timesteps:
        result = algorithm.train()
        steps = int(result["num_env_steps_sampled_lifetime"])
        print(f"{steps} steps, return {result['env_runners']['episode_return_mean']:.1f}")
    score = algorithm.evaluate()["env_runners"]["episode_return_mean"]
    print(f"score at {steps} steps: {score:.2f}")
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Args))
