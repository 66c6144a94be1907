"""NDJSON and JSONArray: the documents of TG's encoder, with orjson or without."""

from __future__ import annotations

import datetime
import enum
import ipaddress
import json
import math
import subprocess
import sys
import uuid
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jq
import orjson
import pytest
import sqlalchemy as sa
import tg
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import Range
from sqlalchemy.orm import Session, load_only, selectinload
from tg import TGController, expose
from tg.jsonify import JsonEncodeError, JSONEncoder
from tg.util import Bunch
from webob.multidict import MultiDict

from tests.conftest import MakeApp
from tests.formats.support import (
    Batches,
    Model,
    OldModel,
    Plain,
    outcome,
    query_duckdb,
    sqlite_rows,
)
from tests.model import Base, Note, User
from tests.wsgi import Call, get
from tgstream import NDJSON, JSONArray, Report, Stream, stream
from tgstream.formats.json_encoder import Encoder, to_document

often = settings(deadline=None, database=None, max_examples=100)

# Values.


class Colour(enum.Enum):
    RED = "red"
    DAY = datetime.date(2026, 1, 2)
    MANY = (1, "x")


class Word(str, enum.Enum):
    A = "a\u2028"


class Level(enum.IntEnum):
    LOW = -1


class Bad(enum.Enum):
    NAN = math.nan


class Custom(enum.Enum):
    """The way in which TG applications put an Enum into JSON."""

    YES = 1

    def __json__(self) -> str:
        return self.name.lower()


class Text(str):
    pass


class Whole(int):
    pass


class Float(float):
    pass


class List(list[Any]):
    pass


class Dict(dict[str, Any]):
    pass


class CustomFloat(float):
    def __json__(self) -> str:
        return "never called for a number"


class CustomList(list[Any]):
    def __json__(self) -> str:
        return "never called for a list"


Point = namedtuple("Point", "x y")


class CustomPoint(namedtuple("CustomPoint", "x y")):
    def __json__(self) -> dict[str, Any]:
        return {"custom": self.x}


@dataclass(slots=True)
class Spot:
    x: Any
    y: Any = None


@dataclass
class CustomSpot:
    x: Any

    def __json__(self) -> dict[str, Any]:
        return {"custom": self.x}


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __json__(self) -> Any:
        return self.value

    def __repr__(self) -> str:  # the name of a test: without an address
        return f"Thing({self.value!r})"


offsets = st.timedeltas(
    datetime.timedelta(hours=-23), datetime.timedelta(hours=23)
).map(lambda delta: datetime.timezone(datetime.timedelta(seconds=delta.seconds)))
zones = st.one_of(st.none(), st.just(datetime.timezone.utc), offsets)
keys = st.one_of(st.text(max_size=4), st.integers(), st.booleans(), st.none())
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([-0.0, 1e308, 5e-324, 1e16, 1e22, 2**63, 2**64 - 1, 2**64]),
    st.text(max_size=5),
    st.text(st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010), max_size=3),
    st.text(st.characters(max_codepoint=0x20), max_size=3),
    st.datetimes(timezones=zones),
    st.datetimes(max_value=datetime.datetime(1000, 1, 1)),
    st.dates(),
    st.times(timezones=zones),
    st.decimals(-(10**20), 10**20, allow_nan=False),
    st.uuids(),
    st.sampled_from([*Colour, *Word, *Level, *Custom]),
    st.builds(Text, st.text(max_size=3)),
    st.builds(Whole, st.integers()),
    st.builds(Float, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(CustomFloat, st.just(1.5)),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(List),
        st.lists(inner, max_size=3).map(CustomList),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(Dict),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(MappingProxyType),
        st.builds(Bunch, a=inner),
        st.builds(MultiDict, st.lists(st.tuples(st.sampled_from("ab"), inner))),
        st.builds(Point, inner, inner),
        st.builds(CustomPoint, inner, inner),
        st.builds(Spot, inner, inner),
        st.builds(CustomSpot, inner),
        st.builds(Thing, inner),
    ),
    max_leaves=8,
)


def encoder_with_orjson() -> Encoder:
    encoder = Encoder()
    assert encoder.uses_orjson
    return encoder


def encoder_without_orjson() -> Encoder:
    """The encoder as it is when orjson is not installed."""
    encoder = Encoder()
    encoder.uses_orjson = False
    return encoder


