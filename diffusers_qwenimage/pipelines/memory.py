"""`enable_vram_management`, `memory_report`: for the pipelines of both doors."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch

from diffusers_qwenimage.checkpoint import Checkpoint
from diffusers_qwenimage.offload import Source
from diffusers_qwenimage.offload.stream import device_of
from diffusers_qwenimage.precompile import compile_both

from .context import context_bytes, expected_context_bytes, measured_peak
from .in_place import open_components
from .memory_report import MemoryReport, component_reports
from .needs import Demand
from .rates import forward_flops, forward_seconds, measured_rates
from .vram import VramManager, available_bytes
from .vram_plan import GIB, Parts, compute_dtype

logger = logging.getLogger(__name__)


class VramManagementMixin(ABC):
    """Device memory as a budget; the class around it says of what, for which pictures and where."""

    _vram: VramManager | None = None

    def enable_vram_management(
        self,
        vram_limit: float | None = None,
        vram_buffer: float = 0.5,
        num_persistent_param_in_dit: int | None = None,
        *,
        device: str | torch.device | None = None,
        strict: bool = False,
        source: Source | None = None,
        demand: Demand | None = None,
    ) -> MemoryReport:
        """Run within a budget of device memory: what does not fit streams from host memory as it is needed.

        Pictures are the same, bit for bit, but for two things that happen only if the budget asks for them:
        the VAE works in tiles, and says so; and with the least budgets the branches of the guidance run one
        after the other, which a GPU can round differently (the report says so).
        Quantise and fuse before, load LoRAs before or after. Call it again to change the budget.

        Args:
            vram_limit: GiB that may be in use on the device, included what CUDA and its libraries will have
                (less than 1 GiB). None: all that is free on it. 0: as little as can be. Below what can work,
                the least that works is used, with a warning.
            vram_buffer: GiB of that which stay unplanned, since sizes of activations are estimates.
            num_persistent_param_in_dit: the most parameters of the transformer that stay on the device. Will
                be removed; use `vram_limit`.
            device: what to compute on; None: where the pipeline computes, or the GPU if there is one.
            strict: refuse a limit that cannot be kept, instead of exceeding it.
            source: where streamed weights wait: "pinned" host memory, or as they are ("mapped" files); None
                chooses pinned if there is enough of it, and goes on with weights that are being pinned.
            demand: the largest picture to place the weights for; None: the default picture. A larger one is
                planned for when it comes.

        Returns:
            What is where now, and what it costs.

        Raises:
            ValueError: if the device has not enough memory even so; with `strict`, if the limit is too small.
        """
        return self._manage(
            vram_limit,
            vram_buffer,
            num_persistent_param_in_dit,
            target=self._vram_device(device),
            strict=strict,
            source=source,
            demand=demand,
        )

    def _manage(
        self,
        vram_limit: float | None,
        vram_buffer: float,
        num_persistent_param_in_dit: int | None = None,
        *,
        target: torch.device,
        strict: bool,
        source: Source | None = None,
        files: Mapping[str, Checkpoint] | None = None,
        demand: Demand | None = None,
    ) -> MemoryReport:
        """`enable_vram_management`; components named in `files` are on meta, and get their weights now."""
        limit = _checked(vram_limit, vram_buffer, num_persistent_param_in_dit)
        if num_persistent_param_in_dit is not None:
            logger.warning("num_persistent_param_in_dit will be removed; use vram_limit.")
        self._refuse_other_offloading()
        parts = self._vram_parts()
        buffer, context = round(vram_buffer * GIB), expected_context_bytes(target, compute_dtype(parts))
        budget = available_bytes(parts, target) - (context - context_bytes(target))
        if limit is not None:
            budget = min(budget, limit - context)
        manager = VramManager(
            self._vram_parts,
            target,
            budget=budget - buffer,
            buffer=buffer,
            context=context,
            strict=strict,
            persistent_parameters=num_persistent_param_in_dit,
            source=source,
            show_progress=self._shows_progress(),
            files=files,
        )
        compile_both(parts.transformer, parts.vae, target)  # while weights are moved
        manager.prepare(demand or self._vram_demand())
        if self._vram is not None:
            self._vram.stop_managing()
        self._vram = manager
        report = self.memory_report()
        logger.info("%s", report)
        return report

    def disable_vram_management(self, device: str | torch.device = "cpu") -> None:
        """Whole components again, on `device`."""
        if self._vram is not None:
            self._vram.stop(device)
            self._vram = None

    def finish_pinning(self) -> None:
        """Wait until all that streams is in pinned memory, as it is some time after loading with a budget.

        Steps are faster then. Does nothing where nothing is to be pinned.

        Raises:
            RuntimeError: while a picture is made.
        """
        if self._vram is not None:
            self._vram.finish_pinning()

    def memory_report(self) -> MemoryReport:
        """What is on the device, what streams and from where, the expected peak and time per step.

        Raises:
            ValueError: if `enable_vram_management` was not called.
        """
        if self._vram is None or self._vram.plan is None:
            raise ValueError("There is nothing to report before enable_vram_management().")
        plan, device, parts = self._vram.plan, self._vram.device, self._vram_parts()
        aside = self._vram.aside
        rates = measured_rates(device, compute_dtype(parts))
        demand, seconds, resident = plan.demand, 0.0, 0.0
        if parts.transformer is not None:
            each = demand.tokens // demand.samples
            flops = forward_flops(parts.transformer, samples=demand.samples, tokens=each)
            resident = forward_seconds(flops, rates)
            assert plan.transformer is not None
            seconds = plan.transformer.seconds_per_pass(compute=resident, link=rates.link)
        ratio = parts.vae.spatial_compression_ratio if parts.vae is not None else 1
        return MemoryReport(
            device=str(device),
            budget=None if plan.budget is None else plan.budget + aside,
            buffer=self._vram.buffer,
            context=self._vram.context,
            demand=demand,
            components=component_reports(plan, self._vram.unpinned_bytes),
            peaks=dict(plan.peaks),
            smallest=plan.smallest_bytes + aside,
            pinned=self._vram.pinned_bytes,
            tile=None if plan.tile is None else plan.tile * ratio,
            frugal=plan.frugal,
            seconds_per_step=seconds,
            seconds_resident=resident,
            rates=rates,
            measured_peak=measured_peak(device),
        )

    # --- for the pipelines ---

    @abstractmethod
    def _vram_parts(self) -> Parts:
        """The components as they are now."""

    @abstractmethod
    def _vram_demand(self) -> Demand:
        """What is planned for at first: the default picture, guided."""

    @abstractmethod
    def _vram_device(self, device: str | torch.device | None) -> torch.device:
        """What to compute on, where the user asks for `device`."""

    def _shows_progress(self) -> bool:
        return True

    @abstractmethod
    def _refuse_other_offloading(self) -> None:
        """Raise ValueError if something else moves the weights."""

    def _encoding_text(self) -> AbstractContextManager[None]:
        return nullcontext() if self._vram is None else self._vram.encoding_text()

    def _denoising(self, demand: Demand) -> AbstractContextManager[None]:
        return nullcontext() if self._vram is None else self._vram.denoising(demand)


class DiffusersVramMixin(VramManagementMixin):
    """The same for a `DiffusionPipeline`: its own ways to move weights are refused while this is on."""

    @classmethod
    def from_pretrained_in_place(
        cls,
        source: str,
        *,
        vram_limit: float | None = None,
        vram_buffer: float = 0.5,
        weights: str | None = None,
        stream_from: Source | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        demand: Demand | None = None,
        **components: Any,
    ) -> Any:
        """Load a pipeline whose weights go from the files to where they will live, once, within a budget.

        What `from_pretrained` does with `vram_limit`, `weights`, `stream_from` or `device`.

        Args:
            source: folder, id, or `modelscope:ORG/NAME`.
            vram_limit, vram_buffer: as of `enable_vram_management`; a limit that cannot be kept is refused.
            weights: "fp8" or "int8": the transformer is quantised on its way. "fp8-storage": kept in fp8,
                computed with in `dtype`. "bf16", "fp16", "fp32": the type of everything.
            stream_from: "pinned": what does not fit is copied to pinned host memory first, which takes about
                a third of a second for each GB (measured on one machine). "mapped": it stays in the files,
                which must hold it as it is used: only the resident part is read before the first picture, but
                steps take longer. None: it streams from the files at first, as far as they hold it as it is
                used, and is pinned in the background from the second step on, if there is enough host memory
                (`finish_pinning` waits for that).
            device: what to compute on; None: the GPU if there is one.
            dtype: type of the weights; bfloat16 if not given.
            demand: the largest picture to place the weights for; None: the default picture.
            components: parts to use instead of those in the files, by name.

        Raises:
            ValueError: if the budget is too small, or an argument is unknown.
            FileNotFoundError, DownloadError: if files are missing.
        """
        known = cls._get_signature_keys(cls)[0]  # type: ignore[attr-defined]
        if unknown := sorted(set(components) - set(known)):
            raise ValueError(
                f"With vram_limit or weights, from_pretrained does not take {', '.join(unknown)}. Load "
                "without them, then call enable_vram_management()."
            )
        waiting = open_components(
            source,
            dtype=dtype or torch.bfloat16,
            weights=weights,
            given=components,
            revision=revision,
            local_only=local_files_only,
        )
        pipeline = cls(**waiting.components)
        name = "cuda" if device is None and torch.cuda.is_available() else device or "cpu"
        target = device_of(name)
        strict = vram_limit is not None and vram_limit > 0
        pipeline._manage(
            vram_limit,
            vram_buffer,
            target=target,
            strict=strict,
            source=stream_from,
            files=waiting.files,
            demand=demand,
        )
        return pipeline

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; with VRAM management on, the components stay where they are.

        Raises:
            ValueError: if it would move or cast them then.
        """
        dtype, device = _target(args, kwargs)
        if self._vram is None:
            if dtype is None and device is not None:
                parts = self._vram_parts()
                compile_both(parts.transformer, parts.vae, torch.device(device))  # while weights are moved
            return super().to(*args, **kwargs)  # type: ignore[misc]
        if dtype is None and (device is None or _same(device, self._vram.device)):
            return self
        _refuse(f"to({device or dtype})", "It places weights by itself")

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; refused with VRAM management on."""
        self._only_without("enable_model_cpu_offload")
        super().enable_model_cpu_offload(*args, **kwargs)  # type: ignore[misc]

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; refused with VRAM management on."""
        self._only_without("enable_sequential_cpu_offload")
        super().enable_sequential_cpu_offload(*args, **kwargs)  # type: ignore[misc]

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; refused with VRAM management on."""
        self._only_without("enable_group_offload")
        super().enable_group_offload(*args, **kwargs)  # type: ignore[misc]

    @property
    def _execution_device(self) -> torch.device:
        if self._vram is not None:
            return self._vram.device
        device: torch.device = super()._execution_device  # type: ignore[misc]
        return device

    def _only_without(self, name: str) -> None:
        if self._vram is not None:
            _refuse(name, "It moves whole components; VRAM management streams the parts that do not fit")

    def _refuse_other_offloading(self) -> None:
        parts = self._vram_parts()
        if getattr(self, "_all_hooks", None):
            raise ValueError(
                "CPU offload of diffusers is on and would move the weights too. Call pipe.remove_all_hooks() "
                "first."
            )
        for module in (parts.transformer, parts.text_encoder, parts.vae):
            if module is not None and (hasattr(module, "_hf_hook") or _is_group_offloaded(module)):
                raise ValueError(
                    f"{type(module).__name__} is offloaded by diffusers or accelerate (device_map, groups). "
                    "Load the pipeline without it, or remove its hooks first."
                )

    def _vram_device(self, device: str | torch.device | None) -> torch.device:
        if device is not None:
            return device_of(device)
        if self._vram is not None:
            return self._vram.device
        now: torch.device = self._execution_device
        if now.type == "cpu" and torch.cuda.is_available():
            now = torch.device("cuda")
        return device_of(now)

    def _shows_progress(self) -> bool:
        settings: dict[str, Any] = getattr(self, "_progress_bar_config", {})
        return not settings.get("disable", False)


def _checked(limit: float | None, buffer: float, persistent: int | None) -> int | None:
    for name, value in (
        ("vram_limit", limit),
        ("vram_buffer", buffer),
        ("num_persistent_param_in_dit", persistent),
    ):
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
    return None if limit is None else round(limit * GIB)


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.dtype | None, Any]:
    values = [*args, *kwargs.values()]
    dtype = next((value for value in values if isinstance(value, torch.dtype)), None)
    device = next((value for value in values if isinstance(value, str | torch.device | int)), None)
    return dtype, device


def _same(device: Any, ours: torch.device) -> bool:
    asked = torch.device(device)
    return asked.type == ours.type and asked.index in (None, ours.index)


def _is_group_offloaded(module: torch.nn.Module) -> bool:
    from diffusers.hooks.group_offloading import _is_group_offload_enabled

    return bool(_is_group_offload_enabled(module))


def _refuse(name: str, reason: str) -> NoReturn:
    raise ValueError(
        f"{name} cannot be used while VRAM management is on. {reason}. Call "
        "pipe.disable_vram_management() first, or change the budget with "
        "pipe.enable_vram_management(vram_limit=...)."
    )
