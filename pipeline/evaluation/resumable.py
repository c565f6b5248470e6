"""Measurements in blocks: independent of the number of ranks, and resumable after a crash."""

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from pipeline.distributed.world import World
from pipeline.storage.store import Store

SAVE_S = 20.0  # seconds between saves of the results


Block = dict[str, Tensor]  # on the CPU


class Blocks:
    """The blocks computed so far, in order: on rank 0, and in files in the run's store.

    A block is a function of its number, so a world of any size computes the same blocks. `identity` is everything that
    they depend on: it names the files, so a later process with the same identity continues after the stored blocks.
    """

    def __init__(self, world: World, store: Store | None, kind: str, identity: object) -> None:
        self.world, self.store = world, store
        text = json.dumps(identity, sort_keys=True, default=str)
        self.prefix = f"evaluation/{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}-"
        self.found: list[Block] = []
        """Filled on rank 0 only."""
        world.only_on_rank0(self._load)
        self.kept = len(self.found)

    def extend(
        self,
        count: int,
        measure: Callable[[int], Block],
        enough: Callable[[list[Block]], bool] = lambda _: False,
        progress: str | None = None,
    ) -> None:
        """Compute blocks, one per rank at a time, until there are `count` or rank 0 has `enough`.

        `measure(i)` computes block i. `progress` is the label of a progress bar; None shows no bar.
        """
        world, saved = self.world, time.monotonic()
        with tqdm(
            total=count, unit="block", desc=progress, disable=None if progress and not world.rank else True
        ) as bar:
            while True:
                done = world.rank == 0 and enough(self.found)
                due = time.monotonic() - saved > SAVE_S
                first, due = world.broadcast_object((count if done else len(self.found), due))
                bar.update(first - bar.n)
                if first >= count:
                    break
                if due:
                    world.only_on_rank0(self._save)
                    saved = time.monotonic()
                number = first + world.rank
                work: Callable[[], Block | None] = partial(measure, number) if number < count else lambda: None
                for block in world.to_rank0(work):
                    # Drop surplus blocks, so that the result does not depend on the number of ranks.
                    if block and not enough(self.found):
                        self.found.append(block)
        world.only_on_rank0(self._save)

    def delete(self) -> None:
        """Delete the blocks from the store."""
        if self.store:
            for name in self.store.list(self.prefix):
                self.store.delete(name)

    def _save(self) -> None:
        if self.store and self.kept < len(self.found):
            new = enumerate(self.found[self.kept :], self.kept)
            # safetensors requires that tensors share no memory.
            tensors = {f"{i}.{name}": tensor.contiguous().clone() for i, block in new for name, tensor in block.items()}
            self.store.write(f"{self.prefix}{self.kept:08d}.safetensors", save(tensors))
            self.kept = len(self.found)

    def _load(self) -> None:
        """Load the stored blocks up to the first missing one."""
        if not self.store:
            return
        blocks: dict[int, Block] = {}
        for file in self.store.list(self.prefix):
            try:
                tensors = load(self.store.read(file))
            except (FileNotFoundError, SafetensorError):
                continue  # its blocks are computed again
            for key, tensor in tensors.items():
                number, _, name = key.partition(".")
                blocks.setdefault(int(number), {})[name] = tensor
        while block := blocks.get(len(self.found)):
            self.found.append(block)
