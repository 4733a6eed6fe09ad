"""sppo_rlhf.py on real, tiny models: what users of such code report, many kinds of models, the loss
of tokens, whole runs, bad input."""

import contextlib
import copy
import csv
import json
import multiprocessing
import runpy
import shlex
import shutil
import sys
import time
from pathlib import Path

import language
import numpy as np
import pytest
import textbook
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import END, SENTENCES, make_model, make_tokenizer, save, save_models
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode

import sppo_rlhf as script

SCRIPT = Path(script.__file__)
CPU = torch.device("cpu")
CAUSAL = transformers.AutoModelForCausalLM
CLASSIFIER = transformers.AutoModelForSequenceClassification
AGENTS = pytest.mark.parametrize("kind", ["gpt2", "llama"])
LORA = pytest.mark.parametrize("lora_rank", [0, 4])
PAIRS = pytest.mark.parametrize("kind, lora_rank", [("gpt2", 0), ("llama", 4)])
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
        for rate in (0.0, 0.5):
            other = shutil.copytree(folder / kind, folder / f"{kind}, dropout {rate}")
            for path in other.glob("*/config.json"):
                text = path.read_text()
                assert "0.1" in text
                path.write_text(text.replace("0.1,", f"{rate},"))
    save_models(folder / "gpt2 with a padding token", pad="<pad>")
    return folder


@pytest.fixture
def make(models):
    """Flags for the models of a kind; four iterations of eight responses."""

    def args(kind="gpt2", **flags):
        names = {"model": "policy", "reward_model": "proxy", "gold_model": "scalar"}
        given = {name: str(models / kind / file) for name, file in names.items()}
        given |= {"prompts": str(models / "gpt2" / "prompts.csv"), "reward_label": 1, "seed": 3}
        given |= {"prompt_length": 12, "response_length": T, "total_episodes": 32, "batch_size": 8}
        given |= {"num_minibatches": 2, "micro_batch_size": 3, "learning_rate": 1e-3}
        given |= {"update_epochs": 1, "eval_episodes": 6, "cuda": False, "torch_threads": 1}
        return script.Args(**given | flags)

    return args


def trained(agent):
    return {name: x for name, x in agent.named_parameters() if x.requires_grad}


LOADED = {}


def load(args, moved=True):
    """Agent and judge. Moved: what is trained has left where it began, so that policy and
    reference differ. Models are read once for all tests, which get copies."""
    key = repr(args)
    if key not in LOADED:
        torch.manual_seed(args.seed)
        LOADED[key] = script.LanguageAgent(args), script.Judge(args.reward_model, args, CPU)
    agent, judge = copy.deepcopy(LOADED[key])
    torch.manual_seed(0)
    for parameter in trained(agent).values():
        parameter.data += moved * 0.05 * torch.randn_like(parameter)
    return agent, judge


def collect(agent, reward, args, responses=None, prompts=SENTENCES):
    """Responses to prompts of different length, or these, which are lists of tokens and where 0
    ends the text."""
    if responses:
        width = max(map(len, responses))
        rows = iter([row + [0] * (width - len(row)) for row in responses])
        agent.policy.generate = lambda input_ids, attention_mask: torch.cat(
            (input_ids, torch.tensor([next(rows) for _ in input_ids])), 1
        )
    script.set_seeds(1)
    return script.collect_responses(agent, reward, prompts, args)


ENDINGS = [
    [5, 0],
    [0],
    [5, 6, 0, 7, 0],
    [5] * T,
    [5] * (T - 1) + [0],
    [9, 0, 0, 0],
    [5, 6, 7, 0],
    [0, 7],
]
LENGTHS = [2, 1, 3, T, T, 2, 4, 1]


def alone(model, tokens, attention):
    """The plain model's outputs for each row without its padding, row by row, in float64."""
    with torch.no_grad():
        kept = zip(tokens, attention.bool())
        return [model(row[keep][None]).logits[0].double() for row, keep in kept]


def plain_values(agent, rollout):
    """Values of the texts before the tokens in the mask, row after row."""
    values = []
    with torch.no_grad():
        for row, keep, mask in zip(rollout.tokens, rollout.attention.bool(), rollout.mask):
            hidden = agent.value(row[keep][None]).last_hidden_state[0]
            values.append(agent.value_head(hidden[-1 - mask.sum() : -1])[:, 0])
    return torch.cat(values)


def plain_logprobs(model, rollout, temperature=1.0):
    """Log-probabilities of the tokens in the mask, row after row."""
    found = []
    outputs = alone(model, rollout.tokens, rollout.attention)
    lengths = rollout.mask.sum(1).tolist()
    for row, keep, n, logits in zip(rollout.tokens, rollout.attention.bool(), lengths, outputs):
        logprobs = (logits / temperature).log_softmax(1)
        found += [logprobs[-1 - n + i, token] for i, token in enumerate(row[keep][-n:])]
    return torch.stack(found)


def close(one, other, atol=2e-5):
    one, other = (torch.as_tensor(x).double() for x in (one, other))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=atol)


def batch_of(rollout, args):
    """What `update` is given."""
    advantages = script.token_advantages(rollout, rollout.scores, args)
    return (*rollout[:3], rollout.logprobs, advantages, advantages + rollout.values)


def update(agent, batch, args):
    """One update by Adam: what is logged, and the weights after it."""
    optimizer = torch.optim.Adam(trained(agent).values(), lr=args.learning_rate, eps=1e-5)
    torch.manual_seed(1)
    stats = script.update(agent, optimizer, batch, args)
    return stats, torch.cat([parameter.detach().flatten() for parameter in trained(agent).values()])


def zero(texts, *_):
    return [0.0] * len(texts)


# ------------------------------------------------------------------------- many kinds of models

