"""Who takes part: the nodes of a run find each other, agree, and notice when one is gone.

One key-value store (`torch.distributed.TCPStore`) on the head node serves the whole run; torch's own
rendezvous then shares its port. Every node signs in with what it was started with, so that a mismatch is
refused before any model is built. Afterwards every node counts up its own key each second: a node that
stops counting is dead, cut off or frozen, which TCP alone tells nobody, since a machine that loses power
closes no connection.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch.distributed import DistError, DistNetworkError, TCPStore

from megatron_posttrain.errors import UserError

MUST_AGREE = ("run_id", "nodes", "processes", "command", "versions")
QUESTIONS = 1000.0  # a second that waiting nodes put to the store; it answers some 15,000
FAILURE_GRACE = 15.0  # seconds for the other nodes' workers to notice by themselves that one has failed
ANOTHER_PORT = "choose another port, the same on all nodes (--master-port, or --rdzv-endpoint HOST:PORT)"


@dataclass(frozen=True)
class Card:
    """What a node signs in with. Rank -1: the head numbers the nodes as they come."""

    host: str
    rank: int
    run_id: str
    nodes: int
    processes: int
    command: str
    versions: str

    @property
    def name(self) -> str:
        return f"{self.host} (node rank {self.rank})"


def resolve(host: str, port: int) -> list:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UserError(
            f"the head node '{host}' is not known to {socket.gethostname()} ({error.strerror}): "
            "give a name or an address that every node can resolve"
        ) from None


def is_local(host: str) -> bool:
    """Whether `host` is an address of this machine: only then can a socket be bound to it."""
    for family, kind, protocol, _, address in resolve(host, 0):
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


class RollCall:
    """Joins the store at `head:port`; node rank 0, or the first node at the head's address, serves it.

    Args:
        card: what this node was started with.
        join_timeout: seconds to wait for the head and for the other nodes.
        stopped: asked while waiting; the wait ends with `InterruptedError` when it returns True.

    Raises:
        UserError: unreachable head, port in use, nodes that do not agree or do not come.
    """

    def __init__(self, card: Card, head: str, port: int, *, join_timeout: float, stopped: Callable[[], bool]) -> None:
        # A connection that is refused is told in one line below; c10d's own warnings come by the dozen.
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        self.card, self.head, self.port = card, head, port
        self.join_timeout, self._stopped = join_timeout, stopped
        self._deadline = time.monotonic() + join_timeout
        self.serves = card.rank == 0 or (card.rank < 0 and is_local(head))
        self.store = self._serve_or_join()
        self.members = self._sign_in()
        self._changed = {member.rank: time.monotonic() for member in self.members}
        self._answered = time.monotonic()
        self.failed_at: float | None = None
        self.failure = ""
        self._reported = threading.Event()

    # Joining

    def _serve_or_join(self) -> TCPStore:
        if self.serves:
            try:
                socket.create_server(("", self.port)).close()
                store = self._open()
                # Two nodes that opened it at the same moment, inside one process: one of them is the head.
                self.serves = store.add("roll/heads", 1) == 1
                return store
            except (OSError, DistNetworkError) as error:
                # Two nodes on one machine both find the head's address local: the second one joins.
                number = getattr(error, "errno", None) or errno.EADDRINUSE
                if number != errno.EADDRINUSE or self.card.rank == 0:
                    raise UserError(
                        f"port {self.port} of {self.card.host} cannot be opened ({os.strerror(number)}): {ANOTHER_PORT}"
                    ) from None
                self.serves = False
        self._wait_for_head()
        return self._open()

    def _open(self) -> TCPStore:
        try:
            # multi_tenant: torch's rendezvous and the workers share this process's server.
            store = TCPStore(
                self.head,
                self.port,
                is_master=self.serves,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=max(5.0, min(60.0, self._remaining()))),
            )
            if self.serves:
                store.set("roll/run_id", self.card.run_id)
            run_id = store.get("roll/run_id").decode()
        except DistError as error:
            if self.serves and isinstance(error, DistNetworkError):
                raise  # somebody else has opened the port in the meantime
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.head}:{self.port} answers, but not as the head of a run ({reason}): {ANOTHER_PORT}"
            ) from None
        if run_id != self.card.run_id:
            raise UserError(
                f"{self.head}:{self.port} serves the run '{run_id}', not '{self.card.run_id}': {ANOTHER_PORT}"
            )
        return store

    def _wait_for_head(self) -> None:
        while True:
            resolve(self.head, self.port)
            try:
                socket.create_connection((self.head, self.port), timeout=5.0).close()
                return
            except OSError as error:
                if self._remaining() <= 0:
                    raise UserError(
                        f"{self.card.host} could not reach the head node {self.head}:{self.port} for "
                        f"{self.join_timeout:.0f} s ({error.strerror or error}): check that the head runs there, that "
                        "name and port are the same on all nodes, and that no firewall is between them"
                    ) from None
            self._pause(0.5)

    def _sign_in(self) -> list[Card]:
        if self.card.rank < 0:
            self.card = replace(self.card, rank=0 if self.serves else self.store.add("roll/numbered", 1))
        self.store.set(f"roll/beat/{self.card.rank}", "0")
        arrival = self.store.add("roll/arrivals", 1) - 1
        self.store.set(f"roll/card/{arrival}", json.dumps(asdict(self.card)))
        if self.serves:
            cards, problem = self._judge()
            # One key for all of them: nodes that each read every card would ask nodes x nodes times.
            self.store.set("roll/cards", json.dumps([asdict(card) for card in cards]))
            self.store.set("roll/problem", problem)
            if problem:
                self._pause(2.0)  # the others have yet to read it
        else:
            problem = self._judgement()
        if problem:
            raise UserError(problem)
        members = [Card(**card) for card in json.loads(self.store.get("roll/cards"))]
        return sorted(members, key=lambda card: card.rank)

    def _judge(self) -> tuple[list[Card], str]:
        """On the head: waits for all cards; those, and what is wrong with them or the empty string."""
        cards: list[Card] = []
        while len(cards) < self.card.nodes:
            if self.store.check([f"roll/card/{len(cards)}"]):
                cards.append(Card(**json.loads(self.store.get(f"roll/card/{len(cards)}"))))
                problem = disagreement(cards)
                if problem:
                    return cards, problem
            elif self._remaining() <= 0:
                came = ", ".join(card.name for card in cards)
                absent = sorted(set(range(self.card.nodes)) - {card.rank for card in cards})
                return cards, (
                    f"{len(cards)} of {self.card.nodes} nodes came within {self.join_timeout:.0f} s: {came}; missing: "
                    f"node rank {', '.join(map(str, absent))}. Start those, or give the number there is (--nnodes)"
                )
            else:
                self._pause(0.1)
        return cards, ""

    def _judgement(self) -> str:
        grace = 10.0  # the head's clock started earlier or later than ours
        try:
            while not self.store.check(["roll/problem"]):
                if self._remaining() < -grace:
                    return f"the head node {self.head} did not answer within {self.join_timeout + grace:.0f} s"
                self._pause(self.patience)
            return self.store.get("roll/problem").decode()
        except DistError:
            return f"the head node {self.head} went away before all nodes had come: see its own messages"

    @property
    def patience(self) -> float:
        """Seconds between two questions of a node that waits: all nodes together ask `QUESTIONS` times a second."""
        return max(0.1, self.card.nodes / QUESTIONS)

    def _remaining(self) -> float:
        return self._deadline - time.monotonic()

    def _pause(self, seconds: float) -> None:
        if self._stopped():
            raise InterruptedError
        time.sleep(seconds)

    # Watching

    def watch(self, node_timeout: float, on_lost: Callable[[str], None], on_stop: Callable[[], None]) -> None:
        """Watches in threads. Calls `on_lost(message)` once when a node has been silent for `node_timeout`
        seconds or has failed `FAILURE_GRACE` seconds ago, and `on_stop()`, perhaps more than once, when a
        node has passed on a request to stop."""
        for work in (lambda: self._beat(on_stop), lambda: self._guard(node_timeout, on_lost)):
            threading.Thread(target=work, daemon=True).start()

    def _beat(self, on_stop: Callable[[], None]) -> None:
        """Counts up this node's key; on the head, notes whose keys have changed."""
        keys = [f"roll/beat/{member.rank}" for member in self.members]
        counts = [b""] * len(keys)
        with contextlib.suppress(DistError):  # the head is gone: nothing is noted any more, `_guard` tells
            store = self.store.clone()  # type: ignore[attr-defined]  # the main thread's connection may be blocked in a call
            while True:
                time.sleep(1.0)
                store.add(f"roll/beat/{self.card.rank}", 1)  # blocks for ever, if the head is frozen
                self._answered = time.monotonic()
                if store.check(["roll/stop"]):
                    on_stop()
                if self.failed_at is None and store.check(["roll/failure"]):
                    self.failure, self.failed_at = store.get("roll/failure").decode(), time.monotonic()
                if self.serves:
                    before, counts = counts, store.multi_get(keys)
                    for member, old, new in zip(self.members, before, counts, strict=True):
                        if new != old or store.check([f"roll/ended/{member.rank}"]):
                            self._changed[member.rank] = time.monotonic()

    def _guard(self, node_timeout: float, on_lost: Callable[[str], None]) -> None:
        while not self._reported.wait(0.5):
            if lost := self.silent(node_timeout):
                on_lost(f"{lost} did not answer for {node_timeout:.0f} s: it died, froze or lost its network")
                return
            if self.failed_at is not None and time.monotonic() - self.failed_at > FAILURE_GRACE:
                on_lost(self.failure)
                return

    def silent(self, seconds: float) -> str:
        """Names of the nodes that have been silent for `seconds`, as far as this node can know: the head
        knows of all, the others of the head. Empty if there are none."""
        now = time.monotonic()
        if not self.serves:
            return self.members[0].name if now - self._answered > seconds else ""
        return ", ".join(m.name for m in self.members if now - self._changed[m.rank] > seconds)

    def pass_on_stop(self) -> None:
        self.store.set("roll/stop", "1")

    def report(self, status: int, text: str, *, failed: bool) -> None:
        """Tells the others how this node ended. The first to fail is the one that the others name."""
        self._reported.set()
        self.store.set(f"roll/ended/{self.card.rank}", "")
        if failed:
            self.store.compare_set("roll/failure", "", text)
        order = self.store.add("roll/outcomes", 1) - 1
        self.store.set(f"roll/outcome/{order}", json.dumps({"status": status, "text": text}))

    def reported(self) -> int:
        """How many nodes have."""
        return int(self.store.add("roll/outcomes", 0))

    def outcomes(self) -> list[dict]:
        """`{"status", "text"}` of the nodes that have reported, the first to end first. For one node to ask."""
        return [json.loads(self.store.get(f"roll/outcome/{i}")) for i in range(self.reported())]

    def leave(self, seconds: float) -> None:
        """The head leaves last: srun ends the other nodes' launchers as soon as one has failed."""
        if self.serves:
            self.store.set("roll/leave", "")
            time.sleep(1.0)
            return
        deadline = time.monotonic() + seconds
        while not self.store.check(["roll/leave"]) and time.monotonic() < deadline:
            time.sleep(self.patience)


def disagreement(cards: list[Card]) -> str:
    """What the card that came last contradicts, or the empty string."""
    last = cards[-1]
    one, two = sorted((cards[0], last), key=lambda card: card.rank)
    for field in MUST_AGREE:
        ours, theirs = getattr(one, field), getattr(two, field)
        if ours != theirs:
            return f"the nodes differ in {field}: '{ours}' on {one.name}, '{theirs}' on {two.name}: start all alike"
    if not 0 <= last.rank < last.nodes:
        return f"{last.host} has node rank {last.rank}, but with {last.nodes} nodes they go from 0 to {last.nodes - 1}"
    for other in cards[:-1]:
        if other.rank == last.rank:
            return f"{other.host} and {last.host} both have node rank {last.rank}: give each its own --node-rank"
    return ""
