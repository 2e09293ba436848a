"""The `data` section: where tokens come from and how they become batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from internlm.config.schema.base import (
    EXPAND_HOME,
    PathText,
    Section,
    default_of,
    key,
    later,
    no_effect,
    used_with,
)
from internlm.config.schema.conversations import ConversationConfig
from internlm.config.schema.valid_folders import VALID_FOLDERS
from internlm.utils.packing_modes import Packing, default_document_mask

Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""A string; None is converted to an empty one."""


class FimConfig(Section):
    """Fill-in-the-middle. Tokens are given as ids, or as strings of the tokenizer at data.tokenizer_path."""

    rate: float = key(..., "Probability that a document, or a part of one, is transformed.", ge=0, le=1)
    spm_rate: float = key(
        0.5,
        "Share with the suffix before the prefix (SPM) among the transformed; the others have the prefix first (PSM).",
        ge=0,
        le=1,
    )
    prefix: int | str = key(..., "Sentinel of the prefix, such as `<fim_prefix>`.")
    middle: int | str = key(..., "Sentinel of the middle.")
    suffix: int | str = key(..., "Sentinel of the suffix.")
    level: Literal["document", "context"] = key(
        "document",
        "`document`: whole documents, before packing cuts them; `context`: each part of a document within an attention "
        "segment.",
    )
    bos: int | str | None = key("tokenizer", "Token that stays first; `tokenizer`: of data.tokenizer_path; None: none.")
    eos: int | str | None = key("tokenizer", "Token that stays last; `tokenizer`: of data.tokenizer_path; None: none.")


KEYS_OF_TYPES = (
    "array_dtype",
    "array_separator",
    "content_name",
    "subset_name",
    "text_unit",
    "add_bos",
    "add_eos",
    "conversations",
)
"""Keys of the data section that only some types have."""


