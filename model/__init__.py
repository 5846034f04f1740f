"""The MiniMax-M2 architecture: configuration, transformer, checkpoints, generation, serving.

Importing this package, `model.config` and `model.errors` does not import torch.
"""

import os

# Read when torch loads. Spinning OpenMP threads slow each other tenfold on busy cores; sleeping
# ones cost a few microseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
