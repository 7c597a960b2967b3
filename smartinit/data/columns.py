"""Which columns of the data are read, and as what.

| columns (first match wins)                            | kind     | tokens that count           |
|-------------------------------------------------------|----------|-----------------------------|
| `input_ids` (+ `attention_mask`, `labels`)            | tokens   | where `labels` is not -100  |
| `messages`, `conversations`, `conversation`           | messages | the assistant's             |
| `prompt` + `completion`, `response` or `chosen`       | pair     | the completion's            |
| `instruction` (+ `input`) + `output` or `response`    | pair     | the output's                |
| `question` + `answer`, `query` + `response`           | pair     | the answer's                |
| `text`, `content`                                     | text     | all                         |
| `sentence1` + `sentence2`, `premise` + `hypothesis`   | text     | all (encoders only)         |
| `sentence`                                            | text     | all                         |

`prompt` and its completion are joined as they stand, as trainers do; the other pairs with one line break.
Both sides of `prompt` + `completion` may be lists of messages. A model without a causal head reads everything as
text, and pairs as two segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from smartinit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["tokens", "messages", "pair", "text"]


@dataclass(frozen=True)
class Columns:
    """The columns to read.

    Attributes:
        kind: how they become tokens.
        first: the text, the messages, the ids, or what a pair's prompt consists of.
        second: the completion of a pair, or the second segment of an encoder's text.
        separator: stands between the two sides of a pair.
    """

    kind: Kind
    first: tuple[str, ...]
    second: str | None = None
    separator: str = ""

    def describe(self) -> str:
        """A few words for the log: ``question + answer as prompt and completion``."""
        names = " + ".join([*self.first, *([self.second] if self.second else [])])
        return names if self.kind != "pair" else f"{names} as prompt and completion"


@dataclass(frozen=True)
class ColumnNames:
    """Names given by the user, which outrank the table above."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        """Refuse combinations that say two things."""
        if (self.prompt is None) != (self.completion is None):
            raise ConfigError("a prompt column needs a completion column and the other way round; give both")
        if sum(name is not None for name in (self.text, self.prompt, self.messages)) > 1:
            raise ConfigError("give one of the text column, the messages column, or prompt and completion columns")


_CAUSAL: tuple[Columns, ...] = (
    Columns("tokens", ("input_ids",)),
    Columns("messages", ("messages",)),
    Columns("messages", ("conversations",)),
    Columns("messages", ("conversation",)),
    Columns("pair", ("prompt",), "completion"),
    Columns("pair", ("prompt",), "response"),
    Columns("pair", ("prompt",), "chosen"),
    Columns("pair", ("instruction", "input"), "output", "\n"),
    Columns("pair", ("instruction",), "output", "\n"),
    Columns("pair", ("instruction",), "response", "\n"),
    Columns("pair", ("question",), "answer", "\n"),
    Columns("pair", ("query",), "response", "\n"),
    Columns("text", ("text",)),
    Columns("text", ("content",)),
    Columns("text", ("sentence",)),
)
_ENCODER: tuple[Columns, ...] = (
    Columns("tokens", ("input_ids",)),
    Columns("text", ("text",)),
    Columns("text", ("sentence1",), "sentence2"),
    Columns("text", ("premise",), "hypothesis"),
    Columns("text", ("sentence",)),
    Columns("text", ("content",)),
    Columns("text", ("prompt",), "completion"),
    Columns("text", ("question",), "answer"),
)
UNDERSTOOD = "text, messages, conversations, prompt + completion, instruction (+ input) + output, question + answer"


def choose_columns(found: Sequence[str], names: ColumnNames | None = None, *, causal: bool = True) -> Columns:
    """Pick the columns to read from those which the data has.

    Raises:
        DataError: a named column is missing, or no known combination is there.
    """
    chosen = _from_names(names or ColumnNames(), causal=causal)
    if chosen is not None:
        missing = [name for name in (*chosen.first, chosen.second) if name is not None and name not in found]
        if missing:
            raise DataError(f"the data has no column '{missing[0]}'; it has {_listed(found)}")
        return chosen
    for candidate in _CAUSAL if causal else _ENCODER:
        if all(name in found for name in (*candidate.first, candidate.second) if name is not None):
            return candidate
    raise DataError(
        f"no usable column in the data: found {_listed(found)}; understood are {UNDERSTOOD}, "
        "or name yours with --text-column, --messages-column, or --prompt-column and --completion-column"
    )


def _from_names(names: ColumnNames, *, causal: bool) -> Columns | None:
    if names.text is not None:
        return Columns("text", (names.text,))
    if names.messages is not None:
        if not causal:
            raise ConfigError("an encoder reads texts, not messages; name a text column instead")
        return Columns("messages", (names.messages,))
    if names.prompt is not None:
        separator = "" if names.prompt == "prompt" else "\n"
        return Columns("pair" if causal else "text", (names.prompt,), names.completion, separator)
    return None


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found) if found else "none"
