"""NDJSON and JSONArray: documents as TG's encoder has them, by orjson or without."""

from __future__ import annotations

import datetime
import enum
import json
import math
import subprocess
import sys
import uuid
from collections import OrderedDict, namedtuple
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
from sqlalchemy.orm import Session, load_only, selectinload
from tg import TGController, expose
from tg.jsonify import JsonEncodeError, JSONEncoder
from tg.util import Bunch
from webob.multidict import MultiDict

from tests.conftest import MakeApp
from tests.formats.test_csv import Batches, Model, OldModel, Plain, duck
from tests.model import Base, Note, User
from tests.wsgi import Call, get
from tgstream import NDJSON, JSONArray, Report, Stream, stream
from tgstream.formats.json_encoder import Encoder
from tgstream.formats.json_encoder import document as document_of

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


class Told(enum.Enum):
    """What a TG application does to have an Enum in its JSON."""

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


class ToldFloat(float):
    def __json__(self) -> str:
        return "never asked: it is a number"


class ToldList(list[Any]):
    def __json__(self) -> str:
        return "never asked: it is a list"


Point = namedtuple("Point", "x y")


class ToldPoint(namedtuple("ToldPoint", "x y")):
    def __json__(self) -> dict[str, Any]:
        return {"told": self.x}


@dataclass(slots=True)
class Spot:
    x: Any
    y: Any = None


@dataclass
class ToldSpot:
    x: Any

    def __json__(self) -> dict[str, Any]:
        return {"told": self.x}


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __json__(self) -> Any:
        return self.value

    def __repr__(self) -> str:  # names a test: no address in it
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
    st.sampled_from([*Colour, *Word, *Level, *Told]),
    st.builds(Text, st.text(max_size=3)),
    st.builds(Whole, st.integers()),
    st.builds(Float, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(ToldFloat, st.just(1.5)),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(List),
        st.lists(inner, max_size=3).map(ToldList),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(Dict),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(MappingProxyType),
        st.builds(Bunch, a=inner),
        st.builds(MultiDict, st.lists(st.tuples(st.sampled_from("ab"), inner))),
        st.builds(Point, inner, inner),
        st.builds(ToldPoint, inner, inner),
        st.builds(Spot, inner, inner),
        st.builds(ToldSpot, inner),
        st.builds(Thing, inner),
    ),
    max_leaves=8,
)


def quick_encoder() -> Encoder:
    encoder = Encoder()
    assert encoder.quick
    return encoder


def slow_encoder() -> Encoder:
    """As it is where orjson is not installed."""
    encoder = Encoder()
    encoder.quick = False
    return encoder


ENCODERS: list[Callable[[], Encoder]] = [quick_encoder, slow_encoder]
both = pytest.mark.parametrize("make_encoder", ENCODERS)


def same(one: Any, other: Any) -> bool:
    """Equal, of equal types, with the sign of a zero and the order of keys."""
    return repr(one) == repr(other)


@often
@given(values)
def test_orjson_and_json_parse_to_equal_documents(value: Any) -> None:
    """Whatever the value; and what TG's own encoder can do, it decides."""
    quick = json.loads(quick_encoder().encode(value, 1))
    assert same(quick, json.loads(slow_encoder().encode(value, 1)))
    try:
        expected = JSONEncoder().encode(value)
    except TypeError:
        return
    assert same(quick, json.loads(expected))


@often
@given(st.lists(st.one_of(st.builds(Point, values, values), values), max_size=8))
def test_batches_are_the_items_to_the_byte(items: list[Any]) -> None:
    """A batch is encoded at once, and nothing shows it."""
    for format in (NDJSON(end=True), JSONArray()):
        made = b"".join(format.encode(items))
        for size in (1, 3, 500):
            batches = Batches(items, ["x", "y"], size)
            assert b"".join(format.encode_batches(batches)) == made


COLUMNS: list[Any] = [
    st.one_of(st.none(), st.integers(-(2**65), 2**65)),
    st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    st.one_of(st.none(), st.decimals(allow_nan=False, allow_infinity=False, places=2)),
    st.one_of(st.none(), st.datetimes(timezones=zones)),
    st.one_of(st.none(), st.datetimes()),
    st.one_of(st.none(), st.text(st.characters(), max_size=4)),
    st.one_of(st.booleans(), st.integers(0, 9), st.floats(0, 1)),
    st.one_of(st.none(), st.dates(), st.sampled_from([*Colour, *Told])),
    st.one_of(st.none(), st.uuids(), st.builds(Spot, st.integers())),
]
Wide = namedtuple("Wide", "a b c d")