FAMILIES = """gpt2 llama gptj gpt_neox gpt_neo opt bloom mistral qwen2 qwen3 gemma2 gemma3 phi phi3
    olmo2 smollm3 granite gpt_oss falcon""".split()


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A kind's model and its folder, made when it is first asked for. OPT's is like OPT-350m's: its
    outputs are narrower than its layers."""
    folder, models = tmp_path_factory.mktemp("families"), {}

    def family(kind):
        if kind not in models:
            models[kind] = make_model(CAUSAL, kind).eval()
            save(models[kind], folder / kind)
        return models[kind], folder / kind

    return family


@LORA
@pytest.mark.parametrize("kind", FAMILIES)
def test_any_causal_model_can_be_trained_saved_and_resumed(
    kind, lora_rank, families, make, tmp_path
):
    """KL is 0 and ratios are 1 before training; log-probabilities are those of the row alone; what
    is saved is the model that was trained; what is restored goes on as the one that was saved."""
    original, folder = families(kind)
    sizes = {"micro_batch_size": 4, "update_epochs": 1}
    args = make(model=str(folder), lora_rank=lora_rank, lora_alpha=32.0, **sizes)
    torch.manual_seed(args.seed)
    agent = script.LanguageAgent(args)
    restored = copy.deepcopy(agent)
    rollout = collect(agent, zero, args)
    assert agent.value_head.in_features == original.get_output_embeddings().in_features
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    assert script.describe(rollout)["kl"] == 0 < len(set(rollout.attention.sum(1).tolist())) - 1
    batch = batch_of(rollout, args)
    _, logged = script.minibatch_loss(agent, [x[[1, 6]] for x in batch], args)
    assert logged["losses/approx_kl"] < 1e-9 and logged["losses/clipfrac"] == 0

    optimizer = torch.optim.Adam(trained(agent).values(), lr=1e-2, eps=1e-5)
    torch.manual_seed(1)
    script.update(agent, optimizer, batch, args)
    moved = collect(agent, zero, args)
    assert (moved.logprobs - moved.ref_logprobs)[moved.mask].abs().max() > 1e-3
    close(moved.logprobs[moved.mask], plain_logprobs(agent.policy, moved))
    close(moved.values[moved.mask], plain_values(agent, moved))
    script.save_model(tmp_path / "model", agent, args)
    saved = CAUSAL.from_pretrained(tmp_path / "model").eval()
    close(moved.logprobs[moved.mask], plain_logprobs(saved, moved))
    close(moved.ref_logprobs[moved.mask], plain_logprobs(original, moved))

    torch.save([trained(agent), optimizer.state_dict()], tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    restored.load_state_dict(weights, strict=False)
    other_optimizer = torch.optim.Adam(trained(restored).values(), lr=1e-2, eps=1e-5)
    other_optimizer.load_state_dict(state)
    for one, steps in ((agent, optimizer), (restored, other_optimizer)):
        torch.manual_seed(2)
        script.update(one, steps, batch_of(moved, args), args)
    for name, parameter in trained(agent).items():
        assert torch.equal(parameter, trained(restored)[name]), name


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_training_goes_on_from_a_model_that_was_trained_with_lora(kind, families, make, tmp_path):
    args = make(model=str(families(kind)[1]), lora_rank=4)
    agent, _ = load(args)
    script.save_model(tmp_path / "model", agent, args)
    again = script.LanguageAgent(make(model=str(tmp_path / "model"), lora_rank=2))
    rollout = collect(again, zero, args)
    close(rollout.logprobs, agent.logprobs(*rollout[:2], T))


JUDGES = "gpt2 llama distilbert bert roberta xlm-roberta electra deberta-v2 albert bart qwen2 opt"


@pytest.mark.parametrize("kind", JUDGES.split())
def test_any_classifier_judges_a_text_by_itself(kind, make, tmp_path):
    """Alone and in a batch, by its only output or by a class; texts that are longer than its
    positions are cut at their beginning. The tokenizer knows no longest text. BART judges by the
    token that ends the text."""
    has_pad = "roberta" in kind or kind == "bart"
    tokenizer = make_tokenizer("<pad>") if has_pad else make_tokenizer()
    if kind == "bart":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, 0)]
        )
    texts = [*SENTENCES, " ".join(SENTENCES * 2)]
    for labels in (1, 3):
        sizes = {"vocab_size": len(tokenizer), "num_labels": labels}
        model = make_model(CLASSIFIER, kind, **sizes).eval()
        save(model, tmp_path / str(labels), tokenizer)
        label = labels - 1 or None
        args = make(reward_label=label)
        judge = script.Judge(str(tmp_path / str(labels)), args, CPU)
        scores = judge(texts)
        length = 62 if "roberta" in kind else 64
        for text, score in zip(texts, scores, strict=True):
            tokens = torch.tensor([tokenizer(text)["input_ids"][-length:]])
            with torch.no_grad():
                logits = model(tokens).logits[0].double()
            close(score, logits.softmax(0)[label] if label else logits[0])
            close(score, judge([text])[0])
        assert np.ptp(scores) > 1e-3


# --------------------------------------------------------------- what users of such code report


@PAIRS
def test_ratios_are_1_before_the_first_step(kind, lora_rank, make):
    """Prompts differ in length, the parts in which old and new probabilities are computed in
    size."""
    args = make(kind, lora_rank=lora_rank)
    agent, judge = load(args)
    rollout = collect(agent, judge, args, ENDINGS)
    assert all(len(set(x.sum(1).tolist())) > 1 for x in (rollout.attention[:, :-T], rollout.mask))
    batch = batch_of(rollout, args)
    for rows in torch.randperm(8).split(2):
        _, logged = script.minibatch_loss(agent, [x[rows] for x in batch], args)
        assert logged["losses/approx_kl"] < 1e-5 and logged["losses/clipfrac"] == 0


def test_what_is_judged_is_prompt_and_response(make):
    args = make()
    agent, judge = load(args)
    rollout = collect(agent, judge, args, ENDINGS)
    for prompt, response, n, text, score in zip(
        SENTENCES, ENDINGS, LENGTHS, rollout.texts, rollout.scores
    ):
        words = agent.tokenizer.decode([token for token in response[:n] if token])
        assert len(agent.tokenizer(prompt)["input_ids"]) >= 12 or text == prompt + words
        assert text.endswith(words) and END not in text
        close(score, judge([text])[0])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt2 with a padding token"])
def test_the_first_end_of_text_is_trained_and_what_follows_is_not(kind, make):
    args = make(kind)
    agent, judge = load(args)
    batch = batch_of(collect(agent, judge, args, ENDINGS), args)
    assert batch[2].tolist() == [[i < n for i in range(T)] for n in LENGTHS]
    kept = []

    def keep(module, given, logits):
        logits.retain_grad()
        kept.append(logits)

    hook = agent.policy.get_output_embeddings().register_forward_hook(keep)
    script.minibatch_loss(agent, batch, args)[0].backward()
    hook.remove()
    assert torch.equal(kept[0].grad[:, :T].abs().amax(2) > 0, batch[2])
    assert not kept[0].grad[:, T].any()


def last_rewards(rollout, args):
    """Advantages without a value and a penalty, γ = λ = 0: the rewards."""
    plain = rollout._replace(values=torch.zeros_like(rollout.values))
    args = copy.replace(args) if hasattr(copy, "replace") else copy.copy(args)
    args.gamma = args.gae_lambda = args.kl_coef = 0.0
    return script.token_advantages(plain, rollout.scores, args)


def test_the_score_lies_on_the_last_real_token(make):
    """With and without an end of text; also if there is but one token."""
    args = make()
    rollout = collect(*load(args), args, ENDINGS)
    expected = torch.zeros(8, T)
    expected[range(8), torch.tensor(LENGTHS) - 1] = rollout.scores
    assert torch.equal(last_rewards(rollout, args), expected)
    assert rollout.ended.tolist() == [True] * 3 + [False] + [True] * 4
    args = make(response_length=1)
    one = collect(*load(args), args, [[5], [0]] * 4)
    assert torch.equal(last_rewards(one, args), one.scores[:, None])
    assert one.mask.all() and one.ended.tolist() == [False, True] * 4


@PAIRS
def test_padding_may_be_garbage(kind, lora_rank, make):
    """In statistics, normalisation and training."""
    args = make(kind, lora_rank=lora_rank, kl_coef=0.3)
    agent, judge = load(args)
    rollout = collect(agent, judge, args, ENDINGS)
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
        new = rollout.logprobs[i, :n].double().tolist()
        old = rollout.ref_logprobs[i, :n].double().tolist()
        logprobs += new
        references += old
        k1.append(sum(new) - sum(old))
        pairs += [(ENDINGS[i][j], ENDINGS[i][j + 1]) for j in range(n - 1)]
    expected = {
        "score": rollout.scores.mean().item(),
        "kl": np.mean(k1),
        "entropy": -np.mean(logprobs),
        "reference_perplexity": np.exp(-np.mean(references)),
        "distinct_2": len(set(pairs)) / len(pairs),
        "response_length": np.mean(LENGTHS),
        "ended": 7 / 8,
    }
    assert script.describe(rollout) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@PAIRS
def test_there_is_one_temperature_for_sampling_and_all_probabilities(
    kind, lora_rank, temperature, make
):
    args = make(kind, lora_rank=lora_rank, temperature=temperature, micro_batch_size=8)
    agent, judge = load(args)
    rollout = collect(agent, judge, args)
    tokens, attention, mask = rollout[:3]
    script.set_seeds(1)
    inputs = {"input_ids": tokens[:, :-T], "attention_mask": attention[:, :-T]}
    options = {"output_scores": True, "return_dict_in_generate": True}
    sampled = agent.policy.generate(**inputs, **options)
    response = sampled.sequences[:, -len(sampled.scores) :]  # shorter, if all end earlier
    mask = mask[:, : response.shape[1]]
    assert torch.equal(response[mask], tokens[:, -T:][:, : response.shape[1]][mask])
    scores = torch.stack(sampled.scores, 1).log_softmax(2)
    scores = scores.gather(2, response[:, :, None]).squeeze(2)
    close(rollout.logprobs[:, : response.shape[1]][mask], scores[mask], atol=1e-4)
    reference = CAUSAL.from_pretrained(args.model).eval()
    found = rollout.ref_logprobs[rollout.mask]
    close(found, plain_logprobs(reference, rollout, temperature))


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_tokens_are_sampled_as_often_as_is_said(temperature, make):
    """The rare ones, too: none are left out, whatever the model's own settings say."""
    args = make(temperature=temperature, response_length=1, micro_batch_size=2048)
    agent, _ = load(args)
    rollout = collect(agent, zero, args, prompts=SENTENCES[:1] * 2048)
    logits = alone(agent.policy, *(x[:1, :-1] for x in rollout[:2]))[0][-1]
    expected = 2048 * (logits / temperature).softmax(0)
    counts = torch.bincount(rollout.tokens[:, -1], minlength=len(expected))
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 2).all()
    rare = expected.argsort()[:10]
    assert abs(counts[rare].sum() - expected[rare].sum()) < 4 * expected[rare].sum().sqrt()


