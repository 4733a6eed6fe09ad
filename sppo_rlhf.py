"""SPPO for language models: PPO with the symmetric loss of Byun and Perrault (ICML 2025,
arXiv 2405.17618), per token. The policy, a language model, continues prompts; a reward model scores
the texts. Each token of a response is an action, up to and including the first that ends it. With
its probability π, π_old when it was sampled, their ratio r = π / π_old, and its advantage A:

    forward = -min(r·A, clip(r, 1-ε, 1+ε)·A)    PPO's clipped objective
    reverse = -m · A · Z · (1 - π) / π_old      reverse cross-entropy; Z < 0 stands in for log 0,
                                                m is 1 where `forward` has a gradient, else 0
    loss = α · forward + β · reverse + vf_coef · value loss

α = 1, β = 0 is PPO. The gradient of `reverse` is |Z| times that of `forward`: α + β|Z|, β = 0
trains the same, but for rounding. Without the division by π_old, the plain form
(`--no-importance-weighted-reverse`), the two terms really differ. One iteration:

    1. sample responses to prompts, and score them                  collect_responses
    2. reward each token with -kl_coef · log(π_old / π_ref), the
       last also with the score; compute advantages A               token_advantages, gae
    3. for each epoch, for each minibatch: step down the loss       update, minibatch_loss

    python sppo_rlhf.py --reward-label 1 --gold-model models/gold    # after small_models/train.py
"""

import contextlib
import copy
import csv
import json
import os
import random
import runpy
import sys
import time
from collections import defaultdict, namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn as nn
import transformers
import tyro
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

MAY_BE_0 = """reward_label top_k seed lora_rank gamma gae_lambda vf_coef kl_coef alpha beta
    missing_end_penalty reward_noise advantage_noise eval_interval torch_threads""".split()
ROLLOUT = "tokens attention mask ended logprobs ref_logprobs values texts scores"
Rollout = namedtuple("Rollout", ROLLOUT)


@dataclass
class Args:
    """SPPO for language models. Defaults fit the small models that small_models/train.py makes."""

    # models and prompts
    model: str = "models/policy"  # the policy, a folder or a name on the Hugging Face hub
    reward_model: str = "models/proxy"  # a sequence classifier, with a tokenizer of its own
    reward_label: int | None = None  # the score is this class's probability; None: the only output
    reward: str | None = None  # file.py:function(texts, prompts, responses), instead of that model
    gold_model: str | None = None  # another classifier, which only judges, at evaluations
    prompts: str = "models/prompts.csv"  # a .csv, .jsonl or .json file
    prompt_column: str = "prompt"  # the column with the prompts: texts, or lists of chat messages
    prompt_length: int = 64  # tokens; of longer prompts the end is kept
    response_length: int = 24  # tokens at most
    temperature: float = 1.0  # divides the logits wherever probabilities are computed
    top_k: int = 0  # sample among the k likeliest tokens, not the policy: KL can be < 0; 0: all
    # PPO
    seed: int = 1  # seed of the value's head, prompts, samples, minibatches and noise
    total_episodes: int = 1920  # responses; the last incomplete batch is left out
    batch_size: int = 64  # responses per iteration
    num_minibatches: int = 4  # minibatches per epoch
    micro_batch_size: int = 64  # texts at once through any network: less memory, the same loss
    update_epochs: int = 2  # passes over each batch
    learning_rate: float = 2e-4  # step size of Adam
    lora_rank: int = 0  # rank of LoRA adapters; 0: all weights are trained
    lora_alpha: float = 16.0  # adapters are multiplied by this over their rank
    gamma: float = 1.0  # discount factor per token
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    clip_coef: float = 0.2  # clip range
    norm_adv: bool = True  # normalise the advantages of each minibatch
    vf_coef: float = 0.25  # weight of the value loss
    kl_coef: float = 0.02  # weight of the KL penalty
    missing_end_penalty: float = 0.0  # taken off the score of a response that does not end
    max_grad_norm: float = 1.0  # largest norm of the gradient, of policy and value together
    # the symmetric loss
    alpha: float = 0.5  # weight of the forward (PPO) term
    beta: float = 0.4  # weight of the reverse term
    Z: float = -1.0  # stands in for log 0, negative; only beta * Z matters
    importance_weighted_reverse: bool = True  # divide the reverse term by the old probability
    # noise that the learner sees; reported scores are clean
    reward_noise: float = 0.0  # std of Gaussian noise on scores, in units of the batch's std
    advantage_noise: float = 0.0  # probability that an advantage changes sign, in each minibatch
    # the run
    eval_interval: int = 0  # responses between evaluations; 0: before and after training
    eval_episodes: int = 128  # prompts held out for evaluations, the first ones of the file
    checkpoint_interval: int = 1280  # responses between checkpoints, and saved models
    resume: str | None = None  # go on with the run in this folder; typed flags replace its own
    cuda: bool = True  # use a GPU if there is one
    bf16: bool = False  # compute in bfloat16; with LoRA the frozen weights are kept in it, too
    torch_threads: int = 0  # CPU threads of torch; 0: one per core


