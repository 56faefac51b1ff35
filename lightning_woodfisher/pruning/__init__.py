"""One pruning step from end to end.

:class:`~.pruner.Pruner` takes masks, settings and a source of losses, and leaves the
selected weights pruned to a sparsity: gradients → saliencies ``[D_r]`` → mask ``[D_r]`` →
weight update ``[D_r]``, in one or more stages, summarized in a
:class:`~.report.PruningReport`. It knows neither Lightning nor loggers nor when a step
happens; :mod:`.schedule` only lists positions.
"""