@PAIRS
def test_dropout_in_a_checkpoint_changes_nothing(kind, lora_rank, make):
    results = []
    for rate in (0.0, 0.5):
        args = make(f"{kind}, dropout {rate}", lora_rank=lora_rank)
        agent, judge = load(args)
        rates = [x.p for x in agent.policy.modules() if isinstance(x, torch.nn.Dropout)]
        assert rate in rates or kind == "llama"
        assert not any(module.training for module in agent.modules())
        rollout = collect(agent, judge, args)
        _, weights = update(agent, batch_of(rollout, args), args)
        results.append([*rollout[:7], rollout.scores, weights])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_empty_responses_have_a_reward_and_can_be_trained(make):
    args = make()
    agent, judge = load(args)
    rollout = collect(agent, judge, args, [[0]] * 8)
    assert rollout.mask.sum(1).tolist() == [1] * 8 and rollout.ended.all()
    close(rollout.scores, judge(rollout.texts))
    assert torch.equal(last_rewards(rollout, args)[:, 0], rollout.scores)
    assert np.isfinite([*script.describe(rollout).values()]).all()
    stats, weights = update(agent, batch_of(rollout, args), args)
    assert np.isfinite([*stats.values()]).all() and weights.isfinite().all()


@PAIRS
def test_every_parameter_has_a_gradient_but_those_of_the_reference(kind, lora_rank, make):
    args = make(kind, lora_rank=lora_rank)
    agent, judge = load(args)
    before = {name: x.detach().clone() for name, x in agent.named_parameters()}
    batch = batch_of(collect(agent, judge, args), args)
    script.minibatch_loss(agent, batch, args)[0].backward()
    parameters = trained(agent)
    assert {name.split(".")[0] for name in parameters} == {"policy", "value", "value_head"}
    assert [name for name, parameter in parameters.items() if not parameter.grad.any()] == []
    if lora_rank:
        networks = (agent.policy, agent.value)
        assert {x.peft_config["default"].lora_alpha for x in networks} == {16.0}
        assert all("lora_" in name or "value_head" in name for name in parameters)
    else:
        others = [name for name, _ in agent.named_parameters() if name not in parameters]
        assert all(name.startswith("reference") for name in others)
    agent.zero_grad()
    update(agent, batch, args)
    after = dict(agent.named_parameters())
    moved = {name for name, x in after.items() if not torch.equal(x, before[name])}
    tied = "policy.lm_head.weight"
    assert moved - {tied} == parameters.keys() - {tied}


