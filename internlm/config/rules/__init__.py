"""Rules between keys. They run before any process group exists, and all problems are reported together.

Some checks of InternEvo have no counterpart. A vocabulary that is not divisible by the ranks is padded inside the
shards; messages between stages always overlap with computation; too few micro-batches leave a schedule idle but do not
break it; and a gradient of ZBH1 counts when it arrives, whatever overlaps are enabled.
"""

from internlm.config.rules.all_rules import find_problems
from internlm.config.rules.ranks import data_ranks, expert_inner_ranks, expert_ranks, weight_data_ranks

__all__ = ["data_ranks", "expert_inner_ranks", "expert_ranks", "find_problems", "weight_data_ranks"]
