"""Make the TRL runs that `selfevo attach` is tested on: a healthy one and four faulty ones.

    python -m venv TRL && TRL/bin/pip install 'torch==2.13.0' trl wandb==0.31.0
    TRL/bin/python scripts/make_trl_fixtures.py tests/agent_tools/trl_runs

Each is a real `GRPOTrainer` run on the CPU: a random model of 30 thousand parameters over 16 words,
rewarded for the share of one word, W&B offline. Only the `.wandb` files are kept, compressed; they
hold no name or path of the machine. About a minute on two cores.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORDS = ("<pad>", "<eos>", "<unk>", *"abcdefghijklm")
STEPS = 16
QUIET = {
    "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_PROJECT": "trl",
    "WANDB_HOST": "localhost", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true",
    "WANDB_X_DISABLE_STATS": "true", "WANDB_X_DISABLE_META": "true",
    "WANDB_X_DISABLE_MACHINE_INFO": "true", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
#: Name of a run: what differs from the healthy settings.
RUNS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "lr_high": {"learning_rate": 1.0},
    "truncated": {"max_completion_length": 4},
    "hot": {"learning_rate": 0.03, "warmup_steps": 0},
    "no_signal": {"reward": "constant"},
}


def main() -> int:
    """Make the runs (all, or those named) and write each one's file as OUT/run-<name>.wandb.gz."""
    if sys.argv[1] == "--one":
        train(sys.argv[2], dict(RUNS[sys.argv[2]]))
        return 0
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or RUNS:
        with tempfile.TemporaryDirectory(prefix="trl-run-") as folder:
            env = {**os.environ, **QUIET, "WANDB_RUN_ID": name, "WANDB_DIR": folder}
            # a process a run: wandb keeps the first folder that it was given
            command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
            subprocess.run(command, cwd=folder, env=env, check=True, timeout=600)
            made = next(Path(folder).glob("wandb/offline-run-*/run-*.wandb"))
            (out / f"run-{name}.wandb.gz").write_bytes(gzip.compress(made.read_bytes(), mtime=0))
    return 0


def train(name: str, changes: dict[str, Any]) -> None:
    """One run of `STEPS` steps."""
    import torch
    import wandb
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    set_seed(0)
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    constant = changes.pop("reward", "") == "constant"

    def reward(completions: list[str], **_: Any) -> list[float]:
        if constant:
            return [0.0 for _ in completions]
        return [text.count("a") / max(1, len(text.split())) for text in completions]

    settings: dict[str, Any] = {
        "learning_rate": 3e-3, "warmup_steps": 2, "max_completion_length": 64, "temperature": 1.0,
        "num_generations": 8, "per_device_train_batch_size": 32, "max_steps": STEPS,
        "logging_steps": 1, "lr_scheduler_type": "constant_with_warmup", "beta": 0.0,
    }  # fmt: skip
    args = GRPOConfig(
        output_dir="out", run_name=name, report_to="wandb", save_strategy="no", use_cpu=True,
        bf16=False, disable_tqdm=True, seed=0, gradient_checkpointing=False,
        **{**settings, **changes},
    )  # fmt: skip
    rows = [{"prompt": f"{x} {y}"} for x in "abcdefghijklm" for y in "abcdefghijklm"]
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    wandb.finish()


if __name__ == "__main__":
    sys.exit(main())
