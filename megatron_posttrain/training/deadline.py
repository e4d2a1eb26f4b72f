"""The end of a batch job's time: the run stops while there is time for a checkpoint."""

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

# Set by launch/slurm/job.sh: seconds since 1970, and a file by which the job knows that it is to be queued again.
END, OUT_OF_TIME = "POSTTRAIN_JOB_END", "POSTTRAIN_OUT_OF_TIME"
SAVE_BYTES_PER_S = 1e9  # of all ranks together: a slow shared file system
STEPS = 8  # whose longest counts: the first ones of a run compile kernels


class Deadline:
    """Of a job that says when it ends; without one it never comes."""

    def __init__(self, save_bytes: int, clock: Callable[[], float] = time.time) -> None:
        end = os.environ.get(END)
        self.end = float(end) if end else None
        self._save_seconds = save_bytes / SAVE_BYTES_PER_S
        self._clock, self._last = clock, clock()
        self._seconds: deque[float] = deque(maxlen=STEPS)

    def near(self) -> bool:
        """Whether two more steps and a checkpoint would not end in time. To be asked once after every step; the time
        between two questions, a step and what was saved in it, is what is expected of the next."""
        if self.end is None:
            return False
        now = self._clock()
        self._seconds.append(now - self._last)
        self._last = now
        return now + 2 * max(self._seconds) + self._save_seconds > self.end

    def tell_job(self) -> None:
        """That this run stops because of its time."""
        if file := os.environ.get(OUT_OF_TIME):
            Path(file).touch()
