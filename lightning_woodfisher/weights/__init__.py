"""The weights to prune: selected layers, masks, active weights, patterns, blocks and owners.

A model goes in; masks (bool, of the shape of each parameter), the active weights of this
rank ``[D_r]`` and the partition into blocks come out, and new weights ``[D_r]`` are written
back. This folder knows neither gradients nor criteria, and imports only ``data``,
``distributed`` and ``base``.
"""
