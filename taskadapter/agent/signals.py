"""What SIGTERM and Ctrl-C do while something waits for its end."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def at_a_signal(act: Callable[[], None]) -> Iterator[None]:
    """Do something at SIGTERM and Ctrl-C, on the running event loop, for the duration of the block.

    Prefect's command would kill the agent at the second signal. In a thread other than the main one
    nothing happens: signals are for whoever has started that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in former:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number, handler in former.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
