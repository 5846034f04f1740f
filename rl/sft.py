"""Supervised training of the policy and the agent: `python -m rl.sft SFT.yaml --out DIR`.

Writes under DIR: `checkpoint/` (Hugging Face layout, bf16, with tokenizer and manifest),
`manifest.json` (data, competitions, figures), `metrics.jsonl`, `config.resolved.yaml`.
The run is `rl.sft_run`, its loop `rl.sft_train`, its data `rl.sft_data`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rl.cli import config_parser, main_guard, resolve_or_print
from rl.errors import ConfigError
from rl.sft_config import SftConfig
from rl.splits import trainable_ids


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m rl.sft SFT.yaml --out DIR [-c FILE] [a.b=value …] [--dry-run]`."""
    parser = config_parser("rl.sft", "supervised training of the bundled model")
    parser.add_argument("--out", type=Path, help="folder to write (required unless --dry-run)")
    args = parser.parse_intermixed_args(argv)
    config = resolve_or_print(SftConfig, args)
    if config is None:
        return 0
    trainable_ids(config.suite, config.competitions)
    if args.out is None:
        raise ConfigError("--out DIR is missing; name the folder to write")
    from rl.sft_run import run

    print(json.dumps(run(config, args.out)))
    return 0


if __name__ == "__main__":
    main_guard(main)
