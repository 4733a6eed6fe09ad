"""SPPO for language models: PPO with the symmetric loss of Byun and Perrault (ICML 2025, arXiv 2405.17618), per token.

A language model, the policy, continues prompts; a reward model scores the texts. Each token of a response is an action,
up to and including its first end of text. With π the probability of the token that was sampled, π_old the same when it
was sampled, r = π / π_old and A its advantage:

    forward = −min(r·A, clip(r, 1−ε, 1+ε)·A)    PPO's clipped objective
    reverse = −m · A · Z · (1 − π) / π_old      after reverse cross-entropy; Z < 0 stands for log 0,
                                                m is 1 where the clipped objective has a gradient, else 0
    loss = α · forward + β · reverse + vf_coef · value loss + target_coef · target loss (−log π of given texts)

With α = 1, β = 0 this is PPO. The gradient of `reverse` is |Z| times that of `forward`: `--alpha` α + β|Z| `--beta 0`
is the same but for rounding, the matched control. (For the plain reverse term take the logged `losses/mean_weight`
instead of α + β|Z|.) Each iteration of `main`

    samples responses to batch_size prompts and scores them                        collect_responses
    rewards tokens: −kl_coef · log(π_old / π_ref), plus the score for the last     add_noise, token_rewards
    computes advantages A by GAE over tokens, returns = A + V                      gae
    in each epoch, for each minibatch, normalises A and steps down the loss        update, normalize, losses_of

π_ref is the policy before training. What differs from the released code, and why: padding is left out of all means and
of the normalisation, which is per minibatch; ends of text are trained, and an empty response has a reward; responses
may end early: forbidding the end would sample from another policy; the value loss is not clipped, weights do not decay,
as in the siblings; the target loss is off, and its targets are how the prompts went on, there how they began.

    python sppo_rlhf.py --reward-label 1 --gold-model models/gold    # after benchmark/tiny_language.py
    python sppo_rlhf.py --resume runs/<run>
"""

import contextlib
import copy
import csv
import itertools
import json
import os
import signal
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import peft
import torch
import torch.nn as nn
import transformers
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TAGS = """losses/policy_loss losses/forward_loss losses/reverse_loss losses/value_loss losses/target_loss
    losses/old_approx_kl losses/approx_kl losses/clipfrac losses/grad_norm advantage/sign_flips_normalization""".split()

PRESETS = {  # the released runs' settings; their value loss has a factor of 1/2, which is in vf_coef here
    "imdb": dict(model="rajkumarrrk/gpt2-fine-tuned-on-imdb-positive-reviews", tokenizer="lvwerra/gpt2-imdb",
        reward_model="lvwerra/distilbert-imdb", reward_label=1, prompts="stanfordnlp/imdb", prompt_column="text",
        prompt_share=0.5, response_length=48, top_k=50, total_episodes=60 * 112, batch_size=112, update_epochs=5,
        learning_rate=5e-6, gamma=0.99, kl_coef=0.001),
    "tldr": dict(model="CarperAI/openai_summarize_tldr_sft", tokenizer="gpt2", reward_model="jdchang/tldr_rm_adapter",
        prompts="CarperAI/openai_summarize_tldr", target_column="label", prompt_length=500, response_length=50,
        total_episodes=200 * 64, micro_batch_size=4, update_epochs=4, lora_rank=8, lora_alpha=64,
        learning_rate=5e-6, kl_coef=0.002, vf_coef=0.05, beta=0.2, bf16=True),
}  # fmt: skip
Rollout = namedtuple("Rollout", "tokens attention mask last ended texts scores logprobs ref_logprobs values")

