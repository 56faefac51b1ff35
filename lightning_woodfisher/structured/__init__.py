"""Structured pruning: remove whole channels, scored by second-order information.

Input: a network, a loss source and a target. ``graph/`` finds the groups of coupled
channels, ``scores/`` scores them (float64 ``[group.size]``), ``selection.py`` chooses the
channels to remove, ``pruner.py`` masks them, and ``shrink/`` builds the smaller network.
Output: weights masked in place, and a :class:`~.report.StructureReport`. This folder must
not import Lightning, ``callbacks`` or ``reporting``.
"""
