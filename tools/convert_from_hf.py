"""Convert a Hugging Face folder to a checkpoint; same as `internlm convert from-hf`. See doc/conversion.md.

python tools/convert_from_hf.py --hf Qwen3-0.6B --out checkpoints/qwen3
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from internlm.cli import main

    sys.exit(main(["convert", "from-hf", *sys.argv[1:]]))
