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
        self.computed: list[Block] = []
        """Filled on rank 0 only."""
        world.only_on_rank0(self._load)
        self.saved = len(self.computed)

    def extend(
        self,
        count: int,
        measure: Callable[[int], Block],
        enough: Callable[[list[Block]], bool] = lambda _: False,
        label: str | None = None,
    ) -> None:
        """Compute blocks, one per rank at a time, until there are `count` or rank 0 has `enough`.

        `measure(i)` computes block i. With a `label`, and a store, there is a progress bar.
        """
        world, last_save = self.world, time.monotonic()
        shown = label and self.store and world.rank == 0

        def block(number: int) -> Block | None:
            return measure(number) if number < count else None

        with tqdm(total=count, unit="block", desc=label, disable=None if shown else True) as bar:
            while True:
                # Rank 0 decides for all ranks where to go on, and whether to save first.
                done = world.rank == 0 and enough(self.computed)
                due = time.monotonic() - last_save > SAVE_S
                first, due = world.broadcast_object((count if done else len(self.computed), due))
                bar.update(first - bar.n)
                if first >= count:
                    break
                if due:
                    world.only_on_rank0(self._save)
                    last_save = time.monotonic()

                # Each rank computes one block. Rank 0 keeps them in order and drops those after the last that is
                # needed, so that the result does not depend on the number of ranks.
                for result in world.to_rank0(partial(block, first + world.rank)):
                    if result and not enough(self.computed):
                        self.computed.append(result)
        world.only_on_rank0(self._save)

    def delete(self) -> None:
        """Delete the blocks from the store."""
        if self.store:
            for name in self.store.list(self.prefix):
                self.store.delete(name)

    def _save(self) -> None:
        """Store the blocks computed since the last call in one file, named by the number of its first."""
        if not self.store or self.saved == len(self.computed):
            return
        tensors = {}
        for number in range(self.saved, len(self.computed)):
            for name, tensor in self.computed[number].items():
                # safetensors requires that tensors share no memory.
                tensors[f"{number}.{name}"] = tensor.contiguous().clone()
        data = save(tensors)
        self.store.write(f"{self.prefix}{self.saved:08d}-{_digest(data)}.safetensors", data)
        self.saved = len(self.computed)

    def _load(self) -> None:
        """Load the stored blocks up to the first missing one."""
        if not self.store:
            return
        blocks: dict[int, Block] = {}
        for file in self.store.list(self.prefix):
            try:
                data = self.store.read(file)
                digest = file.removesuffix(".safetensors").removeprefix(self.prefix)[9:]
                if digest not in ("", _digest(data)):  # earlier versions named no digest
                    print(f"warning: {self.store}/{file} is damaged; its blocks are computed again", flush=True)
                    continue
                tensors = load(data)
            except (FileNotFoundError, SafetensorError):
                continue  # its blocks are computed again
            for key, tensor in tensors.items():
                number, _, name = key.partition(".")
                blocks.setdefault(int(number), {})[name] = tensor
        while block := blocks.get(len(self.computed)):
            self.computed.append(block)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
