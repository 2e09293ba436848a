"""Placement of the stages of a model on the ranks of a pipeline. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Place(NamedTuple):
    """Location of a stage: index along the pipeline axis, and chunk number on that rank."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class Placement:
    """Places the stages 0 to `num_stages - 1`, in model order, on the ranks of a pipeline.

    Attributes:
        num_ranks: ranks of the pipeline.
        num_chunks: stages on each rank.
        shape: "loop": stage = chunk * num_ranks + rank; "v": the first chunks in the order of the ranks, the second
            chunks in reverse, so rank 0 holds both ends of the model.
    """

    num_ranks: int
    num_chunks: int = 1
    shape: Literal["loop", "v"] = "loop"

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_chunks < 1:
            raise ValueError(f"num_ranks = {self.num_ranks} and num_chunks = {self.num_chunks}: both must be 1 or more")
        if self.shape == "v" and self.num_chunks != 2:
            raise ValueError(f'num_chunks = {self.num_chunks}: shape "v" has 2 chunks per rank')

    @property
    def num_stages(self) -> int:
        """Number of stages of the whole model."""
        return self.num_ranks * self.num_chunks

    def stage_of(self, rank: int, chunk: int) -> int:
        """The stage that is chunk `chunk` of rank `rank`."""
        if self.shape == "v" and chunk == 1:
            return self.num_stages - 1 - rank
        return chunk * self.num_ranks + rank

    def place_of(self, stage: int) -> Place:
        """The location of a stage."""
        chunk, rank = divmod(stage, self.num_ranks)
        if self.shape == "v" and chunk == 1:
            rank = self.num_ranks - 1 - rank
        return Place(rank, chunk)

    def after(self, rank: int, chunk: int) -> Place | None:
        """The location of the next stage; None for the last stage."""
        stage = self.stage_of(rank, chunk) + 1
        return None if stage == self.num_stages else self.place_of(stage)

    def before(self, rank: int, chunk: int) -> Place | None:
        """The location of the previous stage; None for the first stage."""
        stage = self.stage_of(rank, chunk) - 1
        return None if stage < 0 else self.place_of(stage)
