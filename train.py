"""Train a model: `python train.py --config configs/demo.py`; same as `internlm train`."""

import sys

from internlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
