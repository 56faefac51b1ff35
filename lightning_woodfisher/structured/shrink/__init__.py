"""Build the smaller network: cut masked channels out, or replace filters by 1×1 implants.

Input: a network, its groups, and indices of structures by group (int64). Output: a
:class:`~.removal.RemovalPlan` and the network it is applied to, which computes the same as
the masked one; ``removal_check.py`` checks this numerically. This folder must not import
the pruner or the selection.
"""