def test_of_a_long_prompt_the_end_is_kept(make):
    args = make(prompt_length=4)
    agent, _ = load(args)
    rollout = collect(agent, zero, args)
    tokenizer = make_tokenizer()
    for prompt, row, keep in zip(SENTENCES, rollout.tokens, rollout.attention.bool()):
        assert row[:-T][keep[:-T]].tolist() == tokenizer(prompt)["input_ids"][-4:]


@LORA
def test_no_network_sees_more_than_a_micro_batch_nor_makes_logits_of_prompts(lora_rank, make):
    """In generation, in evaluation and in training."""
    args = make(lora_rank=lora_rank, micro_batch_size=2)
    agent, judge = load(args)
    vocabulary, sizes = len(agent.tokenizer), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for x in result if isinstance(result, (tuple, list)) else [result]:
                shape = x.shape if isinstance(x, torch.Tensor) else ()
                is_head = shape[-2:] == (32, vocabulary)  # the head's weights, transposed
                if shape[-1:] == (vocabulary,) and not is_head:
                    sizes.append(x.untyped_storage().nbytes() // x.itemsize // vocabulary)
            return result

    rows = []
    judge.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with Watch():
        rollout = collect(agent, judge, args)
        update(agent, batch_of(rollout, args), args)
    assert rollout.tokens.shape[0] == 8 and max(sizes) == 2 * (T + 1) and max(rows) == 2


def test_without_a_penalty_the_reward_is_hacked(make, tmp_path):
    """KL rises, and texts become alike."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("\n".join(["prompt", *SENTENCES * 12]))
    sizes = {"total_episodes": 32 * 12, "batch_size": 32, "num_minibatches": 4, "update_epochs": 4}
    sizes |= {"micro_batch_size": 32, "eval_episodes": 64}
    args = make(prompts=str(prompts), kl_coef=0.0, learning_rate=6e-3, **sizes)
    points = scalars(train(tmp_path, args))
    names = ("score", "kl", "distinct_2")
    first, last = ({name: points[f"eval/{name}"][i][1] for name in names} for i in (0, -1))
    assert first["kl"] == 0 and last["kl"] > 5
    assert last["score"] > first["score"] + 0.2 and last["distinct_2"] < 0.7 * first["distinct_2"]


# ------------------------------------------------------------------- the loss and the updates


@pytest.mark.parametrize("weighted", [True, False])
@AGENTS
def test_the_loss_is_a_textbooks(kind, weighted, make):
    args = make(kind, importance_weighted_reverse=weighted, temperature=0.8, Z=-2.0)
    agent, judge = load(args)
    rollout = collect(agent, judge, args)
    rng = torch.Generator().manual_seed(0)
    noise = [torch.randn(rollout.mask.shape, generator=rng) for _ in range(3)]
    batch = [*rollout[:3], rollout.logprobs + 0.2 * noise[0], *noise[1:]]
    loss, logged = script.minibatch_loss(agent, batch, args)

    old, advantage, returns = (x[rollout.mask].double().numpy() for x in batch[3:])
    logprob = plain_logprobs(agent.policy, rollout, args.temperature).numpy()
    values = plain_values(agent, rollout).double().numpy()
    context = (args.alpha, args.beta, args.Z, args.clip_coef, weighted)
    forward, reverse, _ = textbook.symmetric_ppo(
        logprob[:, None], old[:, None], advantage, *context
    )
    r = np.exp(logprob - old)
    expected = {
        "losses/policy_loss": args.alpha * forward.mean() + args.beta * reverse.mean(),
        "losses/forward_loss": forward.mean(),
        "losses/reverse_loss": reverse.mean(),
        "losses/value_loss": np.mean((values - returns) ** 2),
        "losses/approx_kl": np.mean(r - 1 - np.log(r)),
        "losses/clipfrac": np.mean(abs(r - 1) > args.clip_coef),
    }
    assert {tag: x.item() for tag, x in logged.items()} == pytest.approx(
        expected, rel=1e-4, abs=1e-5
    )
    whole = expected["losses/policy_loss"] + args.vf_coef * expected["losses/value_loss"]
    assert loss.item() == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0)])
def test_advantages_are_a_textbooks_for_each_response(gamma, gae_lambda, make):
    args = make(gamma=gamma, gae_lambda=gae_lambda, kl_coef=0.3)
    rollout = collect(*load(args), args, ENDINGS)
    advantages = batch_of(rollout, args)[4]
    for i, n in enumerate(LENGTHS):
        kl = rollout.logprobs[i, :n] - rollout.ref_logprobs[i, :n]
        rewards = -0.3 * kl.double().numpy()
        rewards[-1] += rollout.scores[i]
        zeros, values = np.zeros((n, 1)), rollout.values[i, :n, None].numpy()
        dones = np.eye(n)[:, -1:]
        expected = textbook.gae(rewards[:, None], values, dones, zeros, zeros[0], gamma, gae_lambda)
        close(advantages[i, :n], expected[:, 0])


@PAIRS
def test_an_update_is_a_textbooks_and_does_not_depend_on_micro_batches(kind, lora_rank, make):
    """Nor on the padding that is cut off, nor on the order of rows."""
    args = make(kind, lora_rank=lora_rank, max_grad_norm=0.1, kl_coef=0.3, prompt_length=30)
    args.update_epochs = 2
    args.norm_adv = kind == "gpt2"
    agent, judge = load(args)
    batch = batch_of(collect(agent, judge, args, ENDINGS), args)
    results = []
    for micro_batch_size in (1, 3, 64):
        args.micro_batch_size = micro_batch_size
        results.append(update(copy.deepcopy(agent), batch, args))

    optimizer = torch.optim.Adam(trained(agent).values(), lr=args.learning_rate, eps=1e-5)
    torch.manual_seed(1)
    norms, flips = [], []
    for _ in range(args.update_epochs):
        for rows in torch.randperm(8).chunk(2):
            torch.rand(sum(LENGTHS[row] for row in rows))  # as flip_signs draws
            tokens, attention, mask, old_logprob, A, returns = (x[rows] for x in batch)
            normalized = A[mask]
            if args.norm_adv:
                normalized = (A[mask] - A[mask].mean()) / A[mask].std()
            logprob = agent.logprobs(tokens, attention, T)[mask]
            terms = (logprob, old_logprob[mask], normalized, args.clip_coef, args)
            value = agent.values(tokens, attention, T)[mask]
            loss = args.vf_coef * (value - returns[mask]).square().mean()
            optimizer.zero_grad()
            (loss + script.symmetric_ppo_loss(*terms)[0]).backward()
            parameters = trained(agent).values()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
            flips.append((A[mask] * normalized < 0).float().mean().item())
            optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in trained(agent).values()])
    for stats, updated in results:
        assert stats == pytest.approx(results[0][0], rel=1e-4, abs=1e-5)
        assert stats["losses/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
        assert stats["advantage/sign_flips_normalization"] == pytest.approx(np.mean(flips))
        close(updated, weights)


@LORA
def test_the_symmetric_loss_is_ppo_with_another_weight(lora_rank, make):
    """α, β and the matched control α + β|Z|, 0: the same gradient."""
    args = make(lora_rank=lora_rank)
    agent, judge = load(args)
    batch = list(batch_of(collect(agent, judge, args), args))
    rng = torch.Generator().manual_seed(0)
    batch[3] = batch[3] + 0.2 * torch.randn(batch[3].shape, generator=rng)
    gradients = []
    for weights in ((0.5, 0.4, -3.0), (1.7, 0.0, -1.0), (1.0, 0.0, -1.0)):
        weights = dict(zip(("alpha", "beta", "Z"), weights))
        args = make(lora_rank=lora_rank, vf_coef=0.0, **weights)
        loss, logged = script.minibatch_loss(agent, batch, args)
        assert 0 < logged["losses/clipfrac"] < 1
        parameters = [x for name, x in trained(agent).items() if name.startswith("policy")]
        found = torch.autograd.grad(loss, parameters)
        gradients.append(torch.cat([x.flatten() for x in found]))
    symmetric, control, ppo = gradients
    assert (symmetric - control).norm() < 1e-4 * control.norm()
    assert (symmetric - ppo).norm() > 0.5 * ppo.norm()


@LORA
def test_in_bfloat16_what_is_trained_is_not(lora_rank, make):
    """A step would be rounded away. The reward model stays as it was saved."""
    agent, judge = load(make(lora_rank=lora_rank, bf16=True), moved=False)
    args = make(lora_rank=lora_rank, bf16=True)
    assert {parameter.dtype for parameter in trained(agent).values()} == {torch.float32}
    embeddings = agent.policy.get_input_embeddings().weight
    assert (embeddings.dtype == torch.bfloat16) == bool(lora_rank)
    assert judge.model.dtype == torch.float32
    rollout = collect(agent, judge, args)
    stats, _ = update(agent, batch_of(rollout, args), args)
    assert script.describe(rollout)["kl"] == 0 and np.isfinite([*stats.values()]).all()


# -------------------------------------------------------------------------- nothing in silence


def with_settings(source, folder, **settings):
    """A copy of a model with other generation settings."""
    model = CAUSAL.from_pretrained(source)
    model.generation_config = transformers.GenerationConfig(**settings)
    return save(model, folder)


def test_any_of_several_ends_ends_a_response(make, tmp_path):
    ends = [7, 9]  # and 0, the tokenizer's
    source = Path(make().model)
    args = make(model=str(with_settings(source, tmp_path / "m", eos_token_id=ends)))
    agent, _ = load(args)
    rollout = collect(agent, zero, args, prompts=SENTENCES * 4)
    found = [row[keep].tolist() for row, keep in zip(rollout.tokens[:, -T:], rollout.mask)]
    assert {row[-1] for row in found} & {7, 9}
    assert not any({0, 7, 9} & set(row[:-1]) for row in found)
    assert [row[-1] in (0, 7, 9) for row in found] == rollout.ended.tolist()
    assert all(row[-1] in (0, 7, 9) or len(row) == T for row in found)


@pytest.mark.parametrize("template", ["$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>"])
def test_an_end_that_the_tokenizer_appends_is_no_prompt(template, make, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(END, 0)]
    )
    save(CAUSAL.from_pretrained(make().model), tmp_path / "m", tokenizer)
    agent, _ = load(make(model=str(tmp_path / "m"), prompt_length=50))
    rollout = collect(agent, zero, make())
    plain = make_tokenizer()
    for prompt, row, keep in zip(SENTENCES, rollout.tokens, rollout.attention.bool()):
        expected = [0] * (template[0] == "<") + plain(prompt)["input_ids"]
        assert row[:-T][keep[:-T]].tolist() == expected


@LORA
def test_what_is_saved_is_the_users_model_again(lora_rank, make, tmp_path):
    """Its generation settings, its tokenizer's sides and lengths, its files: no adapters."""
    settings = {"max_new_tokens": 99, "eos_token_id": [0, 7], "do_sample": True, "top_p": 0.5}
    source = with_settings(Path(make().model), tmp_path / "m", **settings)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(source)
    args = make(model=str(source), lora_rank=lora_rank)
    agent, _ = load(args)
    collect(agent, zero, args)
    script.save_model(tmp_path / "saved", agent, args)
    files = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == files
    for name in files - {"model.safetensors"}:
        texts = [(x / name).read_text(encoding="utf-8") for x in (source, tmp_path / "saved")]
        if name in ("config.json", "tokenizer_config.json"):  # these say how they were loaded
            how = dict.fromkeys(("dtype", "is_local", "local_files_only"))
            texts = [json.loads(text) | how for text in texts]
        assert texts[0] == texts[1], name
    assert agent.policy.generation_config.max_new_tokens == T  # for what is sampled next
    collect(agent, zero, args)


def test_a_reward_of_ones_own(make, tmp_path):
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "import json\n"
        "def shorter(texts, prompts, responses):\n"
        "    assert all(x.endswith(y) for x, y in zip(texts, responses))\n"
        "    open('seen.json', 'w').write(json.dumps([prompts, responses]))\n"
        "    return [-float(len(x)) for x in responses]\n"
    )
    args = make(reward=f"{rewards}:shorter", reward_model="nothing", total_episodes=8)
    points = scalars(train(tmp_path, args))
    prompts, responses = json.loads((tmp_path / "seen.json").read_text())
    assert prompts == (SENTENCES * 4)[:6]  # the last were those of the evaluation, as written
    mean = np.mean([-len(x) for x in responses])
    assert points["eval/score"][-1][1] == pytest.approx(mean)


