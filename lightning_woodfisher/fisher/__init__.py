"""Fisher."""