def validate(args: Args) -> None:
    """Raises ValueError for flags that would quietly train something else."""
    for name, value in vars(args).items():
        may_be_0 = name in MAY_BE_0
        if type(value) in (int, float) and name != "Z":
            if not (value > 0 or may_be_0 and value == 0):
                raise ValueError(f"{name} must be positive{' or 0' * may_be_0}")
    minibatch_size = args.batch_size / args.num_minibatches
    too_small = minibatch_size < 1 + args.norm_adv or args.total_episodes < args.batch_size
    if minibatch_size % 1 or too_small:
        raise ValueError("batch_size must divide by num_minibatches and fit total_episodes")
    if not args.Z < 0 or max(args.gamma, args.gae_lambda, args.advantage_noise) > 1:
        raise ValueError("Z must be negative; gamma, gae_lambda, advantage_noise at most 1")


@contextlib.contextmanager
def refusing(source: str = ""):
    """What is wrong with flags, models or files is said in one line, with status 2."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{Path(__file__).name} {source}: {reason:.400}", file=sys.stderr)
        sys.exit(2)


def read_prompts(args: Args) -> list[str | list[dict]]:
    """Texts as they are written, or chat messages; rows with an empty one are left out."""
    csv.field_size_limit(2**31 - 1)
    with open(args.prompts, newline="", encoding="utf-8-sig") as file:  # -sig: no byte order mark
        if args.prompts.endswith(".csv"):
            rows = list(csv.DictReader(file))
        else:
            text = file.read()
            if not text.lstrip().startswith("["):  # a row in each line, not an array
                rows = [line.strip() or "null" for line in text.split("\n")]
                text = "[" + ",\n".join(rows) + "]"  # errors name the line
            rows = json.loads(text)
    prompts = [row.get(args.prompt_column) if isinstance(row, dict) else row for row in rows]
    prompts = [x for x in prompts if x is not None and str(x).strip() and x != []]
    for number, prompt in enumerate(prompts, 1):
        is_chat = isinstance(prompt, list) and all(isinstance(x, dict) for x in prompt)
        if not (is_chat if isinstance(prompts[0], list) else isinstance(prompt, str)):
            raise ValueError(f"prompt {number} is no text, or no list of messages as the others")
    if len(prompts) < args.eval_episodes + args.batch_size:
        found = f"{len(prompts)} prompts in the column {args.prompt_column}"
        raise ValueError(f"{found} are less than eval_episodes + batch_size")
    return prompts


def load(kind, name: str, dtype) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """A pretrained model without dropout, so that π is what was sampled, and its tokenizer. Raises
    ValueError where a head or other weights are missing: they would be random."""
    model, found = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    heads = [key for key in found["unexpected_keys"] if key.startswith(("score", "classifier"))]
    wrong = sorted(found["missing_keys"]) + heads
    if wrong:
        raise ValueError(f"{name} does not fit {kind.__name__}: look at its {wrong[0]}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left")
    size = max(tokenizer.get_vocab().values()) + 1
    known = model.get_input_embeddings().weight.shape[0]
    if size > known:
        raise ValueError(f"{name}: its tokenizer has {size} tokens, its embeddings have {known}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    embeddings = [module for path, module in model.named_modules() if "position" in path]
    padding = [x.padding_idx + 1 for x in embeddings if getattr(x, "padding_idx", None) is not None]
    positions -= max(padding, default=0)  # RoBERTa and its kind count from there
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return model.eval(), tokenizer


class Judge:
    """A sequence classifier that scores texts: the probability of a class, or its only output."""

    def __init__(self, name: str, args: Args, device: torch.device):
        kind = transformers.AutoModelForSequenceClassification
        self.model, self.tokenizer = load(kind, name, "auto")
        self.device = self.model.to(device).device
        self.tokenizer.padding_side = "right"  # on the left GPT-2's positions shift
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.label = args.reward_label
        self.batch_size = args.micro_batch_size
        classes = self.model.config.id2label
        if len(classes) > 1 and self.label not in classes:
            raise ValueError(f"{name} has the classes {classes}: choose one by --reward-label")
        print(f"{name}: class {self.label} of {classes!a}" if len(classes) > 1 else name)

    @torch.no_grad()
    def __call__(self, texts: list[str], *_) -> torch.Tensor:
        scores = []
        for first in range(0, len(texts), self.batch_size):
            part = texts[first : first + self.batch_size]
            batch = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            logits = self.model(**batch.to(self.device)).logits.float()
            scores.append(logits if logits.shape[1] == 1 else logits.softmax(1)[:, [self.label]])
        return torch.cat(scores).squeeze(1)


class LanguageAgent(nn.Module):
    """Policy, value, and reference, the policy before training. `tokens` and `attention`, 0 for
    padding, are (batch, P + T): prompts, padded on the left, then responses."""

    def __init__(self, args: Args):
        super().__init__()
        dtype = torch.bfloat16 if args.bf16 and args.lora_rank else torch.float32
        self.policy, self.tokenizer = load(transformers.AutoModelForCausalLM, args.model, dtype)
        self.value = copy.deepcopy(self.policy.base_model)  # the policy without its head
        length = self.tokenizer.model_max_length
        if args.prompt_length + args.response_length > length:
            raise ValueError(f"prompt_length and response_length: {args.model} has {length} tokens")
        self.tokenizer.model_max_length = args.prompt_length
        self.tokenizer.padding_side = "left"
        self.temperature = args.temperature
        self.precision = {"dtype": torch.bfloat16, "enabled": args.bf16, "cache_enabled": False}

        tokens = torch.tensor([[0, 1, 2], [0, 0, 1]])  # 0 1, then a token, or after padding
        attention = torch.tensor([[1, 1, 1], [0, 1, 1]])
        hidden = self.run(self.value, tokens, attention)[0].detach().float()
        if not torch.allclose(hidden[0, :2], hidden[1, 1:], rtol=1e-3, atol=1e-3):
            raise ValueError(f"{args.model} reads ahead or counts padding: it cannot be trained")
        self.value_head = nn.Linear(hidden.shape[-1], 1)

        self.loaded_settings = self.policy.generation_config
        ends = self.loaded_settings.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id}
        self.ends = sorted(ends - {None})
        self.appends_end = self.tokenizer("a")["input_ids"][-1] in self.ends
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
        stopping = {"max_new_tokens": args.response_length, "eos_token_id": self.ends or None}
        stopping |= {"pad_token_id": self.tokenizer.pad_token_id}
        self.policy.generation_config = transformers.GenerationConfig(**sampling, **stopping)

        self.reference = None
        if not args.lora_rank:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        else:  # two models: of two adapters on one, peft trains only the active one
            lora = {"r": args.lora_rank, "lora_alpha": args.lora_alpha}
            lora["target_modules"] = LORA_TARGETS.get(self.policy.config.model_type, "all-linear")
            self.policy = peft.get_peft_model(self.policy, peft.LoraConfig(**lora))
            self.value = peft.get_peft_model(self.value, peft.LoraConfig(**lora))
        self.eval()

    def run(self, network, tokens, attention, **options):
        """Positions count from the first token that is no padding; GPT-2 would count padding."""
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": tokens, "attention_mask": attention, "position_ids": positions}
        with torch.autocast(tokens.device.type, **self.precision):
            return network(**inputs, use_cache=False, **options)

    def logprobs(self, tokens, attention, T: int, network=None) -> torch.Tensor:
        """Log-probabilities (batch, T) of the responses' tokens."""
        output = self.run(network or self.policy, tokens, attention, logits_to_keep=T + 1)
        logits = output.logits[:, :-1].float() / self.temperature
        return logits.gather(2, tokens[:, -T:, None]).squeeze(2) - logits.logsumexp(2)

    def reference_logprobs(self, tokens, attention, T: int) -> torch.Tensor:
        with contextlib.nullcontext() if self.reference else self.policy.disable_adapter():
            return self.logprobs(tokens, attention, T, self.reference)

    def values(self, tokens, attention, T: int) -> torch.Tensor:
        """Values (batch, T) of the texts before each of the responses' tokens."""
        hidden = self.run(self.value, tokens, attention).last_hidden_state[:, -T - 1 : -1]
        return self.value_head(hidden.float()).squeeze(2)

    def state_dict(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {name: x for name, x in self.named_parameters() if x.requires_grad}


def symmetric_ppo_loss(logprob, old_logprob, advantage, clip_coef, args: Args):
    """α · forward + β · reverse, and the two terms, of inputs (batch,). As in the paper's
    released code. Without 1/π_old, which is our variant, it weighs samples as SA2C does."""
    ratio = (logprob - old_logprob).exp()
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage
    forward_loss = -torch.min(unclipped, clipped).mean()

    mask = unclipped <= clipped  # m: `min` takes r·A; inside the clip range both are equal
    weight = 1 - logprob.exp()
    if args.importance_weighted_reverse:
        weight = weight / old_logprob.exp()
    reverse_loss = -(mask * advantage * args.Z * weight).mean()
    return args.alpha * forward_loss + args.beta * reverse_loss, forward_loss, reverse_loss


def gae(rewards, values, next_values, dones, gamma: float, gae_lambda: float):
    """Generalised advantage estimation (Schulman et al., 2016): A_t = δ_t + γλ A_{t+1} with
    δ_t = r_t + γ V'_t - V_t. V'_t is the value of what follows step t: 0 if that was terminal.
    No A_{t+1} crosses the end of an episode (`dones`). All: (num_steps, …)."""
    advantages = rewards + gamma * next_values - values  # δ_t, to which the loop adds γλ A_{t+1}
    for t in reversed(range(len(advantages) - 1)):  # the last one is its δ already
        advantages[t] += gamma * gae_lambda * ~dones[t] * advantages[t + 1]
    return advantages


def normalize(advantage: torch.Tensor) -> torch.Tensor:
    """Advantages (batch,) with mean 0 and deviation 1. Subtracting the mean turns some signs."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


def flip_signs(advantage: torch.Tensor, probability: float) -> torch.Tensor:
    """Each advantage changes its sign with `probability` (`adv_flip` in the released code)."""
    return torch.where(torch.rand_like(advantage) < probability, -advantage, advantage)


def encode_prompts(tokenizer, prompts, appended: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention (batch, P), padded on the left; of long prompts the end is kept."""
    is_chat = isinstance(prompts[0], list)
    if is_chat:
        options = {"tokenize": False, "add_generation_prompt": True}
        prompts = [tokenizer.apply_chat_template(prompt, **options) for prompt in prompts]
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    batch = tokenizer(prompts, add_special_tokens=not is_chat, **options)
    length = batch["input_ids"].shape[1] - (0 if is_chat else appended)
    return batch["input_ids"][:, :length], batch["attention_mask"][:, :length]


@torch.no_grad()
def collect_responses(agent: LanguageAgent, reward, prompts, args: Args) -> Rollout:
    """Samples responses of at most T tokens. Of shape (batch,): `ended`, `scores`; (batch, P + T):
    `tokens`, `attention`; (batch, T): the rest, with `mask` true until after the first end."""
    T = args.response_length
    device = agent.value_head.weight.device
    all_ends = torch.tensor(agent.ends, dtype=torch.long, device=device)
    encoded = encode_prompts(agent.tokenizer, prompts, agent.appends_end)
    parts = []
    for prompt, prompt_mask in zip(*(x.to(device).split(args.micro_batch_size) for x in encoded)):
        with torch.autocast(device.type, **agent.precision):
            tokens = agent.policy.generate(input_ids=prompt, attention_mask=prompt_mask)
        tokens = nn.functional.pad(tokens, (0, prompt.shape[1] + T - tokens.shape[1]))
        ends = torch.isin(tokens[:, -T:], all_ends)
        mask = ends.cumsum(1) - ends.long() == 0  # no end before this token
        attention = torch.cat((prompt_mask, mask.long()), 1)
        networks = (agent.logprobs, agent.reference_logprobs, agent.values)
        computed = [network(tokens, attention, T) for network in networks]
        parts.append((tokens, attention, mask, (ends & mask).any(1), *computed))
    tokens, attention, mask, *rest = (torch.cat(x) for x in zip(*parts))

    whole = [row[keep] for row, keep in zip(tokens, attention.bool())]
    response = [row[keep] for row, keep in zip(tokens[:, -T:], mask)]
    decode = agent.tokenizer.batch_decode
    texts, responses = (decode(x, skip_special_tokens=True) for x in (whole, response))
    scores = torch.as_tensor(reward(texts, prompts, responses), dtype=torch.float32, device=device)
    if scores.shape != (len(texts),) or not scores.isfinite().all():
        raise ValueError(f"the reward is not one finite number for each of {len(texts)} texts")
    return Rollout(tokens, attention, mask, *rest, texts, scores)


def describe(rollout: Rollout) -> dict[str, float]:
    """Means over responses, or over tokens (perplexity, entropy), without padding."""
    mask = rollout.mask
    batch_size, T = mask.shape
    ref_logprobs = rollout.ref_logprobs[mask]
    logratio = rollout.logprobs[mask] - ref_logprobs
    responses = [row[keep].tolist() for row, keep in zip(rollout.tokens[:, -T:], mask)]
    pairs = [pair for response in responses for pair in zip(response, response[1:])]
    return {
        "score": rollout.scores.mean().item(),
        "kl": logratio.sum().item() / batch_size,  # k1, of whole responses
        "reference_perplexity": (-ref_logprobs.mean()).exp().item(),
        "entropy": -rollout.logprobs[mask].mean().item(),  # by the tokens that were sampled
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),  # different neighbours, of all
        "response_length": mask.sum().item() / batch_size,
        "ended": rollout.ended.float().mean().item(),  # share of responses that end
    }


