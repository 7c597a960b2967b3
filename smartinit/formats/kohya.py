"""Adapters of image models as kohya's scripts, and the programs that draw with them, keep them: one safetensors file.

A layer ``down_blocks.0.attn1.to_q`` of a U-Net is ``lora_unet_down_blocks_0_attn1_to_q`` there, of a text encoder
``lora_te_…`` (SDXL: ``lora_te1_…``, ``lora_te2_…``), and it has, for rank r:

- ``.lora_down.weight``: A, ``(r, in)``, of a convolution ``(r, channels, *kernel)``
- ``.lora_up.weight``: B, ``(out, r)``, of a convolution ``(out, r, 1, …)``
- ``.alpha``: a number; the scaling is always ``alpha / r``, and where it is missing alpha is r
- ``.dora_scale``: DoRA's magnitude, ``(out, 1, …)`` with as many dimensions as the base weight

Dots and underscores cannot be told apart in such a name, so reading needs the names of the model's modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as save_tensors

from smartinit.errors import ArtefactError, ConfigError, MissingFileError, VerificationError
from smartinit.factors import Factors
from smartinit.formats.files import write_file
from smartinit.formats.tensors import Form, mapped_file, shaped
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

_DOWN, _UP, _ALPHA, _MAGNITUDE = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"
_PARTS = (_DOWN, _UP, _ALPHA, _MAGNITUDE)
_PICKLES = (".pt", ".ckpt", ".bin", ".pth")


@dataclass(frozen=True, eq=False)
class KohyaAdapter:
    """What a file holds for one model.

    Attributes:
        plan: rank and alpha by module name.
        factors: module name -> ``a (r, in)``, ``b (out, r)``, in the file's order; windows into the file.
        forms: module name -> how files show them.
    """

    plan: Plan
    factors: Mapping[str, Factors]
    forms: Mapping[str, Form]


def kohya_tensors(
    plan: Plan,
    factors: Mapping[str, Factors],
    *,
    prefix: str = "lora_unet",
    forms: Mapping[str, Form] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of the file by kohya's keys, each with its own memory.

    Args:
        plan: rank and alpha by module name; a rank-stabilised scaling is written as the alpha that gives it.
        factors: module name -> factors; those of rank 0 are left out.
        prefix: which model they are for: ``"lora_unet"``, ``"lora_te"``, ``"lora_te1"``, ``"lora_te2"``.
        forms: module name -> form, for convolutions.
        dtype: of the matrices; None: what each of them has.

    Raises:
        ConfigError: an embedding, which the format has no names for; or two modules with the same name in it.
        VerificationError: a value is not finite, before or after rounding.
    """
    tensors: dict[str, torch.Tensor] = {}
    owner: dict[str, str] = {}
    for name, pair in factors.items():
        if pair.rank == 0:
            continue
        form = (forms or {}).get(name, Form())
        if form.embedding:
            raise ConfigError(f"'{name}' is an embedding, for which kohya's format has no names; leave it out")
        flat = _flat(prefix, name)
        if owner.setdefault(flat, name) != name:
            raise ConfigError(f"'{owner[flat]}' and '{name}' are both called '{flat}' in kohya's format")
        down, up, *magnitudes = shaped(name, pair, form).values()
        for part, tensor in ((_DOWN, down), (_UP, up), *((_MAGNITUDE, one) for one in magnitudes)):
            stored = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype, copy=True)
            if part == _MAGNITUDE:
                stored = tensor.detach().float().cpu().reshape(-1, *(1,) * (down.ndim - 1)).clone()
            if not torch.isfinite(stored).all():
                said = str(stored.dtype).removeprefix("torch.")
                raise VerificationError(f"'{flat}{part}' holds NaN or Inf as {said}; it is not written")
            tensors[flat + part] = stored.contiguous()
        # Not in half precision: it would round the scaling.
        tensors[flat + _ALPHA] = torch.tensor(plan.scaling(name) * plan.ranks[name], dtype=torch.float32, device="cpu")
    return tensors


