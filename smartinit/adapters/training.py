"""What training programs look for in a model before they train it, answered for the model inside the wrapper.

transformers' ``Trainer`` reads the signature of ``forward`` (to drop the columns of a data set that it does not take,
and to know whether the loss can be normalised over accumulated batches), writes the state dict with safetensors (which
refuses two names for one memory) and switches checkpointing of activations on.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKPOINTING_SWITCHES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
"""Methods that make a transformers model forget the activations between its blocks and compute them twice."""


def set_trained(parameter: nn.Parameter, *, trained: bool) -> None:
    """Let a parameter be trained or frozen; torch does so only in inference mode for one that was made in it."""
    if parameter.requires_grad != trained:
        with torch.inference_mode(parameter.is_inference() or torch.is_inference_mode_enabled()):
            parameter.requires_grad_(trained)


def with_signature_of(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper's bound ``forward`` that tells the parameters of the wrapped model, and ``adapter_names``.

    Args:
        model: the wrapped model; without a signature of its own, ``forward`` is returned as it is.
        forward: bound to the wrapper.

    Returns:
        A method, so that ``copy.deepcopy`` of the wrapper binds it to the copy.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return forward
    if not isinstance(forward, MethodType):
        return forward
    unbound = forward.__func__

    def forward_as_wrapped(self: nn.Module, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        return unbound(self, *args, **kwargs)

    own = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [one for one in signature.parameters.values() if one.name != own.name]
    named = [one for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [one for one in parameters if one.kind is inspect.Parameter.VAR_KEYWORD]
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    # No __wrapped__: accelerate follows it when it takes its autocast off, and would take this off as well.
    forward_as_wrapped.__name__ = "forward"
    forward_as_wrapped.__doc__ = unbound.__doc__
    # Positional-only comes first; where the model has such parameters, `self` stands before them all the same.
    forward_as_wrapped.__signature__ = inspect.Signature([this, *named, own, *rest])  # type: ignore[attr-defined]
    return MethodType(forward_as_wrapped, forward.__self__)


def unshare_tied(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Hook on a state dict: a parameter with several names is copied for all but the first of them.

    safetensors refuses a file in which two names share memory, and that is how ``Trainer`` saves a model that is no
    ``PreTrainedModel``. Keys stay complete, so that loading can be strict. Cost: memory for the copies.
    """
    first: set[int] = set()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        kept = state.get(prefix + name)
        # With keep_vars=True it is the parameter itself that is asked for.
        if id(parameter) in first and isinstance(kept, torch.Tensor) and not isinstance(kept, nn.Parameter):
            state[prefix + name] = kept.clone()
        first.add(id(parameter))


def is_checkpointing(model: nn.Module) -> bool:
    """Whether a transformers model computes its activations twice to save memory; False for other modules."""
    # The first is the name from transformers 5.23 on; there the second one warns.
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        found = getattr(model, name, None)
        if found is not None:
            return bool(found)
    return False


def require_input_gradients(model: nn.Module) -> None:
    """Let the embeddings' output require a gradient if the model checkpoints its activations; nothing otherwise.

    A block that is checkpointed with ``use_reentrant=True`` gets gradients only if something that enters it requires
    one, which is not so where all weights before the first adapter are frozen. Newer versions of transformers do this
    themselves when checkpointing is switched on.
    """
    enable = getattr(model, "enable_input_require_grads", None)
    if enable is not None and is_checkpointing(model) and not getattr(model, "_require_grads_hooks", None):
        enable()


def with_input_gradients(model: nn.Module, switch: Callable[..., Any]) -> Callable[..., Any]:
    """One of `CHECKPOINTING_SWITCHES`, with `require_input_gradients` after it."""

    @functools.wraps(switch)
    def switch_on(*args: object, **kwargs: object) -> Any:  # noqa: ANN401
        result = switch(*args, **kwargs)
        require_input_gradients(model)
        return result

    return switch_on
