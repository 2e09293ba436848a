"""Reading batches in lockstep on all ranks, so that a failed read leaves no other rank waiting in a collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from internlm.core.communication.collectives import all_reduce_async
from internlm.core.communication.objects import of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.failure import describe_error
from internlm.data.batch import Batch
from internlm.utils.errors import DataError, UserError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def read_together(batches: Iterable[Batch], context: ParallelContext) -> Iterator[Batch]:
    """Iterate over this rank's batches; each is yielded once all ranks have read theirs. Collective.

    Args:
        batches: this rank's batches, as many as on every other rank.
        context: this rank's position and process groups.

    Raises:
        DataError: a rank could not read its next batch, or its batches ended before those of another rank. Raised on
            all ranks at the same batch.
    """
    source: Iterator[Batch] | None = None
    while True:
        batch, failure = None, None
        try:
            source = iter(batches) if source is None else source
            batch = next(source, None)
        except (UserError, OSError) as error:
            failure = str(error)
        except Exception as error:
            # Most likely a bug, so the traceback is logged.
            logger.error("rank %d could not read a batch", context.rank, exc_info=error)
            failure = describe_error(error)
        votes = torch.tensor([int(failure is not None), int(batch is None and failure is None)])
        all_reduce_async(votes, context.world_group).wait()
        num_failed, num_ended = votes.tolist()
        if num_failed:
            raise DataError(_first_failure(of_all_ranks(context, failure)))
        if num_ended == context.world_size:
            return
        if num_ended:
            raise DataError(
                f"the batches of {num_ended} of {context.world_size} ranks ended before those of the others: give "
                "every rank the same number"
            )
        assert batch is not None
        yield batch


def _first_failure(failures: list[str | None]) -> str:
    failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
    rank, failure = failed[0]
    others = f" (and on {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
    return f"{f'rank {rank}: ' if len(failures) > 1 else ''}{failure}{others}"