@pytest.mark.parametrize("scores", ["[1.0]", "[float('nan')] * len(texts)", "1.0"])
def test_a_reward_that_is_no_number_for_each_text_ends_the_run(scores, make):
    agent, _ = load(make())
    with pytest.raises(ValueError, match="one finite number for each of 8 texts"):
        collect(agent, lambda texts, *_: eval(scores), make())


def test_chat_messages_go_through_the_chat_template(make, tmp_path):
    """With its special tokens, and without those that the tokenizer would add to a text."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[(END, 0)]
    )
    tokenizer.chat_template = (
        "<|endoftext|>{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    save(CAUSAL.from_pretrained(make().model), tmp_path / "m", tokenizer)
    messages = [[{"role": "user", "content": text}] for text in SENTENCES]
    args = make(model=str(tmp_path / "m"), prompt_length=50)
    agent, _ = load(args)
    rollout = collect(agent, zero, args, prompts=messages)
    plain = make_tokenizer()
    for text, row, keep in zip(SENTENCES, rollout.tokens, rollout.attention.bool()):
        expected = [0, *plain(f"u {text} a")["input_ids"]]
        assert row[:-T][keep[:-T]].tolist() == expected


def test_responses_without_an_end_are_punished_and_reported_scores_are_not(
    make, tmp_path, monkeypatch
):
    seen, advantages = [], script.token_advantages
    monkeypatch.setattr(script, "token_advantages", lambda *x: seen.append(x[:2]) or advantages(*x))
    points = scalars(train(tmp_path, make(missing_end_penalty=3.0)))
    for rollout, scores in seen:
        close(scores, rollout.scores - 3.0 * ~rollout.ended)
    close(points["objective/score"][0][1], seen[0][0].scores.mean())
    assert 0 < torch.cat([rollout.ended for rollout, _ in seen]).float().mean() < 1


def test_noise_is_in_units_of_the_scores_deviation_and_not_reported(make, tmp_path, monkeypatch):
    seen, advantages = [], script.token_advantages
    monkeypatch.setattr(script, "token_advantages", lambda *x: seen.append(x[:2]) or advantages(*x))
    points = scalars(
        train(
            tmp_path,
            make(reward_noise=0.5, total_episodes=64, num_minibatches=1, micro_batch_size=8),
        )
    )
    noise = [((scores - x.scores) / (0.5 * x.scores.std(correction=0))) for x, scores in seen]
    assert 0.7 < torch.cat(noise).std() < 1.4
    for (rollout, _), (_, score) in zip(seen, points["objective/score"], strict=True):
        assert score == pytest.approx(rollout.scores.mean().item(), rel=1e-5)


# ---------------------------------------------------------------------------------- whole runs


def train(folder, args, checkpoint=None):
    """Its folder."""
    with contextlib.chdir(folder):
        script.main(args, checkpoint)
    (run,) = folder.glob("runs/*")
    return run


def scalars(run):
    """What TensorBoard shows; steps grow within every tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    points = {}
    for tag in events.Tags()["scalars"]:
        points[tag] = [(point.step, point.value) for point in events.Scalars(tag)]
        steps = [step for step, _ in points[tag]]
        assert steps == sorted(set(steps)), tag
    return points


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


