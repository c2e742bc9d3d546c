"""All users: opened on demand, those not used for longest put away, deleted, replayed at the start."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from weakref import WeakValueDictionary

from nested_learning._files import MIB
from nested_learning.server.folder import UserFolder, folder_name, prepare
from nested_learning.server.mind import Mind
from nested_learning.server.refusal import Refusal
from nested_learning.server.scheduler import Scheduler
from nested_learning.server.settings import ServeSettings
from nested_learning.server.user import UserMemory, in_use

ROOM_SECONDS = 5.0  # that a request waits for other users' requests to end, where all room is taken
LOG = logging.getLogger("nested_learning.server")


class Memories:
    """The loaded users, and the folder of all.

    Args:
        mind: the model.
        scheduler: where lessons are taken.
        settings: the server's settings.
    """

    def __init__(self, mind: Mind, scheduler: Scheduler, settings: ServeSettings) -> None:
        self._mind = mind
        self._scheduler = scheduler
        self._root = Path(settings.memories)
        self._budget = settings.memory_mb * MIB
        self._most = settings.most_users
        self._undo = settings.undo
        self._users: OrderedDict[str, UserMemory] = OrderedDict()
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._arriving = 0  # users that are being loaded
        self._replaying: asyncio.Task[None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all loaded memories."""
        return sum(user.nbytes for user in self._users.values())

    @property
    def users(self) -> list[UserMemory]:
        """The loaded users, those used last at the end."""
        return list(self._users.values())

    @property
    def pending_tokens(self) -> int:
        """Tokens that wait to be learned, of all users."""
        return sum(user.pending_tokens for user in self._users.values())

    async def start(self) -> None:
        """Finish deletions that were cut off, and begin to learn what journals hold.

        Raises:
            OSError: the folder cannot be made or read.
        """
        waiting = await asyncio.to_thread(prepare, self._root)
        self._replaying = asyncio.get_running_loop().create_task(self._replay(waiting))

    async def _replay(self, names: list[str]) -> None:
        for name in names:
            try:
                async with self._using(name) as user:
                    await user.settled()
            except Refusal as refusal:  # it is damaged, or another server has it: that one replays
                LOG.warning("the journal of %s is not replayed: %s", name, refusal.message)

    async def close(self) -> None:
        """Save everything and let go of it."""
        if self._replaying is not None:
            self._replaying.cancel()
        await asyncio.gather(*(user.close() for user in self.users))
        self._users.clear()

    @asynccontextmanager
    async def using(self, user: str) -> AsyncIterator[UserMemory]:
        """A user's memory, which stays loaded inside the scope.

        Raises:
            Refusal: see `UserMemory.open`; or the budget is in use by others (503).
        """
        async with self._using(folder_name(user)) as found:
            yield found

    @asynccontextmanager
    async def _using(self, name: str) -> AsyncIterator[UserMemory]:
        async with self._lock_of(name):
            user = self._users.get(name)
            if user is None:
                user = await self._open(name)
            user.pins += 1
        self._users.move_to_end(name)
        try:
            yield user
        finally:
            user.pins -= 1
            self.make_room()

    def _lock_of(self, name: str) -> asyncio.Lock:
        return self._opening.setdefault(name, asyncio.Lock())

    async def _open(self, name: str) -> UserMemory:
        folder = UserFolder(self._root, name)
        try:
            needed = folder.size([(await asyncio.to_thread(folder.manifest)).current])
        except (ValueError, OSError):
            needed = 0  # what is damaged is found, and said, by opening
        deadline = time.monotonic() + ROOM_SECONDS
        while not self._has_room(needed):
            if time.monotonic() > deadline:
                message = "all room for memories is taken by users who are being answered; try again"
                raise Refusal(503, message, "no_room", retry_after=2)
            await asyncio.sleep(0.02)
        self._arriving += 1
        try:
            user = await UserMemory.open(self._mind, self._scheduler, folder, self._undo)
        finally:
            self._arriving -= 1
        user.on_idle = self.make_room
        self._users[name] = user
        return user

    def _has_room(self, needed: int) -> bool:
        """Whether one more user of a size can be loaded, once those who are idle are put away."""
        self.make_room(needed, 1)
        fits = not self._users or self.nbytes + needed <= self._budget
        return fits and len(self._users) + self._arriving < self._most

    def make_room(self, needed: int = 0, places: int = 0) -> None:
        """Put away users who are idle, those not used for longest first, until the budget is kept.

        Args:
            needed: bytes that are to come.
            places: users that are to come.
        """
        for name, user in list(self._users.items()):
            if (
                self.nbytes + needed <= self._budget
                and len(self._users) + self._arriving + places <= self._most
            ):
                return
            if user.is_idle:
                del self._users[name]
                user.put_away()

    async def erase(self, user: str) -> None:
        """Delete a user's memory, journal and undo copies, loaded or not, damaged or not.

        Raises:
            Refusal: another process has it (503), or it cannot be removed (507).
        """
        name = folder_name(user)
        async with self._lock_of(name):
            loaded = self._users.get(name)
            if loaded is not None:
                loaded.pins += 1  # so that it is not put away in the middle
                try:
                    await loaded.erase()
                finally:
                    loaded.pins -= 1
                del self._users[name]
                return
            folder = UserFolder(self._root, name)
            if not folder.path.exists():
                return
            try:
                with folder.lock():
                    folder.delete()
            except ValueError as error:
                raise in_use() from error
            except OSError as error:
                raise Refusal(507, f"it cannot be deleted: {error.strerror or error}", "storage") from error
