"""An update is steps down the loss and nothing else: against loops as in textbooks, in float64.
SPPO with β = 0 is the baseline, and learns what its matched control learns."""

import copy
import os
import shutil
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import textbook
import torch
import torch.nn as nn
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch.distributions import Categorical

import ppo_baseline
import sa2c_atari
import sa2c_continuous
import sppo_atari
import sppo_continuous

BOX = gym.spaces.Box(-1, 1, (3,))
OBS_SPACE = gym.spaces.Box(-9, 9, (5,))
BINS = np.linspace([-1] * 3, [1] * 3, 4, axis=1)


class Player(nn.Module):
    """In place of `AtariAgent`, which is float32 alone: one layer without pixels."""

    def __init__(self):
        super().__init__()
        self.policy = nn.Linear(5, 4)
        self.value = nn.Linear(5, 1)

    def forward(self, obs):
        return Categorical(logits=self.policy(obs)), self.value(obs).squeeze(1)


def make_agent(kind):
    torch.manual_seed(0)
    if kind == "player":
        agent = Player()
    elif kind == "binned":
        agent = sppo_continuous.BinnedAgent(OBS_SPACE, BOX, 4)
    else:  # the baseline's
        agent = ppo_baseline.ControlAgent(5, BOX, BINS if kind == "baseline" else None)
    return agent.double()


def judge(agent, obs, action):
    """Log-probabilities (batch, D), where they are joint (batch, 1); entropies, values (batch,)."""
    if isinstance(agent, sppo_continuous.BinnedAgent):
        return agent(obs, action)
    policy, value = agent(obs)
    return policy.log_prob(action).unsqueeze(1), policy.entropy(), value


def make_batch(agent):
    """(obs, actions, log π_old, advantages, returns); some ratios are out of the clip range."""
    rng = np.random.default_rng(0)
    obs = torch.from_numpy(rng.normal(size=(64, 5)))
    if isinstance(agent, Player):
        action = torch.from_numpy(rng.integers(4, size=64))
    elif hasattr(agent, "log_std"):
        action = torch.from_numpy(rng.normal(size=(64, 3)))
    else:
        action = torch.from_numpy(rng.integers(4, size=(64, 3)))
    old_logprob = judge(agent, obs, action)[0].detach()
    old_logprob += torch.from_numpy(rng.normal(0, 0.1, old_logprob.shape))
    if not isinstance(agent, sppo_continuous.BinnedAgent):
        old_logprob = old_logprob.squeeze(1)
    advantages, returns = torch.from_numpy(rng.normal(size=(2, 64)) + 0.5)
    return obs, action, old_logprob, advantages, returns


def learn(script, agent, batch, args, *loss_function, optimizer=None):
    """The script's `update` from one seed. The clip range is 0.2."""
    torch.manual_seed(1)
    if optimizer is None:  # the one in `main`
        optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
    clip_coef = () if script is sppo_continuous else (torch.tensor(0.2),)
    return script.update(agent, optimizer, batch, *clip_coef, args, *loss_function)


def vector(agent):
    return nn.utils.parameters_to_vector(agent.parameters()).detach()


def normalized(advantage):
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def textbook_update(agent, batch, args, coefficients, weighted):
    """Plain autograd and Adam; the loss by its gradients. Returns the means of what is logged."""
    torch.manual_seed(1)
    alpha, beta, Z = coefficients
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    history = []
    for _ in range(args.update_epochs):
        for inds in torch.randperm(64).chunk(args.num_minibatches):
            obs, action, old_logprob, clean, returns = (x[inds] for x in batch)
            noisy = torch.where(torch.rand_like(clean) < args.advantage_noise, -clean, clean)
            A = normalized(noisy) if args.norm_adv else noisy
            logprob, entropy, value = judge(agent, obs, action)
            old_logprob = old_logprob.view(logprob.shape)
            arrays = [x.detach().numpy() for x in (logprob, old_logprob, A)]
            forward, reverse, gradient = textbook.symmetric_ppo(
                *arrays, *coefficients, 0.2, weighted
            )
            value_loss = (value - returns).square().mean()
            loss = (torch.from_numpy(gradient) * logprob).sum()  # which has that gradient
            loss = loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss

            optimizer.zero_grad()
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in agent.parameters()]).norm()
            for p in agent.parameters():
                p.grad *= min(1, args.max_grad_norm / (norm + 1e-6))
            optimizer.step()

            r = (logprob - old_logprob).sum(1).exp()
            history.append(
                {
                    "losses/policy_loss": alpha * forward.mean() + beta * reverse.mean(),
                    "losses/forward_loss": forward.mean(),
                    "losses/reverse_loss": reverse.mean(),
                    "losses/value_loss": value_loss.item(),
                    "losses/entropy": entropy.mean().item(),
                    "losses/grad_norm": norm.item(),  # before it is cut
                    "losses/approx_kl": (r - 1 - r.log()).mean().item(),
                    "losses/clipfrac": ((r - 1).abs() > 0.2).double().mean().item(),
                    "losses/mean_weight": np.mean(
                        alpha + beta * abs(Z) * np.exp(arrays[1]).mean(1) / logprob.shape[1]
                    ),
                    "advantage/sign_flips_normalization": (A * noisy < 0).double().mean().item(),
                }
            )
    return {tag: np.mean([x[tag] for x in history]) for tag in history[0]}


