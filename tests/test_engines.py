"""The loss in each engine is the script's. An engine has an environment of its own (docs/scale.md);
elsewhere its tests are skipped."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "engines"))


def assert_same_loss_and_gradient(loss, expected, parameters):
    torch.testing.assert_close(loss, expected)
    for parameter in parameters:
        options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
        gradient, *_ = torch.autograd.grad(loss, parameter, **options)
        expected_gradient, *_ = torch.autograd.grad(expected, parameter, **options)
        torch.testing.assert_close(gradient, expected_gradient)


# Stable-Baselines3


@pytest.fixture
def sb3():
    pytest.importorskip("stable_baselines3")
    return pytest.importorskip("sb3_sppo")


def sb3_minibatch(model, batch_size: int = 64):
    """Samples of a policy that has moved since, so that some ratios are clipped."""
    model.policy.load_state_dict(
        {k: x + 0.3 * torch.randn_like(x) for k, x in model.policy.state_dict().items()}
    )
    obs = torch.randn(batch_size, 4)
    with torch.no_grad():
        actions, values, logprob = model.policy(obs)
    columns = (
        values.flatten(),
        logprob + 0.2 * torch.randn(batch_size),
        *torch.randn(2, batch_size),
    )
    return obs, actions.reshape(batch_size, -1).float(), *columns


@pytest.mark.parametrize("importance_weighted", [True, False])
def test_sb3_minibatch_has_the_scripts_loss_and_gradient(sb3, importance_weighted):
    from sppo_continuous import normalize, symmetric_ppo_loss

    torch.manual_seed(0)
    knobs = dict(alpha=0.7, beta=3.0, Z=-1.5, importance_weighted_reverse=importance_weighted)
    model = sb3.SPPO(
        "MlpPolicy", "CartPole-v1", seed=0, device="cpu", ent_coef=0.1, clip_range=0.15, **knobs
    )
    model.set_logger(sb3_logger())
    obs, actions, _, old_logprob, advantage, returns = minibatch = sb3_minibatch(model)
    value, logprob, entropy = model.policy.evaluate_actions(obs, actions.long().flatten())
    columns = (logprob[:, None], old_logprob[:, None], normalize(advantage))
    policy_loss, forward_loss, reverse_loss = symmetric_ppo_loss(
        *columns, 0.15, SimpleNamespace(**knobs)
    )
    expected = (
        policy_loss - 0.1 * entropy.mean() + 0.5 * (value.flatten() - returns).square().mean()
    )

    loss = model.minibatch_loss(minibatch)
    assert_same_loss_and_gradient(loss, expected, model.policy.parameters())
    assert model.logger.name_to_value["train/reverse_loss"] == pytest.approx(reverse_loss.item())


def sb3_logger():
    from stable_baselines3.common.logger import Logger

    return Logger(folder=None, output_formats=[])


def test_sb3_without_the_reverse_term_is_ppo_to_the_bit(sb3):
    from stable_baselines3 import PPO

    settings = dict(n_steps=128, batch_size=32, n_epochs=3, ent_coef=0.01, seed=1, device="cpu")
    settings |= dict(learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: 0.2 * left)
    ppo = PPO("MlpPolicy", "CartPole-v1", **settings).learn(512)
    sppo = sb3.SPPO("MlpPolicy", "CartPole-v1", alpha=1.0, beta=0.0, **settings).learn(512)
    for name, parameter in ppo.policy.state_dict().items():
        assert torch.equal(parameter, sppo.policy.state_dict()[name]), name


def test_sb3_bins_a_box_trains_on_it_saves_and_loads(sb3, tmp_path):
    import gymnasium as gym

    env = sb3.Bins(gym.make("LunarLanderContinuous-v3"), num_bins=5)
    assert env.action(np.array([0, 4])).tolist() == [-1.0, 1.0]
    assert env.action(np.array([3, 2])).tolist() == [0.5, 0.0]
    model = sb3.SPPO(
        "MlpPolicy", env, alpha=0.25, beta=3.0, n_steps=64, seed=1, device="cpu"
    ).learn(64)
    model.save(tmp_path / "model.zip")
    loaded = sb3.SPPO.load(tmp_path / "model.zip", device="cpu")
    assert (loaded.alpha, loaded.beta, loaded.Z) == (0.25, 3.0, -1.0)
    obs = env.reset(seed=1)[0]
    assert (
        loaded.predict(obs, deterministic=True)[0].tolist()
        == model.predict(obs, deterministic=True)[0].tolist()
    )


def test_sb3_refuses_what_it_would_not_do(sb3):
    import gymnasium as gym

    with pytest.raises(ValueError, match="Bins"):
        sb3.SPPO("MlpPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="one dimension"):
        sb3.SPPO("MlpPolicy", sb3.Bins(gym.make("Pendulum-v1")), importance_weighted_reverse=False)
    with pytest.raises(ValueError, match="target_kl"):
        sb3.SPPO("MlpPolicy", "CartPole-v1", target_kl=0.1)


# RLlib


@pytest.fixture
def rllib():
    pytest.importorskip("ray.rllib.algorithms.ppo", exc_type=ImportError)
    return pytest.importorskip("rllib_sppo")


def rllib_learner(rllib, learner_class, **knobs):
    import gymnasium as gym

    config = (
        rllib.make_config(rllib.Args()).training(entropy_coeff=0.1).env_runners(num_env_runners=0)
    )
    config = config.learners(num_learners=0, learner_class=learner_class, learner_config_dict=knobs)
    learner = config.build_learner(env=gym.make("CartPole-v1"))
    learner.build()
    return learner, learner.config


def rllib_batch(learner, batch_size: int = 64):
    """A batch whose last rows are padding, which must not matter."""
    logits = torch.randn(batch_size, 2)
    actions = torch.randint(2, (batch_size,))
    batch = {
        "obs": torch.randn(batch_size, 4),
        "actions": actions,
        "action_dist_inputs": logits,
        "action_logp": logits.log_softmax(1)[torch.arange(batch_size), actions],
        "advantages": torch.randn(batch_size),
        "value_targets": torch.randn(batch_size),
        "loss_mask": torch.arange(batch_size) < batch_size - 10,
    }
    batch["advantages"][-10:] = 1e6
    return batch


@pytest.mark.parametrize("importance_weighted", [True, False])
def test_rllib_module_has_the_scripts_loss_and_gradient(rllib, importance_weighted):
    from sppo_continuous import symmetric_ppo_loss

    torch.manual_seed(0)
    knobs = dict(alpha=0.7, beta=3.0, Z=-1.5, importance_weighted_reverse=importance_weighted)
    learner, config = rllib_learner(rllib, rllib.SPPOLearner, **knobs)
    module = learner.module["default_policy"]
    batch = rllib_batch(learner)
    fwd_out = module.forward_train(batch)
    logprobs = fwd_out["action_dist_inputs"].log_softmax(1)
    logprob = logprobs.gather(1, batch["actions"][:, None])
    columns = (x[:54] for x in (logprob, batch["action_logp"][:, None], batch["advantages"]))
    policy_loss, *_ = symmetric_ppo_loss(*columns, config.clip_param, SimpleNamespace(**knobs))
    value = module.compute_values(batch, embeddings=fwd_out.get("embeddings"))
    value_loss = (value - batch["value_targets"])[:54].square().mean()
    entropy = -(logprobs.exp() * logprobs).sum(1)[:54].mean()
    expected = policy_loss + 0.5 * value_loss - 0.1 * entropy

    arguments = dict(module_id="default_policy", config=config, batch=batch, fwd_out=fwd_out)
    loss = learner.compute_loss_for_module(**arguments)
    assert_same_loss_and_gradient(loss, expected, module.parameters())


def test_rllib_trains_with_two_runners_and_two_learners(rllib):
    command = [sys.executable, "engines/rllib_sppo.py", "--total-timesteps", "4096"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]
    assert float(run.stdout.split("score at 4096 steps: ")[1]) > 50  # an untrained policy: 10 to 25


# verl


@pytest.fixture
def verl():
    pytest.importorskip("verl", exc_type=ImportError)
    return pytest.importorskip("verl_sppo")


def verl_config(**knobs):
    """The actor's settings as verl's workers read them from its command line."""
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    actor = "actor_rollout_ref.actor"
    flags = [f"{actor}.policy_loss._target_=verl_sppo.SymmetricLossConfig"]
    flags += [f"{actor}.policy_loss.loss_mode=sppo", f"{actor}.ppo_micro_batch_size_per_gpu=8"]
    flags += [f"+{actor}.policy_loss.{name}={value}" for name, value in knobs.items()]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return omega_conf_to_dataclass(compose("ppo_trainer", flags).actor_rollout_ref.actor)


def verl_tokens(rows: int = 6, length: int = 10):
    """log π_old, log π, advantages, mask (rows, length). What is masked must not matter."""
    old_logprob = -3 * torch.rand(rows, length)
    logprob = (old_logprob + 0.3 * torch.randn(rows, length)).clamp(max=-0.01)
    advantage = torch.randn(rows, length)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1))
    advantage[~mask] = 1e6
    return old_logprob, logprob.requires_grad_(), advantage, mask


@pytest.mark.parametrize("importance_weighted", [True, False])
def test_verl_averages_the_scripts_loss_over_tokens(verl, importance_weighted):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    from sppo_rlhf import symmetric_ppo_loss

    torch.manual_seed(0)
    knobs = dict(alpha=0.7, beta=3.0, Z=-1.5, importance_weighted_reverse=importance_weighted)
    old_logprob, logprob, advantage, mask = tokens = verl_tokens()
    loss, logged = get_policy_loss_fn("sppo")(*tokens, config=verl_config(**knobs))
    valid = (x[mask] for x in (logprob, old_logprob, advantage))
    expected, forward_loss, _ = symmetric_ppo_loss(*valid, 0.2, SimpleNamespace(**knobs))
    assert_same_loss_and_gradient(loss, expected, [logprob])
    assert logged["actor/forward_loss"] == pytest.approx(forward_loss.item())
    assert 0 < logged["actor/pg_clipfrac"] < 1


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_verl_without_the_reverse_term_has_its_own_loss(verl, mode):
    """In whole and as two micro-batches, which are averaged over the global batch."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    torch.manual_seed(0)
    tokens = verl_tokens()
    tokens[2].abs_()  # verl clips the loss of negative advantages once more
    weights = 0.5 + torch.rand(6, 10)
    config = verl_config(alpha=1.0, beta=0.0)
    config.global_batch_info.update(batch_num_tokens=tokens[3].sum().item(), global_batch_size=6)
    its_own, _ = get_policy_loss_fn("vanilla")(*tokens, mode, config, weights)
    whole, _ = get_policy_loss_fn("sppo")(*tokens, mode, config, weights)
    halves = [
        get_policy_loss_fn("sppo")(*(x[half] for x in tokens), mode, config, weights[half])[0]
        for half in (slice(0, 3), slice(3, 6))
    ]
    assert_same_loss_and_gradient(whole, its_own, [tokens[1]])
    assert_same_loss_and_gradient(sum(halves), its_own, [tokens[1]])


