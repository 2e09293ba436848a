"""Builds the stream of rows that are tokenized during training, and the documents of its validation sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from internlm.config.schema import Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.conversations.encoder import ConversationEncoder, ConversationOptions, load_template_for
from internlm.data.documents.file_digest import digest_of
from internlm.data.documents.folders import min_length_of_type
from internlm.data.images.image_row_encoder import ImageRowEncoder
from internlm.data.images.image_source import ImageSource
from internlm.data.images.placeholder_tokenizer import PlaceholderTokenizer
from internlm.data.images.settings import IMAGE_MARKER
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle
from internlm.data.rows.hub_datasets import locate_dataset
from internlm.data.rows.open_rows import open_row_files
from internlm.data.rows.row_file import RowFile
from internlm.data.rows.row_folders import RowFiles, find_row_files
from internlm.data.rows.shuffled_rows import ShuffledRows
from internlm.data.sources.encoded_rows import encoded_sets
from internlm.data.sources.row_encoder import ConversationRowEncoder, RowEncoder, TextRowEncoder
from internlm.data.sources.row_stream import RowStream
from internlm.data.sources.shard_reader import RowPacking
from internlm.data.tokenize.fingerprint import tokenizer_fingerprint
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.initialize.data_folders import log_small_cache, train_folder
from internlm.initialize.images import image_loader, image_settings
from internlm.initialize.train_sources import TrainSource
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_SHARDS_PER_SAMPLE = 8
"""Shards of each micro-batch of a step; no more workers than micro-batches times this have rows to tokenize."""

_CHECKED_ROWS = 1000
"""Rows that are encoded before a run; parquet decodes a row group for each."""

_DECODED_IMAGES = 64
"""Pictures of these rows that are decoded."""

logger = get_logger(__name__)


def build_row_stream(config: Config, context: ParallelContext, fim: FillInTheMiddle | None) -> RowStream:
    """Build the stream of the rows of data.train_folder.

    Raises:
        DataError: the folder, a file or the tokenizer cannot be read, or they have no row.
        ConfigError: a type of data.min_length_dict does not exist.
    """
    data = config.data
    assert data.train_folder is not None
    found = find_row_files(_train_dataset(config), data.subset_name)
    files = _open(config, found)
    log_small_cache(config, [file.path for file in files])
    encoder, facts = _encoder(config)
    packing = RowPacking(
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        packing=data.packing,
        document_mask=data.document_mask,
        fim=fim,
        min_lengths=_min_lengths(config, found),
        skip_bad_documents=data.on_bad_data == "skip",
    )
    return RowStream(
        files,
        [each.type_id for each in found.files],
        found.types,
        encoder,
        packing,
        num_shards=data.num_shards or _SHARDS_PER_SAMPLE * data.micro_num * context.size("data"),
        seed=data.seed,
        facts={
            "type": "streaming",
            "files": digest_of((file.path.name, (len(file), file.path.stat().st_size)) for file in files),
            **facts,
        },
        num_files=data.shuffle_files,
    )


def check_train_rows(config: Config) -> str:
    """Encode some rows of data.train_folder, at equal intervals over all files; a line that says what was read.

    Raises:
        DataError: the folder, a file, one of the rows or the tokenizer cannot be read, or no row has enough tokens.
    """
    data = config.data
    assert data.train_folder is not None
    found = find_row_files(_train_dataset(config), data.subset_name)
    files, min_lengths = _open(config, found), _min_lengths(config, found)
    encoder, _ = _encoder(config)
    order = ShuffledRows(files, 1, seed=0)
    stride = max(1, order.num_rows // _CHECKED_ROWS)
    chosen = [order.locate(row) for row in range(0, order.num_rows, stride)]
    encoded = encoder.encode([(files[file], row) for file, row in chosen])
    errors = [each.error for each in encoded if each.error is not None]
    if errors and data.on_bad_data == "stop":
        raise errors[0]
    num_tokens = sum(len(each.ids) for each in encoded)
    if num_tokens == 0:
        reason = errors[0] if errors else encoded[0].left_out if encoded else "there is none"
        raise DataError(f"{data.train_folder}: none of {len(encoded):,} rows that were read has a token: {reason}")
    min_length_of_row = [min_lengths[found.files[file].type_id] for file, _ in chosen]
    short = sum(0 < len(each.ids) < least for each, least in zip(encoded, min_length_of_row, strict=True))
    if short == sum(len(each.ids) > 0 for each in encoded):
        longest = max(len(each.ids) for each in encoded)
        raise DataError(
            f"{data.train_folder}: none of {len(encoded):,} rows that were read has data.min_length tokens; the "
            f"longest has {longest:,}. Lower data.min_length ({', '.join(map(str, sorted(set(min_lengths))))})"
        )
    empty = sum(each.left_out is not None for each in encoded)
    pictures = _check_images(config, [image for each in encoded for image in each.images])
    return (
        f"train folder '{data.train_folder}': {order.num_rows:,} rows, of which {len(encoded):,} were read: "
        f"{num_tokens / len(encoded):,.0f} tokens a row; {empty:,} rows have none, {short:,} fewer than "
        f"data.min_length, {len(errors):,} are unreadable{pictures}"
    )


def _check_images(config: Config, images: Sequence[ImageSource]) -> str:
    """Look for the files of pictures, and decode some of them; the end of a sentence that says so.

    Raises:
        DataError: one is missing or damaged.
    """
    loader = image_loader(config)
    if loader is None:
        return ""
    decoded = images[:: max(1, len(images) // _DECODED_IMAGES)]
    if config.data.on_bad_data == "stop":
        for image in images:
            image.check()
        for image in decoded:
            loader.pixels(image)
    return f"; they have {len(images):,} pictures, of which {len(decoded):,} were decoded"


def rows_as_documents(config: Config, valid_folder: str | Path, sources: Sequence[TrainSource]) -> Path:
    """The rows of a validation folder as tokenized files, a subfolder for each set, in the user's cache.

    The sets are the types of its split "validation" or, without one, of its only split.

    Args:
        config: whose data section has the keys of the rows.
        valid_folder: of the rows.
        sources: of training data, whose rows are no validation set.

    Raises:
        DataError: the folder, a file, a row or the tokenizer cannot be read.
    """
    data = config.data
    folder = locate_dataset(valid_folder)
    try:
        found = find_row_files(folder, data.subset_name, "validation")
    except DataError as error:
        # Files without the name of a split are the split "train".
        trained_on = [
            _train_dataset(source.config).resolve()
            for source in sources
            if source.config.data.train_folder is not None and source.config.data.type == "streaming"
        ]
        if folder.resolve() in trained_on:
            raise DataError(
                f"{error}. data.valid_folder is data.train_folder, whose rows are trained on: name another folder or "
                "file, move some of the files into a subfolder 'validation', or set data.valid_folder = None"
            ) from error
        found = find_row_files(folder, data.subset_name, "train")
    encoder, facts = _encoder(config)
    files = _open(config, found)
    sets: dict[str, list[RowFile]] = {name: [] for name in found.types}
    for file, typed in zip(files, found.files, strict=True):
        sets[found.types[typed.type_id]].append(file)
    settings = image_settings(config)
    return encoded_sets(
        {name: files for name, files in sets.items() if files},
        encoder,
        repr(sorted(facts.items())),
        None if settings is None else settings.folder,
    )


def _train_dataset(config: Config) -> Path:
    folder = train_folder(config)
    assert folder is not None
    return locate_dataset(folder)


def _open(config: Config, found: RowFiles) -> list[RowFile]:
    data = config.data
    has_other_columns = data.conversations is not None or data.is_multimodal
    columns = None if has_other_columns else [data.content_name]
    return open_row_files([each.path for each in found.files], columns, data.text_unit)


def _min_lengths(config: Config, found: RowFiles) -> tuple[int, ...]:
    """The minimum number of tokens of a document, by type id."""
    data = config.data
    assert data.train_folder is not None
    return tuple(
        min_length_of_type(name, data.train_folder, found.types, data.min_length, data.min_length_dict)
        for name in found.types
    )


def _encoder(config: Config) -> tuple[RowEncoder, dict[str, str]]:
    """(the encoder of rows, what its ids depend on)."""
    assert config.data.tokenizer_path is not None
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    facts = {"tokenizer": tokenizer_fingerprint(tokenizer)}
    settings = image_settings(config)
    if settings is None:
        encoder, more = _text_encoder(config, tokenizer)
        return encoder, facts | more
    encoder, more = _text_encoder(config, PlaceholderTokenizer(tokenizer, settings))
    return ImageRowEncoder(encoder, settings), facts | more | {"images": repr((settings.facts, settings.seq_len))}


def _text_encoder(config: Config, tokenizer: TextTokenizer) -> tuple[RowEncoder, dict[str, str]]:
    """(the encoder of the text of rows, what its ids depend on besides the tokenizer)."""
    data = config.data
    assert data.tokenizer_path is not None
    facts = {}
    if data.conversations is not None:
        marker = IMAGE_MARKER if data.is_multimodal else None
        options = ConversationOptions(**data.conversations.model_dump(), image_marker=marker)
        template = load_template_for(options, Path(data.tokenizer_path))
        facts["conversations"] = repr(
            (options.form, options.learn, options.mask, None if template is None else template.fingerprint)
        )
        return ConversationRowEncoder(ConversationEncoder(tokenizer, template, options)), facts
    before, after = _ends(config, tokenizer)
    facts |= {"column": data.content_name, "ends": repr((before, after)), "text_unit": repr(data.text_unit)}
    return TextRowEncoder(tokenizer, data.content_name, before, after), facts


def _ends(config: Config, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """The ids to put before and after every document."""
    data = config.data
    if data.add_bos and tokenizer.bos_id is None:
        raise DataError(f"{data.tokenizer_path}: the tokenizer names no bos token; remove data.add_bos")
    if data.add_eos and tokenizer.eos_id is None:
        raise DataError(f"{data.tokenizer_path}: the tokenizer names no eos token; remove data.add_eos")
    if data.add_eos is None and tokenizer.eos_id is None:
        logger.warning(
            "%s: the tokenizer names no eos token, so documents have no end mark and the model cannot learn to stop; "
            "use a tokenizer that names one, or set data.add_eos = False to accept this",
            data.tokenizer_path,
        )
    before = [tokenizer.bos_id] if data.add_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if data.add_eos is not False and tokenizer.eos_id is not None else []
    return before, after
