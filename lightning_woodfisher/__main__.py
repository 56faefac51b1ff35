"""``python -m lightning_woodfisher`` is the command ``lightning-woodfisher``."""

from lightning_woodfisher.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
