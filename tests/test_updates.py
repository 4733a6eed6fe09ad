"""An update is steps down the loss and nothing else: against loops as in every textbook, with plain autograd, an
optimiser that holds a tensor per layer, and float64. The matched control: SPPO and the baseline learn the same."""

import copy
import os
import shutil

import gymnasium as gym
import numpy as np
import pytest
import textbook
import torch
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_baseline
import sa2c_atari
import sppo_atari
import sppo_continuous

CLIP_COEF = torch.tensor(0.2)
BOX = gym.spaces.Box(-1, 1, (3,))


def make(script, kind):
    """An agent and a batch of 64 rows in float64; 40 samples, two of them twice; the other rows are garbage that would
    be noticed."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    obs, actions = rng.normal(size=(64, 5)), rng.integers(4, size=(64, 3))
    if kind == "atari":
        agent = script.AtariAgent(4)
        agent.policy.weight.data *= 100  # a fresh policy is uniform
        obs, actions = rng.integers(256, size=(64, 84, 84, 4), dtype=np.uint8), actions[:, :1]
    elif kind == "binned":
        agent = script.BinnedAgent(5, BOX, 4)
    else:
        agent, actions = script.GaussianAgent(5, BOX), rng.normal(size=(64, 3))
    agent.double()
    obs, actions = torch.from_numpy(obs), torch.from_numpy(actions)
    old_logprobs = agent(obs, actions)[0].detach()
    old_logprobs += 0.1 * torch.from_numpy(rng.normal(size=old_logprobs.shape))  # some ratios are out of range
    batch = [obs, actions, old_logprobs, *torch.from_numpy(rng.normal(size=(2, 64)) + 0.5)]
    samples = rng.choice(64, 38, replace=False)
    unused = np.setdiff1d(np.arange(64), samples)
    for x in batch:
        x[unused] = torch.nan if x.is_floating_point() else 99
    return agent, batch, np.append(samples, samples[:2])


def plain_update(script, agent, batch, samples, args, rng):
    """Also returns the means of what is logged."""
    alpha, beta, Z = (args.pg_coef, 0, -1) if script is ppo_baseline else (args.alpha, args.beta, args.Z)
    optimizer, logged = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5), []
    for _ in range(args.update_epochs):
        b_inds = torch.from_numpy(rng.permutation(samples))
        signs = torch.from_numpy(np.where(rng.random(len(samples)) < args.advantage_noise, -1.0, 1.0))
        for mb_inds, sign in zip(b_inds.split(10), signs.split(10)):
            obs, actions, old_logprob, noisy, returns = (x[mb_inds] for x in batch)
            noisy = noisy * sign
            A = (noisy - noisy.mean()) / (noisy.std() + 1e-8) if args.norm_adv else noisy
            logprob, entropy, value = agent(obs, actions)
            pi, pi_old = logprob.sum(1).exp(), old_logprob.sum(1).exp()
            r = pi / pi_old
            clipped = r.clamp(1 - CLIP_COEF, 1 + CLIP_COEF)
            forward = -torch.min(r * A, clipped * A).mean()
            m = (r * A <= clipped * A).double()
            weighted = getattr(args, "importance_weighted_reverse", True)
            reverse = -(m * A * Z * ((1 - pi) / pi_old if weighted else (1 - logprob.exp()).mean(1))).mean()
            policy_loss, value_loss = alpha * forward + beta * reverse, (value - returns).square().mean()
            optimizer.zero_grad()
            (policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss).backward()
            norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            terms = (policy_loss, forward) if script is ppo_baseline else (policy_loss, forward, reverse)
            means = [x.double().mean() for x in (-r.log(), r - 1 - r.log(), (r - 1).abs() > CLIP_COEF, A * noisy < 0)]
            logged.append(torch.stack([*terms, value_loss, entropy.mean(), norm, *means]).detach())
    return dict(zip(script.TAGS, torch.stack(logged).mean(0).tolist(), strict=True))


CASES = pytest.mark.parametrize(
    "script, kind", [(sppo_atari, "atari"), (sppo_continuous, "binned"), (ppo_baseline, "gaussian")]
)


@CASES
@pytest.mark.parametrize("settings", [dict(ent_coef=0.0), dict(ent_coef=0.01, advantage_noise=0.3, norm_adv=False)])
def test_an_update_is_a_textbooks_and_sees_the_samples_alone(script, kind, settings):
    args = script.Args(num_minibatches=4, update_epochs=2, learning_rate=3e-3, max_grad_norm=0.1, **settings)
    args.importance_weighted_reverse = args.norm_adv
    agent, batch, samples = make(script, kind)
    plain = copy.deepcopy(agent)
    before = copy.deepcopy(agent.state_dict())
    optimizer = torch.optim.Adam([script.as_vector(agent)], lr=args.learning_rate, eps=1e-5)
    stats = script.update(agent, optimizer, batch, samples, CLIP_COEF, args, np.random.default_rng(1))
    expected = plain_update(script, plain, batch, samples, args, np.random.default_rng(1))
    assert stats == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert stats["losses/clipfrac"] > 0 and stats["losses/grad_norm"] > args.max_grad_norm
    for name, tensor in plain.state_dict().items():
        assert (tensor - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(agent.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, dict(norm_adv=True, advantage_noise=0.3)])
def test_an_update_of_sa2c_is_one_step_down_the_loss_of_the_samples(settings):
    args = sa2c_atari.Args(beta=3.0, Z=-2.0, max_grad_norm=0.1, **settings)
    agent, (obs, actions, _, advantages, returns), samples = make(sa2c_atari, "atari")
    logprob, entropy, value = agent(obs[samples], actions[samples])
    signs = np.where(np.random.default_rng(1).random(len(samples)) < args.advantage_noise, -1, 1)
    noisy = advantages[samples].numpy() * signs
    A = (noisy - noisy.mean()) / noisy.std(ddof=1) if args.norm_adv else noisy
    forward, reverse, by_logprob = textbook.symmetric_a2c(logprob[:, 0].detach().numpy(), A, 0.5, 3.0, -2.0)
    value_loss = (value - returns[samples]).square().mean()
    # what has the same gradient as the loss
    loss = (torch.from_numpy(by_logprob) * logprob[:, 0]).sum() - 0.01 * entropy.mean() + 0.25 * value_loss
    gradient = torch.cat([x.flatten() for x in torch.autograd.grad(loss, agent.parameters())])

    vector = sa2c_atari.as_vector(agent)
    before = vector.detach().clone()
    batch, sgd = (obs, actions, advantages, returns), torch.optim.SGD([vector], lr=1.0)
    stats = sa2c_atari.update(agent, sgd, batch, samples, args, np.random.default_rng(1))
    torch.testing.assert_close(vector.detach(), before - gradient * 0.1 / gradient.norm(), rtol=1e-5, atol=1e-9)
    assert stats == pytest.approx({
        "losses/policy_loss": 0.5 * forward.mean() + 3.0 * reverse.mean(),
        "losses/forward_loss": forward.mean(),
        "losses/reverse_loss": reverse.mean(),
        "losses/value_loss": value_loss.item(),
        "losses/entropy": entropy.mean().item(),
        "losses/grad_norm": gradient.norm().item(),  # before it is cut
        "losses/mean_weight": np.mean(0.5 + 3 * 2 * logprob[:, 0].exp().detach().numpy()),
        "advantage/sign_flips_normalization": np.mean(np.sign(A) != np.sign(noisy)),
    }, rel=1e-6)  # fmt: skip


def test_a_vector_holds_the_parameters():
    agent = sppo_continuous.BinnedAgent(5, BOX, 4)
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    vector = sppo_continuous.as_vector(agent)
    assert torch.equal(vector, before)
    vector.data += 1
    assert torch.equal(torch.nn.utils.parameters_to_vector(agent.parameters()), before + 1)
    agent.load_state_dict({name: torch.zeros_like(x) for name, x in agent.state_dict().items()})
    assert not vector.any()


# ------------------------------------------------------------------------------------------------ compiled, in bfloat16


@CASES
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_compiled_gradient_is_the_gradient(script, kind):
    """One graph, also when the clip range changes. The C++ compiler, which takes its time, does it for one agent."""
    backend = "inductor" if kind == "binned" and shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"
    agent, batch, samples = make(script, kind)
    agent, batch = agent.float(), [x.float() if x.dtype == torch.float64 else x for x in batch]
    args, calls = script.Args(num_minibatches=2, update_epochs=2), []
    compiled = torch.compile(script.gradient, fullgraph=True, backend=backend)

    def both(*arguments):
        calls.append(arguments)
        for x, y in zip(result := compiled(*arguments), script.gradient(*arguments)):
            assert (x - y).norm() < 1e-5 * y.norm()
        return result

    optimizer = torch.optim.Adam([script.as_vector(agent)], lr=args.learning_rate)
    torch._dynamo.utils.counters.clear()
    for clip_coef in torch.tensor([0.2, 0.19, 0.18]):
        script.update(agent, optimizer, batch, samples, clip_coef, args, np.random.default_rng(0), both)
    assert len(calls) == 12 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bf16_is_close_and_only_inside():
    """Heads, losses and parameters stay float32; the gradient points the same way."""
    exact, (obs, actions, _, advantages, returns), samples = make(sppo_atari, "atari")
    rough = sppo_atari.AtariAgent(4, bf16=True)
    rough.load_state_dict(exact.float().state_dict())
    obs, actions, advantages, returns = (x[samples] for x in (obs, actions, advantages.float(), returns.float()))
    old_logprob = exact(obs, actions)[0].detach()
    arguments = (obs, actions, old_logprob, advantages, returns, CLIP_COEF, sppo_atari.Args())
    (grad, _, logprob), rough_results = (sppo_atari.gradient(agent, *arguments) for agent in (exact, rough))
    assert all(x.dtype == torch.float32 for x in (*rough_results, *rough.parameters()))
    assert 0 < (rough_results[2] - logprob).abs().max() < 0.1
    assert torch.nn.functional.cosine_similarity(rough_results[0], grad, dim=0) > 0.98


# ------------------------------------------------------------------------------------------------------------- RMSprop


def test_rmsprop_by_hand():
    """v starts at 1: v ← ρv + (1 − ρ)g², p ← p − lr·g / √(v + ε)."""
    rng = np.random.default_rng(0)
    parameter = torch.nn.Parameter(torch.from_numpy(rng.normal(size=(3, 2))))
    optimizer = sa2c_atari.RMSpropTF([parameter], lr=0.1, decay=0.9, eps=0.5)
    expected, v = parameter.detach().numpy().copy(), np.ones((3, 2))
    for step in range(20):
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (step + 1)  # as --anneal-lr sets it
        gradient = rng.normal(size=(3, 2)) * 10 ** rng.uniform(-3, 1)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        v = 0.9 * v + 0.1 * gradient**2
        expected -= lr * gradient / np.sqrt(v + 0.5)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-30)


def test_rmsprop_is_stable_baselines():
    """With the settings A2C uses; several parameters, float32."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (5,))] for _ in range(2))
    optimizers = [sa2c_atari.RMSpropTF(ours, lr=7e-4), RMSpropTFLike(theirs, lr=7e-4, alpha=0.99, eps=1e-5)]
    for _ in range(50):
        for one, other in zip(ours, theirs):
            one.grad = other.grad = torch.randn(one.shape)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs):
        assert (one - 1).abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------- matched control


