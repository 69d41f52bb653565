"""HiDiffusion on a diffusers pipeline that stays in PyTorch: one call puts it in force, and it undoes itself.

Nothing counts steps inside the UNet. A `hidiff_export.diffusers_api.run_tracker.RunTracker` follows the pipeline's
scheduler, and a hook before each UNet call installs the phase that the step and the latents' size ask for.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers.utils.torch_utils import is_compiled_module

from hidiff_export.diffusers_api.forecast_calls import ForecastCalls
from hidiff_export.diffusers_api.kept_features import KeptFeatures
from hidiff_export.diffusers_api.method_patches import MethodPatches
from hidiff_export.diffusers_api.reused_calls import ReusedCalls
from hidiff_export.diffusers_api.run_tracker import RunTracker
from hidiff_export.diffusers_api.unguided_calls import UnguidedCalls, control_of_prompts, has_both_halves, prompts_half
from hidiff_export.errors import InputError
from hidiff_export.families.family import PIXELS_PER_LATENT, Family, Task, unet_config
from hidiff_export.families.geometry import UNetGeometry
from hidiff_export.families.hidiffusion_rules import Layout, phase_rule
from hidiff_export.families.reuse_depths import reuse_error
from hidiff_export.modules.controlnet import fit_residuals, resized_control
from hidiff_export.modules.raunet import install_phase
from hidiff_export.modules.window_attention import WINDOW_ORDERS, WindowTables
from hidiff_runtime.format.forecast_record import Forecast
from hidiff_runtime.phases import Phase, PhaseKind, PhaseRule, StepRange
from hidiff_runtime.reused_features import Reuse

Compat = Literal["native", "published"]

_OF_ANOTHER_FAMILY = {
    "stabilityai/sdxl-turbo": Family.SDXL_TURBO,
    "playgroundai/playground-v2-1024px-aesthetic": Family.PLAYGROUND,
    "playgroundai/playground-v2.5-1024px-aesthetic": Family.PLAYGROUND,
}
"""Checkpoints with SDXL's architecture and thresholds of their own, which nothing but their name tells."""

_SHIFT_EDGES = (0.25, 0.5, 0.75)
_DOWN_RESIDUALS, _MID_RESIDUAL = "down_block_additional_residuals", "mid_block_additional_residual"


@dataclass(frozen=True)
class _Options:
    """What was asked for, resolved for the pipeline at hand."""

    family: Family
    task: Task
    layout: Layout
    raunet: bool
    rule: PhaseRule | None
    compat: Compat
    forecast: Forecast | None
    guidance: StepRange | None
    reuse: Reuse | None

    def rule_for(self, latent_height: int, latent_width: int) -> PhaseRule:
        """Returns the rule for latents of this size."""
        pixels = (latent_width * PIXELS_PER_LATENT, latent_height * PIXELS_PER_LATENT)
        rule = self.rule or phase_rule(self.family, self.task, *pixels)
        if self.guidance is not None:
            rule = replace(rule, guidance=self.guidance)
        return rule if self.raunet else replace(rule, strided=None, pooled=None)


