"""What a browser sends is checked, named, answered, and written to and read from an AMQP body."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from imrelay.errors import AnswerableError, BadId, BadJson, BadMessage, BrokerUnavailable, FromMismatch, InboxFull
from imrelay.messages.message_ids import MessageIds
from imrelay.messages.outgoing import ack_frame, error_frame, from_node, to_node
from imrelay.messages.submission import Submission, check_id, is_utf8, parse

DEEP = 100_000
TO = '"to":{"id":"2"}'

NOT_JSON = {
    "nothing": "",
    "a blank": " ",
    "a word": "hello",
    "single quotes": "{'to':{'id':'2'}}",
    "cut off": '{"to":{"id":"2"}',
    "more behind it": f"{{{TO}}} {{}}",
    "a comma too many": f"{{{TO},}}",
    "a raw newline in a string": f'{{{TO},"content":"a\nb"}}',
    "a wrong escape": f'{{{TO},"content":"\\x41"}}',
    "NaN": f'{{{TO},"content":NaN}}',
    "Infinity": f'{{{TO},"content":Infinity}}',
    "-Infinity": f'{{{TO},"content":[-Infinity]}}',
    "NaN for an id": '{"to":{"id":NaN}}',
    "a byte order mark": f"\ufeff{{{TO}}}",
    "a list": f"[{{{TO}}}]",
    "a string": '"hello"',
    "a number": "1",
    "null": "null",
    "true": "true",
    "a list of 100,000 levels": "[" * DEEP + "]" * DEEP,
    "100,000 brackets that never close": "[" * DEEP,
    "an object of 100,000 levels": '{"a":' * DEEP + "1" + "}" * DEEP,
    "content of 100,000 levels": f'{{{TO},"content":' + "[" * DEEP + "]" * DEEP + "}",
    "33 levels": f'{{{TO},"content":' + "[" * 32 + "]" * 32 + "}",
    "33 levels of objects": f'{{{TO},"content":' + '{"a":' * 31 + "{}" + "}" * 31 + "}",
    "33 levels in an unread corner": f'{{{TO},"x":[1,{{"y":' + "[" * 30 + "]" * 30 + "}]}",
}

BAD_MESSAGES = {
    "no to": '{"content":"hello"}',
    "an empty object": "{}",
    "to is null": '{"to":null}',
    "to is a string": '{"to":"2"}',
    "to is a number": '{"to":2}',
    "to is a list": '{"to":[{"id":"2"}]}',
    "to has no id": '{"to":{}}',
    "to.id is null": '{"to":{"id":null}}',
    "to.id is true": '{"to":{"id":true}}',
    "to.id is a list": '{"to":{"id":["2"]}}',
    "to.id is an object": '{"to":{"id":{"id":"2"}}}',
    "to.id is a fraction": '{"to":{"id":2.5}}',
    "to.id is a float": '{"to":{"id":2.0}}',
    "to.id is 1e400": '{"to":{"id":1e400}}',
    "to.id is -1e400": '{"to":{"id":-1e400}}',
    "to.id is 1e2": '{"to":{"id":1e2}}',
    "to.id is an integer of 129 digits": f'{{"to":{{"id":1{"0" * 128}}}}}',
    "to.id is an integer of 4,200 digits": f'{{"to":{{"id":{"7" * 4200}}}}}',
    "to.id is an integer of 5,000 digits": f'{{"to":{{"id":{"7" * 5000}}}}}',
    "to is an integer of 5,000 digits": f'{{"to":{"7" * 5000}}}',
    "to.id is empty": '{"to":{"id":""}}',
    "to.id has 129 bytes": f'{{"to":{{"id":"{"a" * 129}"}}}}',
    "to.id has 129 bytes in 43 characters": f'{{"to":{{"id":"{"中" * 43}"}}}}',
    "to.id has a slash": '{"to":{"id":"a/b"}}',
    "to.id has an escaped slash": '{"to":{"id":"a\\/b"}}',
    "to.id has a NUL": '{"to":{"id":"a\\u0000"}}',
    "to.id has a newline": '{"to":{"id":"a\\nb"}}',
    "to.id has a DEL": '{"to":{"id":"a\x7f"}}',
    "to.id has a C1 control": '{"to":{"id":"a\x85"}}',
    "to.id is half of a surrogate pair": '{"to":{"id":"\\ud800"}}',
    "to.id ends with half of a pair": '{"to":{"id":"2\\udc00"}}',
    "to.id is a pair the wrong way round": '{"to":{"id":"\\ude00\\ud83d"}}',
    "to.id is a dot": '{"to":{"id":"."}}',
    "to.id is two dots": '{"to":{"id":".."}}',
    "from is null": f'{{{TO},"from":null}}',
    "from is a string": f'{{{TO},"from":"1"}}',
    "from has no id": f'{{{TO},"from":{{}}}}',
    "from.id is true": f'{{{TO},"from":{{"id":true}}}}',
    "from.id is a float": f'{{{TO},"from":{{"id":1.0}}}}',
    "from.id is empty": f'{{{TO},"from":{{"id":""}}}}',
    "from.id is half of a surrogate pair": f'{{{TO},"from":{{"id":"\\ud800"}}}}',
    "from.id is an integer of 5,000 digits": f'{{{TO},"from":{{"id":{"7" * 5000}}}}}',
    "id is null": f'{{{TO},"id":null}}',
    "id is true": f'{{{TO},"id":true}}',
    "id is a fraction": f'{{{TO},"id":1.5}}',
    "id is 1e400": f'{{{TO},"id":1e400}}',
    "id is a list": f'{{{TO},"id":[1]}}',
    "id is an object": f'{{{TO},"id":{{}}}}',
    "id is empty": f'{{{TO},"id":""}}',
    "id has 65 bytes": f'{{{TO},"id":"{"a" * 65}"}}',
    "id has 66 bytes in 33 characters": f'{{{TO},"id":"{"é" * 33}"}}',
    "id is an integer of 65 digits": f'{{{TO},"id":{"7" * 65}}}',
    "id is an integer of 5,000 digits": f'{{{TO},"id":{"7" * 5000}}}',
    "id is half of a surrogate pair": f'{{{TO},"id":"\\ud800"}}',
    "to twice": f'{{{TO},"to":{{"id":"3"}}}}',
    "to twice, the same": f"{{{TO},{TO}}}",
    "to.id twice": '{"to":{"id":"2","id":"3"}}',
    "from twice": f'{{{TO},"from":{{"id":"1"}},"from":{{"id":"1"}}}}',
    "from.id twice": f'{{{TO},"from":{{"id":"3","id":"1"}}}}',
    "id twice": f'{{{TO},"id":"a","id":"b"}}',
    "to twice, once escaped": f'{{{TO},"t\\u006f":{{"id":"3"}}}}',
    "to twice, the first escaped": f'{{"\\u0074o":{{"id":"3"}},{TO}}}',
    "to twice, both escaped": '{"t\\u006f":{"id":"3"},"t\\u006F":{"id":"2"}}',
    "to.id twice, once escaped": '{"to":{"id":"2","\\u0069d":"3"}}',
    "from twice, once escaped": f'{{{TO},"from":{{"id":"3"}},"\\u0066rom":{{"id":"1"}}}}',
    "id twice, once escaped": f'{{{TO},"id":"a","i\\u0064":"b"}}',
    "to twice beside an integer of 5,000 digits": f'{{{TO},"to":{{"id":"3"}},"n":{"7" * 5000}}}',
}

MISMATCHES = {
    "somebody else": f'{{{TO},"from":{{"id":"3"}}}}',
    "another integer": f'{{{TO},"from":{{"id":11}}}}',
    "a longer id": f'{{{TO},"from":{{"id":"1 "}}}}',
    "a zero before it": f'{{{TO},"from":{{"id":"01"}}}}',
    "a digit of another script": f'{{{TO},"from":{{"id":"\\u0661"}}}}',
}

GOOD = {
    "the article's": '{\n"from": {\n"id": "1"\n},\n"to": {\n"id": "2"\n},\n"content": "hello"\n}',
    "an integer for to": '{"from":{"id":"1"},"to":{"id":2}}',
    "an integer for from": f'{{"from":{{"id":1}},{TO}}}',
    "keys in another order": f'{{"content":"x",{TO},"from":{{"id":"1"}}}}',
    "to.id escaped": '{"from":{"id":"1"},"to":{"id":"\\u0032"}}',
    "to escaped, once": '{"from":{"id":"1"},"\\u0074o":{"id":"2"}}',
    "other keys twice": f'{{"from":{{"id":"1"}},{TO},"content":1,"content":2}}',
    "id twice, but deeper": f'{{"from":{{"id":"1"}},{TO},"content":{{"id":1,"id":2,"to":1,"to":2}}}}',
    "the words as values": f'{{"from":{{"id":"1"}},{TO},"content":["to","id","from","id","to"]}}',
    "the words in a string": f'{{"from":{{"id":"1"}},{TO},"content":"\\"to\\":{{\\"id\\":3}}"}}',
    "more beside the ids": '{"from":{"id":"1","name":"Ann"},"to":{"id":"2","id2":3}}',
    "1e400 in the content": f'{{"from":{{"id":"1"}},{TO},"content":1e400}}',
    "an integer of 5,000 digits in the content": f'{{"from":{{"id":"1"}},{TO},"content":{"7" * 5000}}}',
    "half of a surrogate pair in the content": f'{{"from":{{"id":"1"}},{TO},"content":"\\ud800"}}',
    "32 levels": f'{{"from":{{"id":"1"}},{TO},"content":' + "[" * 31 + "]" * 31 + "}",
    "32 levels of objects": f'{{"from":{{"id":"1"}},{TO},"content":' + '{"a":' * 30 + "{}" + "}" * 30 + "}",
    "many brackets, not deep": f'{{"from":{{"id":"1"}},{TO},"content":[{",".join(["[[]]"] * 500)}]}}',
    "brackets in a string": f'{{"from":{{"id":"1"}},{TO},"content":"{"[{" * 500}"}}',
    "blanks around it": f' \r\n\t{{"from":{{"id":"1"}},{TO}}}\n ',
    "Chinese": f'{{"from":{{"id":"1"}},{TO},"content":"尝试使用"}}',
}


def parse_text(text: str, user: str = "1") -> Submission:
    """Parse a text frame."""
    found = parse(text.encode("utf-8", "surrogatepass"), False, user)
    assert isinstance(found, Submission)
    return found


@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_json_object_is_bad_json(text: str) -> None:
    """Not JSON, not an object, too deep: `bad_json`, as a text frame and as a binary one."""
    with pytest.raises(BadJson):
        parse_text(text)
    with pytest.raises(BadJson):
        parse(text.encode(), True, "1")


@pytest.mark.parametrize(
    "payload", [b"\xff", b'{"to":{"id":"2"},"content":"\xc3("}', b'{"to":{"id":"\xed\xa0\x80"}}']
)
def test_a_binary_frame_has_to_be_utf8(payload: bytes) -> None:
    """A binary frame that is not UTF-8 is `bad_json`."""
    with pytest.raises(BadJson):
        parse(payload, True, "1")


@pytest.mark.parametrize("text", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_what_breaks_the_rules_for_ids_is_a_bad_message(text: str) -> None:
    """`to`, `from` or `id` missing, wrong-typed, twice or against the rules: `bad_message`."""
    with pytest.raises(BadMessage):
        parse_text(text)
    with pytest.raises(BadMessage):
        parse(text.encode(), True, "1")


@pytest.mark.parametrize("text", MISMATCHES.values(), ids=MISMATCHES)
def test_nobody_speaks_for_somebody_else(text: str) -> None:
    """A `from.id` that is not the session's own is refused."""
    with pytest.raises(FromMismatch):
        parse_text(text)


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_what_is_allowed_passes_byte_for_byte(text: str) -> None:
    """The recipient gets the sender's bytes unchanged; a binary frame stays a binary one."""
    assert parse_text(text) == Submission("2", text.encode(), False, None)
    assert parse(text.encode(), True, "1") == Submission("2", text.encode(), True, None)


