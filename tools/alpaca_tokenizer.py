"""Tokenize Alpaca-style instruction data for fine-tuning, with masked prompts. See doc/data.md.

python tools/alpaca_tokenizer.py alpaca.json data/sft tokenizer.model --valid-fraction 0.1 --seq-len 2048
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Run the command; returns the exit code."""
    from internlm.utils.entry_point import run_command

    return run_command(run)


def run() -> int:
    """Parse the options and tokenize; returns the exit code.

    Raises:
        UserError: an option or the data is invalid.
    """
    from internlm.data.tokenize.alpaca import tokenize_alpaca
    from internlm.data.tokenize.prompts import PROMPT_FORMATS
    from internlm.utils.paths import local_path

    parser = argparse.ArgumentParser(description="Tokenize Alpaca-style instruction data, with masked prompts.")
    parser.add_argument("dataset", type=local_path, help="JSON array or JSON lines of {instruction, input, output}")
    parser.add_argument("output", type=local_path, help="output folder for train/<type>/ and valid/<type>/")
    parser.add_argument(
        "tokenizer", type=local_path, help="tokenizer.json, Hugging Face folder or SentencePiece .model"
    )
    parser.add_argument(
        "--valid-fraction",
        "--split_ratio",
        "--split-ratio",
        type=float,
        default=0.1,
        help="share of held-out documents (default: 0.1)",
    )
    parser.add_argument("--seed", type=int, help="seed of the split (default: 1024; 0 in InternEvo's format)")
    parser.add_argument("--type", default="en", help="name of the type folder (default: en)")
    parser.add_argument(
        "--prompt-format",
        choices=PROMPT_FORMATS,
        default="alpaca",
        help="alpaca (default), the tokenizer's chat template, or the format of InternEvo's tool, with its "
        "<|User|>:...<eoh><|Bot|>:...<eoa>, split and file names",
    )
    parser.add_argument(
        "--chat-template",
        action="store_const",
        const="chat-template",
        dest="prompt_format",
        help="same as --prompt-format chat-template",
    )
    parser.add_argument("--bos", action="store_true", help="begin every document with the bos token (alpaca only)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a tokenizer that exists only as code"
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="data.seq_len of the training: report documents that exceed it"
    )
    args = parser.parse_args()
    result = tokenize_alpaca(
        args.dataset,
        args.output,
        args.tokenizer,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        type_name=args.type,
        format_name=args.prompt_format,
        add_bos=args.bos,
        trust_remote_code=args.trust_remote_code,
        seq_len=args.seq_len,
    )
    for notice in result.notices:
        print(f"notice: {notice}", file=sys.stderr)
    print(
        f"{args.output}: {result.train_documents:,} train and {result.valid_documents:,} valid documents, "
        f"{result.tokens:,} tokens, {result.target_tokens:,} of them contribute loss; the longest document has "
        f"{result.longest:,}"
    )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
