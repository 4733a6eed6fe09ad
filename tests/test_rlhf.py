"""sppo_rlhf.py on real, tiny models: what users of such code report, the loss of tokens, whole runs, bad input."""

import contextlib
import copy
import csv
import json
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import textbook
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import END, SENTENCES, make_tokenizer, save_models
from torch.utils._python_dispatch import TorchDispatchMode

import sppo_rlhf as script

SCRIPT = Path(script.__file__)
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt2 with a padding token"])
AGENTS = pytest.mark.parametrize("kind, lora_rank", [("gpt2", 0), ("gpt2", 4), ("llama", 0), ("llama", 4)])
LORA = pytest.mark.parametrize("lora_rank", [0, 4])
T = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    for kind in ("gpt2", "llama"):
        save_models(folder / kind, kind)
        save_models(folder / f"{kind} without dropout", kind, dropout=0.0)
        save_models(folder / f"{kind} with much dropout", kind, dropout=0.5)
    save_models(folder / "gpt2 with a padding token", pad="<pad>")
    for name, labels in (("proxy", 2), ("scalar", 1)):  # sees what follows, other than the rest
        size = dict(dim=32, hidden_dim=64, n_layers=1, n_heads=2, max_position_embeddings=64, initializer_range=0.2)
        config = transformers.DistilBertConfig(vocab_size=60, num_labels=labels, **size)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "bert" / name)
        make_tokenizer().save_pretrained(folder / "bert" / name)
    return folder


@pytest.fixture
def make(models):
    """Flags for the models of a kind; four iterations of eight responses."""

    def args(kind="gpt2", **flags):
        names = dict(model="policy", reward_model="proxy", gold_model="scalar", prompts="prompts.csv")
        given = {name: str(models / kind / file) for name, file in names.items()} | dict(
            reward_label=1, prompt_length=12, response_length=T, seed=3, total_episodes=32, batch_size=8,
            num_minibatches=2, micro_batch_size=3, update_epochs=2, learning_rate=1e-3, eval_episodes=6,
            checkpoint_interval=8, cuda=False, torch_threads=1)  # fmt: skip
        return script.Args(**given | flags)

    return args


def load(args, moved=True):
    """Agent, tokenizer, judge. Moved: what is trained has left where it began, so that policy and reference differ."""
    torch.manual_seed(args.seed)
    tokenizer = script.load_tokenizer(args.model)
    agent = script.LanguageAgent(args, tokenizer)
    torch.manual_seed(0)
    for parameter in trained(agent).values():
        parameter.data += moved * 0.05 * torch.randn_like(parameter)
    return agent, tokenizer, script.Judge(args.reward_model, args.reward_label, torch.device("cpu"))


def trained(agent):
    return {name: parameter for name, parameter in agent.named_parameters() if parameter.requires_grad}


def collect(agent, tokenizer, judge, args, responses=None, prompts=SENTENCES):
    """Responses to prompts of different length, or these, which are lists of tokens and where 0 ends the text."""
    if responses:
        rows = [row + [0] * (max(map(len, responses)) - len(row)) for row in responses]
        agent.policy.generate = lambda input_ids, attention_mask: torch.cat((input_ids, torch.tensor(rows)), 1)
    return script.collect_responses(agent, tokenizer, judge, prompts, args, seed=1)


ENDINGS = [[5, 0], [0], [5, 6, 0, 7, 0], [5] * T, [5] * (T - 1) + [0], [9, 0, 0, 0], [5, 6, 7, 0], [0, 7]]
LENGTHS = [2, 1, 3, T, T, 2, 4, 1]


def alone(model, tokens, attention):
    """The plain model's outputs for each row without its padding, row by row, in float64."""
    with torch.no_grad():
        return [model(row[keep][None]).logits[0].double() for row, keep in zip(tokens, attention.bool())]


def plain_values(agent, tokens, attention, mask):
    """Values of the texts before the tokens in the mask, row after row."""
    with torch.no_grad():
        hidden = [agent.value(row[keep][None]).last_hidden_state[0] for row, keep in zip(tokens, attention.bool())]
        return torch.cat([agent.value_head(x[-1 - n : -1])[:, 0] for x, n in zip(hidden, mask.sum(1).tolist())])


def plain_logprobs(model, tokens, attention, mask, temperature=1.0):
    """Log-probabilities of the tokens in the mask, row after row."""
    found = []
    for row, keep, n, logits in zip(tokens, attention.bool(), mask.sum(1).tolist(), alone(model, tokens, attention)):
        logprobs = (logits / temperature).log_softmax(1)
        found += [logprobs[-1 - n + i, token] for i, token in enumerate(row[keep][-n:])]
    return torch.stack(found)


def close(one, other, atol=2e-5):
    torch.testing.assert_close(torch.as_tensor(one).double(), torch.as_tensor(other).double(), rtol=1e-5, atol=atol)


