"""LoraConfig: which layers get an adapter, of which rank, and how it starts."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping  # noqa: TC003 - typing.get_type_hints reads the fields
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from smartinit.config import checks, methods
from smartinit.errors import ArgumentError, MissingDependencyError

if TYPE_CHECKING:
    import peft

_IN_PEFT = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "lora_ga", "mica")
INIT_METHODS = (*_IN_PEFT, "lora_one", "milora", "lora_null", "loram", "output_pca")
"""The strings that ``init_lora_weights`` takes, besides ``"pissa_niter_16"`` with any number of steps."""

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

_PISSA_STEPS = re.compile(r"pissa_niter_(\d+)")
# PEFT's options that make the layer compute something else than W x + s·B A x.
_OTHER_LAYERS = (
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
# Fields that PEFT's class does not have; what they ask for is done before it sees the model.
OWN_FIELDS = ("init_options", "frozen_a", "match_gain")
# PEFT's keys that only record something, or have no effect without one of the options above.
_RECORDS = ("peft_version", "qalora_group_size")


@dataclass
class LoraConfig:
    """Which layers get an adapter, of which rank, and how it starts: PEFT 0.21.2's fields and defaults.

    Beyond PEFT: entries of a ``target_modules`` or ``exclude_modules`` list may hold ``*`` wildcards (any text, dots
    included), and ``init_lora_weights`` also takes ``lora_one``, ``milora``, ``lora_null``, ``loram`` and
    ``output_pca``. ``init_options`` are options of the chosen start, by the field names of its class in
    `smartinit.methods`; ``frozen_a`` trains B alone (A stays as it starts); ``match_gain="kaiming"`` scales A so that
    the first step changes the layer's output as much as LoRA's own start would. These three are never saved for PEFT.
    Method configs may be dicts. The chosen method always has its config; a config of another method
    is kept and gives a warning. Collections are copied, never shared with the caller.

    PEFT has options that this class lacks. Those that turn the layer into something else (``velora_config``,
    ``kasa_config``, ``use_qalora``, ``use_bdlora``, ``arrow_config``, ``monteclora_config``,
    ``alora_invocation_tokens``) are refused when they are set. Mere records
    (``peft_version``, ``qalora_group_size``, keys that are empty) are carried along in ``extra``.

    Raises:
        ConfigError: a value, or a combination of values, that cannot be.
        ArgumentError: a value of the wrong kind.
    """

    task_type: str | None = None
    peft_type: str = "LORA"
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: Collection[str] | None = None
    exclude_modules: Collection[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: methods.LoftQConfig | None = None
    eva_config: methods.EvaConfig | None = None
    corda_config: methods.CordaConfig | None = None
    lora_ga_config: methods.LoraGAConfig | None = None
    use_dora: bool = False
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: methods.LoraRuntimeConfig = field(default_factory=methods.LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False
    init_options: dict[str, Any] = field(default_factory=dict)
    frozen_a: bool = False
    match_gain: Literal["kaiming"] | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Bring the fields into one form, check them, and name the method configs that have no effect."""
        self._settle()
        checks.positive("lora_alpha", self.lora_alpha)
        for key, alpha in self.alpha_pattern.items():
            checks.positive(f"alpha_pattern[{key!r}]", alpha)
        for method, (name, _) in methods.METHOD_CONFIGS.items():
            if getattr(self, name) is not None and self.method != method:
                warnings.warn(
                    f"{name} has no effect: it is for init_lora_weights={method!r}, not {self.init_lora_weights!r}",
                    stacklevel=3,
                )

    @property
    def method(self) -> str:
        """The start's name: ``"kaiming"`` for ``True``, ``"random"`` for ``False``, ``"pissa"`` however many steps."""
        if isinstance(self.init_lora_weights, bool):
            return "kaiming" if self.init_lora_weights else "random"
        return "pissa" if _PISSA_STEPS.fullmatch(self.init_lora_weights) else self.init_lora_weights

    @property
    def pissa_iterations(self) -> int | None:
        """The 16 of ``init_lora_weights="pissa_niter_16"``; None for every other start."""
        steps = _PISSA_STEPS.fullmatch(str(self.init_lora_weights))
        return int(steps.group(1)) if steps else None

    def copy(self) -> LoraConfig:
        """An independent config with the same fields, checked again, since they may have been assigned."""
        twin = object.__new__(LoraConfig)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
            setattr(twin, f.name, dataclasses.replace(value) if is_config else value)
        twin._settle()  # not __post_init__: whoever made the original has had its warnings
        return twin

    def to_dict(self) -> dict[str, Any]:
        """The content of PEFT's ``adapter_config.json``: plain JSON values, sets as sorted lists."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        # PEFT does not save the first; the second is spread out; it does not know the others.
        for name in ("runtime_config", "extra", *(name for name in OWN_FIELDS if not fields[name])):
            del fields[name]
        fields["loftq_config"] = fields["loftq_config"] or {}  # how PEFT writes "none"
        return fields | self.extra

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoraConfig:
        """The inverse of `to_dict`; reads what any version of PEFT has saved.

        A key that does not exist is an error in a dict without ``peft_type`` (hand-written, not saved) and a
        warning in one with it, as a newer PEFT may have written it.

        Raises:
            ConfigError: such a key, a value that cannot be, or one of PEFT's options that is not supported.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {key: value for key, value in data.items() if key not in known}
        for key, value in extra.items():
            checks.require(not value or key not in _OTHER_LAYERS, _refusal(key, value))
            if key in (*_OTHER_LAYERS, *_RECORDS):
                continue
            near = checks.closest(key, known)
            checks.require("peft_type" in data, f"{key!r} is no option of a LoRA config{near}")
            if value:
                warnings.warn(f"{key}={value!r} in a saved LoRA config is not known and has no effect", stacklevel=2)
        fields = {key: value for key, value in data.items() if key in known}
        return cls._with_any_alphas(fields | {"extra": extra}) if "peft_type" in data else cls(**fields, extra=extra)

    @classmethod
    def from_peft(cls, config: object) -> LoraConfig:
        """A ``peft.LoraConfig`` as ours. It is only read, and PEFT is not imported.

        Raises:
            ConfigError: it is for another method than LoRA, or sets an option that is not supported.
        """
        _lora_type(getattr(config, "peft_type", None))  # first: another kind has options of its own
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra: dict[str, Any] = {}
        for f in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
            if f.name in known:
                continue
            value = getattr(config, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            checks.require(value == default or f.name in _RECORDS, _refusal(f.name, value))
            extra[f.name] = value
        fields = {key: getattr(config, key) for key in known if hasattr(config, key)}
        return cls._with_any_alphas(fields | {"extra": extra})

    @classmethod
    def _with_any_alphas(cls, fields: Mapping[str, Any]) -> LoraConfig:
        """As the constructor, but alphas need not be positive: PEFT asks no more of them than to be numbers."""
        alphas = {name: fields[name] for name in ("lora_alpha", "alpha_pattern") if name in fields}
        config = cls(**{name: value for name, value in fields.items() if name not in alphas})
        for name, value in alphas.items():
            setattr(config, name, value)
        config._settle_values()
        return config

    @classmethod
    def from_any(cls, config: object) -> LoraConfig:
        """Ours (a checked copy of it), a ``peft.LoraConfig`` or a dict; the argument is never written to.

        Raises:
            ArgumentError: anything else.
            ConfigError: as the constructor.
        """
        if isinstance(config, LoraConfig):
            return config.copy()
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if hasattr(config, "peft_type"):
            return cls.from_peft(config)
        raise ArgumentError(
            f"the config is a {type(config).__name__}, but a smartinit.LoraConfig, a peft.LoraConfig or a dict was "
            "expected"
        )

    def to_peft(self) -> peft.LoraConfig:
        """This config as PEFT's class.

        A start which PEFT does not have becomes ``True``, PEFT's own start: the values then come with the artefact.
        Configs of other methods are left out, and a list with wildcards becomes one regular expression.

        Raises:
            MissingDependencyError: PEFT is not installed.
            ConfigError: the installed PEFT lacks an option that is set, or it has no form for the wildcards.
        """
        try:
            import peft
            from peft.tuners.lora import config as classes
        except ImportError as error:
            raise MissingDependencyError(
                "LoraConfig.to_peft needs PEFT, which is not installed: pip install 'smartinit[peft]'"
            ) from error
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {key: value for key, value in values.pop("extra").items() if key not in _RECORDS and value}
        for name in OWN_FIELDS:
            del values[name]
        values["target_modules"] = self._without_wildcards("target_modules")
        values["exclude_modules"] = self._without_wildcards("exclude_modules")
        if self.method in INIT_METHODS and self.method not in _IN_PEFT:
            values["init_lora_weights"] = True
        for method, (name, kind) in methods.METHOD_CONFIGS.items():
            used = self.method == method and values[name] is not None
            options = dataclasses.asdict(values[name]) if used else None
            values[name] = getattr(classes, kind.__name__)(**options) if options else None
        values["loftq_config"] = values["loftq_config"] or {}
        values["runtime_config"] = classes.LoraRuntimeConfig(**dataclasses.asdict(self.runtime_config))

        theirs = {f.name for f in dataclasses.fields(peft.LoraConfig)}
        for name in values.keys() - theirs:
            checks.require(
                not values.pop(name), f"PEFT {peft.__version__} has no option {name}, which is set: upgrade PEFT"
            )
        return peft.LoraConfig(**values)

    def _without_wildcards(self, name: str) -> Collection[str] | None:
        entries: Collection[str] | None = getattr(self, name)
        if entries is None or isinstance(entries, str) or not any("*" in entry for entry in entries):
            return entries
        checks.require(
            name == "exclude_modules" or self.layers_to_transform is None,
            f"{name}={sorted(entries)} holds wildcards, which PEFT cannot combine with layers_to_transform: "
            "put the layers' numbers into the entries",
        )
        return entries_regex(entries)

    def _settle(self) -> None:
        """Check every field and bring it into one form. Writes to no object but this one."""
        self._settle_values()
        self._settle_modules()
        self._settle_method()
        self._check_combinations()

    def _settle_values(self) -> None:
        self.peft_type = _lora_type(self.peft_type)
        self.task_type = getattr(self.task_type, "value", self.task_type)
        checks.choice("task_type", self.task_type, (None, *TASK_TYPES))
        self.r = checks.integer("r", self.r, 1)
        for switch in (f.name for f in dataclasses.fields(self) if f.type == "bool"):
            checks.boolean(switch, getattr(self, switch))
        checks.finite("lora_alpha", self.lora_alpha)
        checks.number("lora_dropout", self.lora_dropout, "a number from 0 to below 1", 0, math.nextafter(1, 0))
        checks.choice("bias", self.bias, ("none", "all", "lora_only"))
        self.runtime_config = methods.read_config("runtime_config", self.runtime_config, methods.LoraRuntimeConfig) or (
            methods.LoraRuntimeConfig()
        )
        self.rank_pattern = dict(self.rank_pattern or {})
        for key, rank in self.rank_pattern.items():
            checks.regex("rank_pattern", key)
            self.rank_pattern[key] = checks.integer(f"rank_pattern[{key!r}]", rank, 1)
        self.alpha_pattern = dict(self.alpha_pattern or {})
        for key, alpha in self.alpha_pattern.items():
            checks.regex("alpha_pattern", key)
            checks.finite(f"alpha_pattern[{key!r}]", alpha)
        self.extra = dict(self.extra)
        self.init_options = dict(self.init_options or {})
        checks.choice("match_gain", self.match_gain, (None, "kaiming"))

    def _settle_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                checks.regex(name, value)
            elif value is not None:
                setattr(self, name, set(checks.names(name, value)))
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else checks.names(name, value))
        for entry in self.modules_to_save or ():
            checks.regex("modules_to_save", entry)
        self._settle_tokens()
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = checks.names("layers_pattern", self.layers_pattern)
        for entry in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            checks.regex("layers_pattern", entry)
        layers = self.layers_to_transform
        if isinstance(layers, Iterable):
            self.layers_to_transform = [checks.integer("an entry of layers_to_transform", i, 0) for i in layers]
        elif layers is not None:
            self.layers_to_transform = checks.integer("layers_to_transform", layers, 0)

    def _settle_tokens(self) -> None:
        wanted = self.trainable_token_indices
        if isinstance(wanted, Mapping):
            checks.names("trainable_token_indices", list(wanted))
            self.trainable_token_indices = {
                name: checks.indices(f"trainable_token_indices[{name!r}]", some) for name, some in wanted.items()
            }
        elif wanted is not None:
            self.trainable_token_indices = checks.indices("trainable_token_indices", wanted)

    def _settle_method(self) -> None:
        start = self.init_lora_weights
        if isinstance(start, str):
            start = self.init_lora_weights = start.lower()
            known = start in INIT_METHODS or _PISSA_STEPS.fullmatch(start)
            checks.require(
                bool(known),
                f"init_lora_weights={start!r} is not known: expected True, False, "
                f"{', '.join(map(repr, INIT_METHODS))} or 'pissa_niter_16'{checks.closest(start, INIT_METHODS)}",
            )
        elif not isinstance(start, bool):
            raise ArgumentError(f"init_lora_weights={start!r} is a {type(start).__name__}: expected a bool or a name")
        for method, (name, kind) in methods.METHOD_CONFIGS.items():
            options = methods.read_config(name, getattr(self, name), kind)
            setattr(self, name, kind() if options is None and self.method == method else options)

    def _check_combinations(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                checks.require(
                    getattr(self, name) is None,
                    f"{name} cannot be used when target_modules is a string (here {self.target_modules!r}): "
                    "give a list of names, or put the layers' numbers into the regular expression",
                )
        checks.require(
            not self.layers_pattern or self.layers_to_transform is not None,
            f"layers_pattern={self.layers_pattern!r} has no meaning without layers_to_transform: set both",
        )
        checks.require(not (self.use_dora and self.megatron_config), "use_dora cannot be used with megatron_config")
        checks.require(not (self.use_dora and self.lora_bias), "use_dora cannot be used with lora_bias")
        checks.require(
            not self.lora_bias or isinstance(self.init_lora_weights, bool),
            f"lora_bias cannot be used with init_lora_weights={self.init_lora_weights!r}: only with True or False",
        )


def entries_regex(entries: Collection[str]) -> str:
    """A list of names, with or without ``*``, as the regular expression which a whole module name must match."""
    alternatives = (".*".join(re.escape(part) for part in entry.split("*")) for entry in sorted(entries))
    return rf"(?:.*\.)?(?:{'|'.join(alternatives)})"


def _lora_type(value: object) -> str:
    name = getattr(value, "value", value)  # PEFT's is an enum
    checks.require(name in ("LORA", None), f"peft_type={name!r} is another kind of adapter: expected a LoRA's config")
    return "LORA"


def _refusal(key: str, value: object) -> str:
    return f"{key}={value!r} is an option of PEFT that is not supported here: leave it out"


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
