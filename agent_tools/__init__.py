"""What an agent works with: W&B logs, config repositories, jobs, sandbox, MLE-bench.

Each sub-package is usable alone and imports none of the other packages of this repository.
"""
