"""Tokenize text into the .bin / .bin.meta format, or train a tokenizer on it. See doc/data.md.

python tools/tokenizer.py corpus.jsonl --tokenizer tokenizer.json --output data/train/en/corpus.bin
python tools/tokenizer.py texts/ --train 8192 --tokenizer tokenizer.json
python tools/tokenizer.py big.jsonl.zst --tokenizer llama.model --output data/train/en/big.bin
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from internlm.data.tokenize.command import main

    sys.exit(main())