@settings(often, max_examples=120)
@given(
    st.lists(st.sampled_from(COLUMNS), min_size=4, max_size=4).flatmap(
        lambda columns: st.lists(st.builds(Wide, *columns), max_size=12)
    )
)
def test_columns_of_a_batch_are_the_items_to_the_byte(items: list[Any]) -> None:
    """Columns of one kind are made at once, and what does not fit is found."""
    for format in (NDJSON(end=True), JSONArray()):
        made = b"".join(format.encode(items))
        batches = Batches(items, list(Wide._fields), 500)
        assert b"".join(format.encode_batches(batches)) == made


def sqlite_rows(statement: str) -> tuple[list[Any], list[str]]:
    engine = sa.create_engine("sqlite://", poolclass=sa.NullPool)
    with engine.connect() as connection:
        result = connection.execute(sa.text(statement))
        return list(result), list(result.keys())


def test_names_of_columns_are_quoted() -> None:
    """Labels may hold anything, and are objects' keys all the same."""
    rows, fields = sqlite_rows('SELECT 1 AS "a ""b"" \\", 2 AS "é\n" UNION SELECT 3, 4')
    made = b"".join(NDJSON().encode_batches(Batches(rows, fields, 500)))
    assert made == b"".join(NDJSON().encode(rows))
    assert json.loads(made.splitlines()[0]) == {'a "b" \\': 1, "é\n": 2}


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
        ([ToldPoint(1, 2), ToldPoint(3, 4)], ["x", "y"]),
        ([Point(1, 2), ToldPoint(3, 4)], ["x", "y"]),
        ([Point(1, 2), None], ["x", "y"]),
        ([Spot(1, 2), Spot(3, 4)], ["x", "y"]),
        (sqlite_rows("SELECT 1 AS x, 2 AS y UNION SELECT 3, 4")[0], ["a", "b"]),
        (sqlite_rows("SELECT 1 AS x, 2 AS x UNION SELECT 3, 4")[0], ["x", "x"]),
    ],
)
def test_fields_of_a_source_make_no_other_documents(
    items: list[Any], fields: list[str]
) -> None:
    """A source may name fields that its items do not have in that order."""

    def outcome(pieces: Callable[[], Iterator[bytes]]) -> Any:
        try:
            return b"".join(pieces())
        except (TypeError, ValueError) as error:
            return repr(error)

    made = outcome(lambda: NDJSON().encode(items))
    batches = Batches(items, fields, 500)
    assert outcome(lambda: NDJSON().encode_batches(batches)) == made


@both
@pytest.mark.parametrize(
    ("item", "document"),
    [
        (Point(1, [2]), {"x": 1, "y": [2]}),
        ([Point(1, 2)], [[1, 2]]),
        (ToldPoint(1, 2), {"told": 1}),
        ([ToldPoint(1, 2)], [[1, 2]]),
        (Spot(Spot(1), ToldSpot(2)), {"x": {"x": 1, "y": None}, "y": {"told": 2}}),
        (Told.YES, "yes"),
        ([Word.A, Level.LOW, Colour.RED, Told.YES], ["a\u2028", -1, "red", "yes"]),
        (Colour.DAY, "2026-01-02"),
        (Colour.MANY, [1, "x"]),
        (Thing(Thing(Told.YES)), "yes"),
        (Thing({"e": Told.YES}), {"e": "yes"}),
        (MultiDict([("a", 1), ("a", 2)]), {"a": [1, 2]}),
        (MappingProxyType({"a": Decimal("1.5")}), {"a": 1.5}),
        ({1: 1, None: 2, 1.5: 4}, {"1": 1, "null": 2, "1.5": 4}),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime.datetime(1, 2, 3, 4, 5, 6, 7), "0001-02-03 04:05:06.000007"),
        (datetime.time(1, 2, 3), "01:02:03"),
        ("\ud800é", "\ud800é"),
        (2**200, 2**200),
        (None, None),
        (sqlite_rows("SELECT 1 AS x, NULL AS y")[0][0], {"x": 1, "y": None}),
    ],
    ids=repr,
)
def test_documents(
    make_encoder: Callable[[], Encoder], item: Any, document: Any
) -> None:
    """An item with names is an object; in it, TG's rules."""
    assert same(json.loads(make_encoder().encode(document_of(item), 1)), document)


