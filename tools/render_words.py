"""Render words and digits as pictures, with a LLaVA JSON that transcribes them. See doc/multimodal.md.

python tools/render_words.py --out data/words
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
    """Parse the options and render; returns the exit code.

    Raises:
        UserError: an option is invalid, or the folder exists.
    """
    from internlm.data.images.rendered_words import WordSettings, render_words
    from internlm.utils.errors import DataError
    from internlm.utils.paths import local_path

    defaults = WordSettings()
    parser = argparse.ArgumentParser(description="Render words as pictures, with conversations that transcribe them.")
    parser.add_argument(
        "--out", type=local_path, default=Path("data/words"), help="output folder (default: data/words)"
    )
    parser.add_argument("--train", type=int, default=defaults.num_train, help="rows for training")
    parser.add_argument("--valid", type=int, default=defaults.num_valid, help="rows for evaluation")
    parser.add_argument("--max-length", type=int, default=defaults.max_length, help="characters of the longest word")
    parser.add_argument("--alphabet", default=defaults.alphabet, help="characters of the words, such as 0123456789")
    parser.add_argument("--image-size", type=int, default=defaults.image_size, help="side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of words, places and colors")
    args = parser.parse_args()
    for name in ("train", "valid", "max_length", "image_size"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not args.alphabet or not args.alphabet.isascii() or not args.alphabet.isprintable():
        raise DataError(f"--alphabet {args.alphabet!r}: give printable ASCII characters, which Pillow's own font has")
    settings = WordSettings(args.train, args.valid, args.max_length, args.image_size, args.alphabet, args.seed)
    render_words(args.out, settings)
    print(f"{args.out}: {args.train:,} rows for training, {args.valid:,} for evaluation")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
