"""What a PEFT adapter folder adds to each weight, stacked parameters of experts taken apart from layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from smartinit.errors import ArtefactError, ConfigError
from smartinit.formats.megatron_experts import of_parameter
from smartinit.formats.megatron_fusion import Update
from smartinit.targets.patterns import alpha_for, rank_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.factors import Factors
    from smartinit.formats.peft import StoredAdapter

_WRAPPED = ".base_layer"
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


def stored_updates(stored: StoredAdapter) -> tuple[dict[str, Update], dict[str, Update]]:
    """Module name -> update, and name of a stacked parameter of experts -> update of all experts.

    Args:
        stored: as `smartinit.formats.peft.read_adapter` reads it.

    Raises:
        ConfigError: an adapter that is not ``W + s·B A`` of single layers: replicated layers, convolutions.
        ArtefactError: DoRA without magnitudes; a file that does not go with its configuration.
    """
    config = stored.config
    if config.layer_replication:
        raise ConfigError(
            f"'{stored.folder}' repeats layers (layer_replication), which have no names in Megatron; merge it into "
            "the repeated model"
        )
    layers: dict[str, Update] = {}
    stacks: dict[str, Update] = {}
    experts: dict[str, list[str]] = {}
    for name, pair in stored.factors.items():
        form = stored.forms.get(name)
        if form is not None and form.kernel:
            raise ConfigError(f"'{name}' is a convolution, for which Megatron's decoder has no layer")
        module = name.replace(_WRAPPED, "")
        if config.target_parameters and module.endswith(".experts"):
            experts.setdefault(module, []).append(name)
            continue
        if config.use_dora and pair.magnitude is None:
            raise ArtefactError(
                f"'{stored.folder}' is said to be DoRA, but holds no magnitude of '{name}'; train it and save it again"
            )
        whole = next((one for one in config.target_parameters or () if _means(one, module)), None)
        known = module if whole is None else f"{module}.{whole.rpartition('.')[2]}"
        layers[module] = Update(pair.a, pair.b, _scaling(stored, known, pair.rank), pair.magnitude)
    for module, names in experts.items():
        for parameter, pair in _assigned(stored, module, names).items():
            full = f"{module}.{parameter}"
            rank = rank_for(config, full)
            stacks[full] = of_parameter(pair.a, pair.b, rank, _scaling(stored, full, rank))
    return layers, stacks


def _scaling(stored: StoredAdapter, name: str, rank: int) -> float:
    return alpha_for(stored.config, name) / (math.sqrt(rank) if stored.config.use_rslora else rank)


def _means(entry: str, module: str) -> bool:
    """Whether an entry of target_parameters is of this module."""
    owner = entry.rpartition(".")[0]
    return bool(owner) and (module == owner or module.endswith(f".{owner}"))


def _assigned(stored: StoredAdapter, module: str, names: list[str]) -> Mapping[str, Factors]:
    """Parameter -> matrices: the file numbers the parts of one module by their nesting, not by name.

    Two parts are told apart by their sizes: gate_up reads what down writes, and has twice the rows that down reads.

    Raises:
        ArtefactError: parameters that are not known, or sizes that do not go together.
    """
    wanted = stored.config.target_parameters or ()
    known = [one for one in (_GATE_UP, _DOWN) if any(_ends(f"{module}.{one}", entry) for entry in wanted)]
    pairs = [stored.factors[name] for name in sorted(names, key=len, reverse=True)]  # the inner first
    if len(pairs) != len(known):
        raise ArtefactError(
            f"'{stored.folder}' has {len(pairs)} adapters of '{module}', but target_parameters={list(wanted)} names "
            f"{len(known)} of {_GATE_UP} and {_DOWN}, the parameters that are known"
        )
    for order in (pairs, pairs[::-1]):
        found = dict(zip(known, order, strict=True))
        if len(found) == 1 or _go_together(found[_GATE_UP], found[_DOWN]):
            return found
    raise ArtefactError(
        f"the sizes of the adapters of '{module}' in '{stored.folder}' are not those of a {_GATE_UP} (experts, 2·f, h) "
        f"and a {_DOWN} (experts, h, f)"
    )


def _ends(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _go_together(gate_up: Factors, down: Factors) -> bool:
    return gate_up.a.shape[1] == down.b.shape[0] and gate_up.b.shape[0] == 2 * down.a.shape[1]
