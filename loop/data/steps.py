"""The dataset of steps: item k is what this process trains on in step k."""

from dataclasses import dataclass
from typing import NamedTuple

from torch.utils.data import Dataset

from loop.data.batch import Batch
from loop.data.collate import collate
from loop.data.examples import Examples
from loop.data.order import cut, draw, forward_tokens


class Step(NamedTuple):
    """One optimizer step; all but `micro_batches` is equal on every process."""

    step: int
    epoch: int
    rows: list[int]  # indices into the dataset as loaded, of all processes, in drawn order
    target_tokens: int  # the divisor: targets of all rows of the step, over all processes
    tokens: int
    padded_tokens: int  # that the forwards compute: without padding as many as `tokens`
    num_micro_batches: int
    micro_batches: list[tuple[int, Batch]]  # this process's, each with its number k in the step


@dataclass(frozen=True)
class Steps(Dataset[Step]):
    """Maps the number of a step to the step, without state: item k is always the same."""

    examples: Examples
    positions: int  # rows of the whole run, repeats counted
    global_batch_size: int
    micro_batch_tokens: int
    seed: int
    padding_free: bool
    process_index: int = 0
    num_processes: int = 1

    def __getitem__(self, step: int) -> Step:
        epoch, drawn = draw(
            step, len(self.examples), self.positions, self.global_batch_size, self.seed
        )
        lengths = self.examples.lengths[drawn]
        packed = self.padding_free
        micro_batches = cut(lengths, self.micro_batch_tokens, self.num_processes, packed)
        mine = range(self.process_index, len(micro_batches), self.num_processes)
        batches = [collate(self.examples.read(drawn[micro_batches[k]]), packed) for k in mine]
        return Step(
            step=step,
            epoch=epoch,
            rows=self.examples.rows[drawn].tolist(),
            target_tokens=int(self.examples.num_targets[drawn].sum()),
            tokens=int(lengths.sum()),
            padded_tokens=sum(forward_tokens(lengths[piece], packed) for piece in micro_batches),
            num_micro_batches=len(micro_batches),
            micro_batches=list(zip(mine, batches)),
        )
