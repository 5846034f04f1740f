"""An agent that solves machine-learning competitions, and the container that others run in.

See `docs/mle_scaffold.md`. Command: `python -m agent_tools.mle_agent run`.
"""
