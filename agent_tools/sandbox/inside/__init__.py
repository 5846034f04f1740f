"""The code that runs inside the sandbox; `archive` packs it, as nothing else of ours is there."""