@pytest.mark.parametrize("digits", [641, 4299, 4300, 4301, 5000])
def test_an_integer_of_any_length_may_stand_in_the_content(digits: int) -> None:
    """How many digits Python converts is no concern of the messages, whatever this process was told about it."""
    check = (
        "import sys; from imrelay.messages.submission import parse\n"
        "text = sys.stdin.read()\n"
        "assert parse(text.encode(), False, '1').body == text.encode()"
    )
    text = f'{{"from":{{"id":"1"}},{TO},"content":-{"7" * digits}}}'
    for limit in ("640", "4300", "0"):
        subprocess.run(
            [sys.executable, "-X", f"int_max_str_digits={limit}", "-c", check], input=text, text=True, check=True
        )


@pytest.mark.parametrize(
    ("to", "text"),
    [("7", "7"), ("-7", "-7"), ("0", "0"), (f"1{'0' * 127}", f"1{'0' * 127}"), ('"007"', "007"), ('"-0"', "-0")],
)
def test_an_integer_counts_as_its_decimal_string(to: str, text: str) -> None:
    """7 and "7" are the same user; "007" is another one."""
    assert parse_text(f'{{"to":{{"id":{to}}}}}').to == text


@pytest.mark.parametrize(
    ("written", "message_id"),
    [
        ('"c1"', "c1"),
        ('"7"', "7"),
        ('"."', "."),
        ('"a/b\\n"', "a/b\n"),
        (f'"{"a" * 64}"', "a" * 64),
        (f'"{"é" * 32}"', "é" * 32),
        ("7", 7),
        ("-7", -7),
        ("7" * 64, int("7" * 64)),
    ],
)
def test_the_id_of_a_message_comes_back_as_it_was(written: str, message_id: str | int) -> None:
    """A message's `id` is 1 to 64 bytes of anything, or an integer, and keeps its type."""
    found = parse_text(f'{{{TO},"id":{written}}}').message_id
    assert found == message_id
    assert type(found) is type(message_id)


