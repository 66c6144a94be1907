"""Starlette: a ``StreamingResponse`` with SQLAlchemy's ``Session``.

Endpoints and generators that use the database are ordinary functions, which Starlette
runs in threads. Generators that wait are ``async``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.comparison.apps.outside import PACE, PACES, read_line, wait_for_async, write
from tests.model import Note, User


def plain(generator: Iterator[str] | AsyncIterator[str]) -> StreamingResponse:
    """Return the generator as a response of plain text."""
    return StreamingResponse(generator, media_type="text/plain")


async def http_page(request: Request, error: Any) -> Response:
    return HTMLResponse(
        f"our page for {error.status_code}", error.status_code, error.headers
    )


async def error_page(request: Request, error: Exception) -> Response:
    return HTMLResponse("our page for 500", 500)


def make_app(url: str) -> Starlette:
    """Return the application.

    :param url: of a database with its tables.
    """
    make_session = sessionmaker(sa.create_engine(url))
    make_async_session = async_sessionmaker(create_async_engine(url))

    def text(request: Request) -> Response:
        def generate() -> Iterator[str]:
            yield "grüß "
            yield "dich"

        return plain(generate())

    def request_helped(request: Request) -> Response:
        return plain(request.query_params["of"] + "\n" for _ in range(3))

    ada = sa.select(User).filter_by(name="ada")

    def texts(user: User) -> Iterator[str]:
        for note in user.notes:
            yield note.text + "\n"

    def loaded(request: Request) -> Response:
        with make_session() as session:
            return plain(texts(session.scalars(ada).one()))

    def loaded_helped(request: Request) -> Response:
        session = make_session()
        user = session.scalars(ada).one()

        def generate() -> Iterator[str]:
            with session:
                yield from texts(user)

        return plain(generate())

    def add(session: Session, request: Request) -> Iterator[str]:
        for number in range(3):
            session.add(Note(text=f"added {number}"))
            session.flush()
            yield "added\n"
            if number == 0:
                read_line(request.query_params["pipe"])
        if request.query_params.get("fails"):
            raise LookupError("no end")

    def adds(request: Request) -> Response:
        def generate() -> Iterator[str]:
            with make_session() as session:
                yield from add(session, request)

        return plain(generate())

    def adds_helped(request: Request) -> Response:
        def generate() -> Iterator[str]:
            with make_session.begin() as session:
                yield from add(session, request)

        return plain(generate())

    def early(request: Request) -> Response:
        def generate() -> Iterator[str]:
            how = request.query_params["how"]
            if how == "404":
                raise HTTPException(404)
            if how == "302":
                raise HTTPException(302, headers={"Location": "/text"})
            if how == "500":
                raise LookupError("no first")
            response.headers["X-Made"] = "here"
            response.set_cookie("made", "here")
            yield "first"

        response = StreamingResponse(generate(), media_type="text/html")
        return response

    def fails(request: Request) -> Response:
        def generate() -> Iterator[str]:
            yield "one\n"
            yield "two\n"
            raise LookupError("no third")

        return plain(generate())

    def paced(request: Request) -> Response:
        def generate() -> Iterator[str]:
            end = "closed"
            with make_session() as session:
                try:
                    session.add(Note(text="left"))
                    session.flush()
                    for number in range(PACES):
                        yield f"{number}\n"
                        time.sleep(PACE)
                    end = "made all"
                finally:
                    write(request.query_params["pipe"], end)

        return plain(generate())

    def paced_helped(request: Request) -> Response:
        async def generate() -> AsyncIterator[str]:
            end = "closed"
            async with make_async_session() as session:
                try:
                    session.add(Note(text="left"))
                    await session.flush()
                    for number in range(PACES):
                        yield f"{number}\n"
                        await asyncio.sleep(PACE)
                    end = "made all"
                finally:
                    write(request.query_params["pipe"], end)

        return plain(generate())

    def waits(request: Request) -> Response:
        async def generate() -> AsyncIterator[str]:
            yield "first\n"
            await wait_for_async(request.query_params["gate"])
            yield "second\n"

        return plain(generate())

    def turns(request: Request) -> Response:
        def generate() -> Iterator[str]:
            with make_session() as session:
                for _ in range(3):
                    backend = session.scalar(sa.select(sa.func.pg_backend_pid()))
                    yield f"{request.query_params['of']} {backend}\n"

        return plain(generate())

    endpoints = [text, request_helped, loaded, loaded_helped, adds, adds_helped]
    endpoints += [early, fails, paced, paced_helped, waits, turns]
    return Starlette(
        routes=[Route(f"/{view.__name__}", view) for view in endpoints],
        exception_handlers={HTTPException: http_page, Exception: error_page},
    )