ENCODERS: list[Callable[[], Encoder]] = [encoder_with_orjson, encoder_without_orjson]
both = pytest.mark.parametrize("make_encoder", ENCODERS)


def are_same(one: Any, other: Any) -> bool:
    """Compare values, their types, the signs of zeros and the order of keys."""
    return repr(one) == repr(other)


@often
@given(values)
def test_json_documents_of_both_encoders_are_equal(value: Any) -> None:
    """They are also equal to those of TG's own encoder, if it supports the value."""
    document = json.loads(encoder_with_orjson().encode(value, 1))
    assert are_same(document, json.loads(encoder_without_orjson().encode(value, 1)))
    try:
        expected = JSONEncoder().encode(value)
    except TypeError:
        return
    assert are_same(document, json.loads(expected))


@often
@given(st.lists(st.one_of(st.builds(Point, values, values), values), max_size=8))
def test_json_batches_are_the_same_bytes_as_items(items: list[Any]) -> None:
    """A batch is encoded at once, which does not change its bytes."""
    for format in (NDJSON(end=True), JSONArray()):
        expected = b"".join(format.encode(items))
        for size in (1, 3, 500):
            batches = Batches(items, ["x", "y"], size)
            assert b"".join(format.encode_batches(batches)) == expected


COLUMNS: list[Any] = [
    st.one_of(st.none(), st.integers(-(2**65), 2**65)),
    st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    st.one_of(st.none(), st.decimals(allow_nan=False, allow_infinity=False, places=2)),
    st.one_of(st.none(), st.datetimes(timezones=zones)),
    st.one_of(st.none(), st.datetimes()),
    st.one_of(st.none(), st.text(st.characters(), max_size=4)),
    st.one_of(st.booleans(), st.integers(0, 9), st.floats(0, 1)),
    st.one_of(st.none(), st.dates(), st.sampled_from([*Colour, *Custom])),
    st.one_of(st.none(), st.uuids(), st.builds(Spot, st.integers())),
]
Wide = namedtuple("Wide", "a b c d")


@settings(often, max_examples=120)
@given(
    st.lists(st.sampled_from(COLUMNS), min_size=4, max_size=4).flatmap(
        lambda columns: st.lists(st.builds(Wide, *columns), max_size=12)
    )
)
def test_json_columns_are_the_same_bytes_as_items(items: list[Any]) -> None:
    """Columns of plain values are encoded at once, and other values one by one."""
    for format in (NDJSON(end=True), JSONArray()):
        expected = b"".join(format.encode(items))
        batches = Batches(items, list(Wide._fields), 500)
        assert b"".join(format.encode_batches(batches)) == expected


def test_json_names_of_columns_are_escaped() -> None:
    """The label of a column may contain any character."""
    rows = sqlite_rows('SELECT 1 AS "a ""b"" \\", 2 AS "é\n" UNION SELECT 3, 4')
    batches = Batches(rows, rows[0]._fields, 500)
    output = b"".join(NDJSON().encode_batches(batches))
    assert output == b"".join(NDJSON().encode(rows))
    assert json.loads(output.splitlines()[0]) == {'a "b" \\': 1, "é\n": 2}


@pytest.mark.parametrize(
    ("items", "fields"),
    [
        ([{"id": 1}, {"id": 2}], ["id"]),
        ([(1, 2), (3, 4)], ["x", "y"]),
        ([b"ab", b"cd"], ["x", "y"]),
        (["ab", "cd"], ["x", "y"]),
        ([Point(1, 2), Point(3, 4)], ["y", "x"]),
        ([Point(1, 2), Point(3, 4)], ["x"]),
        ([Point(1, 2), Point(3, 4)], ["x", "x"]),
        ([CustomPoint(1, 2), CustomPoint(3, 4)], ["x", "y"]),
        ([Point(1, 2), CustomPoint(3, 4)], ["x", "y"]),
        ([Point(1, 2), None], ["x", "y"]),
        ([Spot(1, 2), Spot(3, 4)], ["x", "y"]),
        (sqlite_rows("SELECT 1 AS x, 2 AS y UNION SELECT 3, 4"), ["a", "b"]),
        (sqlite_rows("SELECT 1 AS x, 2 AS x UNION SELECT 3, 4"), ["x", "x"]),
    ],
)
def test_json_fields_of_a_source_do_not_change_the_documents(
    items: list[Any], fields: list[str]
) -> None:
    """A source may have other fields than its items, or in another order."""
    expected = outcome(lambda: NDJSON().encode(items))
    batches = Batches(items, fields, 500)
    assert outcome(lambda: NDJSON().encode_batches(batches)) == expected