@pytest.mark.parametrize(
    "text", [f'{{"id":"c1",{TO},"from":{{"id":"3"}}}}', '{"id":"c1","to":{"id":""}}', '{"id":"c1"}']
)
def test_an_error_carries_the_id_of_the_message(text: str) -> None:
    """The error has the `id` of the message."""
    with pytest.raises(AnswerableError) as caught:
        parse_text(text)
    assert caught.value.message_id == "c1"


def test_an_error_has_no_id_where_there_was_none() -> None:
    """An `id` that breaks the rules is not repeated."""
    for text in (f'{{{TO},"from":{{"id":"3"}}}}', f'{{{TO},"id":"{"a" * 65}"}}', '{"id":"c1"'):
        with pytest.raises(AnswerableError) as caught:
            parse_text(text)
        assert caught.value.message_id is None


@pytest.mark.parametrize("user", ["1", "中文", 'q"uo\\te', "a b", "\u2028", "😀", "{", '"from"'])
@pytest.mark.parametrize("text", [f"{{{TO}}}", f' \n{{ {TO} , "content" : "{{" }} ', f'{{"content":"from",{TO}}}'])
def test_a_missing_from_is_added_and_nothing_else(text: str, user: str) -> None:
    """The relay says who sent it; the sender's own bytes stay as they are around that."""
    body = parse_text(text, user).body.decode()
    assert json.loads(body) == {"from": {"id": user}, **json.loads(text)}
    before, _, after = text.partition("{")
    assert body.startswith(before + "{")
    assert body.endswith(after)


