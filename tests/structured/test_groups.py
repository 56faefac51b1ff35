"""Groups are what is tied; what cannot be removed exactly stays out, with a reason."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coupled_networks import NETWORKS, build, conv_norm, images, pooled, scramble
from hand_groups import network_size
from torch import Tensor, nn

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.structured import tracing
from lightning_woodfisher.structured.graph.coupling import Coupling, find_groups
from lightning_woodfisher.structured.graph.groups import (
    Group,
    Member,
    channel_masks,
    masked_parameters,
    zero_structures,
)
from lightning_woodfisher.structured.shrink.removal import shrink
from lightning_woodfisher.structured.shrink.removal_check import check_removal
from lightning_woodfisher.structured.tracing import TraceResult, trace_groups
from lightning_woodfisher.weights.masks import Masks

pytest.importorskip("torch_pruning")


def test_inputs_are_moved_to_the_device_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moved: list[Any] = []

    def trace(model: nn.Module, inputs: Any) -> Any:
        moved.append(inputs)
        raise KeyError

    monkeypatch.setattr(tracing, "trace_coupling", trace)
    model = nn.Conv2d(3, 2, 1).to("meta")
    with pytest.raises(KeyError):
        trace_groups(model, {"x": torch.zeros(1, 3, 4, 4), "flag": True})
    assert moved[0]["x"].is_meta
    assert moved[0]["flag"] is True


def producers(traced: TraceResult) -> dict[str, tuple[int, set[str]]]:
    return {
        g.name: (g.size, {m.module for m in g.of_role("producer")})
        for g in traced.groups
    }


def some_of_each(groups: tuple[Group, ...], seed: int) -> dict[str, list[int]]:
    chooser = random.Random(seed)
    return {
        g.name: chooser.sample(range(g.size), chooser.randint(1, g.size - 1))
        for g in groups
    }


def masked_copy(
    model: nn.Module, groups: tuple[Group, ...], chosen: dict[str, list[int]]
) -> nn.Module:
    model = copy.deepcopy(model)
    masks = Masks(masked_parameters(model, groups))
    masks.prune(channel_masks(model, groups, chosen))
    masks.apply()
    return model


# One row per structure size and set of layers that produce it, read off the networks.
EXPECTED: dict[str, dict[str, tuple[int, set[str]]]] = {
    "resnet": {
        "0.0": (6, {"0.0", "2.second.0"}),
        "2.first.0": (6, {"2.first.0"}),
        "3.first.0": (8, {"3.first.0"}),
        "3.second.0": (8, {"3.second.0", "3.shortcut.0", "4.second.0"}),
        "4.first.0": (8, {"4.first.0"}),
    },
    "preact": {
        "0": (6, {"0"}),
        "1.conv1": (8, {"1.conv1"}),
        "1.conv2": (8, {"1.conv2", "1.shortcut", "2.conv2"}),
        "2.conv1": (8, {"2.conv1"}),
    },
    "vgg": {"0": (6, {"0"}), "3": (8, {"3"}), "7": (10, {"7"})},
    "vgg_bn": {"0": (6, {"0"}), "4": (8, {"4"}), "9": (10, {"9"})},
    "mobilenet": {
        "0.0": (6, {"0.0", "2.project.0", "3.project.0"}),
        "2.expand.0": (12, {"2.expand.0", "2.depthwise.0"}),
        "3.expand.0": (12, {"3.expand.0", "3.depthwise.0"}),
    },
    "densenet": {
        "0": (6, {"0"}),
        "1.conv": (4, {"1.conv"}),
        "2.conv": (4, {"2.conv"}),
        "3.conv": (4, {"3.conv"}),
        "5": (8, {"5"}),
    },
    "token_mlp": {"fc1": (12, {"fc1"})},
    "twice": {"stem": (6, {"stem", "again"})},
    "tied": {"one": (6, {"one", "other"})},
    "sum_of_concatenation": {
        "six.0": (6, {"six.0", "ten.0"}),
        "four.0": (4, {"four.0", "ten.0"}),
    },
    "gated": {"stem.0": (8, {"stem.0", "excite"}), "squeeze": (4, {"squeeze"})},
    "grouped": {"0.0": (4, {"0.0"}), "2.0": (2, {"2.0"})},
    "depth_multiplier": {"0.0": (4, {"0.0", "2.0"})},
    "transposed": {"0": (6, {"0"}), "2": (8, {"2"})},
    "prelu_instance_norm": {"0": (6, {"0"}), "3": (8, {"3"})},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_is_removed(name: str) -> None:
    model = build(name)
    traced = trace_groups(model, images())
    assert producers(traced) == EXPECTED[name]
    before = model(images())
    for seed in range(3):
        chosen = some_of_each(traced.groups, seed)
        masked = masked_copy(model, traced.groups, chosen)
        found = {
            n: s.tolist() for n, s in zero_structures(masked, traced.groups).items()
        }
        assert found == {n: sorted(s) for n, s in chosen.items()}
        removed = copy.deepcopy(model)
        shrink(removed, traced.groups, chosen)
        expected = masked(images())
        assert not torch.allclose(expected, before, atol=1e-4)
        torch.testing.assert_close(removed(images()), expected, rtol=0, atol=1e-10)
        weights = sum(p.numel() for p in removed.parameters())
        assert weights < sum(p.numel() for p in model.parameters())
        # Training goes on: a gradient for everything, whose shape is the weight's.
        removed.train()(images()).square().sum().backward()
        assert all(
            p.grad is not None
            for n, p in removed.named_parameters()
            if n != "again.bias"
        )


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "vgg16_bn", "densenet121", "vit_b_16"]
)
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    if name == "vgg16_bn":
        plan = [4, "M", 8, 8, "M", 8, 8, "M"]
        features = models.vgg.make_layers(plan, batch_norm=True)
        model = models.VGG(features, num_classes=5)
        # The real one, but not its 4096 hidden units.
        model.classifier[0], model.classifier[3] = (
            nn.Linear(8 * 49, 24),
            nn.Linear(24, 16),
        )
        model.classifier[6] = nn.Linear(16, 5)
    elif name == "vit_b_16":
        model = models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    elif name == "densenet121":
        model = models.DenseNet(4, (3, 3, 3), 8, num_classes=5)
    else:
        model = models.mobilenet_v2(width_mult=0.25, num_classes=5)
    expected = {
        "mobilenet_v2": 24,
        "vgg16_bn": 7,
        "densenet121": 21,
        "vit_b_16": 4,
    }
    scramble(model.double().eval())
    batch = images(size=32)
    traced = trace_groups(model, batch[:1])
    assert len(traced.groups) == expected[name]
    chosen = some_of_each(traced.groups, 0)
    masked = masked_copy(model, traced.groups, chosen)(batch)
    shrink(model, traced.groups, chosen)
    torch.testing.assert_close(model(batch), masked, rtol=0, atol=1e-10)


def test_index_maps() -> None:
    traced = trace_groups(build("densenet"), images())
    second = {(m.name, m.axis): m for m in traced.groups[2].members}
    reader = second["3.conv.weight", 1].structure_of
    # 6 channels of the stem, 4 of the first layer, then those of the second.
    assert reader.tolist() == [-1] * 10 + [0, 1, 2, 3]
    norm = second["4.weight", 0]
    assert norm.role == "norm"
    assert norm.structure_of.tolist() == [-1] * 10 + [0, 1, 2, 3] + [-1] * 4
    assert second["4.running_var", 0].role == "statistics"
    flat = trace_groups(build("vgg"), images()).groups[1].members[-1]
    assert (flat.name, flat.axis, flat.role) == ("7.weight", 1, "consumer")
    assert flat.structure_of.tolist() == [c for c in range(8) for _ in range(4)]
    twice = trace_groups(build("sum_of_concatenation"), images()).groups[1]
    (reader,) = [m for m in twice.members if m.module == "head"]
    assert reader.slices([1]).tolist() == [7, 17]
    grouped = trace_groups(build("grouped"), images()).groups[0]
    assert grouped.members[0].structure_of.tolist() == [0, 1, 2, 3] * 3
    assert grouped.members[-1].structure_of.tolist() == [0, 1, 2, 3]


class Odd(nn.Module):
    """conv, something in between, another conv."""

    def __init__(
        self, between: Any, norm: nn.Module | None = None, reads: int = 8
    ) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), norm
        self.between = between
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.second, self.third = nn.Conv2d(reads, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden if self.norm is None else self.norm(hidden)
        hidden = self.second(self.between(self, x, hidden))
        return self.head(self.third(hidden).mean((2, 3)))


ODD: dict[str, tuple[Any, str]] = {
    "group_norm": (lambda: Odd(lambda m, x, h: h, nn.GroupNorm(4, 8)), "GroupNorm"),
    "not_affine": (
        lambda: Odd(lambda m, x, h: h, nn.BatchNorm2d(8, affine=False)),
        "without weight and bias",
    ),
    "sigmoid": (lambda: Odd(lambda m, x, h: h.sigmoid()), "SigmoidBackward0"),
    "softplus": (lambda: Odd(lambda m, x, h: F.softplus(h)), "SoftplusBackward0"),
    "constant": (lambda: Odd(lambda m, x, h: h + 1), "not the same as zeroing"),
    "softmax": (lambda: Odd(lambda m, x, h: h.softmax(1)), "attention product"),
    "parameter": (lambda: Odd(lambda m, x, h: h * m.scale), "bare nn.Parameter"),
    "input": (lambda: Odd(lambda m, x, h: h + x.repeat(1, 3, 1, 1)[:, :8]), "fails"),
    "chunk": (lambda: Odd(lambda m, x, h: torch.mul(*h.chunk(2, 1)), reads=4), "split"),
    "slice": (lambda: Odd(lambda m, x, h: h[:, 2:], reads=6), "slice of channels"),
    "fixed_sizes": (
        lambda: Odd(
            lambda m, x, h: h.view(-1, 2, 4, 64).sum(1).view(-1, 4, 8, 8), reads=4
        ),
        "",
    ),
    "pad": (lambda: Odd(lambda m, x, h: F.pad(h, (0, 0, 0, 0, 2, 2)), reads=12), ""),
}


@pytest.mark.parametrize("name", ODD)
def test_left_out_with_a_reason(name: str) -> None:
    make, reason = ODD[name]
    torch.manual_seed(0)
    model = make().eval()
    traced = trace_groups(model, images(torch.float32))
    names = [group.name for group in traced.groups]
    assert "first" not in names
    assert reason in traced.left_out["first"]
    assert "third" in names
    assert "output" in traced.left_out["head"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q, self.k = nn.Linear(8, 6), nn.Linear(8, 6)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = self.out(mixed.transpose(1, 2).flatten(2))
        x = (self.q(x) @ self.k(x).transpose(1, 2)) @ x
        return self.fc2(F.gelu(self.fc1(x))).mean(1)


def test_attention_stays_out() -> None:
    torch.manual_seed(0)
    traced = trace_groups(Attention(), torch.randn(2, 5, 8))
    assert producers(traced) == {"fc1": (12, {"fc1"})}
    assert {"qkv", "out", "q", "k", "fc2"} == {*traced.left_out}


def test_check_finds_a_wrong_group() -> None:
    model = build("vgg_bn")
    groups = trace_groups(model, images()).groups
    first = groups[0]
    without_norm = Group(
        "0", first.size, tuple(m for m in first.members if m.role != "norm")
    )
    wrong = check_removal(model, [groups[1], without_norm, groups[2]], images())
    assert [*wrong] == ["0"]
    shifted = [
        Member(m.module, m.tensor, m.axis, m.role, m.structure_of.roll(1))
        if m.role == "consumer"
        else m
        for m in first.members
    ]
    wrong = check_removal(model, [Group("0", 6, tuple(shifted)), *groups[1:]], images())
    assert [*wrong] == ["0"]
    assert "not the same as zeroing" in wrong["0"]
    assert check_removal(model, groups, images()) == {}


class NamedInputs(nn.Module):
    """Keyword arguments, random numbers and a buffer that every call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("resnet", torch.float32).train()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, *, pixels: Tensor, scale: float) -> dict[str, Any]:
        self.calls += 1
        return {"logits": [self.net(pixels * scale + 0 * torch.rand(()))]}