class Raw(enum.Enum):
    BYTES = b"\xfb\xff"


ROUTER = ipaddress.ip_interface("10.0.0.1/24")


@both
@pytest.mark.parametrize(
    ("value", "document"),
    [
        (b"\xfb\xff", "+/8="),
        (bytearray(b""), ""),
        pytest.param(memoryview(b"\xfb\xff"), "+/8=", id="memoryview"),
        (Raw.BYTES, "+/8="),
        (datetime.timedelta(days=-1, seconds=1.5), "-1 day, 0:00:01.500000"),
        (ROUTER, "10.0.0.1/24"),
        (ROUTER.ip, "10.0.0.1"),
        (ROUTER.network, "10.0.0.0/24"),
        (deque([1, b"x"]), [1, "eA=="]),
        (Range(1, 10), "[1,10)"),
    ],
    ids=repr,
)
def test_json_value_has_the_text_of_csv(
    make_encoder: Callable[[], Encoder], value: Any, document: Any
) -> None:
    """At any depth: bytes are base64, and other values have the text of ``str``."""
    for item, expected in (
        (value, document),
        ({"a": [value]}, {"a": [document]}),
        (Spot(Thing(value)), {"x": document, "y": None}),
    ):
        assert json.loads(make_encoder().encode(item, 1)) == expected
    rows = [Point(1, value), Point(2, None)]
    output = b"".join(NDJSON().encode_batches(Batches(rows, ["x", "y"], 500)))
    assert output == b"".join(NDJSON().encode(rows))
    assert json.loads(output.splitlines()[0]) == {"x": 1, "y": document}


@pytest.mark.parametrize("item", [b"{}", bytearray(b"a,b"), memoryview(b"x")], ids=type)
def test_json_item_of_bytes_is_rejected(item: Any) -> None:
    """It is a document or a line of CSV by mistake. Only a value may be bytes."""
    for make in (NDJSON, lambda: NDJSON(convert={int: str}), JSONArray):
        for encode in (make().encode, make().encode_batches):
            output = outcome(lambda encode=encode: encode(Batches([1, item])))  # type: ignore[misc]
            assert "item 2 cannot be encoded as JSON: it is bytes. Convert it" in output


@pytest.mark.parametrize(
    ("item", "path"),
    [
        ({"raw": object()}, "raw"),
        ({"a": 1, "b": {"c": {"d": math.nan}}}, "b.c.d"),
        (Point(1, Spot(object())), "y.x"),
        (Spot(1, {"a": [1, object()]}), "y.a"),
        (MappingProxyType({"a": {1: object()}}), "a.1"),
    ],
    ids=["value", "nested", "row", "dataclass", "mapping"],
)
@both
def test_json_error_names_the_field(
    make_encoder: Callable[[], Encoder], item: Any, path: str
) -> None:
    """The names of nested fields are joined by points."""
    with pytest.raises((TypeError, ValueError), match=f'^item 4, field "{path}": '):
        make_encoder().encode(to_document(item), 4)


@both
@pytest.mark.parametrize(
    ("item", "document"),
    [
        (Point(1, [2]), {"x": 1, "y": [2]}),
        ([Point(1, 2)], [[1, 2]]),
        (CustomPoint(1, 2), {"custom": 1}),
        ([CustomPoint(1, 2)], [[1, 2]]),
        (Spot(Spot(1), CustomSpot(2)), {"x": {"x": 1, "y": None}, "y": {"custom": 2}}),
        (Custom.YES, "yes"),
        ([Word.A, Level.LOW, Colour.RED, Custom.YES], ["a\u2028", -1, "red", "yes"]),
        (Colour.DAY, "2026-01-02"),
        (Colour.MANY, [1, "x"]),
        (Thing(Thing(Custom.YES)), "yes"),
        (Thing({"e": Custom.YES}), {"e": "yes"}),
        (MultiDict([("a", 1), ("a", 2)]), {"a": [1, 2]}),
        (MappingProxyType({"a": Decimal("1.5")}), {"a": 1.5}),
        ({1: 1, None: 2, 1.5: 4}, {"1": 1, "null": 2, "1.5": 4}),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime.datetime(1, 2, 3, 4, 5, 6, 7), "0001-02-03 04:05:06.000007"),
        (datetime.time(1, 2, 3), "01:02:03"),
        ("\ud800é", "\ud800é"),
        (2**200, 2**200),
        (None, None),
        (sqlite_rows("SELECT 1 AS x, NULL AS y")[0], {"x": 1, "y": None}),
    ],
    ids=repr,
)
def test_json_document_of_an_item(
    make_encoder: Callable[[], Encoder], item: Any, document: Any
) -> None:
    """An item with names is an object, whose values are encoded with TG's rules."""
    assert are_same(json.loads(make_encoder().encode(to_document(item), 1)), document)


