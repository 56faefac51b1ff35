"""Compute losses from a model, its data and a loss function."""

from __future__ import annotations

__all__ = [
    "FunctionLoss",
    "LossSource",
    "choose_evaluation",
    "compute_loss",
    "compute_losses",
    "differentiable_loss",
    "differentiate",
    "graph_nodes",
    "loss_with_graph",
    "map_tensors",
    "refuse_checkpoints",
    "run_loss",
    "scalar_loss",
]

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.loss import _Loss
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from lightning_woodfisher.base.errors import ConfigurationError, PruningError
from lightning_woodfisher.base.host_copy import upload
from lightning_woodfisher.base.types import IsolationMode, ModelMode
from lightning_woodfisher.data.batches import (
    Batches,
    DatasetBatches,
    RepeatableStream,
    loader_batches,
)
from lightning_woodfisher.data.isolation import (
    AUTOCAST_DEVICES,
    derive_seed,
    isolated,
    preserve_random_states,
    seeded,
)
from lightning_woodfisher.data.sampled_labels import UnlabeledBatch, draw_labels
from lightning_woodfisher.distributed.communicator import Communicator
from lightning_woodfisher.distributed.dtensor import is_sharded, reshard

# Gradients that overflow at this loss scale do not overflow because of the scale.
_SMALLEST_LOSS_SCALE = 1.0
_LOSS_SCALE_STEP = 16.0


class LossSource(ABC):
    """A model, its data, and the function that computes the loss of a batch.

    Args:
        model: the network whose gradients are taken.

    Attributes:
        loss_scale: factor by which the loss is multiplied before the backward pass, to
            keep float16 gradients from underflowing.
        predictor: the module that returns logits for the inputs of a batch.
        evaluation: the mode of the model in sessions of mode ``"eval"``.
        usage: how the function of the user is called, to explain its errors.
    """

    usage: str = ""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.predictor = model
        self.loss_scale = 1.0
        self.evaluation: IsolationMode = "eval"

    @abstractmethod
    def batches(
        self, count: int, size: int, seed: int, repeat: bool = False
    ) -> Batches:
        """Choose the mini-batches of one estimate.

        Args:
            count: N.
            size: m.
            seed: different seeds give different samples if the data allows it.
            repeat: whether samples may be repeated if there are fewer than N·m.

        Returns:
            The batches.
        """

    def peek(self) -> Batches | None:
        """Return one mini-batch without reading it, to see how much data there is.

        Returns:
            The batch; None if it is unknown, such as for data that can be read only once.
        """
        return None

    @abstractmethod
    def loss(self, batch: Any, index: int) -> Tensor:
        """Run the model.

        Args:
            batch: from :class:`.Batches`; the labels of an :class:`.UnlabeledBatch` are
                drawn (:func:`.draw_labels`).
            index: index of the batch.

        Returns:
            Scalar tensor with a graph: the mean loss of the batch.
        """

    def loss_scales(self) -> Iterator[float]:
        """Iterate over the loss scale and smaller ones, to try after an overflow.

        Derivatives in float16 may overflow under the scale of the GradScaler.

        Yields:
            Scales in decreasing order.
        """
        scale = self.loss_scale
        yield scale
        while scale > _SMALLEST_LOSS_SCALE:
            scale = max(scale / _LOSS_SCALE_STEP, _SMALLEST_LOSS_SCALE)
            yield scale

    @contextlib.contextmanager
    def session(self, mode: ModelMode) -> Iterator[None]:
        """Set up the model for losses, and restore its state on leaving.

        Args:
            mode: training or evaluation behavior of the layers.

        Yields:
            Nothing.
        """
        with isolated(self.model, self.evaluation if mode == "eval" else mode):
            yield


