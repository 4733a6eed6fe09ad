"""Seconds per iteration and peak memory of sppo_rlhf.py beside trl's PPOTrainer, in turn, with the
same small models, on the short prompts that they come with and on long ones.

    pip install trl==1.12.0
    python benchmark/language_speed.py --pairs 5

Both train all weights on 64 prompts per iteration, responses of 24 tokens, four minibatches, four
epochs, one output as reward. Long prompts are 8 to 100 tokens, of all lengths alike. An iteration's
time is that of a run of 12 iterations less that of a run of 2, over 10: loading is left out."""

import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import transformers
import tyro
from score import ROOT, append, commit_of, read

RESULTS = ROOT / "benchmark" / "results" / "language_speed_prompts.csv"
FIELDS = ["prompts", "which", "pair", "seconds_per_iteration", "peak_memory_mb", "commit"]
FLAGS = """--model policy --reward-model scalar --prompts prompts.csv --eval-episodes 64
    --batch-size 64 --num-minibatches 4 --update-epochs 4 --prompt-length 100 --response-length 24
    --kl-coef 0.02 --learning-rate 1e-4 --checkpoint-interval 6400"""


@dataclass
class Args:
    """Speed beside trl."""

    models: Path = Path("models")  # folder made by small_models/train.py --large
    pairs: int = 5  # runs of each, in the other order every second time
    torch_threads: int = 1
    trl_iterations: int = 0  # for this script's own use: train so long with trl and end


def train_trl(models: Path, iterations: int) -> None:
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(models / "policy", padding_side="left")
    prompts = [row["prompt"] for row in read(models / "prompts.csv")]
    tokens = tokenizer(prompts, truncation=True, max_length=100)["input_ids"]
    data = datasets.Dataset.from_dict({"input_ids": tokens})
    classifier = AutoModelForSequenceClassification
    config = PPOConfig(
        output_dir="runs",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
        num_mini_batches=4,
        num_ppo_epochs=4,
        total_episodes=64 * iterations,
        response_length=24,
        temperature=1.0,
        kl_coef=0.02,
        learning_rate=1e-4,
        stop_token="eos",
        local_rollout_forward_batch_size=64,
        num_sample_generations=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
    )
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(models / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(models / "policy"),
        reward_model=classifier.from_pretrained(models / "scalar", num_labels=1),
        value_model=classifier.from_pretrained(models / "scalar", num_labels=1),
        train_dataset=data,
        eval_dataset=data.select(range(64)),
    ).train()


def prepare(folder: Path, models: Path, long: bool) -> None:
    """Models and prompts; long ones are short ones in a row, one to eight of them."""
    for name in ("policy", "scalar"):
        shutil.copytree(models / "policy", folder / name)
    kind = transformers.AutoModelForSequenceClassification
    kind.from_pretrained(models / "policy", num_labels=1).save_pretrained(folder / "scalar")
    prompts = [row["prompt"] for row in read(models / "prompts.csv")]
    if long:
        prompts = [" ".join(prompts[i : i + 1 + i % 8]) for i in range(len(prompts) - 8)]
    with open(folder / "prompts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt"], *([prompt] for prompt in prompts)])


def measure(command: list, folder: Path, threads: int) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a process."""
    start = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors.decode()[-2000:])
    return time.time() - start, usage.ru_maxrss / 1024


def iteration(which: str, folder: Path, threads: int) -> tuple[float, float]:
    """Seconds of one, and the peak memory of a longer run."""
    if which == "ours":
        command = [sys.executable, ROOT / "sppo_rlhf.py", *FLAGS.split(), "--no-cuda"]
        command += ["--torch-threads", str(threads), "--total-episodes"]
    else:
        command = [sys.executable, Path(__file__).resolve(), "--models", ".", "--trl-iterations"]
    unit = 64 if which == "ours" else 1
    short, _ = measure([*command, str(2 * unit)], folder, threads)
    long, memory = measure([*command, str(12 * unit)], folder, threads)
    return (long - short) / 10, memory


def main(args: Args) -> None:
    if args.trl_iterations:
        return train_trl(args.models, args.trl_iterations)
    for prompts in ("short", "long"):
        seconds = {"ours": [], "trl": []}
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), args.models, prompts == "long")
            for pair in range(args.pairs):
                for which in ("ours", "trl") if pair % 2 == 0 else ("trl", "ours"):
                    time_taken, memory = iteration(which, Path(folder), args.torch_threads)
                    seconds[which].append(time_taken)
                    row = [prompts, which, pair + 1, f"{time_taken:.3f}", f"{memory:.0f}"]
                    append(RESULTS, FIELDS, [[*row, commit_of("sppo_rlhf.py")]])
                    print(*row, flush=True)
        ratios = [trl / ours for ours, trl in zip(seconds["ours"], seconds["trl"])]
        ours, trl = (median(x) for x in seconds.values())
        print(f"{prompts} prompts: {ours:.2f} s an iteration, trl's {trl:.2f} s")
        print(f"{median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(tyro.cli(Args))