def test_model_is_left_as_it_was() -> None:
    model = NamedInputs()
    model.net[2].eval()
    model.net[:4].requires_grad_(False)
    inputs = {"pixels": images(torch.float32), "scale": 0.5}
    model(**inputs)["logits"][0].sum().backward()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = [
        (t, t.detach().clone(), t.requires_grad, t.grad) for t in tensors.values()
    ]
    grads = [None if g is None else g.clone() for *_, g in before]
    flags = [m.training for m in model.modules()]
    sizes = repr(model)
    random_state = torch.get_rng_state()
    groups = trace_groups(model, inputs).groups
    assert len(groups) == 5
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == flags
    assert repr(model) == sizes
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [*after] == [*tensors]
    for (old, value, trainable, grad), content, now in zip(
        before, grads, after.values(), strict=True
    ):
        assert now is old
        assert torch.equal(now, value)
        assert now.requires_grad is trainable
        assert now.grad is grad
        assert grad is None or torch.equal(grad, content)


def test_reasons_stay_when_channels_unite() -> None:
    layers = {name: nn.Linear(2, 3) for name in ("a", "b", "c")}
    coupling = Coupling(layers)
    a, b, c = (coupling.channel(name, "out", 1) for name in layers)
    coupling.leave_out(c, "why")
    coupling.unite(b, c)
    coupling.unite(a, b)
    assert coupling.reason(a) == coupling.reason(b) == "why"
    assert coupling.reason(coupling.channel("a", "out", 0)) is None
    (rest,) = (g for g in find_groups(coupling) if g.name == "a")
    assert rest.members[0].structure_of.tolist() == [0, -1, 1]


