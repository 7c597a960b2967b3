"""Which targets read the same tensor: decided by the tensor's identity, never by its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from torch import Tensor

    from smartinit.statistics.base import Statistic


@dataclass
class Site:
    """One distinct input tensor and its statistic.

    Attributes:
        names: the targets that read it; the first one feeds the statistic.
        features: its last dimension.
        statistic: summary of its rows.
        open: whether it still needs data.
    """

    names: list[str]
    features: int
    statistic: Statistic
    open: bool = True
    _rows: dict[int, Tensor] = field(default_factory=dict, repr=False)


class TensorIdentity:
    """Names a tensor by storage, version, offset and layout, for the length of one forward pass.

    Memory that is freed in mid-pass is handed out again at the same address; a weak reference to each storage
    that was seen keeps its *identity* (not its memory) alive, so that two tensors are equal only if they are.
    """

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def __call__(self, tensor: Tensor) -> tuple[object, ...]:
        """A hashable identity: equal for two views of the same unchanged memory with the same layout."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._storages.setdefault(reference.cdata, reference)
        version = 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - the only way to it
        return (
            reference.cdata,
            version,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.dtype,
        )

    def clear(self) -> None:
        """Forget the pass."""
        self._storages.clear()
