"""Seconds per iteration and peak memory of sppo_rlhf.py beside trl's PPOTrainer, in turn, with the same small models.

    pip install trl==1.12.0
    python benchmark/language_speed.py --pairs 5

Both train all weights on 64 prompts per iteration, 24 tokens each, four minibatches, four epochs, one output as reward.
An iteration's time is that of a run of 12 iterations less that of a run of 2, over 10: loading is left out."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import transformers
import tyro
from before_after import ROOT, commit_of
from score import append

RESULTS = ROOT / "benchmark" / "results" / "language_speed.csv"
FIELDS = ["which", "pair", "seconds_per_iteration", "peak_memory_mb", "commit"]


@dataclass
class Args:
    """Speed beside trl."""

    models: Path = Path("models")  # folder made by tiny_language.py
    pairs: int = 5  # runs of each, in the other order every second time
    torch_threads: int = 1
    trl_iterations: int = 0  # for this script's own use: train so long with trl and end


def train_trl(models: Path, iterations: int) -> None:
    import csv

    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(models / "policy", padding_side="left")
    with open(models / "prompts.csv", newline="") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    tokens = tokenizer(prompts, truncation=True, max_length=64)["input_ids"]
    policy, reference = (AutoModelForCausalLM.from_pretrained(models / "policy") for _ in range(2))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(models / "scalar", num_labels=1) for _ in "vr")
    config = PPOConfig(
        output_dir="runs", per_device_train_batch_size=16, gradient_accumulation_steps=4, num_mini_batches=4,
        num_ppo_epochs=4, total_episodes=64 * iterations, response_length=24, temperature=1.0, kl_coef=0.02,
        learning_rate=1e-4, stop_token="eos", local_rollout_forward_batch_size=64, num_sample_generations=0,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
        logging_strategy="no")  # fmt: skip
    data = datasets.Dataset.from_dict({"input_ids": tokens})
    PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=data, eval_dataset=data.select(range(64)),
    ).train()  # fmt: skip


def measure(command: list, folder: str, threads: int) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a process."""
    start = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors.decode()[-2000:])
    return time.time() - start, usage.ru_maxrss / 1024


def main(args: Args) -> None:
    if args.trl_iterations:
        return train_trl(args.models, args.trl_iterations)
    speeds = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        for path in args.models.resolve().iterdir():
            Path(folder, path.name).symlink_to(path)
        scalar = transformers.AutoModelForSequenceClassification.from_pretrained(f"{folder}/policy", num_labels=1)
        scalar.save_pretrained(f"{folder}/scalar")
        transformers.AutoTokenizer.from_pretrained(f"{folder}/policy").save_pretrained(f"{folder}/scalar")
        ours = f"{ROOT}/sppo_rlhf.py --model policy --reward-model scalar --prompts prompts.csv --eval-episodes 64"
        ours += " --num-minibatches 4 --update-epochs 4 --response-length 24 --kl-coef 0.02 --learning-rate 1e-4"
        ours += f" --batch-size 64 --torch-threads {args.torch_threads} --checkpoint-interval 0 --total-episodes"
        trl = f"{Path(__file__).resolve()} --models . --trl-iterations"
        for pair in range(args.pairs):
            for which in ("ours", "trl") if pair % 2 == 0 else ("trl", "ours"):
                sizes = [[str(64 * n) for n in (2, 12)], ["2", "12"]][which == "trl"]
                commands = [[sys.executable, *(ours if which == "ours" else trl).split(), size] for size in sizes]
                (short, _), (long, memory) = (measure(command, folder, args.torch_threads) for command in commands)
                speeds[which].append((long - short) / 10)
                row = [which, pair + 1, f"{speeds[which][-1]:.3f}", f"{memory:.0f}", commit_of(ROOT, "sppo_rlhf.py")]
                append(RESULTS, FIELDS, [row])
                print(*row, flush=True)
    ratios = [trl / ours for ours, trl in zip(speeds["ours"], speeds["trl"])]
    print(f"{median(speeds['ours']):.2f} s and {median(speeds['trl']):.2f} s an iteration; "
          f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
