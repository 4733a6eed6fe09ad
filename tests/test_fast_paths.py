"""What makes the scripts fast computes the same: parameters in one vector, compiled gradients, bfloat16."""

import copy
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo_baseline
import sa2c_atari
import sppo_atari
import sppo_continuous

ROOT = Path(__file__).parent.parent
COMPILER = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
BF16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="a CPU without bfloat16")


def control_batch(script, agent, size):
    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(size, 5, generator=generator)
    with torch.no_grad():
        if isinstance(agent, sppo_continuous.BinnedAgent | ppo_baseline.BinnedAgent):
            actions = agent.policy(obs).argmax(-1)
        else:
            actions = agent.policy(obs) + torch.randn(size, 3, generator=generator)
        logprobs = agent(obs, actions)[0]
    logprobs += 0.1 * torch.randn(logprobs.shape, generator=generator)  # so that some ratios are clipped
    advantages, returns = torch.randn(2, size, generator=generator)
    fields = dict(obs=obs, actions=actions, logprobs=logprobs, advantages=advantages, returns=returns)
    if "weight" in script.Batch._fields:
        fields["weight"] = torch.ones(size)
    return script.Batch(**fields)


def control_agent(script, kind):
    torch.manual_seed(0)
    return script.BinnedAgent(5, (3, 4)) if kind == "binned" else script.GaussianAgent(5, 3)


def plain_update(script, agent, batch, clip_coef, args, rng):
    """As in every textbook: backward, clip, step, with an optimiser that holds a tensor per layer."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    for _ in range(args.update_epochs):
        inds = torch.from_numpy(rng.permutation(len(batch.obs)))
        rng.random(len(batch.obs))  # for flips of advantages
        for mb_inds in inds.chunk(args.num_minibatches):
            mb = script.Batch(*(field[mb_inds] for field in batch))
            A = (mb.advantages - mb.advantages.mean()) / (mb.advantages.std() + 1e-8)
            logprob, entropy, value = agent(mb.obs, mb.actions)
            if script is ppo_baseline:
                policy_loss = args.pg_coef * script.ppo_loss(logprob, mb.logprobs, A, clip_coef)
            else:
                weights = args.alpha, args.beta, args.Z
                policy_loss, _, _ = script.symmetric_ppo_loss(logprob, mb.logprobs, A, *weights, clip_coef)
            loss = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * (value - mb.returns).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()


@pytest.mark.parametrize("ent_coef", [0.0, 0.01])
@pytest.mark.parametrize(
    "script, kind", [(sppo_continuous, "binned"), (ppo_baseline, "binned"), (ppo_baseline, "gaussian")]
)
def test_one_vector_of_parameters_learns_like_many_tensors(script, kind, ent_coef):
    args = script.Args(num_minibatches=4, update_epochs=3, learning_rate=3e-3, ent_coef=ent_coef)
    agent, plain = (control_agent(script, kind).double() for _ in range(2))
    batch = control_batch(script, control_agent(script, kind), 128)
    batch = script.Batch(*(x.double() if x.is_floating_point() else x for x in batch))
    before = copy.deepcopy(plain.state_dict())
    optimizer = torch.optim.Adam([script.as_vector(agent)], lr=args.learning_rate, eps=1e-5)
    script.update(agent, optimizer, batch, 0.2, args, np.random.default_rng(0))
    plain_update(script, plain, batch, 0.2, args, np.random.default_rng(0))
    for name, tensor in plain.state_dict().items():
        assert (tensor - before[name]).abs().max() > 1e-4
        torch.testing.assert_close(agent.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_vector_holds_the_parameters():
    agent = control_agent(sppo_continuous, "binned")
    before = torch.nn.utils.parameters_to_vector(agent.parameters()).detach()
    vector = sppo_continuous.as_vector(agent)
    assert torch.equal(vector, before)
    with torch.no_grad():
        vector += 1
    assert torch.equal(torch.nn.utils.parameters_to_vector(agent.parameters()), before + 1)
    agent.load_state_dict({name: torch.zeros_like(x) for name, x in agent.state_dict().items()})
    assert not vector.any()


def atari_batch(script, size):
    generator = torch.Generator().manual_seed(1)
    obs = torch.randint(256, (size, 84, 84, 4), dtype=torch.uint8, generator=generator)
    fields = dict(obs=obs, actions=torch.arange(size) % 6, weight=torch.ones(size))
    fields |= dict(zip(("advantages", "returns"), torch.randn(2, size, generator=generator)))
    if "logprobs" in script.Batch._fields:
        fields["logprobs"] = torch.full((size, 1), -1.8)
    return script.Batch(**fields)


@COMPILER
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_compiled_gradient_is_the_gradient():
    """Relative error below 1e-5; a clip range that changes does not compile anew."""
    script, agent = sppo_continuous, control_agent(sppo_continuous, "binned")
    args = script.Args(compile=True, num_minibatches=2, update_epochs=2)
    batch = control_batch(script, agent, 64)
    compiled, calls = torch.compile(script.gradient, fullgraph=True), []

    def both(agent, mb, clip, args):
        calls.append(clip)
        expected, result = script.gradient(agent, mb, clip, args), compiled(agent, mb, clip, args)
        for x, y in zip(expected, result):
            x, y = (z[0] if isinstance(z, list) else z for z in (x, y))
            assert (x - y).norm() < 1e-5 * x.norm()
        return result

    optimizer = torch.optim.Adam([script.as_vector(agent)], lr=args.learning_rate)
    torch._dynamo.utils.counters.clear()
    for clip_coef in (0.2, 0.19, 0.18):
        script.update(agent, optimizer, batch, clip_coef, args, np.random.default_rng(0), both)
    assert len(calls) == 12 and len({float(clip) for clip in calls}) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=BF16)])
@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, ppo_baseline])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_the_gradient_on_atari_is_one_graph(script, bf16):
    """As --compile asks; without the C++ compiler behind it the numbers are the same."""
    torch.manual_seed(0)
    agent, args, batch = script.AtariAgent(6, bf16), script.Args(compile=True, ent_coef=0.01), atari_batch(script, 16)
    arguments = (agent, batch, args) if script is sa2c_atari else (agent, batch, torch.tensor(0.1), args)
    compiled = torch.compile(script.gradient, fullgraph=True, backend="aot_eager")
    (grads, *rest), (expected_grads, *expected) = (function(*arguments) for function in (compiled, script.gradient))
    for x, y in zip((*grads, *rest), (*expected_grads, *expected)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("script", ["sppo_atari", "sa2c_atari", "ppo_baseline"])
def test_freed_memory_is_kept(script):
    """The system hands out a fresh page of 4 KiB per page fault; 40 MB anew each time would be 10,000 faults a time."""
    code = f"""
