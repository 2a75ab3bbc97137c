"""What becomes of a job when one of its processes fails: one message, from the first, and an end for all."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from fused_dpo_engine.distributed.ranks import Ranks, join_ranks
from fused_dpo_engine.errors import OtherRankFailedError, SaveError, TrainingDivergedError, UserError

PATIENCE = 3.0
"""Seconds in which a process with an unexpected error waits to be told that another one failed before."""
EXPECTED = (UserError, SaveError, TrainingDivergedError)
"""Errors that are a message to the user."""
_jobs = count()


@contextmanager
def processes(tensor_parallel: int, timeout_minutes: float, *, alone: bool) -> Iterator[Ranks]:
    """Join the processes of the job for the block; of the errors that end it, the first is raised, and once.

    Args:
        tensor_parallel, alone: see `join_ranks`.
        timeout_minutes: how long a collective waits for the other ranks.

    Raises:
        OtherRankFailedError: in place of an error that follows from another rank's, or that another has raised too.
    """
    timeout = timedelta(minutes=timeout_minutes)
    ours = not dist.is_initialized()
    interrupts.wanted = interrupts.insisted = False
    ranks = join_ranks(tensor_parallel, timeout, alone=alone)
    failures = Failures(timeout) if ranks.size > 1 else None
    finished = ranks.size == 1
    try:
        yield ranks
        finished = True
    except Exception as error:
        if failures is not None and not failures.is_first(error):
            raise OtherRankFailedError from error
        raise
    finally:
        # After a failure nothing is taken down in order: other ranks may be in the middle of a collective.
        if ours and finished and dist.is_initialized():
            dist.destroy_process_group()


class Failures:
    """Tells which rank has failed first, by a counter that all ranks reach: torchrun's store, or rank 0's."""

    def __init__(self, timeout: timedelta) -> None:
        self._store, _, _ = next(rendezvous("env://", timeout=timeout))
        self._key = f"fused-dpo/failures/{next(_jobs)}"

    def is_first(self, error: Exception) -> bool:
        """Tell whether this process is to say what went wrong.

        An error that is no message of ours may come from a collective that lost another process. That one may have been
        killed and say nothing: torchrun does, and stops the others, for which is waited here.
        """
        deadline = time.monotonic() + (0 if isinstance(error, EXPECTED) else PATIENCE)
        try:
            while time.monotonic() < deadline:
                if interrupts.wanted or self._store.add(self._key, 0):
                    return False
                time.sleep(0.05)
            return self._store.add(self._key, 1) == 1
        except KeyboardInterrupt:
            return False
        except dist.DistError:  # the rank that has the store is gone; without torchrun nobody else would say anything
            return True


_STOPPING = "\nfused-dpo: stopping after this step"
_AGAIN = "; once more to stop at once"


class _Interrupts:
    """Requests to stop, from the keyboard or a scheduler."""

    def __init__(self) -> None:
        self.wanted = False
        """Whether one has come that was put off."""
        self.insisted = False
        """Whether a second one has ended what was to be finished first."""

    @contextmanager
    def put_off(self, *, once: bool) -> Iterator[None]:
        """Take note of requests within the block and go on, so that a run stops between two steps.

        Args:
            once: let the second request end the block at once. Not for several ranks, which have to stop together, and
                where torchrun sends on what each of them may have got from the terminal before.

        Raises:
            KeyboardInterrupt: at the second request.
        """
        if threading.current_thread() is not threading.main_thread():  # no other may set handlers
            yield
            return

        def note(*_: object) -> None:
            if self.wanted and once:
                self.insisted = True
                raise KeyboardInterrupt
            if not self.wanted and os.environ.get("RANK", "0") == "0":
                print(_STOPPING + (_AGAIN if once else ""), file=sys.stderr)
            self.wanted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


interrupts = _Interrupts()


@contextmanager
def told_to_torchrun() -> Iterator[None]:
    """Write an unexpected error to the file from which torchrun, which has to have started this process, reports."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OtherRankFailedError, *EXPECTED)):
            get_error_handler().record_exception(error)
        raise
