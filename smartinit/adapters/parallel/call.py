"""What the caller of an adapted layer says, in the words of the base layer's own ``forward``."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from smartinit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn

    from smartinit.adapters.parallel.base import ParallelBase


def with_input_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The layer's input, and the arguments after it.

    Args:
        module: the base layer; the input may be given under the name that it has there, or as ``x``.
        args: of the call.
        kwargs: of the call.
        name: of the layer, for messages.

    Raises:
        ModelError: there is no input.
    """
    if args:
        return args[0], args[1:], kwargs
    names = _names(module)[:1]
    for word in (*names, "x"):
        if word in kwargs:
            return kwargs[word], (), {key: value for key, value in kwargs.items() if key != word}
    raise ModelError(
        f"'{name}' was called without an input: expected it as the first argument, or as {'/'.join((*names, 'x'))}=…"
    )


def argument(module: nn.Module, word: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """One of the arguments after the input, by the name that it has in the base layer; None: not given."""
    if word in kwargs or not args:
        return kwargs.get(word)
    names = _names(module)[1 : len(args) + 1]
    return args[names.index(word)] if word in names else None


def called(module: nn.Module, base: ParallelBase, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ParallelBase:
    """What the base layer does in one call: Megatron's may be told there whether to gather its output.

    Args:
        module: the base layer.
        base: what it does if nothing is said.
        args: after the input.
        kwargs: besides the input.
    """
    if base.split != "column" or not (args or kwargs):
        return base
    gathers = argument(module, "runtime_gather_output", args, kwargs)
    if gathers is None or bool(gathers) == base.whole_output:
        return base
    return replace(base, whole_output=bool(gathers))


def counts_of(base: ParallelBase, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401 - list or tensor
    """Rows of each of a rank's experts, which layers with several weights are told; None: of a layer with one."""
    if not base.experts:
        return None
    return args[0] if args else kwargs.get("m_splits", kwargs.get("tokens_per_expert"))


def _names(module: nn.Module) -> tuple[str, ...]:
    """Of the parameters of its ``forward``."""
    own = vars(module).get("forward")  # of this one module only
    return _names_in(type(module).forward) if own is None else tuple(inspect.signature(own).parameters)


@lru_cache(maxsize=256)
def _names_in(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Of a class's: ``self`` is none of them."""
    return tuple(inspect.signature(forward).parameters)[1:]