def later_enums() -> Iterator[tuple[str, Any]]:
    """Members of classes that came to have a ``__json__`` after a stream had begun."""

    class Base(enum.Enum):
        """A class without members, so that it can be derived from."""

    base: Any = Base

    class Derived(base):
        A = 1

        def __json__(self) -> str:
            return "derived"

    class Changed(enum.Enum):
        A = 1

    quick_encoder().encode(Changed.A, 1)
    Changed.__json__ = lambda self: "changed"  # type: ignore[attr-defined]

    class Level(enum.IntEnum):
        A = 1

        def __json__(self) -> str:
            return "never asked: it is a number"

    class Flag(enum.Flag):
        A = 1

        def __json__(self) -> str:
            return "flag"

    yield from (("derived", Derived.A), ("changed", Changed.A), ("flag", Flag.A))
    yield "number", Level.A


@pytest.mark.parametrize("which", ["derived", "changed", "flag", "number"])
def test_enum_is_what_tgs_encoder_makes_of_it_whenever_its_class_was_made(
    which: str,
) -> None:
    """A class may be made, or get a ``__json__``, while a stream runs."""
    encoder = quick_encoder()
    member = dict(later_enums())[which]

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
        made = b"".join(JSONArray().encode_batches(Batches(rows, ["x", "y"], 500)))
        assert made == b"".join(JSONArray().encode(rows))
        assert json.loads(made)[0]["y"] == expected
    as_value = json.loads(encoder.encode({"a": Holder.A}, 1))["a"]
    assert as_value == [json.loads(slow_encoder().encode(member, 1)), 1]
    if which == "number":
        assert json.loads(encoder.encode({member: 1}, 1)) == {"1": 1}
    else:
        with pytest.raises(TypeError, match="keys must be str"):
            encoder.encode({member: 1}, 1)


@both
@pytest.mark.parametrize("beside", [1, 2**70, "\ud800", Told.YES, {1: 1}], ids=repr)
def test_generator_is_asked_once(
    make_encoder: Callable[[], Encoder], beside: Any
) -> None:
    """What it yields is there, also where a second attempt has to be made."""
    value = {"g": (n for n in [1, 2]), "b": beside}
    assert json.loads(make_encoder().encode(value, 1))["g"] == [1, 2]
    rows = [Point((n for n in [k]), beside) for k in range(3)]
    made = b"".join(JSONArray().encode_batches(Batches(rows, ["x", "y"], 500)))
    assert [document["x"] for document in json.loads(made)] == [[0], [1], [2]]


@pytest.mark.parametrize("failure", [ValueError, TypeError, LookupError])
def test_generator_that_fails_is_not_cut_short(failure: type[Exception]) -> None:
    """What it yielded before is no whole list, in any path."""

    def fails() -> Iterator[int]:
        yield 1
        raise failure("broken")

    for make_encoder in ENCODERS:
        with pytest.raises(failure, match="broken"):
            make_encoder().encode([fails()], 1)
    rows = [Point(1, 2), Point(fails(), 2)]
    with pytest.raises(failure, match="broken"):
        list(NDJSON().encode_batches(Batches(rows, ["x", "y"], 500)))


def test_failure_of_a_value_is_raised_once() -> None:
    """What failed is not tried again: it may succeed by half, or hide the reason."""
    asked = []

    class Fails:
        def __json__(self) -> None:
            asked.append(1)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        quick_encoder().encode({"a": Fails()}, 1)
    assert asked == [1]


# What has no JSON.

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
def test_nan_and_infinity_are_refused(value: Any) -> None:
    """Wherever they are, with the item's number, in every path."""
    expected = r"item 3 holds NaN or Infinity, which JSON has not"
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


def test_first_item_that_fails_is_the_one_named() -> None:
    """Also where an earlier column fails in a later row, as columns come first."""
    items = [Point(1, 2.0), Point(1, math.nan), Point(object(), 2.0)]
    with pytest.raises(ValueError, match="item 2 holds NaN"):
        list(NDJSON().encode_batches(Batches(items, ["x", "y"], 500)))


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        pytest.param(object(), TypeError, "not JSON serializable", id="object"),
        (datetime.timedelta(1), TypeError, "not JSON serializable"),
        (b"bytes", TypeError, "not JSON serializable"),
        ({1, 2}, TypeError, "not JSON serializable"),
        ({(1, 2): 3}, TypeError, "keys must be str"),
        ({Colour.RED: 3}, TypeError, "keys must be str"),
        (Spot, TypeError, "not JSON serializable"),
        (Point, TypeError, "not JSON serializable"),
        (Decimal("sNaN"), ValueError, "signaling NaN"),
    ],
    ids=repr,
)
def test_value_without_json_is_named(
    value: Any, error: type[Exception], told: str
) -> None:
    """The number of the item, and what the encoder says."""
    for make_encoder in ENCODERS:
        with pytest.raises(error, match=f"item 2 cannot be JSON: .*{told}"):
            make_encoder().encode([value], 2)
    rows = [Point(1, None), Point(1, value)]
    with pytest.raises(error, match=f"item 2 cannot be JSON: .*{told}"):
        list(NDJSON().encode_batches(Batches(rows, ["x", "y"], 500)))


