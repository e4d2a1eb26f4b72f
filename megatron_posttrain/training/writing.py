"""A checkpoint's files, written by a thread of every rank while training goes on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_posttrain.upstream.megatron import written_by_threads


class Writing:
    """This rank's share of a checkpoint that is being written, of a copy in host memory.
    `requests`: megatron-core's AsyncRequests, one a directory; `state`: is written when all ranks' files are there."""

    def __init__(self, requests: Sequence[Any], state: dict[str, Any]) -> None:
        self.state, self._requests = state, requests
        self._arguments = [list(request.async_fn_args) for request in requests]
        for request, arguments in zip(requests, self._arguments, strict=True):
            if request.preload_fn is not None:
                arguments[1] = request.preload_fn()
        self._written = ThreadPoolExecutor(1, "checkpoint").submit(self._write)

    def _write(self) -> None:
        with written_by_threads():
            for request, arguments in zip(self._requests, self._arguments, strict=True):
                if request.async_fn is not None:
                    request.async_fn(*arguments)

    @property
    def done(self) -> bool:
        return self._written.done()

    def wait(self) -> None:
        """Until this rank's files are written. Raises what went wrong with them."""
        self._written.result()

    def finish(self) -> None:
        """Collective, when every rank has waited: the files that tell of all ranks' files."""
        for function in (function for request in self._requests for function in request.finalize_fns):
            function()