def test_verl_refuses_a_clip_range_with_two_ends(verl):
    config = verl_config()
    object.__setattr__(config, "clip_ratio_high", 0.3)
    with pytest.raises(ValueError, match="clip_ratio_high"):
        verl.sppo_loss(*verl_tokens(), config=config)


def actor_loss(config, model, prompts, responses, old_logprob, advantages):
    """What verl's actor does with the log-probabilities of a batch, as its workers call it."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.workers.utils.losses import ppo_loss

    batch = {
        "prompts": prompts,
        "responses": responses,
        "attention_mask": torch.ones(len(prompts), prompts.shape[1] + responses.shape[1]).long(),
        "response_mask": torch.ones_like(responses),
        "old_log_probs": old_logprob,
        "advantages": advantages,
    }
    data = TensorDict(batch, batch_size=len(prompts))
    sizes = dict(dp_size=1, batch_num_tokens=responses.numel(), global_batch_size=len(prompts))
    tensordict_utils.assign_non_tensor(data, **sizes)
    sequences = torch.cat((prompts, responses), dim=1)
    return ppo_loss(config, {"log_probs": next_token_logprobs(model, sequences).flatten()}, data)


def next_token_logprobs(model, sequences):
    """(batch, length): of each token's successor, as in verl. The last column is unused."""
    logprobs = model(sequences).logits.log_softmax(-1)
    return logprobs.gather(2, sequences.roll(-1, dims=1).unsqueeze(2)).squeeze(2)


def test_verl_trains_a_small_language_model(verl):
    """verl's GRPO and its actor's loss around a small Llama. Score: the share of even tokens."""
    import transformers
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, eos_token_id=None, pad_token_id=0)
    ).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    config = verl_config()
    scores = []
    for _ in range(30):
        prompts = torch.randint(2, 64, (16, 4)).repeat_interleave(4, dim=0)  # 4 responses to each
        responses = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=8)[:, 4:]
        score = (responses % 2 == 0).float()
        advantages, _ = compute_grpo_outcome_advantage(
            score, torch.ones_like(score), np.arange(64) // 4
        )
        with torch.no_grad():
            sequences = torch.cat((prompts, responses), dim=1)
            old_logprob = next_token_logprobs(model, sequences)[:, 3:-1]
        for _ in range(2):
            loss, _ = actor_loss(config, model, prompts, responses, old_logprob, advantages)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores.append(score.mean().item())
    assert scores[0] < 0.6 and np.mean(scores[-3:]) > 0.8, scores
