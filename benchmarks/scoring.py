"""Tokens per CPU second of scoring endings on this machine, against lm-evaluation-harness's backend of transformers.

    python benchmarks/scoring.py --dtype bfloat16

The same Llama shape with random weights, and the same requests: questions with contexts of 20 to 200 tokens and four
endings, of 1 to 30 tokens ("sentences") or of one token ("letters"). Interleaved rounds; the median of each. Tokens are
those of all requests, without padding; CPU seconds are those of one thread, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from lm_eval.models.huggingface import HFLM
from speed.llama_pair import VOCAB, llama_pair
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from internlm.apis.scoring import DEFAULT_TOKENS, Ending, score_endings


def requests(count: int, longest: int) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Four endings of each question, of 1 to `longest` tokens."""
    draw = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(1, VOCAB) for _ in range(draw.randint(low, high))]

    contexts = [tokens(20, 200) for _ in range(count)]
    return [(("", ""), context, tokens(1, longest)) for context in contexts for _ in range(4)]


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32], help="of lm-evaluation-harness")
    parser.add_argument("--batch-tokens", type=int, default=DEFAULT_TOKENS, help="ours")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, llama = llama_pair(options.dtype)
    # Requests are tokens already.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), pad_token="a")
    theirs = {
        size: HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=size, max_length=2048)
        for size in options.batch_size
    }
    for kind, longest in (("sentences", 30), ("letters", 1)):
        asked = requests(options.questions, longest)
        endings = [Ending([*context, *ending], len(context)) for _, context, ending in asked]
        num_tokens = sum(len(ending.ids) - 1 for ending in endings)
        cases: dict[str, Callable[[], object]] = {
            "ours": lambda endings=endings: score_endings(ours, endings, tokens_at_once=options.batch_tokens)
        }
        for size, model in theirs.items():
            cases[f"theirs, batch {size}"] = lambda model=model, asked=asked: model._loglikelihood_tokens(
                asked, disable_tqdm=True
            )
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(options.rounds):
            for name, run in cases.items():
                started = time.process_time()
                run()
                seconds[name].append(time.process_time() - started)
        rates = {name: num_tokens / statistics.median(values) for name, values in seconds.items()}
        print(f"{kind}: {len(endings)} endings, {num_tokens:,} tokens")
        for name, rate in rates.items():
            spread = ", ".join(f"{num_tokens / value:.0f}" for value in sorted(seconds[name], reverse=True))
            print(f"  {name}: {rate:.0f} tokens per CPU second ({spread})")
        best = max(rate for name, rate in rates.items() if name != "ours")
        print(f"  ours by the best of theirs: {rates['ours'] / best:.2f}")


if __name__ == "__main__":
    main()
