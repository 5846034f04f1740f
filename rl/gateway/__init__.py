"""The gateway: agents speak OpenAI's or Anthropic's API to it, and every call becomes a record.

An agent that nobody wrote for training changes its `base_url` and nothing else. `core` is the one
path of a call; `dialects` are the four APIs over it. Design and guarantees: docs/gateway.md.
No torch here.
"""
