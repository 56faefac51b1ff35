"""Networks whose loss needs ``model.training``: detectors, auxiliary classifiers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coupled_networks import conv_norm, pooled
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_woodfisher import prune_structures
from lightning_woodfisher.data.isolation import isolated
from lightning_woodfisher.data.losses import FunctionLoss, choose_evaluation
from lightning_woodfisher.structured.config import StructureConfig
from lightning_woodfisher.structured.graph.groups import Group
from lightning_woodfisher.structured.graph.inputs import capture_inputs
from lightning_woodfisher.structured.scores.methods import score_structures
from lightning_woodfisher.structured.shrink.removal import shrink
from lightning_woodfisher.structured.tracing import trace_groups
from tests.support.macs import count_macs

pytest.importorskip("torch_pruning")


class Images(Dataset[Any]):
    """Images with one box each."""

    def __init__(self, size: int, count: int = 6) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(count, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        box = torch.tensor([4.0, 4.0, 40.0, 40.0 + index])
        return self.images[index], box, 1 + index % 2


class Auxiliary(nn.Module):
    """A second classifier in training mode, after dropout, and boxes that it needs there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = conv_norm(3, 6), conv_norm(6, 8)
        self.tail = nn.Sequential(*pooled(8))
        self.extra = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 4, 1))
        self.calls: list[bool] = []

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> Any:
        hidden = F.relu(self.mid(F.relu(self.stem(images))))
        self.calls.append(self.training)
        if not self.training:
            return self.tail(hidden)
        assert boxes is not None
        return {"main": self.tail(hidden), "extra": self.extra(hidden).mean((2, 3))}


def auxiliary_loss(model: Any, batch: Sequence[Tensor]) -> Tensor:
    outputs = model(batch[0], batch[1])
    return sum(F.cross_entropy(o, batch[2]) for o in outputs.values())


def make_auxiliary() -> nn.Module:
    torch.manual_seed(0)
    return Auxiliary()


def detection_loss(model: Any, batch: Sequence[Tensor]) -> Tensor:
    images, boxes, labels = batch
    targets = [
        {"boxes": box[None], "labels": label[None]}
        for box, label in zip(boxes, labels, strict=True)
    ]
    losses = model([*images], targets)
    return sum(losses.values())


def detection_inputs(data: Images) -> Any:
    image, box, label = data[0]
    return [image], [{"boxes": box[None], "labels": torch.tensor([label])}]


def make_faster_rcnn() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    backbone = nn.Sequential(conv_norm(3, 6, stride=2), nn.ReLU(), conv_norm(6, 8))
    backbone.out_channels = 8
    torch.manual_seed(0)
    return detection.FasterRCNN(
        backbone,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((16, 32),), ((1.0,),)),
        box_head=detection.faster_rcnn.TwoMLPHead(8 * 49, 12),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(12, 3),
        min_size=64,
        max_size=64,
        rpn_post_nms_top_n_train=10,
        rpn_post_nms_top_n_test=10,
        # As many proposals for all weights, of which one is a box to find.
        box_batch_size_per_image=4,
        box_positive_fraction=0.25,
    )


def make_ssdlite() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    return detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )


def make_retinanet() -> nn.Module:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    return detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )


def make_googlenet() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return models.googlenet(init_weights=False, num_classes=3)


def googlenet_loss(model: Any, batch: Sequence[Tensor]) -> Tensor:
    found = model(batch[0])
    outputs = (found.logits, found.aux_logits1, found.aux_logits2)
    return sum(F.cross_entropy(output, batch[2]) for output in outputs)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "auxiliary": (make_auxiliary, auxiliary_loss, 48),
    "faster_rcnn": (make_faster_rcnn, detection_loss, 64),
    "ssdlite": (make_ssdlite, detection_loss, 320),
    "retinanet": (make_retinanet, detection_loss, 64),
    "googlenet": (make_googlenet, googlenet_loss, 64),
}
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("ssdlite", "retinanet", "googlenet")
]