def batch_of(rollout, args):
    """What `update` is given."""
    rewards = script.token_rewards(rollout, rollout.scores, args.kl_coef)
    values, dones = rollout.values.T.numpy(), rollout.last.T.numpy()
    advantages = script.gae(rewards, values, dones, np.zeros_like(values[0]), args.gamma, args.gae_lambda)
    advantages = torch.from_numpy(advantages.T)
    rows = (rollout.tokens, rollout.attention, rollout.mask, rollout.logprobs)
    return [*rows, advantages, advantages + rollout.values]


def update(agent, batch, args):
    """One update by Adam: what is logged, and the weights after it."""
    optimizer = torch.optim.Adam(trained(agent).values(), lr=args.learning_rate, eps=1e-5)
    stats = script.update(agent, optimizer, batch, args, np.random.default_rng(1))
    return stats, torch.cat([parameter.detach().flatten() for parameter in trained(agent).values()])


# --------------------------------------------------------------------------------------- what users of such code report


@AGENTS
def test_ratios_are_1_before_the_first_step(kind, lora_rank, make):
    """Prompts differ in length, the chunks in which old and new probabilities are computed in size."""
    args = make(kind, lora_rank=lora_rank)
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args)
    assert all(len(set(x.sum(1).tolist())) > 1 for x in (rollout.attention[:, :-T], rollout.mask))
    batch = batch_of(rollout, args)
    for rows in torch.randperm(8).split(2):
        _, logged = script.losses_of(agent, *(x[rows] for x in batch), args=args)
        stats = dict(zip(script.TAGS, logged.tolist()))
        assert max(abs(stats["losses/old_approx_kl"]), stats["losses/approx_kl"]) < 1e-5
        assert stats["losses/clipfrac"] == 0


@AGENTS
def test_a_padded_row_is_the_row_alone(kind, lora_rank, make):
    args = make(kind, lora_rank=lora_rank)
    agent, *others = load(args)
    rollout = collect(agent, *others, args)
    tokens, attention, mask = rollout[:3]
    assert attention[:, 0].min() == 0  # some are padded
    close(rollout.logprobs[mask], plain_logprobs(agent.policy, tokens, attention, mask))
    reference = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    close(rollout.ref_logprobs[mask], plain_logprobs(reference, tokens, attention, mask))
    assert (rollout.logprobs - rollout.ref_logprobs)[mask].abs().max() > 0.01
    close(rollout.values[mask], plain_values(agent, tokens, attention, mask))


@pytest.mark.parametrize("name, label", [("proxy", 0), ("proxy", 1), ("scalar", None)])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt2 with a padding token", "bert"])
def test_the_reward_of_a_text_depends_on_it_alone(kind, name, label, models):
    folder = models / kind / name
    judge = script.Judge(str(folder), label, torch.device("cpu"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [*SENTENCES, " ".join(SENTENCES)]  # the last is longer than the context: its end counts
    for text, score in zip(texts, judge(texts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text)["input_ids"][-64:]])).logits[0].double()
        close(score, logits[0] if label is None else logits.softmax(0)[label])
        close(score, judge([text])[0])
    assert np.ptp(judge(texts)) > 0.1


def test_what_is_judged_is_prompt_and_response(make):
    args = make()
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args, ENDINGS)
    short = [prompt if len(tokenizer(prompt)["input_ids"]) <= 12 else None for prompt in SENTENCES]
    for prompt, response, n, text, score in zip(short, ENDINGS, LENGTHS, rollout.texts, rollout.scores):
        words = tokenizer.decode([token for token in response[:n] if token])
        assert prompt is None or text == prompt + words
        assert text.endswith(words) and END not in text and score == pytest.approx(judge([text])[0], abs=1e-6)


@KINDS
def test_the_first_end_of_text_is_trained_and_what_follows_is_not(kind, make):
    args = make(kind)
    agent, tokenizer, judge = load(args)
    batch = batch_of(collect(agent, tokenizer, judge, args, ENDINGS), args)
    assert batch[2].tolist() == [[i < n for i in range(T)] for n in LENGTHS]
    kept, head = [], agent.policy.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, given, logits: kept.append(logits) or logits.retain_grad())
    script.losses_of(agent, *batch, args=args)[0].backward()
    hook.remove()
    assert torch.equal(kept[0].grad[:, :T].abs().amax(2) > 0, batch[2])
    assert not kept[0].grad[:, T].any()


def test_the_score_lies_on_the_last_real_token(make):
    """With and without an end of text; also if there is but one token."""
    args = make()
    rollout = collect(*load(args), args, ENDINGS)
    rewards = script.token_rewards(rollout, rollout.scores, kl_coef=0.0)
    expected = np.zeros((T, 8))
    expected[np.array(LENGTHS) - 1, range(8)] = rollout.scores
    np.testing.assert_array_equal(rewards, expected)
    assert rollout.ended.tolist() == [True] * 3 + [False] + [True] * 4
    one = collect(*load(args := make(response_length=1)), args, [[5], [0]] * 4)
    np.testing.assert_array_equal(script.token_rewards(one, one.scores, kl_coef=0.0), one.scores[None])
    assert one.mask.all() and one.ended.tolist() == [False, True] * 4