@both
def test_value_that_holds_itself_is_refused(
    make_encoder: Callable[[], Encoder],
) -> None:
    """Directly, by ``__json__``, or deeper than Python goes."""
    loop: list[Any] = []
    loop.append(loop)
    told = Thing(None)
    told.value = [told]
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, told, deep):
        with pytest.raises(ValueError, match="item 1 cannot be JSON"):
            make_encoder().encode(value, 1)
    while deep:  # not to be freed by recursion
        deep = deep.pop()


# Objects that SQLAlchemy maps.


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
def test_object_is_what_tg_makes_of_it(
    session: Session, make_encoder: Callable[[], Encoder]
) -> None:
    """Its columns, and the relationships that are loaded."""
    user = session.query(User).one()
    note = session.query(Note).options(selectinload(Note.user)).first()
    for value in (user, note, {"nested": [user]}):
        made = json.loads(make_encoder().encode(value, 1))
        assert made == json.loads(JSONEncoder().encode(value))
    plain = json.loads(make_encoder().encode(user, 1))
    assert plain == {"id": 7, "name": "ada"}


@both
def test_expired_object_is_loaded(
    session: Session, make_encoder: Callable[[], Encoder]
) -> None:
    """A commit expires, and what TG's encoder would overlook is there."""
    user = session.query(User).one()
    session.commit()
    assert json.loads(make_encoder().encode(user, 1)) == {"id": 7, "name": "ada"}


@both
def test_what_a_query_left_out_stays_out(
    session: Session, make_encoder: Callable[[], Encoder]
) -> None:
    """Columns that nobody loaded are neither loaded nor sent."""
    user = session.query(User).options(load_only(User.id, raiseload=True)).one()
    assert json.loads(make_encoder().encode(user, 1)) == {"id": 7}


@pytest.mark.parametrize("source", [list, iter])
def test_row_of_one_entity_is_its_columns(
    session: Session, source: Callable[[Any], Any]
) -> None:
    """``execute(select(User))`` is as good as ``scalars()``; among others it nests."""
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
def test_object_of_a_library_of_models_is_its_fields(
    make_encoder: Callable[[], Encoder],
) -> None:
    """With TG's rules for the values in it, also within another value."""
    for kind in (Model, OldModel, Plain):
        made = json.loads(make_encoder().encode([kind(id=1, name="é")], 1))
        twice = {"twice": 2} if kind is Model else {}
        assert made == [{"id": 1, "name": "é", **twice}]


def test_rows_are_objects_item_by_item_and_in_batches(session: Session) -> None:
    """A ``Row`` and a ``RowMapping`` have the labels of the statement."""
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
    """TG's encoder, whose configuration outlives an application."""
    encoder = tg.jsonify._default_encoder
    yield encoder
    encoder._registered_types_map.clear()
    encoder._registered_types_list = ()
    encoder._isodates = False


def ndjson_of(make_app: MakeApp, items: Any, **config: Any) -> list[Any]:
    """The documents that an application of this configuration streams."""

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
def test_dates_are_as_the_application_has_them(
    make_app: MakeApp, default_encoder: Any, value: Any, on: bool
) -> None:
    """``json.isodates`` holds for items and for batches."""
    items = [Point(1, value), Point(2, None)]
    batches = Batches(items, ["x", "y"], 500)
    for source in (iter(items), items, batches):
        made = ndjson_of(make_app, source, json__isodates=on)
        expected = json.loads(default_encoder.encode({"y": value}))["y"]
        assert made == [{"x": 1, "y": expected}, {"x": 2, "y": None}]
        assert ("T" in expected) == (on and value is MOMENT)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (uuid.UUID, uuid.UUID(int=1)),
        (Colour, Colour.RED),
        (enum.Enum, Level.LOW),
        (Decimal, Decimal("NaN")),
        (datetime.datetime, MOMENT),
        (Spot, Spot(1)),
        (object, Colour.DAY),
        (object, [Thing(1), (1, b"x")]),
        (str, "never asked"),
    ],
)
def test_custom_encoders_decide(
    make_app: MakeApp, default_encoder: Any, kind: type, value: Any
) -> None:
    """What the application registers in ``json.custom_encoders`` is used first."""
    custom = {kind: lambda value: f"custom {type(value).__name__}"}
    items = [Point(1, value), Point(2, None)]
    batches = Batches(items, ["x", "y"], 500)
    for source in (iter(items), batches):
        made = ndjson_of(make_app, source, json__custom_encoders=custom)
        expected = json.loads(default_encoder.encode({"y": value}))["y"]
        assert made == [{"x": 1, "y": expected}, {"x": 2, "y": None}]


