"""`TrainConfig`: every option of the trainer. The text under a field is its `--help`.

Where a field is True, the flag is `--no_NAME`, which switches it off. The flags of
DiffSynth-Studio's `train.py` have their names, meanings and defaults. Steps are optimizer steps everywhere.
Nothing here imports torch, so `--help` is quick.
"""

from dataclasses import dataclass, replace
from typing import Literal

Adapter = Literal["lora", "dora", "lokr"]
LORA_TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)
MODELS = ("dit", "text_encoder", "vae")
ZERO_STAGES = {"zero2": 2, "zero3": 3}  # sharding by DeepSpeed
SIDE = 16  # pixels of a token on each axis; sizes are multiples of it


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of one training run; `check` refuses what contradicts itself."""

    # --- dataset ---

    dataset_base_path: str
    """Folder of the pictures, or hf:ORG/NAME of a Hugging Face dataset (needs the package datasets)."""

    dataset_metadata_path: str | None = None
    """csv, json, jsonl or parquet file with a row per picture. Without it: metadata.* in the folder, else
    every picture with the .txt of the same name."""

    max_pixels: int = 1024 * 1024
    """With dynamic resolution, larger pictures are scaled down to this area; none is enlarged."""

    height: int | None = None
    """Height of all pictures in pixels; leave height and width out for dynamic resolution."""

    width: int | None = None
    """Width of all pictures in pixels; leave height and width out for dynamic resolution."""

    bucket_step: int = SIDE
    """Dynamic resolution cuts sides down to multiples of this; with 64, pictures of like shape share
    batches."""

    data_file_keys: str = "image"
    """Columns of the metadata that hold files, comma separated; the first is the picture to learn."""

    caption_column: str = "prompt"
    """Column of the metadata that holds the caption."""

    dataset_repeat: int = 1
    """How often each picture is seen in an epoch."""

    batch_size: int = 1
    """Pictures of one size that go through the model together, per process."""

    caption_prefix: str = ""
    """Text put before every caption, such as a trigger word."""

    caption_shuffle: bool = False
    """Shuffle the comma-separated parts of captions; a caption has up to 8 orders."""

    caption_dropout: float = 0.0
    """Share of captions that are replaced by the empty one, so that guidance keeps working."""

    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with pictures that cannot be used: stop with a list of them, or list and leave out."""

    cache: bool = True
    """Encode pictures and captions once before the first step and read them from the disk after that, so that
    neither VAE nor text encoder stays in memory."""

    cache_path: str | None = None
    """Folder of the cache, which runs may share (default: cache in the output folder)."""

    # --- model ---

    model_paths: str | None = None
    """Model files as JSON: a list of paths, where a nested list is one model in several files."""

    model_id_with_origin_paths: str | None = None
    """Model id and file pattern, comma separated, e.g.
    Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors; looked for in ./models, then
    downloaded from ModelScope. Without any model option, the small model inside the package is trained."""

    tokenizer_path: str | None = None
    """Folder of the tokenizer (default: beside the text encoder, else downloaded)."""

    dtype: Literal["bfloat16", "float32"] | None = None
    """Type that is computed in, and that frozen weights have (default: float32 on a CPU, else bfloat16)."""

    # --- training ---

    learning_rate: float = 1e-4
    """Learning rate."""

    num_epochs: int = 1
    """Passes over the dataset."""

    max_steps: int | None = None
    """Stop after so many optimizer steps, however many epochs that takes; overrides num_epochs."""

    output_path: str = "./models"
    """Folder for checkpoints, logs and samples."""

    remove_prefix_in_ckpt: str = "pipe.dit."
    """Prefix taken off the keys of saved weights."""

    save_steps: int | None = None
    """Save every so many optimizer steps (default: after each epoch)."""

    keep_states: int = 2
    """How many trainer states, the newest, stay on the disk for resuming; weights are all kept."""

    resume_from: str | None = None
    """latest, or a state folder (step-N.state): go on from there, exactly as if never interrupted."""

    seed: int = 42
    """Of initialisation, order, noise, timesteps and dropout."""

    optimizer: str = "adamw"
    """adamw, adamw8bit (bitsandbytes), adafactor, prodigy (prodigyopt), or a class by import path."""

    optimizer_args: str = "{}"
    """Further arguments of the optimizer, as JSON, e.g. {"betas": [0.9, 0.99]}."""

    weight_decay: float = 0.01
    """Weight decay of the optimizer."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""

    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""

    ema_decay: float = 0.0
    """Decay of a moving average of the trained weights, e.g. 0.999, saved as step-N-ema and used for
    validation; 0 keeps none."""

    spike_factor: float = 0.0
    """Skip steps whose gradient norm exceeds the median of the last 50 by this factor; 0 skips none."""

    max_bad_steps: int = 5
    """Stop after so many skipped steps in a row. Steps with a NaN or infinite loss are always skipped."""

    optimizer_in_backward: bool = False
    """Let every weight take its step as soon as its gradient is known, so that not all gradients exist at a
    time; weights in bfloat16 are rounded stochastically. One process, no accumulation, no clipping
    (max_grad_norm 0)."""

    optimizer_on_host: bool = False
    """Keep the optimizer's states in host memory; those of a weight visit the device for its step. With
    optimizer_in_backward."""

    # --- what is trained ---

    trainable_models: str | None = None
    """Models to train in full: dit, text_encoder, vae, comma separated."""

    lora_base_model: str | None = None
    """Model to add a LoRA to: dit."""

    lora_target_modules: str = LORA_TARGETS
    """Layers that get a LoRA, by the end of their names, comma separated."""

    lora_rank: int = 32
    """Rank of the LoRA."""

    lora_checkpoint: str | None = None
    """LoRA file of any format, or PEFT folder, to begin with: its change of the weights is taken over."""

    lora_alpha: float | None = None
    """The LoRA is scaled by alpha / rank (default: the rank)."""

    lora_dropout: float = 0.0
    """Dropout before the LoRA."""

    adapter: Adapter = "lora"
    """Kind of the LoRA: lora, dora (with magnitudes) or lokr (Kronecker products)."""

    trainable_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which trained weights and optimizer states are kept; bfloat16 halves the memory of full
    fine-tuning, but small updates are rounded away."""

    # --- objective ---

    timestep_sampling: Literal["reference", "uniform", "logit_normal"] = "reference"
    """reference: one of DiffSynth's 1000 shifted timesteps; uniform: sigma uniform in (0, 1); logit_normal:
    sigma = sigmoid(logit_mean + logit_std * normal)."""

    timestep_shift: float | None = None
    """mu of sigma' = e^mu / (e^mu + 1/sigma - 1) (default: 0.8 for reference, else 0)."""

    resolution_shift: bool = False
    """Take mu from the size of the picture, as in inference."""

    logit_mean: float = 0.0
    """Mean of logit_normal."""

    logit_std: float = 1.0
    """Standard deviation of logit_normal."""

    loss_weighting: Literal["reference", "none", "min_snr"] = "reference"
    """reference: DiffSynth's bell curve over sigma; none: 1; min_snr: min(SNR, gamma) sigma^2 with
    SNR = ((1 - sigma) / sigma)^2."""

    min_snr_gamma: float = 5.0
    """gamma of min_snr."""

    # --- extra inputs ---

    extra_inputs: str | None = None
    """Extra model inputs, comma separated. Text-to-image training has none."""

    # --- memory ---

    use_gradient_checkpointing: bool = False
    """Compute the blocks again in the backward pass instead of keeping their activations."""

    use_gradient_checkpointing_offload: bool = False
    """The same, and keep the inputs of the blocks in CPU memory."""

    gradient_checkpointing: Literal["none", "selective", "full", "auto"] = "none"
    """What blocks compute again in the backward pass: none; selective: all but attention and the end of the
    MLP, whose results take little memory; full: everything, as use_gradient_checkpointing; auto: block by
    block as little as the free memory allows."""

    base_weights: Literal["plain", "fp8", "int8", "fp8-storage"] = "plain"
    """How the frozen weights of the dit's blocks are kept under a LoRA: as they are, or in 8 bits with scales
    (half the memory). fp8 and int8 compute in 8 bits where the device can, fp8-storage does not."""

    vram_limit: float | None = None
    """GiB of device memory for the run. Frozen weights that do not fit are streamed from host memory block by
    block; only for a LoRA."""

    modulation_table: bool = True
    """Keep the values of the frozen modulation for each timestep in host memory, instead of its weights, a
    third of the dit, on the device. The results are the same."""

    cuda_graphs: bool = True
    """Record the steps of each shape as CUDA graphs, instead of launching every kernel by itself; with many
    lengths of captions, recording takes its time too."""

    sharding: Literal["none", "optimizer", "full", "zero2", "zero3"] = "none"
    """How several processes share the dit: none, each has all of it (data parallelism); optimizer, gradients
    and optimizer states are spread; full, the weights too (both by FSDP2); zero2, zero3: the same by the
    package deepspeed."""

    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up for one optimizer step."""

    # --- saved files ---

    align_to_opensource_format: bool = False
    """Save the LoRA in the spelling that diffusers, ComfyUI, DiffSynth, InvokeAI and OneTrainer all read."""

    lora_format: str | None = None
    """Save the LoRA in this format of `qwenimage lora` (default: diffsynth; diffusers for dora, comfyui for
    lokr)."""

    push_to_hub: str | None = None
    """ORG/NAME: upload the last weights, the model card and the pictures there when the run is finished."""

    hub: Literal["huggingface", "modelscope"] = "huggingface"
    """The hub of push_to_hub; log in to it beforehand."""

    hub_private: bool = False
    """Make a new repository of push_to_hub private."""

    # --- logs and validation ---

    loggers: str = ""
    """tensorboard, wandb, comma separated, beside log.csv and loss.png, which are always written."""

    validation_prompts: tuple[str, ...] = ()
    """Prompts to render with the weights as they are: before the first step, every validation_steps, and at
    the end."""

    validation_steps: int | None = None
    """Steps between validations (default: at each save)."""

    validation_size: int = 1024
    """Sides of validation pictures in pixels, if height and width are not given."""

    validation_inference_steps: int = 30
    """Denoising steps of a validation picture."""

    validation_cfg: float = 4.0
    """Guidance scale of validation pictures; 1 is none."""

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA is trained, and not whole models."""
        return self.lora_base_model is not None

    @property
    def trained_models(self) -> tuple[str, ...]:
        """Names of the models whose weights are trained."""
        return comma_list(self.lora_base_model or self.trainable_models or "")

    @property
    def checkpointing(self) -> str:
        """What blocks compute again in the backward pass: as `gradient_checkpointing`, or "offload"."""
        if self.use_gradient_checkpointing_offload:
            return "offload"
        return "full" if self.use_gradient_checkpointing else self.gradient_checkpointing

    def on_device(self, device_type: str) -> "TrainConfig":
        """The options with defaults that depend on the device filled in."""
        dtype = self.dtype or ("float32" if device_type == "cpu" else "bfloat16")
        return replace(self, dtype=dtype)

    def check(self) -> None:
        """Refuse options that are out of range or contradict each other.

        Raises:
            ValueError: with what is wrong and what to do.
        """
        self._check_numbers()
        self._check_models()
        if (self.height is None) != (self.width is None):
            raise ValueError(
                f"height is {self.height} and width is {self.width}: give both for a fixed size, or neither "
                "for dynamic resolution."
            )
        if self.extra_inputs:
            raise ValueError(
                f"extra_inputs {self.extra_inputs!r}: training from text to image takes no further inputs; "
                "leave it out."
            )
        if self.gradient_checkpointing in ("selective", "auto") and self.checkpointing in ("full", "offload"):
            raise ValueError(
                f"gradient_checkpointing is {self.gradient_checkpointing}, use_gradient_checkpointing means "
                "full; leave one of them out."
            )
        if self.optimizer_in_backward and (
            self.max_grad_norm or self.spike_factor or self.gradient_accumulation_steps > 1
        ):
            raise ValueError(
                "optimizer_in_backward never has all gradients together: set max_grad_norm and spike_factor "
                "to 0 and gradient_accumulation_steps to 1."
            )
        if self.optimizer_on_host and not self.optimizer_in_backward:
            raise ValueError("optimizer_on_host needs optimizer_in_backward, where weights step one by one.")
        if self.optimizer_in_backward and self.sharding != "none":
            raise ValueError("optimizer_in_backward is for one process; leave sharding out.")
        if self.sharding in ZERO_STAGES and (self.ema_decay or self.spike_factor):
            raise ValueError(f"sharding {self.sharding} goes with neither ema_decay nor spike_factor.")
        unknown = [name for name in comma_list(self.loggers) if name not in ("tensorboard", "wandb")]
        if unknown:
            raise ValueError(f"loggers knows tensorboard and wandb, not {', '.join(unknown)}.")
        if not comma_list(self.data_file_keys):
            raise ValueError("data_file_keys is empty; name the column of the pictures, such as image.")

    def _check_numbers(self) -> None:
        for name in ("height", "width", "bucket_step", "validation_size"):
            value = getattr(self, name)
            if value is not None and (value < SIDE or value % SIDE):
                raise ValueError(f"{name} must be a multiple of {SIDE}, got {value}.")
        for name in (
            *("dataset_repeat", "batch_size", "num_epochs", "max_steps", "save_steps", "keep_states"),
            *("max_bad_steps", "lora_rank", "gradient_accumulation_steps", "validation_steps"),
            *("validation_inference_steps",),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("learning_rate", "logit_std", "min_snr_gamma", "lora_alpha", "vram_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value}.")
        for name in ("weight_decay", "warmup_steps", "max_grad_norm", "spike_factor", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("caption_dropout", "ema_decay", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}.")
        if self.max_pixels < SIDE * SIDE:
            raise ValueError(f"max_pixels must be at least {SIDE * SIDE}, got {self.max_pixels}.")

    def _check_models(self) -> None:
        if self.model_paths and self.model_id_with_origin_paths:
            raise ValueError("Give either model_paths or model_id_with_origin_paths, not both.")
        if not self.trainable_models and not self.lora_base_model:
            raise ValueError("Say what to train: trainable_models (such as dit), or lora_base_model (dit).")
        if self.trainable_models and self.lora_base_model:
            raise ValueError("Give either trainable_models or lora_base_model, not both.")
        unknown = [name for name in self.trained_models if name not in MODELS]
        if unknown or not self.trained_models:
            raise ValueError(f"Unknown model {', '.join(unknown)!r}; there are {', '.join(MODELS)}.")
        if not self.is_lora:
            if self.lora_checkpoint:
                raise ValueError("lora_checkpoint is for a LoRA: give lora_base_model dit.")
            if self.base_weights != "plain" or self.vram_limit is not None:
                raise ValueError(
                    "base_weights and vram_limit are for the frozen weights under a LoRA; whole models have "
                    "none."
                )
            if self.sharding != "none" and self.trained_models != ("dit",):
                raise ValueError(f"sharding is for the dit, not for {', '.join(self.trained_models)}.")
            if self.align_to_opensource_format or self.lora_format:
                raise ValueError(
                    "align_to_opensource_format and lora_format are for a LoRA; trainable_models saves whole "
                    "models."
                )
            return
        if self.sharding != "none" and (self.base_weights != "plain" or self.vram_limit is not None):
            raise ValueError("sharding goes with neither base_weights nor vram_limit; leave one of them out.")
        if self.trained_models != ("dit",):
            raise ValueError(f"A LoRA can be added to dit, not to {', '.join(self.trained_models)}.")
        if not comma_list(self.lora_target_modules):
            raise ValueError("lora_target_modules is empty; name layers, such as to_q,to_k,to_v.")
        if self.align_to_opensource_format and self.lora_format:
            raise ValueError("Give either align_to_opensource_format or lora_format, not both.")
        if self.adapter == "lokr" and self.lora_alpha not in (None, self.lora_rank):
            raise ValueError("lokr is saved without a scale: leave lora_alpha out.")


def comma_list(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list, without spaces around them and without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
