"""Which rank of a pipeline holds which stage of the model: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Place(NamedTuple):
    """Where a stage is: a rank along the pipeline axis, and which of its chunks."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class Placement:
    """The stages 0 to `num_stages - 1`, in the order of the model, over the ranks of a pipeline.

    Attributes:
        num_ranks: ranks of the pipeline.
        num_chunks: stages that each of them holds.
        shape: "loop": stage = chunk * num_ranks + rank; "v": the first chunks run down the ranks and the second chunks
            back up, so rank 0 holds both ends of the model.
    """

    num_ranks: int
    num_chunks: int = 1
    shape: Literal["loop", "v"] = "loop"

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_chunks < 1:
            raise ValueError(f"a pipeline of {self.num_ranks} ranks with {self.num_chunks} chunks")
        if self.shape == "v" and self.num_chunks != 2:
            raise ValueError(f"a V has 2 chunks a rank, not {self.num_chunks}")

    @property
    def num_stages(self) -> int:
        """Stages of the whole model."""
        return self.num_ranks * self.num_chunks

    def stage_of(self, rank: int, chunk: int) -> int:
        """The stage that a rank's chunk is."""
        if self.shape == "v" and chunk == 1:
            return self.num_stages - 1 - rank
        return chunk * self.num_ranks + rank

    def place_of(self, stage: int) -> Place:
        """Where a stage is."""
        chunk, rank = divmod(stage, self.num_ranks)
        if self.shape == "v" and chunk == 1:
            rank = self.num_ranks - 1 - rank
        return Place(rank, chunk)

    def after(self, rank: int, chunk: int) -> Place | None:
        """Where the output of a chunk goes; None for the last stage."""
        stage = self.stage_of(rank, chunk) + 1
        return None if stage == self.num_stages else self.place_of(stage)

    def before(self, rank: int, chunk: int) -> Place | None:
        """Where the input of a chunk comes from; None for the first stage."""
        stage = self.stage_of(rank, chunk) - 1
        return None if stage < 0 else self.place_of(stage)
