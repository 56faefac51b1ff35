"""Files of pruned networks: every bit comes back, sizes shrink, damage is noticed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_woodfisher.base.errors import ConfigurationError
from lightning_woodfisher.export import (
    compare_speed,
    export_onnx,
    export_program,
    load_sparse,
    onnx_and_torch_export,
    read_metadata,
    save_dense,
    save_sparse,
    semi_structured,
    strip_prefix,
    to_semi_structured,
)
from lightning_woodfisher.export.bitmask import pack, unpack

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16),
    *(torch.bool, torch.complex64),
)


def raw(tensor: Tensor) -> bytes:
    """The bits of a tensor, by numpy and not by what is tested."""
    if tensor.numel() == 0:
        return b""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        found = other[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert raw(found) == raw(tensor), name


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Random bits (NaNs, infinities, -0.0 and denormals among them), a share of zeros."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    size = math.prod(shape)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    limit = 2 if dtype == torch.bool else 256
    values = random.integers(0, limit, (size, dtype.itemsize), dtype=np.uint8)
    values[random.random(size) < draw(st.sampled_from([0.0, 0.3, 0.95, 1.0]))] = 0
    negative = random.random(size) < draw(st.sampled_from([0.0, 0.2]))
    if dtype.is_floating_point:
        values[negative] = [*[0] * (dtype.itemsize - 1), 0x80]
    flat = torch.from_numpy(values.reshape(-1).copy())
    return flat.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


@settings(max_examples=40)
@given(state=st.dictionaries(st.text(max_size=5), tensors(), max_size=4))
def test_every_bit_comes_back(
    state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_sparse(state, path)
    assert_same(state, load_sparse(path))


@settings(max_examples=40)
@given(tensor=tensors())
def test_bits_and_values_are_those_of_a_loop(tensor: Tensor) -> None:
    bits, values = pack(tensor)
    items = [raw(tensor.reshape(-1)[i : i + 1]) for i in range(tensor.numel())]
    expected = bytearray(math.ceil(tensor.numel() / 8))
    for i, item in enumerate(items):
        if any(item):
            expected[i // 8] |= 1 << i % 8
    assert bits.numpy().tobytes() == bytes(expected)
    assert raw(values) == b"".join(item for item in items if any(item))
    assert_same({"": tensor}, {"": unpack(bits, values, tensor.shape)})


def test_bits_behind_the_last_element_are_refused() -> None:
    bits, values = torch.tensor([0b1001], dtype=torch.uint8), torch.ones(2)
    assert unpack(bits, values, (4,)).tolist() == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="2 values do not fit the bits"):
        unpack(bits, values, (3,))


def test_special_values_are_no_zeros(tmp_path: Path) -> None:
    weight = torch.zeros(40, 40)
    weight[0, :6] = torch.tensor([-0.0, math.nan, -math.inf, 1e-45, -math.nan, 2.0])
    summary = save_sparse({"w": weight}, tmp_path / "w.safetensors")
    (entry,) = summary.tensors
    assert (entry.storage, entry.zeros) == ("sparse", 1594)
    assert entry.written_bytes == 1600 // 8 + 6 * 4
    found = load_sparse(tmp_path / "w.safetensors")
    assert_same({"w": weight}, found)
    assert math.copysign(1.0, found["w"][0, 0]) == -1.0


def sizes(*shapes: tuple[int, ...], zeros: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, shape in enumerate(shapes):
        tensor = torch.randn(shape, generator=generator)
        tensor[torch.rand(shape, generator=generator) < zeros] = 0.0
        state[f"layer{number}.weight"] = tensor
    return state


@pytest.mark.parametrize("zeros", [0.0, 0.02, 0.04, 0.5, 0.95])
def test_a_tensor_is_sparse_only_where_that_is_smaller(
    zeros: float, tmp_path: Path
) -> None:
    state = sizes((300, 200), (6, 6), zeros=zeros)
    summary = save_sparse(state, tmp_path / "sparse.safetensors")
    safetensors.torch.save_file(state, tmp_path / "dense.safetensors")
    large, small = summary.tensors
    # One bit in 32 has to be saved.
    assert large.storage == ("sparse" if zeros > 1 / 32 else "dense")
    assert small.storage == "dense"
    dense = (tmp_path / "dense.safetensors").stat().st_size
    assert summary.file_bytes == (tmp_path / "sparse.safetensors").stat().st_size
    pruned = sum(int((t == 0).sum()) for t in state.values())
    saved = pruned * 4 - 300 * 200 / 8
    # What is left for headers.
    assert abs(summary.file_bytes - (dense - max(0, saved))) < 1000
    assert summary.dense_bytes == (300 * 200 + 36) * 4
    assert summary.zeros == pruned


def test_shared_memory_is_written_once_and_shared_again(tmp_path: Path) -> None:
    weight = sizes((64, 32), zeros=0.9)["layer0.weight"]
    rows = torch.randn(20, 20).t()
    state = {
        "slice": weight[4:9, 3:7],
        "encoder": weight,
        "decoder": weight,
        "transposed": weight.t(),
        "channels_last": rows,
        "tied_channels_last": rows,
        # Its owner comes back contiguous, with another order of elements in memory.
        "part_of_channels_last": rows[:3],
        "own": weight.clone(),
    }
    summary = save_sparse(state, tmp_path / "tied.safetensors")
    found = load_sparse(tmp_path / "tied.safetensors")
    assert_same(state, found)
    stored = {t.name: t.storage for t in summary.tensors}
    assert [name for name, storage in stored.items() if storage == "shared"] == [
        "slice",
        "decoder",
        "transposed",
        "tied_channels_last",
    ]
    assert summary.dense_bytes == (2 * 64 * 32 + 400 + 60) * 4
    found["encoder"].fill_(7.0)
    assert all((found[n] == 7).all() for n in ("slice", "decoder", "transposed"))
    assert not (found["own"] == 7).any()


def test_names_of_bits_do_not_collide(tmp_path: Path) -> None:
    state = sizes((64, 32), zeros=0.9)
    state = {
        "w.bits": torch.ones(2),
        "w": state["layer0.weight"],
        "w.values_": torch.ones(1),
        "w.values": torch.ones(3),
    }
    save_sparse(state, tmp_path / "w.safetensors")
    assert_same(state, load_sparse(tmp_path / "w.safetensors"))


def test_metadata_and_what_a_plain_reader_sees(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "w.safetensors"
    save_sparse(sizes((64, 32), zeros=0.9), path, {"epoch": "3"})
    assert read_metadata(path) == {"epoch": "3"}
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["woodfisher.format"] == "lightning-woodfisher-sparse"
    assert header["woodfisher.version"] == "1"
    plain = safetensors.torch.load_file(path)
    assert set(plain) == {"layer0.weight.bits", "layer0.weight.values"}
    assert [file.name for file in path.parent.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("state", "part"),
    [
        ({"steps": 3}, "'steps'.*is of type int, not a tensor; leave it out"),
        ({"w": torch.zeros(2, device="meta")}, "meta device"),
        ({"w": torch.eye(2).to_sparse()}, "to_dense"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "dtype torch.complex128"),
        ({"__metadata__": torch.zeros(2)}, "rename it"),
    ],
)
def test_what_cannot_be_saved(state: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=part):
        save_sparse(state, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "part"),
    [({"epoch": 3}, "is not text"), ({"woodfisher.x": "3"}, "choose another name")],
)
def test_metadata_is_text(metadata: Any, part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=part):
        save_sparse({}, tmp_path / "w.safetensors", metadata)


def test_a_file_that_is_replaced_survives_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = tmp_path / "w.safetensors", sizes((64, 32), zeros=0.9)
    save_sparse(state, path)

    def fail(tensors: object, file: Path, header: object) -> None:
        file.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_sparse({}, path)
    assert_same(state, load_sparse(path))
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- damaged files


def rewrite(path: Path, **changes: Any) -> None:
    """Change the header of a safetensors file by hand."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    ours = header["__metadata__"]
    layout = json.loads(ours["woodfisher.layout"])
    for key, value in changes.items():
        if key == "layout":
            value(layout)
        else:
            ours[f"woodfisher.{key}"] = value
    if not isinstance(changes.get("layout"), str):
        ours["woodfisher.layout"] = json.dumps(layout)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    weight = sizes((64, 32), zeros=0.9)["layer0.weight"]
    save_sparse({"w": weight, "part": weight[:3], "bias": torch.ones(5)}, path)
    return path


