"""What a pass over data really used, beside what was looked at before it."""

from __future__ import annotations

import pytest
import torch
from reuse_cases import new_batches
from torch.utils.data import DataLoader

from smartinit.activations.data_digest import RowLog
from smartinit.reuse.data import OfferedData

CPU = torch.device("cpu")


def test_the_batches_of_a_pass_are_the_batches() -> None:
    data = new_batches()
    used = OfferedData(data, None).first_pass()
    assert all(one is other for one, other in zip(used, data, strict=True))
    expected = RowLog()
    for batch in data:
        expected.add(batch)
    assert used.log.at_rows(24) == expected.at_rows(24) is not None
    assert list(used) == data  # a second pass has a log of its own
    assert used.log.rows == 24
    with pytest.raises(TypeError, match=r"len\(\)"):
        len(OfferedData(iter(data), None).first_pass())


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_pass_that_ends_early_is_named_by_what_it_used(shuffle: bool) -> None:
    rows = [{name: value[0] for name, value in batch.items()} for batch in new_batches(40, 1)]
    data = OfferedData(DataLoader(rows, batch_size=4, shuffle=shuffle), None)
    assert data.names(8, "rows")  # a look at the first two batches
    used = data.first_pass()
    for number, _ in enumerate(used):
        if number == 4:
            break
    assert used.log.batches == 5
    assert len(used) == 10
    assert data.used(used, 5, "rows", CPU) == 20
    assert data.names(20, "rows") == [used.log.at_rows(20)]
    assert not data.ends_after(20, "rows")
