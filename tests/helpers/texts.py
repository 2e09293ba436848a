"""Small texts, files of them, and the documents of a tokenized file."""

import json
import random

from internlm.data.tokenized_files.reader import TokenizedFile

WORDS = ["the", "model", "reads", "tokens", "and", "predicts", "one,", "café", "你好", "x1", "2024", "don't\t—", "end."]


def make_texts(count, seed=0):
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(1, 60))) for _ in range(count)]


def write_jsonl(path, texts, key="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def documents_of(path):
    """The ids of every document of a .bin file, without their signs."""
    file = TokenizedFile(path)
    return [file.read(index)[0].tolist() for index in range(len(file))]
