"""What the study compares: sizes, variants, and which variants belong to which question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from model.config import FULL, WINDOW, ModelConfig
from model.errors import ModelError


@dataclass(frozen=True)
class Size:
    """Everything that all variants of one study share.

    `rows` of `context` tokens make a step, of which `probe_rows` are retrieval tasks and the rest
    text; `window` is that of window layers. In the first `short_share` of the steps each row is cut
    into `short_parts` rows of their own, because looking back is learnt sooner in short texts.
    `eval_rows` and `eval_probe_rows` (a task) are measured. `rate` is AdamW's peak, after a warm-up
    over `warmup` of the steps and before a linear decay to a twentieth over the last `decay`.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    width: int
    context: int
    window: int
    rows: int
    probe_rows: int
    steps: int
    eval_rows: int
    eval_probe_rows: int
    rate: float = 2e-3
    warmup: float = 0.05
    decay: float = 0.3
    probe_weight: float = 1.0
    short_share: float = 0.4
    short_parts: int = 8
    vocabulary: int = 2048

    def __post_init__(self) -> None:
        if self.context < 16 * self.window:
            raise ModelError(
                f"size {self.name}: context {self.context} is less than 16 windows of "
                f"{self.window}; the longest distance would not fit"
            )
        if not 0 < self.probe_rows < self.rows:
            raise ModelError(f"size {self.name}: a step needs rows of text and rows of probes")
        if self.context % self.short_parts or self.window < 4 * self.short_parts:
            raise ModelError(
                f"size {self.name}: {self.short_parts} parts of a row of {self.context} are too "
                f"many for the window of {self.window}; four tokens of it must be left"
            )

    @property
    def short_steps(self) -> int:
        """Steps with short rows; the same for variants that take more steps."""
        return round(self.short_share * self.steps)

    @property
    def short(self) -> Size:
        """The same step as rows of a part's length; distances shrink alike."""
        parts = self.short_parts
        return replace(
            self,
            context=self.context // parts,
            window=self.window // parts,
            rows=self.rows * parts,
            probe_rows=self.probe_rows * parts,
            short_parts=1,
        )


SIZES: dict[str, Size] = {
    "gpu": Size(  # one H100, under a minute
        name="gpu",
        hidden=512,
        layers=6,
        heads=8,
        kv_heads=2,
        head_dim=64,
        experts=32,
        top_k=2,
        width=256,
        context=2048,
        window=128,
        rows=16,
        probe_rows=4,
        steps=1300,
        eval_rows=192,
        eval_probe_rows=64,
    ),
    "mini": Size(  # two cores, seconds; every path of the code, no finding
        name="mini",
        hidden=64,
        layers=6,
        heads=4,
        kv_heads=2,
        head_dim=16,
        experts=16,
        top_k=2,
        width=32,
        context=256,
        window=16,
        rows=4,
        probe_rows=1,
        steps=24,
        eval_rows=16,
        eval_probe_rows=4,
        rate=3e-3,
        short_parts=4,
    ),
}


@dataclass(frozen=True)
class Variant:
    """One model of the study, as its difference from the baseline (which has all defaults).

    `layout` is "full", "window", or "k:1" for k window layers before each full one; the first
    `sinks` tokens stay visible. With `convert_at`, all layers are full for that share of the steps
    and `layout` holds afterwards (continued pretraining). `split` cuts each expert into so many
    narrower ones and chooses so many times more. `shared` of the chosen experts are visited by
    every token instead of being routed. `bias_rate` is the step of the routing bias (0: none),
    `aux` the coefficient of the auxiliary loss. `mtp` counts multi-token-prediction modules.
    `matched` to another variant means equal training FLOPs, by "width" of the experts or by
    "steps".
    """

    name: str
    note: str
    layout: str = "full"
    sinks: int = 0
    convert_at: float = 0.0
    split: int = 1
    shared: int = 0
    scoring: str = "sigmoid"
    bias_rate: float = 1e-3
    aux: float = 0.0
    mtp: int = 0
    matched: str = ""
    matched_by: Literal["width", "steps"] = "width"


