"""Flask with Flask-SQLAlchemy, like "Streaming Contents" in its manual."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from flask import Flask, Response, abort, redirect, request, stream_with_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapped, Session, mapped_column, relationship
from werkzeug.exceptions import HTTPException

from tests.comparison.apps.outside import PACE, PACES, read_line, wait_for, write

db: Any = SQLAlchemy()


class User(db.Model):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    notes: Mapped[list[Note]] = relationship()


class Note(db.Model):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    user_id: Mapped[int | None] = mapped_column(sa.ForeignKey("users.id"))


def make_app(url: str) -> Flask:
    """Return the application.

    :param url: of a database with its tables.
    """
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)

    @app.errorhandler(HTTPException)
    def page(error: Any) -> tuple[str, int]:
        return f"our page for {error.code}", error.code

    @app.get("/text")
    def text() -> Response:
        def generate() -> Iterator[str]:
            yield "grüß "
            yield "dich"

        return Response(generate(), mimetype="text/plain")

    def arguments() -> Iterator[str]:
        for _ in range(3):
            yield request.args["of"] + "\n"

    @app.get("/request")
    def view_request() -> Response:
        return Response(arguments(), mimetype="text/plain")

    @app.get("/request_helped")
    def request_helped() -> Response:
        return Response(stream_with_context(arguments()), mimetype="text/plain")

    def texts(user: Any) -> Iterator[str]:
        for note in user.notes:
            yield note.text + "\n"

    def ada() -> Any:
        return db.session.scalars(db.select(User).filter_by(name="ada")).one()

    @app.get("/loaded")
    def loaded() -> Response:
        return Response(stream_with_context(texts(ada())), mimetype="text/plain")

    @app.get("/loaded_helped")
    def loaded_helped() -> Response:
        user = ada()

        def generate() -> Iterator[str]:
            db.session.add(user)  # the session of the new application context
            yield from texts(user)

        return Response(stream_with_context(generate()), mimetype="text/plain")

    def add(commits: bool) -> Iterator[str]:
        pipe, fails = request.args["pipe"], request.args.get("fails")
        for number in range(3):
            db.session.add(Note(text=f"added {number}"))
            db.session.flush()
            yield "added\n"
            if number == 0:
                read_line(pipe)
        if fails:
            raise LookupError("no end")
        if commits:
            db.session.commit()

    @app.get("/adds")
    def adds() -> Response:
        return Response(stream_with_context(add(False)), mimetype="text/plain")

    @app.get("/adds_helped")
    def adds_helped() -> Response:
        return Response(stream_with_context(add(True)), mimetype="text/plain")

    @app.get("/early")
    def early() -> Response:
        def generate() -> Iterator[str]:
            how = request.args["how"]
            if how == "404":
                abort(404)
            if how == "302":
                abort(redirect("/text"))
            if how == "500":
                raise LookupError("no first")
            response.headers["X-Made"] = "here"
            response.set_cookie("made", "here")
            yield "first"

        response = Response(stream_with_context(generate()), mimetype="text/html")
        return response

    @app.get("/fails")
    def fails() -> Response:
        def generate() -> Iterator[str]:
            yield "one\n"
            yield "two\n"
            raise LookupError("no third")

        return Response(stream_with_context(generate()), mimetype="text/plain")

    @app.get("/paced")
    def paced() -> Response:
        def generate() -> Iterator[str]:
            end = "closed"
            try:
                db.session.add(Note(text="left"))
                db.session.flush()
                for number in range(PACES):
                    yield f"{number}\n"
                    time.sleep(PACE)
                end = "made all"
            finally:
                write(request.args["pipe"], end)

        return Response(stream_with_context(generate()), mimetype="text/plain")

    @app.get("/waits")
    def waits() -> Response:
        def generate() -> Iterator[str]:
            yield "first\n"
            wait_for(request.args["gate"])
            yield "second\n"

        return Response(stream_with_context(generate()), mimetype="text/plain")

    @app.get("/turns")
    def turns() -> Response:
        def generate() -> Iterator[str]:
            for _ in range(3):
                backend = db.session.scalar(sa.select(sa.func.pg_backend_pid()))
                yield f"{request.args['of']} {backend}\n"

        return Response(stream_with_context(generate()), mimetype="text/plain")

    @app.get("/turns_helped")
    def turns_helped() -> Response:
        of, engine = request.args["of"], db.engine

        def generate() -> Iterator[str]:
            with Session(engine) as session:
                for _ in range(3):
                    backend = session.scalar(sa.select(sa.func.pg_backend_pid()))
                    yield f"{of} {backend}\n"

        return Response(generate(), mimetype="text/plain")

    return app
