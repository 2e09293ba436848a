"""Which context ranks are neighbors on the rings along which keys and values travel.

With a double ring, context ranks form windows: keys and values travel around the ring of a window, then to the same
place of the next window. Source: LoongTrain, Gu et al. 2024, arXiv:2406.18485; the order of ranks is InternEvo's.
"""

from __future__ import annotations

from internlm.utils.layout_checks import check_window


def ring_order(context: int, window_size: int, interleaved: bool = False) -> list[list[int]]:
    """The windows of the context ranks, each in the order of its ring.

    Consecutive ranks form a window. Interleaved, every two windows share 2 w consecutive ranks, of which the first
    window has the even ones and the second the odd ones. Place p of window i, with w ranks each, is

        i w + p;   interleaved: 2 p + i w for even i, 2 p + 1 + (i - 1) w for odd i.

    Args:
        context: number of context ranks.
        window_size: number of ranks of a window, w; with 1 or `context`, there is one ring over all ranks.
        interleaved: see above.

    Returns:
        One list for each window, in the order of the outer ring.

    Raises:
        LayoutError: windows of this size do not divide the ranks, or an odd number of them is interleaved.
    """
    check_window(window_size, context, interleaved=interleaved)
    windows, places = range(context // window_size), range(window_size)
    if not interleaved:
        return [[window * window_size + place for place in places] for window in windows]
    return [[2 * place + window % 2 + window // 2 * 2 * window_size for place in places] for window in windows]
