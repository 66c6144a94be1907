"""Users who log in, with groups and permissions in the database of an application."""

from __future__ import annotations

from http.cookies import SimpleCookie
from typing import Any

from repoze.who.plugins.auth_tkt import AuthTktCookiePlugin
from tg.configuration.auth import TGAuthMetadata
from webob import Request

from tests.model import Model, User


class Metadata(TGAuthMetadata):
    """The notes of a user are the names of the groups and of the permissions."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def authenticate(self, environ: Any, identity: Any) -> str | None:
        user = self.get_user(identity, identity["login"])
        passwords = [note.text for note in user.notes] if user else []
        return user.name if user and identity["password"] in passwords else None

    def get_user(self, identity: Any, userid: str) -> User | None:
        return self.model.DBSession.query(User).filter_by(name=userid).first()

    def get_groups(self, identity: Any, userid: str) -> list[str]:
        return [note.text for note in identity["user"].notes]

    get_permissions = get_groups


def auth_options(model: Model, **options: Any) -> dict[str, Any]:
    """The options of an application that identifies its users, like quickstart's."""
    return {
        "sa_auth__enabled": True,
        "sa_auth__cookie_secret": "secret",
        "sa_auth__authmetadata": Metadata(model),
        "sa_auth__challenge_decider": lambda *_: False,  # 401, and no login page
        "identity__allow_missing_user": False,
        **options,
    }


def cookie_of(user: str) -> str:
    """The cookie with which the user is logged in."""
    plugin = AuthTktCookiePlugin("secret", "authtkt")
    environ = Request.blank("/").environ
    [(_, value), *_] = plugin.remember(environ, {"repoze.who.userid": user})
    return "; ".join(f"{m.key}={m.value}" for m in SimpleCookie(value).values())


def add_users(model: Model) -> None:
    model.seed("ada", "bob")
    model.execute("INSERT INTO notes (text, user_id) VALUES ('staff', 1)")


REVOKE = "DELETE FROM notes"
"""Takes the user out of the groups, and takes the permissions away."""
