"""Every error that a user can cause.

SmartinitError
├── ConfigError (ValueError)            an option or a combination of options that cannot be
│   └── TargetError                     target_modules matched nothing usable
├── ArgumentError (TypeError)           an argument of the wrong kind
├── UnknownNameError (KeyError)         a name (adapter, method, layer) that does not exist
├── ModelError (ValueError)             a model that cannot be read or holds NaN
├── DataError (ValueError)              data that cannot be used: empty, broken, masked, too short
│   └── NonFiniteError                  NaN or Inf in activations; names layer and batch
├── MissingFileError (FileNotFoundError)
├── OutputError (OSError)               an output that exists already or cannot be written
├── MissingDependencyError (ImportError) an optional package that is needed here and not installed
├── StoreError (OSError)                a store that cannot be read or written, or is of another version
├── NotStoredError (KeyError)           what was asked for is not in the store, and may not be computed
├── ArtefactError (ValueError)          an adapter folder that is not one, or is for another model
└── VerificationError (ValueError)      a result that does not hold against its recomputation

A message is one sentence: what is wrong, where, what was expected, what to do next.
"""


class SmartinitError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(SmartinitError, ValueError):
    """An option, or a combination of options, that cannot be."""


class TargetError(ConfigError):
    """``target_modules`` (or a pattern) matched nothing usable."""


class ArgumentError(SmartinitError, TypeError):
    """An argument of the wrong kind."""


class UnknownNameError(SmartinitError, KeyError):
    """A name that does not exist: an adapter, a method, a layer."""

    def __str__(self) -> str:
        # KeyError shows repr(args[0]); a sentence should not be quoted.
        return str(self.args[0]) if self.args else ""


class ModelError(SmartinitError, ValueError):
    """A model that cannot be read, or whose weights are not finite."""


class DataError(SmartinitError, ValueError):
    """Data that cannot be used: empty, broken, fully masked, too short."""


class NonFiniteError(DataError):
    """NaN or Inf in a layer's input."""

    def __init__(self, layer: str, batch: int) -> None:
        self.layer = layer
        self.batch = batch
        super().__init__(
            f"the input of layer '{layer}' holds NaN or Inf in batch {batch} (batches count from 0); "
            "check that batch and the model's weights, or skip such batches with "
            "skip_bad_batches=True (--skip-bad-batches)"
        )


class MissingFileError(SmartinitError, FileNotFoundError):
    """A file or folder that does not exist."""


class OutputError(SmartinitError, OSError):
    """An output that exists already or cannot be written."""


class MissingDependencyError(SmartinitError, ImportError):
    """An optional package that is needed here and not installed."""


class StoreError(SmartinitError, OSError):
    """A store that cannot be read or written, or that a newer version has made."""


class NotStoredError(SmartinitError, KeyError):
    """Something that is not in the store where nothing may be computed."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ArtefactError(SmartinitError, ValueError):
    """A folder that is no adapter, or an adapter for another model."""


class VerificationError(SmartinitError, ValueError):
    """A stored result that its own recomputation contradicts."""


def shown(value: object, most: int = 120) -> str:
    """A value as part of a message: on one line, not long, and without anything that a terminal would obey."""
    text = repr(value[: most + 1]) if isinstance(value, (str, bytes)) else repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
