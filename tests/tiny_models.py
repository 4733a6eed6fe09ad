"""Small language models of random weights, their tokenizer and prompts, made in a second."""

import copy
import csv
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SENTENCES = [
    "this film is good", "a bad story with a good end", "I have seen it twice", "the play was long and dull",
    "what a day", "nothing happens in it and nobody cares", "go and see", "they laughed all the time",
]  # fmt: skip


def make_tokenizer(pad: str = END) -> transformers.PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=list(dict.fromkeys((END, pad))))
    bpe.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=pad)


def save_models(folder: Path, kind: str = "gpt2", dropout: float = 0.1, pad: str = END) -> Path:
    """`policy`, `proxy` (two classes), `scalar` (one output) and `prompts.csv` in `folder`. Weights do not depend on
    dropout; responses of the policy often end after a few tokens, or at once."""
    tokenizer = make_tokenizer(pad)
    torch.manual_seed(0)
    end = {"bos_token_id": 0, "eos_token_id": 0}  # no padding token, as in many a checkpoint
    if kind == "gpt2":
        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        size = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
        config = transformers.GPT2Config(vocab_size=len(tokenizer), initializer_range=0.2, **size, **rates, **end)
    else:
        size = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        size |= {"max_position_embeddings": 64, "attention_dropout": dropout}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **size, **end)
    models = {"policy": transformers.AutoModelForCausalLM.from_config(config)}
    models["policy"].get_output_embeddings().weight.data[0] *= 3
    for name, labels in (("proxy", 2), ("scalar", 1)):
        (config := copy.deepcopy(config)).num_labels = labels
        models[name] = transformers.AutoModelForSequenceClassification.from_config(config)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with open(folder / "prompts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "target"), *((x, " and so on") for x in SENTENCES * 4)])
    return folder
