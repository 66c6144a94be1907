"""The request's transaction ends before its stream starts, by TG's rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tg
import transaction
from tg import expose
from transaction.interfaces import TransientError

from tests.conftest import MakeApp, assert_clean
from tests.database.conftest import (
    Generator,
    ModelRoot,
    assert_thread_works,
    defer_unique_names,
    find_user,
)
from tests.model import Model, Note, User
from tests.wsgi import Call, get
from tgstream import Report, Stream


class WritingRoot(ModelRoot):
    """A controller that also writes before it returns its stream."""

    runs = 0
    doomed = False

    def __init__(self, model: Model, body: Generator, **options: Any) -> None:
        super().__init__(model, body, **options)
        expose(content_type="text/plain")(WritingRoot.index)

    def index(self) -> Stream:
        self.runs += 1
        self.model.DBSession.add(Note(text="body"))
        if self.doomed:
            transaction.doom()
        return super().index()


def test_request_changes_are_committed_before_the_first_item(
    make_app: MakeApp, model: Model
) -> None:
    """Nothing that the stream does can undo them."""

    def body() -> Iterator[str]:
        assert model.texts() == ["body"]
        transaction.abort()
        transaction.doom()
        raise ValueError("no")
        yield ""

    app = make_app(WritingRoot(model, body), model)
    assert get(app).status.startswith("500")
    assert model.texts() == ["body"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("how", ["doomed", "veto"])
def test_request_that_tg_would_abort_is_aborted(
    make_app: MakeApp, model: Model, how: str
) -> None:
    """If it is doomed or vetoed, its changes are gone, but not those of the stream."""

    def body() -> Iterator[str]:
        assert model.texts() == []
        model.DBSession.add(User(name="ada"))
        yield "one"

    root = WritingRoot(model, body)
    root.doomed = how == "doomed"
    options: dict[str, Any] = (
        {"tm.commit_veto": lambda *args: True} if how == "veto" else {}
    )
    app = make_app(root, model, **options)
    assert get(app).text == "one"
    assert model.texts() == []
    assert model.names() == ["ada"]
    assert_clean(model)


def test_request_is_not_run_again_for_an_error_of_the_stream(
    make_app: MakeApp, model: Model
) -> None:
    """Even with ``tm.attempts``, a retryable error of the first pull is raised."""

    def body() -> Iterator[str]:
        raise TransientError("again")
        yield ""

    root = WritingRoot(model, body)
    app = make_app(root, model, tm__attempts=3)
    assert get(app).status.startswith("500")
    assert root.runs == 1
    assert model.texts() == ["body"]
    assert_thread_works(app, model)


@pytest.mark.parametrize("how", ["raise", "commit"])
def test_request_is_not_run_again_for_an_error_after_the_controller(
    make_app: MakeApp, model: Model, how: str
) -> None:
    """Neither ``_after`` nor its changes make TG run the controller again."""

    def fail() -> None:
        raise TransientError("again")

    class After(WritingRoot):
        def _after(self, *args: Any, **params: Any) -> None:
            model.DBSession.add(Note(text="after"))
            if how == "commit":
                transaction.get().addBeforeCommitHook(fail)
            else:
                fail()

    root = After(model, lambda: iter(["one", "two"]))
    app = make_app(root, model, tm__attempts=3)
    assert get(app).status.startswith("500")
    assert root.runs == 1
    assert model.texts() == ["body"]
    assert_clean(model)


def test_request_commits_the_changes_of_after(make_app: MakeApp, model: Model) -> None:
    """TG's own commit comes a moment later."""

    class After(WritingRoot):
        def _after(self, *args: Any, **params: Any) -> None:
            model.DBSession.add(Note(text="after"))

    app = make_app(After(model, lambda: iter(["one", "two"])), model)
    call = Call(app)
    assert model.texts() == ["body", "after"]
    assert call.read() == b"onetwo"
    assert_clean(model)


class Flaky:
    """A data manager whose first votes fail."""

    transaction_manager = None

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def tpc_vote(self, transaction: Any) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise TransientError("again")

    def sortKey(self) -> str:
        return "~~~"  # after the database

    def nothing(self, transaction: Any) -> None:
        pass

    abort = commit = tpc_begin = tpc_finish = tpc_abort = nothing


class FlakyFirst(Flaky):
    def sortKey(self) -> str:
        return "0"


@pytest.mark.parametrize("attempts", [1, 3])
def test_request_whose_own_commit_fails_is_run_again(
    make_app: MakeApp, model: Model, attempts: int
) -> None:
    """TG retries a commit of the request's own transaction that is retryable."""
    model.seed("ada")
    flaky = FlakyFirst(2)

    class Failing(WritingRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            transaction.get().join(flaky)
            self.kept = find_user(model, "ada")
            return super().index()

    root = Failing(model, lambda: iter(["one", root.kept.name]))
    app = make_app(root, model, tm__attempts=attempts)
    call = get(app)
    assert root.runs == attempts
    if attempts == 3:
        assert call.text == "oneada"
        assert model.texts() == ["body"]
    else:
        assert call.status.startswith("500")
        assert "TransientError: again" in call.errors.getvalue()
        assert model.texts() == []
    assert_thread_works(app, model)


def test_request_whose_own_flush_fails_is_an_ordinary_error(
    make_app: MakeApp, model: Model
) -> None:
    """If the controller's changes cannot be stored, the stream never runs."""
    defer_unique_names(model)
    model.seed("ada")
    ran: list[bool] = []

    class Failing(ModelRoot):
        @expose(content_type="text/plain")
        def index(self) -> Stream:
            find_user(model, "ada")
            model.DBSession.add(User(name="ada"))
            return super().index()

    def body() -> Iterator[str]:
        ran.append(True)
        yield ""

    app = make_app(Failing(model, body), model)
    call = get(app)
    assert call.status.startswith("500")
    assert "IntegrityError" in call.errors.getvalue()
    assert ran == []
    assert_thread_works(app, model)


# HTTP exceptions before the first chunk.


def commit_only_success(environ: Any, status: str, headers: Any) -> bool:
    """A ``tm.commit_veto`` that commits only requests with status 200."""
    return not status.startswith("200")


@pytest.mark.parametrize("answer", ["404", "302"])
@pytest.mark.parametrize("rule", ["commit", "doomed", "veto", "manual", "no tm"])
def test_http_exception_commits_by_the_rules_of_tg(
    make_app: MakeApp, model: Model, answer: str, rule: str, reports: list[Report]
) -> None:
    """It is a response: changes are committed unless TG would abort them."""

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        if rule == "doomed":
            transaction.doom()
        if answer == "404":
            tg.abort(404)
        tg.redirect("/elsewhere")
        yield ""

    options: dict[str, Any] = (
        {"tm.commit_veto": commit_only_success} if rule == "veto" else {}
    )
    root = ModelRoot(model, body, commit="manual" if rule == "manual" else "end")
    app = make_app(root, model, tm__enabled=rule != "no tm", **options)
    assert get(app).status.startswith(answer)
    stored = rule in ("commit", "no tm")
    assert model.names() == (["ada"] if stored else [])
    assert reports == []
    assert_clean(model)


def test_http_exception_whose_commit_fails_is_an_error(
    make_app: MakeApp, model: Model
) -> None:
    """A redirect to a success page is not sent if its commit failed."""
    model.seed("ada")

    def body() -> Iterator[str]:
        model.DBSession.add(User(name="ada"))
        tg.redirect("/thanks")
        yield ""

    app = make_app(ModelRoot(model, body), model)
    assert get(app).status.startswith("500")
    assert model.names() == ["ada"]
    assert_thread_works(app, model)
