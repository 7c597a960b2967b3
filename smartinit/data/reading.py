"""From what `--data` names to batches, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.data.batches import Batches
from smartinit.data.columns import choose_columns
from smartinit.data.files import load_rows
from smartinit.data.source import Source, find_source
from smartinit.data.tokenise import Tokeniser

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from smartinit.data.sampling import Sampling


def read_batches(
    source: str | Path | Source,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    *,
    causal: bool = True,
    vocab_size: int | None = None,
) -> Batches:
    """Load, tokenise and batch; ``causal`` tells whether the model has a causal head.

    Raises:
        MissingFileError: the source does not exist.
        DataError: nothing in it can be used; the message names file, line, row or column.
    """
    if not isinstance(source, Source):
        source = find_source(source, split=sampling.split)
    rows = load_rows(source, split=sampling.split, config_name=sampling.config_name)
    columns = choose_columns(rows.column_names, sampling.columns, causal=causal)
    wanted = [
        name for name in (*columns.first, columns.second, "attention_mask", "labels") if name in rows.column_names
    ]
    tokenise = Tokeniser(
        tokenizer,
        columns,
        max_length=sampling.max_length,
        causal=causal,
        mask_prompt=sampling.mask_prompt,
        vocab_size=vocab_size,
    )
    return Batches(
        rows.select_columns(wanted),
        tokenise,
        batch_size=sampling.batch_size,
        pad_token_id=_pad_token_id(tokenizer),
        seed=sampling.seed,
        max_samples=sampling.max_samples,
        group_by_length=sampling.group_by_length,
    )


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
