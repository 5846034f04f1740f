"""`python arms_child.py arm NAME --work DIR …`: a real arm on the environment of `rl_fakes`."""

from __future__ import annotations

import sys

from rl_fakes import text_parts

from rl.arms.__main__ import _parser, _settings
from rl.arms.arm import run_arm
from rl.arms.spec import Arm, run_config
from rl.cli import run_main
from rl.train import StopSignals


def main(argv: object) -> int:
    del argv
    args = _parser().parse_args(sys.argv[1:])
    settings = _settings(args)
    signals = StopSignals()
    run_arm(
        args.name,
        settings,
        args.work,
        signals.check,
        train_parts=text_parts,
        measure=lambda s: text_parts(run_config(Arm("cispo", 1, 0), s)),
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
