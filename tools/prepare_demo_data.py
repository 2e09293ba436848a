"""Make the demo's corpus from the text of Python and its installed packages. See doc/data.md.

python tools/prepare_demo_data.py --out data/demo
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    """Run the command; returns the exit code."""
    from internlm.data.demo_corpus import DemoSettings, prepare_demo_corpus
    from internlm.utils.errors import UserError
    from internlm.utils.paths import local_path

    defaults = DemoSettings()
    parser = argparse.ArgumentParser(description="Make the demo's corpus from text that is on this machine.")
    parser.add_argument("--out", type=local_path, default=Path("data/demo"), help="folder to make (default: data/demo)")
    parser.add_argument("--max-bytes", type=float, default=defaults.max_bytes, help="bytes of text")
    parser.add_argument("--vocab", type=int, default=defaults.vocab_size, help="ids of the tokenizer")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: all cores")
    args = parser.parse_args()
    try:
        facts, made = prepare_demo_corpus(args.out, DemoSettings(int(args.max_bytes), args.vocab), args.processes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: {'prepared' if made else 'already prepared'}; {facts['documents']:,} documents, "
        f"{facts['bytes']:,} bytes, {facts['tokens']:,} tokens ({facts['valid_tokens']:,} held out), "
        f"{facts['bytes_per_token']:.2f} bytes/token, unigram entropy {facts['unigram_entropy']:.3f} nats/token"
    )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