@AGENTS
def test_padding_may_be_garbage(kind, lora_rank, make):
    """In statistics, normalisation and training."""
    args = make(kind, lora_rank=lora_rank, kl_coef=0.3)
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args, ENDINGS)
    rng = torch.Generator().manual_seed(0)
    spoilt = {"tokens": torch.where(rollout.attention == 1, rollout.tokens, 7)}
    for name in ("logprobs", "ref_logprobs", "values"):
        garbage = 100 * torch.randn(rollout.mask.shape, generator=rng)
        spoilt[name] = torch.where(rollout.mask, getattr(rollout, name), garbage)
    spoilt = rollout._replace(**spoilt)
    assert script.describe(spoilt) == script.describe(rollout)
    results = [update(copy.deepcopy(agent), batch_of(x, args), args) for x in (rollout, spoilt)]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5, abs=1e-6)
    close(results[0][1], results[1][1])


def test_statistics_are_those_of_a_loop(make):
    args = make()
    rollout = collect(*load(args), args, ENDINGS)
    logprobs, references, k1, pairs = [], [], [], []
    for i, n in enumerate(LENGTHS):
        logprobs += (new := rollout.logprobs[i, :n].double().tolist())
        references += (old := rollout.ref_logprobs[i, :n].double().tolist())
        k1.append(sum(new) - sum(old))
        pairs += [(ENDINGS[i][j], ENDINGS[i][j + 1]) for j in range(n - 1)]
    k3 = [np.exp(y - x) - 1 + x - y for x, y in zip(logprobs, references)]
    expected = dict(score=rollout.scores.mean(), kl=np.mean(k1), kl_k3=sum(k3) / 8, entropy=-np.mean(logprobs),
                    reference_perplexity=np.exp(-np.mean(references)), distinct_2=len(set(pairs)) / len(pairs),
                    response_length=np.mean(LENGTHS), ended=7 / 8)  # fmt: skip
    assert script.describe(rollout) == pytest.approx(expected, rel=1e-4)


@AGENTS
def test_kl_is_exactly_0_before_training(kind, lora_rank, make):
    args = make(kind, lora_rank=lora_rank)
    rollout = collect(*load(args, moved=False), args)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert script.describe(rollout)["kl"] == script.describe(rollout)["kl_k3"] == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@AGENTS
def test_there_is_one_temperature_for_sampling_and_all_probabilities(kind, lora_rank, temperature, make):
    args = make(kind, lora_rank=lora_rank, temperature=temperature)
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args)
    tokens, attention, mask = rollout[:3]
    torch.manual_seed(1)
    inputs = {"input_ids": tokens[:, :-T], "attention_mask": attention[:, :-T]}
    sampled = agent.policy.generate(**inputs, output_scores=True, return_dict_in_generate=True)
    response = sampled.sequences[:, -len(sampled.scores) :]  # shorter, if all end earlier
    assert torch.equal(response, tokens[:, -T:][:, : response.shape[1]])
    scores = torch.stack(sampled.scores, 1).log_softmax(2).gather(2, response[:, :, None]).squeeze(2)
    close(rollout.logprobs[mask], scores[mask[:, : response.shape[1]]], atol=1e-4)
    close(agent.logprobs(tokens, attention)[mask], rollout.logprobs[mask])
    reference = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    close(rollout.ref_logprobs[mask], plain_logprobs(reference, tokens, attention, mask, temperature))


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_tokens_are_sampled_as_often_as_is_said(temperature, make):
    """The rare ones, too: none are left out."""
    args = make(temperature=temperature, response_length=1, micro_batch_size=4096)
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args, prompts=SENTENCES[:1] * 4096)
    logits = alone(agent.policy, *(x[:1, :-1] for x in rollout[:2]))[0][-1]
    expected = 4096 * (logits / temperature).softmax(0)
    counts = torch.bincount(rollout.tokens[:, -1], minlength=len(expected))
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 2).all()
    rare = expected.argsort()[:10]
    assert abs(counts[rare].sum() - expected[rare].sum()) < 4 * expected[rare].sum().sqrt()


@AGENTS
def test_dropout_in_a_checkpoint_changes_nothing(kind, lora_rank, make):
    results = []
    for rate in ("without", "with much"):
        args = make(f"{kind} {rate} dropout", lora_rank=lora_rank)
        agent, *others = load(args)
        config = agent.policy.config
        assert getattr(config, "attn_pdrop", getattr(config, "attention_dropout", None)) == 0.5 * (rate != "without")
        rollout = collect(agent, *others, args)
        stats, weights = update(agent, batch_of(rollout, args), args)
        results.append([*rollout[:5], rollout.scores, *rollout[7:], weights])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_empty_responses_have_a_reward_and_can_be_trained(make):
    args = make()
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args, [[0]] * 8)
    assert rollout.mask.sum(1).tolist() == [1] * 8 and rollout.ended.all()
    np.testing.assert_allclose(rollout.scores, judge([text for text in rollout.texts]), rtol=1e-6)
    assert script.token_rewards(rollout, rollout.scores, 0.0)[0].tolist() == rollout.scores.tolist()
    assert np.isfinite([*script.describe(rollout).values()]).all()
    stats, weights = update(agent, batch_of(rollout, args), args)
    assert np.isfinite([*stats.values()]).all() and weights.isfinite().all()


