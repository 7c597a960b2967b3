"""From a checked request to its artefact: what the store has, or a computation."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit.cli.exit_codes import check_interrupt
from smartinit.cli.model_folder import check_model_folder, is_local
from smartinit.cli.stored import StoreMayFail, refuse_to_compute
from smartinit.data.source import find_source
from smartinit.errors import ConfigError, ModelError, NotStoredError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from smartinit.artefact import Artefact
    from smartinit.cli.load_model import ModelSource
    from smartinit.cli.output import Output
    from smartinit.cli.request import Request
    from smartinit.cli.stored import Found, StoredRequest
    from smartinit.data import Batches
    from smartinit.data.source import Source
    from smartinit.targets.fingerprint import ModelFingerprint


@dataclass(frozen=True)
class Opened:
    """Model and data, found and checked, weights not loaded yet."""

    model: ModelSource
    request: Request
    source: Source | None = None
    batches: Batches | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        """What the data was, for the record."""
        if self.source is None:
            return {"data": None}
        return {"data_sha256": self.source.sha256, "batches_of": self.request.sampling.as_dict()}


def open_inputs(request: Request, options: Mapping[str, Any], output: Output) -> Opened:
    """Find model and data and tokenise the first rows: what is wrong with either shows before weights are loaded."""
    from smartinit.cli.load_model import find_model, load_tokenizer, longest_input
    from smartinit.data import read_batches

    if not reads_data(request, options, output):
        return Opened(find_model(options["model"], trust_remote_code=options["trust_remote_code"]), request)
    output.log(f"reading {options['data']}")
    source = find_source(options["data"], split=request.sampling.split)
    model = find_model(options["model"], trust_remote_code=options["trust_remote_code"])
    tokenizer = load_tokenizer(model)
    longest = longest_input(model, tokenizer)
    if longest is not None and longest < request.sampling.max_length:
        request = replace(request, sampling=replace(request.sampling, max_length=longest))
    batches = read_batches(source, tokenizer, request.sampling, causal=model.causal, vocab_size=model.vocab_size)
    return Opened(model, request, source, batches)


def reads_data(request: Request, options: Mapping[str, Any], output: Output) -> bool:
    """Whether the method looks at data.

    Raises:
        ConfigError: it does and there is none; an option of the method that it does not have.
    """
    from smartinit.initialisation import resolve_method

    method = resolve_method(request.config)
    if method.needs is not None and options["data"] is None:
        raise ConfigError(f"the method '{method.name}' looks at data: pass --data with a file or a dataset's id")
    if method.needs is None and options["data"] is not None:
        output.log(f"{method.name} looks at weights alone: --data is not read")
    return method.needs is not None


def check_inputs(request: Request, options: Mapping[str, Any]) -> None:
    """What can be told of the inputs before a library is loaded.

    Raises:
        MissingFileError, ModelError, DataError: they are not there, or not what they should be.
    """
    if is_local(options["model"]):
        check_model_folder(Path(options["model"]).expanduser())
    if options["data"] is not None:
        find_source(options["data"], split=request.sampling.split)


def look_up(stored: StoredRequest, output: Output) -> Found | None:
    """The artefact that the same request led to before; None if it has to be computed.

    Raises:
        StoreError: the store fails, where nothing may be computed.
    """
    with StoreMayFail("the store was not asked", strict=stored.options.get("no_compute", False)):
        remembered = stored.remembered()
        batches = None
        if remembered is not None and not remembered.certain and remembered.first is not None:
            output.log("the request was made under other versions of the libraries: comparing the first batches")
            batches = open_inputs(stored.request, stored.options, output).batches
        return stored.find(remembered, batches)
    return None


def run(stored: StoredRequest, output: Output) -> tuple[Artefact, nn.Module | None]:
    """Everything between the checks and the saving: what was computed, and the model if it was loaded.

    Raises:
        NotStoredError: with ``--no-compute``, if a pass over the data or a look at the weights is needed.
    """
    output.log("loading libraries")
    from smartinit.cli.load_model import load_weights
    from smartinit.data import read_batches  # noqa: F401 - importing `datasets` takes time that is not the data's

    options = stored.options
    if stored.store is not None and not options["refresh"]:
        output.log(f"store: a miss; {stored.missed()}")
    started = time.perf_counter()
    opened = open_inputs(stored.request, options, output)
    seconds = {"data": time.perf_counter() - started}
    check_interrupt()
    check_request(stored.request, opened.model)
    artefact = _without_weights(stored, opened, output)
    model = None
    if artefact is None:
        if options.get("no_compute"):
            raise refuse_to_compute(stored)
        output.log(f"loading {options['model']}")
        started = time.perf_counter()
        model = load_weights(opened.model, dtype=options["dtype"], device=options["device"])
        seconds["model"] = time.perf_counter() - started
        check_interrupt()
        artefact = _compute(stored, opened, output, model, stored.learn_model(model))
    check_interrupt()
    finished = replace(
        artefact,
        provenance={**artefact.provenance, **({"dropped_rows": opened.batches.dropped} if opened.batches else {})},
        timings={**seconds, **artefact.timings},
    )
    with StoreMayFail("the request is not remembered"):
        stored.remember(finished, opened.batches)
    return finished, model


def _without_weights(stored: StoredRequest, opened: Opened, output: Output) -> Artefact | None:
    """What the store has for a model that it knows by its files; None if that does not do."""
    from smartinit.cli.load_model import load_weights, meta_model

    options = stored.options
    if stored.store is None or options["refresh"]:
        return None
    known = stored.known_model()
    if known is None and options.get("no_compute"):  # it has to be loaded once to be told from others
        known = stored.learn_model(load_weights(opened.model, dtype=options["dtype"], device=options["device"]))
    if known is None:
        return None
    try:
        model = meta_model(opened.model)
    except ModelError:  # one that cannot be built without weights
        return None
    with suppress(NotStoredError):
        return _compute(stored, opened, output, model, known)
    return None


def _compute(
    stored: StoredRequest, opened: Opened, output: Output, model: nn.Module, known: ModelFingerprint | None
) -> Artefact:
    from smartinit.pipeline import compute

    options, request = stored.options, opened.request
    unloaded = {} if any(not weight.is_meta for weight in model.parameters()) else {"device": None, "dtype": None}
    config = request.config
    if opened.model.causal:
        # Some trainers refuse a folder that does not say it.
        config = replace(config, task_type="CAUSAL_LM")
    return compute(
        model,
        config,
        opened.batches,
        store=stored.store,
        refresh=options["refresh"],
        fingerprint=known,
        max_batches=request.max_batches,
        seed=request.sampling.seed,
        skip_bad_batches=options["skip_bad_batches"],
        show_progress_bar=not output.quiet,
        provenance={"model": options["model"], "data": options["data"], **opened.provenance, **unloaded},
        **request.planner_options(),
    )


def check_request(request: Request, model: ModelSource) -> None:
    """Refuse methods and targets that cannot be before gigabytes of weights are loaded.

    Raises:
        ConfigError: no layer matches, or a rank is above ``min(in, out)``.
    """
    from smartinit.cli.load_model import meta_model
    from smartinit.initialisation import resolve_method
    from smartinit.targets import check_ranks, select_targets

    hosts = resolve_method(request.config).hosts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the real model
        with suppress(ModelError):  # a model that cannot be built without weights is checked with them
            check_ranks(select_targets(meta_model(model), request.config, hosts=hosts), request.config)
