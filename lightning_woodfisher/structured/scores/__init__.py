"""Scores of structures: how much the loss is expected to rise when one is removed.

Input: a loss source, groups of coupled channels and a
:class:`~lightning_woodfisher.structured.config.StructureConfig`. Output: float64 scores
``[group.size]`` for each group, the same bits on any number of ranks; for SOSP-I also the
rows ``[M, S]`` from which the scores of pairs follow. This folder does not choose
structures or change weights: it must not import ``selection``, ``pruner`` or ``shrink``.
"""
