"""Heartbeats over TCP, separate from the collectives, that tell which rank died or hangs.

A failed collective says only that *some* peer is gone; on a GPU it says nothing for a long time. So a thread in each
rank reports its step to rank 0 twice a second; rank 0 decides which rank failed, and tells the others in its replies.
Standard library only: a torch TCPStore blocks forever on a stopped server.
"""

import asyncio
import json
import os
import socket
import sys
import threading
import time
from contextlib import closing, suppress

BEAT_S = 0.5
"""Seconds between a rank's heartbeats."""


MISSED_BEATS = 5
"""Missed heartbeats after which a rank counts as silent once a collective has failed; before, the timeout applies."""


STUCK_S = 10.0
"""Seconds from a failure until the process is terminated, if its training thread does not notice the failure."""


LEAVING_S = 60.0
"""The same, if the training thread has noticed and is shutting down."""


SELF_REPORTED = " failed: "
"""Marks a failure that the rank reported itself."""


class Liveness:
    """One rank's heartbeat thread. `failure` is the first failure that any rank found, or None."""

    def __init__(self, rank: int, size: int, timeout_s: float, link: socket.socket) -> None:
        """`link` is the listening socket on rank 0 (see `listen`) and a connection to it on the other ranks."""
        self.rank, self.timeout_s = rank, timeout_s
        self.step = 0
        """The step this rank is at, set by the training thread."""
        self.failure: str | None = None
        self.leaving = False
        """Set by the training thread once it has noticed a failure and is shutting down."""
        self._error: str | None = None  # this rank's, as it reported it
        self._blocked = False  # a collective failed here for an unknown reason
        self._failed_at = 0.0
        self._heard_at = time.monotonic()  # from rank 0
        self._peers = {peer: Peer() for peer in range(size)}  # used by rank 0
        self._wake, self._closed = threading.Event(), threading.Event()
        target = self._judge if rank == 0 else self._report
        self._thread = threading.Thread(target=target, args=(link,), name="liveness", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------- for the training thread

    def blame(self) -> str | None:
        """Return the failure behind a failed collective, or None if all ranks are alive and in step."""
        self._blocked = True
        self._await_failure(3 * MISSED_BEATS * BEAT_S)
        return self.failure

    def report_failure(self, reason: str) -> bool:
        """Tell the others that this rank failed and why; return whether it was the first to fail."""
        self._error = f"rank {self.rank}{SELF_REPORTED}{reason}"
        self._await_failure(MISSED_BEATS * BEAT_S)
        return self.failure in (None, self._error)

    def close(self) -> None:
        """Stop watching, so that ranks may exit. Call it after a barrier: every rank must have reached it."""
        self._closed.set()
        self._wake.set()
        self._thread.join(MISSED_BEATS * BEAT_S)

    def _await_failure(self, patience: float) -> None:
        """Wait until this rank knows the first failure, and the others can know it too."""
        self.leaving = True
        self._wake.set()
        deadline = time.monotonic() + patience
        while not self.failure and time.monotonic() < deadline:
            if self._blocked and self.rank and time.monotonic() - self._heard_at > MISSED_BEATS * BEAT_S:
                self._fail("rank 0 stopped responding")
            time.sleep(BEAT_S / 5)
        if self.rank == 0:
            time.sleep(3 * BEAT_S)  # the others ask once per beat, and nobody else can tell them

    # ------------------------------------------------------------------------- heartbeat threads

    def _fail(self, failure: str) -> None:
        if not self.failure:
            self._failed_at, self.failure = time.monotonic(), failure

    def _enforce(self) -> None:
        """Terminate the process if its training thread does not, since it may wait on a GPU for a dead peer."""
        patience = LEAVING_S if self.leaving else STUCK_S
        if self.failure and time.monotonic() - self._failed_at > patience and not self._closed.is_set():
            message = f"rank {self.rank}: error: {self.failure}; this rank is stuck waiting for it and exits"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)

    def _report(self, link: socket.socket) -> None:
        """The thread of ranks 1 and up: report to rank 0 and receive its verdict."""
        # Once per beat, or at once if this rank has failed.
        link.settimeout(self.timeout_s)
        try:
            with link, link.makefile("r") as answers:
                while not self._closed.is_set() and not self.failure:
                    self._wake.clear()
                    beat = {"rank": self.rank, "step": self.step, "blocked": self._blocked, "error": self._error}
                    link.sendall(json.dumps(beat).encode() + b"\n")
                    verdict = json.loads(answers.readline())
                    self._heard_at = time.monotonic()
                    if verdict["failure"]:
                        self._fail(verdict["failure"])
                    self._wake.wait(BEAT_S)
        except TimeoutError:
            self._fail("rank 0 stopped responding")
        except (OSError, ValueError):  # the connection is broken or closed
            self._fail("rank 0 died")

        # A failure is known, and the training thread has to leave.
        while not self._closed.wait(BEAT_S):
            self._enforce()

    def _judge(self, listener: socket.socket) -> None:
        """The thread of rank 0: receive heartbeats, decide which rank failed first, and tell the others."""

        async def judge() -> None:
            server = await asyncio.start_server(self._hear, sock=listener, limit=4096, backlog=1024)
            while not self._closed.is_set():
                self._peers[0].hear(self.step, self._blocked)
                failure = self._error or self._verdict()
                if failure:
                    self._fail(failure)
                self._enforce()
                await asyncio.sleep(BEAT_S)
            server.close()

        asyncio.run(judge())

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the heartbeats on one connection until it breaks, or turns out not to be a rank's."""
        rank = None
        with closing(writer), suppress(OSError, ValueError, KeyError, TypeError):  # broken, or not from a rank
            while line := await reader.readline():
                beat = json.loads(line)
                rank = int(beat["rank"])
                self._peers[rank].hear(int(beat["step"]), bool(beat["blocked"]))
                if beat["error"]:
                    self._fail(beat["error"])
                writer.write(json.dumps({"failure": self.failure}).encode() + b"\n")
        if rank and not self._closed.is_set():
            self._fail(f"rank {rank} died")

    def _verdict(self) -> str | None:
        """Return which rank is silent or hangs, if any."""
        now, peers = time.monotonic(), self._peers
        short = MISSED_BEATS * BEAT_S
        blocked = [peer.blocked_at for peer in peers.values() if peer.blocked_at]

        # Silent: no heartbeat.
        patience = short if blocked else self.timeout_s
        silent = [rank for rank, peer in peers.items() if now - peer.heard_at > patience]
        if silent:
            return f"rank {min(silent, key=lambda rank: peers[rank].heard_at)} stopped responding"

        # Hanging: heartbeats, but others are ahead. A rank that reports a failed collective is not hanging.
        ahead = max(peer.step for peer in peers.values())
        for rank, peer in sorted(peers.items(), key=lambda item: item[1].step):
            if peer.step == ahead or peer.blocked_at:
                peer.behind_at = None
            elif peer.behind_at is None:
                peer.behind_at = now
            elif now - peer.behind_at > self.timeout_s or (blocked and now - min(blocked) > short):
                return f"rank {rank} hangs at step {peer.step}"
        return None


class Peer:
    """What rank 0 knows about a rank."""

    def __init__(self) -> None:
        self.heard_at = time.monotonic()
        self.step = 0
        self.behind_at: float | None = None
        """When another rank moved ahead while this one stayed at its step."""
        self.blocked_at: float | None = None
        """When a collective failed there."""

    def hear(self, step: int, blocked: bool) -> None:
        self.heard_at = time.monotonic()
        if step != self.step:
            self.step, self.behind_at = step, None
        if blocked and self.blocked_at is None:
            self.blocked_at = self.heard_at


def listen(everywhere: bool) -> socket.socket:
    """Open rank 0's socket on a free port, on all interfaces or only on loopback."""
    return socket.create_server(("" if everywhere else "127.0.0.1", 0), backlog=1024)
