"""Rows from JSONL, CSV and Parquet: the same rows, and every bad one named by file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymath.errors import DataError
from polymath.training import (
    ChatRow,
    ChatTurn,
    ConversationRow,
    PromptRow,
    fingerprint,
    read_chats,
    read_conversations,
    read_prompts,
)
from tests.conftest import write_jsonl

Rows = list[dict[str, Any]]

PROMPTS: Rows = [
    {"text": "Solve x² = 4", "domain": "math", "source": "gsm8k/train"},
    {"text": 'two\nlines, a comma and "quotes"', "domain": "coding", "source": "mbpp/train"},
    {"text": "你好, مرحبا 👩‍👩‍👧 \u2028 \x85", "domain": "none", "source": "clinc/oos"},
    {"text": " kept white space ", "domain": "law", "source": "squad"},
]

CHATS: Rows = [
    {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Write\n\n```py\nx\n```"},
            {"role": "assistant", "content": 'print("👋")'},
        ]
    },
]

GOOD_PROMPT: dict[str, Any] = {"text": "ok", "domain": "math"}
BAD_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"domain": "math"}, "text"),
    "no domain": ({"text": "ok"}, "domain"),
    "an empty text": ({"text": "", "domain": "math"}, "text"),
    "an empty domain": ({"text": "ok", "domain": ""}, "domain"),
}

GOOD_CHAT = CHATS[1]
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
BAD_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"text": "hi"}, "messages"),
    "one message": ({"messages": [ASSISTANT]}, "messages"),
    "a wrong role": (
        {"messages": [{"role": "tool", "content": "x"}, ASSISTANT]},
        "messages.0.role",
    ),
    "no content": ({"messages": [{"role": "user"}, ASSISTANT]}, "messages.0.content"),
    "a last turn of the user": ({"messages": [USER, ASSISTANT, USER]}, "messages"),
    "an empty answer": ({"messages": [USER, {**ASSISTANT, "content": ""}]}, "messages"),
}

CONVERSATIONS: Rows = [
    {"turns": ["Solve x² = 4", "and x² = 9?"], "domains": ["math", "math"]},
    {"turns": ["你好\u2028"], "domains": ["none"]},
]
BAD_CONVERSATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no turns": ({"domains": ["math"]}, "turns"),
    "no domains": ({"turns": ["hi"]}, "domains"),
    "empty turns": ({"turns": [], "domains": []}, "turns"),
    "turns that are a text": ({"turns": "hi", "domains": ["math"]}, "turns"),
    "a turn of another type": ({"turns": ["hi", 7], "domains": ["math", "law"]}, "turns.1"),
    "a turn without a domain": ({"turns": ["hi", "ho"], "domains": ["math"]}, "row"),
    "a domain without a turn": ({"turns": ["hi"], "domains": ["math", "law"]}, "row"),
}


def write_csv(path: Path, rows: Rows) -> Path:
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    import pyarrow
    from pyarrow import parquet

    fields = list(dict.fromkeys(field for row in rows for field in row))
    columns = {field: [row.get(field) for row in rows] for field in fields}
    parquet.write_table(pyarrow.table(columns), path)
    return path


Write = Callable[[Path, Rows], Path]
WRITERS: dict[str, Write] = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}
FIRST_LINES = {".jsonl": 1, ".csv": 2, ".parquet": 1}
every_type = pytest.mark.parametrize("suffix", WRITERS)


def write(folder: Path, suffix: str, rows: Rows) -> Path:
    return WRITERS[suffix](folder / f"data{suffix}", rows)


def refusal(read: Callable[[Sequence[Path]], Any], *paths: Path) -> str:
    with pytest.raises(DataError) as failure:
        read(paths)
    return failure.value.message


@every_type
def test_every_file_type_gives_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    rows = read_prompts([write(tmp_path, suffix, PROMPTS)])
    assert [row.model_dump() for row in rows] == PROMPTS


@every_type
def test_every_file_type_gives_the_same_conversations(tmp_path: Path, suffix: str) -> None:
    rows = read_chats([write(tmp_path, suffix, CHATS)])
    assert [row.model_dump() for row in rows] == CHATS


@every_type
def test_messages_may_be_json_text_in_any_file_type(tmp_path: Path, suffix: str) -> None:
    as_text: Rows = [{"messages": json.dumps(row["messages"])} for row in CHATS]
    rows = read_chats([write(tmp_path, suffix, as_text)])
    assert [row.model_dump() for row in rows] == CHATS


def test_the_fingerprint_does_not_depend_on_the_file_type(tmp_path: Path) -> None:
    prints = {fingerprint(read_prompts([write(tmp_path, s, PROMPTS)])) for s in WRITERS}
    assert len(prints) == 1


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "1.jsonl", PROMPTS[:1])
    rest = write_csv(tmp_path / "2.csv", PROMPTS[1:])
    assert [row.text for row in read_prompts([rest, first])] == [
        row["text"] for row in PROMPTS[1:] + PROMPTS[:1]
    ]


@every_type
def test_other_fields_are_left_alone(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [{**GOOD_PROMPT, "licence": "MIT", "id": "7"}])
    assert read_prompts([path]) == [PromptRow(text="ok", domain="math")]


@every_type
def test_a_prompt_needs_no_source(tmp_path: Path, suffix: str) -> None:
    row = read_prompts([write(tmp_path, suffix, [GOOD_PROMPT])])[0]
    assert row.source is None
    assert row.family == "unnamed"


@pytest.mark.parametrize(
    ("source", "family"), [("squad/train", "squad"), ("squad", "squad"), ("a/b/c", "a")]
)
def test_the_family_is_what_stands_before_the_slash(source: str, family: str) -> None:
    assert PromptRow(text="ok", domain="law", source=source).family == family


@every_type
def test_the_case_of_the_suffix_does_not_matter(tmp_path: Path, suffix: str) -> None:
    path = WRITERS[suffix](tmp_path / f"DATA{suffix.upper()}", PROMPTS)
    assert len(read_prompts([path])) == len(PROMPTS)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, PROMPTS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.model_dump() for row in read_prompts([path])] == PROMPTS


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{json.dumps(GOOD_PROMPT)}\n  \n\n{{}}\n", encoding="utf-8")
    assert refusal(read_prompts, path).startswith(f"{path}:5: text")


def test_the_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD_PROMPT), encoding="utf-8")
    assert len(read_prompts([path])) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_windows_line_ends_change_nothing(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, PROMPTS[2:])
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert [row.model_dump() for row in read_prompts([path])] == PROMPTS[2:]


@every_type
@pytest.mark.parametrize(("bad", "field"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_a_bad_prompt_is_named_by_file_line_and_field(
    tmp_path: Path, suffix: str, bad: dict[str, Any], field: str
) -> None:
    path = write(tmp_path, suffix, [GOOD_PROMPT, GOOD_PROMPT, bad])
    line = FIRST_LINES[suffix] + 2
    assert refusal(read_prompts, path).startswith(f"{path}:{line}: {field}: ")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(("bad", "field"), BAD_CHATS.values(), ids=BAD_CHATS.keys())
def test_a_bad_conversation_is_named_by_file_line_and_field(
    tmp_path: Path, suffix: str, bad: dict[str, Any], field: str
) -> None:
    path = write(tmp_path, suffix, [GOOD_CHAT, bad, GOOD_CHAT])
    line = FIRST_LINES[suffix] + 1
    assert refusal(read_chats, path).startswith(f"{path}:{line}: {field}: ")


@pytest.mark.parametrize(("bad", "field"), BAD_CHATS.values(), ids=BAD_CHATS.keys())
def test_a_bad_conversation_in_parquet_is_named_by_its_row(
    tmp_path: Path, bad: dict[str, Any], field: str
) -> None:
    rows: Rows = [
        {"messages": json.dumps(row["messages"]) if "messages" in row else None}
        for row in (GOOD_CHAT, bad)
    ]
    path = write_parquet(tmp_path / "data.parquet", rows)
    assert refusal(read_chats, path).startswith(f"{path}:2: {field}: ")


@pytest.mark.parametrize("line", ["{", "not json", '{"text": "a"} trailing', "{'text': 'a'}"])
def test_a_line_that_is_not_json_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(GOOD_PROMPT)}\n{line}\n", encoding="utf-8")
    assert refusal(read_prompts, path).startswith(f"{path}:2: not a JSON object")


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "3", "null"])
def test_a_line_that_is_json_but_no_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(GOOD_PROMPT)}\n{line}\n", encoding="utf-8")
    assert refusal(read_prompts, path).startswith(f"{path}:2: row: ")


@pytest.mark.parametrize("value", [7, None, ["a"], {"a": 1}, True])
def test_a_text_of_another_type_is_named(tmp_path: Path, value: object) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [GOOD_PROMPT, {"text": value, "domain": "math"}])
    assert refusal(read_prompts, path).startswith(f"{path}:2: text: ")


def test_half_a_character_is_named_not_raised(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "\\ud83d", "domain": "math"}\n', encoding="utf-8")
    assert refusal(read_prompts, path).startswith(f"{path}:1: text: ")


def test_messages_that_are_not_json_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("messages\nhello\n", encoding="utf-8")
    assert refusal(read_chats, path).startswith(f"{path}:2: messages: ")


def test_a_csv_row_over_several_lines_is_named_by_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('text,domain\n"a\nb",math\n"c\nd\ne",\n', encoding="utf-8")
    line = refusal(read_prompts, path).removeprefix(f"{path}:").split(":")[0]
    assert 4 <= int(line) <= 6


def test_a_csv_row_that_is_too_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,domain\na,math\nb\n", encoding="utf-8")
    assert refusal(read_prompts, path).startswith(f"{path}:3: domain: ")


@pytest.mark.parametrize("row", ['"open,math\n', '"a"b,math\n'])
def test_broken_quotes_are_not_csv(tmp_path: Path, row: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f"text,domain\n{row}", encoding="utf-8")
    assert "not CSV" in refusal(read_prompts, path)


@pytest.mark.parametrize("name", ["data.json", "data.txt", "data", "data.jsonl.gz"])
def test_an_unknown_file_type_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, PROMPTS)
    message = refusal(read_prompts, path)
    assert message.startswith(f"{path}: unknown file type")
    assert all(suffix in message for suffix in WRITERS)


@every_type
def test_a_file_that_does_not_exist_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"nowhere{suffix}"
    assert refusal(read_prompts, path) == f"{path}: no such file"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "folder.jsonl"
    path.mkdir()
    assert refusal(read_prompts, path) == f"{path}: no such file"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file_has_no_rows(tmp_path: Path, suffix: str, content: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text(content, encoding="utf-8")
    assert refusal(read_prompts, path) == f"{path}: no rows"


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,domain\n", encoding="utf-8")
    assert refusal(read_prompts, path) == f"{path}: no rows"


def test_an_empty_file_among_others_is_no_fault(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert len(read_prompts([empty, write_jsonl(tmp_path / "data.jsonl", PROMPTS)])) == 4


def test_one_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", PROMPTS)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "ok"}])
    assert refusal(read_prompts, good, bad).startswith(f"{bad}:1: domain")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes('{"text": "größer", "domain": "math"}\n'.encode(encoding))
    assert refusal(read_prompts, path).startswith(f"{path}: not UTF-8 text")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 nothing of the kind PAR1", b"text\n"])
def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(content)
    assert refusal(read_prompts, path).startswith(f"{path}: not a readable Parquet file")


def test_a_conversation_is_in_the_chat_format_of_hugging_face() -> None:
    row = ChatRow(messages=[ChatTurn(role="user", content="a"), ChatTurn(**ASSISTANT)])
    assert row.conversation() == [{"role": "user", "content": "a"}, ASSISTANT]


prompt_rows = st.lists(st.builds(PromptRow, text=st.text(min_size=1), domain=st.just("math")))


@settings(deadline=None)
@given(first=prompt_rows, second=prompt_rows)
def test_fingerprints_are_equal_exactly_where_the_rows_are(
    first: list[PromptRow], second: list[PromptRow]
) -> None:
    assert fingerprint(first) == fingerprint([row.model_copy() for row in first])
    assert (fingerprint(first) == fingerprint(second)) == (first == second)


def test_the_fingerprint_depends_on_the_order() -> None:
    rows = [PromptRow(text="a", domain="x"), PromptRow(text="b", domain="x")]
    assert fingerprint(rows) != fingerprint(rows[::-1])


@settings(deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1))
def test_any_texts_come_back_from_jsonl(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    write_jsonl(path, [{"text": text, "domain": "math"} for text in texts])
    assert [row.text for row in read_prompts([path])] == texts


def test_a_csv_error_names_the_line_of_the_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('text,domain\nok,math\nok,math\n"a"b,math\n', encoding="utf-8")
    with pytest.raises(DataError) as failure:
        read_prompts([path])
    assert failure.value.message.startswith(f"{path}:4: not CSV")


def test_a_long_csv_field_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f"text,domain\n{'a' * 140_000},math\n", encoding="utf-8")
    assert [len(row.text) for row in read_prompts([path])] == [140_000]


@pytest.mark.parametrize("line", ["[" * 200_000, json.dumps({"messages": "[" * 200_000})])
def test_json_that_is_nested_too_deeply_is_named_by_file_and_line(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match="nested too deeply") as failure:
        read_chats([path])
    assert failure.value.message.startswith(f"{path}:2: ")


def test_a_conversation_that_starts_with_an_answer_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": [ASSISTANT, USER, ASSISTANT]}])
    with pytest.raises(DataError, match="the first message must be of the system or the user"):
        read_chats([path])


def test_an_answer_may_follow_the_system_or_another_answer(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Greet."}
    path = write_jsonl(tmp_path / "data.jsonl", [{"messages": [system, ASSISTANT, ASSISTANT]}])
    assert len(read_chats([path])[0].messages) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_labelled_conversations_are_read(tmp_path: Path, suffix: str) -> None:
    rows = read_conversations([write(tmp_path, suffix, CONVERSATIONS)])
    assert [row.model_dump() for row in rows] == CONVERSATIONS


@pytest.mark.parametrize(("bad", "field"), BAD_CONVERSATIONS.values(), ids=BAD_CONVERSATIONS.keys())
def test_a_bad_labelled_conversation_is_named_by_file_line_and_field(
    tmp_path: Path, bad: dict[str, Any], field: str
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [CONVERSATIONS[0], bad])
    assert refusal(read_conversations, path).startswith(f"{path}:2: {field}: ")


def test_turns_and_domains_are_of_the_same_length() -> None:
    with pytest.raises(ValueError, match="must be of the same length"):
        ConversationRow(turns=["hi", "ho"], domains=["math"])
