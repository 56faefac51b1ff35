"""Lightning callbacks: when to prune, masks that hold during training, checkpoint state.

A Trainer and a LightningModule go in; pruning steps happen at the planned epochs or optimizer
steps, and reports go to the loggers. How a step works is the business of
:mod:`lightning_woodfisher.pruning` and :mod:`lightning_woodfisher.structured`; callbacks
contain no numerical code.
"""