UPDATE = dict(num_minibatches=4, update_epochs=2, learning_rate=3e-3, max_grad_norm=0.1)


@pytest.mark.parametrize(
    "script, kind",
    [
        (sppo_atari, "player"),
        (sppo_continuous, "binned"),
        (ppo_baseline, "player"),
        (ppo_baseline, "gaussian"),
    ],
)
@pytest.mark.parametrize(
    "weighted, flags",
    [(True, dict(ent_coef=0.0)), (False, dict(ent_coef=0.01, advantage_noise=0.3, norm_adv=False))],
)
def test_an_update_is_a_textbooks(script, kind, weighted, flags):
    agent = make_agent(kind)
    batch = make_batch(agent)
    plain, before = copy.deepcopy(agent), vector(agent)
    if script is ppo_baseline:
        args = script.Args(**UPDATE, **flags, pg_coef=1.7)
        coefficients = (1.7, 0.0, -1.0)
        absent = ["losses/forward_loss", "losses/reverse_loss", "losses/mean_weight"]
    else:
        args = script.Args(**UPDATE, **flags, beta=3.0, Z=-2.0)
        args.importance_weighted_reverse = weighted
        coefficients = (0.5, 3.0, -2.0)
        absent = ["losses/mean_weight"] if weighted else []
    logged = learn(script, agent, batch, args)
    expected = textbook_update(plain, batch, args, coefficients, weighted)
    expected = {tag: value for tag, value in expected.items() if tag not in absent}
    assert logged == pytest.approx(expected, rel=1e-5)
    assert logged["losses/clipfrac"] > 0 and logged["losses/grad_norm"] > args.max_grad_norm
    assert (vector(plain) - before).abs().median() > 1e-3
    torch.testing.assert_close(vector(agent), vector(plain), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("script, kind", [(sa2c_atari, "player"), (sa2c_continuous, "binned")])
@pytest.mark.parametrize("flags", [{}, dict(norm_adv=True, advantage_noise=0.3)])
def test_an_update_of_sa2c_is_one_step_down_the_loss(script, kind, flags):
    args = script.Args(beta=3.0, Z=-2.0, max_grad_norm=0.1, ent_coef=0.01, vf_coef=0.25, **flags)
    agent = make_agent(kind)
    obs, action, _, advantages, returns = make_batch(agent)
    logprob, entropy, value = judge(agent, obs, action)
    torch.manual_seed(1)
    noisy = torch.where(torch.rand_like(returns) < args.advantage_noise, -advantages, advantages)
    A = normalized(noisy) if args.norm_adv else noisy
    forward, reverse, by_logprob = textbook.symmetric_a2c(
        logprob.detach().numpy(), A.numpy(), 0.5, 3.0, -2.0
    )
    value_loss = (value - returns).square().mean()
    loss = (torch.from_numpy(by_logprob) * logprob).sum()  # which has the gradient of the loss
    loss = loss - 0.01 * entropy.mean() + 0.25 * value_loss
    gradient = torch.autograd.grad(loss, agent.parameters())
    gradient = torch.cat([x.flatten() for x in gradient])
    before = vector(agent)

    torch.manual_seed(1)
    sgd = torch.optim.SGD(agent.parameters(), lr=1.0)
    logged = script.update(agent, sgd, [obs, action, advantages, returns], args)
    step = gradient * 0.1 / (gradient.norm() + 1e-6)
    torch.testing.assert_close(vector(agent), before - step, rtol=1e-5, atol=1e-9)
    pi = logprob.detach().exp()
    assert {tag: float(x) for tag, x in logged.items()} == pytest.approx(
        {
            "losses/policy_loss": 0.5 * forward.mean() + 3.0 * reverse.mean(),
            "losses/forward_loss": forward.mean(),
            "losses/reverse_loss": reverse.mean(),
            "losses/value_loss": value_loss.item(),
            "losses/entropy": entropy.mean().item(),
            "losses/grad_norm": gradient.norm().item(),  # before it is cut
            "losses/mean_weight": 0.5 + 3 * 2 * pi.mean().item() / pi.shape[1],
            "advantage/sign_flips_normalization": (A * noisy < 0).double().mean().item(),
        },
        rel=1e-5,
    )


# Matched control


def with_joint_logprobs(batch):
    """As the baseline has it."""
    obs, action, old_logprob, advantages, returns = batch
    return obs, action, old_logprob.sum(1), advantages, returns


@pytest.mark.parametrize("factor", [1.0, 20.5])
@pytest.mark.parametrize("script, kind", [(sppo_atari, "player"), (sppo_continuous, "binned")])
def test_sppo_without_reverse_term_is_the_baseline(script, kind, factor):
    """From one batch by the same minibatches: α = factor, β = 0 against --pg-coef."""
    agent = make_agent(kind)
    batch = make_batch(agent)
    if kind == "player":
        other, other_batch = copy.deepcopy(agent), batch
    else:
        other, other_batch = make_agent("baseline"), with_joint_logprobs(batch)
        other.load_state_dict(agent.state_dict())
    flags = UPDATE | dict(ent_coef=0.01, advantage_noise=0.1)
    before = vector(agent)
    logged = learn(script, agent, batch, script.Args(**flags, alpha=factor, beta=0.0))
    matched = learn(ppo_baseline, other, other_batch, ppo_baseline.Args(**flags, pg_coef=factor))
    assert (vector(agent) - before).norm() > 0.01
    torch.testing.assert_close(vector(agent), vector(other), rtol=1e-10, atol=1e-12)
    assert {tag: logged[tag] for tag in matched} == pytest.approx(matched, rel=1e-6)


@pytest.fixture(scope="module")
def hopper():
    """A fresh agent and its first batch, in float64."""
    sppo_continuous.set_seeds(1)
    args = sppo_continuous.Args()
    env = sppo_continuous.Environment(sppo_continuous.make_env(args.env_id), args.gamma)
    spaces = env.env.observation_space, env.env.action_space
    agent = sppo_continuous.BinnedAgent(*spaces, args.num_bins)
    env.reset(seed=1)
    rollout, _ = sppo_continuous.collect(env, agent, 512)
    context = (rollout[name] for name in ("rewards", "values", "next_values", "dones"))
    advantages = sppo_continuous.gae(*context, args.gamma, args.gae_lambda)
    returns = advantages + rollout["values"]
    batch = (rollout["obs"], rollout["actions"], rollout["logprobs"], advantages, returns)
    batch = [torch.from_numpy(x) for x in batch]
    return agent.double(), [x.double() if x.is_floating_point() else x for x in batch]


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.5, 20.0)])
def test_matched_control(alpha, beta, hopper):
    """SPPO and PPO with --pg-coef α + β|Z| start from one gradient, and learn the same on Hopper-v5
    with the default settings, but for rounding."""
    fresh, batch = hopper
    joint = with_joint_logprobs(batch)
    control = ppo_baseline.ControlAgent(11, gym.make("Hopper-v5").action_space, fresh.bins)
    control.double().load_state_dict(fresh.state_dict())
    flags = dict(num_minibatches=8, update_epochs=4)
    sppo_args = sppo_continuous.Args(**flags, alpha=alpha, beta=beta)
    args = ppo_baseline.Args(**flags, pg_coef=alpha + beta)

    sppo_loss, _ = sppo_continuous.minibatch_loss(fresh, *batch, sppo_args)
    loss, _ = ppo_baseline.minibatch_loss(control, *joint, torch.tensor(0.2), args)
    gradients = [
        torch.autograd.grad(x, agent.parameters())
        for x, agent in ((sppo_loss, fresh), (loss, control))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

    agent, unmatched = copy.deepcopy(fresh), copy.deepcopy(control)
    learn(sppo_continuous, agent, batch, sppo_args)
    learn(ppo_baseline, control, joint, args)
    learn(ppo_baseline, unmatched, joint, replace(args, pg_coef=1.0))
    assert (vector(agent) - vector(control)).norm() < 1e-9 * vector(control).norm()
    assert (vector(agent) - vector(unmatched)).norm() > 1e-3 * vector(control).norm()


# Compiled, in bfloat16


def pixels(size):
    """An agent whose policy is not uniform, and a batch in float32."""
    torch.manual_seed(0)
    agent = sppo_atari.AtariAgent(4)
    agent.policy.weight.data *= 100
    obs = torch.randint(256, (size, 4, 84, 84), dtype=torch.uint8)
    action = torch.randint(4, (size,))
    old_logprob = agent(obs)[0].log_prob(action).detach() + 0.1 * torch.randn(size)
    return agent, (obs, action, old_logprob, *torch.randn(2, size))


@pytest.mark.parametrize("script", [sppo_atari, sppo_continuous])
def test_compiled_it_learns_the_same(script):
    """And is not compiled again when the clip range changes. The C++ compiler takes its time, and
    does it for one agent."""
    backend = "aot_eager"
    if script is sppo_atari:
        agent, batch = pixels(16)
    else:
        agent = make_agent("binned")
        batch = [x.float() if x.is_floating_point() else x for x in make_batch(agent)]
        agent.float()
        if shutil.which(os.environ.get("CXX", "g++")):
            backend = "inductor"
    compiled = torch.compile(script.minibatch_loss, backend=backend)
    args = script.Args(num_minibatches=2, update_epochs=2)
    agents = [agent, copy.deepcopy(agent)]
    before = vector(agent)
    graphs = []
    for clip_coef in (0.2, 0.19, 0.18):
        logged = []
        for agent, loss_function in zip(agents, (script.minibatch_loss, compiled)):
            torch.manual_seed(1)
            sgd = torch.optim.SGD(agent.parameters(), lr=0.1)
            clip = () if script is sppo_continuous else (torch.tensor(clip_coef),)
            logged.append(script.update(agent, sgd, batch, *clip, args, loss_function))
        eager, fast = map(vector, agents)
        assert (eager - fast).norm() < 1e-4 * (eager - before).norm()
        assert logged[0] == pytest.approx(logged[1], rel=1e-3, abs=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1]


def test_bf16_gradients_point_the_same_way():
    """In every minibatch of an update: weights that autocast has converted are used but once."""
    agent, batch = pixels(8)
    exact = copy.deepcopy(agent)
    args = sppo_atari.Args(num_minibatches=1, update_epochs=2, bf16=True)
    losses, gradients = [], []

    def both(agent, *inputs):
        exact.load_state_dict(agent.state_dict())
        loss, logged = sppo_atari.minibatch_loss(agent, *inputs)
        expected, _ = sppo_atari.minibatch_loss(exact, *inputs[:-1], replace(args, bf16=False))
        assert loss.dtype == torch.float32 and loss != expected
        for x, model in ((loss, agent), (expected, exact)):
            gradient = torch.autograd.grad(x, model.parameters(), retain_graph=True)
            gradients.append(torch.cat([x.flatten() for x in gradient]))
        losses.append((loss.item(), expected.item()))
        return loss, logged

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy, value = agent(batch[0])  # as `collect` does
    assert policy.logits.dtype == value.dtype == torch.float32
    sgd = torch.optim.SGD(agent.parameters(), lr=0.5)
    learn(sppo_atari, agent, batch, args, both, optimizer=sgd)
    cosine = nn.functional.cosine_similarity
    rough, true, later_rough, later_true = gradients
    assert cosine(rough, true, 0) > 0.98 and cosine(later_rough, later_true, 0) > 0.98
    assert cosine(true, later_true, 0) < 0.9  # stale weights would be noticed
    np.testing.assert_allclose(*np.transpose(losses), rtol=0.05)


# RMSprop


def test_rmsprop_by_hand():
    """v starts at 1: v ← ρv + (1 − ρ)g², p ← p − lr·g / √(v + ε)."""
    rng = np.random.default_rng(0)
    parameter = nn.Parameter(torch.from_numpy(rng.normal(size=(3, 2))))
    optimizer = sa2c_atari.RMSpropTF([parameter], lr=0.1, decay=0.9, eps=0.5)
    expected = parameter.detach().numpy().copy()
    v = np.ones((3, 2))
    for step in range(20):
        lr = 0.1 / (step + 1)  # as --anneal-lr sets it
        optimizer.param_groups[0]["lr"] = lr
        gradient = rng.normal(size=(3, 2)) * 10 ** rng.uniform(-3, 1)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        v = 0.9 * v + 0.1 * gradient**2
        expected -= lr * gradient / np.sqrt(v + 0.5)
        np.testing.assert_allclose(parameter.detach(), expected, rtol=1e-12)


def test_rmsprop_is_stable_baselines():
    """With the settings A2C uses; several parameters, float32; also after a checkpoint."""
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (5,))] for _ in "ab")
    optimizer = sa2c_atari.RMSpropTF(ours, lr=7e-4)
    reference = RMSpropTFLike(theirs, lr=7e-4, alpha=0.99, eps=1e-5)
    for step in range(50):
        for one, other in zip(ours, theirs):
            one.grad = other.grad = torch.randn(one.shape)
        optimizer.step()
        reference.step()
        if step == 25:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = sa2c_atari.RMSpropTF(ours, lr=1.0)
            optimizer.load_state_dict(state)
    for one, other in zip(ours, theirs):
        assert (one - 1).abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