def token_advantages(rollout: Rollout, scores: torch.Tensor, args: Args) -> torch.Tensor:
    """Advantages (batch, T), where the last token of a response has its score (batch,)."""
    values = rollout.values
    last = nn.functional.one_hot(rollout.mask.sum(1) - 1, values.shape[1]).bool()
    next_values = nn.functional.pad(values[:, 1:], (0, 1)) * ~last
    kl = rollout.logprobs - rollout.ref_logprobs
    rewards = last * scores[:, None] - args.kl_coef * kl
    context = (values.T, next_values.T, last.T, args.gamma, args.gae_lambda)
    return gae(rewards.T, *context).T


def minibatch_loss(agent: LanguageAgent, part: tuple, args: Args) -> tuple[torch.Tensor, dict]:
    """The loss of some responses, a mean over their tokens, and what is logged of it."""
    tokens, attention, mask, *rest = part
    old_logprob, advantage, returns = (x[mask] for x in rest)
    used = attention.any(0)  # columns that are not padding in all rows
    mask = mask[:, mask.any(0)]
    inputs = (tokens[:, used], attention[:, used], mask.shape[1])
    logprob = agent.logprobs(*inputs)[mask]
    value = agent.values(*inputs)[mask]
    loss_terms = symmetric_ppo_loss(logprob, old_logprob, advantage, args.clip_coef, args)
    policy_loss, forward_loss, reverse_loss = loss_terms
    value_loss = nn.functional.mse_loss(value, returns)

    logratio = (logprob - old_logprob).detach()
    ratio = logratio.exp()
    return policy_loss + args.vf_coef * value_loss, {
        "losses/policy_loss": policy_loss,
        "losses/forward_loss": forward_loss,
        "losses/reverse_loss": reverse_loss,
        "losses/value_loss": value_loss,
        "losses/approx_kl": (ratio - 1 - logratio).mean(),
        "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }


def update(agent: LanguageAgent, optimizer, batch: tuple, args: Args) -> dict[str, float]:
    """Learns from (tokens, attention, mask, log π_old, A, returns). Returns means to be logged."""
    logs = defaultdict(float)
    lengths = batch[1].sum(1).cpu()
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(lengths)).chunk(args.num_minibatches):
            rows = rows[lengths[rows].argsort()]  # parts of like length have little padding
            tokens, attention, mask, old_logprob, noisy, returns = (x[rows] for x in batch)
            noisy_advantage = flip_signs(noisy[mask], args.advantage_noise)
            advantage = normalize(noisy_advantage) if args.norm_adv else noisy_advantage
            per_token = (old_logprob, noisy.masked_scatter(mask, advantage), returns)
            minibatch = (tokens, attention, mask, *per_token)

            optimizer.zero_grad()
            for part in zip(*(x.split(args.micro_batch_size) for x in minibatch)):
                loss, logged = minibatch_loss(agent, part, args)
                share = part[2].sum() / mask.sum()  # means of parts become the minibatch's mean
                (share * loss).backward()
                for tag, value in logged.items():
                    logs[tag] += share * value.detach()
            grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()

            flipped = advantage.sign() != noisy_advantage.sign()
            logs["advantage/sign_flips_normalization"] += flipped.float().mean()
            logs["losses/grad_norm"] += grad_norm
    steps = args.update_epochs * args.num_minibatches
    return {tag: value.item() / steps for tag, value in logs.items()}


