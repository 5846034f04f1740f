"""Forge: training agents that we did not write. Training, evaluation and supervised data."""

import os

# Read when torch loads. Spinning OpenMP threads slow each other tenfold on busy cores; sleeping
# ones cost a few microseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
