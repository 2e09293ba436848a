"""Convert a checkpoint to a Hugging Face folder; same as `internlm convert to-hf`. See doc/conversion.md.

python tools/convert_to_hf.py --ckpt checkpoints/1000 --out my-model
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from internlm.cli import main

    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
