"""One user, loaded: the memory, lessons on their way into it, versions on their way to the disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from operator import add
from pathlib import Path

from nested_learning.server.folder import Manifest, UserFolder
from nested_learning.server.journal import Entry
from nested_learning.server.mind import Learned, MemoryValue, Mind
from nested_learning.server.refusal import Refusal
from nested_learning.server.scheduler import Job, JobCancelled, Scheduler
from nested_learning.server.versions import MemoryVersion, Past, PendingLesson, begun

LOG = logging.getLogger("nested_learning.server")
TRIES = 3  # to learn a lesson that the machine has no memory for
RETRY_SECONDS = 5.0  # between tries to write to a disk that is full


class UserMemory:
    """The loaded memory of one user. Used on the event loop's thread alone.

    Args:
        mind: the model.
        scheduler: where lessons are taken.
        folder: files of the user, whose lock `held` has.
        undo: conversations that can be taken back.
        held: closed when the user is put away.

    Attributes:
        current: the memory that answers are given with.
        past: conversations that can be taken back, oldest first, each with the memory before it.
        pins: number of requests that use it.
        gone: whether it was deleted; nothing is learned or written any more.
        last: last lesson, for the user to look at: tokens, surprise, writes.
        trouble: last thing that went wrong with the files; None once the memory was saved after it.
        on_idle: called when it may have become possible to put the user away.
    """

    def __init__(
        self, mind: Mind, scheduler: Scheduler, folder: UserFolder, undo: int, held: ExitStack
    ) -> None:
        self.mind, self.scheduler, self.folder = mind, scheduler, folder
        self._undo_copies, self._held = undo, held
        self.current = MemoryVersion(0, mind.empty, is_empty=True)
        self.past: Past = ()
        self.state = Manifest(writes=[0] * len(mind.levels))
        self.pins = 0
        self.gone = False
        self.last: Learned | None = None
        self.trouble: str | None = None
        self.on_idle: Callable[[], None] = lambda: None
        self.pending: deque[PendingLesson] = deque()
        self._next_number = 1
        self._waiting = 0
        self._quiet, self._saved = asyncio.Event(), asyncio.Event()
        self._quiet.set()
        self._saved.set()
        self._writing, self._changing, self._committing = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._learning: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._job: Job | None = None
        self._closing = asyncio.Event()

    @classmethod
    async def open(cls, mind: Mind, scheduler: Scheduler, folder: UserFolder, undo: int) -> UserMemory:
        """The user of a folder, whose lessons in the journal begin to be learned.

        Raises:
            Refusal: another process has it (503), or it is damaged or of another model (500).
        """
        held = ExitStack()
        try:
            held.enter_context(folder.lock())
            held.callback(folder.delete_unused)
        except ValueError as error:
            raise in_use() from error
        except OSError as error:
            raise Refusal(
                507, f"the folder of memories cannot be used: {error.strerror or error}", "storage"
            ) from error
        try:
            user = cls(mind, scheduler, folder, undo, held)
            await user._load()
        except (ValueError, OSError) as error:
            held.close()
            LOG.error("memory %s cannot be loaded: %s", folder.path.name, error)
            raise unusable(error, folder) from error
        except BaseException:
            held.close()
            raise
        return user

    async def _load(self) -> None:
        state, entries, damaged = await asyncio.to_thread(self._read_files)
        if state.current is not None:
            path = self.folder.path / state.current
            with self.scheduler.visiting():
                memory = await asyncio.to_thread(self.mind.load, path)
            self.current = MemoryVersion(state.applied, memory, state.current)
        self.past = tuple(
            (conversation, MemoryVersion(0, None, before, is_empty=before is None))
            for conversation, before in state.undo
        )
        self.state = state
        self.state.writes = (state.writes + [0] * len(self.mind.levels))[: len(self.mind.levels)]
        self._next_number = max([state.applied, *(entry.number for entry in entries)]) + 1
        if damaged:
            self.trouble = f"{damaged} lines of the journal are damaged and were passed over"
            LOG.warning("memory %s: %s", self.folder.path.name, self.trouble)
        for entry in entries:
            self.state.known.add(entry.conversation, entry.hashes, entry.head)
            self._enqueue(entry)

    def _read_files(self) -> tuple[Manifest, list[Entry], int]:
        state = self.folder.manifest()
        self.folder.clean(state.files)
        missing = [name for name in state.files if not (self.folder.path / name).exists()]
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing in {self.folder.path}")
        return (state, *self.folder.journal.after(state.applied))

    # What is there -------------------------------------------------------------------------------------

    @property
    def memory(self) -> MemoryValue:
        """The memory with all lessons that are complete."""
        assert self.current.memory is not None
        return self.current.memory

    @property
    def is_idle(self) -> bool:
        """Whether it can be put away without losing or delaying anything."""
        return not (self.pins or self.pending or self._saving) and self._saved.is_set()

    @property
    def pending_tokens(self) -> int:
        """Tokens that wait to be learned."""
        return sum(len(lesson.ids) for lesson in self.pending)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, and of those to go back to that are not on the disk yet."""
        kept = (before for _, before in self.past if before is not self.current)
        return sum(version.nbytes(self.mind) for version in (self.current, *kept))

    # Learning ------------------------------------------------------------------------------------------

    async def caught_up(self) -> None:
        """Wait until all that was told so far is learned; until then it is learned as this request's work."""
        self._waiting += 1
        try:
            await self._quiet.wait()
        finally:
            self._waiting -= 1

    async def settled(self) -> None:
        """Wait until nothing is left to learn or to save, without hurry."""
        await self._quiet.wait()
        if self._saving is not None:
            await asyncio.wait([self._saving])

    async def remember(self, entry_of: Callable[[int], Entry | None]) -> asyncio.Future[Learned | None]:
        """Have a lesson learned: it is in the journal, on the disk, when this returns.

        Args:
            entry_of: the journal's entry of a number; None where nothing is to be learned. It is asked while
                no other lesson is on its way to the journal, so it can go by what is known.

        Returns:
            set when it is learned; None where nothing was to be, that failed, or the user was deleted.

        Raises:
            Refusal: the journal cannot be written (507); nothing will be learned.
        """
        # A request that is cancelled now must not leave an entry in the file that nobody knows of.
        return await asyncio.shield(asyncio.ensure_future(self._remember(entry_of)))

    async def _remember(self, entry_of: Callable[[int], Entry | None]) -> asyncio.Future[Learned | None]:
        async with self._writing:
            entry = None if self.gone else entry_of(self._next_number)
            if entry is None:
                nothing: asyncio.Future[Learned | None] = asyncio.get_running_loop().create_future()
                nothing.set_result(None)
                return nothing
            try:
                await asyncio.to_thread(self.folder.journal.append, entry)
            except OSError as error:
                self.trouble = f"the journal cannot be written: {error.strerror}"
                message = f"what was said cannot be kept, so it was not taken in: {error.strerror}"
                raise Refusal(507, message, "storage", retry_after=30) from error
            self._next_number += 1
            self.state.known.add(entry.conversation, entry.hashes, entry.head)
            return self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> asyncio.Future[Learned | None]:
        learned: asyncio.Future[Learned | None] = asyncio.get_running_loop().create_future()
        self.pending.append(PendingLesson(entry, self.mind.lesson_ids(entry.texts), learned))
        self._begin_learning()
        return learned

    def _begin_learning(self) -> None:
        self._quiet.clear()
        if self._learning is None:
            self._learning = asyncio.get_running_loop().create_task(self._learn_all())

    async def _learn_all(self) -> None:
        try:
            while self.pending and not self.gone:
                async with self._changing:
                    lesson = self.pending[0]
                    learned = await self._learn(lesson.entry, lesson.ids)
                    if not self.gone:
                        self.pending.popleft()
                        lesson.learned.set_result(learned)
                        self._save_soon()
        finally:
            self._learning = None
            self._quiet.set()
            self.on_idle()

    async def _learn(self, entry: Entry, ids: list[int]) -> Learned | None:
        """Take one lesson into the memory; None where it cannot be learned."""
        learned = None
        for attempt in range(TRIES if ids else 0):
            try:
                turns = self.mind.learn(self.memory, ids)
                self._job = self.scheduler.submit(self.folder.path.name, turns, lambda: self._waiting > 0)
                learned = await asyncio.wrap_future(self._job.result)
                break
            except JobCancelled:
                if not self.gone:
                    raise
            except Exception as error:  # of the model or the machine: no lesson ends the server
                what = f"try {attempt + 1}: a lesson could not be learned: {type(error).__name__}"
                LOG.error("memory %s: %s", self.folder.path.name, what)
            finally:
                self._job = None
            if self.gone:
                return None
        if learned is not None:
            self.past = begun(self.past, entry.conversation, self.current, self._undo_copies)
            self.current = MemoryVersion(entry.number, learned.memory)
            self.last = learned
            self.state.writes = list(map(add, self.state.writes, learned.written))
            self.state.changed = time.time()
        self.state.failed += bool(ids) and learned is None
        self.state.applied = entry.number
        return learned

    # Going back ----------------------------------------------------------------------------------------

    async def undo(self, count: int) -> None:
        """Take back the last conversations, newest first, after all pending lessons.

        Raises:
            Refusal: there are fewer (409), the memory before is damaged (500), or it cannot be written (507).
        """
        while True:
            await self.caught_up()
            async with self._changing:
                if self.pending:
                    continue
                if count > len(self.past):
                    message = f"{len(self.past)} conversations can be taken back, got {count}"
                    raise Refusal(409, message, "nothing_to_undo", param="conversations")
                before = self.past[-count][1]
                if before.memory is None:
                    memory = self.mind.empty if before.is_empty else await self._load_file(before.file)
                    before = MemoryVersion(before.number, memory, before.file, before.is_empty)
                await self._replace(before, self.past[:-count])
                return

    async def take_over(self, path: Path, check: Callable[[MemoryValue], None]) -> None:
        """Replace the memory by that of a file; it can be undone like a conversation.

        Args:
            path: path of the file.
            check: raises a refusal of its own where the memory is not wanted.

        Raises:
            Refusal: it is no memory of this model (400), or it cannot be written (507).
        """
        with self.scheduler.visiting():
            try:
                memory = await asyncio.to_thread(self.mind.load, path)
            except ValueError as error:
                message = str(error).replace(str(path), "the file")
                raise Refusal(400, message, "not_a_memory") from error
        check(memory)
        while True:
            await self.caught_up()
            async with self._changing:
                if not self.pending:
                    name = f"import {self._next_number} {time.time()}"
                    kept = begun(self.past, name, self.current, self._undo_copies)
                    await self._replace(MemoryVersion(self.state.applied, memory), kept)
                    return

    async def export(self) -> Path:
        """A new file with the memory, which the caller removes. Refusal where it cannot be written (507), or
        there is none (409)."""
        await self.caught_up()
        path = self.folder.transfer_file()
        with self.scheduler.visiting():
            try:
                await asyncio.to_thread(self.mind.save, self.memory, path)
            except ValueError as error:
                raise Refusal(409, f"there is nothing to export: {error}", "nothing_to_export") from error
            except OSError as error:
                raise unwritten(error) from error
        return path

    async def _load_file(self, name: str | None) -> MemoryValue:
        assert name is not None
        with self.scheduler.visiting():
            try:
                return await asyncio.to_thread(self.mind.load, self.folder.path / name)
            except (ValueError, OSError) as error:
                raise unusable(error, self.folder) from error

    async def _replace(self, version: MemoryVersion, kept: Past) -> None:
        """Put another memory in force, here and on the disk, or neither."""
        old = self.current, self.past, self.state.changed, self.last
        self.current, self.past = version, kept
        self.state.changed, self.last = time.time(), None
        try:
            await self._commit()
        except OSError as error:
            self.current, self.past, self.state.changed, self.last = old
            raise unwritten(error) from error

    # Saving --------------------------------------------------------------------------------------------

    def _save_soon(self) -> None:
        self._saved.clear()
        if self._saving is None:
            self._saving = asyncio.get_running_loop().create_task(self._save_all())

    async def _save_all(self) -> None:
        try:
            while not self._saved.is_set() and not self.gone:
                self._saved.set()  # unless something changes while it is written
                try:
                    await self._commit()
                    self.trouble = None
                except (OSError, ValueError) as error:
                    self._saved.clear()
                    self.trouble = f"the memory cannot be saved yet: {without_paths(error, self.folder)}"
                    LOG.error("memory %s: it cannot be saved yet: %s", self.folder.path.name, error)
                    if await self._closes_within(RETRY_SECONDS):
                        return
        finally:
            self._saving = None
            self.on_idle()

    async def _closes_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True

    async def _commit(self) -> None:
        """Write what is in force, and what can be gone back to, and put it in force on the disk.

        Raises:
            OSError, ValueError: it cannot be written; what was committed before stays.
        """
        async with self._committing:
            current, past, applied = self.current, self.past, self.state.applied
            writes, changed, failed = list(self.state.writes), self.state.changed, self.state.failed
            for version in (*(before for _, before in past), current):
                if version.is_unsaved and not self.gone:
                    path = self.folder.new_file(version.number)
                    with self.scheduler.visiting():
                        assert version.memory is not None
                        await asyncio.to_thread(self.mind.save, version.memory, path)
                    version.file = path.name
            async with self._writing:
                if self.gone:
                    return
                manifest = Manifest(
                    applied=applied,
                    current=current.file,
                    undo=[(conversation, before.file) for conversation, before in past],
                    known=self.state.known,
                    writes=writes,
                    changed=changed,
                    failed=failed,
                )
                await asyncio.to_thread(self._put_in_force, manifest)
            for _, before in past:
                if before is not self.current:
                    before.memory = None

    def _put_in_force(self, manifest: Manifest) -> None:
        self.folder.commit(manifest)
        self.folder.journal.compact(manifest.applied)
        self.folder.clean(manifest.files, transfers=False)

    # The end -------------------------------------------------------------------------------------------

    async def erase(self) -> None:
        """Delete everything of the user, here and on the disk; pending lessons are cancelled.

        Raises:
            Refusal: the folder cannot be removed (507); everything is as before.
        """
        self.gone = True
        if self._job is not None:
            self._job.cancel()
        try:
            async with self._committing, self._writing:
                await asyncio.to_thread(self.folder.delete)
        except OSError as error:
            if self._learning is not None:
                await asyncio.wait([self._learning])
            self.gone = False
            if self.pending:
                self._begin_learning()
            message = f"the memory cannot be deleted: {error.strerror}"
            raise Refusal(507, message, "storage", retry_after=30) from error
        for lesson in self.pending:
            lesson.learned.set_result(None)
        self.pending.clear()
        self._quiet.set()
        self._saved.set()
        self._held.close()

    async def close(self) -> None:
        """Save and put away. Lessons that are not learned stay in the journal."""
        if self.gone:
            return
        self._closing.set()
        if self._job is not None:
            self._job.cancel()
        if self._learning is not None:
            self._learning.cancel()
        running = [task for task in (self._learning, self._saving) if task is not None]
        if running:
            await asyncio.wait(running)
        unsaved = self.current.is_unsaved or not self._saved.is_set()
        try:
            if unsaved:
                await self._commit()
        except (OSError, ValueError) as error:
            LOG.error("memory %s is not saved, its journal stays: %s", self.folder.path.name, error)
        self.put_away()

    def put_away(self) -> None:
        """Let other processes have it."""
        self.gone = True
        self._held.close()


def unwritten(error: OSError) -> Refusal:
    """The refusal of what cannot be put on the disk."""
    return Refusal(507, f"the memory cannot be written: {error.strerror or error}", "storage")


def in_use() -> Refusal:
    """The refusal of a memory that another process of the server has loaded."""
    message = "this memory is in use by another process of the server; try again, it is put away when idle"
    return Refusal(503, message, "memory_in_use", retry_after=5)


def unusable(error: Exception, folder: UserFolder) -> Refusal:
    """The refusal of a memory whose files are damaged, or of another model."""
    message = (
        f"this memory cannot be used: {without_paths(error, folder)}. Put back a copy of the file, serve it "
        "with the model and levels that it was learned with, or delete it (DELETE /v1/memories)"
    )
    return Refusal(500, message, "memory_unusable")


def without_paths(error: Exception, folder: UserFolder) -> str:
    """The text of an error for clients: where memories lie on this computer is for its log alone."""
    return str(error).replace(f"{folder.path}/", "").replace(str(folder.path), "the folder of the memory")