def late_enums() -> Iterator[tuple[str, Any]]:
    """Members of classes that got a ``__json__`` after a stream had started."""

    class Base(enum.Enum):
        """A class without members, so that it can be derived from."""

    base: Any = Base

    class Derived(base):
        A = 1

        def __json__(self) -> str:
            return "derived"

    class Changed(enum.Enum):
        A = 1

    encoder_with_orjson().encode(Changed.A, 1)
    Changed.__json__ = lambda self: "changed"  # type: ignore[attr-defined]

    class Level(enum.IntEnum):
        A = 1

        def __json__(self) -> str:
            return "never called for a number"

    class Flag(enum.Flag):
        A = 1

        def __json__(self) -> str:
            return "flag"

    yield from (("derived", Derived.A), ("changed", Changed.A), ("flag", Flag.A))
    yield "number", Level.A


@pytest.mark.parametrize("which", ["derived", "changed", "flag", "number"])
def test_json_enum_is_encoded_as_tgs_encoder_does_it_whenever_it_was_defined(
    which: str,
) -> None:
    """A class may be defined, or get a ``__json__``, while a stream runs."""
    encoder = encoder_with_orjson()
    member = dict(late_enums())[which]

    class Holder(enum.Enum):
        A = (member, 1)

    for value in (
        member,
        [member],
        {"a": member},
        {"a": {"b": [(1, member)]}},
        {"a": Thing([member])},
        List([member]),
        Dict(a=member),
    ):
        expected = json.loads(JSONEncoder().encode({"v": value}))["v"]
        assert json.loads(encoder.encode(value, 1)) == expected
        rows = [Point(1, value), Point(None, 2.5)]
        output = b"".join(JSONArray().encode_batches(Batches(rows, ["x", "y"], 500)))
        assert output == b"".join(JSONArray().encode(rows))
        assert json.loads(output)[0]["y"] == expected
    as_value = json.loads(encoder.encode({"a": Holder.A}, 1))["a"]
    assert as_value == [json.loads(encoder_without_orjson().encode(member, 1)), 1]
    if which == "number":
        assert json.loads(encoder.encode({member: 1}, 1)) == {"1": 1}
    else:
        with pytest.raises(TypeError, match="keys must be str"):
            encoder.encode({member: 1}, 1)


@both
@pytest.mark.parametrize("beside", [1, 2**70, "\ud800", Custom.YES, {1: 1}], ids=repr)
def test_json_generator_is_iterated_once(
    make_encoder: Callable[[], Encoder], beside: Any
) -> None:
    """Its items are in the document, also if a second attempt is necessary."""
    value = {"g": (n for n in [1, 2]), "b": beside}
    assert json.loads(make_encoder().encode(value, 1))["g"] == [1, 2]
    rows = [Point((n for n in [k]), beside) for k in range(3)]
    output = b"".join(JSONArray().encode_batches(Batches(rows, ["x", "y"], 500)))
    assert [document["x"] for document in json.loads(output)] == [[0], [1], [2]]


@pytest.mark.parametrize("failure", [ValueError, TypeError, LookupError])
def test_json_generator_that_fails_is_an_error(failure: type[Exception]) -> None:
    """The items before the failure are not written as if they were the whole list."""

    def fails() -> Iterator[int]:
        yield 1
        raise failure("broken")

    for make_encoder in ENCODERS:
        with pytest.raises(failure, match="broken"):
            make_encoder().encode([fails()], 1)
    rows = [Point(1, 2), Point(fails(), 2)]
    with pytest.raises(failure, match="broken"):
        list(NDJSON().encode_batches(Batches(rows, ["x", "y"], 500)))


def test_json_value_that_fails_is_encoded_once() -> None:
    """A second attempt could succeed with half the data, or hide the reason."""
    calls = []

    class Fails:
        def __json__(self) -> None:
            calls.append(1)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        encoder_with_orjson().encode({"a": Fails()}, 1)
    assert calls == [1]


