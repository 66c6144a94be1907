"""Exports of a table with 100,000 rows as CSV, JSON and Excel, in constant memory.

python examples/exports.py                     # then open the address that it prints
curl http://127.0.0.1:8080/csv | head -3       # or /excel, /lines, /array
curl -O -J http://127.0.0.1:8080/workbook      # or /resumable
curl 'http://127.0.0.1:8080/lines?after=99997' # continues after a key
"""

import argparse
import logging
import sys
import tempfile

import sqlalchemy as sa
import waitress
from sqlalchemy.orm import DeclarativeBase, scoped_session, sessionmaker
from tg import FullStackApplicationConfigurator, TGController, expose
from zope.sqlalchemy import register

import tgstream
from tgstream import CSV, NDJSON, XLSX, JSONArray, rows, stream

DBSession = scoped_session(sessionmaker())
register(DBSession)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id = sa.Column(sa.Integer, primary_key=True)
    customer = sa.Column(sa.Unicode(40))
    amount = sa.Column(sa.Float)


def init_model(engine):  # TG calls it
    DBSession.configure(bind=engine)
    Base.metadata.create_all(engine)
    orders = [{"customer": f"=Customer {n}", "amount": n / 4} for n in range(100_000)]
    with engine.begin() as connection:
        connection.execute(sa.insert(Order), orders)


class RootController(TGController):
    @expose()
    def index(self):
        names = "csv", "excel", "lines", "array", "workbook", "resumable"
        return "".join(f'<p><a href="{name}">{name}</a>' for name in names)

    @expose()
    @stream(CSV, filename="orders.csv")
    def csv(self):
        return rows(sa.select(Order))

    @expose()
    @stream(CSV(bom=True, escape_formulas=True), filename="orders.csv")
    def excel(self):
        return rows(sa.select(Order.id, Order.customer, Order.amount))

    @expose()
    @stream(NDJSON(end=True))
    def lines(self, after="0"):
        return rows(sa.select(Order), key=Order.id, after=int(after))

    @expose()
    @stream(JSONArray)
    def array(self):
        return rows(sa.select(Order).order_by(Order.id).limit(40))

    @expose()
    @stream(XLSX, filename="orders")
    def workbook(self):
        return rows(sa.select(Order))

    @expose()
    @stream(CSV, filename="orders", spool=True)
    def resumable(self):
        return rows(sa.select(Order).order_by(Order.id))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8080, type=int, help="0 for a free one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        base_config = FullStackApplicationConfigurator()
        base_config.update_blueprint(
            {
                "root_controller": RootController(),
                "renderers": ["json"],
                "default_renderer": "json",
                "use_sqlalchemy": True,
                "sqlalchemy.url": f"sqlite:///{folder}/exports.db",
                "model": sys.modules[__name__],
            }
        )
        tgstream.plugme(base_config)
        logging.getLogger("tg").setLevel("ERROR")  # TG misses lib.helpers here
        app = base_config.make_wsgi_app({}, {})
        server = waitress.create_server(app, host=args.host, port=args.port)
        print(f"Open http://{args.host}:{server.effective_port}/", flush=True)
        server.run()


if __name__ == "__main__":
    main()