EVALUATED = "score kl reference_perplexity entropy distinct_2 response_length ended".split()
LOSSES = "policy_loss forward_loss reverse_loss value_loss approx_kl clipfrac grad_norm mean_weight"
LOGGED = {f"{group}/{tag}" for group in ("objective", "eval") for tag in EVALUATED}
LOGGED |= {f"losses/{tag}" for tag in LOSSES.split()}
LOGGED |= {"eval/gold_score", "advantage/sign_flips_normalization"}


@PAIRS
def test_a_whole_run(kind, lora_rank, make, tmp_path, capsys):
    flags = {"eval_interval": 16, "Z": -2.0, "importance_weighted_reverse": kind == "gpt2"}
    args = make(kind, lora_rank=lora_rank, top_k=0 if lora_rank else 9, **flags)
    run = train(tmp_path, args)
    points, events = scalars(run), EventAccumulator(str(run)).Reload()
    assert points.keys() == LOGGED
    assert np.isfinite([value for series in points.values() for _, value in series]).all()
    assert [step for step, _ in points["losses/policy_loss"]] == [8, 16, 24, 32]
    assert [step for step, _ in points["eval/score"]] == [1, 17, 33]
    weights = [weight for _, weight in points["losses/mean_weight"]]
    if kind == "gpt2":
        assert weights == pytest.approx([0.5 + 0.4 * 2] * 4)
    assert max(weights) < 0.5 + 0.4 * 2 * (1.01 if kind == "gpt2" else 0.5)
    (before, *_, after) = events.Tensors("eval/samples/text_summary")
    assert (before.step, after.step) == (1, 33)
    output = capsys.readouterr().out
    assert "score at 0 steps: " in output and "score at 32 steps: " in output
    assert "class 1 of {0: 'LABEL_0', 1: 'LABEL_1'}" in output and output.isascii()

    agent, _ = load(args, moved=False)
    agent.load_state_dict(checkpoint_of(run)["agent"], strict=False)
    rollout = collect(agent, zero, args)
    model = CAUSAL.from_pretrained(run / "model")
    close(plain_logprobs(model, rollout), rollout.logprobs[rollout.mask])
    assert (rollout.logprobs - rollout.ref_logprobs)[rollout.mask].abs().max() > 0.01


def test_a_run_trains_on_what_it_collected_and_holds_prompts_out(make, tmp_path, monkeypatch):
    prompts = [f"{one} and {other}" for one in SENTENCES[:4] for other in SENTENCES]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt", *prompts]))
    args = make(prompts=str(tmp_path / "prompts.csv"), prompt_length=48, kl_coef=0.3)
    collect_responses, update, rollouts, batches = script.collect_responses, script.update, [], []

    def collecting(*given):
        rollouts.append((collect_responses(*given), given[2]))
        return rollouts[-1][0]

    monkeypatch.setattr(script, "collect_responses", collecting)
    monkeypatch.setattr(script, "update", lambda *x: batches.append(x[2]) or update(*x))
    gold_scores = scalars(train(tmp_path, args))["eval/gold_score"]
    gold = script.Judge(args.gold_model, args, CPU)
    first, *others, last = rollouts
    for (rollout, given), (_, score) in zip((first, last), gold_scores, strict=True):
        assert score == pytest.approx(gold(rollout.texts).mean().item()) and given == prompts[:6]
    drawn = []
    for (rollout, given), batch in zip(others, batches, strict=True):
        for one, other in zip(batch, batch_of(rollout, args), strict=True):
            close(one, other)
        assert len(set(given)) == 8 and not set(given) & set(prompts[:6])
        drawn.append(frozenset(given))
    assert len(set(drawn)) == 4


