"""Rows of labelled prompts and of example conversations from JSONL, CSV or Parquet files.

The field names are those of the project's data files: `text`, `domain`, `source` for prompts and
`messages` for conversations. Other fields are left alone. A row that does not fit is named by file
and line, and nothing is trained on half a file.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from polymath.errors import DataError

__all__ = [
    "OUT_OF_SCOPE",
    "ChatRow",
    "ChatTurn",
    "ConversationRow",
    "PromptRow",
    "fingerprint",
    "read_chats",
    "read_conversations",
    "read_prompts",
]

OUT_OF_SCOPE = "none"
"""The domain of a prompt that belongs to no expert."""

LONGEST_CSV_FIELD = 2**31 - 1
"""The most that the csv module takes on every platform (a C long); its default is 128 KiB."""

Row = TypeVar("Row", bound=BaseModel)
Numbered = Iterator[tuple[int, dict[str, Any]]]


class PromptRow(BaseModel):
    """One labelled prompt."""

    text: str = Field(min_length=1)
    domain: str = Field(min_length=1)
    source: str | None = None

    @property
    def family(self) -> str:
        """The data set: the part of `source` before the slash."""
        return (self.source or "unnamed").split("/")[0]


class ConversationRow(BaseModel):
    """The user turns of one conversation and the domain of each."""

    turns: list[str] = Field(min_length=1)
    domains: list[str] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_a_domain_for_each_turn(self) -> "ConversationRow":
        if len(self.turns) != len(self.domains):
            raise ValueError("`turns` and `domains` must be of the same length")
        return self


class ChatTurn(BaseModel):
    """One turn of an example conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRow(BaseModel):
    """One example conversation: a question first, the assistant's answer last."""

    messages: list[ChatTurn] = Field(min_length=2)

    @field_validator("messages", mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        return _parse_json(value) if isinstance(value, str) else value

    @field_validator("messages")
    @classmethod
    def _answers_something(cls, value: list[ChatTurn]) -> list[ChatTurn]:
        if value[0].role == "assistant":
            raise ValueError(
                "the first message must be of the system or the user; an answer needs one before it"
            )
        if value[-1].role != "assistant" or not value[-1].content:
            raise ValueError("the last message must be a non-empty answer of the assistant")
        return value

    def conversation(self) -> list[dict[str, str]]:
        """The turns in Hugging Face's chat format."""
        return [turn.model_dump() for turn in self.messages]


def read_prompts(paths: Sequence[Path]) -> list[PromptRow]:
    """All labelled prompts of the files, in order.

    Raises:
        DataError: a file or row is unusable; the message names the file and the line.
    """
    return _read_all(paths, PromptRow)


def read_chats(paths: Sequence[Path]) -> list[ChatRow]:
    """All example conversations of the files, in order.

    Raises:
        DataError: a file or row is unusable; the message names the file and the line.
    """
    return _read_all(paths, ChatRow)


def read_conversations(paths: Sequence[Path]) -> list[ConversationRow]:
    """All labelled conversations of the files, in order.

    Raises:
        DataError: a file or row is unusable; the message names the file and the line.
    """
    return _read_all(paths, ConversationRow)


def fingerprint(rows: Iterable[BaseModel]) -> str:
    """SHA-256 over the rows in order: the same data, the same fingerprint."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.model_dump_json().encode())
    return digest.hexdigest()


def _read_all(paths: Sequence[Path], model: type[Row]) -> list[Row]:
    rows = [row for path in paths for row in _read(path, model)]
    if not rows:
        raise DataError(f"{', '.join(map(str, paths))}: no rows")
    return rows


def _read(path: Path, model: type[Row]) -> Iterator[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type; use one of {', '.join(_READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        for line, values in reader(path):
            yield _row(path, line, values, model)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error


def _row(path: Path, line: int, values: object, model: type[Row]) -> Row:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "row"
        raise DataError(f"{path}:{line}: {field}: {first['msg']}") from error


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def _read_jsonl(path: Path) -> Numbered:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, _parse_json(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not a JSON object ({error.msg})") from error


def _read_csv(path: Path) -> Numbered:
    csv.field_size_limit(LONGEST_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                yield reader.line_num, {key: value for key, value in values.items() if value}
        except csv.Error as error:
            # reader.line_num is of the last good row
            raise DataError(f"{path}:{reader.reader.line_num}: not CSV ({error})") from error


def _read_parquet(path: Path) -> Numbered:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; install polymath with the `train` extra"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    yield from enumerate(rows, start=1)


_READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
