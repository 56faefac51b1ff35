"""The maps of the code name what exists, and the skeletons of CONTRIBUTING.md work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from documentation import ROOT, read_blocks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_woodfisher import FisherConfig, prune
from lightning_woodfisher.criteria import register_criterion

PACKAGE = ROOT / "lightning_woodfisher"
CONTRIBUTING, README = ROOT / "CONTRIBUTING.md", ROOT / "README.md"


def table(page: Path, header: str) -> list[list[str]]:
    """Return the cells of the rows below a header."""
    rows = page.read_text().partition(f"{header} |\n")[2].partition("\n\n")[0]
    cells = [row.strip("| ").split(" | ") for row in rows.splitlines()[1:]]
    assert len(cells) > 8
    return cells


def paths(cell: str) -> list[str]:
    return re.findall(r"`([a-z_/]+(?:\.py|/))`", cell)


def test_the_maps_name_every_folder_and_no_other() -> None:
    contributing = table(CONTRIBUTING, "| in `lightning_woodfisher/` | what it is for")
    named = [path for place, _ in contributing for path in paths(place)]
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert set(named) == folders | {"one_shot.py"}
    assert len(named) == len(set(named))
    # Parts of a folder, in its description.
    for place, text in contributing:
        for part in paths(text):
            assert (PACKAGE / paths(place)[0] / part).exists(), part

    readme = table(README, "| you look for | in `lightning_woodfisher/`")
    found = [path for row in readme for path in paths(row[1])]
    assert len(found) > 10
    assert [path for path in found if not (PACKAGE / path).exists()] == []


def test_the_files_and_tests_of_the_text_exist() -> None:
    text = CONTRIBUTING.read_text()
    named = set(re.findall(r"`((?:[\w.]+/)+(?:[\w.]+)?)`", text)) - {"dist/"}
    assert len(named) > 30
    roots = (ROOT, PACKAGE, PACKAGE / "structured")
    absent = [n for n in named if not any((root / n).exists() for root in roots)]
    assert absent == []


def skeleton(name: str) -> Any:
    """Run the block that defines a name, and return what it defines."""
    (block,) = [
        block
        for block in read_blocks(CONTRIBUTING)
        if block.language == "python"
        and re.search(rf"^(class|def) {name}\b", block.text, re.M)
    ]
    names: dict[str, Any] = {}
    exec(compile(block.text, str(block), "exec"), names)
    return names[name]


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 2, 6, 6, generator=generator)
    return inputs, inputs.flatten(1)[:, :3].argmax(dim=1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 3))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


@pytest.mark.usefixtures("own_criteria")
def test_the_skeleton_of_a_criterion_prunes_by_its_score() -> None:
    register_criterion("skeleton", skeleton("FirstOrder"))
    model, before = network(), network()
    fisher = FisherConfig(num_gradients=12, gradient_batch_size=1)
    report = prune(
        model,
        TensorDataset(*images()),
        loss,
        target_sparsity=0.5,
        criterion="skeleton",
        fisher=fisher,
    )
    loss(before, images()).backward()
    layers = [p for p in before.parameters() if p.dim() > 1]
    scores = torch.cat([(p.detach() * p.grad).abs().flatten() for p in layers])
    zeros = torch.cat([p.flatten() == 0 for p in model.parameters() if p.dim() > 1])
    assert report.zeros == int(zeros.sum()) == len(zeros) // 2
    assert float(scores[zeros].max()) <= float(scores[~zeros].min()) * (1 + 1e-4)


def test_the_skeleton_of_a_structured_score_is_the_definition() -> None:
    pytest.importorskip("torch_pruning")
    from lightning_woodfisher.data.losses import FunctionLoss
    from lightning_woodfisher.distributed.communicator import Communicator
    from lightning_woodfisher.structured.config import StructureConfig
    from lightning_woodfisher.structured.scores.evaluation import Evaluation
    from lightning_woodfisher.structured.tracing import trace_groups

    model = network()
    groups = trace_groups(model, images()[0][:2]).groups
    config = StructureConfig(num_samples=12, batch_size=4)
    source = FunctionLoss(model, TensorDataset(*images()), loss)
    evaluation = Evaluation(source, groups, config, Communicator())
    with evaluation.session():
        scores = skeleton("score_first_order")(evaluation)

    loss(model, images()).backward()
    expected = [
        (layer.weight.grad * layer.weight).flatten(1).sum(dim=1)
        + layer.bias.grad * layer.bias
        for layer in model
        if isinstance(layer, nn.Conv2d)
    ]
    by_name = torch.cat([expected[("0", "2").index(g.name)] for g in groups])
    torch.testing.assert_close(scores, by_name.abs().double(), rtol=1e-4, atol=1e-7)
