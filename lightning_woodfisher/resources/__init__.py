"""Estimate the memory, traffic and operations of a pruning step before it is run.

Inputs are the shapes of the selected weights, the settings of the step and the number of
ranks; outputs are a :class:`~.estimate.ResourceEstimate` and a check against the memory of
the device. This folder must not import Lightning, loggers or the command line, and
allocates no tensors.
"""