# Values that JSON does not support.

FIELD = ', field "[a-z.]+": the value'
NANS: list[Any] = [
    math.nan,
    math.inf,
    [-math.inf],
    {"a": {"b": [math.nan, None]}},
    (1, (math.nan,)),
    Decimal("NaN"),
    Decimal("Infinity"),
    Decimal("1e400"),
    {"a": [Decimal("-Infinity")]},
    {math.nan: 1},
    Float("nan"),
    Thing(math.nan),
    Thing({"a": (math.inf,)}),
    Spot([math.nan]),
    Point(None, math.nan),
    MappingProxyType({"a": math.nan}),
    MultiDict(a=math.nan),
    Bad.NAN,
    {"g": MappingProxyType({"a": [math.nan]})},
]


@pytest.mark.parametrize("value", NANS, ids=repr)
def test_json_nan_and_infinity_are_rejected(value: Any) -> None:
    """The error has the number of the item, and the field if there is one."""
    expected = f"item 3({FIELD})? contains NaN or Infinity, which JSON does not support"
    for make_encoder in ENCODERS:
        with pytest.raises(ValueError, match=expected):
            make_encoder().encode(value, 3)
    items = [Point(1, None), Point(2, None), Point(3, value), Point(4, math.nan)]
    for format in (NDJSON(), JSONArray()):
        with pytest.raises(ValueError, match=expected):
            list(format.encode(items))
        for size in (2, 500):
            with pytest.raises(ValueError, match=expected):
                list(format.encode_batches(Batches(items, ["x", "y"], size)))


def test_json_error_names_the_first_invalid_item() -> None:
    """An earlier column may be invalid in a later row."""
    items = [Point(1, 2.0), Point(1, math.nan), Point(object(), 2.0)]
    with pytest.raises(ValueError, match='item 2, field "y": the value contains NaN'):
        list(NDJSON().encode_batches(Batches(items, ["x", "y"], 500)))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        pytest.param(object(), TypeError, "not JSON serializable", id="object"),
        ({1, 2}, TypeError, "not JSON serializable"),
        ({(1, 2): 3}, TypeError, "keys must be str"),
        ({Colour.RED: 3}, TypeError, "keys must be str"),
        (Spot, TypeError, "not JSON serializable"),
        (Point, TypeError, "not JSON serializable"),
        (Decimal("sNaN"), ValueError, "signaling NaN"),
    ],
    ids=repr,
)
def test_json_unsupported_value_is_rejected(
    value: Any, error: type[Exception], message: str
) -> None:
    """The error has the number of the item and the message of the encoder."""
    expected = (
        f"item 2({FIELD})? cannot be encoded as JSON: .*{message}.*. Convert it to"
    )
    for make_encoder in ENCODERS:
        with pytest.raises(error, match=expected):
            make_encoder().encode([value], 2)
    rows = [Point(1, None), Point(1, value)]
    with pytest.raises(error, match=expected):
        list(NDJSON().encode_batches(Batches(rows, ["x", "y"], 500)))


@both
def test_json_value_that_contains_itself_is_rejected(
    make_encoder: Callable[[], Encoder],
) -> None:
    """It may do so directly or by ``__json__``, or be nested too deeply."""
    loop: list[Any] = []
    loop.append(loop)
    thing = Thing(None)
    thing.value = [thing]
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, thing, deep):
        with pytest.raises(ValueError, match="item 1 cannot be encoded as JSON"):
            make_encoder().encode(value, 1)
    while deep:  # to free it without recursion
        deep = deep.pop()


# Mapped objects of SQLAlchemy.


@pytest.fixture
def session() -> Iterator[Session]:
    """A session with a user who has two notes."""
    engine = sa.create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        notes = [Note(id=1, text="a"), Note(id=2, text="b")]
        session.add(User(id=7, name="ada", notes=notes))
        session.commit()
        session.expunge_all()
        yield session
    engine.dispose()


@both
def test_json_mapped_object_is_encoded_as_tgs_encoder_does_it(
    session: Session, make_encoder: Callable[[], Encoder]
) -> None:
    """The document has its columns and the relationships that are loaded."""
    user = session.query(User).one()
    note = session.query(Note).options(selectinload(Note.user)).first()
    for value in (user, note, {"nested": [user]}):
        document = json.loads(make_encoder().encode(value, 1))
        assert document == json.loads(JSONEncoder().encode(value))
    document = json.loads(make_encoder().encode(user, 1))
    assert document == {"id": 7, "name": "ada"}