def write_kohya(
    path: str | os.PathLike[str],
    plan: Plan,
    factors: Mapping[str, Factors],
    *,
    prefix: str = "lora_unet",
    forms: Mapping[str, Form] | None = None,
    dtype: torch.dtype | None = None,
    others: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write one file, in one step.

    Args:
        path: where to.
        plan: as of `kohya_tensors`, like the next ones.
        factors: see there.
        prefix: see there.
        forms: see there.
        dtype: see there.
        others: what `kohya_tensors` gives for further models, to stand in the same file.

    Raises:
        ConfigError, VerificationError: as of `kohya_tensors`; ``others`` holds a key of this model.
        OutputError: the file cannot be written.
    """
    tensors = kohya_tensors(plan, factors, prefix=prefix, forms=forms, dtype=dtype)
    twice = next((key for key in tensors if key in (others or {})), None)
    if twice is not None:
        raise ConfigError(f"'{twice}' is given for two models; give each of them a prefix of its own")
    metadata = {"format": "pt", "ss_network_module": "networks.lora"}
    ranks = {plan.ranks[name] for name, pair in factors.items() if pair.rank}
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(_ALPHA)}
    if len(ranks) == len(alphas) == 1 and not others:  # readers take them for every layer's
        metadata |= {"ss_network_dim": str(ranks.pop()), "ss_network_alpha": str(alphas.pop())}
    write_file(Path(path), save_tensors(tensors | dict(others or {}), metadata=metadata))


def read_kohya(path: str | os.PathLike[str], module_names: Iterable[str], prefix: str = "lora_unet") -> KohyaAdapter:
    """The adapter for one model in a file; nothing in it is trusted, and nothing is unpickled.

    Args:
        path: the file.
        module_names: names of the model's modules: one of them must be meant by each name in the file.
        prefix: which model, as of `kohya_tensors`; keys with other prefixes are passed over.

    Raises:
        MissingFileError: there is no such file.
        ArtefactError: broken, or a pickle; nothing for this model; a name that means no module, or several; a tensor of
            another kind of adapter; matrices that do not fit each other.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"there is no file '{file}'; name a safetensors file in kohya's format")
    if file.suffix in _PICKLES:
        raise ArtefactError(
            f"'{file}' is a pickle, which can run any code when it is read, so it is not; convert it to safetensors "
            "where you trust it"
        )
    tensors, _ = mapped_file(file)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{prefix}_"):
            flat, dot, part = key.partition(".")
            layers.setdefault(flat, {})[dot + part] = tensor
    if not layers:
        found = sorted({"_".join(key.split("_")[:2]) for key in tensors})[:5]
        raise ArtefactError(f"'{file}' holds nothing for prefix '{prefix}'; its keys begin with: {', '.join(found)}")
    names = _resolve(file, layers, module_names, prefix)
    ranks, alphas, factors, forms = {}, {}, {}, {}
    for flat, parts in layers.items():
        name = names[flat]
        pair, alpha, forms[name] = _layer(file, flat, parts)
        factors[name], ranks[name], alphas[name] = pair, pair.rank, alpha
    return KohyaAdapter(Plan(ranks, alphas), factors, forms)


def _flat(prefix: str, name: str) -> str:
    return f"{prefix}_{name.replace('.', '_')}"


def _resolve(file: Path, layers: Iterable[str], module_names: Iterable[str], prefix: str) -> dict[str, str]:
    """Name in the file -> module."""
    meant: dict[str, list[str]] = {}
    for name in module_names:
        meant.setdefault(_flat(prefix, name), []).append(name)
    unknown = [flat for flat in layers if flat not in meant]
    if unknown:
        raise ArtefactError(
            f"'{file}' has weights for {len(unknown)} layers that this model does not have, for instance "
            f"'{unknown[0]}'; was it made for another model, or for one whose blocks have other names?"
        )
    several = next((flat for flat in layers if len(meant[flat]) > 1), None)
    if several is not None:
        raise ArtefactError(
            f"'{several}' in '{file}' may mean any of {', '.join(map(repr, meant[several]))}; give only the module "
            "names that can have an adapter"
        )
    return {flat: meant[flat][0] for flat in layers}


def _layer(file: Path, flat: str, parts: Mapping[str, torch.Tensor]) -> tuple[Factors, float, Form]:
    """Factors, alpha and form of one layer."""
    odd = next((part for part in parts if part not in _PARTS), None)
    if odd is not None:
        raise ArtefactError(
            f"'{file}' holds '{flat}{odd}', which is no part of a LoRA; expected {', '.join(_PARTS)} (LoHa, LoKr and "
            "other kinds of adapters cannot be read)"
        )
    missing = next((part for part in (_DOWN, _UP) if part not in parts), None)
    if missing is not None:
        raise ArtefactError(f"'{file}' lacks '{flat}{missing}', the other matrix of layer '{flat}'")
    a, b = parts[_DOWN], parts[_UP]
    fits = a.ndim == b.ndim >= 2 and a.shape[0] == b.shape[1] > 0 and b.shape[2:].numel() == 1  # noqa: PLR2004
    if not fits or not a.is_floating_point() or not b.is_floating_point():
        raise ArtefactError(
            f"'{file}' gives layer '{flat}' a lora_down of shape {tuple(a.shape)} and a lora_up of shape "
            f"{tuple(b.shape)}; their rank must be the same and at least 1"
        )
    alpha = parts.get(_ALPHA)
    if alpha is not None and alpha.numel() != 1:
        raise ArtefactError(f"'{file}' gives layer '{flat}' an alpha of shape {tuple(alpha.shape)}; expected a number")
    if alpha is not None and not torch.isfinite(alpha).all():
        raise ArtefactError(f"'{file}' gives layer '{flat}' the alpha {float(alpha)}; expected a finite number")
    magnitude = parts.get(_MAGNITUDE)
    if magnitude is not None and (magnitude.shape[:1] != b.shape[:1] or magnitude.numel() != b.shape[0]):
        raise ArtefactError(
            f"'{file}' gives layer '{flat}' a dora_scale of shape {tuple(magnitude.shape)}, but DoRA here has one "
            f"number for each of the {b.shape[0]} outputs; norms over inputs cannot be read"
        )
    pair = Factors(a.flatten(1), b.flatten(1), magnitude=None if magnitude is None else magnitude.flatten())
    return pair, float(a.shape[0]) if alpha is None else float(alpha), Form(kernel=tuple(a.shape[2:]))
