"""Try many one-shot settings on one network and compare them by a metric.

Input: a model, data and a grid of settings. Output: a report with one result for each
setting; the model is restored. Gradients ``[N, D_r]`` are collected once for all settings
that share them. This folder must not import Lightning or ``reporting``.
"""