def test_a_run_can_be_repeated_and_evaluations_do_not_change_it(make, tmp_path):
    results = []
    for i, flags in enumerate(({}, {"eval_interval": 8}, {"seed": 4})):
        (tmp_path / str(i)).mkdir()
        args = make(reward_noise=0.5, advantage_noise=0.1, total_episodes=16, **flags)
        points = scalars(train(tmp_path / str(i), args))
        results.append({tag: x for tag, x in points.items() if not tag.startswith("eval/")})
    assert results[0] == results[1] != results[2]


def same_checkpoint(run, other):
    """To the bit."""
    saved, expected = checkpoint_of(run), checkpoint_of(other)
    for key in ("step", "agent"):
        torch.testing.assert_close(saved[key], expected[key], rtol=0, atol=0)
    states = (saved["optimizer"]["state"], expected["optimizer"]["state"])
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("flags", [{"kind": "llama", "bf16": True}, {"kind": "gpt2"}])
def test_a_run_with_lora_goes_on_where_it_was(flags, make, tmp_path, monkeypatch):
    save_checkpoint, kept = script.save_checkpoint, []

    def saving(path, *given):
        save_checkpoint(path, *given)
        kept.append(path.read_bytes())

    monkeypatch.setattr(script, "save_checkpoint", saving)
    whole, parts = tmp_path / "whole", tmp_path / "parts" / "runs" / "run"
    whole.mkdir()
    run = train(
        whole,
        make(
            lora_rank=4,
            total_episodes=24,
            reward_noise=0.3,
            eval_interval=16,
            checkpoint_interval=8,
            **flags,
        ),
    )
    assert len(kept) == 4
    parts.mkdir(parents=True)
    (parts / "checkpoint.pt").write_bytes(kept[2])  # of the second iteration
    checkpoint = checkpoint_of(parts)
    args = script.Args(**checkpoint["args"] | {"resume": str(parts)})
    train(tmp_path / "parts", args, checkpoint)
    same_checkpoint(parts, run)
    for tag, series in scalars(run).items():
        assert scalars(parts)[tag] == [x for x in series if x[0] > 16]


def test_a_longer_run_learns_at_the_rate_that_is_typed(make, tmp_path):
    run = train(tmp_path, make())
    checkpoint = checkpoint_of(run)
    flags = {"resume": str(run), "total_episodes": 40, "learning_rate": 1e-30}
    train(tmp_path, script.Args(**checkpoint["args"] | flags), checkpoint)
    assert checkpoint_of(run)["step"] == 40
    torch.testing.assert_close(checkpoint_of(run)["agent"], checkpoint["agent"], rtol=0, atol=1e-9)


FORK = multiprocessing.get_context("fork")  # without the imports of a process of its own


def test_a_killed_run_goes_on_as_if_it_had_not_been(make, tmp_path, monkeypatch):
    """To the bit."""
    args = make(total_episodes=64, eval_interval=32, reward_noise=0.3, checkpoint_interval=8)
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", args)
    folder = tmp_path / "in parts"
    folder.mkdir()
    process = FORK.Process(target=train, args=(folder, args))
    process.start()
    while True:
        found = [*folder.glob("runs/*/checkpoint.pt")]
        if found and checkpoint_of(found[0].parent)["step"] >= 16:
            break
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    run = found[0].parent
    assert checkpoint_of(run)["step"] < 64
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--resume", str(run)])
    train(folder, *script.read_flags())
    same_checkpoint(run, whole)
    assert scalars(run) == scalars(whole)


def test_two_runs_that_start_at_the_same_time_have_folders_of_their_own(
    make, tmp_path, monkeypatch
):
    """Also if the clock says exactly the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1.8e9)
    runs = [FORK.Process(target=script.start_logging, args=(make(), 1)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert len([*tmp_path.glob("runs/*")]) == 2


# ----------------------------------------------------------------------------- flags and files


CHAT = [{"role": "user", "content": "go"}]
REFUSED = [  # flags, what the line says
    ("--model nothing", "nothing"),
    ("--model empty", "empty"),
    ("--reward-model nothing", "nothing"),
    ("--model classifier", "classifier does not fit AutoModelForCausalLM: look at its lm_head"),
    ("--reward-model policy", "policy does not fit AutoModelForSequenceClassification"),
    ("--gold-model policy", "look at its score.weight"),
    ("--model tied-classifier", "tied-classifier does not fit AutoModelForCausalLM"),
    ("--model bidirectional", "bidirectional reads ahead or counts padding"),
    ("--model encoder-decoder", "encoder-decoder reads ahead or counts padding"),
    ("--model t5", "T5Config"),
    ("--model padded", "padded: its tokenizer has 61 tokens, its embeddings have 60"),
    ("--reward-model padded-judge", "padded-judge: its tokenizer has 61 tokens"),
    ("--reward-label None", "proxy has the classes {0: 'LABEL_0', 1: 'LABEL_1'}: choose"),
    ("--reward-label 2", "choose one by --reward-label"),
    ("--gold-model proxy --reward-model scalar --reward-label None", "proxy has the classes"),
    ("--reward rewards.py:nothing", "nothing"),
    ("--reward nothing.py:score", "nothing.py"),
    ("--prompts nothing.csv", "nothing.csv"),
    ("--prompt-column nothing", "prompts.csv: 0 prompts in the column nothing"),
    ("--prompts latin.csv", "latin.csv: 'utf-8'"),
    ("--prompts broken.jsonl", "broken.jsonl: Expecting value: line 2"),
    ("--prompts empty.jsonl", "empty.jsonl: 0 prompts"),
    ("--prompts numbers.jsonl", "numbers.jsonl: prompt 3 is no text"),
    (
        "--prompts mixed.jsonl",
        "mixed.jsonl: prompt 2 is no text, or no list of messages as the others",
    ),
    ("--prompts chat.jsonl", "chat_template"),
    ("--eval-episodes 30", "are less than eval_episodes + batch_size"),
    ("--response-length 60", "prompt_length and response_length: policy has 64 tokens"),
    ("--num-minibatches 3", "batch_size must divide by num_minibatches"),
    ("--num-minibatches 8", "batch_size must divide"),  # one response cannot be normalised
    ("--total-episodes 7", "total_episodes"),
    ("--Z 0", "Z must be negative"),
    ("--alpha=-1", "alpha must be positive or 0"),
    ("--advantage-noise 1.1", "advantage_noise at most 1"),
    ("--resume .", "checkpoint.pt"),
]
POSITIVE = """prompt_length response_length temperature total_episodes batch_size num_minibatches
    micro_batch_size update_epochs learning_rate clip_coef max_grad_norm eval_episodes lora_alpha
    checkpoint_interval""".split()
REFUSED += [
    (f"--{name.replace('_', '-')}={value}", f"{name} must be positive")
    for name in POSITIVE
    for value in (0, -1)
]


@pytest.fixture(scope="module")
def wrong(models, tmp_path_factory):
    """A folder with models and prompt files that are wrong, and some that are right."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("policy", "proxy", "scalar", "prompts.csv"):
        (folder / name).symlink_to(models / "gpt2" / name)
    (folder / "classifier").symlink_to(models / "llama" / "proxy")
    (folder / "tied-classifier").symlink_to(models / "gpt2" / "proxy")
    (folder / "empty").mkdir()
    save(make_model(CAUSAL, "bert"), folder / "bidirectional")
    save(make_model(CAUSAL, "bart"), folder / "encoder-decoder")
    small = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=60, **small))
    save(t5, folder / "t5")
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    save(CAUSAL.from_pretrained(folder / "policy"), folder / "padded", padded)
    save(CLASSIFIER.from_pretrained(folder / "proxy"), folder / "padded-judge", padded)
    (folder / "rewards.py").write_text("def score(texts, *_): return [0.0] * len(texts)\n")
    (folder / "latin.csv").write_bytes("prompt\ncafé\n".encode("latin-1"))
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    rows = {"numbers": ["a", "b", 5], "mixed": ["a", CHAT], "chat": [CHAT] * 30}
    for name, prompts in rows.items():
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


