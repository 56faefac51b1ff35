"""Train Lightning's demo Transformer to sort rows of symbols.

The rows are random, so there is no download. Sorting needs no positions; the positional
encoding of the demo adds the same vector everywhere.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.demos import Transformer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

# First symbol of the output.
START = 0


class Sorter(pl.LightningModule):
    """An encoder and a decoder of two layers each.

    Args:
        symbols: number of different symbols, including ``START``.
        width: width of the embedding; the hidden layers have twice as many units.
        learning_rate: learning rate of Adam.
    """

    def __init__(
        self, symbols: int = 12, width: int = 64, learning_rate: float = 2e-3
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.net = Transformer(
            vocab_size=symbols, ninp=width, nhid=2 * width, dropout=0.0
        )

    def forward(self, rows: Tensor, shifted: Tensor) -> Tensor:
        """Predict the next symbol at each position.

        Args:
            rows: int64 ``[n, t]``, the symbols to sort.
            shifted: int64 ``[n, t]``, the output shifted to the right by one.

        Returns:
            Log-probabilities ``[n · t, symbols]``.
        """
        predicted: Tensor = self.net(rows, shifted)
        return predicted

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, sorted_rows = batch
        shifted = F.pad(sorted_rows[:, :-1], (1, 0), value=START)
        loss = F.nll_loss(self(rows, shifted), sorted_rows.reshape(-1))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        rows, sorted_rows = batch
        shifted = F.pad(sorted_rows[:, :-1], (1, 0), value=START)
        correct = self(rows, shifted).argmax(1) == sorted_rows.reshape(-1)
        self.log("val_accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Rows(pl.LightningDataModule):
    """Rows of random symbols and the same rows sorted.

    Args:
        rows: number of training rows.
        length: number of symbols in a row.
        symbols: number of different symbols, including ``START``.
        batch_size: number of rows in a training batch.
    """

    def __init__(
        self,
        rows: int = 4096,
        length: int = 8,
        symbols: int = 12,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.length = length
        self.symbols = symbols
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.train = self._make(self.rows, seed=0)
        self.held_out = self._make(512, seed=1)

    def _make(self, count: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, self.length)
        rows = torch.randint(START + 1, self.symbols, shape, generator=generator)
        return TensorDataset(rows, rows.sort(1).values)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, 512)
