"""Runs the attention plans of all ranks in one process, without tensors, and checks what they promise."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from internlm.core.parallel.context.attention_plan import AttentionPlan, BlockMessage, Rows
from internlm.core.parallel.context.token_cut import TokenCut


def check_plans(plans: Sequence[AttentionPlan], lengths: Sequence[int], cut: TokenCut, window: int | None) -> None:
    """Check that each query sees exactly its keys, each once, and that each gradient comes home, once.

    Also that a block is there when it is used or passed on, and that messages are received as they are sent.

    Args:
        plans: of all ranks.
        lengths: of the documents.
        cut: whose tokens the plans are for.
        window: of the plans.

    Raises:
        AssertionError: a plan is wrong.
    """
    seen = np.zeros((sum(lengths), sum(lengths)), dtype=np.int64)
    for plan in plans:
        _check_messages(plan, plans)
        _count_seen_keys(plan, cut, window, seen)
    document = np.repeat(np.arange(len(lengths)), lengths)
    expected = (document[:, None] == document) & _mask(np.arange(len(document)), np.arange(len(document)), window)
    assert (seen == expected).all(), "a query does not see exactly its keys, each once"
    _check_gradients(plans)


def _mask(q: NDArray[np.int64], k: NDArray[np.int64], window: int | None) -> NDArray[np.bool_]:
    distance: NDArray[np.int64] = q[:, None] - k
    return (distance >= 0) & (distance < (len(q) + len(k) + int(q.max()) if window is None else window))


def _check_messages(plan: AttentionPlan, plans: Sequence[AttentionPlan]) -> None:
    for number, step in enumerate(plan.steps):
        for sends, receives in (("key_sends", "key_receives"), ("gradient_sends", "gradient_receives")):
            for here, there in ((sends, receives), (receives, sends)):
                for message in getattr(step, here):
                    peer = plans[message.peer]
                    mirrored = BlockMessage(message.source, plan.rank, message.arrival)
                    assert message.arrival > number and message.peer != plan.rank
                    assert getattr(peer.steps[number], there).count(mirrored) == 1, f"{message} has no counterpart"
                    assert plan.rows_of(message) == peer.rows_of(mirrored), f"{message}: ranks expect other rows"


def _count_seen_keys(plan: AttentionPlan, cut: TokenCut, window: int | None, seen: NDArray[np.int64]) -> None:
    own = cut.indices(plan.rank)
    assert len(own) == plan.num_tokens
    held = {plan.rank: own}
    arriving: dict[int, list[int]] = defaultdict(list)
    for number, step in enumerate(plan.steps):
        for source in arriving.pop(number, []):
            assert source not in held, f"block {source} arrives twice"
            held[source] = _rows_of(cut.indices(source), plan.rows_held(source))
        for message in step.key_sends:
            assert message.source in held, f"rank {plan.rank} sends block {message.source} before it has it"
        for message in step.key_receives:
            arriving[message.arrival].append(message.source)
        for source, tiles in step.computations:
            for tile in tiles:
                q, k = own[tile.q_start : tile.q_stop], held[source][tile.k_start : tile.k_stop]
                assert len(q) == tile.q_stop - tile.q_start > 0 and len(k) == tile.k_stop - tile.k_start > 0
                if tile.distance is None:
                    seen[np.ix_(q, k)] += 1
                    continue
                # The mask of a tile counts rows, so they are consecutive tokens.
                assert (np.diff(q) == 1).all() and (np.diff(k) == 1).all() and q[0] - k[0] == tile.distance
                seen[np.ix_(q, k)] += _mask(q, k, window)
    assert not arriving, "a block arrives behind the last step"


def _rows_of(tokens: NDArray[np.int64], rows: Rows) -> NDArray[np.int64]:
    return np.concatenate([tokens[start:stop] for start, stop in rows])


def _check_gradients(plans: Sequence[AttentionPlan]) -> None:
    """At the end, each source has what each rank computed for it, once, and no other rank has anything."""
    # (rank that holds them, source) -> the ranks that contributed.
    held: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    arriving: dict[int, list[tuple[tuple[int, int], Counter[int]]]] = defaultdict(list)
    computed: dict[int, Counter[int]] = defaultdict(Counter)
    for number in range(1 + max(len(plan.steps) for plan in plans)):
        for place, contributors in arriving.pop(number, []):
            held[place] += contributors
        for plan in plans:
            step = plan.steps[number] if number < len(plan.steps) else None
            for source, _ in () if step is None else step.computations:
                held[plan.rank, source][plan.rank] += 1
                computed[source][plan.rank] += 1
        for plan in plans:
            for message in () if number >= len(plan.steps) else plan.steps[number].gradient_sends:
                moved = held.pop((plan.rank, message.source), Counter())
                arriving[message.arrival].append(((message.peer, message.source), moved))
    assert not arriving
    for (rank, source), contributors in held.items():
        assert rank == source or not contributors, f"rank {rank} keeps gradients of rank {source}"
        assert rank != source or contributors == computed[source], f"gradients of rank {source}: {contributors}"
