"""Single rows of an embedding that are trained with an adapter: ``trainable_token_indices``.

In a model the rows are ``<embedding>.token_adapter.trainable_tokens_delta.<adapter>``, in a file the same without the
adapter: PEFT's names. They are called a delta there, but hold what the rows become, not a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from smartinit.adapters.bare import bare_modules
from smartinit.adapters.filling import fill_tensors
from smartinit.adapters.part import AdapterPart
from smartinit.adapters.stand_in import Places, StandIn
from smartinit.adapters.tying import embedding_ties
from smartinit.adapters.weight_change import RowReplacement
from smartinit.config.checks import closest
from smartinit.errors import ConfigError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smartinit.adapters.tying import Ties
    from smartinit.adapters.weight_change import WeightChange
    from smartinit.config import LoraConfig

_KEY = "token_adapter.trainable_tokens_delta"


class TokenRows(nn.Module):
    """The trained rows of any number of adapters, and which rows they are.

    Attributes:
        trainable_tokens_delta: adapter -> ``(k, embedding_dim)``.
        token_indices: adapter -> the k row numbers, in the order of these rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.ParameterDict()
        self.token_indices: dict[str, list[int]] = {}

    def add(self, adapter_name: str, rows: nn.Parameter, indices: Sequence[int], device: torch.device) -> None:
        """Take one adapter in."""
        self.trainable_tokens_delta[adapter_name] = rows
        self.token_indices[adapter_name] = list(indices)
        # Sorted, so that the row of a token is found in log k steps; on the device, where every call needs them.
        index, order = torch.tensor(list(indices), device=device).sort()
        self.register_buffer(f"sorted_{adapter_name}", index, persistent=False)
        self.register_buffer(f"order_{adapter_name}", order, persistent=False)

    def remove(self, adapter_name: str) -> None:
        """Forget one adapter."""
        del self.trainable_tokens_delta[adapter_name], self.token_indices[adapter_name]
        delattr(self, f"sorted_{adapter_name}")
        delattr(self, f"order_{adapter_name}")

    def index(self, adapter_name: str) -> torch.Tensor:
        """The row numbers of one adapter as a tensor, ``(k,)``, in the order of its rows."""
        index, order = self._sorted(adapter_name)
        return index[order.argsort()]

    def rows_of(self, adapter_name: str, tokens: torch.Tensor) -> torch.Tensor:
        """Which of one adapter's k rows each token has, in the shape of ``tokens``; k for a token without one."""
        index, order = self._sorted(adapter_name)
        at = torch.searchsorted(index, tokens).clamp(max=len(index) - 1)
        return torch.where(index[at] == tokens, order[at], len(index))

    def _sorted(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, f"sorted_{adapter_name}"), getattr(self, f"order_{adapter_name}")


