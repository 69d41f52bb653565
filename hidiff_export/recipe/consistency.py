"""Whether a recipe's values agree with each other."""

from __future__ import annotations

from hidiff_export.demo_model import DEMO_SOURCE
from hidiff_export.families.family import PIXELS_PER_LATENT, Family, Task, Width, widths_of
from hidiff_export.families.geometry import control_latent
from hidiff_export.families.reuse_depths import DEPTHS
from hidiff_export.recipe.field_types import BackendName, Precision, SamplerName, Target, refusal
from hidiff_export.recipe.recipe_fields import RecipeFields
from hidiff_runtime.format.forecast_record import UNSUITABLE
from hidiff_runtime.format.validation import MOST_PIXELS
from hidiff_runtime.phases import StepRange

_FAMILIES_OF_EVERY_TASK = (Family.SD15, Family.SD21, Family.SDXL)
"""Those for which there are inpainting checkpoints and ControlNets."""

_BUILDS_FOR = {
    BackendName.ONNXRUNTIME: "cpu or cuda",
    BackendName.OPENVINO: "cpu",
    BackendName.TENSORRT: "cuda",
    BackendName.TENSORRT_RTX: "generations of GPUs like sm89, or cuda alone",
}


def check_agreement(recipe: RecipeFields) -> None:
    """Raises the error of `refusal` for the first two values that contradict each other."""
    for check in (
        _demo_model_fits,
        _checkpoint_exists,
        _lists_begin_with_the_first,
        _pictures_fit_a_run,
        _guidance_is_there,
        _targets_are_served,
        _targets_compute,
        _control_fits,
        _steps_are_those_of_timesteps,
        _steps_can_be_forecast,
        _guidance_ends,
        _features_are_there,
    ):
        check(recipe)


def _demo_model_fits(recipe: RecipeFields) -> None:
    """The model that comes with the package is one checkpoint, of one family, width and task."""
    if recipe.source != DEMO_SOURCE:
        return
    if recipe.family is not Family.SD15:
        raise refusal(
            f"is a model of the family {Family.SD15.value}",
            key=("source",),
            advice=f"Set family: {Family.SD15.value}, or give a checkpoint of {recipe.family.value} as the source.",
        )
    if recipe.unet_width is not Width.DEMO:
        raise refusal(
            f"should be {Width.DEMO.value} where the source is the demo model",
            key=("unet_width",),
            advice="Leave unet_width out, or give another source.",
        )
    if recipe.task is Task.INPAINTING:
        raise refusal(
            "is inpainting, and the demo model's UNet does not see masks",
            key=("task",),
            advice="Set task: image-to-image, which can paint in masks too, or give an inpainting checkpoint.",
        )


def _checkpoint_exists(recipe: RecipeFields) -> None:
    families = ", ".join(family.value for family in _FAMILIES_OF_EVERY_TASK)
    if recipe.unet_width is Width.TINY and recipe.random_seed is None:
        raise refusal(
            "is only for fabricated checkpoints",
            key=("unet_width",),
            advice="Leave unet_width out, or set source: random:0.",
        )
    if recipe.unet_width not in widths_of(recipe.family):
        raise refusal(
            f"is not there for the family {recipe.family.value}",
            key=("unet_width",),
            advice=f"Set unet_width to {' or '.join(width.value for width in widths_of(recipe.family))}.",
        )
    if recipe.task is Task.INPAINTING and recipe.family not in _FAMILIES_OF_EVERY_TASK:
        raise refusal(
            f"has no inpainting checkpoint in the family {recipe.family.value}",
            key=("task",),
            advice=f"Inpainting has {families}; with {recipe.family.value}, use text-to-image or image-to-image.",
        )
    if recipe.task.has_control and recipe.family not in _FAMILIES_OF_EVERY_TASK:
        raise refusal(
            f"takes no ControlNet in the family {recipe.family.value}",
            key=("task",),
            advice=f"ControlNet tasks have {families}.",
        )


def _lists_begin_with_the_first(recipe: RecipeFields) -> None:
    """Whoever gives a list and a single value means one of them."""
    if recipe.sizes is not None and recipe.sizes[0] != (recipe.width, recipe.height):
        raise refusal(
            f"begins with another size than width and height, {recipe.width}x{recipe.height}",
            key=("sizes",),
            advice="Leave width and height out, or sizes.",
        )
    if recipe.batches is not None and recipe.batches[0] != recipe.batch:
        raise refusal(
            f"begins with another batch than batch, {recipe.batch}",
            key=("batches",),
            advice="Leave batch out, or batches.",
        )


def _pictures_fit_a_run(recipe: RecipeFields) -> None:
    """A bundle beyond what the runtime opens is not built."""
    for width, height, batch in recipe.shapes:
        if batch * width * height > MOST_PIXELS:
            key = "batch" if recipe.batches is None else "batches"
            raise refusal(
                f"is too many pictures of {width}x{height} for one run",
                key=(key,),
                advice=f"Set {key}: {MOST_PIXELS // (width * height)} or less: a run has the pixels of four "
                "pictures of 4096x4096 at most.",
            )


def _guidance_is_there(recipe: RecipeFields) -> None:
    if recipe.guidance_rescale and not recipe.guidance:
        raise refusal(
            "rescales guidance, which is off",
            key=("guidance_rescale",),
            advice="Set guidance: true, or leave guidance_rescale out.",
        )


