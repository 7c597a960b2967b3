"""Starts by smartinit's methods beside parallel layers: computed for whole layers, written in shards.

A start does not depend on how many ranks there are, and is the same on all of them, bit by bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from smartinit.activations.forward import without_cache
from smartinit.activations.rows import forward_fn_dict
from smartinit.adapters.parallel.collectives import first_of
from smartinit.adapters.parallel.initial import INITIAL, collective_device
from smartinit.config import LoraConfig, checks
from smartinit.config.lora import INIT_METHODS
from smartinit.distributed.reduce import world_size
from smartinit.errors import ArtefactError, ConfigError
from smartinit.initialisation import ALIASES, resolve_method
from smartinit.job import Job
from smartinit.megatron.agreement import everyone
from smartinit.megatron.ear import listening
from smartinit.methods import available_methods
from smartinit.methods.base import Method
from smartinit.pipeline import compute_jobs
from smartinit.planning.limits import Limits
from smartinit.rank_request import RankRequest
from smartinit.run_options import Options
from smartinit.targets.select import check_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import nn

    from smartinit.activations.rows import ForwardFn
    from smartinit.artefact import Artefact
    from smartinit.factors import Factors
    from smartinit.megatron.ear import Heard
    from smartinit.megatron.sharded_target import ShardedTarget
    from smartinit.planning.plan import Plan


def method_of(word: str | Method) -> Method | None:
    """The method that ``lora_A_init_method`` names; None for Megatron's own, `INITIAL`.

    Raises:
        ConfigError: no known one.
    """
    if isinstance(word, Method):
        return word
    if word in INITIAL:
        return None
    if not str(word).startswith("pissa_niter_"):
        known = [name for name in available_methods() if name not in INITIAL]
        checks.choice("lora_A_init_method", word, [*INITIAL, *known, *(a for a in ALIASES if ALIASES[a] in known)])
        return resolve_method(LoraConfig(), word)
    return resolve_method(LoraConfig(init_lora_weights=word))


def check_methods(a_method: str | Method, b_method: str) -> None:
    """Whether two init methods are known and go together.

    Raises:
        ConfigError: they do not.
    """
    method = method_of(a_method)
    checks.choice("lora_B_init_method", b_method, INITIAL)
    if method is not None and b_method != "zero":
        raise ConfigError(
            f"lora_B_init_method={b_method!r} beside lora_A_init_method='{method.name}', which starts B as well; leave "
            "lora_B_init_method at 'zero'"
        )


def check_layers(method: Method, targets: Sequence[ShardedTarget], *, pieces: bool) -> None:
    """Whether a method can start these layers.

    Args:
        method: it.
        targets: the layers.
        pieces: whether no process has all layers of the model.

    Raises:
        ConfigError: it cannot.
    """
    reads = method.needs_weight or method.effect == "quantises"
    shared = next((target for target in targets if target.shared), None)
    if shared is not None and (reads or method.needs not in (None, "activations")):
        raise ConfigError(
            f"'{method.name}' starts an adapter from the weight, or the gradient, of its layer, but the adapter of "
            f"'{shared.name}' serves several experts; set share_expert_adapters=False, or use a method that reads "
            "neither (eva, orthogonal, gaussian)"
        )
    part = next((target for target in targets if target.part is not None), None)
    if part is not None and method.effect == "quantises":
        raise ConfigError(
            f"'{method.name}' quantises base weights, but that of '{part.name}' is only some rows of the weight of its "
            "layer, which is stored, and quantised, as a whole; use LoRA, with one adapter beside the layer, or a "
            "method that does not quantise (pissa, olora, …)"
        )
    if method.needs is not None and pieces:
        raise ConfigError(
            f"'{method.name}' reads data, but no process has all layers of a model that is cut into pieces (pipeline "
            "parallelism, or experts of their own on several ranks); compute the start where one process group has "
            "them all, such as on the Hugging Face checkpoint, and convert it"
        )


def compute_start(
    model: nn.Module,
    targets: Sequence[ShardedTarget],
    method: Method,
    dataloader: Iterable[Any] | None = None,
    *,
    dropout: float = 0.0,
    forward_fn: ForwardFn = forward_fn_dict,
    **options: Any,  # noqa: ANN401 - of the pipeline
) -> Artefact:
    """What the method gives for whole layers; collective.

    Args:
        model: what data is run through; left as it was.
        targets: the layers.
        method: how they start.
        dataloader: if the method reads data: of ranks that share a layer the same.
        dropout: for the configuration in the artefact.
        forward_fn: ``(model, batch)``.
        options: see `smartinit.compute`.

    Raises:
        ConfigError, DataError, ModelError: see `smartinit.compute`.
    """
    first = targets[0].adapter
    config = LoraConfig(
        r=first.dim,
        lora_alpha=first.alpha,
        lora_dropout=dropout,
        target_modules=[target.name for target in targets],
        rank_pattern={target.name: target.adapter.dim for target in targets if target.adapter.dim != first.dim},
        init_lora_weights=method.name
        if method.name in INIT_METHODS
        else method.name != "random",  # as PEFT writes them
    )
    check_ranks(targets, config)
    request = RankRequest(targets, config, "uniform", Limits())
    capture = {name: options.pop(name) for name in [*options] if name.startswith("prepare_")}
    ears = [(target.ear, target.layers) for target in targets]
    with listening(ears if method.needs else (), gradients=method.needs == "gradients") as heard:
        if world_size() > 1 and method.needs != "gradients":
            forward_fn = _to_the_end(forward_fn, heard)
        settings = Options({"forward_fn": forward_fn, **capture}, planner="uniform", **options)
        return compute_jobs(model, [Job(method, request, targets)], dataloader, settings)[0]


def agreed(targets: Sequence[ShardedTarget], factors: Mapping[str, Factors], *, everywhere: bool) -> dict[str, Factors]:
    """The factors as the first rank has them; collective.

    Ranks that computed the same may differ in the last digit, or in a sign.

    Args:
        targets: the layers.
        factors: by name; others are left out.
        everywhere: whether all ranks have these layers; False: those of each layer's group.
    """
    out = {}
    for target in targets:
        pair = factors[target.name]
        base = None if pair.base is None else _of_first(pair.base, target, everywhere)
        a, b = (_of_first(matrix, target, everywhere) for matrix in (pair.a, pair.b))
        out[target.name] = replace(pair, a=a, b=b, base=base)
    return out


def known_names(targets: Sequence[ShardedTarget]) -> set[str]:
    """The layers that the model has on any rank; collective."""
    return {name for names in everyone("\n".join(target.name for target in targets)) for name in names.splitlines()}


def same_names(targets: Sequence[ShardedTarget]) -> bool:
    """Whether all ranks have the same layers; collective."""
    names = "\n".join(target.name for target in targets)
    return len(set(everyone(hashlib.sha256(names.encode()).hexdigest()))) == 1


def check_fit(
    targets: Sequence[ShardedTarget], factors: Mapping[str, Factors], plan: Plan, everyones: set[str]
) -> None:
    """Whether factors that were computed elsewhere are for these adapters.

    Args:
        targets: the adapters of this rank.
        factors: by name.
        plan: what they were computed for.
        everyones: names of all ranks' adapters, see `known_names`: a rank may have some of them only.

    Raises:
        ArtefactError: layers that one has and the other has not, other sizes, ranks or scalings.
    """
    ours = {target.name for target in targets}
    for name in [*sorted(ours - factors.keys()), *sorted(factors.keys() - everyones)]:
        has, lacks = ("model", "start") if name in ours else ("start", "model")
        near = checks.closest(name, factors if name in ours else everyones)
        raise ArtefactError(f"the {has} has a layer '{name}', which the {lacks} has not{near}")
    for target in targets:
        pair, name = factors[target.name], target.name
        wanted = (target.adapter.dim, target.in_features), (target.out_features, target.adapter.dim)
        if (tuple(pair.a.shape), tuple(pair.b.shape)) != wanted:
            raise ArtefactError(
                f"the start of '{name}' has A {tuple(pair.a.shape)} and B {tuple(pair.b.shape)}, but its adapter takes "
                f"{wanted[0]} and {wanted[1]}; use the dim that it was computed for"
            )
        ours_scaling, theirs = target.adapter.scaling, plan.scaling(name)
        if pair.effect != "keeps" and abs(ours_scaling - theirs) > 1e-9 * abs(theirs):
            raise ArtefactError(
                f"the start of '{name}' was computed for alpha/dim = {theirs:g}, but its adapter has {ours_scaling:g}; "
                "use the alpha that it was computed for"
            )
        if pair.base is not None and tuple(pair.base.shape) != target.shape:
            raise ArtefactError(
                f"the base weight that comes with '{name}' is {tuple(pair.base.shape)}: expected {target.shape}"
            )


def _of_first(tensor: torch.Tensor, target: ShardedTarget, everywhere: bool) -> torch.Tensor:
    if world_size() == 1 or (not everywhere and target.base.size == 1):
        return tensor
    sent = tensor.to(collective_device()).contiguous()
    if not everywhere:
        return first_of(sent, target.base.group).to(tensor)
    sent = sent.clone()
    dist.broadcast(sent, src=0)
    return sent.to(tensor)


def _to_the_end(forward_fn: ForwardFn, heard: Heard) -> ForwardFn:
    """The same, but passes end early on no rank, not even those in which something fails: others would wait for it."""

    def forward(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
        heard.failed = None
        output = forward_fn(model, without_cache(model, batch) if forward_fn is forward_fn_dict else batch)
        heard.check()
        return output

    return forward
