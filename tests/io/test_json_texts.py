"""The fast reader of JSON lines: what it accepts, `json.loads` accepts with the same text; what is plainly good, it takes."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from salience.io.json_texts import json_texts
from salience.io.lines import _json_text

TEXTS = st.text(st.characters(codec="utf-8"), max_size=150)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(
    st.tuples(TEXTS, st.dictionaries(TEXTS.filter(lambda name: name != "text"), VALUES, max_size=3)),
    min_size=1,
    max_size=4,
)


def read(lines: list[bytes], name: str = "text") -> list[str] | None:
    """As `parse_jsonl` calls it."""
    block = b"\n".join(lines)
    sizes = np.array([len(line) for line in lines])
    starts = np.cumsum(sizes + 1) - sizes - 1
    found = json_texts(block, starts, starts + sizes, name)
    if found is not None:
        found.validate(full=True)
    return None if found is None else found.to_pylist()


@given(RECORDS, st.booleans(), st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "  :\r ")]), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_takes_what_json_writes(records, ascii, separators, place):
    lines = []
    for text, others in records:
        members = list(others.items())
        members.insert(place, ("text", text))
        lines.append(json.dumps(dict(members), ensure_ascii=ascii, separators=separators).encode())
    assert read(lines) == [text for text, _ in records]


PIECES = [
    *'{}[]",:\\ \t\r0123456789-+.eEutfnx/', "text", '"text"', '"text":"a"', '"b":', "true", "false", "null", "\\u00e9",
    "\\ud83d\\ude00", "\\ud83d", "\\ude00", "\\n", "\\x", '\\"', "é", "\x01", "NaN", "a" * 70, '{"a":1}', "[1,[2]]",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(["", "a" * 64, " "]))
@settings(max_examples=3000, deadline=None)
@example('"text":"\\ud83d\\u0041"', "")
@example('"text":"a","text":"b"', "")
@example('"text":"a","b":01', "")
@example('"text":"a","b":{"c":1', "")
@example('"text":"a","b":[1,]', "")
@example('"text":"a",', "")
@example('"te\\u0078t":"a"', "")
def test_takes_nothing_that_json_refuses(inside, behind):
    line = ("{" + inside + "}").encode()
    found = read([line, b'{"text":"' + behind.encode() + b'"}'])
    if found is not None:
        assert found == [_json_text(line, "text")[0], behind]


@given(RECORDS, st.data())
@settings(max_examples=500, deadline=None)
def test_a_changed_byte_is_seen(records, data):
    line = bytearray(json.dumps({"n": records[0][1], "text": records[0][0]}, ensure_ascii=False).encode())
    line[data.draw(st.integers(1, len(line) - 2))] = data.draw(st.sampled_from(b'"\\{}[],:0-.e \x01ab'))
    try:
        bytes(line).decode()
    except UnicodeDecodeError:
        return  # the block is checked before
    found = read([bytes(line)])
    assert found is None or found == [_json_text(bytes(line), "text")[0]]


@pytest.mark.parametrize(
    "line",
    [
        "{}", '{"txt":"a"}', '{"text":1}', '{"text":null}', '{"text":"a"', '{"text":"a"}}', '{"text":"a"} {}',
        '{"text":"a","text":"b"}', '{"text":"\\ud800"}', '{"text":"a" "b":1}', '{"text":"a","b":.5}',
        '{"text":"a","b":tru}', '{"text":"a","b":' + "[" * 64 + "]" * 64 + "}",
    ],
)  # fmt: skip
def test_leaves_what_is_in_doubt(line):
    assert read([line.encode()]) is None


def test_deep_nesting_and_every_escape():
    deep = "[" * 30 + '{"a":{}}' + "]" * 30
    assert read([f'{{"n":{deep},"text":"\\"\\\\\\/\\b\\f\\n\\r\\t\\u0000\\u00DF\\u4e2d\\ud83d\\uDE00"}}'.encode()]) == [
        '"\\/\b\f\n\r\t\0ß中😀'
    ]


@pytest.mark.parametrize("length", [0, 1, 54, 55, 56, 63, 64, 65, 127, 128, 129, 1000])
def test_lengths_around_those_of_words(length):
    texts = ["x" * length, "é" * length, '"' * length, "x" * length + "\n"]
    assert read([json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]) == texts


def test_field_of_another_name():
    assert read(['{"text":1,"größe":"XL","gr":"S"}'.encode()], "größe") == ["XL"]