def set_seeds(*names) -> None:
    """Seeds all generators from these names, so none is saved and evaluating disturbs nothing."""
    random.seed(" ".join(map(str, names)))
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(63))


def save_checkpoint(path: Path, args: Args, step: int, parts: dict) -> None:
    """Whenever the run is killed, `path` is a whole file: the old one or the new one."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"args": asdict(args), "step": step}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def save_model(folder: Path, agent: LanguageAgent, args: Args) -> None:
    """The policy as the model that it was: no adapters, its own generation settings, tokenizer."""
    model = copy.deepcopy(agent.policy).merge_and_unload() if args.lora_rank else agent.policy
    sampling = model.generation_config
    model.generation_config = agent.loaded_settings
    model.save_pretrained(folder)
    model.generation_config = sampling
    transformers.AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)


def read_flags() -> tuple[Args, dict | None]:
    """The flags; with --resume also the checkpoint, whose flags replace those not typed."""
    args = tyro.cli(Args)
    checkpoint = None
    with refusing(args.resume or ""):
        if args.resume:
            path = Path(args.resume, "checkpoint.pt")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            args = tyro.cli(Args, default=Args(**checkpoint["args"] | {"resume": args.resume}))
        validate(args)
    return args, checkpoint


def start_logging(args: Args, first_step: int) -> tuple[Path, SummaryWriter]:
    """The run's folder, and TensorBoard's writer in it."""
    name = f"{Path(args.model).name}__{Path(__file__).stem}__{args.seed}"
    run = Path(args.resume or f"runs/{name}__{int(time.time() * 1000)}_{os.getpid()}")
    run.mkdir(parents=True, exist_ok=bool(args.resume))
    writer = SummaryWriter(run, purge_step=first_step)  # hides points from there on
    rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}", first_step)
    print(run)
    return run, writer


def evaluate(agent, reward, gold, prompts, args: Args, writer: SummaryWriter, step: int) -> None:
    """Logs at step + 1: a resumed run evaluates again, with the same seed, and drops this."""
    set_seeds(args.seed, "evaluation")
    rollout = collect_responses(agent, reward, prompts, args)
    measured = describe(rollout)
    if gold:
        measured["gold_score"] = gold(rollout.texts).mean().item()
    for tag, value in measured.items():
        writer.add_scalar(f"eval/{tag}", value, step + 1)
    samples = "\n".join(f"    {text!a}" for text in rollout.texts[:4])
    writer.add_text("eval/samples", samples, step + 1)
    score = f"{measured.pop('score'):.3f} +- {rollout.scores.std(correction=0):.3f}"
    others = " ".join(f"{tag} {value:.3f}" for tag, value in measured.items())
    tqdm.write(f"{samples}\nscore at {step} steps: {score} {others}")


def main(args: Args, checkpoint: dict | None = None) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    batch_size = args.batch_size
    num_iterations = args.total_episodes // batch_size
    done = checkpoint["step"] // batch_size if checkpoint else 0

    set_seeds(args.seed, "start")
    with refusing(args.prompts):
        prompts = read_prompts(args)
    with refusing(args.model):
        agent = LanguageAgent(args).to(device)
        encode_prompts(agent.tokenizer, prompts[:100], 0)
    with refusing(args.reward or args.reward_model):
        path, _, name = (args.reward or "").rpartition(":")
        reward = runpy.run_path(path)[name] if path else Judge(args.reward_model, args, device)
    with refusing(args.gold_model or ""):
        gold = Judge(args.gold_model, args, device) if args.gold_model else None
    with refusing(args.resume or ""):
        trained = agent.state_dict()
        optimizer = torch.optim.Adam(trained.values(), args.learning_rate, eps=1e-5, fused=True)
        if checkpoint:
            if trained.keys() != checkpoint["agent"].keys():
                raise ValueError(f"{args.resume} has trained other weights than these flags do")
            agent.load_state_dict(checkpoint["agent"], strict=False)  # the frozen ones are there
            optimizer.load_state_dict(checkpoint["optimizer"])
            optimizer.param_groups[0]["lr"] = args.learning_rate
    run, writer = start_logging(args, first_step=done * batch_size + 1)

    for iteration in tqdm(range(done, num_iterations + 1), unit=" steps", unit_scale=batch_size):
        step = iteration * batch_size
        last = iteration == num_iterations
        evaluating = last or (args.eval_interval > 0 and step % args.eval_interval < batch_size)
        if evaluating or step % args.checkpoint_interval < batch_size:
            writer.flush()
            parts = {"agent": agent, "optimizer": optimizer}
            save_checkpoint(run / "checkpoint.pt", args, step, parts)
            save_model(run / "model", agent, args)
        if evaluating or iteration == 0:
            evaluate(agent, reward, gold, prompts[: args.eval_episodes], args, writer, step)
        if last:
            break

        set_seeds(args.seed, "iteration", iteration)
        sample = random.sample(prompts[args.eval_episodes :], batch_size)
        rollout = collect_responses(agent, reward, sample, args)
        std = args.reward_noise * rollout.scores.std(correction=0)
        scores = rollout.scores + std * torch.randn_like(rollout.scores)
        scores = scores - args.missing_end_penalty * ~rollout.ended
        advantages = token_advantages(rollout, scores, args)
        returns = advantages + rollout.values

        batch = (*rollout[:3], rollout.logprobs, advantages, returns)
        stats = update(agent, optimizer, batch, args)

        stats |= {f"objective/{tag}": value for tag, value in describe(rollout).items()}
        mean = rollout.logprobs[rollout.mask].exp().mean().item()
        mean_weight = abs(args.Z) * (1 if args.importance_weighted_reverse else mean)
        stats["losses/mean_weight"] = args.alpha + args.beta * mean_weight
        if not np.isfinite(list(stats.values())).all():
            raise FloatingPointError(f"not finite at step {step}: {stats}")
        for tag, value in stats.items():
            writer.add_scalar(tag, value, step + batch_size)
    writer.close()


if __name__ == "__main__":
    main(*read_flags())

# What `uv run sppo_rlhf.py` installs:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "transformers==5.24.0", "peft==0.21.2",
#   "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1"]
# ///