@dataclass
class Args:
    """SPPO for language models. Defaults are for the small models that benchmark/tiny_language.py makes."""

    preset: Literal["imdb", "tldr"] | None = None  # the released runs' settings and models, to which flags can be added
    model: str = "models/policy"  # the policy: a folder or a name on the Hugging Face hub, here as below
    tokenizer: str | None = None  # None: the policy's own
    reward_model: str = "models/proxy"  # a sequence classifier, with a tokenizer of its own
    reward_label: int | None = None  # the score is the probability of this class; None: the classifier's only output
    gold_model: str | None = None  # another such classifier, which only judges, at evaluations
    prompts: str = "models/prompts.csv"  # .csv, .jsonl, .txt (a line each), or a hub data set (pip install datasets)
    prompt_column: str = "prompt"  # the column with the prompts
    target_column: str = "target"  # the column with the texts that --target-coef imitates
    prompt_share: float = 1.0  # less than 1: the prompt is this share of a text's words, the rest is the target
    prompt_length: int = 64  # tokens; of longer prompts the end is kept
    response_length: int = 24  # tokens at most
    temperature: float = 1.0  # of the policy: divides the logits wherever probabilities are computed
    top_k: int = 0  # sample among the k likeliest tokens; 0: all. Probabilities are always computed over all
    seed: int = 1  # seed of the run: value head, prompts, samples, minibatches, noise
    total_episodes: int = 1920  # responses; the last incomplete batch is left out
    batch_size: int = 64  # responses per iteration
    num_minibatches: int = 4  # minibatches per epoch
    micro_batch_size: int = 64  # responses per pass of policy and value: less memory, same loss (of targets nearly)
    update_epochs: int = 2  # passes over each batch
    learning_rate: float = 2e-4  # step size of Adam
    lora_rank: int = 0  # rank of LoRA adapters, trained alone but for the value's head; 0: all weights are trained
    lora_alpha: float = 16.0  # adapters are multiplied by this over their rank
    gamma: float = 1.0  # discount factor γ per token
    gae_lambda: float = 0.95  # λ of generalised advantage estimation
    clip_coef: float = 0.2  # clip range ε
    norm_adv: bool = True  # normalise the advantages of each minibatch
    vf_coef: float = 0.25  # weight of the value loss
    kl_coef: float = 0.02  # weight of the KL penalty
    target_coef: float = 0.0  # weight of the target loss, −log π of the target's tokens
    max_grad_norm: float = 1.0  # largest norm of the gradient, of policy and value together
    alpha: float = 0.5  # α, weight of the forward (PPO) term
    beta: float = 0.4  # β, weight of the reverse term
    Z: float = -1.0  # Z < 0, the stand-in for log 0; only β·Z matters
    importance_weighted_reverse: bool = True  # divide the reverse term by π_old; --no-…: the plain reverse term
    reward_noise: float = 0.0  # std of Gaussian noise on the scores, in units of their running std; reports stay clean
    advantage_noise: float = 0.0  # probability that a sample's advantage changes sign, redrawn in every epoch
    eval_interval: int = 0  # responses between evaluations; 0: only before the first update and after the last
    eval_episodes: int = 128  # prompts held out for evaluations, the first ones of the file
    checkpoint_interval: int = 1280  # responses between checkpoints; others: at evaluations, the end, after a signal
    resume: str | None = None  # continue the run in this folder with its flags and what is typed
    track: bool = False  # mirror the run to Weights & Biases (pip install wandb)
    cuda: bool = True  # use a GPU if there is one
    bf16: bool = False  # compute in bfloat16; with LoRA the frozen weights are kept in it, too
    torch_threads: int = 0  # CPU threads of torch; 0: all cores, but not more than 8