def test_only_and_exclude() -> None:
    model = build("resnet")

    def names(**patterns: list[str]) -> list[str]:
        return [g.name for g in trace_groups(model, images(), **patterns).groups]

    assert names(only=["first"]) == ["2.first.0", "3.first.0", "4.first.0"]
    # A layer that is tied to the one that matches goes along.
    assert names(only=[r"4\.second"]) == ["3.second.0"]
    assert names(exclude=["shortcut", r"^0\."]) == [
        "2.first.0",
        "3.first.0",
        "4.first.0",
    ]
    assert names(only=["Conv2d"], exclude=["^3", "^4"]) == [
        "0.0",
        "2.first.0",
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"only": ["frist"]}, "matches no Conv, Linear or attention"),
        ({"exclude": ["nothing"]}, "matches no Conv, Linear or attention"),
        ({"only": ["("]}, "not a regular expression"),
        ({"only": [r"^7$"]}, "output of the network"),
        ({"only": [r"4\.second"], "exclude": ["shortcut"]}, "pruned together"),
        ({"exclude": ["Conv2d"]}, "no group of channels"),
    ],
)
def test_bad_patterns(patterns: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        trace_groups(build("resnet"), images(), **patterns)


def test_errors_say_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("vgg")
    with pytest.raises(ConfigurationError, match="example_inputs"):
        trace_groups(model, images(size=9)[:, :2])
    with pytest.raises(
        ConfigurationError, match=r"example_inputs: .* no output depends"
    ):
        trace_groups(nn.Sequential(model, Detached()), images())
    with monkeypatch.context() as patch:
        patch.setattr("torch_pruning.DependencyGraph._build_dependency", None)
        message = r"does not know one of its operations \(it failed in build_dependency"
        with pytest.raises(ConfigurationError, match=message):
            trace_groups(model, images())
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ConfigurationError, match=r"lightning-woodfisher\[structured\]"):
        trace_groups(model, images())


