"""What must hold between keys. Every check runs before a process group exists, and all problems are reported together.

The numbers in the rules are those of InternEvo's 24 groups of checks; a rule without one is ours. Groups 1, 2, 4, 7, 8
and 12 are the loader's and the schema's own types; 13 concerns accelerators that this project does not have. Not needed
are 11, as a vocabulary that the ranks do not divide is filled up inside their shards; 15, as messages between stages
always travel beside the work; the micro-batches of 16, as fewer leave a schedule idle but do not break it; and for ZBH1
the overlaps of 17, as the gradient of a weight is counted when it is there, early or late.
"""

from internlm.config.rules.all_rules import find_problems
from internlm.config.rules.ranks import data_ranks, weight_data_ranks

__all__ = ["data_ranks", "find_problems", "weight_data_ranks"]
