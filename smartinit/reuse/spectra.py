"""Spectra of layers in the store: what a method found in a weight, whatever model the weight is in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.utils.parametrize import is_parametrized

from smartinit.decomposition import layer_seed
from smartinit.errors import NotStoredError
from smartinit.reuse.identity import ALGORITHM
from smartinit.spectrum import Certificate, Spectrum
from smartinit.store.keys import Key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.job import Job
    from smartinit.methods.base import Method
    from smartinit.observation import Observed
    from smartinit.reuse.identity import Identity
    from smartinit.reuse.keeping import Keeper
    from smartinit.targets.weight import Target


class StoredSpectra:
    """See `smartinit.decomposition.KeptSpectra`.

    Args:
        keeper: the store.
        identity: of the model; the digests of its tensors stand in the keys.
        origins: identity of a statistic -> digest of its content.
    """

    def __init__(self, keeper: Keeper, identity: Identity, origins: Mapping[int, str]) -> None:
        self._keeper = keeper
        self._identity = identity
        self._origins = origins
        self.found = 0
        """Layers whose spectrum came from the store."""
        self.computed = 0
        """Layers whose spectrum did not."""

    def find(self, job: Job, target: Target, observed: Observed, limit: int) -> Spectrum | None:
        """Of one layer; None: it must be computed.

        Raises:
            NotStoredError: it must be, and the model has no weights.
        """
        key = self._key(job, target, observed, limit)
        spectrum = None if key is None else self._read(key, limit)
        if spectrum is not None:
            self.found += 1
            return spectrum
        self.computed += 1
        if job.method.needs_weight and target.device.type == "meta":
            raise NotStoredError(
                f"the spectrum of '{target.name}' by '{job.method.name}' is not in the store, and computing it takes "
                "the model's weights, which are not loaded"
            )
        return None

    def keep(self, job: Job, target: Target, observed: Observed, limit: int, spectrum: Spectrum) -> None:
        """Store one that was computed."""
        key = self._key(job, target, observed, limit)
        if key is None:
            return
        parts = {
            "directions": spectrum.directions,
            "values": spectrum.values,
            "left": spectrum.left,
            "base": spectrum.base,
        }
        meta = {
            "shape": list(spectrum.shape),
            "total": float(spectrum.total),
            "certificate": spectrum.certificate.as_dict(),
            "limit": limit,
        }
        there = self._keeper.whole(key)
        if there is None or int(there.meta.get("limit", 0)) < limit:
            tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
            self._keeper.put(key, tensors, meta, basis=str(limit), replace=there is not None)

    def _read(self, key: Key, limit: int) -> Spectrum | None:
        manifest = self._keeper.peek(key)
        if manifest is None or int(manifest.meta["limit"]) < limit:
            return None
        entry = self._keeper.get(key)
        if entry is None:
            return None
        with entry:
            tensors, meta = dict(entry.tensors), entry.meta
        spectrum = Spectrum(
            directions=tensors["directions"],
            values=tensors["values"],
            total=float(meta["total"]),
            shape=(int(meta["shape"][0]), int(meta["shape"][1])),
            certificate=Certificate(**meta["certificate"]),
            left=tensors.get("left"),
            base=tensors.get("base"),
        )
        return spectrum if len(spectrum) <= limit else spectrum.truncate(limit)

    def _key(self, job: Job, target: Target, observed: Observed, limit: int) -> Key | None:
        """None: it is cheaper to compute than to store, or what it is computed from has no digest."""
        method = job.method.on(target.host)
        if not method.needs_weight or is_parametrized(target.module):  # what computes the weight has no digest
            return None
        weight = self._weight(target)
        leaves: dict[str, Any] = {
            "algorithm": ALGORITHM,
            "method": method.name,
            "options": method.options(),
            "host": target.host,
            "weight": weight,
            "seed": _seed(method, self._identity.seed, target.name),
        }
        if not method.nested:
            leaves["limit"] = limit
        if method.needs is not None:
            origin = self._origins.get(id(observed.statistic(job, target.name)))
            if not origin:
                return None
            leaves["statistic"] = origin
        return Key("spectrum", leaves) if weight else None

    def _weight(self, target: Target) -> dict[str, str]:
        """What the layer's weight is stored in: its own tensors, by their names in the layer."""
        own = f"{target.name}."
        found = {name.removeprefix(own): d for name, d in self._identity.tensors.items() if name.startswith(own)}
        found.pop("bias", None)
        return found


def _seed(method: Method, seed: int, name: str) -> int:
    """A method whose result hangs on its random numbers, beyond round-off, has others for every layer."""
    return layer_seed(seed, name) if method.random or not method.nested else seed
