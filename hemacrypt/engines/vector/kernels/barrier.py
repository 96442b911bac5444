"""Threads that work on one request together: the same function in each, with cheap barriers in between.

Kernels release the GIL, so a few Python threads share a machine's cores well enough, provided that meeting costs
little: a request passes some hundred barriers in a few milliseconds. A barrier is therefore a word in memory that
threads spin on in compiled code, without the GIL; whoever has spun for long gives its turn away, so that a machine
with more threads than cores gets on too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from hemacrypt.engines.vector.kernels.modular import intrinsic, kernel

# What the words that a team shares stand for; each has a cache line of its own.
_ARRIVED, _ROUND, _BROKEN = 0, 16, 32
# Looks at the word before a thread gives its turn away: some tens of microseconds.
_SPINS = 10_000


class BrokenTeamError(RuntimeError):
    """Another part failed, so a barrier was never reached by all."""


def _word(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Return the address of ``words[place]``."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@intrinsic
def _load(typingctx: Any, words: Any, place: Any) -> Any:
    """Load a word that other threads change."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word(context, builder, signature, arguments), "acquire", 8)

    return types.int64(words, types.intp), generate


@intrinsic
def _store(typingctx: Any, words: Any, place: Any, value: Any) -> Any:
    """Store a word that other threads look at."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[2], _word(context, builder, signature, arguments), "release", 8)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.int64), generate


@intrinsic
def _increase(typingctx: Any, words: Any, place: Any) -> Any:
    """Add one to a word and return what it was, in one step that no other thread can come between."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", _word(context, builder, signature, arguments), one, "acq_rel")

    return types.int64(words, types.intp), generate


@intrinsic
def _give_way(typingctx: Any) -> Any:
    """Let another thread run: POSIX' sched_yield, which every process has."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), ()), "sched_yield")
        return builder.call(function, ())

    return types.int32(), generate


@kernel
def meet(words: Any, parts: Any) -> Any:
    """Wait until all parts have come here, and return whether they did; False if one failed and will not come.

    For kernels that want a barrier inside; everybody else calls `Team.barrier`.

    Parameters
    ----------
    words:
        `Team.words`.
    parts:
        `Team.threads`.
    """
    if parts == 1:
        return True
    number = _load(words, _ROUND)
    if _increase(words, _ARRIVED) == parts - 1:
        _store(words, _ARRIVED, 0)
        _store(words, _ROUND, number + 1)
        return True
    looks = 0
    while _load(words, _ROUND) == number:
        if _load(words, _BROKEN) != 0:
            return False
        looks += 1
        if looks > _SPINS:
            _give_way()
    return True


@kernel
def _break(words: Any) -> None:
    """Let nobody wait any longer."""
    _store(words, _BROKEN, 1)


class Team:
    """A few threads that run one function together; the calling thread is part 0.

    A team serves one request at a time: `run` must not be called from two threads at once, nor from within a run.
    The other threads are daemons and sleep between requests.

    Parameters
    ----------
    threads:
        Number of parts, at least 1. With one part nothing is started and barriers cost nothing.

    Attributes
    ----------
    words:
        What `meet` takes, for kernels that want a barrier inside.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a team of {threads} threads")
        self.threads = threads
        self.words = np.zeros(48, dtype=np.int64)
        self._function: Callable[[int], None] | None = None
        self._errors: list[BaseException] = []
        self._starts = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._done = threading.Semaphore(0)
        for part, start in enumerate(self._starts, start=1):
            threading.Thread(target=self._serve, args=(part, start), name=f"team-{part}", daemon=True).start()

    def run(self, function: Callable[[int], None]) -> None:
        """Call ``function(part)`` in every thread and wait for all of them.

        Raises
        ------
        BaseException
            What the first part that failed raised; the others are then stopped at their next barrier.
        """
        if self.threads == 1:
            function(0)
            return
        self._function, self._errors = function, []
        self.words[:] = 0
        for start in self._starts:
            start.release()
        self._attempt(0)
        for _ in self._starts:
            self._done.acquire()
        self._function = None
        if self._errors:
            errors, self._errors = self._errors, []
            raise errors[0]

    def barrier(self) -> None:
        """Wait until every part has come here; what they wrote before is then seen by all.

        Raises
        ------
        BrokenTeamError
            If another part failed and will not come.
        """
        if not meet(self.words, self.threads):
            raise BrokenTeamError("another part failed")

    def _serve(self, part: int, start: threading.Semaphore) -> None:
        while True:
            start.acquire()
            self._attempt(part)
            self._done.release()

    def _attempt(self, part: int) -> None:
        function = self._function
        assert function is not None  # noqa: S101 - set before anybody is woken
        try:
            function(part)
        except BaseException as error:
            self._errors.append(error)
            _break(self.words)
