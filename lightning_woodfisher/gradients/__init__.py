"""Turn mini-batches into gradient rows on the ranks that own their columns.

A model, its loss and mini-batches go in. Tensors of shape ``[n, D_r]`` come out: rows of
gradients (or of Hessian products) of the D_r active weights of this rank; for K-FAC,
Kronecker factors of whole layers. This folder must not know criteria or pruning steps: it
imports only ``fisher.config``, ``weights``, ``data``, ``distributed`` and ``base``.
"""
