"""The model's sizes, in the field names of Hugging Face's `minimax_m2` configuration. No torch."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from model.errors import CheckpointError, ModelError

MODEL_TYPE = "minimax_m2"
VARIANT_TYPE = "selfevo_moe"
"""`model_type` of a model with parts that the released class lacks: other programs refuse it
instead of computing something else."""
CONFIG_NAME = "config.json"
FULL, WINDOW = 1, 2
"""Kinds of layers in `attn_type_list`: full attention (as released), sliding window."""

# Values that change the forward pass and that this implementation has only one way to do.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": (MODEL_TYPE, VARIANT_TYPE),
    "hidden_act": ("silu",),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_layer",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
}

FP8_BLOCK = 128
"""Side of the square of FP8 weights that share one scale, as in the released weights."""
FP8_SETTINGS: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
"""`quantization_config` of a checkpoint in the released FP8 format."""

_MAY_BE_ZERO = ("shared_intermediate_size", "num_sink_tokens")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model; `intermediate_size` is the width of one expert.

    The defaults of the last group are the released model's. `attn_type_list` has `FULL` or `WINDOW`
    for each layer (empty: all full). A window layer's token sees the `sliding_window` positions
    that end in its own, and the first `num_sink_tokens` of its text. `shared_intermediate_size` is
    the width of the expert that every token visits (DeepSeekMoE's shared experts, stacked; 0:
    none). `scoring_func` is the router's: sigmoid, or softmax over all experts. `norm_topk_prob`
    makes the weights of the chosen experts sum to one.

    Raises ModelError where two values contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rope_theta: float = 5_000_000.0
    rms_norm_eps: float = 1e-6
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    use_routing_bias: bool = True
    initializer_range: float = 0.02
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    shared_intermediate_size: int = 0
    attn_type_list: tuple[int, ...] = ()
    sliding_window: int | None = None
    num_sink_tokens: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_ZERO else 1
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.type == "int" and not (whole and value >= least):
                raise ModelError(
                    f"config: {field.name} is {value!r}; it must be a whole number ≥ {least}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ModelError(
                f"config: rotary_dim {self.rotary_dim} must be even and ≤ head_dim {self.head_dim}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ModelError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} is more than "
                f"num_local_experts {self.num_local_experts}"
            )
        if self.scoring_func not in ("sigmoid", "softmax"):
            raise ModelError(
                f"config: scoring_func {self.scoring_func!r}; 'sigmoid' and 'softmax' are known"
            )
        self._check_attention_kinds()

    def _check_attention_kinds(self) -> None:
        kinds = self.attn_type_list
        if kinds and len(kinds) != self.num_hidden_layers:
            raise ModelError(
                f"config: attn_type_list has {len(kinds)} entries for {self.num_hidden_layers} "
                "layers; give one a layer"
            )
        if any(kind not in (FULL, WINDOW) for kind in kinds):
            raise ModelError(
                f"config: attn_type_list is {list(kinds)!r}; {FULL} (full) and {WINDOW} (window) "
                "are known, linear attention is not"
            )
        size = self.sliding_window
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ModelError(f"config: sliding_window is {size!r}; it must be a whole number ≥ 1")
        if WINDOW in kinds and size is None:
            raise ModelError("config: attn_type_list has window layers; set sliding_window")
        if WINDOW not in kinds and (size is not None or self.num_sink_tokens):
            raise ModelError(
                "config: sliding_window or num_sink_tokens is set, but attn_type_list has no "
                f"window layer ({WINDOW}); remove them or add one"
            )

    def window_of(self, layer: int) -> int | None:
        """How many positions a token of this layer sees, its own included; None for all."""
        return self.sliding_window if self.attn_type_list[layer : layer + 1] == (WINDOW,) else None

    @property
    def is_released_kind(self) -> bool:
        """True where the released class (transformers, vLLM) computes the same model."""
        return self.has_released_experts and WINDOW not in self.attn_type_list

    @property
    def has_released_experts(self) -> bool:
        """True where the router and the experts are those of the released class."""
        return (
            self.scoring_func == "sigmoid"
            and self.norm_topk_prob
            and not self.shared_intermediate_size
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key (or all value) heads together."""
        return self.num_key_value_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """The configuration as `config.json` holds it, readable by transformers and vLLM.

        Rotary size is written twice: vLLM needs `rotary_dim`, and transformers before 5.19 ignores
        it without a word and reads `rope_parameters.partial_rotary_factor`.
        """
        released = self.is_released_kind
        out: dict[str, Any] = {
            "architectures": ["MiniMaxM2ForCausalLM" if released else "SelfevoForCausalLM"],
            "model_type": MODEL_TYPE if released else VARIANT_TYPE,
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_dim / self.head_dim,
            },
            "hidden_act": "silu",
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "attn_type_list": list(self.attn_type_list) or [FULL] * self.num_hidden_layers,
            "tie_word_embeddings": False,
            "use_mtp": False,
            "num_mtp_modules": 0,
            "router_aux_loss_coef": 0.0,
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
        }
        if WINDOW not in self.attn_type_list:
            del out["sliding_window"], out["num_sink_tokens"]
        return out

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "config") -> ModelConfig:
        """Read a Hugging Face configuration; fields that do not touch the forward pass are dropped.

        Raises ModelError for a missing size and for a feature that this code does not have.
        """
        for name, allowed in _FIXED.items():
            if name in values and values[name] not in allowed:
                raise ModelError(
                    f"{where}: {name} is {values[name]!r}; only {allowed[0]!r} is known"
                )
        check_quantisation(values.get("quantization_config"), where)
        known = {field.name for field in fields(cls)}
        picked = {name: value for name, value in values.items() if name in known}
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ModelError(f"{where}: rope_type {rope['rope_type']!r}; only 'default' is known")
        if "rope_theta" in rope:
            picked["rope_theta"] = rope["rope_theta"]
        if "num_experts" in values:
            picked.setdefault("num_local_experts", values["num_experts"])
        if "rotary_dim" not in picked and isinstance(values.get("head_dim"), int):
            picked["rotary_dim"] = round(values["head_dim"] * rope.get("partial_rotary_factor", 1))
        if isinstance(picked.get("eos_token_id"), list):
            picked["eos_token_id"] = picked["eos_token_id"][0]
        picked["shared_intermediate_size"] = picked.get("shared_intermediate_size") or 0
        kinds = tuple(picked.get("attn_type_list") or ())
        picked["attn_type_list"] = () if set(kinds) <= {FULL} else kinds
        if WINDOW not in kinds and values.get("model_type") != VARIANT_TYPE:
            picked.pop("sliding_window", None)  # of other programs, which ignore it too
        required = {f.name for f in fields(cls) if f.type == "int" and f.default is MISSING}
        if missing := sorted(required - picked.keys()):
            raise ModelError(f"{where}: missing {', '.join(missing)}")
        try:
            return cls(**picked)
        except ModelError as error:
            raise ModelError(f"{where}: {str(error).removeprefix('config: ')}") from None


