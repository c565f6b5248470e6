"""Heartbeats over TCP, separate from the collectives, that tell which rank died or hangs.

A failed collective says only that *some* peer is gone; on a GPU it says nothing for a long time. So a thread in each
rank reports its step to rank 0 twice a second; rank 0 decides which rank failed, and tells the others in its replies.
Standard library only: a torch TCPStore blocks forever on a stopped server.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any

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
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.step = 0
        """The step this rank is at, set by the training thread."""
        self.failure: str | None = None
        self._own_error: str | None = None
        self._blocked = False  # a collective failed here for an unknown reason
        self.leaving = False
        """Set by the training thread once it has noticed a failure and is shutting down."""
        self._found_at = 0.0
        self._heard_at = time.monotonic()  # from rank 0
        self._wake, self._closed = threading.Event(), threading.Event()
        target = self._judge if rank == 0 else self._call
        self._thread = threading.Thread(target=target, args=(link,), name="liveness", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------- for the training thread

    def blame(self) -> str | None:
        """Return the failure behind a failed collective, or None if all ranks are alive and in step."""
        self.leaving = self._blocked = True
        self._wake.set()
        deadline = time.monotonic() + 3 * MISSED_BEATS * BEAT_S
        while not self.failure and time.monotonic() < deadline:
            if self.rank and time.monotonic() - self._heard_at > MISSED_BEATS * BEAT_S:
                self._found("rank 0 stopped responding")
            time.sleep(BEAT_S / 5)
        self._let_others_hear()
        return self.failure

    def report_failure(self, reason: str) -> bool:
        """Tell the others that this rank failed and why; return whether it was the first to fail."""
        self.leaving = True
        self._own_error = f"rank {self.rank}{SELF_REPORTED}{reason}"
        self._wake.set()
        deadline = time.monotonic() + MISSED_BEATS * BEAT_S
        while not self.failure and time.monotonic() < deadline:
            time.sleep(BEAT_S / 5)
        self._let_others_hear()
        return self.failure in (None, self._own_error)

    def close(self) -> None:
        """Stop watching, so that ranks may exit. Call it after a barrier: every rank must have reached it."""
        self._closed.set()
        self._wake.set()
        self._thread.join(MISSED_BEATS * BEAT_S)

    def _let_others_hear(self) -> None:
        if self.rank == 0:
            time.sleep(3 * BEAT_S)  # they ask once per beat, and nobody else can tell them

    # -------------------------------------------------------------------------- heartbeat thread

    def _found(self, failure: str) -> None:
        if not self.failure:
            self._found_at, self.failure = time.monotonic(), failure

    def _enforce(self) -> None:
        """Terminate the process if its training thread does not, since it may wait on a GPU for a dead peer."""
        patience = LEAVING_S if self.leaving else STUCK_S
        if self.failure and time.monotonic() - self._found_at > patience and not self._closed.is_set():
            message = f"rank {self.rank}: error: {self.failure}; this rank is stuck waiting for it and exits"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)

    def _call(self, link: socket.socket) -> None:
        """On ranks 1 and up: report to rank 0 and receive its verdict."""
        link.settimeout(self.timeout_s)
        try:
            with link, link.makefile("r") as answers:
                while not self._closed.is_set() and not self.failure:
                    self._wake.clear()
                    sign: dict[str, Any] = {"rank": self.rank, "step": self.step}
                    sign |= {"blocked": self._blocked, "error": self._own_error}
                    link.sendall(json.dumps(sign).encode() + b"\n")
                    verdict = json.loads(answers.readline())
                    self._heard_at = time.monotonic()
                    if verdict["failure"]:
                        self._found(verdict["failure"])
                    self._wake.wait(BEAT_S)
        except TimeoutError:
            self._found("rank 0 stopped responding")
        except (OSError, ValueError):  # the connection is broken or closed
            self._found("rank 0 died")
        while not self._closed.wait(BEAT_S):
            self._enforce()

    def _judge(self, listener: socket.socket) -> None:
        """On rank 0: receive heartbeats and reply with the first failure."""
        now = time.monotonic()
        peers = {rank: Peer(heard_at=now) for rank in range(self.size)}
        with selectors.DefaultSelector() as selector, listener:
            selector.register(listener, selectors.EVENT_READ)
            while not self._closed.is_set():
                for key, _ in selector.select(BEAT_S):
                    if key.fileobj is listener:
                        selector.register(listener.accept()[0], selectors.EVENT_READ, Line())
                    elif not self._hear(key.fileobj, key.data, peers):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]
                peers[0].hear(self.step, self._blocked)
                if failure := self._own_error or self._verdict(peers):
                    self._found(failure)
                self._enforce()
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]

    def _hear(self, link: socket.socket, line: "Line", peers: "dict[int, Peer]") -> bool:
        """Read and answer a heartbeat; return whether to keep the connection."""
        try:
            data = link.recv(4096)
            line.text += data
            if data and not line.text.endswith(b"\n"):
                return len(line.text) < 4096
            sign = json.loads(line.text) if data else {}
            line.text = b""
            if data:
                line.rank = int(sign["rank"])
                peers[line.rank].hear(int(sign["step"]), bool(sign["blocked"]))
                if sign["error"]:
                    self._found(sign["error"])
                link.sendall(json.dumps({"failure": self.failure}).encode() + b"\n")
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass  # broken, or not from a rank
        if line.rank and not self._closed.is_set():
            self._found(f"rank {line.rank} died")
        return False

    def _verdict(self, peers: "dict[int, Peer]") -> str | None:
        now = time.monotonic()
        short = MISSED_BEATS * BEAT_S
        blocked = [peer.blocked_at for peer in peers.values() if peer.blocked_at]
        patience = short if blocked else self.timeout_s
        silent = [rank for rank, peer in peers.items() if now - peer.heard_at > patience]
        if silent:
            return f"rank {min(silent, key=lambda rank: peers[rank].heard_at)} stopped responding"
        ahead = max(peer.step for peer in peers.values())
        for rank, peer in sorted(peers.items(), key=lambda item: item[1].step):
            # A rank that reports a failed collective is not hanging.
            if peer.step == ahead or peer.blocked_at:
                peer.behind_at = None
            elif peer.behind_at is None:
                peer.behind_at = now
            elif now - peer.behind_at > self.timeout_s or (blocked and now - min(blocked) > short):
                return f"rank {rank} hangs at step {peer.step}"
        return None


class Peer:
    """What rank 0 knows about a rank."""

    def __init__(self, heard_at: float) -> None:
        self.heard_at = heard_at
        self.step = 0
        self.behind_at: float | None = None
        """When another rank moved ahead while this one stayed at its step."""
        self.blocked_at: float | None = None

    def hear(self, step: int, blocked: bool) -> None:
        self.heard_at = time.monotonic()
        if step != self.step:
            self.step, self.behind_at = step, None
        if blocked and self.blocked_at is None:
            self.blocked_at = self.heard_at


class Line:
    """A partially received line and the rank it comes from."""

    def __init__(self) -> None:
        self.text = b""
        self.rank: int | None = None


def listen(everywhere: bool) -> socket.socket:
    """Open rank 0's socket on a free port, on all interfaces or only on loopback."""
    return socket.create_server(("" if everywhere else "127.0.0.1", 0), backlog=1024)
