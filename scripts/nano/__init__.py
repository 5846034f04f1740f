"""How the bundled nano is made: tokenizer, policy, agent. The order is in docs/nano.md."""
