"""A small network trained on scikit-learn's digits."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset


@functools.cache
def trained_digits() -> tuple[nn.Sequential, TensorDataset, TensorDataset]:
    """Return the network, which must be copied, and training and test samples."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train = TensorDataset(inputs[:1200], labels[:1200])
    test = TensorDataset(inputs[1200:], labels[1200:])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    return model, train, test
