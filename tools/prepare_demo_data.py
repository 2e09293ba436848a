"""Create the demo's corpus from the text of Python and its installed packages. See doc/data.md.

python tools/prepare_demo_data.py --out data/demo
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path


def main() -> int:
    """Run the command; returns the exit code."""
    from internlm.utils.entry_point import run_command

    return run_command(run)


def run() -> int:
    """Parse the options and prepare the corpus; returns the exit code.

    Raises:
        UserError: an option is invalid, or there is too little text.
    """
    from internlm.data.demo_corpus import DemoSettings, prepare_demo_corpus
    from internlm.data.tokenize.train_bpe import MIN_VOCAB
    from internlm.utils.errors import DataError
    from internlm.utils.paths import local_path

    defaults = DemoSettings()
    parser = argparse.ArgumentParser(description="Create the demo's corpus from text that is on this machine.")
    parser.add_argument("--out", type=local_path, default=Path("data/demo"), help="output folder (default: data/demo)")
    parser.add_argument("--max-bytes", type=float, default=defaults.max_bytes, help="maximum bytes of text")
    parser.add_argument("--vocab", type=int, default=defaults.vocab_size, help="vocabulary size of the tokenizer")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="number of processes (default: all cores)"
    )
    args = parser.parse_args()
    if not 0 < args.max_bytes < math.inf:
        raise DataError(f"--max-bytes {args.max_bytes}: must be above 0")
    if args.processes < 1:
        raise DataError(f"--processes {args.processes}: must be at least 1")
    if args.vocab < MIN_VOCAB:
        raise DataError(f"--vocab {args.vocab}: must be at least {MIN_VOCAB}, for the bytes and the special tokens")
    facts, made = prepare_demo_corpus(args.out, DemoSettings(int(args.max_bytes), args.vocab), args.processes)
    print(
        f"{args.out}: {'prepared' if made else 'already prepared'}; {facts['documents']:,} documents, "
        f"{facts['bytes']:,} bytes, {facts['tokens']:,} tokens ({facts['valid_tokens']:,} held out), "
        f"{facts['bytes_per_token']:.2f} bytes/token, unigram entropy {facts['unigram_entropy']:.3f} nats/token"
    )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
