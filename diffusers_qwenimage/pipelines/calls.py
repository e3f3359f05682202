"""Calls of pipelines from several threads: one after the other where they share a scheduler."""

import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Call = TypeVar("Call", bound=Callable[..., Any])
_LOCKS: "weakref.WeakKeyDictionary[Any, threading.RLock]" = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def one_at_a_time(call: Call) -> Call:
    """A pipeline's `__call__` that waits for a call of another thread over the same scheduler.

    A scheduler of diffusers holds the state of one run. Pipelines made by `from_pipe` share it.
    """

    @wraps(call)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _MAKING:
            lock = _LOCKS.setdefault(self.scheduler, threading.RLock())
        with lock:
            return call(self, *args, **kwargs)

    return cast(Call, called)