@AGENTS
def test_every_parameter_has_a_gradient_but_those_of_the_reference(kind, lora_rank, make):
    args = make(kind, lora_rank=lora_rank)
    agent, *others = load(args)
    before = copy.deepcopy(agent.state_dict())
    batch = batch_of(collect(agent, *others, args), args)
    script.losses_of(agent, *batch, args=args)[0].backward()
    parameters = trained(agent)
    assert {name.split(".")[0] for name in parameters} == {"policy", "value", "value_head"}
    assert [name for name, parameter in parameters.items() if not parameter.grad.any()] == []
    if lora_rank:
        assert {network.peft_config["default"].lora_alpha for network in (agent.policy, agent.value)} == {16.0}
        assert all("lora_" in name or "value_head" in name for name in parameters)
    else:
        assert all(name in parameters for name, _ in agent.named_parameters() if not name.startswith("reference"))
    agent.zero_grad()
    update(agent, batch, args)
    tied = "policy.lm_head.weight"
    moved = {name for name, tensor in agent.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved - {tied} == parameters.keys() - {tied}


def test_of_a_long_prompt_the_end_is_kept(make):
    args = make(prompt_length=4)
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args)
    for prompt, row, keep in zip(SENTENCES, rollout.tokens, rollout.attention.bool()):
        assert row[:-T][keep[:-T]].tolist() == tokenizer(prompt)["input_ids"][-4:]


@LORA
def test_the_vocabulary_is_never_spread_over_whole_texts(lora_rank, make):
    args = make(lora_rank=lora_rank, micro_batch_size=4)
    agent, tokenizer, judge = load(args)
    vocabulary, sizes = len(tokenizer), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor) and x.shape[-1:] == (vocabulary,):
                    sizes.append(x.untyped_storage().nbytes() // x.itemsize // vocabulary)
            return result

    with Watch():
        rollout = collect(agent, tokenizer, judge, args)
        update(agent, batch_of(rollout, args), args)
    assert rollout.tokens.shape == (8, 12 + T) and max(sizes) == 4 * (T + 1)


def test_without_a_penalty_the_reward_is_hacked(make, tmp_path):
    """KL rises, and texts become alike."""
    flags = dict(total_episodes=32 * 20, batch_size=32, num_minibatches=4, micro_batch_size=32, update_epochs=4)
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("\n".join(["prompt", *SENTENCES * 12]))
    args = make(prompts=str(prompts), kl_coef=0.0, learning_rate=3e-3, eval_episodes=64, **flags)
    points = scalars(train(tmp_path, args))
    first, last = ({tag: points[f"eval/{tag}"][i][1] for tag in ("score", "kl", "distinct_2")} for i in (0, -1))
    assert first["kl"] == 0 and last["kl"] > 5
    assert last["score"] > first["score"] + 0.2 and last["distinct_2"] < 0.7 * first["distinct_2"]


# --------------------------------------------------------------------------------------------- the loss and the updates


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("target_coef", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_is_a_textbooks(kind, target_coef, weighted, make):
    args = make(kind, target_coef=target_coef, importance_weighted_reverse=weighted, temperature=0.8, Z=-2.0)
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args)
    tokens, attention, mask = rollout[:3]
    rng = torch.Generator().manual_seed(0)
    noise = [torch.randn(mask.shape, generator=rng) for _ in range(3)]
    batch = [tokens, attention, mask, rollout.logprobs + 0.2 * noise[0], *noise[1:]]
    targets = ["", " and so on", *[" a bad story with a good end"] * 6]
    if target_coef:
        batch += script.with_targets(rollout, tokenizer, targets)
    loss, logged = script.losses_of(agent, *batch, args=args)
    stats = dict(zip(script.TAGS, logged.tolist()))

    old, advantage, returns = (x[mask].double().numpy() for x in batch[3:6])
    logprob = plain_logprobs(agent.policy, tokens, attention, mask, args.temperature).numpy()
    values = plain_values(agent, tokens, attention, mask).double().numpy()
    context = (args.alpha, args.beta, args.Z, args.clip_coef, weighted)
    forward, reverse, _ = textbook.symmetric_ppo(logprob[:, None], old[:, None], advantage, *context)
    r, nll = np.exp(logprob - old), []
    for row, keep, target in zip(tokens, attention.bool(), targets):
        prompt, end = row[:-T][keep[:-T]], torch.tensor((tokenizer(target)["input_ids"] + [0])[:T]).long()
        with torch.no_grad():
            logits = agent.policy(torch.cat((prompt, end))[None]).logits[0, len(prompt) - 1 : -1].double()
        nll.append(-(logits / args.temperature).log_softmax(1).gather(1, end[:, None]))
    expected = {
        "losses/policy_loss": args.alpha * forward.mean() + args.beta * reverse.mean(),
        "losses/forward_loss": forward.mean(),
        "losses/reverse_loss": reverse.mean(),
        "losses/value_loss": np.mean((values - returns) ** 2),
        "losses/target_loss": torch.cat(nll).mean().item() if target_coef else 0,
        "losses/old_approx_kl": -np.log(r).mean(),
        "losses/approx_kl": np.mean(r - 1 - np.log(r)),
        "losses/clipfrac": np.mean(abs(r - 1) > args.clip_coef),
    }
    assert stats == pytest.approx(expected, rel=1e-4, abs=1e-5)
    policy, value, target = (expected[f"losses/{name}_loss"] for name in ("policy", "value", "target"))
    assert loss.item() == pytest.approx(policy + args.vf_coef * value + target_coef * target, rel=1e-4)


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0)])
def test_advantages_are_a_textbooks_for_each_response(gamma, gae_lambda, make):
    args = make(gamma=gamma, gae_lambda=gae_lambda, kl_coef=0.3)
    rollout = collect(*load(args), args, ENDINGS)
    advantages = batch_of(rollout, args)[4]
    for i, n in enumerate(LENGTHS):
        rewards = -0.3 * (rollout.logprobs[i, :n] - rollout.ref_logprobs[i, :n]).double().numpy()
        rewards[-1] += rollout.scores[i]
        zeros, values = np.zeros((n, 1)), rollout.values[i, :n, None].numpy()
        expected = textbook.gae(rewards[:, None], values, np.eye(n)[:, -1:], zeros, zeros[0], gamma, gae_lambda)
        close(advantages[i, :n], expected[:, 0])


