"""Tokens per second of generation on this machine: against transformers' `generate`, and eight texts against one.

    python benchmarks/generation.py --dtype bfloat16

The same Llama shape with random weights, greedy, in interleaved rounds; the median of each. "one" is one text alone,
"8 one by one" eight texts after each other, "8 together" the same texts in rows of one cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from speed.llama_pair import VOCAB, llama_pair

from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each text")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours, theirs = llama_pair(options.dtype, options.device)
    prompts = torch.randint(1, VOCAB, (8, options.prompt), generator=torch.Generator().manual_seed(0))
    prompts = prompts.to(options.device)
    sampling = Sampling(max_new_tokens=options.new)
    lists = prompts.tolist()

    def transformers_alone() -> None:
        ids = prompts[:1]
        theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, do_sample=False, pad_token_id=0
        )

    def transformers_batch() -> None:
        theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=options.new,
            do_sample=False,
            pad_token_id=0,
        )

    cases: dict[str, tuple[int, Callable[[], object]]] = {
        "transformers, one": (1, transformers_alone),
        "ours, one": (1, lambda: generate(ours, lists[:1], sampling)),
        "transformers, 8 in a batch": (8, transformers_batch),
        "ours, 8 one by one": (8, lambda: [generate(ours, [each], sampling) for each in lists]),
        "ours, 8 together": (8, lambda: generate(ours, lists, sampling, num_rows=8)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, (_, run) in cases.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    rates = {name: count * options.new / statistics.median(seconds[name]) for name, (count, _) in cases.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f} tokens/s")
    print(f"one, ours by transformers: {rates['ours, one'] / rates['transformers, one']:.2f}")
    print(f"8 together by one by one: {rates['ours, 8 together'] / rates['ours, 8 one by one']:.2f}")
    print(f"8, ours by transformers: {rates['ours, 8 together'] / rates['transformers, 8 in a batch']:.2f}")


if __name__ == "__main__":
    main()
