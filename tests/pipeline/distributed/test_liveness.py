"""Dead and hanging ranks are identified; the ranks are threads of this process."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.distributed import liveness
from pipeline.distributed.liveness import Liveness, listen


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BEAT_S", 0.05)
    monkeypatch.setattr(liveness, "MISSED_BEATS", 40)  # a busy machine may not run a thread for a second


class Group:
    """Ranks from 0 up, and raw connections that act as misbehaving ranks."""

    def __init__(self) -> None:
        self.ranks: list[Liveness] = []
        self.links: list[socket.socket] = []

    def start(self, size: int, real: int, timeout_s: float = 60) -> list[Liveness]:
        """Start `real` of `size` ranks; `link` provides the others."""
        listener = listen(everywhere=False)
        self.address = listener.getsockname()
        self.ranks.append(Liveness(0, size, timeout_s, listener))
        self.ranks += [Liveness(rank, size, timeout_s, self.link()) for rank in range(1, real)]
        return self.ranks

    def link(self) -> socket.socket:
        self.links.append(socket.create_connection(self.address, 5))
        return self.links[-1]


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    for rank in made.ranks:
        rank.close()
    for link in made.links:
        link.close()


def until(true: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_healthy_ranks_find_nothing(group: Group) -> None:
    ranks = group.start(3, 3)
    for step in range(3):
        for rank in ranks:
            rank.step = step
        time.sleep(0.1)
    assert [rank.failure for rank in ranks] == [None, None, None]
    assert ranks[1].blame() is None


def test_all_learn_of_the_first_confession(group: Group) -> None:
    ranks = group.start(3, 3)
    assert ranks[2].report_failure("no space left")
    assert not ranks[1].report_failure("something else")
    until(lambda: all(rank.failure for rank in ranks))
    assert {rank.failure for rank in ranks} == {"rank 2 failed: no space left"}


def test_a_closed_connection_is_a_death(group: Group) -> None:
    ranks = group.start(3, 2)
    link = group.link()
    link.sendall(b'{"rank": 2, "step": 5, "blocked": false, "error": null}\n')
    assert link.recv(100) == b'{"failure": null}\n'
    link.close()
    until(lambda: all(rank.failure == "rank 2 died" for rank in ranks))
    assert ranks[1].blame() == "rank 2 died"


def test_silence_is_found_at_the_time_out_or_when_a_collective_fails(group: Group) -> None:
    ranks = group.start(3, 2, timeout_s=1.5)
    assert ranks[0].failure is None
    until(lambda: all(rank.failure == "rank 2 stopped responding" for rank in ranks))

    other = Group()
    ranks = other.start(3, 2, timeout_s=1000)
    try:
        assert ranks[1].blame() == "rank 2 stopped responding"
    finally:
        for rank in ranks:
            rank.close()


def test_a_rank_that_lives_but_stays_behind_hangs(group: Group) -> None:
    ranks = group.start(3, 3, timeout_s=1000)
    for rank, step in zip(ranks, (8, 8, 7), strict=True):
        rank.step = step
    time.sleep(0.3)
    assert ranks[0].blame() == "rank 2 hangs at step 7"


def test_rank_0_is_found_by_the_others(group: Group) -> None:
    listener = listen(everywhere=False)
    link = socket.create_connection(listener.getsockname(), 5)
    stopped = Liveness(1, 2, 1000, link)  # nobody answers
    assert stopped.blame() == "rank 0 stopped responding"
    stopped.close()
    link = socket.create_connection(listener.getsockname(), 5)
    orphan = Liveness(1, 2, 1000, link)
    accepted = [listener.accept()[0] for _ in range(2)]
    for end in (*accepted, listener):
        end.close()
    until(lambda: orphan.failure == "rank 0 died")
    orphan.close()


@pytest.mark.parametrize("nonsense", [b"GET / HTTP/1.1\r\n\r\n\n", b"\xff\xfe\n", b"{}\n", b"[1]\n", b"x" * 9000])
def test_strangers_are_ignored(group: Group, nonsense: bytes) -> None:
    ranks = group.start(2, 2)
    stranger = group.link()
    stranger.sendall(nonsense)
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(100) == b""
    time.sleep(0.2)
    assert [rank.failure for rank in ranks] == [None, None]


def test_a_slow_first_step_is_no_hang(group: Group) -> None:
    ranks = group.start(2, 2, timeout_s=2)
    time.sleep(2.5)
    for step in range(1, 4):  # rank 1 reports a beat later than rank 0
        ranks[0].step = step
        time.sleep(0.1)
        ranks[1].step = step
        time.sleep(0.1)
    assert [rank.failure for rank in ranks] == [None, None]