@both
def test_json_expired_object_is_loaded(
    session: Session, make_encoder: Callable[[], Encoder]
) -> None:
    """TG's encoder would omit the attributes that a commit has expired."""
    user = session.query(User).one()
    session.commit()
    assert json.loads(make_encoder().encode(user, 1)) == {"id": 7, "name": "ada"}


@both
def test_json_columns_that_a_query_did_not_load_are_omitted(
    session: Session, make_encoder: Callable[[], Encoder]
) -> None:
    """They are neither loaded nor sent."""
    user = session.query(User).options(load_only(User.id, raiseload=True)).one()
    assert json.loads(make_encoder().encode(user, 1)) == {"id": 7}


@pytest.mark.parametrize("source", [list, iter])
def test_json_row_of_one_entity_is_encoded_as_the_entity(
    session: Session, source: Callable[[Any], Any]
) -> None:
    """``execute(select(User))`` gives the same as ``scalars()``.

    An entity beside other columns is an object within the row's object.
    """
    rows: list[Any] = [*session.execute(sa.select(User))]
    expected = [{"id": 7, "name": "ada"}]
    assert json.loads(b"".join(JSONArray().encode(source(rows)))) == expected
    batches = Batches(rows * 2, ["User"], 500)
    assert json.loads(b"".join(JSONArray().encode_batches(batches))) == expected * 2
    pairs = session.execute(sa.select(User, Note.id).join(Note)).all()
    assert json.loads(b"".join(JSONArray().encode(source(pairs)))) == [
        {"User": expected[0], "id": 1},
        {"User": expected[0], "id": 2},
    ]


@both
def test_json_pydantic_or_attrs_object_is_encoded_as_its_fields(
    make_encoder: Callable[[], Encoder],
) -> None:
    """It may be within another value."""
    for model in (Model, OldModel, Plain):
        document = json.loads(make_encoder().encode([model(id=1, name="é")], 1))
        twice = {"twice": 2} if model is Model else {}
        assert document == [{"id": 1, "name": "é", **twice}]


def test_json_rows_are_objects_one_by_one_and_in_batches(session: Session) -> None:
    """The keys of a ``Row`` and of a ``RowMapping`` are the labels of the statement."""
    statement = sa.select(Note.id, Note.text.label("t")).order_by(Note.id)
    expected = b'{"id":1,"t":"a"}\n{"id":2,"t":"b"}\n'
    rows = session.execute(statement).all()
    mappings = session.execute(statement).mappings().all()
    for items in (rows, mappings):
        assert b"".join(NDJSON().encode(items)) == expected
        batches = Batches(items, ["id", "t"])
        assert b"".join(NDJSON().encode_batches(batches)) == expected


# The application's configuration.


@pytest.fixture
def default_encoder() -> Iterator[Any]:
    """TG's encoder, whose configuration is reset after the test."""
    encoder = tg.jsonify._default_encoder
    yield encoder
    encoder._registered_types_map.clear()
    encoder._registered_types_list = ()
    encoder._isodates = False


def get_ndjson(make_app: MakeApp, items: Any, **config: Any) -> list[Any]:
    """The documents that an application with this configuration streams."""

    class RootController(TGController):
        @expose()
        def index(self) -> Stream:
            return Stream(items, NDJSON)

    call = get(make_app(RootController(), **config))
    assert call.status.startswith("200"), call.errors.getvalue()
    return [json.loads(line) for line in call.text.splitlines()]


MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("value", [MOMENT, MOMENT.date(), MOMENT.time()], ids=repr)
@pytest.mark.parametrize("on", [True, False])
def test_json_dates_follow_the_option_json_isodates(
    make_app: MakeApp, default_encoder: Any, value: Any, on: bool
) -> None:
    """The option applies to items and to batches."""
    items = [Point(1, value), Point(2, None)]
    batches = Batches(items, ["x", "y"], 500)
    for source in (iter(items), items, batches):
        documents = get_ndjson(make_app, source, json__isodates=on)
        expected = json.loads(default_encoder.encode({"y": value}))["y"]
        assert documents == [{"x": 1, "y": expected}, {"x": 2, "y": None}]
        assert ("T" in expected) == (on and value is MOMENT)


