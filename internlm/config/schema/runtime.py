"""The sections around a run: monitoring, TensorBoard, generation, offloading, float8, Hugging Face classes."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from internlm.config.schema.base import PathText, Section, key, later, no_effect, section, used_with


class AlertConfig(Section):
    """Alerts."""

    enable_feishu_alert: bool = later(False, "Send alerts to Feishu.", "sending alerts")
    feishu_alert_address: str | None = used_with(
        None, "Webhook of the Feishu bot.", "monitor.alert.enable_feishu_alert"
    )
    light_monitor_address: str | None = no_effect(
        None, "Address of a heartbeat service.", "the service no longer exists"
    )
    alert_file_path: PathText = used_with(None, "File that lists sent alerts.", "monitor.alert.enable_feishu_alert")


class MonitorConfig(Section):
    """What a run reports, and how often."""

    alert: AlertConfig = section(AlertConfig, "Alerts.")
    log_every: int = key(1, "Steps between two lines on the console.", ge=1)
    log_format: Literal["default", "internevo"] = key(
        "default", "internevo: InternEvo's line of numbers on the console and in the log, and no progress bar."
    )
    peak_tflops: float | None = key(
        None, "Peak of one device in TFLOP/s, for the MFU; None: the known peak of the device, else no MFU.", gt=0
    )
    max_skipped_updates: int = key(
        10,
        "Consecutive updates skipped for an inf or NaN gradient that end the run; 0: no limit. Overflows of fp16 that "
        "lower the loss scale do not count.",
        ge=0,
    )
    metrics_file: bool = key(True, "Write metrics.jsonl into the run directory.")
    slow_step_seconds: float = key(
        60.0,
        "A step that takes longer is logged, with the rank that the others wait for, unless the usual step takes more "
        "than half as long. Saving, evaluating and building are logged after ten times as long.",
        gt=0,
    )
    collective_timeout_seconds: float | None = key(
        None,
        "Seconds that a rank waits for another before the run ends with the stacks of all ranks; None: 1800, or 60 if "
        "INTERNLM_ENABLE_TIMEOUT is set.",
        gt=0,
    )


class TensorboardConfig(Section):
    """The TensorBoard writer."""

    queue_max_length: int = key(1, "Events buffered before they are written.", ge=1)


class GradProfilingConfig(Section):
    """Norms and zeros of gradients, layer by layer, in TensorBoard."""

    grad_norm_profiling: bool = later(False, "Report the gradient norm of each layer.", "gradient profiling")
    zero_grad_profiling: bool = later(False, "Report zero gradients.", "gradient profiling")
    vocab_grad_norm_profiling: bool = later(False, "Report gradient norms by token.", "gradient profiling")
    layers: tuple[str, ...] = used_with((), "Layer classes to report; empty: all.", "grad_profiling.*_profiling")
    interval_steps: int = used_with(1, "Steps between two reports.", "grad_profiling.*_profiling", ge=1)


_generation = partial(no_effect, reason="`internlm generate` takes its settings from the command line")


class GenerationConfig(Section):
    """InternEvo's batch generation."""

    ckpt_folder: PathText = _generation(None, "Checkpoint to generate from.")
    output_folder: PathText = _generation(None, "Folder of the generated text.")
    data_folder: PathText = _generation(None, "Folder of the prompts.")
    batch_size: int | None = _generation(None, "Prompts at a time.")
    eos_id: int | tuple[int, ...] = _generation(2, "Tokens that end a text.")
    bos_id: int = _generation(1, "Token that begins a text.")
    pad_id: int | None = _generation(None, "Token that pads short prompts; None: bos_id.")
    max_length: int = _generation(100, "Tokens of prompt and answer together.")
    do_sample: bool = _generation(True, "Sample instead of taking the most likely token.")
    temperature: float = _generation(1.0, "Divides the logits.")
    num_beams: int = _generation(1, "Beams of beam search.")
    top_k: int = _generation(50, "Sample from the k most likely tokens.")
    top_p: float = _generation(1.0, "Sample from the smallest set with this probability.")
    repetition_penalty: float = _generation(1.0, "Penalty on tokens that occurred.")
    length_penalty: float = _generation(1.0, "Exponent on the length in beam search.")
    additional_eos_token_list: tuple[int, ...] | None = _generation(None, "Further tokens that end a text.")


class CpuOffloadingConfig(Section):
    """Activations in host memory."""

    enable: bool = key(False, "Move activations to host memory until backward needs them.")
    num_layers: int = used_with(
        0, "Layers whose activations move: the first ones of each chunk of a rank.", "cpu_offloading.enable", ge=0
    )
    offloading_activations: bool = no_effect(
        True, "Move activations.", "only activations are moved; cpu_offloading.enable decides"
    )


class Float8Config(Section):
    """GEMMs in 8-bit floating point."""

    enable_float8_linear: bool = key(
        False,
        "Linear layers of attention and MLP run their GEMMs in float8 (not head, embedding, norms); needs bfloat16.",
    )
    scaling_type_input: Literal["dynamic", "delayed"] = used_with(
        "dynamic", "Scaling of inputs; delayed is refused.", "float8.enable_float8_linear"
    )
    scaling_type_weight: Literal["dynamic", "delayed"] = used_with(
        "dynamic", "Scaling of weights; delayed is refused.", "float8.enable_float8_linear"
    )
    scaling_type_grad_output: Literal["dynamic", "delayed"] = used_with(
        "dynamic", "Scaling of gradients; delayed is refused.", "float8.enable_float8_linear"
    )
    compile: bool = used_with(
        False,
        "Compile the casts of experts, and of layers that communicate (tensor, isp) or postpone weight gradients; "
        "model.compile compiles those of other layers.",
        "float8.enable_float8_linear",
    )
    first_and_last_layer: bool = used_with(
        False, "Include the first and the last layer of the model.", "float8.enable_float8_linear"
    )
    gather_weights: bool = used_with(
        True,
        "isp and FSDP gather these weights, but not those of experts, in float8, in half the bytes.",
        "float8.enable_float8_linear",
    )

    def layers(self, num_layers: int) -> range:
        """Numbers of the layers whose linear layers run their GEMMs in float8."""
        if not self.enable_float8_linear:
            return range(0)
        return range(num_layers) if self.first_and_last_layer else range(1, num_layers - 1)


class HfConfig(Section):
    """The class of `model_type = "hf"`: any decoder of transformers, from a folder or by import path."""

    folder: PathText = key(None, "Folder with the config.json of the class; with weights, see ckpt.load_ckpt_info.")
    trust_remote_code: bool = key(False, "Run the code that the folder brings.")
    cfg: str | None = key(None, "Without a folder: module of the configuration class.")
    cfg_cls: str | None = key(None, "Name of the configuration class.")
    cfg_extra_kwargs: dict[str, Any] = key({}, "Arguments of the configuration, or changes of that of the folder.")
    mod: str | None = key(None, "Module of the model class; None: the one that transformers has for the configuration.")
    mod_cls: str | None = key(None, "Name of the model class.")
