"""Cost of a pruning step before it is run: memory, traffic and operations of each rank.

In go the shapes of the selected weights, the settings of the step and the number of
ranks; out comes a :class:`~.estimate.ResourceEstimate`, and a check against the memory of
the device. It must not know Lightning, loggers or the command line, and allocates no
tensors.
"""