@pytest.mark.parametrize("target_coef", [0.0, 0.3])
@AGENTS
def test_an_update_is_a_textbooks_and_does_not_depend_on_micro_batches(kind, lora_rank, target_coef, make):
    args = make(kind, lora_rank=lora_rank, target_coef=target_coef, max_grad_norm=0.1, kl_coef=0.3, advantage_noise=0.3)
    args.norm_adv = kind == "gpt2"
    agent, tokenizer, judge = load(args)
    rollout = collect(agent, tokenizer, judge, args, ENDINGS)
    batch = batch_of(rollout, args)
    if target_coef:
        batch += script.with_targets(rollout, tokenizer, ["", " and so on", *[" a bad story with a good end"] * 6])
    results = []
    for micro_batch_size in (64,) if target_coef else (1, 3, 64):  # parts with targets are weighted by their responses
        args.micro_batch_size = micro_batch_size
        results.append(update(copy.deepcopy(agent), batch, args))

    optimizer = torch.optim.Adam(trained(agent).values(), lr=args.learning_rate, eps=1e-5)
    rng, norms, flips = np.random.default_rng(1), [], []
    for _ in range(args.update_epochs):
        for rows in np.split(rng.permutation(8), 2):
            part = [x[rows] for x in batch]
            signs = np.where(rng.random(sum(LENGTHS[row] for row in rows)) < args.advantage_noise, -1, 1)
            A = part[4][part[2]] * torch.from_numpy(signs)
            normalized = (A - A.mean()) / A.std() if args.norm_adv else A
            part[4] = torch.zeros(4, T).masked_scatter(part[2], normalized)
            optimizer.zero_grad()
            script.losses_of(agent, *part, args=args)[0].backward()
            norms.append(torch.nn.utils.clip_grad_norm_(trained(agent).values(), args.max_grad_norm).item())
            flips.append((A * normalized < 0).float().mean().item())
            optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in trained(agent).values()])
    for stats, updated in results:
        assert stats == pytest.approx(results[0][0], rel=1e-4, abs=1e-5)
        assert stats["losses/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4) and min(norms) > 0.1
        assert stats["advantage/sign_flips_normalization"] == pytest.approx(np.mean(flips))
        close(updated, weights)


@LORA
def test_the_symmetric_loss_is_ppo_with_another_weight(lora_rank, make):
    """α, β and the matched control α + β|Z|, 0: the same gradient."""
    args = make(lora_rank=lora_rank)
    agent, tokenizer, judge = load(args)
    batch = batch_of(collect(agent, tokenizer, judge, args), args)
    batch[3] = batch[3] + 0.2 * torch.randn(batch[3].shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for weights in (dict(alpha=0.5, beta=0.4, Z=-3.0), dict(alpha=1.7, beta=0.0), dict(alpha=1.0, beta=0.0)):
        loss, logged = script.losses_of(agent, *batch, args=make(lora_rank=lora_rank, vf_coef=0.0, **weights))
        assert 0 < logged[script.TAGS.index("losses/clipfrac")] < 1
        names = [name for name in trained(agent) if name.startswith("policy")]
        found = torch.autograd.grad(loss, [trained(agent)[name] for name in names])
        gradients.append(torch.cat([x.flatten() for x in found]))
    symmetric, control, ppo = gradients
    assert (symmetric - control).norm() < 1e-4 * control.norm() and (symmetric - ppo).norm() > 0.5 * ppo.norm()


@LORA
def test_in_bfloat16_what_is_trained_is_not(lora_rank, make):
    """A step would be rounded away."""
    agent, tokenizer, judge = load(args := make(lora_rank=lora_rank, bf16=True), moved=False)
    assert {parameter.dtype for parameter in trained(agent).values()} == {torch.float32}
    assert (agent.policy.get_input_embeddings().weight.dtype == torch.bfloat16) == bool(lora_rank)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = collect(agent, tokenizer, judge, args)
        stats, _ = update(agent, batch_of(rollout, args), args)
    assert script.describe(rollout)["kl"] == 0 and np.isfinite([*stats.values()]).all()


def test_targets_are_cut_and_end(make):
    agent, tokenizer, judge = load(args := make())
    rollout = collect(agent, tokenizer, judge, args, prompts=SENTENCES[:3])
    tokens, attention, mask = script.with_targets(rollout, tokenizer, ["", " good", " and ".join(SENTENCES)])
    for i, target in enumerate(("", " good", " and ".join(SENTENCES))):
        wanted = (tokenizer(target)["input_ids"] + [0])[:T]
        assert tokens[i, -T:].tolist()[: len(wanted)] == wanted and mask[i].sum() == len(wanted)
        assert torch.equal(attention[i, -T:] == 1, mask[i]) and torch.equal(tokens[i, :-T], rollout.tokens[i, :-T])


# ----------------------------------------------------------------------------------------------------------- whole runs


def train(folder, args, saved=None):
    """Its folder."""
    with contextlib.chdir(folder):
        script.main(args, saved)
    (run,) = folder.glob("runs/*")
    return run


def scalars(run):
    """What TensorBoard shows, but the speed; steps grow within every tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    points = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    points.pop("charts/SPS")
    for tag, series in points.items():
        steps = [step for step, _ in series]
        assert steps == sorted(set(steps)), tag
    return points


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


EVALUATED = "score kl kl_k3 reference_perplexity entropy distinct_2 response_length ended".split()
LOGGED = {f"{group}/{tag}" for group in ("objective", "eval") for tag in EVALUATED} | {*script.TAGS, "eval/gold_score"}
LOGGED |= {"losses/mean_weight", "losses/explained_variance", "advantage/sign_flips_noise"}


@AGENTS
def test_a_whole_run(kind, lora_rank, make, tmp_path, capsys):
    flags = dict(target_coef=0.1, eval_interval=16, Z=-2.0, top_k=0 if lora_rank else 9)
    args = make(kind, lora_rank=lora_rank, importance_weighted_reverse=kind == "gpt2", **flags)
    run = train(tmp_path, args)
    points, events = scalars(run), EventAccumulator(str(run)).Reload()
    assert points.keys() == LOGGED and np.isfinite([value for series in points.values() for _, value in series]).all()
    assert [step for step, _ in points["losses/policy_loss"]] == [8, 16, 24, 32]
    assert [step for step, _ in points["eval/score"]] == [1, 17, 33]
    weights = [weight for _, weight in points["losses/mean_weight"]]
    assert weights == pytest.approx([0.5 + 0.4 * 2] * 4) if kind == "gpt2" else max(weights) < 0.5 + 0.4 * 2 * 0.5
    (before, *_, after) = events.Tensors("eval/samples/text_summary")
    assert (before.step, after.step) == (1, 33)
    output = capsys.readouterr().out
    assert "score at 0 steps: " in output and "score at 32 steps: " in output and "(6 responses)" in output
    assert ("warning: with --top-k" in output) == (not lora_rank)

    agent, tokenizer, judge = load(args, moved=False)
    rollout = collect(agent, tokenizer, judge, args)
    tokens, attention, mask = rollout[:3]
    agent.load_state_dict(checkpoint_of(run)["agent"], strict=False)
    logprobs = agent.logprobs(tokens, attention)[mask]
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    close(plain_logprobs(model, tokens, attention, mask), logprobs)
    assert (logprobs - rollout.logprobs[mask]).abs().max() > 0.01
    assert len(transformers.AutoTokenizer.from_pretrained(run / "model")) == len(tokenizer)


def test_a_run_trains_on_what_it_collected_and_holds_prompts_out(make, tmp_path, monkeypatch):
    prompts = [f"{one} and {other}" for one in SENTENCES[:4] for other in SENTENCES]
    rows = [(prompt, f" {prompt[i]}") for i, prompt in enumerate(prompts)]
    (tmp_path / "prompts.csv").write_text("\n".join(",".join(row) for row in [("prompt", "target"), *rows]))
    args = make(prompts=str(tmp_path / "prompts.csv"), prompt_length=48, target_coef=0.1, kl_coef=0.3)
    collect_responses, update, rollouts, batches, agents = script.collect_responses, script.update, [], [], []
    monkeypatch.setattr(script, "collect_responses", lambda *x: rollouts.append(collect_responses(*x)) or rollouts[-1])
    monkeypatch.setattr(script, "update", lambda *x: agents.append(x[0]) or batches.append(x[2]) or update(*x))
    gold_scores = scalars(train(tmp_path, args))["eval/gold_score"]
    assert not any(module.training for module in agents[0].modules())
    first, *rollouts, last = rollouts
    gold = script.Judge(args.gold_model, None, torch.device("cpu"))
    for rollout, (_, score) in zip((first, last), gold_scores, strict=True):
        assert score == pytest.approx(gold(rollout.texts).mean())
        assert all(text.startswith(prompt) for text, prompt in zip(rollout.texts, prompts[:6], strict=True))
    drawn = []
    for rollout, batch in zip(rollouts, batches, strict=True):
        torch.testing.assert_close(batch[:6], batch_of(rollout, args))
        chosen = [next(row for row in rows if text.startswith(row[0])) for text in rollout.texts]
        assert len(set(chosen)) == 8 and not set(chosen) & set(rows[:6])
        tokenizer = script.load_tokenizer(args.model)
        responses = tokenizer.batch_decode([row[keep] for row, keep in zip(batch[6][:, -T:], batch[8])])
        assert responses == [target + END for _, target in chosen]
        assert torch.equal(batch[6][:, :-T], rollout.tokens[:, :-T])
        drawn.append(frozenset(chosen))
    assert len(set(drawn)) == 4


def test_a_run_can_be_repeated_and_evaluations_do_not_change_it(make, tmp_path):
    results = []
    for i, flags in enumerate(({}, {}, {"eval_interval": 8}, {"seed": 4})):
        (tmp_path / str(i)).mkdir()
        points = scalars(train(tmp_path / str(i), make(reward_noise=0.5, advantage_noise=0.1, **flags)))
        results.append({tag: series for tag, series in points.items() if not tag.startswith("eval/")})
    assert results[0] == results[1] == results[2] != results[3]


def test_noise_is_in_units_of_the_scores_deviation_and_not_reported(make, tmp_path, monkeypatch):
    add_noise, update, seen, batches = script.add_noise, script.update, [], []
    monkeypatch.setattr(script, "add_noise", lambda *x: seen.append(x[:2]) or add_noise(*x))
    monkeypatch.setattr(script, "update", lambda *x: batches.append(x[2]) or update(*x))
    points = scalars(train(tmp_path, make(reward_noise=0.5, kl_coef=0.0)))
    scores = np.stack([scores for scores, _ in seen])
    for i, (_, std) in enumerate(seen):
        assert std == pytest.approx(0.5 * scores[: i + 1].std(), rel=1e-3)
    assert [value for _, value in points["objective/score"]] == pytest.approx(scores.mean(1))
    rewards = [returns[range(8), mask.sum(1) - 1].numpy() for _, _, mask, _, _, returns in batches]  # on the last token
    assert 0.3 < ((np.stack(rewards) - scores) / [[std] for _, std in seen]).std() < 2
    assert sum(value for _, value in points["advantage/sign_flips_noise"]) > 0


def same_checkpoint(run, other):
    """To the bit."""
    saved, expected = checkpoint_of(run), checkpoint_of(other)
    for key in ("iteration", "agent", "optimizer", "stats"):
        torch.testing.assert_close(saved[key], expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("flags", [dict(kind="llama"), dict(kind="llama", bf16=True), dict(kind="gpt2")])
def test_a_run_with_lora_goes_on_where_it_was(flags, make, tmp_path, monkeypatch):
    save, kept = script.save, []
    monkeypatch.setattr(script, "save", lambda path, **state: save(path, **state) or kept.append(path.read_bytes()))
    whole, parts = tmp_path / "whole", tmp_path / "parts" / "runs" / "run"
    whole.mkdir()
    run = train(whole, make(lora_rank=4, reward_noise=0.3, eval_interval=16, **flags))
    assert len(kept) == 4
    parts.mkdir(parents=True)
    (parts / "checkpoint.pt").write_bytes(kept[1])  # of the second iteration
    saved = checkpoint_of(parts)
    train(tmp_path / "parts", script.Args(**saved["args"] | {"resume": str(parts)}), saved)
    same_checkpoint(parts, run)
    assert scalars(parts) == {tag: [x for x in series if x[0] > 16] for tag, series in scalars(run).items()}


def test_a_longer_run_learns_at_the_rate_that_is_typed(make, tmp_path):
    run = train(tmp_path, make())
    saved = checkpoint_of(run)
    flags = {"resume": str(run), "total_episodes": 40, "learning_rate": 0.0}
    train(tmp_path, script.Args(**saved["args"] | flags), saved)
    assert checkpoint_of(run)["iteration"] == 5
    torch.testing.assert_close(checkpoint_of(run)["agent"], saved["agent"], rtol=0, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one(make, tmp_path, monkeypatch):
    """To the bit: one that is killed, resumed, stopped by a signal, and resumed again."""
    args = make(total_episodes=8 * 24, eval_interval=64, reward_noise=0.3)
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", args)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items()
             if type(value) in (int, float, str) and name != "resume"]  # fmt: skip
    folder, command = tmp_path / "in parts", [*flags, "--no-cuda"]
    folder.mkdir()
    for number, at in ((signal.SIGKILL, 2), (signal.SIGTERM, 8)):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen([sys.executable, SCRIPT, *command], cwd=folder, **pipes)
        while not (found := [*folder.glob("runs/*/checkpoint.pt")]) or checkpoint_of(found[0].parent)["iteration"] < at:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        run = found[0].parent
        command = ["--resume", str(run)]
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), errors
    assert f'--resume "{run}"' in output and "Traceback" not in errors
    assert checkpoint_of(run)["iteration"] < 24
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    train(folder, *script.read_flags())
    same_checkpoint(run, whole)
    assert scalars(run) == scalars(whole)


# ------------------------------------------------------------------------------------------------------ flags and files


REFUSED = [  # flags, what the line says
    ("--model nothing", "couldn't find them"),
    ("--model empty", "empty"),
    ("--reward-model nothing", "couldn't find them"),
    ("--reward-label None", "policy/../proxy has 2 classes: choose one by --reward-label"),
    ("--reward-label 2", "classes: choose one by --reward-label 0 to 1"),
    ("--gold-model policy/../proxy --reward-model policy/../scalar --reward-label None", "proxy has 2 classes"),
    ("--prompts nothing.csv", "nothing.csv"),
    ("--prompt-column nothing", "has no column nothing"),
    ("--target-coef 0.1 --target-column nothing", "has no column prompt or no nothing"),
    ("--prompts empty.txt", "empty.txt"),
    ("--prompts latin.csv", "utf-8"),
    ("--prompts broken.jsonl", ""),
    ("--prompts table.tsv", "table.tsv" if find_spec("datasets") else "datasets"),
    ("--eval-episodes 30", "fewer than --eval-episodes"),
    ("--response-length 60", "--response-length must be"),
    ("--prompt-length 60", "--prompt-length and"),
    ("--prompt-length 0", "--prompt-length and"),
    ("--num-minibatches 3", "--num-minibatches"),
    ("--num-minibatches 8", "--num-minibatches"),  # one response cannot be normalised
    ("--total-episodes 7", "--total-episodes"),
    ("--Z 0", "--Z"), ("--alpha=-1", "--alpha"), ("--reward-noise=-1", "--reward-noise"),
    ("--advantage-noise 1.1", "--advantage-noise"),
    ("--resume .", "checkpoint.pt"),
]  # fmt: skip


def start(flags, make, tmp_path, monkeypatch, capsys):
    """Starts the script within this process, where files lie about: what it writes to stderr."""
    for name in ("policy", "proxy", "scalar"):
        (tmp_path / name).symlink_to(Path(make().model).parent / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.csv").write_bytes("prompt\ncafé\n".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "table.tsv").write_text("prompt\nIt was\n")
    files = set(tmp_path.rglob("*"))
    usual = f"--model policy --reward-model policy/../proxy --reward-label 1 --prompts {make().prompts} --batch-size 8"
    usual += " --num-minibatches 2 --eval-episodes 8 --prompt-length 12 --response-length 8 --total-episodes 32"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *usual.split(), *flags.split()])
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", None)  # what is not refused fails, and soon
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    output, error = capsys.readouterr()
    assert end.value.code == 2 and output == "" and set(tmp_path.rglob("*")) == files
    return error


@pytest.mark.parametrize("flags, named", REFUSED)
def test_it_is_refused_in_one_line(flags, named, make, tmp_path, monkeypatch, capsys):
    error = start(flags, make, tmp_path, monkeypatch, capsys)
    assert len(error.splitlines()) == 1 and error.startswith("sppo_rlhf.py: ") and named in error


def test_presets(make, tmp_path, monkeypatch, capsys):
    assert "imdb" in start("--preset nothing", make, tmp_path, monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--preset", "imdb", "--seed", "5"])
    args, saved = script.read_flags()
    assert vars(args).items() >= (script.PRESETS["imdb"] | {"preset": "imdb", "seed": 5}).items() and not saved
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--kl-coef", "0.5", "--preset=tldr"])
    args, _ = script.read_flags()
    assert vars(args).items() >= (script.PRESETS["tldr"] | {"preset": "tldr", "kl_coef": 0.5}).items()


def test_prompts_are_read(make, tmp_path):
    rows = [{"prompt": " It was, so", "target": "good"}, {"prompt": "é", "target": ""}, {"prompt": " ", "target": "x"}]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "target"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    (tmp_path / "a.txt").write_text("It was, so\né\n\n", encoding="utf-8")
    for suffix, targets in (("csv", ("good", "")), ("jsonl", ("good", "")), ("txt", ("", ""))):
        prompts = script.read_prompts(make(prompts=str(tmp_path / f"a.{suffix}")))
        assert prompts == [("It was, so", targets[0]), ("é", targets[1])]
    (tmp_path / "short.csv").write_text("number,prompt\n1,It was\n2\n3,so\n")  # a row has no prompt
    assert [x for x, _ in script.read_prompts(make(prompts=str(tmp_path / "short.csv")))] == ["It was", "so"]


def test_a_share_of_the_words_is_the_prompt(make, tmp_path):
    (tmp_path / "a.txt").write_text("a b  c d e\none\n")
    args = make(prompts=str(tmp_path / "a.txt"), prompt_share=0.5, target_coef=0.1)
    assert script.read_prompts(args) == [("a b", " c d e")]
    assert Counter(len(x.split()) for x, _ in script.read_prompts(make(prompt_share=0.5))) == {1: 8, 2: 12, 3: 12}
