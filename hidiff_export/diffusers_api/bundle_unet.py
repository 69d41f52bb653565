"""A bundle in the place of a diffusers pipeline's UNet: ``pipe.unet = BundleUNet("bundle")``.

The pipeline stays diffusers' own, with its text encoders, scheduler, callbacks, VAE and ControlNet; only the UNet's
evaluations run on the bundle's engines. Which phase an evaluation is in depends on where the run stands, and a UNet is
not told. So the first time that a pipeline looks at this UNet (at its configuration, or by calling it) it is found
among the calling frames, and from then on a `hidiff_export.diffusers_api.run_tracker.RunTracker` follows its runs, as
it does for ``apply_hidiffusion``: same seed, same window shifts, same latents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from inspect import Parameter, signature
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

import hidiff_runtime
from hidiff_export.checkpoints.stored_configs import CONFIG, read_config
from hidiff_export.diffusers_api.apply_hidiffusion import task_of
from hidiff_export.diffusers_api.bundle_calls import BundleCalls
from hidiff_export.diffusers_api.method_patches import MethodPatches
from hidiff_export.diffusers_api.run_tracker import RunTracker, as_generators
from hidiff_export.errors import InputError
from hidiff_export.families.family import Family, Task
from hidiff_export.families.graph_io import MID_RESIDUAL, down_residual_name
from hidiff_export.families.hidiffusion_rules import phase_rule
from hidiff_export.modules.controlnet import resized_control
from hidiff_runtime.bundle import Bundle

_CONDITIONS = ("text_embeds", "time_ids")
_LORA = "Put LoRA into the bundle: build it with lora in the recipe."


class BundleUNet(torch.nn.Module):
    """A bundle as the UNet of a diffusers pipeline.

    ::

        pipe.unet = BundleUNet("bundle")
        image = pipe(prompt, height=1024, width=1024, generator=generator).images[0]

    Any Stable Diffusion or SDXL pipeline of the bundle's task: text-to-image, image-to-image, inpainting, ControlNet
    (with the pipeline's own ControlNet, in PyTorch), with or without guidance, with any of diffusers' schedulers,
    callbacks included. The picture is what ``apply_hidiffusion`` gives with the same seed and settings. The size is the
    bundle's; ``pipe()`` takes it by itself where the picture is a square, but SDXL's text-to-image pipeline keeps the
    size of the UNet that it was made with, and has to be told. A batch may have any size: the engines evaluate it in
    pieces of their own batch, of which the last is filled up. So a bundle built with guidance spends half of its work
    on nothing in a run without. Put another UNet in its place, and everything is as it was before; ``close``, or
    leaving a ``with`` block, closes the engines too.

    What the bundle's own runs leave out (``guidance_until``, ``reuse`` and ``forecast`` in its recipe) is left out of
    the pipeline's too. After the guided part the prompts alone are evaluated, and stand for both halves of guidance.
    Where features are reused, a pipeline may not call the UNet several times for a step; where steps are forecast, it
    may not change its batch in mid-run either.

    The engines take host arrays, whatever device the pipeline is on.

    Args:
        bundle: its folder, or a bundle that is open, which stays so.
        pipe: the pipeline to follow, where it cannot be found among the callers: in a denoising loop of one's own.
        full_run: whether every evaluation is computed, guided and of all layers, whatever the bundle would leave out.
        options: of :func:`hidiff_runtime.open`: ``backend``, ``resident``, ``memory_limit``, ...

    Attributes:
        bundle: the open bundle.
        add_embedding: tells SDXL's pipelines the width of their pooled embeddings; nothing else is there.

    Raises:
        BundleError: the folder is no bundle, or is broken.
        EngineError: the backend is not installed.
    """

    def __init__(
        self, bundle: str | Path | Bundle, pipe: Any = None, *, full_run: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.bundle = bundle if isinstance(bundle, Bundle) else hidiff_runtime.open(bundle, **options)
        self._owned = self.bundle is not bundle
        self._config = _config(self.bundle)
        width = self._config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        # Pipelines ask their UNet where and in which precision to put latents; .to() moves this as it would weights.
        self._place: torch.Tensor
        self.register_buffer("_place", torch.zeros(()), persistent=False)
        self._full_run = full_run
        self._calls: BundleCalls | None = None
        self._pipe: Any = None
        self._checked = False
        self._following = ExitStack()
        if pipe is not None:
            self.follow(pipe)

    @property
    def config(self) -> Any:
        """diffusers' configuration of the UNet that the bundle was built from; ``sample_size`` is the bundle's."""
        self._find_pipe()
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """What ``noise_pred`` comes in where the latents do: float32 until the pipeline is brought to another type."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline keeps its latents."""
        return self._place.device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            message = f"BundleUNet has no {name!r}: what a bundle computes is fixed when it is built. {_LORA}"
            raise AttributeError(message, name=name, obj=self) from None

    def __enter__(self) -> BundleUNet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the pipeline's methods as they were, and closes the engines of a bundle that it opened itself."""
        self._leave()
        if self._owned:
            self.bundle.close()

    def follow(self, pipe: Any, generators: Sequence[torch.Generator] = ()) -> None:
        """Takes its steps from the runs of ``pipe`` from now on.

        Args:
            pipe: a diffusers pipeline, or anything with its ``scheduler``, whose ``unet`` this is.
            generators: of a run that has begun already; the window shifts are drawn from them.
        """
        self._leave()
        overrides = _WhileInPlace(lambda: vars(pipe).get("unet") is self, self._leave)
        with ExitStack() as following:
            following.callback(overrides.undo)
            watch = RunTracker(pipe, overrides)
            following.callback(watch.close)
            watch.generators = tuple(generators)
            calls = BundleCalls(self.bundle, pipe, watch, full_run=self._full_run)
            if self._has_control and getattr(pipe, "controlnet", None) is not None:
                overrides.wrap(pipe.controlnet, "forward", _control(calls))
            self._following = following.pop_all()
        self._calls, self._pipe = calls, pipe

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Returns one evaluation, in the phase that the run's step asks for; parameters and result are diffusers' own.

        Raises:
            InputError: outside a pipeline's run, or with anything that the bundle's graphs do not take.
            EngineError: an engine does not load, failed, or gave NaN.
        """
        _refuse(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
            **{name: value for name, value in (added_cond_kwargs or {}).items() if name not in _CONDITIONS},
        )
        calls = self._run_at_hand(timestep)
        inputs = {"latents": sample, "prompt_embeds": encoder_hidden_states, **(added_cond_kwargs or {})}
        if self._has_control:
            inputs |= _residuals(down_block_additional_residuals, mid_block_additional_residual)
        elif down_block_additional_residuals is not None:
            raise _of_another_task("no ControlNet's residuals", "ControlNet's residuals")
        noise_pred = calls(inputs, timestep)
        return UNet2DConditionOutput(sample=noise_pred) if return_dict else (noise_pred,)

    @property
    def _has_control(self) -> bool:
        return Task(self.bundle.manifest.task).has_control

    def _run_at_hand(self, timestep: torch.Tensor | float) -> BundleCalls:
        self._find_pipe()
        if self._calls is None:
            raise InputError(
                "The bundle's UNet was called outside a pipeline, so there is no telling which phase it is in.",
                advice="Set pipe.unet to it and call the pipeline; for a loop of your own, give BundleUNet(DIR, pipe).",
            )
        if not self._checked:
            if not self._calls.tracker.begun:
                _check_begins(self._pipe, float(torch.as_tensor(timestep).flatten()[0]))
            _check_task(self.bundle, self._pipe)
            self._checked = True
        return self._calls

    def _find_pipe(self) -> None:
        """Follows the pipeline among the callers whose UNet this is, if it does not yet."""
        owned = (
            (frame, pipe)
            for frame, pipe in _callers(sys._getframe(1))
            if isinstance(pipe, DiffusionPipeline) and vars(pipe).get("unet") is self
        )
        frame, pipe = next(owned, (None, None))
        if frame is not None and pipe is not self._pipe:
            self.follow(pipe, _generators(frame, pipe))

    def _leave(self) -> None:
        self._following.close()
        self._calls, self._pipe, self._checked = None, None, False


class _WhileInPlace(MethodPatches):
    """Overrides that undo themselves at the first call that finds another UNet in the pipeline."""

    def __init__(self, in_place: Callable[[], bool], leave: Callable[[], None]) -> None:
        super().__init__()
        self._in_place = in_place
        self._leave = leave

    def wrap(self, owner: object, name: str, around: Callable[..., Any]) -> None:
        """Wraps a method as `MethodPatches.wrap` does."""

        def guarded(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._in_place():
                return around(method, *args, **kwargs)
            self._leave()
            return method(*args, **kwargs)

        super().wrap(owner, name, guarded)


def _control(calls: BundleCalls) -> Callable[..., Any]:
    """Returns what to wrap around the pipeline's ControlNet."""
    return resized_control(lambda _latent_height, _latent_width: calls.takes_residuals, calls.asked_of_control)


def _config(bundle: Bundle) -> FrozenDict:
    """Returns the UNet's configuration with diffusers' defaults, since older checkpoints leave out what came later."""
    stored = read_config(bundle.file(f"unet/{CONFIG}"))
    parameters = signature(UNet2DConditionModel.__init__).parameters.values()
    defaults = {known.name: known.default for known in parameters if known.default is not Parameter.empty}
    _, height, width = bundle.manifest.latent
    size = {"sample_size": height} if height == width else {}
    return FrozenDict({**defaults, **stored, **size})


def _callers(frame: FrameType | None) -> Iterator[tuple[FrameType, Any]]:
    """Yields the calling frames from the inside out, each with its ``self``."""
    while frame is not None:
        yield frame, frame.f_locals.get("self")
        frame = frame.f_back


def _generators(frame: FrameType, pipe: Any) -> tuple[torch.Generator, ...]:
    """Returns the ``generator`` that a pipeline was called with, or several, which it may have handed on."""
    for caller, owner in _callers(frame):
        given = caller.f_locals.get("generator") if owner is pipe else None
        if given is not None:
            return as_generators(given)
    return ()


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is None:
            continue
        advice = _LORA if name == "cross_attention_kwargs" else "Leave it out, or stay with diffusers' UNet."
        raise InputError("A bundle's graphs do not take this.", given=name, advice=advice)


def _check_begins(pipe: Any, timestep: float) -> None:
    """A run whose first steps another UNet took has no beginning to count from."""
    steps = [float(step) for step in pipe.scheduler.timesteps]
    count = vars(pipe).get("_num_timesteps") or len(steps)
    if timestep not in (steps[0], steps[-count]):
        raise InputError(
            "A bundle's UNet cannot take over in the middle of a run.",
            given=f"timestep {timestep:g}, where the run began at {steps[-count]:g}",
            advice="Set pipe.unet before the pipeline is called.",
        )


def _check_task(bundle: Bundle, pipe: Any) -> None:
    """A ControlNet is there or not as the bundle was built, and a pipeline's phases are those of its task."""
    manifest = bundle.manifest
    own, wanted = Task(manifest.task), task_of(pipe, pipe.unet)
    rules = [phase_rule(Family(manifest.family), task, manifest.width, manifest.height) for task in (own, wanted)]
    if rules[0] != rules[1]:
        raise _of_another_task(own.value, f"{type(pipe).__name__}, {wanted.value}")


def _of_another_task(own: str, wanted: str) -> InputError:
    return InputError(
        f"This bundle was built for {own}.", given=wanted, advice="Build a bundle with this task in its recipe."
    )


def _residuals(down: tuple[torch.Tensor, ...] | None, mid: torch.Tensor | None) -> dict[str, torch.Tensor]:
    named = {down_residual_name(index): residual for index, residual in enumerate(down or ())}
    return named if mid is None else {**named, MID_RESIDUAL: mid}
