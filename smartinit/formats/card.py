"""The model card of an adapter folder: what hubs read at its top, and what people read below."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

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

model = PeftModel.from_pretrained(base_model, "path/to/this/folder", is_trainable=True)
```
"""
_KEEPS = "With it the model still computes exactly what the base model does."
_SPLITS = "It belongs to a base model from which its product has been subtracted."


def model_card(recipe: Recipe, plan: Plan, *, base_model: str | None, keeps_base: bool) -> str:
    """The text of ``README.md``.

    Args:
        recipe: how the adapter was computed.
        plan: ranks by layer; summed up by the last part of the layers' names.
        base_model: folder or hub name of the base model, if it has one.
        keeps_base: the product of the factors is zero.
    """
    front: dict[str, object] = {"base_model": base_model} if base_model else {}
    tags = ["lora", "peft", "smartinit", recipe.method]
    if base_model:
        tags.append(f"base_model:adapter:{base_model}")
    front |= {"library_name": "peft", "tags": tags}
    return _TEXT.format(
        # JSON is YAML, quotes included: no name can break out of its line.
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        method=recipe.method,
        version=recipe.version,
        effect=_KEEPS if keeps_base else _SPLITS,
        rows="\n".join(_row(kind, ranks) for kind, ranks in _by_kind(plan.ranks).items()),
        total=plan.total,
        adapted=sum(rank > 0 for rank in plan.ranks.values()),
        layers=len(plan.ranks),
    )


def _by_kind(ranks: Mapping[str, int]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    return kinds


def _row(kind: str, ranks: list[int]) -> str:
    mean = sum(ranks) / len(ranks)
    return f"| `{kind}` | {len(ranks)} | {ranks.count(0)} | {min(ranks)} | {mean:.1f} | {max(ranks)} |"