def inputs_of(name: str, data: Images) -> Any:
    if name == "auxiliary":
        return data.images[:1], torch.zeros(1, 4)
    return data.images[:1] if name == "googlenet" else detection_inputs(data)


@pytest.mark.parametrize("name", ["auxiliary", "faster_rcnn", *SLOW])
def test_channels_go_and_training_goes_on(name: str) -> None:
    make, loss_fn, size = CASES[name]
    model, data = make(), Images(size)
    report, groups = prune_structures(
        model,
        data,
        loss_fn,
        target=0.2,
        config=StructureConfig(labels="true", num_samples=4, batch_size=2),
        example_inputs=inputs_of(name, data),
    )
    assert report.loss_before is not None
    assert report.macs <= 0.8 * report.macs_dense
    assert model.training
    smaller = copy.deepcopy(model)
    shrink(smaller, groups, report.removed)
    batch = torch.utils.data.default_collate([data[0], data[1]])
    with isolated(model, "partial_eval"):
        torch.manual_seed(0)
        expected = loss_fn(model, batch)
    with isolated(smaller, "partial_eval"):
        torch.manual_seed(0)
        found = loss_fn(smaller, batch)
        one = torch.utils.data.default_collate([data[0]])
        assert report.macs == count_macs(lambda: loss_fn(smaller, one))
    assert report.parameters == sum(p.numel() for p in smaller.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    loss_fn(smaller, batch).backward()


def test_layers_that_only_training_uses_keep_their_inputs() -> None:
    model, data = make_auxiliary(), Images(48)
    traced = trace_groups(model, inputs_of("auxiliary", data))
    assert [group.name for group in traced.groups] == ["stem.0"]
    assert "fails without its channels" in traced.left_out["mid.0"]
    # Without boxes it does not run in training mode, so nothing is known of it there.
    traced = trace_groups(model, data.images[:1])
    assert [group.name for group in traced.groups] == ["stem.0", "mid.0"]


def test_only_layers_that_depend_on_the_mode_are_in_evaluation_mode() -> None:
    model = make_auxiliary().train()
    model.mid.eval()
    before = [module.training for module in model.modules()]
    source = FunctionLoss(model, Images(48), auxiliary_loss)
    choose_evaluation(source, 0)
    assert source.evaluation == "partial_eval"
    with source.session("eval"):
        frozen = {type(m) for m in model.modules() if not m.training}
        assert frozen == {nn.BatchNorm2d, nn.Dropout}
    assert [module.training for module in model.modules()] == before
    other = FunctionLoss(
        model, Images(48), lambda m, b: F.cross_entropy(m.tail[0](b[0]), b[2])
    )
    choose_evaluation(other, 0)
    assert other.evaluation == "eval"


def test_the_score_is_that_of_running_statistics_without_dropout() -> None:
    model, data = make_auxiliary().double(), Images(48)
    data.images = data.images.double()
    groups: Sequence[Group] = trace_groups(model, data.images[:1]).groups
    config = StructureConfig(method="sosp_h", num_samples=6, batch_size=6)

    def both_modes(network: Any, batch: Sequence[Tensor]) -> Tensor:
        # The same loss, computed in evaluation mode.
        hidden = F.relu(network.mid(F.relu(network.stem(batch[0]))))
        outputs = network.tail(hidden), network.extra(hidden).mean((2, 3))
        return sum(F.cross_entropy(o, batch[2]) for o in outputs)

    source = FunctionLoss(model, data, auxiliary_loss)
    choose_evaluation(source, 0)
    found = score_structures(source, groups, config).values
    expected = score_structures(FunctionLoss(model, data, both_modes), groups, config)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected.values))


def test_inputs_are_captured_in_that_mode() -> None:
    model = make_auxiliary()
    name, inputs = capture_inputs(FunctionLoss(model, Images(48), auxiliary_loss))
    assert name == ""
    assert [tuple(value.shape) for value in inputs] == [(1, 3, 48, 48), (1, 4)]
