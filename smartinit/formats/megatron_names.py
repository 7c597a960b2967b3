"""The names of a decoder's layers in Hugging Face's models and in Megatron's, both ways.

One layer of Megatron holds what are several in a model of Hugging Face: ``linear_qkv`` the projections q, k and v,
``linear_fc1`` gate and up. Experts have a module each (``local_experts.3.linear_fc1``), or one for all of them
(``experts.linear_fc1``). A Hugging Face model has a module for each as well, or, in transformers 5, one parameter for
all (``experts.gate_up_proj``). Layers of a model that also sees have ``language_model.`` before their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from smartinit.errors import ArtefactError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Experts = Literal["modules", "parameters"]
Part = Literal["q", "k", "v", "gate", "up"]
QKV: tuple[Part, ...] = ("q", "k", "v")
GATED: tuple[Part, ...] = ("gate", "up")

_LAYER = re.compile(r"(?P<prefix>(?:model\.)?(?:language_model\.)?(?:model\.)?)layers\.(?P<layer>\d+)\.(?P<tail>.+)")
_WHOLE = re.compile(
    r"(?P<prefix>(?:model\.)?(?:language_model\.)?(?:model\.)?)(?P<tail>embed_tokens|lm_head)",
)
_EXPERT = re.compile(r"(?P<home>mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)")
_STACK = re.compile(r"(?P<home>mlp|block_sparse_moe)\.experts\.(?P<part>gate_up_proj|down_proj)")
_TAILS: Mapping[str, tuple[str, Part | None]] = {
    "self_attn.q_proj": ("self_attention.linear_qkv", "q"),
    "self_attn.k_proj": ("self_attention.linear_qkv", "k"),
    "self_attn.v_proj": ("self_attention.linear_qkv", "v"),
    "self_attn.o_proj": ("self_attention.linear_proj", None),
    "mlp.gate_proj": ("mlp.linear_fc1", "gate"),
    "mlp.up_proj": ("mlp.linear_fc1", "up"),
    "mlp.down_proj": ("mlp.linear_fc2", None),
    "mlp.gate": ("mlp.router", None),
    "block_sparse_moe.gate": ("mlp.router", None),
}
_OF_EXPERT: Mapping[str, tuple[str, Part | None]] = {
    "gate_proj": ("linear_fc1", "gate"),
    "up_proj": ("linear_fc1", "up"),
    "down_proj": ("linear_fc2", None),
    "w1": ("linear_fc1", "gate"),
    "w3": ("linear_fc1", "up"),
    "w2": ("linear_fc2", None),
}
_SHARED = re.compile(r"mlp\.(?P<home>shared_experts?)\.(?P<part>gate_proj|up_proj|down_proj)")
_MEGATRON_LAYER = re.compile(r"(?P<seeing>language_model\.)?decoder\.layers\.(?P<layer>\d+)\.(?P<tail>.+)")
_MEGATRON_WHOLE = re.compile(r"(?P<seeing>language_model\.)?(?P<tail>embedding\.word_embeddings|output_layer)")
_MEGATRON_EXPERT = re.compile(r"mlp\.experts(?:\.local_experts\.(?P<expert>\d+|\*))?\.(?P<part>linear_fc[12])")
_KNOWN_HERE = (
    "self_attn.{q,k,v,o}_proj, mlp.{gate,up,down}_proj, experts, shared experts, routers, embed_tokens and lm_head of "
    "Llama, Qwen, Mistral, Gemma and Mixtral"
)


@dataclass(frozen=True)
class Place:
    """Where an adapter is in Megatron's model.

    Attributes:
        module: name of the layer; of an expert's that of the layer of all experts (``….mlp.experts.linear_fc1``).
        part: which projection of a fused layer; None: all of the layer.
        expert: number of the expert; None: no expert's, or that of all of them.
        stacked: whether it is the part of a parameter that holds all experts.
    """

    module: str
    part: Part | None = None
    expert: int | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Spelling:
    """How a Hugging Face model writes what Megatron writes in one way.

    Attributes:
        prefix: before ``layers`` and ``embed_tokens``.
        head: name of the output layer.
        router: after the layer's number.
        shared: where the shared experts are.
        experts: what holds the experts, as `Experts`.
        home: what the experts are in.
        w: whether their projections are w1, w2 and w3.
    """

    prefix: str = "model."
    head: str = "lm_head"
    router: str = "mlp.gate"
    shared: str = "mlp.shared_expert"
    experts: Experts = "parameters"
    home: str = "mlp"
    w: bool = False

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: object) -> Spelling:
        """The inverse of `as_dict`; what is missing has its default.

        Raises:
            ArtefactError: something else.
        """
        given = values if isinstance(values, dict) else {}
        default = vars(cls())
        fine = isinstance(values, dict) and all(
            key in default and isinstance(value, type(default[key])) for key, value in given.items()
        )
        names = [str(value) for key, value in given.items() if key != "w"]
        fine = fine and given.get("experts", default["experts"]) in get_args(Experts)
        if not fine or not all(re.fullmatch(r"(?:[A-Za-z0-9_]+\.?)*", name) for name in names):
            raise ArtefactError(f"{values!r} does not say how a model writes its names; the folder is broken")
        return cls(**given)


def to_megatron(name: str, *, gated: bool = True) -> Place:
    """Where the layer, or the stacked parameter of experts, with this name in a Hugging Face model is in Megatron's.

    Args:
        name: in the model, without what PEFT puts before it.
        gated: whether its feed-forward layers have a gate; without, ``up_proj`` is all of ``linear_fc1``.

    Raises:
        ArtefactError: Megatron has no such layer, as far as this package knows.
    """
    if (whole := _WHOLE.fullmatch(name)) is not None:
        module = "embedding.word_embeddings" if whole["tail"] == "embed_tokens" else "output_layer"
        return Place(_seeing(whole["prefix"]) + module)
    found = _LAYER.fullmatch(name)
    place = None if found is None else _place(found["tail"])
    if found is None or place is None:
        raise ArtefactError(f"'{name}' has no known name in Megatron; known are {_KNOWN_HERE}")
    module = f"{_seeing(found['prefix'])}decoder.layers.{int(found['layer'])}.{place.module}"
    part = place.part
    if not gated and part in GATED:
        if part == "gate":
            raise ArtefactError(f"'{name}' is a gate, but the model is said to have none; give gated=True")
        part = None
    return Place(module, part, place.expert, place.stacked)


def to_peft(place: Place, spelling: Spelling, *, gated: bool = True) -> str:
    """The name of a layer, of a projection of one, or of a stacked parameter in a Hugging Face model.

    Args:
        place: in Megatron's model; ``stacked`` decides between a module and a parameter of experts.
        spelling: of the model.
        gated: as of `to_megatron`.

    Raises:
        ArtefactError: a layer of Megatron's that has no known name there.
    """
    if (whole := _MEGATRON_WHOLE.fullmatch(place.module)) is not None:
        return f"{spelling.prefix}embed_tokens" if "embedding" in whole["tail"] else spelling.head
    found = _MEGATRON_LAYER.fullmatch(place.module)
    tail = None if found is None else _tail(found["tail"], place, spelling, gated=gated)
    if found is None or tail is None:
        raise unknown_module(place.module)
    return f"{spelling.prefix}layers.{found['layer']}.{tail}"


def unknown_module(name: str) -> ArtefactError:
    """What to say of a layer of Megatron's that is not known."""
    return ArtefactError(
        f"'{name}' has no known name in a Hugging Face model; known are linear_qkv, linear_proj, linear_fc1, "
        "linear_fc2, experts, shared experts, routers, word_embeddings and output_layer of a decoder"
    )