class FunctionLoss(LossSource):
    """Losses of a plain model, data and function.

    If it is made with autocast on, losses are computed with autocast.

    Args:
        model: the network.
        data: a map-style Dataset of samples, a list of samples whose labels are numbers,
            a tensor, a tuple of tensors ``(inputs, labels)``, a DataLoader, or an iterable
            of batches.
            Only the dataset, the indices of the sampler and the ``collate_fn`` of a
            DataLoader over a map-style dataset are used (:func:`.loader_batches`).
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of the batch.

    Raises:
        ConfigurationError: for tensors of different lengths, and for a loss function of
            PyTorch, which takes outputs and labels.
    """

    usage = (
        "it is called as loss_fn(model, batch), such as "
        "lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
    )

    def __init__(
        self,
        model: nn.Module,
        data: Dataset[Any] | Iterable[Any],
        loss_fn: Callable[[Any, Any], Tensor],
    ) -> None:
        super().__init__(model)
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        if (
            isinstance(loss_fn, _Loss)
            or getattr(loss_fn, "__module__", "") == "torch.nn.functional"
        ):
            raise ConfigurationError(
                f"loss_fn={name} takes outputs and labels, but {self.usage}."
            )
        # Fabric wraps a DataLoader, and gives each rank other batches of it.
        self._data = data = _as_dataset(getattr(data, "_dataloader", data))
        self._loss_fn = loss_fn
        self._autocast = {
            kind: torch.get_autocast_dtype(kind)
            for kind in AUTOCAST_DEVICES
            if torch.is_autocast_enabled(kind)
        }
        self._stream = RepeatableStream(data)  # type: ignore[arg-type]

    def batches(
        self, count: int, size: int, seed: int, repeat: bool = False
    ) -> Batches:
        """Choose samples of a dataset, or read the batches of an iterable in order."""
        data = self._data
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            return DatasetBatches(data, count, size, seed, repeat=repeat)
        if isinstance(data, DataLoader):
            chosen = loader_batches(data, count, size, seed, repeat)
            if chosen is not None:
                return chosen
        return self._stream.batches(count, seed, repeat)

    def peek(self) -> Batches | None:
        """Choose one sample, or the first batch of an iterable."""
        return None if isinstance(self._data, Iterator) else self.batches(1, 1, 0, True)

    def loss(self, batch: Any, index: int) -> Tensor:
        """Call the loss function with the batch on the device of the model."""
        device = next(self.model.parameters()).device
        unlabeled = batch if isinstance(batch, UnlabeledBatch) else None
        batch = map_tensors(
            lambda tensor: upload(tensor, device),
            batch if unlabeled is None else unlabeled.batch,
        )
        with contextlib.ExitStack() as stack:
            for kind, dtype in self._autocast.items():
                # A cache would keep copies of weights that change between losses.
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            batch = draw_labels(self.model, batch, unlabeled)
            result = self._loss_fn(self.model, batch)
        remedy = "return the mean loss of the batch"
        return scalar_loss(result, index, "loss_fn", remedy, batch)

    @contextlib.contextmanager
    def session(self, mode: ModelMode) -> Iterator[None]:
        """Set up the model for losses, and restore its state on leaving.

        Args:
            mode: training or evaluation behavior of the layers.

        Yields:
            Nothing.
        """
        with super().session(mode):
            yield
            self._stream.finish()


def _as_dataset(data: Any) -> Any:
    """Turn a tensor, a tuple of tensors, or a list of samples, into a dataset."""
    if isinstance(data, Tensor):
        return Subset(data, range(len(data)))  # type: ignore[arg-type]
    if isinstance(data, tuple) and any(type(a).__module__ == "numpy" for a in data):
        raise ConfigurationError(
            "the data is a tuple of NumPy arrays; give tensors of the dtypes that the model "
            "takes, such as (torch.as_tensor(inputs).float(), torch.as_tensor(labels))."
        )
    if isinstance(data, tuple) and data and all(isinstance(t, Tensor) for t in data):
        lengths = [len(tensor) if tensor.ndim else 0 for tensor in data]
        if len(set(lengths)) > 1:
            raise ConfigurationError(
                f"the data is a tuple of tensors of lengths {lengths}; give inputs and "
                "labels of the same length, or a list of batches."
            )
        return TensorDataset(*data)
    if isinstance(data, list) and data and _is_sample(data[0]):
        return Subset(data, range(len(data)))  # type: ignore[arg-type]
    return data


def _is_sample(item: Any) -> bool:
    """Return whether an item of a list is a sample: the label of a batch is no number."""
    label = None
    if isinstance(item, Mapping):
        label = item.get("labels", item.get("label"))
    elif isinstance(item, list | tuple) and len(item) == 2:
        label = item[1]
    return isinstance(label, Real) or (isinstance(label, Tensor) and label.ndim == 0)


_REENTRANT = (
    "the model uses reentrant gradient checkpointing, through which torch.autograd.grad "
    "cannot compute gradients; pass use_reentrant=False to torch.utils.checkpoint"
)


def scalar_loss(
    result: Any, index: int, origin: str, remedy: str, batch: Any
) -> Tensor:
    """Check that a result is a loss.

    Args:
        result: result of the loss function.
        index: index of the batch.
        origin: name of the function that returned it.
        remedy: what to do if it is not a loss.
        batch: the batch; models of Hugging Face return no loss without its labels.

    Returns:
        Tensor of shape ``[]``.

    Raises:
        PruningError: if it is not a tensor of one element.
    """
    if isinstance(result, Tensor) and result.numel() == 1:
        return result.reshape(())
    found = (
        f"a tensor of shape {tuple(result.shape)}"
        if isinstance(result, Tensor)
        else type(result).__name__
    )
    if result is None and isinstance(batch, Mapping) and "labels" not in batch:
        remedy += (
            f". The batch has {', '.join(map(str, batch))} but no labels, without which "
            "models of Hugging Face return no loss"
        )
    raise PruningError(
        f"{origin} returned {found} for gradient {index}, not a scalar loss; {remedy}"
    )


