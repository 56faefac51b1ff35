"""Shapes of the prunable weights of well-known networks, from their architecture.

For estimates and benchmarks that need no download and no memory: the weights of linear
layers and convolutions, as the default selection takes them, without biases, norms and
embeddings.
"""

from __future__ import annotations

__all__ = ["SHAPES", "Shapes"]

from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]


def _resnet20() -> Iterator[tuple[str, tuple[int, ...]]]:
    """ResNet-20 for CIFAR-10 (He et al. 2016), shortcuts without weights."""
    yield "conv1.weight", (16, 3, 3, 3)
    before = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            yield f"layer{stage}.{block}.conv1.weight", (width, before, 3, 3)
            yield f"layer{stage}.{block}.conv2.weight", (width, width, 3, 3)
            before = width
    yield "linear.weight", (10, 64)


def _resnet50() -> Iterator[tuple[str, tuple[int, ...]]]:
    """ResNet-50 for ImageNet (He et al. 2016), named as in torchvision."""
    yield "conv1.weight", (64, 3, 7, 7)
    before = 64
    stages = zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)
    for stage, (width, blocks) in enumerate(stages, start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            yield f"{prefix}.conv1.weight", (width, before, 1, 1)
            yield f"{prefix}.conv2.weight", (width, width, 3, 3)
            yield f"{prefix}.conv3.weight", (4 * width, width, 1, 1)
            if block == 0:
                yield f"{prefix}.downsample.0.weight", (4 * width, before, 1, 1)
            before = 4 * width
    yield "fc.weight", (1000, 2048)


def _mobilenetv1() -> Iterator[tuple[str, tuple[int, ...]]]:
    """MobileNetV1 1.0 for ImageNet (Howard et al. 2017)."""
    yield "conv1.weight", (32, 3, 3, 3)
    before = 32
    widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    for block, width in enumerate(widths):
        yield f"blocks.{block}.depthwise.weight", (before, 1, 3, 3)
        yield f"blocks.{block}.pointwise.weight", (width, before, 1, 1)
        before = width
    yield "fc.weight", (1000, 1024)


def _bert_base() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Encoder of BERT base (Devlin et al. 2019), which is what is pruned of it."""
    hidden, inner = 768, 3072
    for layer in range(12):
        prefix = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            yield f"{prefix}.attention.self.{name}.weight", (hidden, hidden)
        yield f"{prefix}.attention.output.dense.weight", (hidden, hidden)
        yield f"{prefix}.intermediate.dense.weight", (inner, hidden)
        yield f"{prefix}.output.dense.weight", (hidden, inner)


def _llama7b() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Linear layers of LLaMA 7B (Touvron et al. 2023)."""
    hidden, inner = 4096, 11008
    for layer in range(32):
        prefix = f"layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "lm_head.weight", (32000, hidden)


SHAPES: dict[str, Shapes] = {
    "resnet20": dict(_resnet20()),
    "resnet50": dict(_resnet50()),
    "mobilenetv1": dict(_mobilenetv1()),
    "bert_base": dict(_bert_base()),
    "llama7b": dict(_llama7b()),
}