def test_a_cut_off_file(file: Path) -> None:
    content = file.read_bytes()
    for length in [0, 3, 8, 100, len(content) // 2, len(content) - 1]:
        file.write_bytes(content[:length])
        with pytest.raises(ConfigurationError, match="or it is cut off"):
            load_sparse(file)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(ConfigurationError, match="is not a file"):
        load_sparse(path)
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ConfigurationError, match="is not a safetensors file"):
        load_sparse(path)
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ConfigurationError, match=r"safetensors\.torch\.load_file"):
        load_sparse(path)


def test_a_later_version_is_refused(file: Path) -> None:
    rewrite(file, version="2")
    with pytest.raises(ConfigurationError, match="version 2.*Update"):
        load_sparse(file)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_sparse({"w": torch.ones(3)}, tmp_path / "w.safetensors")
        save_dense({"w": torch.ones(3)}, tmp_path / "w.pt")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_rewriting_alone_changes_nothing(file: Path) -> None:
    before = load_sparse(file)
    rewrite(file)
    assert_same(before, load_sparse(file))


@pytest.mark.parametrize(
    "change",
    [
        {"version": "one"},
        {"version": "-1"},
        {"version": "0"},
        {
            "layout": lambda layout: layout["views"]["part"].update(
                shape=[2**40], stride=[0]
            )
        },
        {
            "layout": lambda layout: layout["views"]["part"].update(
                shape=[2**62, 2**62], stride=[0, 0]
            )
        },
        {
            "layout": lambda layout: (
                layout["sparse"].update(v=layout["sparse"]["w"]),
                layout["order"].append("v"),
            )
        },
        {"layout": lambda layout: layout["order"].append("bias")},
        {"layout": lambda layout: layout["sparse"]["w"].update(shape=[64, 64])},
        {"layout": lambda layout: layout["sparse"]["w"].update(shape=[-64, -32])},
        {"layout": lambda layout: layout["sparse"]["w"].update(shape="64")},
        {"layout": lambda layout: layout["sparse"]["w"].update(shape=[0, 2**70])},
        {"layout": lambda layout: layout["sparse"]["w"].update(values="bias")},
        {"layout": lambda layout: layout["sparse"]["w"].update(bits="absent")},
        {"layout": lambda layout: layout["sparse"]["w"].pop("bits")},
        {"layout": lambda layout: layout["order"].append("absent")},
        {"layout": lambda layout: layout.pop("views")},
        {"layout": lambda layout: layout["views"]["part"].update(offset=64 * 32 - 5)},
        {"layout": lambda layout: layout["views"]["part"].update(stride=[-1, 1])},
        {"layout": lambda layout: layout["views"]["part"].update(owner="absent")},
        {"layout": lambda layout: layout["views"]["part"].update(size=3)},
    ],
)
def test_a_layout_that_does_not_fit(change: dict[str, Any], file: Path) -> None:
    rewrite(file, **change)
    with pytest.raises(
        ConfigurationError, match=r"w\.safetensors (is damaged|is not a)"
    ):
        load_sparse(file)


