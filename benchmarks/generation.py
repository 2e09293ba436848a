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
from transformers import LlamaConfig, LlamaForCausalLM

from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.config.schema import ModelConfig
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.registry import build_model

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 32000, 768, 2048, 12, 12, 4


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
    dtype = getattr(torch, options.dtype)
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        num_kv_attention_heads=KV_HEADS,
        intermediate_size=FFN,
        dtype=f"torch.{options.dtype}",
    )
    with torch.device("meta"):
        ours = build_model("LLAMA2", config)
    parallelize(ours, ParallelContext.create(device=options.device), seed=1)
    ours.eval()
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    theirs = theirs.to(options.device, dtype).eval()
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
