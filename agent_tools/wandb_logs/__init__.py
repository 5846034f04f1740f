"""Read the logs of a training run, digest them for a model, and detect what goes wrong.

`read_run` reads a run directory (design: the ``.wandb`` file of a run that ended by itself, the
side-car ``metrics.jsonl`` of a live or crashed one), `digest` turns the history into at most 300
tokens, `detect` into findings. `translate` reads the metric names of other trainers, whose runs
`detect_portable` judges. Neither wandb nor protobuf is imported before a ``.wandb`` file
is opened.
"""

from agent_tools.wandb_logs.detectors import Finding, Suggestion, detect
from agent_tools.wandb_logs.dialects import Translated, translate
from agent_tools.wandb_logs.digest import DEFAULT_KEYS, Digest, digest
from agent_tools.wandb_logs.history import RunHistory, read_anything, read_run
from agent_tools.wandb_logs.portable import detect_portable

__all__ = [
    "DEFAULT_KEYS",
    "Digest",
    "Finding",
    "RunHistory",
    "Suggestion",
    "Translated",
    "detect",
    "detect_portable",
    "digest",
    "read_anything",
    "read_run",
    "translate",
]
