"""Measurements behind ``lightning-woodfisher benchmark``: one module for each table.

Inputs are problem sizes and a device; outputs are rows (frozen dataclasses) with seconds,
cores and memory, printed as a table, written as JSON or drawn. Only
:mod:`lightning_woodfisher.cli` may import this folder, and it must not import Lightning.
"""