class HiDiffusion:
    """HiDiffusion in force on one pipeline: made by :func:`apply_hidiffusion`, a context manager, removed once.

    Attributes:
        family: whose thresholds and layout are in use.
        task: which variant of the thresholds is in use.
        phase: of the UNet call at hand, or of the last one, and whether it is shallow; None before the first.
        window_shifts: int32 [windowed blocks], each 0 to 3, of the same call, or a row of them for each picture where
            each has a generator; None before the first, and if no block is windowed.
    """

    def __init__(self, pipe: Any, options: _Options) -> None:
        self.family = options.family
        self.task = options.task
        self.phase: Phase | None = None
        self.window_shifts: torch.Tensor | None = None
        self._options = options
        self._pipe = pipe
        self._unet = pipe.unet
        self._signature = inspect.signature(pipe.unet.forward)
        self._installed: tuple[PhaseKind, int, int] | None = None
        self._geometry: UNetGeometry
        self._tables: WindowTables
        self._phase_handles = ExitStack()
        overrides = MethodPatches()
        with ExitStack() as handles:
            handles.callback(overrides.undo)
            self._run = RunTracker(pipe, overrides)
            handles.callback(self._run.close)
            self._kept: KeptFeatures | None = None
            if options.reuse is not None:
                self._kept = KeptFeatures(options.reuse, self._run, self._phases_of, options.forecast)
                overrides.wrap(pipe.unet, "forward", ReusedCalls(pipe.unet, options.reuse.depth, self._kept))
            self._unguided = UnguidedCalls()
            overrides.wrap(pipe.unet, "forward", self._unguided)
            self._forecast = None if options.forecast is None else ForecastCalls(options.forecast, self._run)
            if self._forecast is not None:
                overrides.wrap(pipe.unet, "forward", self._forecast)
            if options.task.has_control:
                overrides.wrap(pipe.controlnet, "forward", resized_control(self._in_use, self._asked_of_control))
            handles.callback(pipe.unet.register_forward_pre_hook(self._before_unet, with_kwargs=True).remove)
            handles.callback(lambda: self._phase_handles.close())
            self._handles = handles.pop_all()

    @property
    def computed(self) -> bool:
        """Whether the evaluation at hand is computed, and not forecast."""
        return self._forecast is None or self._forecast.computed

    @property
    def features_taken(self) -> torch.Tensor | None:
        """The deep features that the UNet call at hand takes, from before it begins; None where it has all layers."""
        shallow = self.phase is not None and self.phase.shallow
        return self._kept.features if shallow and self._kept is not None else None

    def __enter__(self) -> HiDiffusion:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leaves the pipeline, its UNet, scheduler and ControlNet exactly as they were; a second call does nothing."""
        self._handles.close()

    def _phases_of(self, latent_height: int, latent_width: int) -> list[Phase]:
        rule = self._options.rule_for(latent_height, latent_width)
        return [rule.phase_at(*position) for position in self._run.positions()]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # runs as it is, and refuses, in a compiled UNet too
    def _before_unet(self, _unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._signature.bind(*args, **kwargs)
        self._unguided.halved, batch = self._halves(call.arguments["sample"]), len(call.arguments["sample"])
        if self._forecast is not None:
            self._forecast.batch = batch
        if self._unguided.halved:
            call.arguments.update({name: prompts_half(value, batch) for name, value in call.arguments.items()})
        latents: torch.Tensor = call.arguments["sample"]
        height, width = latents.shape[-2:]
        shallow = self._kept is not None and self._kept.taken_for(latents) is not None
        self.phase = phase = replace(self._phase_at_hand(height, width), shallow=shallow)
        self._install(phase, latents)
        if self._options.layout.windowed_blocks:
            generators = self._run.generators if self._options.compat == "native" else ()
            self.window_shifts = draw_window_shifts(generators, len(self._options.layout.windowed_blocks))
            orders = self._tables(_shifts_of(self.window_shifts, len(latents)).to(latents.device))
            given = call.arguments.get("cross_attention_kwargs") or {}
            call.arguments["cross_attention_kwargs"] = {**given, WINDOW_ORDERS: orders}
        self._fit_residuals(phase, call.arguments)
        return call.args, call.kwargs

    def _phase_at_hand(self, latent_height: int, latent_width: int) -> Phase:
        return self._options.rule_for(latent_height, latent_width).phase_at(*self._run.position())

    def _halves(self, latents: torch.Tensor) -> bool:
        """Returns whether a call for these latents, which the pipeline guides, is for the prompts' half of them."""
        return has_both_halves(self._pipe, latents) and self._phase_at_hand(*latents.shape[-2:]).unguided

    def _asked_of_control(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns what a ControlNet is asked in place of these arguments, by name."""
        return control_of_prompts(arguments) if self._halves(arguments["sample"]) else arguments

    def _install(self, phase: Phase, latents: torch.Tensor) -> None:
        """Changes the UNet's phase where the step or the size asks for another."""
        height, width = latents.shape[-2:]
        wanted = (phase.kind, height, width)
        if self._installed == wanted:
            return
        _check_not_compiled(self._pipe.unet)
        self._phase_handles.close()
        self._installed = None
        layout = self._options.layout
        self._geometry = UNetGeometry.of(self._unet.config, layout, phase, height, width)
        self._tables = WindowTables(self._geometry.windows).to(latents.device)
        self._phase_handles = install_phase(self._unet, layout, self._geometry)
        self._installed = wanted

    def _fit_residuals(self, phase: Phase, arguments: dict[str, Any]) -> None:
        down, mid = arguments.get(_DOWN_RESIDUALS), arguments.get(_MID_RESIDUAL)
        if down is None or mid is None:
            return
        arguments[_DOWN_RESIDUALS], arguments[_MID_RESIDUAL] = (
            fit_residuals(down, mid, self._geometry) if phase.control and self.computed else (None, None)
        )

    def _in_use(self, latent_height: int, latent_width: int) -> bool:
        return self.computed and self._phase_at_hand(latent_height, latent_width).control


def apply_hidiffusion(
    pipe: Any,
    *,
    raunet: bool = True,
    windows: bool = True,
    compat: Compat = "native",
    rule: PhaseRule | None = None,
    forecast: Forecast | bool = False,
    guidance_until: StepRange | float | None = None,
    reuse: Reuse | int | None = None,
    family: Family | None = None,
    task: Task | None = None,
) -> HiDiffusion:
    """Puts HiDiffusion in force on a diffusers pipeline, until the returned handle is removed.

    ::

        with apply_hidiffusion(pipe):
            image = pipe(prompt, height=2048, width=2048, generator=generator).images[0]

    or, for good, ``apply_hidiffusion(pipe)``. Size, sampler and number of steps may change from run to run, and LoRA,
    FreeU, attention processors and offloading may come and go; only offloading submodule by submodule
    (``enable_sequential_cpu_offload``) has to be there before. The pipeline to call is the one handed in, not another
    one that shares its UNet.

    Args:
        pipe: a Stable Diffusion 1.5, 2.1 or SDXL pipeline of diffusers, ControlNet ones included.
        raunet: whether the deep feature maps shrink in the early steps (RAU-Net).
        windows: whether the top blocks attend in windows (MSW-MSA).
        compat: where the window shifts come from. "native": the run's ``generator``, ahead of each UNet call, so that
            one seed decides the picture; from a list of them each picture's own, which is then the picture that its
            generator gives without neighbors. "published": torch's global generator on the CPU, as
            the package ``hidiffusion`` draws them.
        rule: when each change is in force; by default the published thresholds for the family, the task and the size.
            Its ``reuse`` is followed where none is given here.
        forecast: whether only some evaluations are computed and the others forecast from them, or which.
        guidance_until: the part of the run, above 0 to 1, after which the UNet is asked for the prompts alone and
            nothing is guided; or the range outside of which. By default the rule's, else all is guided.
        reuse: after how many evaluations all of the UNet is computed anew; those between compute its last layer alone,
            or as many as :class:`~hidiff_runtime.reused_features.Reuse` says, over the deep features of the last full
            one. By default all are full.
        family: by default read from the UNet. SDXL-Turbo and Playground have the same UNet as SDXL and are known by
            the names of their published checkpoints alone, so name the family of a fine-tune or of a local copy.
        task: by default read from the pipeline and the UNet.

    Raises:
        InputError: this is no pipeline of those families, HiDiffusion is already in force on its UNet, or the forecast
            or the reuse cannot be followed.
    """
    if compat not in ("native", "published"):
        raise InputError("There is no such compat mode.", given=compat, advice='Choose "native" or "published".')
    unet = _unet_of(pipe)
    family = _family_of(pipe, unet) if family is None else Family(family)
    task = task_of(pipe, unet) if task is None else Task(task)
    if rule is not None and rule.control is None and task.has_control:
        raise InputError(
            "The rule never lets the ControlNet's residuals in.",
            given=rule,
            advice="Set its `control`, the fraction of the steps that take them; 0 for none.",
        )
    layout = Layout.of(family)
    _check_layout(unet, family, layout)
    layout = layout if windows else layout.without_windows()
    settings = forecast if isinstance(forecast, Forecast) else Forecast() if forecast else None
    if settings is not None and settings.fault:
        raise InputError(f"A forecast {settings.fault}.", given=repr(settings), advice="Or set forecast=True.")
    guidance, reused = _guided_range(guidance_until), _reuse_of(reuse, rule, family)
    return HiDiffusion(pipe, _Options(family, task, layout, raunet, rule, compat, settings, guidance, reused))


def _guided_range(guidance_until: StepRange | float | None) -> StepRange | None:
    """Returns the steps that are guided; None for all. Raises InputError for what is no part of a run."""
    if guidance_until is None:
        return None
    steps = guidance_until if isinstance(guidance_until, StepRange) else StepRange(0, guidance_until)
    if not 0 <= steps.start < steps.end <= 1:
        raise InputError(
            "guidance_until must be a part of the run above 0, or a rising range of parts.",
            given=repr(guidance_until),
            advice="Give 0.6, say, or StepRange(0.1, 0.6).",
        )
    return steps


def draw_window_shifts(generators: Sequence[torch.Generator], blocks: int) -> torch.Tensor:
    """Draws int32 [blocks], or [pictures, blocks] where each has a generator.

    0 for a uniform up to 0.25, 1 up to 0.5, 2 up to 0.75, else 3.

    Args:
        generators: of the run; torch's global one on the CPU if there is none.
        blocks: windowed ones.
    """
    if len(generators) > 1:
        return torch.stack([draw_window_shifts([generator], blocks).cpu() for generator in generators])
    generator = generators[0] if generators else None
    device = torch.device("cpu") if generator is None else generator.device
    uniforms = torch.rand(blocks, generator=generator, device=device)
    return torch.bucketize(uniforms, torch.tensor(_SHIFT_EDGES, device=device), out_int32=True)


def _reuse_of(reuse: Reuse | int | None, rule: PhaseRule | None, family: Family) -> Reuse | None:
    """Returns how features are reused, of what was asked for."""
    if reuse is None:
        reuse = None if rule is None else rule.reuse
    if isinstance(reuse, int):
        reuse = Reuse(reuse)
    if reuse is not None and (error := reuse_error(reuse, family)):
        raise error
    return reuse


def _shifts_of(shifts: torch.Tensor, batch: int) -> torch.Tensor:
    """Returns shifts that each picture has as rows of the UNet's batch, which holds the pictures once or more."""
    return shifts if shifts.ndim == 1 else shifts.repeat(batch // len(shifts), 1)


def _unet_of(pipe: Any) -> torch.nn.Module:
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, torch.nn.Module) or not hasattr(pipe, "scheduler"):
        raise InputError(
            "HiDiffusion goes on a pipeline with a UNet and a scheduler.",
            given=type(pipe).__name__,
            advice="Give the diffusers pipeline itself, such as a StableDiffusionXLPipeline.",
        )
    if any(isinstance(getattr(hook, "__self__", None), HiDiffusion) for hook in unet._forward_pre_hooks.values()):
        raise InputError(
            "HiDiffusion is already in force on this pipeline's UNet.",
            given=type(pipe).__name__,
            advice="Leave its `with` block or call remove() on what apply_hidiffusion returned, then apply it anew.",
        )
    _check_not_compiled(unet)
    return unet


def _check_not_compiled(unet: torch.nn.Module) -> None:
    """A compiled module keeps the phase it was compiled in: PyTorch does not look whether its hooks have changed."""
    if is_compiled_module(unet) or any(module._compiled_call_impl is not None for module in unet.modules()):
        raise InputError(
            "torch.compile does not notice that HiDiffusion changes the UNet from phase to phase.",
            given="a compiled UNet, or one with compiled blocks",
            advice="Run the pipeline uncompiled, or compile one PhaseUNet (hidiff_export.modules.phase_unet) a phase.",
        )


def _family_of(pipe: Any, unet: Any) -> Family:
    if unet.config.addition_embed_type == "text_time":
        return _OF_ANOTHER_FAMILY.get(pipe.name_or_path, Family.SDXL)
    return Family.SD21 if unet.config.use_linear_projection else Family.SD15


def task_of(pipe: Any, unet: Any) -> Task:
    """Returns which variant of the thresholds a pipeline with this UNet runs by."""
    if getattr(pipe, "controlnet", None) is not None:
        # Pipelines that take a picture beside the control image call the latter `control_image`.
        both = "control_image" in inspect.signature(type(pipe).__call__).parameters
        return Task.CONTROLNET_IMAGE_TO_IMAGE if both else Task.CONTROLNET
    inpainting = unet_config(Family.SD15, Task.INPAINTING)["in_channels"]
    return Task.INPAINTING if unet.config.in_channels == inpainting else Task.TEXT_TO_IMAGE


def _check_layout(unet: Any, family: Family, layout: Layout) -> None:
    expected = unet_config(family, Task.TEXT_TO_IMAGE)
    blocks = ("down_block_types", "up_block_types")
    places = {layout.downsampler, layout.pooled_attention, layout.restored_attention, *layout.windowed_blocks}
    missing = places.difference(name for name, _ in unet.named_modules())
    if missing or any(list(unet.config[key]) != expected[key] for key in blocks):
        raise InputError(
            f"This UNet has not the blocks of {family.value}.",
            given=", ".join((*unet.config.down_block_types, *unet.config.up_block_types)),
            advice=f"HiDiffusion is known for {', '.join(known.value for known in Family)}.",
        )
