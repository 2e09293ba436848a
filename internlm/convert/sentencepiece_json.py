"""Converts a SentencePiece model to a tokenizer.json that gives the same ids, for libraries that cannot read the model.

Some features, such as user-defined pieces after the prepended space, have no equivalent in the format and give other
ids. Compare the ids before relying on the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm.data.tokenize.special_tokens import AddedToken

_BPE = 2
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\u2581"
"""The symbol for a space in a piece."""
_UNUSED_SCORE = -1e6
"""Score of pieces that are matched literally, before the model is applied."""


def sentencepiece_json(path: Path, added: Mapping[int, AddedToken], ends: tuple[str | None, str | None]) -> bytes:
    """The content of the tokenizer.json.

    Args:
        path: the .model file.
        added: id -> token, for further tokens that are matched literally in a text.
        ends: tokens that transformers adds before and after a text.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    rules, trained = proto.normalizer_spec, proto.trainer_spec
    tokens = {
        id: AddedToken(piece.piece.replace(_SPACE, " "), special=piece.type == _CONTROL)
        for id, piece in enumerate(proto.pieces)
        if piece.type in (_CONTROL, _USER_DEFINED) or id == trained.unk_id
    } | dict(added)
    pieces = [piece.piece for piece in proto.pieces]
    pieces += [f"<unused {id}>" for id in range(len(pieces), max(tokens, default=-1) + 1)]
    for id, token in tokens.items():
        pieces[id] = token.content
    if trained.model_type == _BPE:
        model: Any = models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)},
            merges=_merges(proto),
            unk_token=pieces[trained.unk_id],
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    else:
        scores = [_UNUSED_SCORE if id in tokens else piece.score for id, piece in enumerate(proto.pieces)]
        scores += [_UNUSED_SCORE] * (len(pieces) - len(scores))
        model = models.Unigram(list(zip(pieces, scores, strict=True)), trained.unk_id, trained.byte_fallback)
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*decoding, decoders.Strip(content=" ", left=1)] if rules.add_dummy_prefix else decoding
    )
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(
                token.content,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
                special=token.special,
            )
            for _, token in sorted(tokens.items())
        ]
    )
    before, after = ends
    if before is not None or after is not None:
        template = " ".join(part for part in (before, "$A", after) if part is not None)
        named = [(part, pieces.index(part)) for part in (before, after) if part is not None]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=named)
    return tokenizer.to_str(pretty=True).encode()


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Pairs of pieces that form a piece, by descending score of that piece: the merge order of SentencePiece."""
    ids = {piece.piece: id for id, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    found = [
        (-proto.pieces[id].score, id, piece[:cut], piece[cut:])
        for piece, id in ids.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(left, right) for _, _, left, right in sorted(found, key=lambda merge: merge[:2])]
