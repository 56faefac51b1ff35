"""Turn gradient rows into the inverse of the damped empirical Fisher matrix.

Rows of shape ``[n, D_r]`` (n gradients, the D_r active weights of this rank) go in; products
with F⁻¹ and F, the diagonal of F⁻¹ and solutions of constrained problems come out as float64
tensors of shape ``[D_r]``. This folder must not know models, data, losses or criteria: it
imports only ``weights.partition``, ``distributed`` and ``base``.
"""
