"""Token ids of one row, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from smartinit.data.chat import Rendered


IGNORED = -100
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class TokenRow:
    """One row, unpadded; every array is ``(tokens,)`` int32.

    Attributes:
        input_ids: what the model reads.
        labels: the ids again, -100 where a token belongs to a prompt; ``None`` for an encoder.
        token_type_ids: the segments of a pair, where the tokenizer tells them.
    """

    input_ids: Ids
    labels: Ids | None = None
    token_type_ids: Ids | None = None

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def counts(self) -> bool:
        """Whether any token is left after masking."""
        return len(self) > 0 and (self.labels is None or bool((self.labels != IGNORED).any()))


def label_spans(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered], *, add_special_tokens: bool
) -> list[TokenRow]:
    """Tokenise texts and label the tokens of their spans; a token that straddles the start of a span counts.

    A boundary is found by tokenising the text up to it and taking the common start of both id lists: this works for
    every tokenizer, while offsets exist for some only and leave out the whitespace they trim.
    """
    cuts = [sorted({at for span in one.spans for at in span if 0 < at < len(one.text)}) for one in rendered]
    pieces = [one.text[:at] for one, ats in zip(rendered, cuts, strict=True) for at in ats]
    whole = _ids(tokenizer, [one.text for one in rendered], add_special_tokens)
    parts = iter(_ids(tokenizer, pieces, add_special_tokens))
    made = []
    for one, ats, ids in zip(rendered, cuts, whole, strict=True):
        if not one.text:  # special tokens alone
            made.append(TokenRow(ids[:0], ids[:0]))
            continue
        if one.spans == ((0, len(one.text)),):
            made.append(TokenRow(ids, ids))
            continue
        index = {0: 0, len(one.text): len(ids)} | {at: _common_start(next(parts), ids) for at in ats}
        labels = np.full_like(ids, IGNORED)
        for start, end in one.spans:
            labels[index[start] : index[end]] = ids[index[start] : index[end]]
        made.append(TokenRow(ids, labels))
    return made


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[Ids]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
    return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]


def _common_start(part: Ids, whole: Ids) -> int:
    """How many leading ids are the same."""
    length = min(len(part), len(whole))
    differ = np.flatnonzero(part[:length] != whole[:length])
    return int(differ[0]) if len(differ) else length