BASE = "base"
_ALL = (
    Variant(BASE, "full attention, a 16th of the experts, sigmoid router with bias"),
    Variant("window", "window in every layer", layout="window"),
    Variant("hybrid-1to1", "one window layer for each full one", layout="1:1"),
    Variant("hybrid-5to1", "five window layers for each full one", layout="5:1"),
    Variant("hybrid-5to1-sink", "the same, with 4 sink tokens", layout="5:1", sinks=4),
    Variant(
        "hybrid-5to1-wide",
        "the same without sinks, experts widened to the FLOPs of full attention",
        layout="5:1",
        matched=BASE,
    ),
    Variant(
        "converted-5to1",
        "full attention for 80 % of the steps, then five to one",
        layout="5:1",
        convert_at=0.8,
    ),
    Variant("fine", "four times as many experts, a quarter as wide, chosen four times", split=4),
    Variant("fine-shared", "the same, one of the chosen shared", split=4, shared=1),
    Variant("mtp-1", "one multi-token-prediction module, weight 0.3 to 0.1", mtp=1),
    Variant("mtp-3", "three modules", mtp=3),
    Variant(
        "base-longer",
        "the baseline with the FLOPs of one module spent on more steps",
        matched="mtp-1",
        matched_by="steps",
    ),
    Variant("softmax-0.01", "softmax, auxiliary loss 0.01", "full", 0, 0, 1, 0, "softmax", 0, 0.01),
    Variant("softmax-0.001", "softmax, aux loss 0.001", "full", 0, 0, 1, 0, "softmax", 0, 0.001),
    Variant("sigmoid-0.01", "sigmoid, auxiliary loss 0.01, no bias", bias_rate=0, aux=0.01),
    Variant("unbalanced", "sigmoid, neither bias nor auxiliary loss", bias_rate=0),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}

STUDIES: dict[str, tuple[str, ...]] = {
    "attention": (
        BASE,
        "hybrid-5to1",
        "window",
        "hybrid-1to1",
        "hybrid-5to1-sink",
        "hybrid-5to1-wide",
        "converted-5to1",
    ),
    "granularity": (BASE, "fine"),
    "mtp": (BASE, "mtp-1", "mtp-3", "base-longer"),
    "shared-experts": ("fine", "fine-shared"),
    "router": (BASE, "softmax-0.01", "softmax-0.001", "sigmoid-0.01", "unbalanced"),
}
"""Each study's variants; all are compared with the first."""


def names_of(studies: Sequence[str]) -> list[str]:
    """The variants of these studies, each once, in order."""
    return list(dict.fromkeys(name for study in studies for name in STUDIES[study]))


def layer_kinds(layout: str, layers: int) -> tuple[int, ...]:
    """Kind of each layer; in "k:1" each (k+1)-th layer, and so the last, is full."""
    if layout == "full":
        return ()
    if layout == "window":
        return (WINDOW,) * layers
    windows, _, full = layout.partition(":")
    if full != "1" or not windows.isdigit() or layers % (int(windows) + 1):
        raise ModelError(
            f"layout {layout!r} does not divide {layers} layers; use full, window or k:1"
        )
    group = int(windows) + 1
    return tuple(FULL if (i + 1) % group == 0 else WINDOW for i in range(layers))


def config_of(size: Size, variant: Variant, *, width: int | None = None) -> ModelConfig:
    """The variant's model (after its conversion, if it has one); `width` is that of an expert
    before it is split, by default the size's."""
    kinds = layer_kinds(variant.layout, size.layers)
    window = WINDOW in kinds
    narrow = (width or size.width) // variant.split
    return ModelConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=narrow,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        rotary_dim=size.head_dim // 2,
        num_local_experts=size.experts * variant.split - variant.shared,
        num_experts_per_tok=size.top_k * variant.split - variant.shared,
        max_position_embeddings=size.context,
        rope_theta=10_000.0,
        scoring_func=variant.scoring,
        use_routing_bias=variant.bias_rate > 0,
        shared_intermediate_size=variant.shared * narrow,
        attn_type_list=kinds,
        sliding_window=size.window if window else None,
        num_sink_tokens=variant.sinks if window else 0,
    )


def full_config(config: ModelConfig) -> ModelConfig:
    """The same model before conversion: full attention in every layer."""
    return replace(config, attn_type_list=(), sliding_window=None, num_sink_tokens=0)