@pytest.mark.parametrize(
    ("cls", "value"),
    [
        (uuid.UUID, uuid.UUID(int=1)),
        (Colour, Colour.RED),
        (enum.Enum, Level.LOW),
        (Decimal, Decimal("NaN")),
        (datetime.datetime, MOMENT),
        (Spot, Spot(1)),
        (object, Colour.DAY),
        (object, [Thing(1), (1, b"x")]),
        (str, "never called for a str"),
    ],
)
def test_json_custom_encoders_are_used_first(
    make_app: MakeApp, default_encoder: Any, cls: type, value: Any
) -> None:
    """The encoders of ``json.custom_encoders`` apply to items and to batches."""
    custom = {cls: lambda value: f"custom {type(value).__name__}"}
    items = [Point(1, value), Point(2, None)]
    batches = Batches(items, ["x", "y"], 500)
    for source in (iter(items), batches):
        documents = get_ndjson(make_app, source, json__custom_encoders=custom)
        expected = json.loads(default_encoder.encode({"y": value}))["y"]
        assert documents == [{"x": 1, "y": expected}, {"x": 2, "y": None}]


# Other readers.

READABLE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**53), 2**53),
        st.floats(-1e6, 1e6),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text('ab\0"\\é\n'), inner)
    ),
    max_leaves=8,
)


@settings(often, max_examples=60)
@given(st.lists(READABLE, max_size=6))
def test_json_is_read_by_json_orjson_and_jq(items: list[Any]) -> None:
    """They read the same values."""
    array = b"".join(JSONArray().encode(items))
    lines = b"".join(NDJSON(end=True).encode(items))
    end = {"end": True, "items": len(items)}
    assert json.loads(array) == orjson.loads(array) == items
    assert [*map(orjson.loads, lines.split(b"\n")[:-1])] == [*items, end]
    assert jq.compile(".").input_text(array.decode()).first() == items
    assert jq.compile(".").input_text(lines.decode()).all() == [*items, end]


@pytest.mark.parametrize("in_batches", [True, False])
@pytest.mark.parametrize("format", [NDJSON, JSONArray])
def test_json_is_read_by_duckdb(
    make_app: MakeApp, tmp_path: Path, format: Any, in_batches: bool
) -> None:
    """Without options, DuckDB reads names, numbers, texts and dates."""
    Record = namedtuple("Record", "id name moment amount maybe")
    rows = [
        Record(n, f'"n"\n{n}\u2028é', MOMENT, n / 4, None if n % 2 else True)
        for n in range(3000)
    ]

    class RootController(TGController):
        @expose()
        def index(self) -> Stream:
            items = Batches(rows, Record._fields, 500) if in_batches else iter(rows)
            return Stream(items, format)

    path = tmp_path / "rows.json"
    path.write_bytes(Call(make_app(RootController())).read())
    names, read = query_duckdb(f"SELECT * FROM read_json('{path}')")
    assert names == list(Record._fields)
    assert read == [tuple(row) for row in rows]


def test_json_without_orjson_is_equal(tmp_path: Path) -> None:
    """A process that cannot import orjson writes equal documents, also in batches."""
    program = """if True:
        import sys
        sys.modules["orjson"] = None
        import collections, json
        import tg, tgstream
        P = collections.namedtuple("P", "x y")
        class Source(list):
            fields = ["x", "y"]
            def batches(self):
                yield self[:]
        for y in ("é", 2**70, 1.5, tgstream.NDJSON.content_type, None):
            source = Source([P(1, y), P(2, y)])
            output = b"".join(tgstream.NDJSON().encode_batches(source))
            assert output == b"".join(tgstream.NDJSON().encode(source))
            assert [*map(json.loads, output.splitlines())] == [
                {"x": 1, "y": y}, {"x": 2, "y": y}
            ]
        try:
            list(tgstream.JSONArray().encode_batches(Source([P(float("nan"), 1)] * 2)))
        except ValueError as error:
            print(error)
    """
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert (process.stderr, process.stdout[:19]) == ("", 'item 1, field "x": ')


# In a response.


