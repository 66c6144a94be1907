"""The sessions of a stream: which there are, and which part each takes in a commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .engines import prepare_engines
from .registry import SessionRegistry
from .transaction import StreamDataManager, StreamTransactionManager

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


class StreamSessions:
    """The sessions of one stream, and the manager of its transactions.

    :param registries: the registries of the application's scoped sessions, TG's first.
    """

    ended = False
    """Whether nothing will commit any more. The report may still be logged."""

    def __init__(self, registries: tuple[SessionRegistry, ...]) -> None:
        self.registries = registries
        self.current: dict[SessionRegistry, StreamDataManager] = {}
        """The session that each registry has now, by its data manager."""
        self.data_managers: list[StreamDataManager] = []
        """The data managers of all sessions, also of those that ``set()`` replaced."""
        self.manager = StreamTransactionManager(
            self.data_managers, registries[0] if registries else None
        )

    def get_session(self, registry: SessionRegistry) -> Session:
        """The stream's session of a scoped session, made on first use."""
        data_manager = self.current.get(registry)
        if data_manager is None:
            data_manager = self.adopt(registry, registry.createfunc())
        return data_manager.session

    def adopt(self, registry: SessionRegistry, session: Session) -> StreamDataManager:
        """Make ``session`` the stream's. The session that it replaces stays, too."""
        data_manager = self.find_data_manager(session)
        if data_manager is None:
            prepare_engines(session)
            data_manager = StreamDataManager(session, self.manager)
            if self.manager.has_begun:
                self.manager.get().join(data_manager)
            self.data_managers.append(data_manager)
        self.current[registry] = data_manager
        return data_manager

    def forget(self, registry: SessionRegistry) -> None:
        """Release the session after ``scoped_session.remove()`` has closed it."""
        data_manager = self.current.pop(registry, None)
        if data_manager is not None and data_manager not in self.current.values():
            self.data_managers.remove(data_manager)
            data_manager.release()

    def find_data_manager(self, session: Session) -> StreamDataManager | None:
        """The data manager of ``session``, if it is a session of the stream."""
        for data_manager in self.data_managers:
            if data_manager.session is session:
                return data_manager
        return None
