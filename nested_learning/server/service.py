"""The server behind its HTTP interface: who may ask, how much at once, and the parts of an answer."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from nested_learning.continual.inputs import UNBOUNDED
from nested_learning.server.generation import AnswerPart, Generation
from nested_learning.server.keys import KeyFile
from nested_learning.server.memories import Memories
from nested_learning.server.metrics import ServerMetrics
from nested_learning.server.mind import MemoryValue, Mind
from nested_learning.server.refusal import Refusal
from nested_learning.server.sampling import Sampling
from nested_learning.server.scheduler import JobCancelled, Scheduler
from nested_learning.server.settings import ServeSettings
from nested_learning.server.user import UserMemory

LOG = logging.getLogger("nested_learning.server")
DEFAULT_USER = "default"


class Service:
    """Everything but HTTP.

    Args:
        mind: the model.
        settings: the server's settings.

    Raises:
        ValueError, OSError: the file of keys cannot be read.
    """

    def __init__(self, mind: Mind, settings: ServeSettings) -> None:
        self.mind, self.settings = mind, settings
        self.scheduler = Scheduler(settings.duty, mind.kept, settings.turn_tokens)
        self.memories = Memories(mind, self.scheduler, settings)
        self.metrics = ServerMetrics()
        self.draining = False
        self._keys = None if settings.keys is None else KeyFile(settings.keys)
        self._running: Counter[str] = Counter()
        self.metrics.watch("running_requests", "requests in work", lambda: sum(self._running.values()))
        self.metrics.watch(
            "loaded_memories", "users whose memory is loaded", lambda: len(self.memories.users)
        )
        self.metrics.watch("memory_bytes", "bytes of loaded memories", lambda: self.memories.nbytes)
        self.metrics.watch(
            "pending_tokens", "tokens that wait to be learned", lambda: self.memories.pending_tokens
        )

    async def start(self) -> None:
        """Begin to run the model, and to learn what journals hold. OSError where memories cannot be kept."""
        await self.memories.start()
        self.scheduler.start()

    async def stop(self) -> None:
        """Save everything and end."""
        self.draining = True
        await self.memories.close()
        await asyncio.to_thread(self.scheduler.stop)

    @property
    def troubles(self) -> int:
        """Number of loaded users whose memory could not be learned into or saved."""
        return sum(user.trouble is not None for user in self.memories.users)

    # Who, and how many ---------------------------------------------------------------------------------

    def identify(self, authorization: str | None, claimed: str | None) -> str:
        """The user of a request.

        Args:
            authorization: value of the header of that name.
            claimed: user that the request names itself.

        Raises:
            Refusal: there is no key where one is needed, or it is not known (401).
        """
        if self._keys is None:
            if self.settings.trusts_user_field:
                return claimed or DEFAULT_USER
            message = (
                "this server has no keys, so it answers on its own computer alone; start it with --keys FILE"
            )
            raise Refusal(401, message, "no_keys")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            message = "an API key is needed, in the header `Authorization: Bearer KEY`"
            raise Refusal(401, message, "missing_api_key")
        try:
            user = self._keys.user(key.strip())
        except (OSError, ValueError) as error:
            LOG.error("the file of keys cannot be read: %s", error)
            raise Refusal(503, "the file of keys cannot be read", "keys_unreadable", retry_after=5) from error
        if user is None:
            raise Refusal(401, "this API key is not known here", "invalid_api_key")
        return user

    @contextmanager
    def admitted(self, user: str) -> Iterator[None]:
        """A place among the requests in work.

        Raises:
            Refusal: the user has too many (429), or all have (503), or the server is about to end (503).
        """
        settings = self.settings
        if self.draining:
            raise Refusal(503, "the server is about to end", "shutting_down", retry_after=10)
        if self._running[user] >= settings.most_requests_per_user:
            message = (
                f"{settings.most_requests_per_user} requests of this user are in work already; wait for one"
            )
            raise Refusal(429, message, "too_many_requests", retry_after=1)
        if sum(self._running.values()) >= settings.most_requests:
            message = f"{settings.most_requests} requests are in work already; try again"
            raise Refusal(503, message, "overloaded", retry_after=1)
        self._running[user] += 1
        try:
            yield
        finally:
            self._running[user] -= 1
            if not self._running[user]:
                del self._running[user]

    @property
    def positions(self) -> int:
        """Most tokens of a prompt and its answer."""
        given = self.mind.positions
        return self.settings.most_positions if given >= UNBOUNDED else given

    def check_memory(self, memory: MemoryValue, more: int = 0) -> None:
        """Refuse a memory that keeps every token, and would keep too many with `more` (413)."""
        most = self.settings.most_memory_tokens
        if self.mind.grows and (tokens := self.mind.tokens_read(memory) + more) > most:
            message = (
                f"this model's memory keeps every token, and would have {tokens}, at most {most}: undo "
                "conversations, or reset it"
            )
            raise Refusal(413, message, "memory_full")

    def check_lesson(self, user: UserMemory, tokens: int) -> None:
        """Refuse a lesson that is too long or finds the memory full (413), or too many at once (429)."""
        if tokens:
            self.check_memory(user.memory, user.pending_tokens + tokens)
        most = self.settings.most_pending_tokens
        if tokens > most:
            message = f"{tokens} tokens are to be learned, at most {most} at once"
            raise Refusal(413, message, "lesson_too_long")
        if user.pending_tokens + tokens > most:
            message = (
                f"{user.pending_tokens} tokens of this user wait to be learned already, at most {most} may"
            )
            raise Refusal(429, message, "too_much_to_learn", retry_after=5)

    # Answers -------------------------------------------------------------------------------------------

    async def answer(
        self, user: UserMemory, prompt: list[int], sampling: Sampling
    ) -> AsyncGenerator[AnswerPart, None]:
        """The parts of the answers to a prompt, under the user's memory of now.

        Raises:
            Refusal: the machine has no memory for it (503), or the server ends (503).
        """
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[AnswerPart | None] = asyncio.Queue()

        def emit(part: AnswerPart) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        generation = Generation(self.mind, user.memory, prompt, sampling, emit, self.settings.prefill)
        try:
            job = self.scheduler.submit(user.folder.path.name, generation.turns())
        except JobCancelled as error:
            raise Refusal(503, "the server is about to end", "shutting_down", retry_after=10) from error
        done = asyncio.wrap_future(job.result)

        def end(future: asyncio.Future[None]) -> None:
            future.exception()  # it is told by `await done`, if anybody is left who listens
            parts.put_nowait(None)

        done.add_done_callback(end)
        try:
            while (part := await parts.get()) is not None:
                yield part
            with translated():
                await done
        finally:
            job.cancel()

    async def score(self, user: UserMemory, ids: list[int]) -> list[float | None]:
        """Next-token losses of ids as a text of its own. Refusal as in `answer`."""
        with translated():
            job = self.scheduler.submit(user.folder.path.name, self.mind.score(user.memory, ids))
            try:
                return await asyncio.wrap_future(job.result)
            finally:
                job.cancel()


@contextmanager
def translated() -> Iterator[None]:
    """Errors of the model inside the scope as refusals."""
    try:
        yield
    except JobCancelled as error:
        raise Refusal(503, "the server is about to end", "shutting_down", retry_after=10) from error
    except Exception as error:
        if is_out_of_memory(error):
            message = "there is not enough memory for this request; send a shorter one, or try again"
            raise Refusal(503, message, "out_of_memory", retry_after=5) from error
        LOG.error("the model failed: %s", type(error).__name__)
        raise Refusal(500, f"the model failed ({type(error).__name__})", "model_failed") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the accelerator had no memory left; on a CPU torch says so in words alone."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "not enough memory", "can't allocate memory")
    )
