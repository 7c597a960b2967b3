"""The model card of an adapter folder: what hubs read at its top, and what people read below."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from smartinit.factors import Effect
    from smartinit.planning.plan import Plan
    from smartinit.recipe import Recipe

_TEXT = """\
---
{front}
---

# LoRA starting point: {method}

An adapter that is **not trained yet**: the starting point of a LoRA fine-tuning, computed with the method `{method}`
by smartinit {version}. {effect}

| module | layers | without adapter | smallest rank | mean rank | largest rank |
|---|---:|---:|---:|---:|---:|
{rows}

{total} ranks in {adapted} of {layers} layers. `smartinit.json` says how it was computed and how far it can be trusted.

```python
from peft import PeftModel

model = PeftModel.from_pretrained({model}, "path/to/this/folder", is_trainable=True)
```
"""
_CONVERTED = """\
---
{front}
---

# LoRA: a trained split, converted

Plain LoRA for the base model as it is. It was trained from a start that had changed the base, and converted by
smartinit: {exactness} `conversion.json` has the figures per layer.

| module | layers | without adapter | smallest rank | mean rank | largest rank |
|---|---:|---:|---:|---:|---:|
{rows}
"""
_KEEPS = "With it the model still computes exactly what the base model does."
_SHIFTS = "It starts elsewhere than the base model, on purpose; the base model is used as it is."
_DOUBLED = (
    "It is plain LoRA for the base model as it is, of twice the rank that was asked for: its two halves cancel, so "
    "that with it the model still computes what the base model does."
)
_RESIDUAL = """It does **not** belong to the base model itself but to the residual one, from which its product has been
subtracted. Write that model once, and use it wherever this adapter is used:

```python
from smartinit import Artefact
from smartinit.convert import save_residual_model

save_residual_model(base_model, Artefact.load("path/to/this/folder"), "residual/")
```

After training, `smartinit convert TRAINED --start THIS_FOLDER --out PLAIN` gives plain LoRA for the base model as it
is."""
_QUANTISES = _RESIDUAL.partition("\n\nAfter")[0].replace(
    "to the residual one, from which its product has been\nsubtracted",
    "to one with the quantised\nweights that are stored beside it",
)


def model_card(
    recipe: Recipe,
    plan: Plan,
    *,
    base_model: str | None,
    effects: Collection[Effect],
    base: Literal["residual", "doubled"] = "residual",
) -> str:
    """The text of ``README.md``.

    Args:
        recipe: how the adapter was computed.
        plan: ranks by layer, as they are in the folder; summed up by the last part of the layers' names.
        base_model: folder or hub name of the base model, if it has one.
        effects: what the factors do to the base.
        base: which base model a split in the folder is for.
    """
    return _TEXT.format(
        front=_front(base_model, recipe.method),
        method=recipe.method,
        version=recipe.version,
        effect=_effect(effects, base),
        model=_model(effects, base),
        rows=_table(plan),
        total=plan.total,
        adapted=sum(rank > 0 for rank in plan.ranks.values()),
        layers=len(plan.ranks),
    )


def converted_card(plan: Plan, *, base_model: str | None, error: float) -> str:
    """The text of ``README.md`` of an adapter that was converted.

    Args:
        plan: ranks by layer.
        base_model: folder or hub name of the unmodified base model, if it has one.
        error: relative error of all updates together.
    """
    exactness = (
        f"its updates differ from the exact ones by {error:.2g} (relative Frobenius norm), because its matrices were "
        "rounded or cut to a smaller rank."
        if error
        else "with it the model computes what it did when it was trained."
    )
    return _CONVERTED.format(front=_front(base_model), exactness=exactness, rows=_table(plan))


def _front(base_model: str | None, *more_tags: str) -> str:
    front: dict[str, object] = {"base_model": base_model} if base_model else {}
    tags = ["lora", "peft", "smartinit", *more_tags]
    if base_model:
        tags.append(f"base_model:adapter:{base_model}")
    front |= {"library_name": "peft", "tags": tags}
    # JSON is YAML, quotes included: no name can break out of its line.
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())


def _table(plan: Plan) -> str:
    return "\n".join(_row(kind, ranks) for kind, ranks in _by_kind(plan.ranks).items())


def _effect(effects: Collection[Effect], base: str) -> str:
    if "quantises" in effects:
        return _QUANTISES
    if "splits" in effects:
        return _DOUBLED if base == "doubled" else _RESIDUAL
    return _SHIFTS if "shifts" in effects else _KEEPS


def _model(effects: Collection[Effect], base: str) -> str:
    """What the loading line calls the model that the folder is for."""
    if "quantises" in effects:
        return "quantised_model"
    return "residual_model" if "splits" in effects and base == "residual" else "base_model"


def _by_kind(ranks: Mapping[str, int]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    return kinds


def _row(kind: str, ranks: list[int]) -> str:
    mean = sum(ranks) / len(ranks)
    return f"| `{kind}` | {len(ranks)} | {ranks.count(0)} | {min(ranks)} | {mean:.1f} | {max(ranks)} |"
