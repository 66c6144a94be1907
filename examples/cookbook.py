"""The streaming page of TurboGears' cookbook, with @stream, in one file.

python examples/cookbook.py                  # then open the address that it prints
curl -N http://127.0.0.1:8080/numbers        # prints a number each second
curl http://127.0.0.1:8080/fails; echo $?    # 18: curl reports an incomplete response
"""

import argparse
import itertools
import logging
import sys
import tempfile
import time

import tg
import transaction
import waitress
from sqlalchemy import Column, Integer, Unicode
from sqlalchemy.orm import DeclarativeBase, scoped_session, sessionmaker
from tg import FullStackApplicationConfigurator, TGController, expose
from zope.sqlalchemy import register

import tgstream
from tgstream import stream

DBSession = scoped_session(sessionmaker())
register(DBSession)


class Base(DeclarativeBase):
    pass


class User(Base):  # with the names that a quickstarted application has
    __tablename__ = "tg_user"
    user_id = Column(Integer, autoincrement=True, primary_key=True)
    user_name = Column(Unicode(16), unique=True, nullable=False)
    display_name = Column(Unicode(255))


class Permission(Base):
    __tablename__ = "tg_permission"
    permission_id = Column(Integer, autoincrement=True, primary_key=True)
    permission_name = Column(Unicode(63), unique=True, nullable=False)


def init_model(engine):  # TG calls it
    DBSession.configure(bind=engine)
    Base.metadata.create_all(engine)
    for name in ("manager", "editor"):
        DBSession.add(User(user_name=name, display_name=f"Example {name}"))
    transaction.commit()


INDEX = """<!doctype html><title>Streaming with TurboGears</title><ul>
<li><a href="numbers">numbers</a>: sends a JSON array of the numbers from 1 to 10
<li><a href="lines">lines</a>: reads tg.request in each of ten lines
<li><a href="users">users</a>: looks up nine users, and finds two
<li><a href="by_hand">by_hand</a>: adds nine permissions, and calls transaction.commit()
<li><a href="at_the_end">at_the_end</a>: adds nine, and tgstream commits at the end
<li><a href="each">each</a>: commits each. Stop it halfway, and see the number below
<li><a href="fails">fails</a>: fails halfway, and the browser reports it
</ul>Permissions in the database: %d"""


def pause():
    time.sleep(tg.config["cookbook.pause"])


class RootController(TGController):
    unused = itertools.count()  # each page load needs new names

    @expose()
    def index(self):
        return INDEX % DBSession.query(Permission).count()

    @expose(content_type="application/json")
    @stream
    def numbers(self):
        yield "["
        for num in range(1, 10):
            yield "%s, " % num
            pause()
        yield "10]"

    @expose(content_type="text/plain")
    @stream
    def lines(self):
        for num in range(1, 11):
            yield "%s/%s\n" % (tg.request.path_info, num)
            pause()

    @expose(content_type="application/json")
    @stream
    def users(self):
        yield "["
        for num in range(9):
            user = DBSession.query(User).filter_by(user_id=num).first()
            yield "%d, " % user.user_id if user else "null, "
            pause()
        yield "null]"

    @expose(content_type="text/plain")
    @stream
    def by_hand(self):
        for num in itertools.islice(self.unused, 9):
            DBSession.add(Permission(permission_name="perm_%s" % num))
            yield "Added Permission\n"
            pause()
        DBSession.flush()
        transaction.commit()

    @expose(content_type="text/plain")
    @stream
    def at_the_end(self):
        for num in itertools.islice(self.unused, 9):
            DBSession.add(Permission(permission_name="perm_%s" % num))
            yield "Added Permission\n"
            pause()

    @expose(content_type="text/plain")
    @stream
    def each(self):
        for num in itertools.islice(self.unused, 9):
            DBSession.add(Permission(permission_name="perm_%s" % num))
            tgstream.commit()
            yield "Added Permission\n"
            pause()

    @expose(content_type="text/plain")
    @stream
    def fails(self):
        yield "the first half\n"
        pause()
        raise RuntimeError("halfway")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default=8080, type=int, help="0 for a free one")
    parser.add_argument("--pause", default=1.0, type=float, help="seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        base_config = FullStackApplicationConfigurator()
        base_config.update_blueprint(
            {
                "root_controller": RootController(),
                "renderers": ["json"],
                "default_renderer": "json",
                "use_sqlalchemy": True,
                "sqlalchemy.url": f"sqlite:///{folder}/cookbook.db",
                "model": sys.modules[__name__],
                "cookbook.pause": args.pause,
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