def grouped(name: str) -> Place:
    """A layer's name in a folder of Megatron's adapters: of ``local_experts`` that of all experts, and the number.

    Raises:
        ArtefactError: it is not known.
    """
    found = _MEGATRON_LAYER.fullmatch(name)
    expert = None if found is None else _MEGATRON_EXPERT.fullmatch(found["tail"])
    if found is not None and expert is not None:
        head = name.removesuffix(found["tail"])
        number = expert["expert"]
        return Place(f"{head}mlp.experts.{expert['part']}", expert=None if number in (None, "*") else int(number))
    probe = Place(name, GATED[0] if name.endswith("linear_fc1") else QKV[0] if name.endswith("linear_qkv") else None)
    to_peft(probe, Spelling())
    return Place(name)


def parts_of(module: str, *, gated: bool = True) -> tuple[Part, ...]:
    """The projections that a layer of Megatron's is made of; none for one that is not fused."""
    if module.endswith(".linear_qkv"):
        return QKV
    return GATED if gated and module.endswith(".linear_fc1") else ()


def is_experts(module: str) -> bool:
    """Whether it is the layer of all routed experts, as in `Place`."""
    return ".mlp.experts." in module


def local_expert(module: str, expert: int) -> str:
    """The layer of one expert among Megatron's sequential ones."""
    return module.replace(".mlp.experts.", f".mlp.experts.local_experts.{expert}.")


