"""The networks of the zoo: all of torchvision, and parts of timm and transformers."""

from __future__ import annotations

import importlib.util
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.zoo.tasks import (
    CLASSES,
    TOKENS,
    Detection,
    Flow,
    Pictures,
    Segmentation,
    Task,
    Words,
)


@dataclass(frozen=True)
class Network:
    """One network.

    Args:
        name: as its library calls it.
        family: heading of the table.
        build: makes it, with random weights.
        task: what it is trained for.
        weights: their number, where the library knows it without building the network.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    task: Task
    weights: int = 0


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


# Smaller than their inputs of 64×64 pixels: what has a fixed input size.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    **{f"vit_{size}": {"image_size": 64} for size in ("b_16", "b_32", "l_16", "l_32")},
    "vit_h_14": {"image_size": 56},
}
# Settings that the functions of torchvision do not pass on: module, function, settings.
_INSIDE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "maxvit_t": ("maxvit", "_maxvit", {"input_size": (64, 64), "partition_size": 2}),
    **dict.fromkeys(
        ("mvit_v1_b", "mvit_v2_s"),
        ("video.mvit", "_mvit", {"spatial_size": (64, 64), "temporal_size": 4}),
    ),
}
_SHAPES: dict[str, tuple[int, ...]] = {
    "inception_v3": (3, 299, 299),
    "vit_h_14": (3, 56, 56),
    "ssd300_vgg16": (3, 300, 300),
    "ssdlite320_mobilenet_v3_large": (3, 320, 320),
    "mvit_v1_b": (3, 4, 64, 64),
    "mvit_v2_s": (3, 4, 64, 64),
    "s3d": (3, 16, 64, 64),
}


def _torchvision() -> list[Network]:
    import torchvision.models as models

    kinds = {
        "classification": (models, Task, (3, 64, 64)),
        "segmentation": (models.segmentation, Segmentation, (3, 64, 64)),
        "detection": (models.detection, Detection, (3, 64, 64)),
        "video": (models.video, Task, (3, 8, 64, 64)),
        "optical flow": (models.optical_flow, Flow, (3, 128, 128)),
    }
    found = []
    for kind, (module, task, shape) in kinds.items():
        for name in models.list_models(module):
            build = _torchvision_builder(name, kind)
            made = task(_SHAPES.get(name, shape))
            weights = models.get_model_weights(name).DEFAULT.meta["num_params"]
            found.append(Network(name, f"torchvision {kind}", build, made, weights))
    return found


def _torchvision_builder(name: str, kind: str) -> Callable[[], nn.Module]:
    import torchvision.models as models

    options: dict[str, Any] = {"weights": None, **_OPTIONS.get(name, {})}
    if kind != "optical flow":
        options["num_classes"] = CLASSES
    if kind in {"segmentation", "detection"}:
        options["weights_backbone"] = None
    if kind == "detection" and not name.startswith("ssd"):
        options |= {"min_size": 64, "max_size": 64}
    if "rcnn" in name:
        # As many proposals for all weights, of which one is a box to find.
        options |= {
            "rpn_pre_nms_top_n_train": 64,
            "rpn_post_nms_top_n_train": 16,
            "box_batch_size_per_image": 2,
            "box_positive_fraction": 0.5,
        }

    def build() -> nn.Module:
        if name in _INSIDE:
            path, function, settings = _INSIDE[name]
            module = importlib.import_module(f"torchvision.models.{path}")
            original = getattr(module, function)

            def call(**given: Any) -> nn.Module:
                made: nn.Module = original(**{**given, **settings})
                return made

            with unittest.mock.patch.object(module, function, call):
                network: nn.Module = models.get_model(name, **options)
            return network
        network = models.get_model(name, **options)
        if name == "s3d":
            network.avgpool = nn.AdaptiveAvgPool3d(1)
        return network

    return build


# Those whose input size can be chosen; the others take any, or have one of their own.
_TIMM_SIZED = (
    "cait_xxs24_224", "coat_lite_tiny", "gmlp_ti16_224", "levit_128s", "resmlp_12_224",
    "vit_tiny_patch16_224", "xcit_nano_12_p16_224",
)  # fmt: skip
_TIMM_FIXED = {"crossvit_9_240": 240, "efficientformer_l1": 224}
_TIMM = (
    *_TIMM_SIZED,
    *_TIMM_FIXED,
    "convnext_atto", "convnextv2_atto", "dla46_c", "edgenext_xx_small",
    "efficientvit_b0", "ese_vovnet19b_dw", "fastvit_t8", "ghostnet_050",
    "hrnet_w18_small", "lambda_resnet26t", "mobilenetv4_conv_small", "mobileone_s0",
    "mobilevit_xxs", "mobilevitv2_050", "nf_resnet26", "poolformer_s12", "pvt_v2_b0",
    "regnety_002", "repvgg_a0", "resnest14d", "resnet10t", "rexnet_100", "skresnet18",
    "starnet_s1", "tiny_vit_5m_224", "tinynet_e",
)  # fmt: skip


def _timm() -> list[Network]:
    def builder(name: str) -> Callable[[], nn.Module]:
        size = {"img_size": 64} if name in _TIMM_SIZED else {}

        def build() -> nn.Module:
            import timm

            network: nn.Module = timm.create_model(name, num_classes=CLASSES, **size)
            return network

        return build

    shapes = {name: (3, size, size) for name, size in _TIMM_FIXED.items()}
    return [
        Network(name, "timm", builder(name), Task(shapes.get(name, (3, 64, 64))))
        for name in _TIMM
    ]


_WORDS = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER = {**_WORDS, **_SIZES, "num_key_value_heads": 2}
_IMAGES = {"image_size": 64, "patch_size": 16, "num_labels": CLASSES}
_BOTH_SIDES = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}
_LANGUAGE, _TEXTS, _PICTURES = Words(), Words(classes=CLASSES), Pictures((3, 64, 64))
# Name: architecture, head, settings, task.
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], Task]] = {
    "albert": (
        "Albert",
        "ForMaskedLM",
        {**_WORDS, **_SIZES, "embedding_size": 16},
        _LANGUAGE,
    ),
    "bart": (
        "Bart",
        "ForConditionalGeneration",
        {**_WORDS, **_BOTH_SIDES, "d_model": 32, "decoder_start_token_id": 1},
        _LANGUAGE,
    ),
    "beit": ("Beit", "ForImageClassification", {**_SIZES, **_IMAGES}, _PICTURES),
    "bert": (
        "Bert",
        "ForSequenceClassification",
        {**_WORDS, **_SIZES, "num_labels": CLASSES},
        _TEXTS,
    ),
    "bloom": (
        "Bloom",
        "ForCausalLM",
        {**_WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        _LANGUAGE,
    ),
    "convnext": (
        "ConvNext",
        "ForImageClassification",
        {
            **_IMAGES,
            "patch_size": 4,
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1, 1, 2, 1],
        },
        _PICTURES,
    ),
    "deberta_v2": ("DebertaV2", "ForMaskedLM", {**_WORDS, **_SIZES}, _LANGUAGE),
    "distilbert": (
        "DistilBert",
        "ForMaskedLM",
        {**_WORDS, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        _LANGUAGE,
    ),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {**_WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4},
        _LANGUAGE,
    ),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", {**_WORDS, **_SIZES}, _LANGUAGE),
    "llama": ("Llama", "ForCausalLM", _DECODER, _LANGUAGE),
    "mamba": (
        "Mamba",
        "ForCausalLM",
        {**_WORDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        _LANGUAGE,
    ),
    "mistral": ("Mistral", "ForCausalLM", _DECODER, _LANGUAGE),
    "mixtral": (
        "Mixtral",
        "ForCausalLM",
        {**_DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
        _LANGUAGE,
    ),
    "opt": (
        "OPT",
        "ForCausalLM",
        {
            **_WORDS,
            **_SIZES,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 16,
        },
        _LANGUAGE,
    ),
    "qwen2": ("Qwen2", "ForCausalLM", _DECODER, _LANGUAGE),
    "roberta": ("Roberta", "ForMaskedLM", {**_WORDS, **_SIZES}, _LANGUAGE),
    "swin": (
        "Swin",
        "ForImageClassification",
        {
            **_IMAGES,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        _PICTURES,
    ),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        {
            **_WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 1,
        },
        _LANGUAGE,
    ),
    "vit": ("ViT", "ForImageClassification", {**_SIZES, **_IMAGES}, _PICTURES),
}


def _transformers() -> list[Network]:
    def builder(
        kind: str, head: str, settings: dict[str, Any]
    ) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            import transformers

            config = getattr(transformers, f"{kind}Config")(**settings)
            network: nn.Module = getattr(transformers, f"{kind}{head}")(config)
            return network

        return build

    return [
        Network(name, "transformers", builder(*rest), task)
        for name, (*rest, task) in _TRANSFORMERS.items()
    ]


#: Functions that list the networks of each library.
LIBRARIES = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}


def catalogue() -> list[Network]:
    """List all networks whose library is installed, the small ones first."""
    installed = [list_of for name, list_of in LIBRARIES.items() if is_installed(name)]
    found = [network for list_of in installed for network in list_of()]
    return sorted(found, key=lambda network: network.weights)
