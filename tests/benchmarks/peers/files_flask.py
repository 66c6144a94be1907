"""Flask: ``send_file()``."""

from __future__ import annotations

from pathlib import Path

from flask import Flask, Response, send_file


def make_app(folder: str) -> Flask:
    app = Flask(__name__)

    @app.get("/sent/<name>")
    def sent(name: str) -> Response:
        return send_file(Path(folder, name))

    return app
