"""List the shapes of the prunable weights of well-known networks.

As in :func:`~.weights.layers.prunable_parameters`, weights of Linear and convolution
layers are prunable; biases, embeddings and normalization layers are not. Linear weights
are ``(out, in)``, convolutions ``(out, in / groups, height, width)``.
"""

from __future__ import annotations

__all__ = ["SHAPES"]

Shapes = dict[str, tuple[int, ...]]


def _resnet20() -> Shapes:
    """Return ResNet-20 for CIFAR-10 with parameter-free shortcuts (He et al. 2016, 4.2)."""
    shapes: Shapes = {"conv1": (16, 3, 3, 3)}
    width = 16
    for stage, out in enumerate((16, 32, 64), start=1):
        for block in range(3):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1"] = (out, width, 3, 3)
            shapes[f"{name}.conv2"] = (out, out, 3, 3)
            width = out
    return {**shapes, "fc": (10, 64)}


def _resnet50() -> Shapes:
    """Return ResNet-50 for ImageNet (He et al. 2016, table 1)."""
    shapes: Shapes = {"conv1": (64, 3, 7, 7)}
    width = 64
    stages = ((64, 3), (128, 4), (256, 6), (512, 3))
    for stage, (inner, blocks) in enumerate(stages, start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1"] = (inner, width, 1, 1)
            shapes[f"{name}.conv2"] = (inner, inner, 3, 3)
            shapes[f"{name}.conv3"] = (4 * inner, inner, 1, 1)
            if block == 0:
                shapes[f"{name}.downsample"] = (4 * inner, width, 1, 1)
            width = 4 * inner
    return {**shapes, "fc": (1000, 2048)}


def _mobilenetv1() -> Shapes:
    """Return MobileNetV1, width 1.0 (Howard et al. 2017, table 1)."""
    shapes: Shapes = {"conv": (32, 3, 3, 3)}
    width = 32
    outputs = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
    for index, out in enumerate(outputs):
        shapes[f"layers.{index}.depthwise"] = (width, 1, 3, 3)
        shapes[f"layers.{index}.pointwise"] = (out, width, 1, 1)
        width = out
    return {**shapes, "fc": (1000, 1024)}


def _transformer(
    layers: int, width: int, inner: int, inputs: tuple[str, ...] = ("up",)
) -> Shapes:
    """Return the matrices of a transformer: attention and MLP of each layer."""
    shapes: Shapes = {}
    for layer in range(layers):
        for name in ("query", "key", "value", "output"):
            shapes[f"layers.{layer}.attention.{name}"] = (width, width)
        for name in inputs:
            shapes[f"layers.{layer}.mlp.{name}"] = (inner, width)
        shapes[f"layers.{layer}.mlp.down"] = (width, inner)
    return shapes


SHAPES: dict[str, Shapes] = {
    "resnet20": _resnet20(),
    "resnet50": _resnet50(),
    "mobilenetv1": _mobilenetv1(),
    # BERT-base with its pooler, without embeddings (Devlin et al. 2019).
    "bert_base": {**_transformer(12, 768, 3072), "pooler": (768, 768)},
    # ViT-B/16 with patch projection and 1,000 classes (Dosovitskiy et al. 2021).
    "vit_b": {
        "patches": (768, 3, 16, 16),
        **_transformer(12, 768, 3072),
        "head": (1000, 768),
    },
    # LLaMA 7B with its output projection (Touvron et al. 2023, table 2).
    "llama7b": {
        **_transformer(32, 4096, 11008, ("gate", "up")),
        "lm_head": (32000, 4096),
    },
}