SMALL = dict(num_minibatches=4, update_epochs=2, eval_episodes=1, torch_threads=1, cuda=False)
SMALL = {  # one iteration
    sppo_atari: SMALL | dict(env_id="ALE/Breakout-v5", num_envs=4, num_steps=32, total_timesteps=128),
    sppo_continuous: SMALL | dict(num_steps=128, total_timesteps=128),
}


def run(script, folder, monkeypatch, **settings):
    """The folder of a whole run of `main`."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    script.main(script.Args(**settings))
    (path,) = folder.glob("runs/*")
    return path


@pytest.mark.parametrize("factor", [1.0, 20.5])
@pytest.mark.parametrize("script", [sppo_atari, sppo_continuous])
def test_sppo_without_reverse_term_is_the_baseline_bit_for_bit(script, factor, tmp_path, monkeypatch):
    """α = factor, β = 0 against --pg-coef; 20.5 is α + β|Z| of the defaults for continuous control."""
    settings = SMALL[script] | dict(total_timesteps=512, learning_rate=3e-3, reward_noise=0.1, advantage_noise=0.1)
    baseline = ppo_baseline.ATARI_DEFAULTS if script is sppo_atari else dict(policy="discretized")
    folders = (
        run(script, tmp_path / "sppo", monkeypatch, alpha=factor, beta=0.0, **settings),
        run(ppo_baseline, tmp_path / "ppo", monkeypatch, pg_coef=factor, **baseline | settings),
    )
    sppo, matched = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders)
    for key in ("agent", "optimizer") if script is sppo_atari else ("agent", "optimizer", "stats"):
        torch.testing.assert_close(sppo[key], matched[key], rtol=0, atol=0)


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.5, 20.0)])
def test_matched_control(alpha, beta):
    """The first iteration on Hopper-v5 with the default settings, in float64: the same but for rounding."""
    torch.manual_seed(0)
    args = sppo_continuous.Args()
    envs = sppo_continuous.Environments(args, np.array([1]))
    fresh = sppo_continuous.BinnedAgent(11, envs.envs[0].action_space, args.num_bins)
    rollout = sppo_continuous.Rollout(args.num_steps, envs.obs, action_dims=3)
    sppo_continuous.collect_episodes(envs, fresh, rollout, np.random.default_rng(0))
    advantages = sppo_continuous.gae(rollout.rewards, rollout.values, rollout.dones, rollout.next_value, 0.99, 0.95)
    arrays = (rollout.obs, rollout.actions, rollout.logprobs, advantages, advantages + rollout.values)
    batch = [torch.from_numpy(x).flatten(0, 1) for x in arrays]
    batch = [x.double() if x.is_floating_point() else x for x in batch]

    def learn(script, **settings):
        args, agent = script.Args(**settings), copy.deepcopy(fresh).double()
        optimizer = torch.optim.Adam([vector := script.as_vector(agent)], lr=args.learning_rate, eps=1e-5)
        script.update(agent, optimizer, batch, np.arange(2048), CLIP_COEF, args, np.random.default_rng(1))
        return vector.detach()

    sppo = learn(sppo_continuous, alpha=alpha, beta=beta, Z=-1.0)
    matched, unmatched = (learn(ppo_baseline, pg_coef=factor) for factor in (alpha + beta, 1.0))
    assert (sppo - matched).norm() < 1e-9 * matched.norm()
    assert (sppo - unmatched).norm() > 1e-3 * unmatched.norm()


@pytest.mark.parametrize(
    "script, settings, expected",
    [
        (sppo_continuous, {}, 0.5 + 20),
        (sppo_continuous, dict(importance_weighted_reverse=False), 0.5 + 20 / 11 / 3),  # 11 bins, 3 dimensions
        (sppo_atari, dict(importance_weighted_reverse=False), 0.5 + 1 / 4),  # 4 actions
    ],
)
def test_the_mean_weight_that_is_logged(script, settings, expected, tmp_path, monkeypatch):
    """While the policy is still nearly uniform."""
    curves = EventAccumulator(str(run(script, tmp_path / "sppo", monkeypatch, **SMALL[script] | settings)))
    (event,) = curves.Reload().Scalars("losses/mean_weight")
    assert event.value == pytest.approx(expected, rel=0.01)