def spelling_of(names: Iterable[str]) -> Spelling:
    """How the model with these layers and parameters writes its names; what they do not show has its default.

    Raises:
        ArtefactError: some are of one model and some of another.
    """
    seen: dict[str, object] = {}
    for name in names:
        for key, value in _shown(name).items():
            if seen.setdefault(key, value) != value:
                raise ArtefactError(
                    f"'{name}' is written for another model than the names before it ({key} {value!r}, not "
                    f"{seen[key]!r}); an adapter of one model is expected"
                )
    return Spelling(**seen)  # type: ignore[arg-type] # names of its own fields


def _seeing(prefix: str) -> str:
    return "language_model." if "language_model." in prefix else ""


def _place(tail: str) -> Place | None:
    if tail in _TAILS:
        return Place(*_TAILS[tail])
    if (shared := _SHARED.fullmatch(tail)) is not None:
        layer, part = _OF_EXPERT[shared["part"]]
        return Place(f"mlp.shared_experts.{layer}", part)
    if (stack := _STACK.fullmatch(tail)) is not None:
        return Place(f"mlp.experts.linear_fc{1 if stack['part'] == 'gate_up_proj' else 2}", stacked=True)
    expert = _EXPERT.fullmatch(tail)
    if expert is None or expert["part"] not in _OF_EXPERT:
        return None
    layer, part = _OF_EXPERT[expert["part"]]
    return Place(f"mlp.experts.{layer}", part, int(expert["expert"]))


def _tail(tail: str, place: Place, spelling: Spelling, *, gated: bool) -> str | None:
    """What follows the layer's number in a Hugging Face model; None: not known."""
    if tail == "mlp.router":
        return spelling.router
    home, _, layer = tail.rpartition(".")
    if home == "self_attention":
        return next((name for name, target in _TAILS.items() if target == (tail, place.part)), None)
    if layer not in ("linear_fc1", "linear_fc2"):
        return None
    projection = f"{place.part}_proj" if layer == "linear_fc1" else "down_proj"
    if layer == "linear_fc1" and not gated and place.part is None:
        projection = "up_proj"
    homes = {"mlp": "mlp", "mlp.shared_experts": spelling.shared}
    return f"{homes[home]}.{projection}" if home in homes else _expert_tail(home, projection, place, spelling)


def _expert_tail(home: str, projection: str, place: Place, spelling: Spelling) -> str | None:
    if home != "mlp.experts" or not (place.stacked or place.expert is not None):
        return None
    if place.stacked:
        projection = projection if projection == "down_proj" else "gate_up_proj"
        return f"{spelling.home}.experts.{projection}"
    written = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[projection] if spelling.w else projection
    return f"{spelling.home}.experts.{place.expert}.{written}"


def _shown(name: str) -> dict[str, object]:
    """What one name says about the spelling."""
    if (whole := _WHOLE.fullmatch(name)) is not None:
        return {"head": name} if whole["tail"] == "lm_head" else {"prefix": whole["prefix"]}
    found = _LAYER.fullmatch(name)
    if found is None:
        return {}
    shown: dict[str, object] = {"prefix": found["prefix"]}
    tail = found["tail"]
    if tail in ("mlp.gate", "block_sparse_moe.gate"):
        shown["router"] = tail
    if (shared := _SHARED.fullmatch(tail)) is not None:
        shown["shared"] = f"mlp.{shared['home']}"
    for pattern, kind in ((_EXPERT, "modules"), (_STACK, "parameters")):
        if (expert := pattern.fullmatch(tail)) is not None:
            shown |= {"experts": kind, "home": expert["home"], "w": expert["part"] in ("w1", "w2", "w3")}
    return shown
