"""cut_cross_entropy.vocab_parallel, of 25.6.4: VocabParallelOptions."""

from dataclasses import dataclass

import torch


def partition_n_into_range(n, rank, world_size):
    """(start, stop) of process `rank`'s share of n rows, the first shares one larger than the rest
    where n does not divide."""
    size, larger = divmod(n, world_size)
    start = rank * size + min(rank, larger)
    return start, start + size + (rank < larger)


@dataclass
class VocabParallelOptions:
    """This process's rows start .. stop - 1 of a vocabulary split over a process group.

    Constructible, so that code which prepares it runs; linear_cross_entropy does not take it.
    """

    start: int
    stop: int
    group: object = None
    reduce_e_grad: bool = True

    @classmethod
    def from_vocab(cls, vocab_size, group=None, reduce_e_grad=True):
        """Split as partition_n_into_range does."""
        distributed = torch.distributed
        rank, processes = distributed.get_rank(group), distributed.get_world_size(group)
        return cls(*partition_n_into_range(vocab_size, rank, processes), group, reduce_e_grad)