# Other readers, of what a stream sent.

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
def test_other_readers_agree(items: list[Any]) -> None:
    """json, orjson and jq read the same values."""
    array = b"".join(JSONArray().encode(items))
    lines = b"".join(NDJSON(end=True).encode(items))
    end = {"end": True, "items": len(items)}
    assert json.loads(array) == orjson.loads(array) == items
    assert [*map(orjson.loads, lines.split(b"\n")[:-1])] == [*items, end]
    assert jq.compile(".").input_text(array.decode()).first() == items
    assert jq.compile(".").input_text(lines.decode()).all() == [*items, end]


@pytest.mark.parametrize("in_batches", [True, False])
@pytest.mark.parametrize("format", [NDJSON, JSONArray])
def test_duckdb_reads_the_stream(
    make_app: MakeApp, tmp_path: Path, format: Any, in_batches: bool
) -> None:
    """A reader that is told nothing finds names, numbers, texts and dates."""
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
    names, read = duck(f"SELECT * FROM read_json('{path}')")
    assert names == list(Record._fields)
    assert read == [tuple(row) for row in rows]


def test_without_orjson_all_is_the_same(tmp_path: Path) -> None:
    """A process that cannot import it makes equal documents, also in batches."""
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
            made = b"".join(tgstream.NDJSON().encode_batches(source))
            assert made == b"".join(tgstream.NDJSON().encode(source))
            assert [*map(json.loads, made.splitlines())] == [
                {"x": 1, "y": y}, {"x": 2, "y": y}
            ]
        try:
            list(tgstream.JSONArray().encode_batches(Source([P(float("nan"), 1)] * 2)))
        except ValueError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert (done.stderr, done.stdout[:23]) == ("", "item 1 holds NaN or Inf")


# As a response.


def test_every_way_to_name_the_format_is_the_same(make_app: MakeApp) -> None:
    """The class or an object, by the decorator or the helper."""

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
def test_json_is_utf8_whatever_was_asked(
    make_app: MakeApp, format: Any, of_items: Callable[[Any], Any]
) -> None:
    """The option, ``@expose`` and the response may name another; the header tells."""

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
        said = call.headers["Content-Type"].lower()
        assert "latin" not in said and said.partition("charset=")[2] in ("", "utf-8")


def test_content_type_is_what_was_set_nearest(make_app: MakeApp) -> None:
    """The response's before that of ``@expose`` before the format's."""

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
def test_endings(make_app: MakeApp, format: Any, items: list[Any], body: str) -> None:
    """A complete stream ends so, from a list, an iterator or batches."""

    class RootController(TGController):
        @expose()
        def index(self, of: str) -> Stream:
            sources = {"list": items, "iter": iter(items), "batch": Batches(items, [])}
            return Stream(sources[of], format)

    app = make_app(RootController())
    for of in ("list", "iter", "batch"):
        assert get(app, f"/?of={of}").text == body


def test_tgs_guard_of_arrays_is_not_asked(make_app: MakeApp) -> None:
    """TG refuses a list as a document of its own; a stream is asked for as one."""
    with pytest.raises(JsonEncodeError):
        tg.json_encode([1])
    assert ndjson_of(make_app, [[1], 2]) == [[1], 2]


def test_failure_in_a_batch_is_reported_with_its_item(
    make_app: MakeApp, reports: list[Report]
) -> None:
    """In the first batch it is an ordinary error."""

    class RootController(TGController):
        @expose()
        @stream(NDJSON)
        def index(self) -> Sequence[Any]:
            return [1, 2, math.nan]

    call = get(make_app(RootController()))
    assert call.status.startswith("500")
    assert "item 3 holds NaN" in call.errors.getvalue()
    assert [report.reason for report in reports] == ["failed"]
