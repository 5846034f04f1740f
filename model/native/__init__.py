"""The decode step in C: compiled on first use, left out where it cannot be."""
