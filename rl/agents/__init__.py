"""Agents that Forge trains without touching their code, and context management of our own ones.

An agent gets a `base_url` and a key, and knows nothing of training; what it says to the model is
recorded by the gateway behind that URL (`docs/agents.md`). No torch here.
"""