import resource, torch, {script}
{script}.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(faults() for _ in range(20)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    counts = list(map(int, result.stdout.split()))
    assert counts[0] > 5000 and sum(counts) < 5 * counts[0]  # until the heap has its size


@BF16
@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, ppo_baseline])
def test_bf16_is_close_and_only_inside(script):
    """Heads, losses and parameters stay float32; the gradient points the same way (cosine above 0.99)."""
    torch.manual_seed(0)
    exact = script.AtariAgent(6)
    rough = script.AtariAgent(6, bf16=True)
    rough.load_state_dict(exact.state_dict())
    args, batch = script.Args(max_grad_norm=1e9), atari_batch(script, 32)
    if script is ppo_baseline:
        args.ent_coef = 0.01
    clip = () if script is sa2c_atari else (0.1,)
    (grads, losses, logprob), (rough_grads, rough_losses, rough_logprob) = (
        script.gradient(agent, batch, *clip, args) for agent in (exact, rough)
    )
    assert not torch.equal(logprob, rough_logprob)
    torch.testing.assert_close(logprob, rough_logprob, rtol=0.02, atol=0.02)
    torch.testing.assert_close(losses, rough_losses, rtol=0.05, atol=0.02)
    assert all(x.dtype == torch.float32 for x in (*rough_grads, rough_losses, rough_logprob, *rough.parameters()))
    x, y = (torch.cat([grad.flatten() for grad in side]) for side in (grads, rough_grads))
    assert torch.nn.functional.cosine_similarity(x, y, dim=0) > 0.99


@pytest.mark.parametrize("script", [sppo_atari, sa2c_atari, ppo_baseline, sppo_continuous])
def test_flags_that_would_not_help_are_refused(script, monkeypatch):
    args = script.Args(cuda=False, compile=True)
    if script is ppo_baseline:
        args.env_id = "ALE/Breakout-v5"
        script.fill_in(args)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="--compile needs a C\\+\\+ compiler"):
        script.validate(args)
    if script is not sppo_continuous:
        args.compile, args.bf16 = False, True
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        with pytest.raises(ValueError, match="--bf16 would be slower: this CPU"):
            script.validate(args)


def test_bf16_is_for_atari():
    args = ppo_baseline.Args(env_id="Hopper-v5", bf16=True, cuda=False)
    ppo_baseline.fill_in(args)
    with pytest.raises(ValueError, match="--bf16 is for Atari"):
        ppo_baseline.validate(args)


def test_fused_adam_takes_gradients_of_any_memory_layout():
    """Without oneDNN the gradients of the convolutions, whose weights are channels-last, come in another layout."""
    results = []
    for onednn in (True, False):
        torch.manual_seed(0)
        agent, args = sppo_atari.AtariAgent(6), sppo_atari.Args(num_minibatches=1, update_epochs=1)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5, fused=True)
        with torch.backends.mkldnn.flags(enabled=onednn):
            sppo_atari.update(agent, optimizer, atari_batch(sppo_atari, 16), 0.1, args, np.random.default_rng(0))
        results.append(torch.nn.utils.parameters_to_vector(p.contiguous() for p in agent.features[:6].parameters()))
    different = (results[0] - results[1]).abs() > 1e-4  # Adam's first step is about as long as the learning rate
    assert different.float().mean() < 0.02
