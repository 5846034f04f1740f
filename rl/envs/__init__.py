"""Environments whose episodes the trainer learns from."""