USUAL = """--model policy --reward-model proxy --reward-label 1 --prompts prompts.csv --batch-size 8
    --num-minibatches 2 --eval-episodes 8 --prompt-length 12 --response-length 8 --no-cuda
    --total-episodes 32 --torch-threads 1"""


def refused(flags, folder, monkeypatch, capsys) -> str:
    """Starts the script within this process. Returns its one line on stderr."""
    files = set(folder.rglob("*"))
    capsys.readouterr()  # drops the progress of a run before
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *USUAL.split(), *shlex.split(flags)])
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2
    assert set(folder.rglob("*")) == files
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("flags, named", REFUSED)
def test_it_is_refused_in_one_line(flags, named, wrong, monkeypatch, capsys):
    line = refused(flags, wrong, monkeypatch, capsys)
    assert line.startswith("sppo_rlhf.py ") and named in line


def test_a_run_cannot_go_on_with_other_weights(make, wrong, tmp_path, monkeypatch, capsys):
    run = train(tmp_path, make(lora_rank=4, total_episodes=8))
    llama = make("llama").model
    for flags in ("--lora-rank 8", "--lora-rank 0", f"--model {llama}"):
        line = refused(f"--resume {run} {flags} --total-episodes 16", wrong, monkeypatch, capsys)
        assert "other weights" in line or "size mismatch" in line


def test_prompts_are_read_as_they_are_written(make, tmp_path):
    """With a byte order mark or without, blank lines, other columns, long fields, an array."""
    texts = [" It was, so\n", "é", "a" * 140_000, *("so" for _ in range(20))]
    rows = [{"number": 1, "prompt": text} for text in [*texts, "", " ", None]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for encoding in ("utf-8", "utf-8-sig"):
        with open(tmp_path / "a.csv", "w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, ["prompt", "number"])
            writer.writeheader()
            writer.writerows(rows)
            file.write("\n\n")
        written = {"a.jsonl": "\n".join(lines) + "\n\n", "b.jsonl": "\n".join(["", *lines])}
        written |= {"a.json": json.dumps(rows, indent=1), "c.jsonl": "\r\n".join(lines)}
        for name, text in written.items():
            (tmp_path / name).write_bytes(text.encode(encoding))
        for name in ("a.csv", *written):
            args = make(prompts=str(tmp_path / name))
            assert script.read_prompts(args) == texts, (name, encoding)


HUB = {  # names in docs/language_models.md, and their kinds of model
    "lvwerra/gpt2-imdb": ("gpt2", CAUSAL, {}),
    "lvwerra/distilbert-imdb": ("distilbert", CLASSIFIER, {"num_labels": 2}),
    "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr": ("gpt_neox", CAUSAL, {}),
    "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr": (
        "gpt_neox",
        CLASSIFIER,
        {"num_labels": 1},
    ),
}


def test_the_pages_table_is_that_of_the_runs():
    page = Path(SCRIPT.parent, "docs", "language_models.md").read_text(encoding="utf-8")
    assert language.report(language.ROOT / "benchmark" / "results" / "language.csv") in page


def documented(word):
    """The flags of the page's command that has this word."""
    page = Path(SCRIPT.parent, "docs", "language_models.md").read_text(encoding="utf-8")
    lines = page.replace("\\\n", " ").splitlines()
    (command,) = [x for x in lines if word in x and x.startswith("    python sppo_rlhf.py")]
    return command.split()[2:]


@pytest.mark.parametrize(
    "word, kind",
    [("lvwerra/gpt2-imdb", None), ("pythia-1b", None), ("pythia-1b", "gptj")],
)
def test_documented_commands_train_tiny_models_of_the_same_kind(
    word, kind, tmp_path, monkeypatch, capsys
):
    """The paper's TL;DR policy is a GPT-J."""
    flags = documented(word)
    for name in set(flags) & HUB.keys():
        documented_kind, auto_class, options = HUB[name]
        length = "n_positions" if documented_kind == "gpt2" else "max_position_embeddings"
        if kind == "gptj":
            length = "n_positions"
        model = make_model(auto_class, kind or documented_kind, **options, **{length: 1024})
        save(model, tmp_path / name)
    rows = [json.dumps({"prompt": text}) for text in SENTENCES * 4]
    (tmp_path / flags[flags.index("--prompts") + 1]).write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    less = "--total-episodes 8 --batch-size 8 --eval-episodes 8 --update-epochs 1 --no-cuda"
    less += " --response-length 6 --torch-threads 1"
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *flags, *less.split()])
    script.main(*script.read_flags())
    assert "score at 8 steps" in capsys.readouterr().out
    (model,) = tmp_path.glob("runs/*/model")
    CAUSAL.from_pretrained(model)