class Scaled(nn.Module):
    """Multiplies by a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4, dtype=torch.float64))

    def forward(self, values: Tensor) -> Tensor:
        return values @ self.matrix


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_scripted_modules_are_refused() -> None:
    parts = nn.Conv2d(1, 4, 3), torch.jit.script(nn.ReLU()), nn.Conv2d(4, 2, 3)
    with pytest.raises(
        ConfigurationError, match="scripted modules, such as '1'; build"
    ):
        trace_groups(nn.Sequential(*parts), torch.zeros(1, 1, 8, 8))


def test_no_group_is_explained_once_for_each_reason() -> None:
    norms = [
        part
        for _ in range(5)
        for part in (nn.Linear(4, 4).double(), nn.LayerNorm(4).double())
    ]
    model = nn.Sequential(*norms, Scaled())
    with pytest.raises(ConfigurationError) as caught:
        trace_groups(model, torch.randn(2, 4, dtype=torch.float64))
    assert str(caught.value).endswith(
        " 0, 2, 4 and 2 more: it passes a LayerNorm, whose statistics mix channels; "
        "Scaled is no Conv, Linear or attention layer of torch. Use groups made by "
        "hand, or remove single weights."
    )


def test_a_shuffle_of_channels_leaves_the_rest() -> None:
    models = pytest.importorskip("torchvision.models")
    network = models.shufflenet_v2_x0_5(num_classes=3)
    scramble(network)
    traced = trace_groups(network, images(torch.float32, size=32))
    layers = {layer for group in traced.groups for layer in group.layers}
    # The channels between the layers of a branch, which no shuffle reaches.
    assert {"stage2.1.branch2.0", "stage4.3.branch2.0"} <= layers
    # Its outputs are shuffled.
    assert "stage2.1.branch2.5" in traced.left_out


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Gained(nn.Conv2d):
    """Scales its filters, as the convolutions of networks without norms."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self._conv_forward(pixels, self.weight * self.gain, self.bias)