def check_quantisation(settings: Any, where: str) -> None:
    """Raise ModelError for a `quantization_config` other than none and the released FP8 format.

    Which tensors are FP8 is read from the files, so the list of those that are not may differ.
    """
    if not settings:
        return
    held = settings if isinstance(settings, dict) else {}
    size = [FP8_BLOCK, FP8_BLOCK]
    for name, known in {
        "quant_method": ("fp8",),
        "fmt": ("float8_e4m3fn", "e4m3fn", "e4m3"),
        "activation_scheme": ("dynamic",),
        "weight_block_size": (size, tuple(size)),
        "scale_fmt": ("float",),
    }.items():
        default = None if name in ("quant_method", "weight_block_size") else known[0]
        if (value := held.get(name, default)) not in known:
            raise ModelError(
                f"{where}: weights quantised with {name} {value!r}; only {known[0]!r} is known; "
                "convert the checkpoint to bfloat16 with the program that wrote it"
            )


def load_config(directory: Path | str) -> ModelConfig:
    """Read `config.json` of a checkpoint folder.

    Raises CheckpointError where the folder or the file is missing or is not JSON, and ModelError
    for values that cannot be used.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{directory}: not a checkpoint folder (no {CONFIG_NAME}); name a folder in "
            "Hugging Face layout"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); save it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a JSON object is needed; save it again")
    return ModelConfig.from_dict(values, where=str(path))


PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
    ),
    "small": ModelConfig(  # 0.30 B
        vocab_size=32_768,
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        rotary_dim=64,
        num_local_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=32_768,
    ),
    "base": ModelConfig(  # 1.06 B
        vocab_size=32_768,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=128,
        rotary_dim=64,
        num_local_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=32_768,
    ),
    # The size of the report's ablation of granularity (Table 1, "128e top-8"): 17.79 B parameters,
    # 2.08 B active with embedding and output head. M2's rules of shape hold unchanged (head size
    # 128, attention twice as wide as the hidden state, six query heads a key head, half rotary,
    # experts half as wide, its vocabulary), so hidden size and layers are all there is to choose;
    # the sparsity is the ablation's, one expert in 16.
    "mini": ModelConfig(
        vocab_size=200_064,
        hidden_size=1536,
        intermediate_size=768,
        num_hidden_layers=37,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=128,
        rotary_dim=64,
        num_local_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=32_768,
        bos_token_id=200_034,
        eos_token_id=200_020,
    ),
    "m2": ModelConfig(
        vocab_size=200_064,
        hidden_size=3072,
        intermediate_size=1536,
        num_hidden_layers=62,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        rotary_dim=64,
        num_local_experts=256,
        num_experts_per_tok=8,
        max_position_embeddings=196_608,
        rope_theta=5_000_000.0,
        bos_token_id=200_034,
        eos_token_id=200_020,
    ),
}
