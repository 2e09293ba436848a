"""Checks a GGUF file with llama.cpp: its log-probabilities and token ids against ours.

llama.cpp rounds activations to the type of the weights, so the tolerance is a multiple of what errors of that size in
the weights do to our own logits. Rounding the weights themselves would not do: a bf16 checkpoint is exact in bf16.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.reading import read_config
from internlm.convert.compare_logits import our_logits, probe_sequences
from internlm.convert.findings import Finding
from internlm.convert.from_hf import architecture_of
from internlm.convert.gguf_model import context_of
from internlm.convert.gguf_types import with_errors_of
from internlm.data.tokenize.probes import PROBE_TEXTS, special_texts
from internlm.data.tokenize.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.utils.errors import ConfigError
from internlm.utils.optional_packages import why_unusable
from internlm.utils.storage import StoragePath

_LONGEST = 64
_TYPE_FACTOR = 4
"""By how many times the effect of errors in the weights llama.cpp may differ, which rounds activations as well."""
_TOP = 20
"""Log-probabilities that are compared for each prompt."""
_ADVICE = (
    "Look at the metadata of the file (gguf-dump FILE) and compare the export with `internlm convert to-hf --check`"
)


def check_gguf_prerequisites() -> None:
    """Refuse, before the conversion, a check that cannot be done.

    Raises:
        ConfigError: the package with llama.cpp is missing.
    """
    reason = why_unusable("xllamacpp")
    if reason is not None:
        raise ConfigError(f"--check loads the file with llama.cpp: {reason}; pip install xllamacpp")


def check_gguf(checkpoint: StoragePath, file: Path, file_type: str, tokenizer: TextTokenizer) -> list[Finding]:
    """Compare a GGUF file with the checkpoint, on the CPU.

    Args:
        checkpoint: holds our model.
        file: the conversion.
        file_type: type of its matrices.
        tokenizer: that of the run.
    """
    architecture = architecture_of(read_config(checkpoint))
    context, _ = context_of(architecture)
    longest = min(_LONGEST, context - 1)
    prompts = probe_sequences(architecture.vocab_size, longest)
    text = torch.tensor([id for ids in tokenizer.encode_batch(list(PROBE_TEXTS)) for id in ids])
    prompts += [text[: min(length, longest)] for length in (3, 20, longest)]
    exact = _last(our_logits(checkpoint, prompts, torch.float64))
    # llama.cpp looks GELU up in a table of f16.
    coarsest = "f16" if file_type == "f32" and architecture.activation == "gelu_tanh" else file_type
    generator = torch.Generator().manual_seed(0)
    rounded = _last(
        our_logits(checkpoint, prompts, torch.float32, lambda name, weight: with_errors_of(weight, coarsest, generator))
    )
    try:
        server = _serve(file)
        letter = tokenizer.encode_batch(["a"])[0][-1]
        theirs = [_top_log_probabilities(server, prompt, letter) for prompt in prompts]
    except RuntimeError as error:
        return [Finding("log-probabilities", "failed", f"llama.cpp cannot compute them: {error}", _ADVICE)]
    return [_compare(theirs, exact, rounded), _compare_ids(server, tokenizer)]


def _serve(file: Path) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 4 * _LONGEST
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def _top_log_probabilities(server: Any, prompt: Tensor, forced: int) -> dict[int, float]:
    """The most likely next tokens, id -> natural logarithm of the probability; `forced` is the one to generate.

    Raises:
        RuntimeError: llama.cpp refuses the prompt.
    """
    # The log-probabilities are those before the bias. An end of the text, or a part of a character, has an answer
    # without any.
    bias = [[forced, 1000.0]]
    request = {"prompt": prompt.tolist(), "n_predict": 1, "n_probs": _TOP, "temperature": 0.0, "logit_bias": bias}
    answer = server.handle_completions(request)
    if "choices" not in answer:
        raise RuntimeError(json.dumps(answer))
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {each["id"]: each["logprob"] for each in token["top_logprobs"]}


def _compare(theirs: Sequence[dict[int, float]], exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> Finding:
    differences, same = [], 0
    for found, ours in zip(theirs, exact, strict=True):
        values = torch.tensor(list(found.values()), dtype=torch.float64)
        by_id = (values - ours[list(found)]).abs().max()
        # A likely token that is not among theirs shows in the sorted values.
        by_rank = (values.sort(descending=True).values - ours.topk(len(found)).values).abs().max()
        differences.append(float(torch.maximum(by_id, by_rank)))
        same += int(ours.argmax()) == max(found, key=lambda id: found[id])
    noise = max(float((one - two).abs().max()) for one, two in zip(rounded, exact, strict=True))
    scale = max(float(one.abs().max()) for one in exact)
    tolerance = _TYPE_FACTOR * noise + _LONGEST * torch.finfo(torch.float32).eps * scale
    text = (
        f"largest difference {max(differences):.1e} against a tolerance of {tolerance:.1e}, same next token for {same} "
        f"of {len(theirs)} prompts"
    )
    passed = max(differences) <= tolerance
    return Finding("log-probabilities", "passed" if passed else "failed", text, _ADVICE)


def _compare_ids(server: Any, tokenizer: TextTokenizer) -> Finding:
    texts = [*PROBE_TEXTS]
    if not isinstance(tokenizer, SentencePieceTokenizer) or tokenizer.added:
        # Otherwise training encodes a special token that is spelled out as ordinary text.
        texts += special_texts(tokenizer)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        theirs = _post(server, "/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        if theirs != ids:
            problem = f"{text!r} is {ids} in training and {theirs} in llama.cpp"
            return Finding("tokenizer", "failed", problem, "Look at the pre-tokenizer (--pre-tokenizer)")
    return Finding("tokenizer", "passed", f"ids of {len(texts)} texts are those of the run's tokenizer")


def _post(server: Any, path: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.listening_address}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with without_proxy.open(request, timeout=60) as answer:
        return dict(json.load(answer))


def _last(logits: Sequence[Tensor]) -> list[Tensor]:
    """Log-probabilities of the token behind each prompt, float64 `[V]`."""
    return [each[-1].double().log_softmax(-1) for each in logits]
