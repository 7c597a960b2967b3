"""Render conversations with the tokenizer's chat template and find what the assistant said.

With ``{% generation %}`` in the template, the template itself says it. Otherwise a turn of the assistant is what
rendering one message more adds to the text; that is only true when the shorter rendering is a prefix of the longer
one, so it is checked each time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smartinit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# ShareGPT's names.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: what the model reads, special tokens included.
        spans: half-open character ranges of the tokens that count.
    """

    text: str
    spans: tuple[Span, ...]


def read_messages(value: object, where: str) -> list[Message]:
    """Messages as ``role``/``content`` dicts, from that form or from ShareGPT's ``from``/``value``."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(m, Mapping) for m in value):
        raise DataError(f"{where} holds no list of messages; expected [{{'role': ..., 'content': ...}}, ...]")
    messages = []
    for message in value:
        # A column of structs gives every message every key; absent ones are None.
        given = {key: item for key, item in message.items() if item is not None}
        role, content = given.pop("role", given.pop("from", None)), given.pop("content", given.pop("value", None))
        if not isinstance(role, str):
            raise DataError(
                f"{where} holds a message without a role; expected 'role' and 'content', or 'from' and 'value'"
            )
        messages.append({"role": _ROLES.get(role, role), "content": "" if content is None else content, **given})
    return messages


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can render messages."""
    return getattr(tokenizer, "chat_template", None) is not None


@dataclass(frozen=True)
class Conversation:
    """One row's messages and the template to render them with.

    Attributes:
        tokenizer: has a chat template.
        messages: as `read_messages` gives them, at least one.
        where: names the row in errors.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: list[Message]
    where: str

    def render(self, *, mask_prompt: bool = True) -> Rendered:
        """The whole; the spans are the assistant's turns (everything with ``mask_prompt=False``).

        Raises:
            DataError: the template refuses the messages, or does not let the assistant's turns be found.
        """
        text = self._text()
        if not mask_prompt:
            return Rendered(text, ((0, len(text)),))
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if turns and _GENERATION.search(str(self.tokenizer.get_chat_template())):
            spans = self._spans_of_template(text)
            if spans:
                return Rendered(text, spans)
        starts = [self._start(text, turn) for turn in turns]
        return Rendered(text, tuple((at, self._end(text, turn, at)) for at, turn in zip(starts, turns, strict=True)))

    def render_after(self, count: int) -> Rendered:
        """The whole; the span is all that follows the first ``count`` messages."""
        text = self._text()
        return Rendered(text, ((self._start(text, count), len(text)),))

    def _spans_of_template(self, text: str) -> tuple[Span, ...]:
        # The character ranges come from the renderer: apply_chat_template's own token mask runs on to the end of the
        # row when a range ends in a character that belongs to no token (whitespace that offsets trim).
        from transformers.utils.chat_template_utils import render_jinja_template

        special_tokens: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(  # annotated as a str, but gives texts and ranges
            conversations=[self.messages],
            chat_template=str(self.tokenizer.get_chat_template()),
            return_assistant_tokens_mask=True,
            **special_tokens,
        )
        texts, ranges = rendered
        return tuple((int(start), int(end)) for start, end in ranges[0]) if texts[0] == text else ()

    def _start(self, text: str, turn: int) -> int:
        """Where the message number ``turn`` begins in ``text``, its header left out."""
        if turn == 0:
            return 0
        # Reasoning templates put an opening tag into the generation prompt which the finished turn does not have.
        for prompt in (True, False):
            prefix = self._text(turn, add_generation_prompt=prompt)
            if text.startswith(prefix):
                return len(prefix)
        raise self._not_a_prefix()

    def _end(self, text: str, turn: int, start: int) -> int:
        """Where the message number ``turn``, which begins at ``start``, ends."""
        if turn == len(self.messages) - 1:
            return len(text)
        prefix = self._text(turn + 1)
        if text.startswith(prefix):
            return len(prefix)
        # Some templates render a last turn differently from an earlier one; then the content itself tells.
        content = self.messages[turn]["content"]
        found = text.find(content.strip(), start) if isinstance(content, str) and content.strip() else -1
        if found < 0:
            raise self._not_a_prefix()
        return found + len(content.strip())

    def _text(self, count: int | None = None, *, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                self.messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:
            raise DataError(f"the chat template refuses {self.where}: {error}") from error
        return str(text)

    def _not_a_prefix(self) -> DataError:
        return DataError(
            "the chat template renders earlier turns differently once later ones follow, so the assistant's tokens of "
            f"{self.where} cannot be told apart; mark them in the template with a generation block, or count all "
            "tokens with --no-label-mask"
        )
