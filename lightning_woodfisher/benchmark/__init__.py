"""Measurements behind ``lightning-woodfisher benchmark`` and ``gpu-check``.

Inputs are problem sizes and a device; outputs are rows (frozen dataclasses) with seconds,
cores and memory, printed as a table, written as JSON or drawn. There is one module for each
table, and :mod:`.gpu_check` calls most of them. Only :mod:`lightning_woodfisher.cli` may
import this folder, and only :mod:`.fits` knows Lightning.
"""
