"""What a base layer does with its input and its output among the ranks that share it.

Layers of Megatron-Core and of Transformer Engine are known by what they have, never by their classes: neither package
is imported. Layers of PyTorch's own tensor parallelism are known by their weight, a ``DTensor``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from smartinit.adapters.parallel.collectives import rank_of, size_of
from smartinit.adapters.parallel.dtensors import is_dtensor
from smartinit.errors import ConfigError, ModelError
from smartinit.targets.weight import Target, host_of

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

Split = Literal["column", "row", "none"]
"""Along which dimension of ``W (out, in)`` the ranks have shards: the rows (column-parallel), the columns, neither."""


@dataclass(frozen=True)
class ParallelBase:
    """A linear layer that several ranks share, or one that none does.

    Attributes:
        in_features: columns of the whole ``W``.
        out_features: rows of the whole ``W``.
        split: what each rank has of it.
        group: the tensor-parallel ranks; None: this process alone.
        sequence: where the features are whole, the tokens are in shards (sequence parallelism): column-parallel layers
            gather their input, row-parallel layers reduce-scatter their output.
        token_dim: the dimension along which the tokens are in shards.
        partial: nothing is exchanged in the layer itself (experts: Megatron's ``explicit_expert_comm``; column-parallel
            layers with ``disable_grad_reduce``): the output of a row-parallel layer, and the gradient for the input of
            a column-parallel one, are addends.
        whole_input: a row-parallel layer that takes the whole input and picks its features itself.
        whole_output: a column-parallel layer that gathers its output.
        gated: the rows are those of a gate and then of an up projection, see `smartinit.formats.rows`.
        experts: how many weights the layer has, one for each of this rank's experts; 0: a layer with one weight.
        returns_tuple: it returns ``(output, bias)``, as Megatron's layers do.
        placed: its tensors are DTensors, see `smartinit.adapters.parallel.placed`.
    """

    in_features: int
    out_features: int
    split: Split = "none"
    group: ProcessGroup | None = None
    sequence: bool = False
    token_dim: int = 0
    partial: bool = False
    whole_input: bool = False
    whole_output: bool = False
    gated: bool = False
    experts: int = 0
    returns_tuple: bool = False
    placed: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelBase:
        """Itself: a copy of a model is shared by the same ranks, and a process group cannot be copied."""
        return self

    @property
    def size(self) -> int:
        """Ranks that share the layer."""
        return size_of(self.group)

    @property
    def rank(self) -> int:
        """Which of them this process is."""
        return rank_of(self.group)

    @property
    def weight_dim(self) -> int | None:
        """The dimension of ``W`` along which it is in shards; None: whole."""
        return {"column": 0, "row": 1, "none": None}[self.split] if self.size > 1 else None


def describe(module: nn.Module, name: str, *, expert: bool = False) -> ParallelBase:
    """What there is to know of a base layer.

    Args:
        module: a parallel layer as Megatron-Core or Transformer Engine write them (or that looks the same), a
            ``torch.nn.Linear`` with or without a DTensor as weight, or a quantised linear layer.
        name: for messages, and to tell a gated layer.
        expert: whether it belongs to an expert.

    Raises:
        ModelError: another kind of module, or one without a weight of its own.
        ConfigError: its process group does not fit its weight.
    """
    if hasattr(module, "input_size") and hasattr(module, "output_size"):
        return _core(module, name)
    if getattr(module, "parallel_mode", "") in {"column", "row", None} or _named(module, "Parallel"):
        return _engine(module, name, expert=expert)
    weight = getattr(module, "weight", None)
    if is_dtensor(weight):
        return _dtensor(module, weight, name)
    if host_of(module) != "linear":
        raise ModelError(
            f"target module '{name}' is a {type(module).__name__}: expected a column- or row-parallel layer, a linear "
            "layer, or one with a DTensor as weight; narrow target_modules"
        )
    target = Target.of(module, name)
    return ParallelBase(target.in_features, target.out_features)


def is_linear(module: nn.Module) -> bool:
    """Whether `describe` takes such a module: what ``exclude_modules`` chooses among."""
    if hasattr(module, "input_size") and hasattr(module, "output_size"):
        return getattr(module, "weight", None) is not None
    mode = getattr(module, "parallel_mode", "")
    return mode in {"column", "row", None} or host_of(module) == "linear"


def _core(module: Any, name: str) -> ParallelBase:  # noqa: ANN401 - known by its attributes
    """Megatron-Core's ColumnParallelLinear and RowParallelLinear, and grouped layers that look like them."""
    weight = _weight(module, name)
    row = hasattr(module, "input_is_parallel")
    sizes = (int(module.output_size), int(module.input_size))
    group = getattr(module, "tp_group", None)
    size = _check_group(group, sizes[row] // max(1, weight.shape[row]), name)
    partial = bool(getattr(module, "explicit_expert_comm", False))
    sequence = bool(getattr(module, "sequence_parallel", False)) and not partial and size > 1
    # Megatron ignores it with sequence parallelism, whose gathering of the input has a sum in its backward pass.
    kept_apart = bool(getattr(module, "disable_grad_reduce", False)) and not row and not sequence
    return ParallelBase(
        in_features=sizes[1],
        out_features=sizes[0],
        split="row" if row else "column",
        group=group if size > 1 else None,
        sequence=sequence,
        partial=partial or kept_apart,
        whole_input=row and not module.input_is_parallel,
        whole_output=not row and bool(getattr(module, "gather_output", False)),
        gated=not row and _is_cut_in_two(module, name),
        experts=int(getattr(module, "num_gemms", 0)),
        returns_tuple=True,
    )


def _engine(module: Any, name: str, *, expert: bool) -> ParallelBase:  # noqa: ANN401 - known by its attributes
    """Transformer Engine's layers as Megatron-Core wraps them: they know the sizes of their shard only."""
    weight = _weight(module, name)
    mode = getattr(module, "parallel_mode", "")
    row = mode == "row" or (not mode and _named(module, "RowParallel"))
    column = mode == "column" or (not mode and _named(module, "ColumnParallel"))
    group = next((g for g in (getattr(module, a, None) for a in ("tp_group", "_tp_group")) if g is not None), None)
    out_features, in_features = (int(n) for n in weight.shape[-2:])
    partial = mode is None and (row or column)
    by_tokens = bool(getattr(module, "sequence_parallel", False)) and not partial and not expert
    if partial:  # told nothing of its ranks, so that it exchanges nothing: its tp_size says 1 whatever the group is
        size = size_of(group)
    elif row or column:
        size = _check_group(group, int(getattr(module, "tp_size", 1)), name)
    else:  # a whole weight on every rank: the others matter only if they have other tokens
        size = size_of(group) if by_tokens else 1
    return ParallelBase(
        in_features=in_features * (size if row else 1),
        out_features=out_features * (size if column else 1),
        split="row" if row else "column" if column else "none",
        group=group if size > 1 else None,
        # With return_layernorm_output_gathered the adapter is given all tokens already.
        sequence=by_tokens and size > 1,
        partial=partial,
        gated=column and _is_gated(module, name),
        experts=int(getattr(module, "num_gemms", 0)),
        returns_tuple=True,
    )


def _dtensor(module: nn.Module, weight: Any, name: str) -> ParallelBase:  # noqa: ANN401 - a DTensor
    """A ``torch.nn.Linear`` after ``parallelize_module`` with ColwiseParallel or RowwiseParallel."""
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1:
        raise ConfigError(
            f"the weight of '{name}' lies on a mesh of {mesh.ndim} dimensions; adapt the layer after tensor "
            "parallelism and before data parallelism (fully_shard) is applied to it"
        )
    placed = placements[0]
    kinds: dict[str, bool] = {"column": placed.is_shard(0), "row": placed.is_shard(1), "none": placed.is_replicate()}
    split: Split | None = next((kind for kind in get_args(Split) if kinds[kind]), None)
    if split is None or "forward" in vars(module):  # of transformers' tp_plan: no hook comes between
        how = f"is placed as {placed}" if split is None else "is computed with by a forward of the module's own"
        raise ConfigError(
            f"the weight of '{name}' is a DTensor that {how}, which is none of the ways known here; load the model "
            "without tp_plan and share it with torch's parallelize_module, ColwiseParallel and RowwiseParallel"
        )
    out_features, in_features = (int(n) for n in weight.shape)
    group = mesh.get_group()
    if split != "none" and weight.shape[split == "row"] % size_of(group):
        raise ConfigError(
            f"the weight of '{name}', {tuple(weight.shape)}, is not shared evenly by {size_of(group)} ranks; choose a "
            "tensor-parallel size that divides it, or narrow target_modules"
        )
    group = None if split == "none" else group
    return ParallelBase(in_features, out_features, split, group, partial=split != "none", placed=True)


def _weight(module: Any, name: str) -> torch.Tensor:  # noqa: ANN401 - known by its attributes
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = getattr(module, "weight0", None)
    if not isinstance(weight, torch.Tensor):
        raise ModelError(
            f"'{name}' ({type(module).__name__}) has no weight of its own (is it tied to another layer's?), so it can "
            "have no adapter; narrow target_modules"
        )
    return weight


def _check_group(group: ProcessGroup | None, size: int, name: str) -> int:
    """The size, once the group has so many ranks.

    Raises:
        ConfigError: it has not.
    """
    if size_of(group) != size:
        has = "no tensor-parallel group" if group is None else f"a tensor-parallel group of {size_of(group)} ranks"
        raise ConfigError(
            f"the weight of '{name}' is one of {size} shards, but the layer has {has}; give it the group (tp_group) "
            "that it was made for"
        )
    return size


def _is_cut_in_two(module: Any, name: str) -> bool:  # noqa: ANN401 - known by its attributes
    """Whether each rank has rows of a gate and of an up projection: a layer with a ``stride`` says so itself."""
    stride = getattr(module, "stride", None)
    return stride == 2 if isinstance(stride, int) else _is_gated(module, name)  # noqa: PLR2004 - two blocks of rows


def _is_gated(module: Any, name: str) -> bool:  # noqa: ANN401 - known by its attributes
    gated = getattr(getattr(module, "config", None), "gated_linear_unit", False)
    return bool(gated) and name.rpartition(".")[2] == "linear_fc1"


def _named(module: nn.Module, part: str) -> bool:
    """Whether a class of the module, or one that it derives from, has this in its name."""
    return any(part in kind.__name__ and "Linear" in kind.__name__ for kind in type(module).__mro__)
