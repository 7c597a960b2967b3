"""Rows become token ids and labels; -100 marks the tokens of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from smartinit.data.chat import Conversation, Rendered, has_template, read_messages
from smartinit.data.labels import TokenRow, label_spans
from smartinit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from smartinit.data.columns import Columns


class Tokeniser:
    """Turns chunks of rows into `TokenRow`, as a trainer would.

    Args:
        tokenizer: a transformers tokenizer.
        columns: what to read, from `choose_columns`.
        max_length: rows are cut on the right.
        causal: ``False`` for encoders: no labels, no end-of-sequence token, pairs as segments.
        mask_prompt: ``False`` counts every token.
        vocab_size: rows with larger ids are refused, instead of failing inside the embedding.

    A causal row ends with the end-of-sequence token. Rows are cut after masking, so that a long prompt may leave
    nothing; see `TokenRow.counts`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        columns: Columns,
        *,
        max_length: int,
        causal: bool = True,
        mask_prompt: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.columns = columns
        self.max_length = max_length
        self.causal = causal
        self.mask_prompt = mask_prompt
        self.vocab_size = vocab_size

    def __call__(self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[TokenRow]:
        """Tokenise a chunk.

        Args:
            rows: column name -> values.
            numbers: the 1-based number of each row in the data, for errors.

        Raises:
            DataError: a value of the wrong kind, a missing or failing chat template, an id beyond the vocabulary.
        """
        if self.columns.kind == "tokens":
            made = self._given(rows, numbers)
        elif self.columns.kind == "messages":
            made = self._conversations(rows[self.columns.first[0]], numbers)
        elif self.columns.kind == "pair":
            made = self._pairs(rows, numbers)
        else:
            made = self._texts(rows, numbers)
        self._check_vocabulary(made, numbers)
        return made

    def _given(self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[TokenRow]:
        made = []
        for i, ids in enumerate(rows["input_ids"]):
            try:
                input_ids = np.asarray([] if ids is None else ids, np.int32).reshape(-1)
                labels = np.asarray(rows["labels"][i], np.int32) if "labels" in rows else input_ids
                seen = np.asarray(rows["attention_mask"][i], bool) if "attention_mask" in rows else input_ids >= 0
                kept = TokenRow(input_ids[seen], labels[seen] if self.causal else None)
            except (TypeError, ValueError, IndexError) as error:
                raise DataError(
                    f"row {numbers[i]} of the data is no token row ({error}); "
                    "input_ids, attention_mask and labels must be lists of integers of one length"
                ) from error
            made.append(self._cut(kept))
        return made

    def _conversations(self, values: Sequence[Any], numbers: Sequence[int]) -> list[TokenRow]:
        self._require_template()
        rendered = []
        for value, number in zip(values, numbers, strict=True):
            where = f"row {number} of the data"
            messages = read_messages(value, where)
            rendered.append(
                Conversation(self.tokenizer, messages, where).render(mask_prompt=self.mask_prompt)
                if messages
                else Rendered("", ())
            )
        return self._labelled(rendered, add_special_tokens=False)

    def _pairs(self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[TokenRow]:
        prompts, answers = rows[self.columns.first[0]], rows[str(self.columns.second)]
        rendered, chats = [], 0
        for i, number in enumerate(numbers):
            where = f"row {number} of the data"
            prompt, answer = prompts[i], answers[i]
            if isinstance(prompt, list) or isinstance(answer, list):
                chats += 1
                rendered.append(self._chat_pair(prompt, answer, where))
            else:
                rendered.append(self._text_pair([rows[name][i] for name in self.columns.first], answer, number))
        if chats not in (0, len(rendered)):
            raise DataError(f"rows {numbers[0]} to {numbers[-1]} of the data mix texts and messages; keep one kind")
        return self._labelled(rendered, add_special_tokens=chats == 0)

    def _chat_pair(self, prompt: object, answer: object, where: str) -> Rendered:
        self._require_template()
        before = read_messages(_as_messages(prompt, "user"), where)
        after = read_messages(_as_messages(answer, "assistant"), where)
        if not before or not any(message["content"] for message in after):
            return Rendered("", ())
        chat = Conversation(self.tokenizer, before + after, where)
        return chat.render_after(len(before)) if self.mask_prompt else chat.render(mask_prompt=False)

    def _text_pair(self, prompt: list[object], answer: object, number: int) -> Rendered:
        separator, second = self.columns.separator, self.columns.second or ""
        parts = [self._text(part, number, name) for part, name in zip(prompt, self.columns.first, strict=True)]
        before = separator.join(part for part in parts if part) + separator
        after = self._text(answer, number, second)
        if not after:  # a bare end-of-sequence token would say nothing about the data
            return Rendered("", ())
        end = "" if self._ends(after) else self._eos()
        text = before + after + end
        return Rendered(text, ((len(before) if self.mask_prompt else 0, len(text)),))

    def _texts(self, rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> list[TokenRow]:
        name, second = self.columns.first[0], self.columns.second
        texts = self._column(rows, name, numbers)
        if not self.causal:
            return self._segments(texts, None if second is None else self._column(rows, second, numbers))
        end = self._eos()
        ended = [text + end if text and not self._ends(text) else text for text in texts]
        return self._labelled([Rendered(text, ((0, len(text)),)) for text in ended], add_special_tokens=True)

    def _segments(self, texts: list[str], pairs: list[str] | None) -> list[TokenRow]:
        encoded = self.tokenizer(
            texts, pairs, truncation=True, max_length=self.max_length, add_special_tokens=True, verbose=False
        )
        types = encoded.get("token_type_ids")
        made = []
        for i, ids in enumerate(encoded["input_ids"]):
            empty = not texts[i] and not (pairs and pairs[i])  # [CLS] [SEP] alone
            kept = np.asarray([] if empty else ids, np.int32)
            made.append(TokenRow(kept, None, None if types is None else np.asarray(types[i], np.int32)[: len(kept)]))
        return made

    def _labelled(self, rendered: Sequence[Rendered], *, add_special_tokens: bool) -> list[TokenRow]:
        return [self._cut(row) for row in label_spans(self.tokenizer, rendered, add_special_tokens=add_special_tokens)]

    def _cut(self, row: TokenRow) -> TokenRow:
        if len(row) <= self.max_length:
            return row
        ids, labels = row.input_ids[: self.max_length], row.labels
        # Copies, because a view would keep the whole of a long row in memory.
        return TokenRow(ids.copy(), None if labels is None else labels[: self.max_length].copy())

    def _eos(self) -> str:
        return str(self.tokenizer.eos_token or "")

    def _ends(self, text: str) -> bool:
        return bool(self._eos()) and text.endswith(self._eos())

    def _column(self, rows: Mapping[str, Sequence[Any]], name: str, numbers: Sequence[int]) -> list[str]:
        return [self._text(value, number, name) for value, number in zip(rows[name], numbers, strict=True)]

    def _text(self, value: object, number: int, name: str) -> str:
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        if not isinstance(value, str):
            raise DataError(
                f"column '{name}' of row {number} of the data holds a {type(value).__name__}; expected a text"
            )
        return value

    def _require_template(self) -> None:
        if not has_template(self.tokenizer):
            raise DataError(
                "the rows are conversations but the model's tokenizer has no chat template; put a chat_template.jinja "
                "into the model folder, use the instruct version's tokenizer, or give prompt and completion columns"
            )

    def _check_vocabulary(self, made: list[TokenRow], numbers: Sequence[int]) -> None:
        if self.vocab_size is None:
            return
        for row, number in zip(made, numbers, strict=True):
            outside = row.input_ids[(row.input_ids < 0) | (row.input_ids >= self.vocab_size)]
            if len(outside):
                raise DataError(
                    f"row {number} of the data holds token id {outside[0]}, but the model's vocabulary has "
                    f"{self.vocab_size}; the tokenizer or the ids belong to another model"
                )


def _as_messages(value: object, role: str) -> object:
    return value if isinstance(value, list) else [{"role": role, "content": value or ""}]
