"""Lightning callbacks that prune at planned epochs or steps and keep pruned weights zero.

Input: a Trainer and its LightningModule. Output: pruned weights, a report of each step for
the loggers, and state in checkpoints. Callbacks contain no numerical code:
:mod:`lightning_woodfisher.pruning` and :mod:`lightning_woodfisher.structured` compute a step.
"""
