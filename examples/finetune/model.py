"""Load the digits network with the weights of a pruned checkpoint."""

from __future__ import annotations

import torch

from examples.digits.model import DigitsClassifier


class PrunedDigitsClassifier(DigitsClassifier):
    """The digits network with the weights of a checkpoint, but not its epoch and optimizer.

    Args:
        weights: path of a checkpoint of ``DigitsClassifier``.
        learning_rate: learning rate of AdamW.
    """

    def __init__(self, weights: str, learning_rate: float = 3e-4) -> None:
        super().__init__(learning_rate)
        checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
        self.load_state_dict(checkpoint["state_dict"])