class BlendEntryConfig(Section):
    """A source of a blend, or a group of sources. Keys left out are those of the data section, for the same type."""

    path: PathText = key(None, "Folder or file of the source, as data.train_folder.")
    blend: list[BlendEntryConfig] = key([], "Sources that share the weight of this group, in place of path.")
    name: str | None = key(
        None,
        "Name in metrics and checkpoints; a resumed run recognizes the source by it.",
        derived="last part of path",
        min_length=1,
    )
    weight: float | list[tuple[int, float]] = key(
        ...,
        "Share of the tokens, relative to the weights beside it; or [(0, weight), (tokens, weight), ...]: each weight "
        "from that many consumed tokens of the run on.",
    )
    epochs_max: float | None = key(None, "Epochs after which the source ends; None: it repeats without end.", gt=0)
    on_end: Literal["stop", "repeat", "drop"] | None = key(
        None,
        "With epochs_max, which needs it. `stop`: training ends; `drop`: the other weights keep their proportions. "
        "Without: `repeat`.",
    )
    type: Literal["tokenized", "megatron", "arrays", "streaming"] | None = key(None, "Kind of files, as data.type.")
    min_length: int | None = key(None, "As data.min_length.", ge=0)
    min_length_dict: dict[str, int] | None = key(None, "min_length by name of a type folder of the source.")
    array_dtype: Literal["uint16", "uint32"] | None = key(None, "As data.array_dtype.")
    array_separator: int | None = key(None, "As data.array_separator.", ge=0)
    content_name: str | None = key(None, "As data.content_name.")
    subset_name: str | None = key(None, "As data.subset_name.")
    text_unit: Literal["line", "paragraph", "file"] | None = key(None, "As data.text_unit.")
    add_bos: bool | None = key(None, "As data.add_bos.")
    add_eos: bool | None = key(None, "As data.add_eos.")
    conversations: ConversationConfig | None = key(None, "As data.conversations.")
    image_folder: PathText = key(None, "As data.image_folder.")
    image_column: str | None = key(None, "As data.image_column.")

    @model_validator(mode="after")
    def _fill(self) -> BlendEntryConfig:
        if self.name is None and self.path is not None:
            self._derive(name=PurePath(self.path).name or self.path)
        return self

    @property
    def steps(self) -> list[tuple[int, float]]:
        """The weights as (tokens, weight)."""
        return [(0, self.weight)] if isinstance(self.weight, float) else self.weight

    def applied_to(self, data: DataConfig) -> DataConfig:
        """The data section of a run on this source alone."""
        given = {name: getattr(self, name) for name in KEYS_OF_TYPES if getattr(self, name) is not None}
        changes: dict[str, Any] = {"train_folder": self.path, "blend": [], "min_length_dict": self.min_length_dict}
        for name in ("min_length", "image_folder", "image_column"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        return data.of_type(self.type or data.type, given).model_copy(update=changes)


XTUNER_NAMES = {"dataset_folder": "train_folder", "max_length": "seq_len"}
"""XTuner's names of keys -> the keys."""


class DataConfig(Section):
    """Sizes of a batch, the token folders, packing and evaluation."""

    type: Literal["tokenized", "megatron", "arrays", "streaming", "mocked", "hf", "lumina_pickle"] = later(
        "tokenized",
        "Kind of files: `tokenized` .bin/.meta, `megatron` .bin/.idx, `arrays` .npy, raw .bin or .ds of token ids, "
        "`streaming` parquet, Arrow, JSON or text, tokenized during training, `mocked` recorded batches. Without a "
        "folder: dummy data.",
        "this source",
        accepts=("tokenized", "megatron", "arrays", "streaming", "mocked"),
    )
    array_dtype: Literal["uint16", "uint32"] | None = key(
        None, "`arrays`: dtype of files without a header (nanoGPT, OLMo, datatrove)."
    )
    array_separator: int | None = key(
        None, "`arrays`: id that ends each document, such as the tokenizer's eos; None: a file is one document.", ge=0
    )
    seq_len: int = key(..., "Maximum length of a sequence in tokens; longer documents are cut.", ge=1)
    micro_bsz: int = key(..., "Size of a micro-batch in sequences of seq_len tokens.", ge=1)
    micro_num: int = key(1, "Micro-batches per optimizer step on each data rank.", ge=1)
    gradient_accumulation: int = key(None, "Must equal micro_num without a pipeline.", derived="data.micro_num", ge=1)
    packed_length: int = key(
        None,
        "Tokens per packed sample; a given value is ignored.",
        derived="data.seq_len * data.micro_bsz",
        forced=True,
    )
    batch_size: int = key(None, "Samples per step on each data rank.", derived="data.micro_num", forced=True)
    total_steps: int = key(..., "Optimizer steps of the whole run.", ge=1)
    min_length: int = key(0, "Documents with fewer tokens are dropped.", ge=0)
    min_length_dict: dict[str, int] | None = key(None, "min_length by name of a type folder; overrides min_length.")
    train_folder: PathText = key(
        None, "Folder of <type>/**/NAME with files of data.type for training, or one file or prefix; None: dummy data."
    )
    blend: list[BlendEntryConfig] = key(
        [],
        "Sources that are mixed by weight, in place of train_folder, as dict(path, weight, name, epochs_max, on_end, "
        "type, ...) or dict(blend, weight).",
    )
    dataset_folder: PathText = key(None, "XTuner's name of train_folder.")
    max_length: int | None = key(None, "XTuner's name of seq_len.", ge=1)
    pack_to_max_length: bool | None = key(
        None, "XTuner's name of a packing: True is `cut`, unless packing is another that packs; False is `unpacked`."
    )
    valid_folder: Annotated[str | dict[str, dict[str, Any]] | None, EXPAND_HOME, VALID_FOLDERS] = key(
        None,
        "Folder in which each directory with files of data.type is a validation set, or one file; or dict(NAME=path, "
        "...) or dict(NAME=dict(path=..., type=..., ...), ...), one set for each name, with keys of its type; None: "
        "none.",
    )
    valid_fraction: float = key(
        0.0,
        "Share of the documents of train_folder that are held out of training and evaluated as the set `held_out`, or "
        "`held_out/TYPE` for each type.",
        ge=0,
        lt=1,
    )
    cache_folder: PathText = key(
        None, "Folders in object stores: where their files are kept; None: `remote` in the user's cache."
    )
    cache_bytes: int | None = key(
        None,
        "Folders in object stores: bound on the files that are kept; the least recently used are removed. None: none.",
        ge=1,
    )
    valid_micro_num: int = key(None, "Micro-batches that are evaluated together.", derived="data.micro_num", ge=1)
    valid_every: int = key(0, "Steps between evaluations; 0 turns evaluation off.", ge=0)
    valid_at_start: bool = used_with(False, "Evaluate before the first step, too.", "data.valid_every")
    valid_by_position: bool = used_with(
        False,
        "Evaluations also record the loss by position in the document, in buckets bounded by powers of two.",
        "data.valid_every",
    )
    multiple_choice: dict[str, str] = used_with(
        {},
        "Name -> JSON lines with questions, `context`, `choices` and `answer`, that are scored in each evaluation.",
        "data.valid_every",
    )
    generate_every: int = key(
        0, "Steps between continuations of data.generate_prompts, which go to the log and samples.jsonl; 0: none.", ge=0
    )
    generate_prompts: tuple[str, ...] = used_with((), "Texts that are continued greedily.", "data.generate_every")
    generate_max_new_tokens: int = used_with(
        32, "Tokens that are appended to each; each costs a forward pass.", "data.generate_every", ge=1
    )
    skip_batches: Text = key(
        "", 'Steps (from 0) whose batches are counted but neither read nor trained on, such as "2-5,7".'
    )
    on_bad_data: Literal["stop", "skip"] = key(
        None,
        "What a document that cannot be read does: `stop` ends the run; `skip` replaces it by padding, with a line in "
        "the log.",
        derived="`skip` with skip_bad_documents, else `stop`",
    )
    max_bad_documents: int | None = key(
        100,
        "on_bad_data='skip': number of skipped documents, over all ranks since the first step of the run, above which "
        "the run ends; None: no limit.",
        ge=1,
    )
    skip_bad_documents: bool = key(None, "Former name of on_bad_data='skip'.", derived="data.on_bad_data == 'skip'")
    rampup_batch_size: Text = key(
        "", 'Ramp of micro_num as "start increment steps": start at start, add increment every `steps` steps.'
    )
    packing: Packing = key(
        None,
        "`cut`: documents one after the other, cut every micro_bsz * seq_len tokens; `pack_sample_into_one`: the same "
        "without a document mask; `best_fit`: documents remain whole where they fit, with padding at the end; "
        "`unpacked`: one document per row, padded to [micro_bsz, seq_len].",
        derived="by use_packed_dataset, pack_sample_into_one and pack_to_max_length; without them `cut`, and "
        "`best_fit` with is_multimodal",
    )
    document_mask: bool = key(
        None,
        "Whether attention stays within documents. False: attention and positions run through rows of seq_len tokens; "
        "labels stay within documents.",
        derived="True; False for packing='pack_sample_into_one'",
    )
    pack_sample_into_one: bool = key(
        None,
        "InternEvo's name of packing='pack_sample_into_one'.",
        derived="data.packing == 'pack_sample_into_one'",
    )
    use_packed_dataset: bool = key(
        None, "False: InternEvo's name of packing='unpacked'.", derived="data.packing != 'unpacked'"
    )
    fim: FimConfig | None = key(
        None,
        "dict(rate, spm_rate, prefix, middle, suffix, level, bos, eos): fill-in-the-middle, which moves the middle of "
        "documents behind their end.",
    )
    fixed_random_dataset_seqlen: bool = key(True, "Dummy data: documents of equal length (True) or of random length.")
    empty_cache_and_diag_interval: int = key(
        50, "Steps between garbage collection, release of cached device memory and a memory line in the log.", ge=1
    )
    diag_outlier_ratio: float = no_effect(
        1.1, "Slow-rank threshold of InternEvo's diagnosis.", "slow ranks are not searched for, neither by InternEvo"
    )
    use_shm: bool = no_effect(
        False, "Keep document indices in shared memory.", "document indices are memory-mapped, thus shared already"
    )
    shm_path: str = used_with("/dev/shm/metacache", "Folder of the shared indices.", "data.use_shm")
    num_worker: int = key(4, "Loader processes of training; 0 loads in the training process.", ge=0)
    shuffle_files: int | None = key(
        None,
        "Number of files whose samples are mixed at a time, in an order of files that every epoch shuffles; for data "
        "larger than the disk. None: the samples of all files.",
        ge=1,
    )
    seed: int = key(1024, "Seed of the data order.", ge=0)
    tokenizer_path: PathText = key(
        None, "tokenizer.json, tokenizer folder or SentencePiece .model of the tokenized data; used to generate text."
    )
    check_tokenizer: bool = key(
        True,
        "Refuse data of several tokenizers, or of another tokenizer than tokenizer_path or the run's initial "
        "checkpoint; False logs it.",
    )
    content_name: str = key("text", "`streaming`: column with the text.")
    subset_name: str | None = key(
        None, "`streaming`: subset of the dataset, a config of its README.md or a subfolder; None: the default one."
    )
    text_unit: Literal["line", "paragraph", "file"] | None = key(
        None, "`streaming`: what is a document in .txt files; None: a line, with a line in the log."
    )
    num_shards: int | None = key(
        None,
        "`streaming`: shards that rows are dealt to, best a multiple of the samples of a step; None: 8 times these. A "
        "run that resumes keeps those of its checkpoint.",
        ge=1,
    )
    add_bos: bool = key(False, "`streaming`: start each document with the bos token of the tokenizer.")
    add_eos: bool | None = key(
        None, "`streaming`: end each document with the eos token; None: if the tokenizer has one."
    )
    conversations: ConversationConfig | None = key(
        None, "`streaming`: dict(form, learn, mask, chat_template): rows are conversations; {} for the defaults."
    )
    is_multimodal: bool = key(
        False, "Documents may have pictures, for model_type = 'LLAVA'; without a folder: dummy data with pictures."
    )
    data_impl: str | None = no_effect(
        None, "Kind of index of data.type='megatron'.", "an index tells its format; only that of 'mmap' is read"
    )
    data_yaml: str | None = used_with(None, "List of the files of data.type='lumina_pickle'.", "data.type")
    base_path: PathText = used_with(None, "Folder of the files of data.type='lumina_pickle'.", "data.type")
    unit_schedule_size: int | None = used_with(
        None, "Micro-batches of one unit of the ZeroPP schedule.", "parallel.pipeline.use_zeropp", ge=1
    )
    image_folder: PathText = used_with(None, "Folder that paths of pictures are relative to.", "data.is_multimodal")
    image_size: int | None = used_with(
        None, "Side of a picture in pixels, as the vision tower reads it.", "data.is_multimodal", ge=1
    )
    patch_size: int | None = used_with(
        None,
        "Side of a patch in pixels: a picture has (image_size / patch_size)^2 placeholders.",
        "data.is_multimodal",
        ge=1,
    )
    image_column: str | None = used_with(
        None, "`streaming`: column with the pictures of a row; None: `image` or `images`.", "data.is_multimodal"
    )
    image_fit: Literal["crop", "pad", "stretch"] | None = used_with(
        None,
        "How a picture becomes a square: `crop` cuts out its center; `pad` adds bars (LLaVA 1.5); `stretch` distorts "
        "it. None: as image_processor_path says.",
        "data.is_multimodal",
    )
    image_processor_path: PathText = used_with(
        None,
        "preprocessor_config.json, or its folder, with the resizing and normalization of the vision tower; None: that "
        "of the folder in model.vit_cfg.mm_vision_tower, else CLIP's.",
        "data.is_multimodal",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_xtuner_names(cls, values: Any) -> Any:
        """Fill the keys that XTuner's names stand for. Contradictions are found by a rule."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for theirs, ours in XTUNER_NAMES.items():
            if filled.get(theirs) is not None and filled.get(ours) is None:
                filled[ours] = filled[theirs]
        return filled

    def of_type(self, type: str, given: Mapping[str, Any]) -> DataConfig:
        """The data section for files of a type.

        Args:
            type: of the files. Keys that only some types have are left as they are for the same type.
            given: of these keys, those to set.
        """
        fields = DataConfig.model_fields
        kept = {} if type == self.type else {name: default_of(fields[name]) for name in KEYS_OF_TYPES}
        return self.model_copy(update={**kept, "type": type, **given})

    @property
    def has_valid_sets(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.valid_folder is not None or self.valid_fraction > 0

    @model_validator(mode="after")
    def _fill(self) -> DataConfig:
        self._derive(packed_length=self.seq_len * self.micro_bsz, batch_size=self.micro_num)
        if self.gradient_accumulation is None:
            self._derive(gradient_accumulation=self.micro_num)
        if self.valid_micro_num is None:
            self._derive(valid_micro_num=self.micro_num)
        if self.packing is None:
            one = "pack_sample_into_one" if self.pack_sample_into_one else "best_fit" if self.is_multimodal else "cut"
            is_unpacked = False in (self.use_packed_dataset, self.pack_to_max_length)
            self._derive(packing="unpacked" if is_unpacked else one)
        if self.pack_sample_into_one is None:
            self._derive(pack_sample_into_one=self.packing == "pack_sample_into_one")
        if self.use_packed_dataset is None:
            self._derive(use_packed_dataset=self.packing != "unpacked")
        if self.on_bad_data is None:
            self._derive(on_bad_data="skip" if self.skip_bad_documents else "stop")
        if self.skip_bad_documents is None:
            self._derive(skip_bad_documents=self.on_bad_data == "skip")
        if self.document_mask is None:
            self._derive(document_mask=default_document_mask(self.packing))
        return self