class TrainedTokens(StandIn):
    """An embedding, or a linear layer such as a model's head, some rows of whose weight each adapter trains.

    The weight is never copied: tokens with trained rows are replaced in an embedding's output, and in a linear layer's
    the outputs that belong to trained rows. Cost beside the layer: O(tokens · dim) for an embedding and
    O(tokens · (k · dim + out)) for a linear layer, where PEFT's copies the whole weight and, in the backward pass,
    computes the whole weight's gradient.

    A layer that shares its weight with the embedding follows it: the rows are then the embedding's parameter.

    Args:
        base_layer: the layer as the model had it.

    Attributes:
        token_adapter: the rows of the adapters that do not follow another layer.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.token_adapter = TokenRows()
        self.training = base_layer.training
        self._followed: dict[str, tuple[TokenRows]] = {}  # tuples: torch must not count them as this module's parts

    @property
    def in_use(self) -> nn.Module:
        """The base layer; only its weight is another one, see `weight`."""
        return self.base_layer

    @property
    def weight(self) -> torch.Tensor:
        """The weight with the active adapters' rows in it: for models that multiply with it themselves."""
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        names = [] if self.merged else self.active_here()
        for name in names:
            holder = self.holder(name)
            rows = holder.trainable_tokens_delta[name].to(weight.dtype)
            weight = weight.index_copy(0, holder.index(name), rows)
        return weight

    def adapters(self) -> list[str]:
        """The adapters that have rows here, of their own or the embedding's."""
        return [*self.token_adapter.token_indices, *self._followed]

    def holder(self, adapter_name: str) -> TokenRows:
        """Where one adapter's rows are."""
        followed = self._followed.get(adapter_name)
        return self.token_adapter if followed is None else followed[0]

    def parameters_of(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """One adapter's rows; none where it follows another layer."""
        if adapter_name in self.token_adapter.token_indices:
            yield self.token_adapter.trainable_tokens_delta[adapter_name]

    def add(self, adapter_name: str, indices: Sequence[int], *, device: torch.device | str | None = None) -> None:
        """Give one adapter rows of its own, which start as the base layer's.

        Args:
            adapter_name: which adapter.
            indices: which rows, each once.
            device: where they lie; None: where the base layer's weight does.
        """
        weight: torch.Tensor = self.base_layer.weight.detach()  # type: ignore[operator]
        # As of LoRA's matrices: half precision cannot hold small updates.
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        if device is not None and torch.device(device).type == "meta":
            values = torch.empty(len(indices), weight.shape[1], device=device, dtype=dtype)
        else:
            values = weight[torch.tensor(list(indices), device=weight.device)].to(device=device, dtype=dtype, copy=True)
        self.token_adapter.add(adapter_name, nn.Parameter(values), indices, weight.device)

    def follow(self, adapter_name: str, embedding: TrainedTokens) -> None:
        """Let one adapter have the rows here that it has in the embedding."""
        self._followed[adapter_name] = (embedding.holder(adapter_name),)

    def remove(self, adapter_name: str) -> None:
        """Forget one adapter."""
        self._followed.pop(adapter_name, None)
        if adapter_name in self.token_adapter.token_indices:
            self.token_adapter.remove(adapter_name)

    def check_active(self, adapter_names: Sequence[str]) -> None:
        """A row can be only one adapter's.

        Raises:
            ConfigError: two of these train the same row.
        """
        seen: dict[int, str] = {}
        for name in dict.fromkeys(adapter_names):
            for index in self.holder(name).token_indices[name] if self.has(name) else ():
                if index in seen:
                    raise ConfigError(
                        f"adapters '{seen[index]}' and '{name}' both train row {index} of an embedding "
                        "(trainable_token_indices), so they cannot be used together"
                    )
                seen[index] = name

    def run(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The layer's output with these adapters' rows.

        Args:
            adapter_names: adapters that train different rows.
            x: tokens for an embedding; ``(..., in_features)`` for a linear layer.
            *args: for the layer.
            **kwargs: for the layer.
        """
        base = self.base_layer
        if self.merged and self.disable_adapters:
            self.unmerge()
        if self.merged or not adapter_names:
            return base(x, *args, **kwargs)
        if isinstance(base, nn.Linear):
            return self._linear(base, adapter_names, x)
        if _is_plain(base):
            return self._embedding(base, adapter_names, x)  # type: ignore[arg-type]
        # A layer with a forward pass of its own kind: let it run with the weight as it would be.
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        for name in adapter_names:
            holder = self.holder(name)
            weight = weight.index_copy(0, holder.index(name), holder.trainable_tokens_delta[name].to(weight.dtype))
        return functional_call(base, {"weight": weight}, (x, *args), kwargs)

    def _embedding(self, base: nn.Embedding, adapter_names: Sequence[str], tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = base(tokens)
        scale = getattr(base, "embed_scale", None)  # some models scale what their embeddings give
        for name in adapter_names:
            holder = self.holder(name)
            trained = holder.trainable_tokens_delta[name].to(base.weight.dtype)
            at = holder.rows_of(name, tokens)
            none = len(trained)  # tokens without a trained row get one that nobody reads, so that shapes do not vary
            indices = holder.token_indices[name]
            padding = indices.index(base.padding_idx) if base.padding_idx in indices else None
            rows = functional.embedding(
                at,
                torch.cat([trained, trained.new_zeros(1, trained.shape[1])]),
                padding_idx=padding,
                scale_grad_by_freq=base.scale_grad_by_freq,
            )
            if scale is not None:
                rows = rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)
            result = torch.where((at != none).unsqueeze(-1), rows.to(result.dtype), result)
        return result

    def _linear(self, base: nn.Linear, adapter_names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = base(x)
        for name in adapter_names:
            holder = self.holder(name)
            index = holder.index(name)
            trained = holder.trainable_tokens_delta[name].to(base.weight.dtype)
            bias: torch.Tensor | None = base.bias
            bias = bias if bias is None else bias[index]
            result = result.index_copy(-1, index, functional.linear(x, trained, bias).to(result.dtype))
        return result

    def changes(self, adapter_name: str) -> list[WeightChange]:
        """What merging one adapter does to the weight: its rows take their places."""
        holder = self.holder(adapter_name)
        rows = holder.trainable_tokens_delta[adapter_name].detach()
        indices = holder.token_indices[adapter_name]
        return [RowReplacement(self.get_base_layer(), "weight", adapter_name, indices, rows)]

    def other_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """One adapter's rows; nothing where it follows another layer, whose rows are in the file."""
        return {key: rows.detach() for key, rows in self._stored(adapter_name).items()}

    def load_others(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `other_tensors`, in place.

        Raises:
            ArtefactError: the tensor is missing, or there are too many, or it has another shape.
        """
        weight: torch.Tensor = self.base_layer.weight  # type: ignore[assignment]
        what = f"the rows that adapter '{adapter_name}' trains"
        fill_tensors(self._stored(adapter_name), tensors, what, device=weight.device)

    def _stored(self, adapter_name: str) -> dict[str, nn.Parameter]:
        return dict(zip([_KEY], self.parameters_of(adapter_name), strict=False))  # none where it follows another


def add_trained_tokens(
    root: nn.Module, adapter_name: str, config: LoraConfig, *, device: torch.device | str | None = None
) -> None:
    """Put the parts of one adapter into a model; nothing where the configuration asks for none.

    As in PEFT, a list is for the input embedding, a key of a dict means every module whose name ends with it, and
    layers that share the input embedding's weight get its rows, unless the dict gives them others.

    Args:
        root: the model, possibly with parts of other adapters in it.
        adapter_name: which adapter.
        config: its configuration.
        device: where its weights lie; None: where the base's do.

    Raises:
        TargetError: a name that matches nothing.
        ConfigError: a row that does not exist or is named twice, a module without rows, tied layers with different
            rows under ``ensure_weight_tying``, or a module that the adapter trains already in another way.
    """
    wanted = config.trainable_token_indices
    if not wanted:
        return
    modules = dict(bare_modules(root))
    ties = embedding_ties(root)
    chosen = _chosen(root, modules, wanted)
    followers = _followers(chosen, ties, ensure=config.ensure_weight_tying)
    places = Places({name: part for name, part in root.named_modules() if isinstance(part, AdapterPart)})
    for name in [*(name for name in chosen if name not in followers), *followers]:
        places.check(name, TrainedTokens, adapter_name)
        module = modules[name]
        part = module if isinstance(module, TrainedTokens) else TrainedTokens(module)
        if ties is not None and name in followers:
            part.follow(adapter_name, root.get_submodule(ties.embedding))  # type: ignore[arg-type]
        else:
            _check_rows(name, part.base_layer, chosen[name])
            part.add(adapter_name, chosen[name], device=device)
        root.set_submodule(name, part)


def _chosen(
    root: nn.Module, modules: Mapping[str, nn.Module], wanted: Sequence[int] | Mapping[str, Sequence[int]]
) -> dict[str, Sequence[int]]:
    """Module name -> its rows."""
    if not isinstance(wanted, Mapping):
        get = getattr(root, "get_input_embeddings", None)
        embedding = get() if callable(get) else None
        name = next((name for name, module in modules.items() if module is embedding), "embed_tokens")
        wanted = {name: wanted}
    chosen: dict[str, Sequence[int]] = {}
    for entry, indices in wanted.items():
        names = [name for name in modules if name and name.endswith(entry)]
        if not names:
            tails = {name.rpartition(".")[2] for name in modules}
            raise TargetError(
                f"trainable_token_indices names {entry!r}, which matched none of the model's {len(modules) - 1} "
                f"modules{closest(entry, tails)}"
            )
        chosen |= dict.fromkeys(names, indices)
    return chosen


def _followers(chosen: Mapping[str, Sequence[int]], ties: Ties | None, *, ensure: bool) -> tuple[str, ...]:
    """The tied layers that get the embedding's rows.

    Raises:
        ConfigError: they are to have others, and to stay tied.
    """
    if ties is None or ties.embedding not in chosen:
        return ()
    rows = list(chosen[ties.embedding])
    differing = [name for name in ties.tied if name in chosen and list(chosen[name]) != rows]
    if differing and ensure:
        raise ConfigError(
            f"trainable_token_indices gives '{ties.embedding}' the rows {rows} and '{differing[0]}', whose weight is "
            f"tied to it, the rows {list(chosen[differing[0]])}: give both the same, or set ensure_weight_tying=False"
        )
    return () if differing else ties.tied


def _check_rows(name: str, module: nn.Module, indices: Sequence[int]) -> None:
    weight = getattr(module, "weight", None)
    usable = isinstance(module, (nn.Embedding, nn.Linear)) and isinstance(weight, torch.Tensor)
    if not usable or weight.dim() != 2 or not weight.is_floating_point():  # type: ignore[union-attr] # noqa: PLR2004
        raise ConfigError(
            f"trainable_token_indices names '{name}', a {type(module).__name__}: rows can be trained of an embedding "
            "or a linear layer that is not quantised"
        )
    if getattr(module, "max_norm", None) is not None:
        raise ConfigError(
            f"trainable_token_indices names '{name}', an embedding with max_norm, which rewrites its own weight when "
            "it is called"
        )
    size = len(weight)  # type: ignore[arg-type]
    outside = [index for index in indices if not 0 <= index < size]
    if outside:
        raise ConfigError(f"trainable_token_indices names row {outside[0]} of '{name}', which has rows 0 to {size - 1}")


def _is_plain(base: nn.Module) -> bool:
    """Whether an embedding does nothing but look rows up, and perhaps scale them."""
    if not isinstance(base, nn.Embedding):
        return False
    return type(base).forward is nn.Embedding.forward or hasattr(base, "embed_scale")
