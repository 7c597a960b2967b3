"""What all of Megatron Bridge's ways to adapt a model have: apply, freeze, switch on and off, choose what is saved."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.adapter import Factor
from smartinit.adapters.parallel.experts import without_layers
from smartinit.adapters.parallel.initial import collective_device, common_seed
from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.adapters.parallel.placed import is_data_parallel
from smartinit.config.checks import closest
from smartinit.errors import ConfigError, ModelError, TargetError
from smartinit.megatron.agreement import failing_together
from smartinit.megatron.matching import ModuleMatcher, fits
from smartinit.megatron.recompute import let_gradients_in
from smartinit.megatron.walk import Place, adapted_layers, chunks_of, install, places, warn_of_meta, warn_of_wrappers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from smartinit.megatron.walk import Model

M = TypeVar("M", nn.Module, list[nn.Module])


@dataclass
class PEFT(ModuleMatcher):
    """Applies adapters to a model, or to the chunks of one.

    Attributes:
        params_to_save: names of the parameters and buffers that `set_params_to_save` has found.
    """

    params_to_save: set[str] = field(default_factory=set, init=False, repr=False)

    def adapted(self, place: Place, pattern: str, *, seed: int, shared: dict[str, nn.Module]) -> nn.Module:
        """The layer that takes the place of a target, with its adapter started; the model is not touched.

        Args:
            place: the target.
            pattern: that it was found by.
            seed: the same on all ranks.
            shared: adapters of this chunk that several layers use, by name; what is made is added.

        Raises:
            ConfigError: options that do not fit the layer.
            ModelError: a module that cannot have an adapter.
        """
        raise NotImplementedError

    def start(self, layers: Sequence[tuple[Place, nn.Module]], *, seed: int) -> None:
        """Give the adapters of layers that `adapted` has made another start, if there is one; collective.

        Args:
            layers: with their places; they are in no model yet.
            seed: the same on all ranks.

        Raises:
            ConfigError, ModelError: there can be none; nothing has changed then.
        """

    def check(self) -> None:
        """Whether the options go together.

        Raises:
            ConfigError: they do not.
        """

    def __call__(self, model: M, training: bool = True) -> M:
        """Freeze the base model and put adapters beside its targets, in place.

        Layers that have an adapter already keep it, and what of it is trained; one that is a target here and was frozen
        as a whole is trained again. Every rank of the default process group must call this: the ranks agree on a seed
        and on which patterns have found a module.

        Args:
            model: a module, a list of chunks, or either in a data-parallel wrapper.
            training: False freezes the adapters as well, and sets the model to evaluation.

        Returns:
            The model: another object only if it was a target itself.

        Raises:
            ConfigError: options that do not go together or do not fit a layer.
            TargetError: a target that is the name of no module, on any rank.
            ModelError: a target that cannot have an adapter. The model is as it was after each of these.
        """
        with failing_together():
            self.check()
        kept = {id(p) for _, layer in adapted_layers(model) for p in layer.adapter.parameters() if p.requires_grad}
        made, started = self._made(model)
        again = [layer for place, layer in adapted_layers(model) if self._means(place) and _is_frozen(layer)]
        self.freeze_model(model, training=training)
        whole: Model = model
        for chunk, place, module in made:
            whole = install(whole, chunk, place, module)
        ours = [layer for layer in started if isinstance(layer, AdaptedLayer)] + again
        new = {id(p) for layer in ours for p in layer.adapter.parameters()}
        for _, layer in adapted_layers(whole):
            _let_train(layer, kept | new if training else set())
        for chunk in whole if isinstance(whole, list) else [whole]:
            chunk.train(training)
        if training:
            let_gradients_in(whole)
        if made and training:
            warn_of_wrappers(whole)
        warn_of_meta(ours)
        return cast("M", whole)

    def _made(self, model: Model) -> tuple[list[tuple[nn.Module, Place, nn.Module]], list[nn.Module]]:
        """Chunk, place and adapted layer of every target, started but not installed; and these layers, each once.

        Raises:
            ConfigError, TargetError, ModelError: see `__call__`; nothing has changed then.
        """
        found = self._targets(model)
        seed = common_seed()
        # Of each chunk its own: layers of two chunks that do not know their numbers have the same names.
        shared: dict[int, dict[str, nn.Module]] = {id(chunk): {} for chunk in chunks_of(model)}
        made: list[tuple[nn.Module, Place, nn.Module]] = []
        layers: dict[int, tuple[Place, nn.Module]] = {}  # a module that is used in two places has one adapter
        try:
            with failing_together():
                for chunk, place, pattern in found:
                    if id(place.module) not in layers:
                        layer = self.adapted(place, pattern, seed=seed, shared=shared[id(chunk)])
                        layers[id(place.module)] = (place, layer)
                    made.append((chunk, place, layers[id(place.module)][1]))
            self.start(list(layers.values()), seed=seed)
        except BaseException:
            for _, layer in layers.values():
                if isinstance(layer, AdaptedLayer):
                    layer.unwrapped()
            raise
        return made, [layer for _, layer in layers.values()]

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """One module with its adapter, if it is a target; else the module itself.

        The ranks of the default process group agree on a seed if it is one: all of them must call this for it.

        Args:
            module: it; not changed, and not frozen.
            name: its own name.
            prefix: the full name of what it is in.

        Raises:
            ConfigError, ModelError: see `__call__`.
        """
        self.check()
        if isinstance(module, AdaptedLayer):
            return module
        matched = self.match(module, name, prefix)
        if matched is None or self.spares(matched[1]):
            return module
        pattern, full_name = matched
        place = Place(module, None, full_name, full_name, getattr(module, "ep_group", None))
        seed = common_seed()
        made = self.adapted(place, pattern, seed=seed, shared={})
        try:
            self.start([(place, made)], seed=seed)
        except BaseException:
            if isinstance(made, AdaptedLayer):
                made.unwrapped()
            raise
        return made

    def spares(self, name: str) -> bool:
        """Whether a target keeps to be without adapter, such as one in a part that trains in full.

        Args:
            name: its full name.
        """
        del name
        return False

    def freeze_model(self, model: Model, training: bool = True) -> None:
        """Freeze all parameters of the model.

        Args:
            model: see `__call__`.
            training: set the model to training mode.
        """
        for chunk in chunks_of(model):
            chunk.requires_grad_(False)
            if training:
                chunk.train()

    def enable_adapter_layers(self, model: Model) -> None:
        """Let the adapters of the model add their updates."""
        for _, layer in adapted_layers(model):
            layer.enable_adapter_layers()

    def disable_adapter_layers(self, model: Model) -> None:
        """Let the model compute what its base computes.

        Raises:
            ModelError: an adapter is merged; none is switched off then.
        """
        layers = [layer for _, layer in adapted_layers(model)]
        for layer in sorted(layers, key=lambda layer: not layer.merged):  # the one that refuses comes first
            layer.disable_adapter_layers()

    @contextmanager
    def disable_adapter(self, model: Model) -> Iterator[None]:
        """The base model within a ``with`` block; afterwards, and after an error, each adapter as it was before."""
        before = [(layer, layer._adapter_enabled) for _, layer in adapted_layers(model)]  # noqa: SLF001 - ours
        self.disable_adapter_layers(model)
        try:
            yield
        finally:
            for layer, enabled in before:
                if enabled:
                    layer.enable_adapter_layers()

    def set_params_to_save(self, model: Model) -> None:
        """Note what a checkpoint of the adapted model must hold: what is trained, and running statistics.

        The names are those of `torch.nn.Module.named_parameters` and, where they differ, those of the state dict.
        """
        names: set[str] = set()
        for chunk in model if isinstance(model, list) else [model]:
            names.update(name for name, parameter in chunk.named_parameters() if parameter.requires_grad)
            for path, module in chunk.named_modules():
                if hasattr(module, "track_running_stats"):
                    names.update(f"{path}.{name}" if path else name for name, _ in module.named_buffers(recurse=False))
        self.params_to_save = names | {name.replace(".to_wrap.", ".") for name in names}

    def adapter_key_filter(self, key: str | tuple[Any, ...]) -> bool:
        """Whether a checkpoint of the adapters holds this.

        Args:
            key: the key of a state dict; or a tuple whose second entry is the parameter.
        """
        if isinstance(key, tuple):
            return bool(key[1].requires_grad)
        return (
            key in self.params_to_save or ".adapter." in key or key.startswith("adapter.") or key.endswith(".adapters")
        )

    def _targets(self, model: Model) -> list[tuple[nn.Module, Place, str]]:
        """Chunk, place and pattern of every target that has no adapter yet.

        Raises:
            ConfigError: see `ModuleMatcher.match`.
            TargetError: a pattern without a module on any rank, or no target at all.
            ModelError: the experts' layers are meant, but they have none.
        """
        found: list[tuple[nn.Module, Place, str]] = []
        used: set[str] = set()
        names: set[str] = set()
        excluded: set[str] = set()
        unreachable: Place | None = None
        for chunk in chunks_of(model):
            for place in places(chunk):
                names.add(place.attribute)
                if without_layers(place.module) and self._means_experts(place):
                    unreachable = place
                excluded.update(p for p in self.exclude_modules if fits(p, place.attribute or None, place.name))
                layer = place.module.to_wrap if isinstance(place.module, AdaptedLayer) else place.module
                if (matched := self.match(layer, place.attribute or None, place.prefix)) is None:
                    continue
                used.update(self.fitting(place.attribute or None, place.prefix) or matched[:1])
                if not isinstance(place.module, AdaptedLayer) and not self.spares(place.name):
                    found.append((chunk, place, matched[0]))
        self._check_used(used if unreachable is None else {*used, *self.patterns()}, excluded, names)
        if unreachable is not None:  # said only now, as the other ranks wait for this one in the check
            raise ModelError(
                f"'{unreachable.name}' ({type(unreachable.module).__name__}) holds its experts' weights itself, so it "
                "has no linear_fc1 and linear_fc2 to adapt; build the model with SequentialMLP or TEGroupedMLP "
                "experts, or name other layers in target_modules (such as '*.shared_experts.linear_fc1')"
            )
        if found and any(is_data_parallel(module) for chunk in chunks_of(model) for module in chunk.modules()):
            raise ConfigError(
                f"'{found[0][1].name}' is in a model that fully_shard has shared out among data-parallel ranks "
                "already; adapt it before fully_shard"
            )
        return found

    def _means(self, place: Place) -> bool:
        """Whether an adapted layer is a target."""
        layer: Any = place.module
        return self.match(layer.to_wrap, place.attribute or None, place.prefix) is not None

    def _means_experts(self, place: Place) -> bool:
        """Whether a target is a module of experts, or would be one of the layers that others of its kind have."""
        layers = (("linear_fc1", place.name), ("linear_fc2", place.name), (place.attribute, place.prefix))
        return any(self.match(place.module, *layer) is not None for layer in layers)

    def _check_used(self, used: set[str], excluded: set[str], names: set[str]) -> None:
        """Whether every pattern has found a module on some rank (the others may have other layers); collective."""
        patterns = self.patterns()
        flags = [pattern in used for pattern in patterns] or [bool(used)]
        flags += [pattern in excluded for pattern in self.exclude_modules]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            seen = torch.tensor([float(flag) for flag in flags], device=collective_device())
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
            flags = [bool(flag) for flag in seen.tolist()]
        for pattern, flag in zip(self.exclude_modules, flags[len(patterns) or 1 :], strict=True):
            if not flag:
                near = closest(pattern.rpartition(".")[2], names)
                raise TargetError(f"exclude_modules: {pattern!r} is the name of no module in the model{near}")
        named = any(flags) and self._has_default_targets()  # nobody has asked for each of those
        for pattern, flag in zip(patterns, flags, strict=False):
            if not flag and not named:
                near = closest(pattern.rpartition(".")[2], names)
                raise TargetError(f"target_modules: {pattern!r} is the name of no module in the model{near}")
        if not patterns and not flags[0]:
            raise TargetError(
                f"no linear layer of the model is left as a target by exclude_modules={self.exclude_modules}"
            )

    def _has_default_targets(self) -> bool:
        """Whether ``target_modules`` is what it is when nothing is said."""
        default = next(f for f in fields(self) if f.name == "target_modules").default_factory
        return default is not MISSING and list(self.target_modules or []) == default()


def _is_frozen(layer: AdaptedLayer) -> bool:
    return not any(parameter.requires_grad for parameter in layer.adapter.parameters())


def _let_train(layer: AdaptedLayer, ids: set[int]) -> None:
    """These parameters of the adapter are trained, but for factors whose start says that they stay."""
    for parameter in layer.adapter.parameters():
        parameter.requires_grad_(id(parameter) in ids)
    for factor in layer.adapter.modules():
        if isinstance(factor, Factor) and not factor.trained:
            factor.weight.requires_grad_(False)
