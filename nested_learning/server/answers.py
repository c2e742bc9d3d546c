"""Chats and completions: from a request to an answer, and what is learned from it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from nested_learning.continual.inputs import vocabulary_size
from nested_learning.server.forms import AnswerForm, event
from nested_learning.server.generation import AnswerPart
from nested_learning.server.journal import Entry
from nested_learning.server.prefixes import Turn, chain
from nested_learning.server.prompt import fitting_ids, turn_ends
from nested_learning.server.refusal import Refusal, invalid
from nested_learning.server.sampling import Sampling, spread
from nested_learning.server.schemas import ChatRequest, CompletionRequest, SampledRequest, parsed
from nested_learning.server.service import Service
from nested_learning.server.settings import MODES
from nested_learning.server.user import UserMemory

LONGEST_ID = 20  # digits of a token


@dataclass(frozen=True)
class ConversationNews:
    """The turns of a conversation that were not there in an earlier request.

    Attributes:
        turns: all turns without those of the system.
        hashes: hashes of their beginnings.
        known: number of turns that are known.
        conversation: name of the conversation.
    """

    turns: list[Turn]
    hashes: list[str]
    known: int
    conversation: str

    @classmethod
    def of(cls, user: UserMemory, messages: list[Turn]) -> ConversationNews:
        """The news of a request's messages for a user."""
        turns = [turn for turn in messages if turn[0] != "system"]
        hashes = chain(user.folder.path.name, turns)
        place = user.state.known.place(turns, hashes)
        return cls(turns, hashes, place.known, place.conversation)

    def texts(self, roles: frozenset[str]) -> list[str]:
        """New texts of these roles."""
        return [text for role, text in self.turns[self.known :] if role in roles and text.strip()]