def _require_finite(
    value: float, batches: Batches, index: int, kind: type[PruningError] = PruningError
) -> None:
    if not math.isfinite(value):
        raise kind(
            f"the loss of gradient {index} ({batches.describe(index)}) is {value}"
        )


def differentiate(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    directions: Any = None,
    **options: bool,
) -> tuple[Tensor | None, ...]:
    """Call ``torch.autograd.grad``, and refuse reentrant gradient checkpointing.

    Unlike ``backward()``, this does not touch ``.grad`` or the hooks of DDP.

    Args:
        outputs: what to differentiate.
        inputs: with respect to which tensors.
        directions: as ``grad_outputs``.
        options: further arguments.

    Returns:
        One gradient for each input; None for an input that was not used.

    Raises:
        PruningError: for reentrant gradient checkpointing.
        RuntimeError: any other error of autograd, as it is.
    """
    try:
        gradients = torch.autograd.grad(
            outputs, inputs, directions, allow_unused=True, **options
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise PruningError(_REENTRANT) from error
    # Parameters that are used only inside a reentrant checkpoint seem to be unused.
    if any(gradient is None for gradient in gradients):
        refuse_checkpoints(outputs)
    return gradients


def refuse_checkpoints(outputs: Tensor | Sequence[Tensor]) -> None:
    """Refuse tensors that were computed with reentrant gradient checkpointing.

    Args:
        outputs: what will be differentiated.

    Raises:
        PruningError: if their graph has a node of it.
    """
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs
    for node in graph_nodes(tensor.grad_fn for tensor in tensors):
        if node.name() == "CheckpointFunctionBackward":
            raise PruningError(_REENTRANT)


def graph_nodes(begins: Iterable[Any], ends: Container[Any] = ()) -> set[Any]:
    """Find the nodes of a graph that a backward pass visits.

    Args:
        begins: nodes at which it begins; None for tensors without a graph.
        ends: nodes that it does not pass.

    Returns:
        The nodes, with the ends that are reached.
    """
    seen: set[Any] = set()
    nodes = [*begins]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node not in ends:
            nodes += [inputs for inputs, _ in node.next_functions]
    return seen


def differentiable_loss(
    source: LossSource,
    batches: Batches,
    index: int,
    batch: Any,
    kind: type[PruningError] = PruningError,
) -> Tensor:
    """Compute a loss that can be differentiated.

    Args:
        source: source of losses, inside its session.
        batches: the mini-batches.
        index: index of the mini-batch.
        batch: its samples.
        kind: kind of the error if the loss is not finite.

    Returns:
        The loss: a finite scalar tensor with a graph; otherwise an error of that kind.
    """
    loss = loss_with_graph(source, batch, index)
    _require_finite(float(loss.detach()), batches, index, kind)
    return loss


def loss_with_graph(source: LossSource, batch: Any, index: int) -> Tensor:
    """Compute a loss that can be differentiated, whether or not it is finite.

    Args:
        source: source of losses, inside its session.
        batch: the samples of a mini-batch.
        index: index of the mini-batch.

    Returns:
        Scalar tensor with a graph.

    Raises:
        PruningError: if it has no graph.
    """
    loss = run_loss(source, batch, index)
    if not loss.requires_grad:
        raise PruningError(
            f"the loss of gradient {index} has no graph: it was detached or computed "
            "without gradients, so it cannot be differentiated"
        )
    return loss


def compute_losses(
    source: LossSource,
    batches: Batches,
    indices: Sequence[int],
    comm: Communicator,
    seed: int,
    *,
    finite: bool = True,
) -> list[float]:
    """Compute the losses of some mini-batches without gradients, shared by the ranks.

    Args:
        source: source of losses, inside its session.
        batches: the mini-batches.
        indices: indices of the mini-batches, ascending.
        comm: the ranks.
        seed: the one given to :func:`.collect_gradients`.
        finite: whether a loss that is not finite is a :class:`.PruningError`.

    Returns:
        The losses in order, the same on every rank.
    """
    own: dict[int, Tensor] = {}
    for first in range(0, len(indices), comm.world_size):
        # A rank without a mini-batch of its own runs the last one.
        place = min(first + comm.rank, len(indices) - 1)
        own[place] = compute_loss(source, batches, indices[place], comm, seed)
    reshard(source.model)
    # Read at once, because a GPU waits for each number that the host reads.
    values = torch.stack([*own.values()]).tolist() if own else []
    losses = comm.gather_in_order(dict(zip(own, values, strict=True)), len(indices))
    if finite:
        for index, loss in zip(indices, losses, strict=True):
            _require_finite(loss, batches, index)
    return losses


def compute_loss(
    source: LossSource, batches: Batches, index: int, comm: Communicator, seed: int
) -> Tensor:
    """Compute the loss of one mini-batch without gradients. Call on all ranks.

    Each rank may have another mini-batch, but all of them run the model at the same time,
    because its parameters may be sharded.

    Args:
        source: source of losses, inside its session.
        batches: the mini-batches.
        index: index of the mini-batch of this rank.
        comm: the ranks.
        seed: the one given to :func:`.collect_gradients`.

    Returns:
        The loss, float64 ``[]``. Any error is raised on all ranks.
    """

    def fetch() -> list[Any]:
        # All ranks run a sharded model equally often.
        if any(map(is_sharded, source.model.parameters())):
            return [batches.fetch(index)]
        return batches.fetch_parts(index)

    def compute() -> Tensor:
        try:
            with preserve_random_states(), torch.no_grad():
                losses = [run_loss(source, part, index).double() for part in parts]
        except RuntimeError as error:
            if "not require grad" not in str(error):
                raise
            # A loss that differentiates inside, such as a gradient penalty. Each mini-batch
            # is decided alone, so that the result does not depend on the rank.
            losses = [run_loss(source, part, index).detach().double() for part in parts]
        return torch.stack(losses).mean()

    with seeded(derive_seed(seed, index)):
        parts = comm.run_together(fetch)
        return comm.run_together(compute)


def run_loss(source: LossSource, batch: Any, index: int) -> Tensor:
    """Run the model, and explain errors that come from its mode.

    Args:
        source: source of losses, inside its session.
        batch: the samples.
        index: index of the batch.

    Returns:
        The result of :meth:`LossSource.loss`.

    Raises:
        ConfigurationError: for BatchNorm of a single sample in training mode, for a loss
            that can be computed in training mode but not in evaluation mode, and for a
            loss function that takes other arguments.
    """
    try:
        return source.loss(batch, index)
    except Exception as error:
        if "more than 1 value per channel" in str(error):
            raise ConfigurationError(
                "BatchNorm in training mode cannot compute the variance of batch "
                f"{index}, which is a single sample; raise fisher.gradient_batch_size, "
                "or set fisher.model_mode='eval'."
            ) from error
        if isinstance(error, torch.OutOfMemoryError) or _works(
            source, batch, index, "eval"
        ):
            raise
        works = not source.model.training and _works(source, batch, index, "train")
        if not works and source.usage and isinstance(error, TypeError | AttributeError):
            raise ConfigurationError(
                f"loss_fn fails ({type(error).__name__}: {error}); {source.usage}."
            ) from error
        if not works:
            raise
        raise ConfigurationError(
            f"the loss cannot be computed in evaluation mode ({type(error).__name__}: "
            f"{error}), but in training mode it can; set fisher.model_mode='train'. "
            "Channels are scored with BatchNorm and dropout in evaluation mode: compute "
            "the loss in both modes, or prune single weights."
        ) from error


def choose_evaluation(source: LossSource, seed: int) -> None:
    """Find out in which mode for evaluation the loss can be computed.

    Models whose losses need ``model.training``, such as torchvision's detectors, are put
    into training mode, except their BatchNorm and dropout layers.

    Args:
        source: source of losses, outside its session; :attr:`LossSource.evaluation` is set.
        seed: of the sample that is tried.
    """
    with source.session("eval"), seeded(seed):
        batch = source.batches(1, 1, seed).fetch(0)
        modes: tuple[IsolationMode, ...] = ("eval", "partial_eval")
        source.evaluation = next(
            (mode for mode in modes if _works(source, batch, 0, mode)), "eval"
        )


def _works(source: LossSource, batch: Any, index: int, mode: IsolationMode) -> bool:
    """Return whether the loss can be computed in a mode; change nothing."""
    try:
        with isolated(source.model, mode):
            source.loss(batch, index)
    except Exception:
        return False
    return True


def map_tensors(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Replace the tensors in lists, tuples and mappings.

    Args:
        change: returns the new tensor for one.
        batch: the batch.

    Returns:
        The batch in new containers; other objects are the same.
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(change, value) for key, value in batch.items()}
        return type(batch)(items)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(change, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(change, value) for value in batch)
    return batch