def test_layers_with_other_parameters_stay() -> None:
    model = nn.Sequential(Gained(3, 6), nn.Conv2d(6, 8, 3), *pooled(8))
    traced = trace_groups(model, images(torch.float32))
    assert [group.name for group in traced.groups] == ["1"]
    assert (
        traced.left_out["0"]
        == "it passes a Gained with the parameter 'gain' of its own"
    )


def test_layers_with_computed_weights_stay() -> None:
    torch.manual_seed(0)
    middle = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3))
    model = nn.Sequential(nn.Conv2d(3, 6, 3), middle, nn.Conv2d(8, 6, 3), *pooled(6))
    pixels = images(torch.float32)
    traced = trace_groups(model, pixels)
    assert producers(traced) == {"2": (6, {"2"})}
    assert "computed from other tensors" in traced.left_out["0"]
    assert "computed from other tensors" in traced.left_out["1"]
    size = network_size(model, traced.groups, lambda: model(pixels), len(pixels))
    removed = {"2": torch.tensor([0, 3])}
    # 6 · 6 positions of 3 · 9 weights, 4 · 4 of the computed weight's 6 · 9 and 2 · 2 of
    # 8 · 9, and one of the last layer's.
    stays = 36 * 6 * 27 + 16 * 8 * 54
    assert size.dense_macs == stays + 4 * 6 * 72 + 6 * 4
    assert size.macs(removed) == stays + 4 * 4 * 72 + 4 * 4
    assert size.parameters(removed) == size.dense_parameters - 2 * (72 + 1 + 4)


def test_layers_with_complex_weights_stay() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 6, dtype=torch.cfloat)
            self.second = nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = self.first(torch.fft.fft(x))
            return self.head(torch.relu(self.second(spectrum.abs())))

    torch.manual_seed(0)
    traced = trace_groups(Spectrum(), torch.randn(2, 8))
    assert producers(traced) == {"second": (5, {"second"})}
    assert traced.left_out["first"] == "its weights are complex"


def test_what_training_mode_alone_uses_is_reported() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv_norm(3, 6)
            self.tail = nn.Sequential(conv_norm(6, 8), *pooled(8))
            self.extra = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            return (self.tail(x), self.extra(x)) if self.training else self.tail(x)

    torch.manual_seed(0)
    traced = trace_groups(Auxiliary(), images(torch.float32))
    assert "do not reach it" in traced.left_out["extra"]
    assert "fails without its channels" in traced.left_out["stem.0"]
    assert [group.name for group in traced.groups] == ["tail.0.0"]


class Rotary(nn.Module):
    """Attention with rotary positions, and keys and values for two heads each (Llama)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, tokens: Tensor) -> Tensor:  # [n, t, 16]
        n, t, _ = tokens.shape
        layers = self.q, self.k, self.v
        q, k, v = (f(tokens).view(n, t, -1, 4).transpose(1, 2) for f in layers)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (x[:, :, None].expand(n, 2, 2, t, 4).reshape(n, 4, t, 4) for x in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        tokens = tokens + self.o(mixed.reshape(n, t, 16))
        return tokens + self.down(F.relu(self.up(tokens)))

    def rotate(self, heads: Tensor) -> Tensor:
        return heads + torch.cat([-heads[..., 2:], heads[..., :2]], -1)


@pytest.mark.timeout(60)
def test_index_maps_that_do_not_fit_together_end() -> None:
    traced = trace_groups(Rotary(), torch.randn(2, 3, 16))
    assert [group.layers for group in traced.groups] == [("up",)]
    assert traced.left_out.keys() == {"q", "k", "v", "o", "down"}