@given(data=st.data())
def test_whatever_bytes_change_no_other_error_is_raised(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    weight = sizes((64, 32), zeros=0.9)["layer0.weight"]
    save_sparse({"w": weight, "part": weight[:3], "bias": torch.ones(5)}, path)
    content = bytearray(path.read_bytes())
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        content[place] = data.draw(st.sampled_from(b'0179-,:"[]{}e \xff'))
    path.write_bytes(bytes(content))
    # No other error, and no tensor of another size: what is changed in the values
    # themselves cannot be noticed.
    with contextlib.suppress(ConfigurationError):
        assert sum(t.numel() for t in load_sparse(path).values()) < 10_000


def test_a_flipped_bit_of_the_mask_is_noticed(file: Path) -> None:
    before, content = load_sparse(file), bytearray(file.read_bytes())
    bits, _ = pack(before["w"])
    place = content.index(bits.numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ConfigurationError, match="values do not fit the bits"):
        load_sparse(file)


@pytest.mark.parametrize("module", ["safetensors", "safetensors.torch"])
def test_the_extra_is_named(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=r"lightning-woodfisher\[export\]"):
        save_sparse({}, tmp_path / "a") if "." in module else load_sparse(tmp_path)


def test_a_pruned_resnet50_takes_less_than_an_eighth(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "export" / "sizes.py"
    spec = importlib.util.spec_from_file_location("sizes_of_export", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    # It fails when a bit differs.
    zeros, _, _, share, *_ = example.measure(0.95, 1, tmp_path)
    assert zeros == "95%"
    assert 8.0 < float(share.rstrip("%")) < 12.0


# ---------------------------------------------------------------- dense


def test_dense_state_of_the_bare_network(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    wrapped = nn.ModuleDict({"net": network, "network": nn.Linear(2, 2)})
    for prefix in ("net", "net."):
        part = strip_prefix(wrapped.state_dict(), prefix)
        assert_same(dict(network.state_dict()), part)
    save_dense(part, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=True)
    assert type(loaded) is dict
    assert_same(part, loaded)
    fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    fresh.load_state_dict(loaded)
    with pytest.raises(
        ConfigurationError, match=r"Did you mean 'net'\? Submodules: net, n"
    ):
        strip_prefix(wrapped.state_dict(), "nett")


# ---------------------------------------------------------------- graphs


class Network(nn.Module):
    """Convolution, BatchNorm and dropout; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = F.relu(self.norm(self.conv(x))).flatten(1)
        return {"logits": self.head(self.drop(hidden)), "hidden": hidden}


def make_network() -> Network:
    torch.manual_seed(0)
    model = Network()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.train()


@pytest.fixture
def network() -> Network:
    return make_network()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 2, 5, 5, generator=torch.Generator().manual_seed(batch))


def reference(network: Network, inputs: Tensor) -> list[Tensor]:
    training = network.training
    with torch.no_grad():
        outputs = network.eval()(inputs)
    network.train(training)
    return [outputs["logits"], outputs["hidden"]]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as ONNX; it stayed as it was."""
    network = make_network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    with pytest.MonkeyPatch.context() as patch:
        # As if it were too large for a single file.
        patch.setattr(onnx_and_torch_export, "_MAX_PROTOBUF_BYTES", 100)
        assert export_onnx(network, images(2), path, dynamic_batch=True) < 1e-5
    assert network.training
    assert network.drop.training
    assert_same(before, dict(network.state_dict()))
    return path


def test_onnx_runs_with_any_batch(network: Network, onnx_file: Path) -> None:
    assert {file.name for file in onnx_file.parent.iterdir()} == {
        "net.onnx",
        "net.onnx.data",
    }
    onnx.checker.check_model(onnx.load(onnx_file), full_check=True)
    session = onnxruntime.InferenceSession(
        onnx_file, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    for batch in (1, 2, 7):
        found = session.run(None, {name: images(batch).numpy()})
        for one, other in zip(found, reference(network, images(batch)), strict=True):
            assert np.allclose(one, other.numpy(), atol=1e-5)


def test_outputs_that_differ_are_refused(
    network: Network,
    onnx_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The converter is replaced by one that writes the weights of another network."""

    def convert(program: object, path: Path, external: bool) -> None:
        shutil.copytree(onnx_file.parent, path.parent, dirs_exist_ok=True)

    monkeypatch.setattr(onnx_and_torch_export, "_convert", convert)
    with torch.no_grad():
        network.head.bias[1] += 0.25
    with pytest.raises(ConfigurationError, match=r"differ .* by 0\.25, more than"):
        export_onnx(network, images(2), tmp_path / "net.onnx", tolerance=0.2)
    assert not list(tmp_path.iterdir())
    found = export_onnx(network, images(2), tmp_path / "net.onnx", tolerance=0.3)
    assert found == pytest.approx(0.25, abs=1e-4)


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class DynamicCache:
    """What causal models of Hugging Face return for generation."""


class Caching(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, DynamicCache]:
        return x, DynamicCache()


def test_a_cache_for_generation_names_its_switch(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"set model\.config\.use_cache = False"
    ):
        export_program(Caching(), torch.rand(3), tmp_path / "net.pt2")


def test_an_operator_that_onnx_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="no operator for aten.special_airy_ai"
    ):
        export_onnx(Unknown(), torch.rand(3), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    assert export_program(Unknown(), torch.rand(3), tmp_path / "net.pt2") == 0.0


def test_a_forward_that_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="must not branch on values"):
        export_program(Branching(), torch.rand(3), tmp_path / "net.pt2")
    with pytest.raises(ConfigurationError, match="ModuleDict has no forward"):
        export_program(nn.ModuleDict(), torch.rand(3), tmp_path / "net.pt2")
    with pytest.raises(
        ConfigurationError, match="of Linear fails on the example .* shapes"
    ):
        export_program(nn.Linear(3, 2), torch.rand(2, 4), tmp_path / "net.pt2")
    with pytest.raises(ConfigurationError, match="treats 1 as a constant"):
        export_program(
            nn.Linear(3, 2), torch.rand(1, 3), tmp_path / "net.pt2", dynamic_batch=True
        )
    with pytest.raises(ConfigurationError, match=r"must end in \.pt2"):
        export_program(nn.Linear(3, 2), torch.rand(1, 3), tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


def test_a_program_reloads_equal(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    assert export_program(network, [images(2)], path, dynamic_batch=True) == 0.0
    assert network.drop.training
    loaded = torch.export.load(path).module()
    for batch in (2, 5):
        logits, hidden = reference(network, images(batch))
        found = loaded(images(batch))
        assert torch.equal(found["logits"], logits)
        assert torch.equal(found["hidden"], hidden)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


# ---------------------------------------------------------------- 2:4


def two_of_four(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight[:, 1::4] = layer.weight[:, 2::4] = 0.0
    return layer


def test_the_row_that_is_not_two_of_four_is_named() -> None:
    model = nn.Sequential(two_of_four(nn.Linear(16, 8)), two_of_four(nn.Linear(8, 8)))
    with torch.no_grad():
        model[1].weight[3, 5] = 1.0
    with pytest.raises(ConfigurationError) as caught:
        to_semi_structured(model)
    message = str(caught.value)
    assert "1 is not 2:4: row 3 has 3 nonzero weights" in message
    assert "columns 4 to 7, and 1 of 16 groups" in message
    assert 'selection.pattern="2:4"' in message
    # Layer 1 may stay dense; then the device is what is wrong.
    with pytest.raises(ConfigurationError, match=r"0 is on cpu: 2:4 products need"):
        to_semi_structured(model, exclude=["^1$"])


@pytest.mark.parametrize(
    ("model", "exclude", "part"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 1)), [], "Convolutions stay dense"),
        (nn.Sequential(nn.Linear(6, 4)), [], "6 inputs, not a multiple of 4"),
        (nn.Sequential(nn.Linear(8, 4)), ["("], "not a regular expression"),
    ],
)
def test_what_has_no_two_of_four_form(
    model: nn.Module, exclude: list[str], part: str
) -> None:
    with pytest.raises(ConfigurationError, match=part):
        to_semi_structured(model, exclude)


def test_an_old_gpu_and_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    weight: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(ConfigurationError, match=r"V100 has compute capability 7\.0"):
        semi_structured._check_device("fc", weight)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigurationError, match=r"fc is torch\.float32: convert"):
        semi_structured._check_device("fc", weight)
    weight.dtype = torch.bfloat16
    semi_structured._check_device("fc", weight)


def test_conversion_takes_all_layers_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is replaced: what is tested is which layers get its result."""
    model = nn.Sequential(two_of_four(nn.Linear(8, 8)), nn.Conv2d(1, 1, 1))
    model.append(two_of_four(nn.Linear(8, 4))).append(two_of_four(nn.Linear(8, 8)))
    model[3].weight = model[0].weight
    refused = [4]

    def convert(weight: Tensor) -> Tensor:
        if weight.shape[0] in refused:
            raise RuntimeError("shape is not supported")
        return weight * 2

    monkeypatch.setattr(semi_structured, "_check_device", lambda name, weight: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", convert)
    weights = [model[i].weight for i in (0, 2, 3)]
    with pytest.raises(
        ConfigurationError, match=r"^2: the kernels do not support.*exclude"
    ):
        to_semi_structured(model)
    assert all(model[i].weight is w for i, w in zip((0, 2, 3), weights, strict=True))
    refused.clear()
    assert to_semi_structured(model) == ["0", "2", "3"]
    assert torch.equal(model[2].weight, weights[1] * 2)
    assert model[0].weight is model[3].weight
    assert not model[0].weight.requires_grad


def test_the_speed_needs_a_gpu_and_is_a_median(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="no GPU is available"):
        compare_speed(layer, layer, [torch.rand(1, 8)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    passes: list[str] = []
    times = {"dense": iter([*[99.0] * 10, 4.0, 4.0, 50.0]), "sparse": iter([2.0] * 13)}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        synchronize = record

        def elapsed_time(self, end: Event) -> float:
            return next(times[passes[-1]])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    dense: Any = lambda x: passes.append("dense")  # noqa: E731
    sparse: Any = lambda x: passes.append("sparse")  # noqa: E731
    found = compare_speed(dense, sparse, [torch.rand(1, 8)], calls=3)
    assert (found.dense_ms, found.sparse_ms, found.speedup) == (4.0, 2.0, 2.0)
    assert passes[20:] == ["dense", "sparse"] * 3
