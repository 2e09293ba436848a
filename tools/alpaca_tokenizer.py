"""Tokenize Alpaca-style instruction data for fine-tuning, prompts masked. See doc/data.md.

python tools/alpaca_tokenizer.py alpaca.json data/sft tokenizer.model --valid-fraction 0.1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Run the command; returns the exit code."""
    from internlm.data.tokenize.alpaca import tokenize_alpaca
    from internlm.utils.errors import UserError

    parser = argparse.ArgumentParser(description="Tokenize Alpaca-style instruction data, prompts masked.")
    parser.add_argument("dataset", type=Path, help="JSON array or .jsonl of {instruction, input, output}")
    parser.add_argument("output", type=Path, help="folder for train/<type>/ and valid/<type>/")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json, Hugging Face folder or SentencePiece .model")
    parser.add_argument("--valid-fraction", "--split_ratio", type=float, default=0.1, help="default: 0.1")
    parser.add_argument("--seed", type=int, default=1024, help="of the split (default: 1024)")
    parser.add_argument("--type", default="en", help="name of the type folder (default: en)")
    parser.add_argument("--chat-template", action="store_true", help="use the tokenizer's chat template for the prompt")
    parser.add_argument("--bos", action="store_true", help="begin every document with the bos token")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a tokenizer folder that is nothing else"
    )
    args = parser.parse_args()
    try:
        result = tokenize_alpaca(
            args.dataset,
            args.output,
            args.tokenizer,
            valid_fraction=args.valid_fraction,
            seed=args.seed,
            type_name=args.type,
            chat_template=args.chat_template,
            add_bos=args.bos,
            trust_remote_code=args.trust_remote_code,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.output}: {result.train_documents:,} train and {result.valid_documents:,} valid documents, "
        f"{result.tokens:,} tokens, {result.target_tokens:,} of them contribute loss"
    )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
