"""The registry: one line per initialisation, or an entry point ``smartinit.methods`` of a third party."""

from __future__ import annotations

from importlib.metadata import entry_points

from smartinit.errors import ConfigError
from smartinit.methods.base import Method
from smartinit.methods.corda import Corda
from smartinit.methods.eva import Eva
from smartinit.methods.gaussian import Gaussian
from smartinit.methods.kaiming import Kaiming, Random
from smartinit.methods.loftq import Loftq
from smartinit.methods.lora_ga import LoraGa
from smartinit.methods.lora_null import LoraNull
from smartinit.methods.lora_one import LoraOne
from smartinit.methods.loram import Loram
from smartinit.methods.mica import Mica
from smartinit.methods.milora import MiLoRA
from smartinit.methods.olora import Olora
from smartinit.methods.orthogonal import Orthogonal
from smartinit.methods.output_pca import OutputPca
from smartinit.methods.pissa import Pissa

_BUILT_IN: tuple[type[Method], ...] = (
    Eva,
    Kaiming,
    Random,
    Gaussian,
    Orthogonal,
    Loram,
    MiLoRA,
    Mica,
    Olora,
    Pissa,
    Corda,
    OutputPca,
    LoraNull,
    Loftq,
    LoraGa,
    LoraOne,
)


def available_methods() -> dict[str, type[Method]]:
    """Name -> method class: the built-in ones, then those of installed packages.

    Raises:
        ConfigError: an entry point is no `Method` or takes a built-in name.
    """
    methods = {method.name: method for method in _BUILT_IN}
    for entry in entry_points(group="smartinit.methods"):
        loaded = entry.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Method)):
            msg = f"the entry point '{entry.name}' of {entry.value} is not a smartinit Method"
            raise ConfigError(msg)
        if loaded.name in methods:
            msg = f"the entry point '{entry.name}' of {entry.value} takes the name '{loaded.name}', which is in use"
            raise ConfigError(msg)
        methods[loaded.name] = loaded
    return methods
