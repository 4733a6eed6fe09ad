"""Prints how language models continue the same prompts, with the same random numbers.

python benchmark/samples.py models/policy runs/<run>/model"""

import argparse

import torch
import transformers

PROMPTS = [
    "This movie is",
    "I watched it with my family and",
    "The acting was",
    "At the end of the film",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", help="folders or names that from_pretrained takes")
    folders = parser.parse_args().folders
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in folders:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        print(folder)
        for prompt in PROMPTS:
            torch.manual_seed(1)
            tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
            options = {
                "do_sample": True,
                "top_k": 0,
                "max_new_tokens": 24,
                "pad_token_id": tokenizer.eos_token_id,
            }
            print(
                "  ",
                repr(
                    tokenizer.decode(model.generate(tokens, **options)[0], skip_special_tokens=True)
                ),
            )


if __name__ == "__main__":
    main()
