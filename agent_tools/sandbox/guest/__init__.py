"""The code that runs inside the sandbox; `worker_archive` packs it, and nothing else of ours."""
