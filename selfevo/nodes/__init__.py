"""The steps of a round, one a file. Each is a function: campaign → next step."""