ids = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=32
).filter(lambda text: text not in (".", ".."))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "to", "from", "x"]), inner),
    max_leaves=8,
)
parties = st.fixed_dictionaries({"id": ids | st.integers() | values}) | values
messages = st.fixed_dictionaries({}, optional={"to": parties, "from": parties, "id": values, "content": values})


def _user_in(party: Any) -> str | None:
    """Read `to` or `from` as PROTOCOL section 1 says, the plain way; None where it is against the rules."""
    value = party.get("id") if isinstance(party, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or value in ("", ".", ".."):
        return None
    if re.search("[/\x00-\x1f\x7f-\x9f\ud800-\udfff]", value) or len(value.encode()) > 128:
        return None
    return value


def _is_message_id(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return False
    return not re.search("[\ud800-\udfff]", str(value)) and 1 <= len(str(value).encode()) <= 64


@given(messages, st.booleans(), st.sampled_from([None, 1]), ids)
def test_a_message_is_judged_as_the_protocol_says(message: Any, ascii_only: bool, indent: Any, user: str) -> None:
    """For any object, however it is written, the verdict is that of the rules, applied one by one."""
    text = json.dumps(message, ensure_ascii=ascii_only, indent=indent)
    assume(ascii_only or not re.search("[\ud800-\udfff]", text))
    expected: type[AnswerableError] | None = None
    if ("id" in message and not _is_message_id(message["id"])) or _user_in(message.get("to")) is None:
        expected = BadMessage
    elif "from" in message and _user_in(message["from"]) != user:
        expected = BadMessage if _user_in(message["from"]) is None else FromMismatch
    if expected is not None:
        with pytest.raises(expected):
            parse_text(text, user)
        return
    found = parse_text(text, user)
    assert found.to == _user_in(message["to"])
    assert found.message_id == message.get("id")
    assert json.loads(found.body) == {"from": {"id": user}, **message}
    if "from" in message:
        assert found.body == text.encode()


@pytest.mark.parametrize("character", ["x", "中", "😀", "\\n", "["])
def test_reading_a_message_takes_no_memory_beside_it(character: str) -> None:
    """Of what the relay does not read nothing is made; to see how deep many brackets are, one copy at most."""
    for content in (f'"x{character * 200_000}"', f'["{character}"{",1.5" * 200_000}]'):
        message = f'{{"from":{{"id":"1"}},{TO},"content":{content}}}'.encode()
        parse(message, False, "1")
        tracemalloc.start()
        try:
            parse(message, False, "1")
            used = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert used < (1.2 * len(message) if character == "[" else 10_000)


_leaves = st.sampled_from(["[]", "{}", '"["', '"\\\\"', '"\\""', '"{\\\\\\"]"', "1", '""'])
_brackets = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]")
        | inner.map(lambda item: f'{{"}}":{item}}}')
    ),
)


