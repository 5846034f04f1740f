"""Competitions in MLE-bench's folder layout: preparation, grading, offline medals.

Nothing is imported here, so that the prepare environment (pandas only) can import a
competition's ``prepare`` and a command line starts fast. Import from the modules:
`registry`, `grading`, `medals`, `metrics`, `facts`, `prepare`, `fields`.
"""
