"""Mini-batches, losses, drawn labels, isolation of the model and BatchNorm statistics.

A dataset, DataLoader or iterable goes in; numbered batches of m samples and scalar losses
come out, the same on every rank. This folder knows neither masks nor blocks of the Fisher,
and imports only ``distributed`` and ``base``.
"""
