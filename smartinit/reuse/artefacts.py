"""Finished artefacts in the store: the files of an adapter folder, under a key of everything that was asked for."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit.artefact import Artefact
from smartinit.assembly import recipe_of
from smartinit.errors import ArtefactError, SmartinitError, VerificationError
from smartinit.formats.record import read_record_only
from smartinit.reuse.keeping import LOG
from smartinit.store.keys import Key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.job import Job
    from smartinit.reuse.keeping import Keeper
    from smartinit.reuse.statistics import Run
    from smartinit.run_options import Options

# What of a configuration changes no number.
_BESIDE = ("base_model_name_or_path", "task_type", "inference_mode", "revision", "auto_mapping", "peft_version")


def artefact_key(job: Job, policy: Mapping[str, Any], run: Run | None, options: Options) -> Key:
    """The key of a job's artefact.

    Args:
        job: method, ranks, targets.
        policy: see `smartinit.reuse.identity.Identity.policy`.
        run: the data; None for a method that reads none.
        options: of the call.
    """
    recipe = recipe_of(job, options).as_dict()
    recipe.pop("version")  # recorded, not keyed: the algorithm has a number of its own
    sampling = dict(recipe.pop("sampling"))  # type: ignore[call-overload]  # a mapping
    sampling.pop("max_batches")  # the rows themselves say what was read
    config = {name: value for name, value in job.request.config.to_dict().items() if name not in _BESIDE}
    alphas = {target.name: job.request.alpha(target.name) for target in job.targets}
    return Key(
        "artefact",
        {
            **policy,
            **recipe,
            "sampling": sampling,
            "config": _plain(config),
            "alphas": alphas,
            "data": None if run is None else run.leaves(),
        },
    )


def load_artefact(keeper: Keeper, key: Key, job: Job, *, ended: bool) -> Artefact | None:
    """The stored artefact of a job, if it is sound; None if there is none.

    Args:
        keeper: the store.
        key: see `artefact_key`.
        job: whose configuration the artefact gets.
        ended: whether the rows of the key are all that the call may read: else an artefact counts only if its layers
            had settled before they ended.
    """
    manifest = keeper.peek(key)
    if manifest is None or not (ended or manifest.meta.get("settled")):
        return None
    entry = keeper.get(key)
    if entry is None:
        return None
    try:
        with entry, tempfile.TemporaryDirectory(prefix="smartinit-") as scratch:
            folder = Path(scratch)
            for name, blob in entry.files.items():
                _place(blob, folder / name)
            artefact = Artefact.load(folder)
    except (ArtefactError, VerificationError, OSError) as error:
        LOG.warning("the stored artefact %s cannot be used (%s); computing it again", key.digest[:12], error)
        return None
    return replace(artefact, config=job.request.config)


def keep_artefact(keeper: Keeper, key: Key, artefact: Artefact, *, settled: bool, basis: str) -> bool:
    """Store an artefact as its adapter folder.

    Args:
        keeper: the store.
        key: see `artefact_key`.
        artefact: what was computed.
        settled: whether more data would not have been read.
        basis: of what statistics it was made: a larger request may have left others than it would have found.

    Returns:
        Whether it is in the store now.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="smartinit-") as scratch:
            return _keep_folder(keeper, key, artefact, Path(scratch) / "adapter", settled=settled, basis=basis)
    except (SmartinitError, OSError) as error:  # no form that a folder can hold, or no room for it: it is computed
        LOG.warning("the artefact %s is not stored: %s", key.digest[:12], error)
        return False


def _keep_folder(keeper: Keeper, key: Key, artefact: Artefact, folder: Path, *, settled: bool, basis: str) -> bool:
    artefact.save(folder)
    record = read_record_only(folder)
    files: dict[str, bytes | Path] = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    meta = {
        "method": artefact.recipe.method,
        "ranks": artefact.plan.total,
        "layers": len(artefact.plan.ranks),
        "recipe": str(record["recipe_digest"]),
        "plan": str(record["plan_digest"]),
        "settled": settled,
    }
    compare = [name for name in files if name.endswith(".safetensors")]
    kept = keeper.put(key, meta=meta, files=files, tags=["artefact"], basis=basis, compare=compare)
    return kept is not None


def _place(blob: Path, path: Path) -> None:
    """A file of an adapter folder: the blob itself under another name, or its copy on another disk."""
    path.parent.mkdir(exist_ok=True)
    try:
        os.link(blob, path)
    except OSError:
        shutil.copyfile(blob, path)


def _plain(value: Any) -> Any:  # noqa: ANN401 - any value of a configuration
    """JSON values: sets in order, everything that has no form as its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