def validate(args: Args) -> None:
    """Raises ValueError or OSError for what would quietly train something else, or fail only after a while."""
    minibatch_size, least = args.batch_size / args.num_minibatches, 1 + args.norm_adv
    if minibatch_size % 1 or minibatch_size < least or args.batch_size > args.total_episodes:
        raise ValueError(f"--batch-size {args.batch_size} must divide by --num-minibatches and fit --total-episodes")
    if not args.Z < 0 <= min(args.alpha, args.beta, args.reward_noise) or not 0 <= args.advantage_noise <= 1:
        raise ValueError("--Z must be < 0, --alpha, --beta, --reward-noise must be ≥ 0, --advantage-noise in [0, 1]")
    if (prompts := len(read_prompts(args))) < args.eval_episodes + args.batch_size:
        raise ValueError(f"{args.prompts}: {prompts} prompts are fewer than --eval-episodes and --batch-size together")
    positions = getattr(transformers.AutoConfig.from_pretrained(args.model), "max_position_embeddings", 10**9)
    if args.prompt_length + args.response_length > positions or min(args.prompt_length, args.response_length) < 1:
        raise ValueError(f"--prompt-length and --response-length must be ≥ 1 and fit {args.model}: {positions} tokens")
    for model in filter(None, (args.reward_model, args.gold_model)):
        labels = transformers.AutoConfig.from_pretrained(model).num_labels
        if labels > 1 and args.reward_label not in range(labels):
            raise ValueError(f"{model} has {labels} classes: choose one by --reward-label 0 to {labels - 1}")

def read_prompts(args: Args) -> list[tuple[str, str]]:
    """(prompt, target) of each row that has a prompt."""
    if (kind := Path(args.prompts).suffix) in (".csv", ".jsonl", ".txt"):
        with open(args.prompts, newline="", encoding="utf-8") as file:
            if kind == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) if kind == ".jsonl" else {args.prompt_column: line} for line in file]
    else:
        import datasets
        rows = datasets.load_dataset(args.prompts, split="train").shuffle(seed=0)  # some are sorted by label
    needed = [args.prompt_column] + [args.target_column] * (args.target_coef > 0 and args.prompt_share == 1)
    if not len(rows) or not set(needed) <= rows[0].keys():
        raise ValueError(f"{args.prompts} has no column {' or no '.join(needed)}: see --prompt-column, --target-column")
    pairs = [((row.get(args.prompt_column) or "").strip(), row.get(args.target_column) or "") for row in rows]
    if args.prompt_share < 1:
        cuts = [(words := text.split(), int(len(words) * args.prompt_share)) for text, _ in pairs]
        pairs = [(" ".join(words[:cut]), " " + " ".join(words[cut:])) for words, cut in cuts]
    return [pair for pair in pairs if pair[0]]

class RunningMeanStd:
    """Mean and standard deviation of all samples so far (Welford, 1962)."""

    def __init__(self, shape: tuple[int, ...] = ()):
        self.count, self.mean, self.squares = 0, np.zeros(shape), np.zeros(shape)

    def update(self, sample: np.ndarray) -> None:
        self.count += 1
        delta = sample - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (sample - self.mean)  # Σ (sample − mean)²
        self.std = np.sqrt(self.squares / self.count + 1e-8)

