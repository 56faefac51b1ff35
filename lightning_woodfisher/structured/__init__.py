"""Structured pruning: whole channels, scored by second-order information."""
