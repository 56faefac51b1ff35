"""Layer-wise reconstruction: prune layer after layer so that each keeps its outputs.

Input: a network, numbered batches of samples and the number of weights to remove. Output:
new weights, biases and masks of all layers, written one layer after another. The Hessian of
a layer is the covariance of its own inputs, so that no gradient rows are needed.
"""