@given(_brackets, st.integers(20, 40))
def test_the_depth_of_a_message_is_counted_exactly(content: str, levels: int) -> None:
    """Thirty-two levels pass and thirty-three do not, whatever brackets stand in strings."""

    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(depth, inner), default=0) if isinstance(value, (dict, list)) else 0

    text = f'{{"from":{{"id":"1"}},{TO},"content":{"[" * levels}{content}{"]" * levels}}}'
    if depth(json.loads(text)) <= 32:
        assert parse_text(text).to == "2"
    else:
        with pytest.raises(BadJson):
            parse_text(text)


@given(st.text() | st.text(alphabet='{}[]":,0tofrmid\\u ').map(lambda text: "{" + text + "}"))
def test_no_text_is_too_much(text: str) -> None:
    """Whatever a browser sends is a message or is answered; nothing else is ever raised."""
    assume(not re.search("[\ud800-\udfff]", text))
    try:
        answer = parse_text(text).body
    except AnswerableError as error:
        answer = error_frame(error)
    assert json.loads(answer)


@given(st.binary(max_size=40))
def test_no_bytes_are_too_much(payload: bytes) -> None:
    """The same for binary frames."""
    with pytest.raises(AnswerableError):
        parse(payload, True, "1")


@given(ids)
def test_an_id_within_the_rules_is_returned_unchanged(text: str) -> None:
    """1 to 128 bytes, no control character, no '/': that is all that is asked of an id."""
    assume(len(text.encode()) <= 128)
    assert check_id(text) == text


@given(st.text())
def test_an_id_is_judged_by_the_rules_alone(text: str) -> None:
    """Any text is an id or raises `BadId`."""
    if _user_in({"id": text}) is None:
        with pytest.raises(BadId):
            check_id(text)
    else:
        assert check_id(text) == text


def test_an_ack_says_which_message_it_is_for() -> None:
    """`{"ack":{"id":…,"mid":…,"time":…}}` and no more."""
    assert json.loads(ack_frame("é", "M", 5)) == {"ack": {"id": "é", "mid": "M", "time": 5}}
    assert json.loads(ack_frame(7, "M", 5))["ack"]["id"] == 7


def test_an_error_frame_has_what_the_protocol_says() -> None:
    """`temporary` stands there only where it is true, `id` only where there was one."""
    assert json.loads(error_frame(BadJson("no"))) == {"error": {"code": "bad_json", "message": "no"}}
    assert json.loads(error_frame(BadMessage("no", 7))) == {
        "error": {"code": "bad_message", "message": "no", "id": 7}
    }
    for error in (InboxFull("full", "c1"), BrokerUnavailable("away", "c1")):
        assert json.loads(error_frame(error))["error"]["temporary"] is True


NODE_TEXT = (
    '{"type":"utf8","utf8Data":"{\\"to\\":{\\"id\\":\\"2\\"},\\"content\\":\\"尝试\\\\n\u007f\u2028/\\u001f\\"}"}'
)
NODE_BINARY = '{"type":"binary","binaryData":{"type":"Buffer","data":[123,0,255]}}'


def test_bodies_are_wrapped_as_the_article_writes_them() -> None:
    """To the byte what Node.js's `JSON.stringify(message)` makes of a message of its WebSocket library."""
    message = '{"to":{"id":"2"},"content":"尝试\\n\x7f\u2028/\x1f"}'.encode()
    assert to_node(message, False) == NODE_TEXT.encode()
    assert to_node(b"{\x00\xff", True) == NODE_BINARY.encode()