class Answering:
    """One request for answers, with everything that it holds until it has ended.

    Args:
        service: the server.
        body: the request's JSON value.
        is_chat: whether it is a chat or a plain completion, from which nothing is learned.
        user: name of the user.
    """

    def __init__(self, service: Service, body: object, is_chat: bool, user: str) -> None:
        self._service = service
        self._request: Any = parsed(ChatRequest if is_chat else CompletionRequest, body)
        self._user_name = user
        self._held = AsyncExitStack()
        self._news: ConversationNews | None = None
        self._begun = time.perf_counter()
        self.is_streamed = bool(self._request.stream)
        self.form = AnswerForm(
            service.settings.served_name,
            service.mind.tokenizer,
            is_chat,
            with_logprobs=self._request.top is not None,
            with_usage=bool(self._request.stream_options and self._request.stream_options.include_usage),
        )
        if self._request.model != self.form.model:
            message = f"there is no model {self._request.model!r} here, only {self.form.model!r}"
            raise Refusal(404, message, "model_not_found", param="model")

    async def begin(self) -> None:
        """Everything up to the first token: a place, the memory with all that was told, the prompt.

        Raises:
            Refusal: as in `Service.admitted`, `Memories.using`, `check_lesson`; or the prompt does not fit.
        """
        service, request = self._service, self._request
        self._held.enter_context(service.admitted(self._user_name))
        self._user = await self._held.enter_async_context(service.memories.using(self._user_name))
        await self._user.caught_up()
        if self.form.is_chat:
            prompts = [await self._chat_prompt(request.turns)]
        else:
            prompts = await asyncio.to_thread(self._plain_prompts, request.prompt)
        samplings = [self._sampling(prompt) for prompt in prompts]
        self.form.prompt_tokens = sum(map(len, prompts))
        service.metrics.prompt_tokens.inc(self.form.prompt_tokens)
        self._parts = await self._held.enter_async_context(
            aclosing(self._all_parts(list(zip(prompts, samplings, strict=True))))
        )
        self._first = await anext(self._parts)  # what fails so far can still be told by a status
        service.metrics.first_token.observe(time.perf_counter() - self._begun)

    async def close(self) -> None:
        """Let go of everything; an answer that is being written ends."""
        await self._held.aclose()

    # The prompt ----------------------------------------------------------------------------------------

    async def _chat_prompt(self, turns: list[Turn]) -> list[int]:
        service, mode = self._service, MODES[self._service.settings.learn]
        mind = service.mind
        for_answer = self._most_tokens(0)
        try:
            ids = await asyncio.to_thread(fitting_ids, mind.tokenizer, turns, service.positions, for_answer)
        except ValueError as error:
            raise invalid(str(error), "messages", "context_length_exceeded") from error
        self._news = ConversationNews.of(self._user, turns)
        told = await asyncio.to_thread(mind.lesson_ids, self._news.texts(mode))
        service.check_lesson(self._user, len(told))
        service.metrics.told_tokens.inc(len(told))
        return ids

    def _plain_prompts(self, given: Any) -> list[list[int]]:
        """Ids of each prompt."""
        mind = self._service.mind
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        prompts = [mind.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in given]
        vocab_size = vocabulary_size(mind.model)
        if not prompts or not all(prompts):
            raise invalid("a prompt has no tokens", "prompt")
        if any(not 0 <= token < vocab_size for prompt in prompts for token in prompt):
            raise invalid(f"ids must be from 0 to {vocab_size - 1}", "prompt")
        most = self._service.settings.most_choices
        if len(prompts) * (self._request.n or 1) > most:
            raise invalid(f"at most {most} answers to one request", "prompt")
        for prompt in prompts:
            room = self._service.positions - self._most_tokens(len(prompt))
            if len(prompt) > room:
                message = f"the prompt has {len(prompt)} tokens, there is room for {room} with its answer"
                raise invalid(message, "prompt", "context_length_exceeded")
        return prompts

    def _most_tokens(self, prompt_length: int) -> int:
        """Most tokens of the answer: those asked for, or the default, which gives way to the prompt."""
        settings, positions = self._service.settings, self._service.positions
        asked, name = self._request.longest
        if asked is None:
            return max(1, min(settings.max_tokens, positions // 2, positions - prompt_length))
        if asked > settings.most_new_tokens:
            raise invalid(f"{name} is {asked}, at most {settings.most_new_tokens} here", name)
        if asked >= positions:
            message = f"{name} is {asked}, but there are {positions} positions for prompt and answer"
            raise invalid(message, name, "context_length_exceeded")
        return asked

    def _sampling(self, prompt: list[int]) -> Sampling:
        request: SampledRequest = self._request
        settings = self._service.settings
        if (request.n or 1) > settings.most_choices:
            raise invalid(f"n is {request.n}, at most {settings.most_choices} here", "n")
        return Sampling(
            max_tokens=self._most_tokens(len(prompt)),
            temperature=settings.temperature if request.temperature is None else request.temperature,
            top_p=settings.top_p if request.top_p is None else request.top_p,
            seed=self._seed(prompt),
            n=request.n or 1,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=self._bias(request.logit_bias or {}),
            stop=(*request.stops, *(turn_ends(self.form.tokenizer) if self.form.is_chat else ())),
            top_logprobs=request.top,
        )

    def _seed(self, prompt: list[int]) -> int:
        """The request's seed; without one, one of the server's seed, user, memory and prompt, or any."""
        if self._request.seed is not None:
            return self._request.seed
        if self._service.settings.seed is None:
            return secrets.randbits(63)
        place = f"{self._user.folder.path.name}/{self._user.state.applied}/{prompt}"
        return spread(f"{self._service.settings.seed}/{place}")

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        vocab_size = vocabulary_size(self._service.mind.model)
        for token, value in given.items():
            is_id = token.isdecimal() and len(token) <= LONGEST_ID and int(token) < vocab_size
            if not is_id or not -100 <= value <= 100:
                named = token[:LONGEST_ID]
                message = f"logit_bias has {named}: {value}; expected ids below {vocab_size} and -100 to 100"
                raise invalid(message, "logit_bias")
        return {int(token): value for token, value in given.items()}

    # The answer ----------------------------------------------------------------------------------------

    async def _all_parts(self, prompts: list[tuple[list[int], Sampling]]) -> AsyncGenerator[AnswerPart, None]:
        for index, (prompt, sampling) in enumerate(prompts):
            async with aclosing(self._service.answer(self._user, prompt, sampling)) as parts:
                async for part in parts:
                    choice = index * sampling.n + part.choice
                    yield AnswerPart(choice, part.text, part.tokens, part.count, part.finish)

    async def whole(self) -> dict[str, Any]:
        """The answers as one JSON value, once what is to be learned is in the journal."""
        self.form.add(self._first)
        async for part in self._parts:
            self.form.add(part)
        await self._end()
        return self.form.whole()

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as the events of a stream. The last ones come when what is to be learned is in the
        journal; an error is an event of its own, after which the stream ends without them."""
        try:
            yield self.form.add(self._first)
            async for part in self._parts:
                if events := self.form.add(part):
                    yield events
            await self._end()
            yield self.form.ending()
        except Refusal as refusal:
            yield event(refusal.body())

    async def _end(self) -> None:
        """Have the new turns learned, and the answer if that is wanted and it is the only one."""
        service = self._service
        service.metrics.answer_tokens.inc(self.form.answer_tokens)
        service.metrics.answer.observe(time.perf_counter() - self._begun)
        if self._news is not None and MODES[service.settings.learn]:
            await self._user.remember(self._entry)

    def _entry(self, number: int) -> Entry | None:
        """The journal's entry of what is new now: since this answer began, another one may have taught it."""
        assert self._news is not None
        turns = list(self._news.turns)
        if len(self.form.texts) == 1:
            turns.append(("assistant", self.form.texts[0]))
        news = ConversationNews.of(self._user, turns)
        texts = news.texts(MODES[self._service.settings.learn])
        if not texts:
            return None
        heads = [h for h, (role, _) in zip(news.hashes, turns, strict=True) if role == "user"]
        new, head = news.hashes[news.known :], heads[-1] if heads else None
        return Entry(number, news.conversation, tuple(texts), tuple(new), head)
