"""Many one-shot settings on one network, compared by a metric.

In go a model, data and a grid of settings; out comes a report with one result for each
setting, and the model is as before. Gradients ``[N, D_r]`` are collected once for all
settings that share them. Imports neither Lightning nor any folder above, such as
``reporting``.
"""
