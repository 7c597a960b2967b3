"""From a configuration to the method that it names: the one place where options in words become a method's fields."""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any

from smartinit.config import LoraConfig
from smartinit.config.checks import closest
from smartinit.errors import ConfigError
from smartinit.methods import available_methods
from smartinit.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

# What PEFT's configurations of single methods call a field of ours.
_FIELD_OF: Mapping[str, Mapping[str, str]] = {
    "eva": {"whiten": "whiten"},
    "corda": {"corda_method": "corda_method"},
    "loftq": {"loftq_bits": "bits", "loftq_iter": "iterations"},
    "lora_ga": {"direction": "direction", "scale": "scale", "stable_gamma": "stable_gamma"},
}
# Type of an option's default -> what it takes. An option without a value (None) takes a count.
_KINDS: Mapping[type, tuple[type, ...]] = MappingProxyType(
    {bool: (bool,), int: (int,), float: (int, float), str: (str,), NoneType: (int, NoneType)}
)
_WORDS: Mapping[type, str] = MappingProxyType(
    {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "a whole number or null"}
)
# Other words for registered names: what people write on a command line.
ALIASES: Mapping[str, str] = {"default": "kaiming", "lora": "kaiming", "output-pca": "output_pca"}


def resolve_config(model: nn.Module, config: Any, adapter_name: str) -> LoraConfig:  # noqa: ANN401 - anything
    """The configuration as ours; None on a model with adapters: that of ``adapter_name``.

    Raises:
        ConfigError: there is none.
    """
    if config is None:
        configs = getattr(model, "peft_config", None)
        if configs is None:
            raise ConfigError("config is required when the model is neither a PeftModel nor a smartinit.LoraModel")
        if adapter_name not in configs:
            raise ConfigError(f"the model has no adapter '{adapter_name}'; it has {sorted(configs)}")
        config = configs[adapter_name]
    return LoraConfig.from_any(config)


def resolve_method(config: LoraConfig, method: str | Method | None = None) -> Method:
    """The method with its options: PEFT's configuration of it, then ``init_options``.

    Args:
        config: whose ``init_lora_weights`` names it, unless ``method`` does.
        method: another name, or a finished method, which is taken as it is.

    Raises:
        ConfigError: an unknown name or option, or ``init_options`` beside a finished method.
    """
    if isinstance(method, Method):
        if config.init_options:
            raise ConfigError(
                f"init_options={config.init_options} beside method={method!r}: give the options to one of them"
            )
        return method
    name = config.method if method is None else ALIASES.get(method.lower(), method.lower())
    known = available_methods()
    if name not in known:
        raise ConfigError(
            f"the method '{name}' is not known; available: {', '.join(known)}{closest(name, [*known, *ALIASES])}"
        )
    kind = known[name]
    options = _peft_options(config, name)
    allowed = [field.name for field in fields(kind)]
    for key in config.init_options:
        if key not in allowed:
            said = f"its options are {', '.join(allowed)}" if allowed else "it has no options"
            raise ConfigError(f"the method '{name}' has no option {key!r}; {said}{closest(key, allowed)}")
    _check_kinds(kind, name, config.init_options)
    try:
        return kind(**{**options, **config.init_options})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"init_options of '{name}': {error}") from error


def _check_kinds(kind: type[Method], name: str, given: Mapping[str, Any]) -> None:
    """Text is no truth value and 2.5 no count, whatever Python would make of them: the default says what is meant."""
    defaults = {field.name: field.default for field in fields(kind)}
    for key, value in given.items():
        wanted = _KINDS.get(type(defaults[key]), ())
        as_bool = isinstance(value, bool) and bool not in wanted
        if wanted and (as_bool or not isinstance(value, wanted)):
            expected = _WORDS[type(defaults[key])]
            raise ConfigError(f"the option {key} of '{name}' is {value!r}; expected {expected}")


def _peft_options(config: LoraConfig, name: str) -> dict[str, Any]:
    if name == "pissa":
        return {} if config.pissa_iterations is None else {"iterations": config.pissa_iterations}
    given = getattr(config, f"{name}_config", None)
    if given is None:
        return {}
    return {ours: getattr(given, theirs) for theirs, ours in _FIELD_OF.get(name, {}).items()}
