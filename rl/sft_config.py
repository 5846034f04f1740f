"""Configuration of supervised training (`python -m rl.sft SFT.yaml --out DIR`). No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rl.config import Strict


class PolicySource(Strict):
    """Random-grammar scripts: task description → script (`rl.envs.mle.grammar`)."""

    kind: Literal["policy"]
    share: float = Field(default=1.0, gt=0)
    """Share of the sequences of a batch (normalised over sources)."""
    token_weight: float = Field(default=1.0, gt=0)
    count: int = Field(default=100_000, ge=1)
    """Scripts generated ahead of time; they are repeated when the steps need more."""
    invented: float = Field(default=0.9, ge=0, le=1)
    """Share with invented descriptions; the rest uses the train competitions' facts."""


class DialogueSource(Strict):
    """JSONL of `{"messages": […], "tools": […]}`; the loss is on assistant turns only."""

    kind: Literal["dialogues"]
    path: str
    share: float = Field(default=1.0, gt=0)
    token_weight: float = Field(default=1.0, gt=0)


Source = Annotated[PolicySource | DialogueSource, Field(discriminator="kind")]


class SftOptimSection(Strict):
    lr: float = Field(default=2.0e-3, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    final_lr_frac: float = Field(default=0.02, ge=0, le=1)
    """Cosine from `lr` down to this share of it."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1.0e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)


class SftConfig(Strict):
    """One supervised run."""

    seed: int = Field(default=0, ge=0)
    init: str = "random"
    """`random`, or a checkpoint folder to start from (`nano` = the bundled one)."""
    preset: str = "nano"
    """Shape of a random start (`model.config.PRESETS`)."""
    tokenizer: str | None = None
    """Folder with tokenizer.json. Default: the checkpoint's, or trained on the data if random."""
    tokenizer_texts: int = Field(default=20_000, ge=10)
    suite: str = "offline-small-v0"
    competitions: tuple[str, ...] = ()
    """Train ids whose facts may be used; empty = all train ids. Held-out ids are refused."""
    scaffold: str | None = None
    data: tuple[Source, ...] = Field(min_length=1)
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=512, ge=1)
    micro_tokens: int = Field(default=98_304, ge=64)
    """Padded tokens of one backward pass."""
    max_length: int = Field(default=4096, ge=8)
    optim: SftOptimSection = SftOptimSection()
    balance_rate: float = Field(default=3.0e-3, ge=0)
    """Largest step of the sign update of the router's selection bias (it follows the learning
    rate's schedule); 0 = off."""
    time_limit_s: float | None = Field(default=None, gt=0)
    """The schedule ends here if the steps have not."""
    eval_examples: int = Field(default=1024, ge=1)
    eval_every: int = Field(default=250, ge=1)
    log_every: int = Field(default=20, ge=1)
    workers: int = Field(default=0, ge=0)
    """Processes that generate data; 0 = one a core."""
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    @model_validator(mode="after")
    def _lengths(self) -> SftConfig:
        if self.max_length > self.micro_tokens:
            raise ValueError(
                f"micro_tokens {self.micro_tokens} is below max_length {self.max_length}; "
                "raise micro_tokens or lower max_length"
            )
        return self
