"""Shrink."""
