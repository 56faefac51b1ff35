"""Layer-wise reconstruction of networks of other packages, small and with random weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lightning_woodfisher import FisherConfig, PruningReport, SelectionConfig, prune
from lightning_woodfisher.weights.layers import find_inputs_first, prunable_parameters
from tests.support.curvatures import record_curvatures

BATCHES = 6
TOKENS = 40
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGES = {"num_classes": 5, "num_labels": 5, "image_size": 16, "patch_size": 8}
WORDS = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}


@dataclass
class Case:
    """A network and what is known about it.

    Attributes:
        build: makes the network.
        writers: regular expression of the weights that write into a residual sum.
        kind: kind of its samples.
        tied: weight of the head, if an embedding has the same.
        covariances: number of covariances of inputs, if layers share some.
    """

    build: Callable[[], nn.Module]
    writers: str
    kind: str = "images"
    tied: str | None = None
    covariances: int | None = None


def hugging_face(name: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")
        model: nn.Module = getattr(transformers, name + head)(config(**options))
        return model

    return build


def timm_model(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = pytest.importorskip("timm")
        made: nn.Module = getattr(getattr(timm.models, module), name)(
            num_classes=5, **options
        )
        return made

    return build


def timm_resnet() -> nn.Module:
    resnet = pytest.importorskip("timm").models.resnet
    model: nn.Module = resnet.ResNet(
        resnet.BasicBlock, [2, 1, 1, 1], num_classes=5, channels=(8, 8, 16, 16)
    )
    return model


def vision(name: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        cls = getattr(torchvision.models, name)
        model: nn.Module = cls(*arguments, num_classes=5, **options)
        return model

    return build


def resnet() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    model = torchvision.models.ResNet(
        block, [2, 1, 1, 1], num_classes=5, width_per_group=4
    )
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 5)
    return model


def encoder(norm_first: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, batch_first=True, norm_first=norm_first
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return build


def convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    blocks = [block(16, 32, 2), block(32, None, 1)]
    return torchvision.models.ConvNeXt(blocks, num_classes=5, layer_scale=0.5)


def mobilenet() -> nn.Module:
    block = torchvision.models.mobilenetv3.InvertedResidualConfig
    blocks = [
        block(16, 3, 16, 16, True, "RE", 1, 1, 1),
        block(16, 3, 32, 24, False, "HS", 2, 1, 1),
        block(24, 3, 48, 24, True, "HS", 1, 1, 1),
    ]
    return torchvision.models.MobileNetV3(blocks, 32, num_classes=5)


def efficientnet() -> nn.Module:
    block = torchvision.models.efficientnet.MBConvConfig
    blocks = [block(1, 3, 1, 16, 16, 1), block(2, 3, 2, 16, 24, 2)]
    return torchvision.models.EfficientNet(blocks, 0.0, num_classes=5, last_channel=32)


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
BART = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
}
FIRST = {"decoder_start_token_id": 1}

CASES = {
    "bert": Case(
        hugging_face("Bert", "ForMaskedLM", **SIZES, **WORDS),
        r"output\.dense",
        "words",
        tied="cls.predictions.decoder.weight",
        # Of each block: attention, its output, two of the perceptron; and the head.
        covariances=4 * 2 + 1,
    ),
    "gpt2": Case(
        hugging_face("GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2, **WORDS),
        r"c_proj",
        "words",
        tied="lm_head.weight",
        covariances=4 * 2,
    ),
    "llama": Case(
        hugging_face(
            "Llama",
            "ForCausalLM",
            num_key_value_heads=1,
            tie_word_embeddings=True,
            **SIZES,
            **WORDS,
        ),
        r"o_proj|down_proj",
        "words",
        tied="lm_head.weight",
        covariances=4 * 2,
    ),
    "vit": Case(
        hugging_face("ViT", "ForImageClassification", **SIZES, **IMAGES),
        r"o_proj|fc2",
        covariances=4 * 2 + 2,
    ),
    "t5": Case(
        hugging_face("T5", "ForConditionalGeneration", **T5, **WORDS, **FIRST),
        r"\.o\.|\.wo\.",
        "words",
        tied="lm_head.weight",
        # Cross-attention: queries and keys have other inputs, and an output.
        covariances=4 * 2 + (4 + 3) * 2,
    ),
    "bart": Case(
        hugging_face(
            "Bart", "ForConditionalGeneration", d_model=16, **BART, **WORDS, **FIRST
        ),
        r"out_proj|fc2",
        "words",
        tied="lm_head.weight",
    ),
    "pre-norm": Case(encoder(True), r"out_proj|linear2", "sequences"),
    "post-norm": Case(encoder(False), r"out_proj|linear2", "sequences"),
    "resnet": Case(resnet, r"downsample\.0|\.1\.conv3"),
    "torchvision vit": Case(
        vision("VisionTransformer", 16, 8, 2, 2, 16, 32), r"out_proj|mlp\.3"
    ),
    "swin": Case(
        vision("SwinTransformer", [4, 4], 16, [2, 1], [2, 2], [2, 2]),
        r"attn\.proj|mlp\.3",
    ),
    "convnext": Case(convnext, r"block\.5"),
    "mobilenet": Case(mobilenet, r"features\.(1\.block\.2|3\.block\.3)\.0"),
    "densenet": Case(vision("DenseNet", 8, (2, 2), 8, 2), r"(?!)"),
    "efficientnet": Case(efficientnet, r"features\.(1\.0\.block\.2|2\.1\.block\.3)\.0"),
    "timm vit": Case(
        timm_model(
            "vision_transformer",
            "VisionTransformer",
            img_size=16,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            init_values=0.5,
        ),
        r"attn\.proj|fc2",
    ),
    "timm mixer": Case(
        timm_model(
            "mlp_mixer",
            "MlpMixer",
            img_size=16,
            patch_size=4,
            num_blocks=2,
            embed_dim=16,
        ),
        r"fc2",
    ),
    "timm resnet": Case(timm_resnet, r"downsample\.0|layer1\.1\.conv2"),
}
QUICK = {"bert", "gpt2", "llama", "vit", "t5", "pre-norm", "resnet", "swin"}


def make_batches(kind: str) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    batches: list[Any] = []
    for _ in range(BATCHES):
        if kind == "words":
            words = torch.randint(2, TOKENS, (4, 8), generator=generator)
            batches.append({"input_ids": words, "labels": words})
        elif kind == "images":
            pixels = torch.randn(4, 3, 16, 16, generator=generator)
            batches.append((pixels, torch.randint(5, (4,), generator=generator)))
        else:
            batches.append(torch.randn(2, 4, 6, 16, generator=generator).unbind(0))
    return batches


def predict(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch) if isinstance(batch, dict) else model(batch[0])
    result: Tensor = getattr(output, "logits", output)
    return result


def compute_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        result: Tensor = model(**batch).loss
        return result
    output = predict(model, batch)
    if output.dim() == 3:
        return F.mse_loss(output, batch[1])
    return F.cross_entropy(output, batch[1])


def make_network(case: Case, batches: list[Any]) -> nn.Module:
    """Make a network whose layers all matter, with running statistics of its samples."""
    torch.manual_seed(0)
    model = case.build().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and parameter.std() < 0.1:
                parameter.normal_(0.0, 0.15 if "embed" not in name else 1.0)
        if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            for batch in batches * 3:
                predict(model, batch)
    return model.eval()


def error(dense: nn.Module, model: nn.Module, batches: list[Any]) -> float:
    lost = total = 0.0
    with torch.no_grad():
        for batch in batches:
            wanted, found = predict(dense, batch), predict(model, batch)
            assert found.isfinite().all()
            lost += float((wanted - found).square().sum())
            total += float((wanted - wanted.mean(0)).square().sum())
    return lost / total


def run(
    model: nn.Module, batches: list[Any], criterion: str, selection: SelectionConfig
) -> PruningReport:
    return prune(
        model,
        batches,
        compute_loss,
        target_sparsity=0.5,
        criterion=criterion,
        selection=selection,
        fisher=FisherConfig(num_gradients=BATCHES),
    )


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    batches = make_batches(case.kind)
    dense = make_network(case, batches)
    made = record_curvatures(monkeypatch)
    inputs_first = find_inputs_first(dense, list(prunable_parameters(dense)))
    odd = tuple(
        f"^{re.escape(n)}$"
        for n, p in prunable_parameters(dense).items()
        if p.shape[n not in inputs_first] % 4
    )
    for pattern in (None, "2:4"):
        selection = SelectionConfig(scope="layer")
        if pattern:
            selection = SelectionConfig(pattern="2:4", exclude=odd)
        made.clear()
        model, other = copy.deepcopy(dense), copy.deepcopy(dense)
        with warnings.catch_warnings():
            # Of what is left of the network after magnitude pruning.
            warnings.filterwarnings("ignore", message="this pruning step raised")
            report = run(model, batches, "layerwise", selection)
            run(other, batches, "magnitude", selection)
        assert error(dense, model, batches) < 0.7 * error(dense, other, batches)
        weights = prunable_parameters(model, exclude=selection.exclude)
        assert {layer.name for layer in report.layers} == weights.keys()
        for layer in report.layers:
            zeros = weights[layer.name].detach() == 0
            assert int(zeros.sum()) == layer.zeros_after == round(zeros.numel() / 2)
            if pattern:
                zeros = zeros.movedim(int(layer.name not in inputs_first), -1)
                assert (zeros.reshape(-1, 4).sum(1) == 2).all(), layer.name
            found = layer.reconstruction
            assert found is not None
            assert found.error <= found.error_masked + 1e-9
            is_writer = re.search(case.writers, layer.name) is not None
            assert (found.target == "residual sum") == is_writer, layer.name
        if case.covariances is not None and not pattern:
            assert len(made) == case.covariances
        if case.tied is not None:
            head, before = (
                model.get_parameter(case.tied),
                dense.get_parameter(case.tied),
            )
            assert torch.equal(head, before)
            assert case.tied not in weights