def test_bodies_of_the_article_are_unwrapped() -> None:
    """And read back: text as text, binary as binary, with blanks and other keys or without."""
    assert from_node(NODE_TEXT.encode()) == (
        '{"to":{"id":"2"},"content":"尝试\\n\x7f\u2028/\x1f"}'.encode(),
        False,
    )
    assert from_node(NODE_BINARY.encode()) == (b"{\x00\xff", True)
    assert from_node(b'{ "utf8Data": "a", "type": "utf8", "more": 1 }') == (b"a", False)
    assert from_node(b'{"type":"utf8","utf8Data":"\\ud83d\\ude00 \\ud800"}') == ("😀 �".encode(), False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"\xff",
        b"[]",
        b'{"type":"utf8"}',
        b'{"type":"utf8","utf8Data":1}',
        b'{"type":"binary","binaryData":"x"}',
        b'{"type":"binary","binaryData":{"type":"Buffer","data":[256]}}',
        b'{"type":"binary","binaryData":{"type":"Buffer","data":[-1]}}',
        b'{"type":"binary","binaryData":{"type":"Buffer","data":["a"]}}',
        b'{"type":"binary","binaryData":{"type":"Buffer","data":[1e400]}}',
        b'{"type":"other","utf8Data":"x"}',
        b'{"to":{"id":"2"},"content":"utf8"}',
        b"[" * DEEP,
        b"7" * 5000,
    ],
)
def test_what_the_article_did_not_write_is_not_unwrapped(body: bytes) -> None:
    """Other programs may share the exchange; their bodies stay as they are."""
    assert from_node(body) is None


@given(st.text(st.characters(exclude_categories=["Cs"])), st.binary(max_size=30))
def test_a_wrapped_body_comes_back_as_it_was(text: str, octets: bytes) -> None:
    """Any message survives the way through the article's form."""
    assert from_node(to_node(text.encode(), False)) == (text.encode(), False)
    assert from_node(to_node(octets, True)) == (octets, True)


def test_utf8_is_recognised() -> None:
    """Only what is UTF-8 may go out as a text frame."""
    assert is_utf8("尝".encode())
    assert is_utf8(b"")
    assert not is_utf8("尝".encode()[:2])
    assert not is_utf8(b"\xed\xa0\x80")


class WallClock:
    """A clock that is set by hand, in seconds."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def _time_in(mid: str) -> int:
    return sum("0123456789ABCDEFGHJKMNPQRSTVWXYZ".index(c) << 5 * (9 - i) for i, c in enumerate(mid[:10]))


def test_message_ids_are_ulids() -> None:
    """26 characters of Crockford's base 32, which begin with the time."""
    mid, time_ms = MessageIds(WallClock(1_700_000_000.125)).next()
    assert re.fullmatch("[0-7][0-9A-HJKMNP-TV-Z]{25}", mid)
    assert time_ms == 1_700_000_000_125 == _time_in(mid)


def test_message_ids_are_unique_and_in_order() -> None:
    """Within a millisecond and from one to the next, each id is greater than the one before."""
    clock = WallClock(1_700_000_000.0)
    ids = MessageIds(clock)
    made = []
    for _ in range(20):
        made += [ids.next()[0] for _ in range(2500)]
        clock.now += random.choice([0.0, 0.001, 0.7])
    assert made == sorted(set(made))


def test_a_clock_set_back_does_not_undo_the_order() -> None:
    """Ids go on rising, and their time stands still until the clock has caught up."""
    clock = WallClock(1_700_000_000.0)
    ids = MessageIds(clock)
    made = [ids.next()]
    clock.now -= 3600
    made += [ids.next() for _ in range(100)]
    clock.now += 3601
    made.append(ids.next())
    assert made == sorted(set(made))
    assert {time_ms for _, time_ms in made[:-1]} == {1_700_000_000_000}
    assert made[-1][1] == 1_700_000_001_000


def test_two_processes_make_different_ids() -> None:
    """Of two processes that began in the same millisecond, no id is the same."""
    first, second = (MessageIds(WallClock(1_700_000_000.0)) for _ in range(2))
    assert not {first.next()[0] for _ in range(1000)} & {second.next()[0] for _ in range(1000)}
