"""`python -m model.convert SRC DST --dtype {bfloat16,float32,fp8}`: a checkpoint in another type.

DST appears whole or not at all. One shard is in memory at a time, so a model larger than memory
can be converted. Exit codes: 2 unusable SRC, DST or arguments, 5 DST cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model.config import load_config
from model.errors import CheckpointError, ModelError
from model.layout import find_tensors, tensor_shapes

SHARD_BYTES = 4_000_000_000


def convert(source: Path, target: Path, dtype: str, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write `target`, which must not exist, as `source` in another type (of `shards.DTYPES`).

    Weights, configuration, tokenizer files and metadata travel; nothing else does.
    Raises CheckpointError or ModelError for what cannot be read, and for NaN.
    """
    config = load_config(source)
    stored = find_tensors(source, tensor_shapes(config))
    if target.exists():
        raise CheckpointError(f"{target} exists; remove it or name another folder")
    from model.checkpoint import read_metadata
    from model.shards import DTYPES, finite, read_tensors, whole_folder, write_folder

    with whole_folder(target) as folder:
        write_folder(
            folder,
            config,
            finite(source, read_tensors(source, stored), DTYPES[dtype]),
            dtype=dtype,
            tokenizer_from=source,
            max_shard_bytes=max_shard_bytes,
            metadata=read_metadata(source),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.convert", description=__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="checkpoint folder")
    add("target", type=Path, metavar="DST", help="folder to make")
    add("--dtype", required=True, choices=["bfloat16", "float32", "fp8"])
    add("--max-shard-bytes", type=int, default=SHARD_BYTES)
    options = parser.parse_args(argv)
    try:
        convert(options.source, options.target, options.dtype, options.max_shard_bytes)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {options.target}: {error}", file=sys.stderr)
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main())
