"""Activation recompute with a frozen base model.

Megatron recomputes a layer in the backward pass only if one of its inputs requires gradients (a reentrant checkpoint).
Behind a frozen embedding none does, and the adapters in it would get no gradients, without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smartinit.megatron.walk import chunks_of

if TYPE_CHECKING:
    from torch import nn

    from smartinit.megatron.walk import Model


def let_gradients_in(model: Model) -> None:
    """Have the layers of each block that is to be recomputed begin with an input that requires gradients.

    A block is a module with ``layers`` whose ``config.recompute_granularity`` is set when this is called. It is done
    once for a block, and costs the gradient of its first input.
    """
    for chunk in chunks_of(model):
        for module in chunk.modules():
            asked = getattr(getattr(module, "config", None), "recompute_granularity", None) is not None
            known = _with_gradient in module._forward_pre_hooks.values()  # noqa: SLF001 - torch has no list of hooks
            if asked and hasattr(module, "layers") and not known:
                module.register_forward_pre_hook(_with_gradient, with_kwargs=True)


def keep_gradients_out(model: Model) -> None:
    """Undo `let_gradients_in`."""
    for chunk in chunks_of(model):
        for module in chunk.modules():
            hooks, with_kwargs = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs  # noqa: SLF001
            for key in [key for key, hook in hooks.items() if hook is _with_gradient]:
                del hooks[key], with_kwargs[key]


def _with_gradient(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first positional argument, or ``hidden_states``, as something that requires gradients."""
    if not (module.training and torch.is_grad_enabled()):
        return args, kwargs
    if args:
        return (_required(args[0]), *args[1:]), kwargs
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": _required(kwargs["hidden_states"])}
    return args, kwargs


def _required(x: Any) -> Any:  # noqa: ANN401 - None between pipeline stages
    wanted = isinstance(x, torch.Tensor) and x.is_floating_point() and not x.requires_grad
    return x.detach().requires_grad_() if wanted else x