def encode(tokenizer, texts, side: str, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, (batch, length): on this side they are padded, where the mask is 0."""
    options = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    batch = tokenizer(list(texts), padding_side=side, **options)
    return batch["input_ids"], batch["attention_mask"]

def load_tokenizer(name: str):
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left")  # the end is kept
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer

class Judge:
    """A sequence classifier's scores (batch,) of texts: the probability of class `label`, or its only output."""

    def __init__(self, name: str, label: int | None, device: torch.device):
        self.tokenizer, self.label = load_tokenizer(name), label
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(name).to(device).float().eval()
        self.model.config.pad_token_id = self.tokenizer.pad_token_id  # GPT-2 finds the last token with it
        positions = getattr(self.model.config, "max_position_embeddings", 10**9)
        self.max_length = min(self.tokenizer.model_max_length, positions)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> np.ndarray:
        tokens, mask = encode(self.tokenizer, texts, "right", self.max_length)  # on the left GPT-2's positions shift
        logits = self.model(tokens.to(self.model.device), attention_mask=mask.to(self.model.device)).logits.float()
        return (logits[:, 0] if logits.shape[1] == 1 else logits.softmax(1)[:, self.label]).numpy(force=True)

class LanguageAgent(nn.Module):
    """Policy and value, two networks, and the reference, all from the same pretrained one. `tokens`, `attention`:
    (batch, P + T), prompts padded on the left, then responses; attention is 0 for padding. Dropout never acts: with it,
    π were not the probability of what was sampled."""

    def __init__(self, args: Args, tokenizer):
        super().__init__()
        self.temperature, self.response_length = args.temperature, args.response_length
        dtype = torch.bfloat16 if args.bf16 and args.lora_rank else torch.float32
        self.policy = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        self.policy.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=args.temperature, top_k=args.top_k, max_new_tokens=args.response_length,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        self.value = transformers.AutoModel.from_pretrained(args.model, dtype=dtype)
        self.value_head = nn.Linear(self.value.config.hidden_size, 1)
        if args.lora_rank:  # not two adapters on one network: peft trains only the active one
            lora = {"r": args.lora_rank, "lora_alpha": args.lora_alpha}
            self.policy = peft.get_peft_model(self.policy, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
            self.value = peft.get_peft_model(self.value, peft.LoraConfig(task_type="FEATURE_EXTRACTION", **lora))
        self.reference = None if args.lora_rank else copy.deepcopy(self.policy).requires_grad_(False)
        self.eval()

    def inputs(self, tokens: torch.Tensor, attention: torch.Tensor) -> dict[str, torch.Tensor]:
        """Positions count from the first token that is no padding, as in `generate`; by itself GPT-2 counts padding."""
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": tokens, "attention_mask": attention, "position_ids": positions, "use_cache": False}

    def logprobs(self, tokens: torch.Tensor, attention: torch.Tensor, network: nn.Module | None = None) -> torch.Tensor:
        """Log-probabilities (batch, T) of the responses' tokens."""
        T, network = self.response_length, network or self.policy
        logits = network(**self.inputs(tokens, attention), logits_to_keep=T + 1).logits[:, :-1]
        logits = logits.float() / self.temperature
        return logits.gather(2, tokens[:, -T:, None]).squeeze(2) - logits.logsumexp(2)

    def reference_logprobs(self, tokens: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        with contextlib.nullcontext() if self.reference else self.policy.disable_adapter():
            return self.logprobs(tokens, attention, self.reference)

    def values(self, tokens: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        """Values (batch, T) of the texts before each of the responses' tokens."""
        hidden = self.value(**self.inputs(tokens, attention)).last_hidden_state[:, -self.response_length - 1 : -1]
        return self.value_head(hidden.float()).squeeze(2).float()

def symmetric_ppo_loss(logprob, old_logprob, advantage, alpha, beta, Z, clip_coef, importance_weighted=True):
    """The symmetric PPO loss α · forward + β · reverse, as above, and its two terms, each the mean over the batch. Not
    `importance_weighted`: reverse = −m · A · Z · (1/D) · Σ_d (1 − π_d), plain reverse cross-entropy.

    `logprob`, `old_logprob`: (batch, D), log-probabilities of the action taken, a column per action dimension; r, π
    and π_old are joint, the product over dimensions. `advantage`: (batch,). Source: the paper's SPPO loss; the mask m
    and the division by π_old are in the released code. The plain form over several dimensions is ours."""
    joint_logprob, old_joint_logprob = logprob.sum(1), old_logprob.sum(1)
    ratio = (joint_logprob - old_joint_logprob).exp()
    objective, clipped_objective = ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage
    forward_loss = -torch.min(objective, clipped_objective).mean()
    mask = objective <= clipped_objective  # where the minimum is the unclipped one, which has a gradient
    if importance_weighted:
        # (1 − π) / π_old = 1 / π_old − r. The first part has no gradient; capped, it does not overflow float32.
        reverse_weight = (-old_joint_logprob.clamp(min=-80)).exp() - ratio
    else:
        reverse_weight = (1 - logprob.exp()).mean(1)
    reverse_loss = -(mask * advantage * Z * reverse_weight).mean()
    return alpha * forward_loss + beta * reverse_loss, forward_loss, reverse_loss

def gae(rewards, values, dones, next_value, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimation (Schulman et al., 2016). A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} − V_t.
    `rewards`, `values`, `dones`: (num_steps, num_envs); `next_value`: (num_envs,). `dones[t]`: an episode ended with
    step t, nothing is carried over. For a truncated one the caller adds γ · V(final observation) to the last reward."""
    following_values = np.concatenate((values[1:], next_value[np.newaxis]))
    advantages = rewards + gamma * following_values * ~dones - values  # δ_t, to which the loop adds γλ A_{t+1}
    decay = np.where(dones, 0, gamma * gae_lambda).astype(values.dtype)
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages

def normalize(advantages: torch.Tensor) -> torch.Tensor:
    """Advantages (…, samples) with mean 0 and standard deviation 1 in each row."""
    return (advantages - advantages.mean(-1, keepdim=True)) / (advantages.std(-1, keepdim=True) + 1e-8)

def add_noise(reward: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    """Adds Gaussian noise with mean 0 and this standard deviation to (normalised) rewards."""
    return reward + std * rng.standard_normal(reward.shape, dtype=reward.dtype)

def flip_signs(advantage: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Each advantage (batch,) changes its sign with `probability` (`adv_flip` in the released code)."""
    return advantage * torch.from_numpy(np.where(rng.random(len(advantage)) < probability, -1, 1)).to(advantage)

@torch.no_grad()
def collect_responses(agent: LanguageAgent, tokenizer, judge: Judge, prompts, args: Args, seed: int) -> Rollout:
    """Samples responses. Of shape (batch, T): `mask`, true up to and including a response's first end of text; `last`,
    for its last token only; `logprobs`, log π_old; `ref_logprobs`, log π_ref; `values`. `texts` include the prompts."""
    torch.manual_seed(seed)
    device, T = next(agent.parameters()).device, args.response_length
    prompt, prompt_mask = (x.to(device) for x in encode(tokenizer, prompts, "left", args.prompt_length))
    response = agent.policy.generate(input_ids=prompt, attention_mask=prompt_mask)[:, prompt.shape[1] :]
    response = nn.functional.pad(response, (0, T - response.shape[1]), value=tokenizer.eos_token_id)
    ends = response == tokenizer.eos_token_id  # not the padding token, which can be sampled before the end
    mask = ends.cumsum(1) - ends.long() == 0  # no end before this token
    tokens, attention = torch.cat((prompt, response), 1), torch.cat((prompt_mask, mask.long()), 1)
    texts = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, attention.bool())]
    parts = list(zip(tokens.split(args.micro_batch_size), attention.split(args.micro_batch_size)))
    networks = (agent.logprobs, agent.reference_logprobs, agent.values)
    evaluated = [torch.cat([network(*part) for part in parts]) for network in networks]
    last = nn.functional.one_hot(mask.sum(1) - 1, T).bool()
    return Rollout(tokens, attention, mask, last, (ends & mask).any(1), texts, judge(texts), *evaluated)

def describe(rollout: Rollout) -> dict[str, float]:
    """Means over responses, or over tokens (perplexity, entropy), without padding."""
    mask, batch_size = rollout.mask, len(rollout.mask)
    logprobs, ref_logprobs = rollout.logprobs[mask], rollout.ref_logprobs[mask]
    logratio = logprobs - ref_logprobs
    responses = [row[keep].tolist() for row, keep in zip(rollout.tokens[:, -mask.shape[1] :], mask)]
    pairs = [pair for response in responses for pair in itertools.pairwise(response)]
    return {
        "score": rollout.scores.mean().item(),
        "kl": logratio.sum().item() / batch_size,  # k1, of whole responses
        "kl_k3": ((-logratio).exp() - 1 + logratio).sum().item() / batch_size,  # never negative (Schulman, 2020)
        "reference_perplexity": (-ref_logprobs.mean()).exp().item(),
        "entropy": -logprobs.mean().item(),  # estimated by the tokens that were sampled
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),  # different pairs of neighbours, of all
        "response_length": mask.sum().item() / batch_size,
        "ended": rollout.ended.float().mean().item(),  # share of responses with an end of text
    }

def token_rewards(rollout: Rollout, scores: np.ndarray, kl_coef: float) -> np.ndarray:
    """Rewards (T, batch): minus the KL penalty of each token, plus the score on the response's last."""
    penalties = kl_coef * (rollout.logprobs - rollout.ref_logprobs)
    return rollout.last.T.numpy(force=True) * scores - penalties.T.numpy(force=True)

def with_targets(rollout: Rollout, tokenizer, targets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`tokens`, `attention` and `mask` of a rollout if the responses were targets, ended."""
    T, texts = rollout.mask.shape[1], [target + tokenizer.eos_token for target in targets]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    padded = (nn.functional.pad(batch[key], (0, T))[:, :T] for key in ("input_ids", "attention_mask"))
    target, mask = (x.to(rollout.mask.device) for x in padded)
    tokens, attention = rollout.tokens[:, :-T], rollout.attention[:, :-T]
    return torch.cat((tokens, target), 1), torch.cat((attention, mask), 1), mask.bool()

def losses_of(agent, tokens, attention, mask, old_logprob, advantage, returns, *target, args: Args):
    """The loss of some responses, means over their tokens without padding, and what is logged of it."""
    logprob, old_logprob = agent.logprobs(tokens, attention)[mask], old_logprob[mask]
    weighting = (args.alpha, args.beta, args.Z, args.clip_coef, args.importance_weighted_reverse)
    losses = symmetric_ppo_loss(logprob[:, None], old_logprob[:, None], advantage[mask], *weighting)
    value_loss = nn.functional.mse_loss(agent.values(tokens, attention)[mask], returns[mask])
    target_loss = -agent.logprobs(*target[:2])[target[2]].mean() if target else torch.zeros_like(value_loss)
    ratio = (logratio := logprob - old_logprob).exp()
    clipped = ((ratio - 1).abs() > args.clip_coef).float()
    logged = (*losses, value_loss, target_loss, -logratio.mean(), (ratio - 1 - logratio).mean(), clipped.mean())
    return losses[0] + args.vf_coef * value_loss + args.target_coef * target_loss, torch.stack(logged).detach()

def update(agent: LanguageAgent, optimizer, batch, args: Args, rng: np.random.Generator) -> dict[str, float]:
    """Steps on the loss of a batch: tokens, attention, mask, log π_old, advantages, returns, perhaps targets; means."""
    parameters, losses = optimizer.param_groups[0]["params"], []
    for _ in range(args.update_epochs):
        for rows in torch.from_numpy(rng.permutation(args.batch_size)).chunk(args.num_minibatches):
            tokens, attention, mask, old_logprob, advantage, *rest = (x[rows.to(x.device)] for x in batch)
            noisy = flip_signs(advantage[mask], args.advantage_noise, rng)
            normalized = normalize(noisy) if args.norm_adv else noisy
            minibatch = (tokens, attention, mask, old_logprob, advantage.masked_scatter(mask, normalized), *rest)
            logged = 0
            for part in zip(*(x.split(args.micro_batch_size) for x in minibatch)):
                share = part[2].sum() / mask.sum()  # of the minibatch's tokens: means of parts become its mean
                loss, of_part = losses_of(agent, *part, args=args)
                (share * loss).backward()
                logged = logged + share * of_part
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            flipped = (normalized.sign() != noisy.sign()).float().mean()
            losses.append(torch.cat((logged, torch.stack((norm, flipped)))))
    return dict(zip(TAGS, torch.stack(losses).mean(0).tolist()))

class Forgiving(contextlib.suppress, contextlib.ContextDecorator):
    """Makes a function ignore exceptions: output that cannot be written, be it `| head` or an ASCII γ, ends no run."""

def save(path: Path, **state) -> None:
    """Whatever happens meanwhile, `path` is a whole file: the old one or the new one."""
    try:
        with open(temporary := path.with_suffix(".tmp"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def read_flags() -> tuple[Args, dict]:
    """The flags and, to resume a run, its checkpoint, which cannot run code and whose flags hold unless typed anew."""
    only = make_dataclass("Only", [("preset", str | None, None)])  # first only this, on which the defaults depend
    preset = tyro.cli(only, return_unknown_args=True, add_help=False)[0].preset
    args = tyro.cli(Args, default=Args(**PRESETS.get(preset, {})))
    saved = torch.load(Path(args.resume, "checkpoint.pt"), map_location="cpu", weights_only=True) if args.resume else {}
    return tyro.cli(Args, default=Args(**saved["args"] | {"resume": args.resume})) if saved else args, saved

def main(args: Args, saved: dict | None = None) -> None:
    saved, batch_size = saved or {}, args.batch_size
    done, num_iterations = saved.get("iteration", 0), args.total_episodes // batch_size
    device = args.cuda and torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.set_num_threads(args.torch_threads or min(torch.get_num_threads(), 8))
    torch.manual_seed(args.seed)
    tokenizer, pairs, score_stats = load_tokenizer(args.tokenizer or args.model), read_prompts(args), RunningMeanStd()
    held_out, pairs = [prompt for prompt, _ in pairs[: args.eval_episodes]], pairs[args.eval_episodes :]
    agent = LanguageAgent(args, tokenizer).to(device)
    trained = {name: parameter for name, parameter in agent.named_parameters() if parameter.requires_grad}
    judge = Judge(args.reward_model, args.reward_label, device)
    gold = Judge(args.gold_model, args.reward_label, device) if args.gold_model else None
    optimizer = torch.optim.Adam(trained.values(), lr=args.learning_rate, eps=1e-5, fused=True)
    agent.load_state_dict(saved.get("agent", {}), strict=False)  # frozen weights are not saved, but read from --model
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved.get("optimizer", {})})  # its settings are flags
    vars(score_stats).update({key: x.numpy() for key, x in saved.get("stats", {}).items()})
    precision = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False)  # no stale weights
    name = f"{Path(args.model).name}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    (run := Path(args.resume or f"runs/{name}")).mkdir(parents=True, exist_ok=bool(args.resume))
    if args.track:
        import wandb
        wandb.init(id=run.name, resume="allow", config=asdict(args), sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(run, purge_step=done * batch_size + 1)  # drops what was logged after the checkpoint
    rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", done * batch_size + 1)
    stop, usual = [], {}  # the first signal ends the iteration and saves, a second acts as usual; 1: ignored (nohup)
    for number in [s for s in signal.Signals if s.name[3:] in "INT TERM HUP USR1".split() and signal.getsignal(s) != 1]:
        with contextlib.suppress(ValueError):  # not in the main thread
            usual[number] = signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, usual[n])))
    print(run, "on", device, {key: x for key, x in asdict(args).items() if saved and x != saved["args"][key]} or "")
    if args.top_k:
        print("warning: with --top-k the policy that samples is not the one of the probabilities; KL can be negative")
    progress = tqdm(range(done, num_iterations + 1), initial=done, total=num_iterations, unit=" steps",
                    unit_scale=batch_size, mininterval=0.1 if sys.stderr.isatty() else 30)  # fmt: skip
    for iteration in progress:
        step, last = iteration * batch_size, iteration == num_iterations
        evaluation_due = last or 0 < args.eval_interval <= step and step % args.eval_interval < batch_size
        checkpoint_due = 0 < args.checkpoint_interval <= step and step % args.checkpoint_interval < batch_size
        if saving := evaluation_due or checkpoint_due or bool(stop):
            writer.flush()  # a checkpoint's curves are on disk before it is
            save(run / "checkpoint.pt", args=asdict(args), iteration=iteration, agent=trained,
                 optimizer=optimizer.state_dict()["state"],
                 stats={key: torch.tensor(x) for key, x in vars(score_stats).items()})  # fmt: skip
        for part in (agent.policy, tokenizer) if last and not stop else ():
            part.save_pretrained(run / "model")
        if (evaluation_due or iteration == 0) and not stop:
            with precision:
                rollout = collect_responses(agent, tokenizer, judge, held_out, args, args.seed)
            measured = describe(rollout) | ({"gold_score": gold(rollout.texts).mean()} if gold else {})
            for tag, value in measured.items():  # at step + 1: a resumed run evaluates again and drops this
                writer.add_scalar(f"eval/{tag}", value, step + 1)
            writer.add_text("eval/samples", "\n\n".join(f"    {text!r}" for text in rollout.texts[:8]), step + 1)
            score = f"{measured.pop('score'):.3f} ± {rollout.scores.std():.3f} ({len(held_out)} responses)"
            tqdm.write(f"score at {step} steps: {score} " + " ".join(f"{tag} {x:.3f}" for tag, x in measured.items()))
        if last or saving and stop:
            break
        start_time = time.time()
        # Random streams follow from seed, iteration and a number: a resumed run draws the same.
        act_rng, minibatch_rng, noise_rng = (np.random.default_rng([args.seed, iteration, i]) for i in range(3))
        prompts, targets = zip(*(pairs[i] for i in act_rng.choice(len(pairs), batch_size, replace=False)))
        with precision:
            rollout = collect_responses(agent, tokenizer, judge, prompts, args, int(act_rng.integers(2**31)))
        for score in rollout.scores:
            score_stats.update(score)
        noisy_scores = add_noise(rollout.scores, float(args.reward_noise * score_stats.std), noise_rng)
        mask, values = rollout.mask, rollout.values.T.numpy(force=True)
        context = (values, rollout.last.T.numpy(force=True), np.zeros_like(values[0]), args.gamma, args.gae_lambda)
        rewards = [token_rewards(rollout, scores, args.kl_coef) for scores in (noisy_scores, rollout.scores)]
        advantages, clean_advantages = (torch.from_numpy(gae(x, *context).T).to(device) for x in rewards)
        returns = advantages + rollout.values
        batch = [rollout.tokens, rollout.attention, mask, rollout.logprobs, advantages, returns]
        if args.target_coef:
            batch.extend(with_targets(rollout, tokenizer, targets))
        with precision:
            stats = update(agent, optimizer, batch, args, minibatch_rng)
        stats |= {f"objective/{tag}": value for tag, value in describe(rollout).items()}
        share = 1 if args.importance_weighted_reverse else rollout.logprobs[mask].exp().mean().item()
        stats["losses/mean_weight"] = args.alpha + args.beta * abs(args.Z) * share  # mean factor on PPO's gradient
        stats["losses/explained_variance"] = 1 - (advantages[mask].var() / (returns[mask].var() + 1e-8)).item()
        flipped = advantages.sign() != clean_advantages.sign()
        stats["advantage/sign_flips_noise"] = flipped[mask].float().mean().item()
        stats["charts/SPS"] = batch_size / (time.time() - start_time)
        if not np.isfinite([*stats.values()]).all():
            raise FloatingPointError(f"not finite: {step=}, {rollout.scores.mean()=}, {stats}")
        for tag, value in stats.items():
            writer.add_scalar(tag, value, step + batch_size)
        progress.set_postfix_str(f"score {stats['objective/score']:.3f}", refresh=False)
    writer.close()
    for number, handler in usual.items():
        signal.signal(number, handler)
    if stop:
        print(f'stopped; to go on: python "{sys.argv[0]}" --resume "{run}"')
        sys.exit(128 + stop[0])

if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace", line_buffering=True)
        stream.write, stream.flush = (Forgiving(OSError, ValueError)(f) for f in (stream.write, stream.flush))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        args, saved = read_flags()
        validate(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{Path(__file__).name}: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    main(args, saved)

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "transformers==5.24.0", "peft==0.21.2", "tyro==1.0.17",
#   "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