def _targets_are_served(recipe: RecipeFields) -> None:
    served = {backend: backend.targets(recipe.targets) for backend in recipe.backend}
    for backend, targets in served.items():
        if not targets:
            raise refusal(
                f"has nothing that {backend.value} builds for",
                key=("targets",),
                advice=f"Add {_BUILDS_FOR[backend]} to targets, or leave targets out.",
            )
    for target in recipe.targets:
        if not any(target in targets for targets in served.values()):
            names = " and ".join(backend.value for backend in recipe.backend)
            raise refusal(
                f"has {target.value}, which {names} does not build for",
                key=("targets",),
                advice=" ".join(f"{backend.value} builds for {_BUILDS_FOR[backend]}." for backend in recipe.backend),
            )


def _targets_compute(recipe: RecipeFields) -> None:
    on_cpu = Target.CPU in recipe.targets
    if recipe.precision is Precision.BFLOAT16 and on_cpu and BackendName.ONNXRUNTIME in recipe.backend:
        raise refusal(
            "is bfloat16, for which ONNX Runtime has no kernels on the CPU",
            key=("precision",),
            advice="Set backend: openvino, precision: float32 or float16, or targets: cuda.",
        )
    if recipe.precision in (Precision.FLOAT16, Precision.FP8) and BackendName.OPENVINO in recipe.backend:
        raise refusal(
            f"is {recipe.precision.value}, for which OpenVINO has no kernels on the CPU",
            key=("precision",),
            advice="Set precision: bfloat16, int8 or float32, or another backend.",
        )
    if recipe.precision is Precision.BFLOAT16 and Target.SM75 in recipe.targets:
        raise refusal(
            "is bfloat16, for which sm75 has no arithmetic",
            key=("precision",),
            advice="Set precision: float16, or targets from sm80 on.",
        )
    unable = [target.value for target in recipe.targets if not target.computes_fp8]
    if recipe.precision is Precision.FP8 and unable:
        raise refusal(
            f"is fp8, for which {' and '.join(unable)} has no arithmetic",
            key=("precision",),
            advice="Set precision: int8 or float16, or targets from sm89 on.",
        )


def _control_fits(recipe: RecipeFields) -> None:
    thresholds = recipe.hidiffusion.thresholds
    if not recipe.task.has_control:
        if recipe.controlnet is not None:
            raise refusal(
                f"is set, but the task {recipe.task.value} has no ControlNet",
                key=("controlnet",),
                advice="Leave controlnet out, or set task: controlnet.",
            )
        if thresholds is not None and thresholds.control is not None:
            raise refusal(
                f"is set, but the task {recipe.task.value} has no ControlNet",
                key=("hidiffusion", "thresholds", "control"),
                advice="Leave control out, or set task: controlnet.",
            )
        return
    for width, height, _ in recipe.shapes:
        if min(control_latent(height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)) == 0:
            raise refusal(
                "makes the picture too narrow for a ControlNet, which would see no row or column of it",
                key=("width",) if recipe.sizes is None else ("sizes",),
                advice="Keep the sides' ratio below 16 to 1.",
            )


def _steps_are_those_of_timesteps(recipe: RecipeFields) -> None:
    if recipe.timesteps is not None and recipe.steps != (len(recipe.timesteps),):
        raise refusal(
            "is not the number of timesteps",
            key=("steps",),
            advice=f"Leave steps out, or set steps: {len(recipe.timesteps)}.",
        )


def _steps_can_be_forecast(recipe: RecipeFields) -> None:
    if recipe.forecast is None:
        return
    for sampler in recipe.sampler:
        if reason := UNSUITABLE.get(sampler.value):
            suited = [name.value for name in SamplerName if name.value not in UNSUITABLE]
            raise refusal(
                f"has {sampler.value}, whose steps cannot be forecast: {reason}",
                key=("sampler",),
                advice=f"Leave forecast out, or choose among {', '.join(suited)}.",
            )
    most = max(recipe.steps)
    if all(recipe.forecast.record().computed(most)):
        raise refusal(
            f"leaves no step out, not even of {most}, the most that the recipe has",
            key=("forecast",),
            advice="Set a shorter warm_up, a larger window or a smaller last part; or more steps.",
        )


def _guidance_ends(recipe: RecipeFields) -> None:
    """A part of each run is guided, and a part of some run is not."""
    until = recipe.guidance_until
    if until is None:
        return
    if not recipe.guidance:
        raise refusal(
            "is for recipes with guidance", key=("guidance_until",), advice="Leave it out, or set guidance: true."
        )
    most = max(recipe.steps)
    first, end = StepRange(until.start, until.end).first_and_end(most)
    if first >= end:
        raise refusal(
            f"leaves no step guided, not even of {most}, the most that the recipe has",
            key=("guidance_until",),
            advice="Widen the range, or tabulate longer runs.",
        )
    if (first, end) == (0, most):
        raise refusal(
            f"leaves no step without guidance, not even of {most}, the most that the recipe has",
            key=("guidance_until",),
            advice="Let guidance end earlier, or leave guidance_until out.",
        )


def _features_are_there(recipe: RecipeFields) -> None:
    """The family has layers of that depth, and some run is long enough to reuse their features."""
    if recipe.reuse is None:
        return
    depths = DEPTHS[recipe.family]
    if recipe.reuse.depth not in depths:
        raise refusal(
            f"has a depth that {recipe.family.value} lacks",
            key=("reuse",),
            advice=f"Set a depth from {depths[0]} to {depths[-1]}.",
        )
    most = max(recipe.steps)
    if most < 2:
        raise refusal(
            "reuses nothing in runs of one step", key=("reuse",), advice="Leave reuse out, or tabulate longer runs."
        )
