"""Latents and prompt embeddings, computed once and kept on the disk.

An entry is a safetensors file named by the hash of everything that it depends on: the content of the picture
and its size, or the text; the weights of the model; the type. It is written under a temporary name and
renamed, so processes may share the folder, and it states the hash of its tensor, so damage is seen; a damaged
entry is made again.
"""

import gc
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from diffusers_qwenimage import latents as packing
from diffusers_qwenimage.files import read_header, write_safetensors
from diffusers_qwenimage.offload import stream, streamed, unstream
from diffusers_qwenimage.prompt import MAX_PROMPT_TOKENS, TEXT_TO_IMAGE, PromptEncoder

from .data import Sample, load_picture, to_pixels
from .hashing import digest_of, tensor_digest
from .models import ModelFiles

logger = logging.getLogger(__name__)

KEY = "tensor"


class TensorCache:
    """A folder of tensors by name; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, name: str) -> Tensor | None:
        """The tensor, or None if it is not there or damaged (which is logged)."""
        if self.folder is None:
            return None
        path = self._path(name)
        if not path.exists():
            return None
        try:
            metadata = read_header(path).metadata
            with safe_open(path, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(KEY)
            if metadata.get("sha256") != tensor_digest(tensor):
                raise ValueError("its content does not have the hash that it states")
        except (ValueError, OSError, SafetensorError) as error:
            logger.warning("The cache file %s is damaged (%s); it is made again.", path, error)
            return None
        return tensor

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor."""
        if self.folder is not None:
            stored = tensor.detach().cpu()
            write_safetensors(self._path(name), {KEY: stored}, {"sha256": tensor_digest(stored)})

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.safetensors"


class Encoders:
    """Samples to latents and texts to embeddings: from the cache, else by the models, loaded when needed.

    Args:
        files: the models.
        cache: of what they made before.
        dtype: that they compute in.
        device: where they do.
        text_budget: bytes that the text encoder's weights may take there; the rest streams from host memory.
            None: all of them.
    """

    def __init__(
        self,
        files: ModelFiles,
        cache: TensorCache,
        *,
        dtype: torch.dtype,
        device: torch.device,
        text_budget: int | None = None,
    ) -> None:
        self.files = files
        self.cache = cache
        self.dtype = dtype
        self.device = device
        self.text_budget = text_budget
        self._vae: Any = None
        self._text_encoder: Any = None
        self._tokenizer: Any = None
        self._prompts = PromptEncoder()
        self._trained: set[str] = set()
        self._vae_key = digest_of("latents", files.fingerprint("vae"), str(dtype))
        self._text_key = digest_of(
            "embeds", files.fingerprint("text_encoder"), TEXT_TO_IMAGE.text, str(dtype)
        )

    @property
    def vae(self) -> Any:
        """The VAE, loaded if it is not."""
        if self._vae is None:
            self._vae = self.files.load("vae", self.dtype, self.device)
        return self._vae

    @property
    def text_encoder(self) -> Any:
        """The text encoder, loaded if it is not."""
        if self._text_encoder is None:
            streams = self.text_budget is not None
            place = torch.device("cpu") if streams else self.device
            self._text_encoder = self.files.load("text_encoder", self.dtype, place)
            if streams:  # from mapped files: pinning takes longer than encoding a few captions
                stream(self._text_encoder, device=self.device, vram_limit=self.text_budget, source="mapped")
        return self._text_encoder

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded if it is not."""
        if self._tokenizer is None:
            self._tokenizer = self.files.load_tokenizer()
        return self._tokenizer

    @property
    def loaded(self) -> list[str]:
        """Which models are in memory."""
        models = {"vae": self._vae, "text_encoder": self._text_encoder}
        return [name for name, model in models.items() if model is not None]

    def use(self, name: str, model: Any) -> None:
        """Take over a model ("vae" or "text_encoder") that is trained, instead of loading it."""
        self._trained.add(name)
        setattr(self, f"_{name}", model)

    def release(self) -> None:
        """Give up the memory of both models, but for what is trained."""
        streams = self._text_encoder is not None and streamed(self._text_encoder) is not None
        if streams:
            unstream(self._text_encoder, device=None)
        for name in {"vae", "text_encoder"} - self._trained:
            setattr(self, f"_{name}", None)
        self._prompts.clear()
        if streams:
            gc.collect()  # what streams refers to itself
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fill(
        self,
        samples: Iterable[Sample],
        texts: Iterable[str],
        *,
        progress: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Put into the cache what is not in it, and give up the models; `stopped` ends it early.

        Raises:
            BadImage: if a picture cannot be read any more.
            ValueError: if the VAE makes NaN of a picture.
        """
        for sample in tqdm(list(samples), desc="Caching latents", disable=not progress):
            if stopped():
                break
            self.latents(sample)
        for text in tqdm(list(texts), desc="Caching prompts", disable=not progress):
            if stopped():
                break
            self.embeds(text)
        self.release()

    @torch.no_grad()
    def latents(self, sample: Sample) -> Tensor:
        """Packed latents [L, 4 z] of a picture (the mode of the posterior), on the CPU."""
        name = digest_of(self._vae_key, sample.digest, sample.size)
        return self._cached(name, sample.name, lambda: self.encode_picture(sample))

    @torch.no_grad()
    def embeds(self, text: str) -> Tensor:
        """Embeddings [T, width] of a text, on the CPU."""
        return self._cached(digest_of(self._text_key, text), repr(text), lambda: self._encode_text(text))

    def encode_picture(self, sample: Sample) -> Tensor:
        """Packed latents [L, 4 z] from the VAE; with gradients where its weights have them."""
        pixels = to_pixels(load_picture(sample)).to(self.device, self.vae.dtype)
        return packing.encode(self.vae, pixels, sample=False)[0]

    @torch.no_grad()
    def encode_text(self, text: str) -> Tensor:
        """Embeddings [T, width] of a text by the text encoder as it is now."""
        return self.encode_text_with_gradients(text)

    def encode_text_with_gradients(self, text: str) -> Tensor:
        """Embeddings [T, width] from the text encoder, recording gradients."""
        prefix = TEXT_TO_IMAGE.prefix_tokens
        ids = self.tokenizer(TEXT_TO_IMAGE.text.format(text))["input_ids"][: MAX_PROMPT_TOKENS + prefix]
        tokens = torch.tensor([ids], device=self.device)
        output = self.text_encoder.model.language_model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
        )
        embeds: Tensor = output.last_hidden_state[0, prefix:]
        return embeds

    def _encode_text(self, text: str) -> Tensor:
        return self._prompts.encode(self.text_encoder, self.tokenizer, [text], device=self.device)[0]

    def _cached(self, name: str, what: str, make: Callable[[], Tensor]) -> Tensor:
        tensor = self.cache.read(name)
        if tensor is None:
            tensor = make().to("cpu", self.dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{what} becomes NaN or infinite in {self.dtype}; try --dtype float32.")
            self.cache.write(name, tensor)
        return tensor
