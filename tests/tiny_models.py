"""Small language models of random weights, their tokenizer and prompts, made in a second."""

import csv
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SENTENCES = [
    "this film is good",
    "a bad story with a good end",
    "I have seen it twice",
    "the play was long and dull",
    "what a day",
    "nothing happens in it and nobody cares",
    "go and see",
    "they laughed all the time",
]
SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
OTHER_SIZES = {  # of kinds that have other names for them, or more of them
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "gptj": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "rotary_dim": 8},
    "gpt_neo": SIZE | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "opt": SIZE | {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": SIZE | {"new_decoder_architecture": False, "multi_query": True},
    "gemma2": SIZE | {"head_dim": 16, "num_key_value_heads": 1},
    "qwen3": SIZE | {"head_dim": 16, "num_key_value_heads": 1},
    "mixtral": SIZE | {"num_local_experts": 2},
    "gpt_oss": SIZE | {"num_local_experts": 4, "head_dim": 16},
    "gemma3": {
        "text_config": SIZE | {"head_dim": 16, "num_key_value_heads": 1, "vocab_size": 60},
        "vision_config": SIZE | {"image_size": 8, "patch_size": 4},
        "image_token_index": 59,
    },
    "distilbert": SIZE | {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "electra": SIZE | {"embedding_size": 32},
    "roberta": SIZE | {"pad_token_id": 1},
    "xlm-roberta": SIZE | {"pad_token_id": 1},
    "deberta-v2": SIZE | {"pooler_hidden_size": 32},
    "albert": SIZE | {"embedding_size": 16},
    "bart": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
}


def make_tokenizer(pad: str = END) -> transformers.PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=list(dict.fromkeys((END, pad))))
    bpe.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=pad)


def make_model(auto_class, kind: str, **options):
    """A model of this kind with large random weights; without a padding token, as in many a
    checkpoint."""
    torch.manual_seed(0)
    size = OTHER_SIZES.get(kind, SIZE)
    end = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "initializer_range": 0.2}
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": 60} | end | size | options)
    return auto_class.from_config(config)


def save(model, folder: Path, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def save_models(folder: Path, kind: str = "gpt2", dropout: float = 0.1, pad: str = END) -> Path:
    """`policy`, `proxy` (two classes), `scalar` (one output) and `prompts.csv` in `folder`. Weights
    do not depend on dropout; responses of the policy often end after a few tokens, or at once."""
    tokenizer = make_tokenizer(pad)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    rates = rates if kind == "gpt2" else {"attention_dropout": dropout}
    rates["vocab_size"] = len(tokenizer)
    policy = make_model(transformers.AutoModelForCausalLM, kind, **rates)
    policy.get_output_embeddings().weight.data[0] *= 3
    save(policy, folder / "policy", tokenizer)
    for name, labels in (("proxy", 2), ("scalar", 1)):
        auto_class = transformers.AutoModelForSequenceClassification
        model = make_model(auto_class, kind, num_labels=labels, **rates)
        save(model, folder / name, tokenizer)
    with open(folder / "prompts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *([x] for x in SENTENCES * 4)])
    return folder