def test_json_format_is_given_as_class_or_object(make_app: MakeApp) -> None:
    """The decorator and ``Stream`` accept both."""

    class RootController(TGController):
        @expose()
        @stream(NDJSON)
        def by_class(self) -> Iterator[Any]:
            yield Point(1, "é")

        @stream(NDJSON(end=False))
        @expose("json")
        def by_object(self) -> list[Any]:
            return [Point(1, "é")]

        @expose()
        def by_helper(self) -> Stream:
            return Stream(iter([Point(1, "é")]), NDJSON)

        @expose()
        @stream(JSONArray)
        def array(self) -> list[Any]:
            return [Point(1, "é"), 2]

    app = make_app(RootController())
    for name in ("by_class", "by_object", "by_helper"):
        call = get(app, f"/{name}")
        assert call.text == '{"x":1,"y":"é"}\n'
        assert call.headers["Content-Type"] == "application/x-ndjson"
    call = get(app, "/array")
    assert call.text == '[{"x":1,"y":"é"},2]'
    assert call.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("format", [NDJSON, JSONArray])
@pytest.mark.parametrize("of_items", [list, iter])
def test_json_is_utf8_whatever_charset_is_set(
    make_app: MakeApp, format: Any, of_items: Callable[[Any], Any]
) -> None:
    """The option, ``@expose`` and the response may set another charset.

    The header does not name it.
    """

    class RootController(TGController):
        @expose()
        @stream(format, charset="latin-1")
        def option(self) -> Any:
            return of_items(["é"])

        @expose(content_type="text/json; charset=latin-1")
        @stream(format)
        def exposed(self) -> Any:
            return of_items(["é"])

        @expose()
        @stream(format)
        def chosen(self) -> Any:
            tg.response.content_type = "text/x-json"
            tg.response.charset = "latin-1"
            return of_items(["é"])

    app = make_app(RootController())
    for name in ("option", "exposed", "chosen"):
        call = get(app, f"/{name}")
        assert '"é"' in call.text
        header = call.headers["Content-Type"].lower()
        assert "latin" not in header and header.partition("charset=")[2] in (
            "",
            "utf-8",
        )


def test_json_content_type_of_the_controller_replaces_that_of_the_format(
    make_app: MakeApp,
) -> None:
    """``tg.response`` comes before ``@expose``, and ``@expose`` before the format."""

    class RootController(TGController):
        @expose(content_type="application/geo+json")
        @stream(NDJSON)
        def exposed(self) -> list[int]:
            return [1]

        @expose(content_type="application/geo+json")
        @stream(NDJSON)
        def chosen(self) -> list[int]:
            tg.response.content_type = "application/x-mine"
            return [1]

    app = make_app(RootController())
    assert get(app, "/exposed").headers["Content-Type"] == "application/geo+json"
    assert get(app, "/chosen").headers["Content-Type"] == "application/x-mine"


@pytest.mark.parametrize(
    ("format", "items", "body"),
    [
        (JSONArray, [], "[]"),
        (NDJSON, [], ""),
        (NDJSON(end=True), [], '{"end":true,"items":0}\n'),
        (NDJSON(end=True), [1, 2], '1\n2\n{"end":true,"items":2}\n'),
        (JSONArray, [None], "[null]"),
        (JSONArray, [[]], "[[]]"),
    ],
)
def test_json_end_of_a_complete_stream(
    make_app: MakeApp, format: Any, items: list[Any], body: str
) -> None:
    """The end is the same for a list, an iterator and batches."""

    class RootController(TGController):
        @expose()
        def index(self, of: str) -> Stream:
            sources = {"list": items, "iter": iter(items), "batch": Batches(items, [])}
            return Stream(sources[of], format)

    app = make_app(RootController())
    for of in ("list", "iter", "batch"):
        assert get(app, f"/?of={of}").text == body


def test_ndjson_failure_is_a_line_of_json() -> None:
    """It has the incident. Without ``end`` there is no line."""
    line = NDJSON(end=True).encode_failure("1f")
    assert line.endswith(b"\n")
    assert json.loads(line) == {"end": False, "incident": "1f"}
    assert NDJSON().encode_failure("1f") == b""


def test_json_items_may_be_arrays(make_app: MakeApp) -> None:
    """TG's own encoder rejects a list at the top level of a document."""
    with pytest.raises(JsonEncodeError):
        tg.json_encode([1])
    assert get_ndjson(make_app, [[1], 2]) == [[1], 2]


def test_json_error_in_the_first_batch_is_an_ordinary_error_response(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """The error has the number of the item, not of the batch."""

    class RootController(TGController):
        @expose()
        @stream(NDJSON)
        def index(self) -> Sequence[Any]:
            return [1, 2, math.nan]

    call = get(make_app(RootController()))
    assert call.status.startswith("500")
    assert "item 3 contains NaN" in call.errors.getvalue()
    assert [report.reason for report in reports] == ["failed"]
