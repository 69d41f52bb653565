"""A picture's own settings, for a bundle: what it takes to draw the picture again, and what will not be the same.

What makes the picture impossible here is an error; what makes it another one is told, a line each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hidiff_runtime.errors import InputError
from hidiff_runtime.format.left_out import LEFT_OUT, left_out, left_out_lines
from hidiff_runtime.phases import PhasePlan
from hidiff_runtime.pipeline.image_metadata import fused_loras, model_name, other_weights
from hidiff_runtime.pipeline.image_parameters import PictureParameters, web_number
from hidiff_runtime.pipeline.infotext import Infotext, from_web_clip_skip
from hidiff_runtime.pipeline.prompt_encoding import chunks_of
from hidiff_runtime.pipeline.request import takes_sizes
from hidiff_runtime.pipeline.request_fields import ORDERS, PICTURES, SETTINGS
from hidiff_runtime.pipeline.webui_names import NAMES, follows, sampler_name, schedule_name, split_name

if TYPE_CHECKING:
    from hidiff_runtime.bundle import Bundle
    from hidiff_runtime.format.manifest import Manifest
    from hidiff_runtime.sampling.scheduler_table import SamplerTable

_LEFT_OUT = (
    "Hires",
    "First pass",
    "Refiner",
    "ADetailer",
    "ControlNet",
    "Variation seed",
    "Seed resize",
    "Face restoration",
    "Tiling",
    "Hypernet",
    "TI hashes",
    "FreeU",
    "Dynamic thresholding",
    "CFG Rescale",
    "Token merging",
    "Soft inpainting",
    "Regional",
    "RP ",
)
"""How settings of web UIs begin that change the picture and have no like here."""

_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):([^:<>]+)(?::([^<>]*))?>", re.IGNORECASE)
"""A network that a web UI adds to the model, written into the prompt; no word of it."""

_MARKUP = re.compile(r"[(\[][^()\[\]]*:[\d.\s]+[)\]]|\(\([^()]*\)\)|\bBREAK\b|\bAND\b")
"""Weights and other markup in a web UI's prompt."""


@dataclass(frozen=True)
class Likeness:
    """What to ask of a bundle for a picture like another.

    Args:
        prompt: may be empty.
        settings: by the names of `Settings`; those that were given are in them.
        warnings: what will not be the same, a line each.
    """

    prompt: str
    settings: Mapping[str, Any]
    warnings: tuple[str, ...]


def settings_like(
    bundle: Bundle, parameters: PictureParameters, given: Mapping[str, Any] | None = None, *, with_prompt: bool = True
) -> Likeness:
    """Settings with which a bundle draws a picture again.

    Args:
        parameters: what the picture says, from `read_parameters`.
        given: settings that are asked for whatever the picture says, by the names of `Settings`.
        with_prompt: whether its prompt is to be drawn, so that what is read in another way there is told.

    Raises:
        InputError: the bundle lacks the sampler or the number of steps, or the picture was drawn from another that is
            not given; the message names the nearest there is.
    """
    asked = given or {}
    settings, warnings = dict(parameters.settings), []
    usual, bundle = bundle, _of_its_size(bundle, parameters, asked)
    manifest = bundle.manifest
    prompt, infotext = parameters.prompt, parameters.infotext
    named = parameters.facts
    if parameters.facts:
        warnings += _other_facts(manifest, parameters.facts, asked)
    elif infotext is not None:
        named = {"sampler": infotext.settings.get("Sampler"), "schedule": infotext.settings.get("Schedule type")}
        settings |= _web_options(bundle, infotext)
        warnings += _other_program(manifest, infotext, settings)
        if not infotext.ours:
            prompt, found = _plain(manifest, prompt, "prompt")
            warnings += found if with_prompt else []
            negative, found = _plain(manifest, infotext.negative_prompt or "", "negative prompt")
            warnings += [] if "negative_prompt" in asked else found
            settings = {**settings, "negative_prompt": negative or None}
    _check_sources(manifest, parameters, asked)
    warnings += _fit_guidance(manifest, settings, bool(parameters.facts))
    if left_out(manifest) and parameters.facts and not any(name in parameters.facts for name in LEFT_OUT):
        settings["full_run"] = True
    warnings += _fit_sampler(bundle, settings, named, asked)
    if not takes_sizes(manifest):
        settings = {name: value for name, value in settings.items() if SETTINGS[name].kind not in ORDERS}
    if asked.get("image") is None:
        settings.pop("strength", None)
    settings = {name: value for name, value in settings.items() if name not in ("width", "height")}
    if bundle is not usual:
        settings |= {"width": manifest.width, "height": manifest.height}
    return Likeness(prompt, {**settings, **asked}, tuple(dict.fromkeys(warnings)))


def _of_its_size(bundle: Bundle, parameters: PictureParameters, asked: Mapping[str, Any]) -> Bundle:
    """Returns the bundle for pictures of the size that is asked for, else of the picture's; else as it is."""
    if asked.get("width") is not None or asked.get("height") is not None:
        return bundle.sized(asked.get("width"), asked.get("height"))
    if parameters.facts:
        told = f"{parameters.facts.get('width')}x{parameters.facts.get('height')}"
    else:
        told = "" if parameters.infotext is None else parameters.infotext.settings.get("Size", "")
    for manifest in bundle.manifest.whole.manifests:
        if told == f"{manifest.width}x{manifest.height}":
            return bundle.sized(manifest.width, manifest.height)
    return bundle


def _other_facts(manifest: Manifest, facts: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Returns what our picture was drawn with that this bundle does not have."""
    found = _other_size(manifest, facts.get("width"), facts.get("height"))
    sha = manifest.files[manifest.weights["unet"]].sha256
    if facts.get("model_sha256") != sha:
        drew = _model(facts.get("model"), facts.get("lora", []), str(facts.get("model_sha256")))
        here = _model(model_name(manifest), fused_loras(manifest), sha)
        found.append(f"the picture was drawn with the weights of {drew}, this bundle has those of {here}")
    held = other_weights(manifest)
    theirs = facts.get("weights", held)
    others = [name for name in held if theirs.get(name, held[name]) != held[name]]
    if others:
        found.append(f"other weights than this bundle's drew the picture: {', '.join(others)}")
    if facts.get("family", manifest.family) != manifest.family:
        found.append(f"the picture is of {facts['family']}, this bundle of {manifest.family}")
    if facts.get("precision", manifest.precision) != manifest.precision:
        found.append(f"the picture was computed in {facts['precision']}, this bundle computes in {manifest.precision}")
    batch, index = facts.get("batch", 1), facts.get("index", 0)
    if batch != manifest.batch:
        found.append(
            f"the picture was number {index + 1} of a batch of {batch}, this bundle draws {manifest.batch} at once: "
            "the noise differs"
        )
    elif batch > 1:
        found.append(f"the picture was number {index + 1} of a batch of {batch}; all of them are drawn")
    theirs_left = {name: facts[name] for name in LEFT_OUT if name in facts}
    if "full_run" not in asked and theirs_left and theirs_left != left_out(manifest):
        how = "; ".join(left_out_lines(left_out(manifest)).values()) or "leaves nothing out"
        found.append(f"the picture's run left out other work than this bundle's do, which {how}")
    if not {"steps", "strength"} & asked.keys() and not _same_phases(manifest, facts):
        found.append("the picture went through other phases of HiDiffusion than this bundle has")
    return found


def _other_program(manifest: Manifest, infotext: Infotext, taken: Mapping[str, Any]) -> list[str]:
    """Returns what a web UI's picture was drawn with that is not here; ``taken`` are the settings taken from it."""
    settings, found = infotext.settings, []
    if not infotext.ours:
        version = f" ({settings['Version']})" if settings.get("Version") else ""
        found.append(f"the picture was made by a web UI{version}, whose noise is another: expect one alike at most")
    width, _, height = settings.get("Size", "").partition("x")
    if width.isdecimal() and height.isdecimal():
        found += _other_size(manifest, int(width), int(height))
    model = settings.get("Model")
    if model is not None and model.casefold() != model_name(manifest).casefold():
        found.append(f"the picture was drawn with {model}, this bundle was built from {model_name(manifest)}")
    if taken.get("clip_skip") and "negative_prompt" in taken and manifest.guidance and not infotext.ours:
        found.append("Clip skip is for the prompt alone here, web UIs skip layers in the negative prompt too")
    held = ("ControlNet",) if manifest.controlnet is not None else ()
    left = [name for name in settings if name.startswith(_LEFT_OUT) and not name.startswith(held)]
    if left:
        found.append(f"left out, as bundles have nothing like it: {', '.join(left)}")
    return found


def _other_size(manifest: Manifest, width: object, height: object) -> list[str]:
    if (width, height) == (manifest.width, manifest.height):
        return []
    return [f"the picture is {width}x{height}, this bundle draws {manifest.width}x{manifest.height}"]


def _model(name: object, loras: Sequence[Any], sha: str) -> str:
    """Returns a model with its LoRA files, and the beginning of its weights' SHA-256."""
    known = [lora for lora in loras if isinstance(lora, Mapping)]
    added = "".join(f" with {lora.get('name')} at {lora.get('scale')}" for lora in known)
    return f"{name}{added} ({sha[:10]})"


def _same_phases(manifest: Manifest, facts: Mapping[str, Any]) -> bool:
    """Returns whether a run here has the phases that the picture says; so where it says nothing."""
    spans, steps = list(facts.get("phases", {}).values()), facts.get("steps", 0)
    if not spans:
        return True
    if not all(isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span) for span in spans):
        return False
    total = 1 + max(last for _, last in spans)
    if not 0 < total <= steps:
        return False
    plan = PhasePlan(manifest.rule if "guided" in facts else manifest.rule.whole, total)
    return bool({span.phase.name: [span.first, span.last] for span in plan.spans} == facts["phases"])


def _web_options(bundle: Bundle, infotext: Infotext) -> dict[str, Any]:
    """Settings that web UIs count in another way, or settle by themselves."""
    manifest, found = bundle.manifest, dict[str, Any]()
    if "Clip skip" in infotext.settings:
        layer = web_number(infotext.settings, "Clip skip", whole=True)
        found["clip_skip"] = from_web_clip_skip(layer, sdxl=takes_sizes(manifest))
    if "Eta DDIM" in infotext.settings:
        found["eta"] = web_number(infotext.settings, "Eta DDIM", whole=False)
    if not infotext.ours and manifest.text_encoders and chunks_of(bundle) > 1:
        found["long_prompt"] = "chunk"  # as web UIs do with every prompt
    return found


def _plain(manifest: Manifest, text: str, name: str) -> tuple[str, list[str]]:
    """Returns a web UI's prompt without the networks in it, and what is said of these and of other markup."""
    found = []
    fused = {str(lora["name"]).casefold(): str(lora["scale"]) for lora in fused_loras(manifest)}
    for network, scales in _NETWORK.findall(text):
        scale = scales.split(":")[0] or "1"
        held = fused.get(network.casefold())
        if held is None:
            found.append(f"the {name} adds {network} at {scale}, which this bundle was not built with; it is left out")
        elif not _equal(held, scale):
            found.append(f"the {name} adds {network} at {scale}, this bundle was built with it at {held}")
    plain = _NETWORK.sub("", text).strip(" \n,") if _NETWORK.search(text) else text
    markup = _MARKUP.search(plain)
    if markup is not None:
        found.append(f"weights and other markup in the {name} are read as words here, such as {markup[0]!r}")
    return plain, found


def _equal(one: str, other: str) -> bool:
    """Returns whether two texts are the same number, or the same."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _check_sources(manifest: Manifest, parameters: PictureParameters, asked: Mapping[str, Any]) -> None:
    """Refuses a picture that was drawn from others that are not given."""
    for name in PICTURES:
        if name not in _sources(parameters) or asked.get(name) is not None:
            continue
        what = name.replace("_", " ")
        if name == "control_image" and manifest.controlnet is None:
            raise InputError(
                "The picture was drawn with a ControlNet, which this bundle does not have.",
                given="a control image",
                advice="Use the bundle that drew it, or build one with controlnet in the recipe.",
            )
        raise InputError(
            f"The picture was drawn with {'an' if name == 'image' else 'a'} {what}, which is not in its file.",
            given=f"no {what}",
            advice=f"Give it: {name}= ({SETTINGS[name].flags[-1]} FILE on the command line).",
        )


def _sources(parameters: PictureParameters) -> list[str]:
    """Returns which pictures a picture was drawn from, as it says."""
    if parameters.facts:
        return [str(name) for name in parameters.facts.get("given", [])]
    settings = parameters.infotext.settings if parameters.infotext is not None else {}
    if any(name.startswith("Mask ") or name == "Masked content" for name in settings):
        return ["image", "mask"]
    enlarged = any(name.startswith(("Hires", "First pass")) for name in settings)
    return ["image"] if settings.get("Denoising strength", "0") not in ("0", "0.0") and not enlarged else []


def _fit_guidance(manifest: Manifest, settings: dict[str, Any], exact: bool) -> list[str]:
    """Takes guidance out where the bundle has none, and says so; sets it where our picture had none.

    A picture that says nothing of a rescale had none, whatever the bundle's own is.
    """
    if manifest.guidance:
        if exact:
            settings.setdefault("guidance_scale", 1.0)  # the same as a run without
        settings.setdefault("guidance_rescale", 0.0)
        return []
    settings.pop("guidance_rescale", None)
    scale, negative = settings.pop("guidance_scale", 1), settings.pop("negative_prompt", None)
    if scale <= 1:
        return []
    what = f"guidance {scale:g}" + (" and the negative prompt" if negative else "")
    return [f"left out, as this bundle was built without guidance: {what}"]


def _fit_sampler(
    bundle: Bundle, settings: dict[str, Any], named: Mapping[str, Any], asked: Mapping[str, Any]
) -> list[str]:
    """Sets the bundle's sampler that is the picture's; says where its schedule is another.

    Raises:
        InputError: there is none, or it has no table for the number of steps.
    """
    found: list[str] = []
    if "sampler" in asked or named.get("sampler") is None:
        settings.pop("sampler", None)
        table = bundle.sampler(asked.get("sampler"))
        if "sampler" not in asked:
            found.append(f"the picture does not name its sampler; this bundle's {table.sampler} is taken")
    else:
        table = _table(bundle, settings, named, asked)
        settings["sampler"] = table.sampler
        schedule = split_name(str(named["sampler"]), named.get("schedule"))[1]
        steps = asked.get("steps", settings.get("steps"))
        if schedule is not None and steps in table.steps.tolist() and not follows(table, steps, schedule):
            here = schedule_name(table, steps) or "one that web UIs have no name for"
            found.append(f"the picture's schedule was {schedule}, that of this bundle's {table.sampler} is {here}")
    if "steps" not in asked:
        _check_steps(table, settings.get("steps"))
    if table.eta is None and "eta" not in asked:
        settings.pop("eta", None)
    return found


def _table(
    bundle: Bundle, settings: Mapping[str, Any], named: Mapping[str, Any], asked: Mapping[str, Any]
) -> SamplerTable:
    """Returns the table whose sampler and schedule are nearest to the picture's."""
    name, (plain, schedule) = named["sampler"], split_name(str(named["sampler"]), named.get("schedule"))
    tables = [bundle.sampler(each) for each in sorted(bundle.manifest.samplers)]
    alike = [table for table in tables if table.sampler == name]
    alike = alike or [table for table in tables if sampler_name(table).casefold() == plain.casefold()]
    if not alike:
        near = difflib.get_close_matches(plain, [sampler_name(table) for table in tables], 1, 0.5)
        nearest = [table for table in tables if sampler_name(table) in near]
        advice = f"Give --sampler {_first(nearest, schedule).sampler}, the nearest there is" if near else ""
        makes = next((ours for ours, web in NAMES.items() if web == plain), None)
        build = "" if makes is None else f"; or build the bundle with {makes}"
        raise InputError(
            "This bundle does not have the picture's sampler.",
            given=f"{name}, which is none of {', '.join(table.sampler for table in tables)}",
            advice=f"{advice or 'Give --sampler NAME'}, for a picture that differs{build}.",
        )
    steps = asked.get("steps", settings.get("steps"))
    able = [table for table in alike if steps is None or steps in table.steps.tolist()]
    return _first(able or alike, schedule, steps if able else None)


def _first(tables: Sequence[SamplerTable], schedule: str | None, steps: int | None = None) -> SamplerTable:
    """Returns the first table of this schedule, else one whose name names none."""
    followed = [table for table in tables if schedule and follows(table, steps or int(table.steps[-1]), schedule)]
    plainer = [table for table in tables if not table.sampler.endswith("_karras")]
    return (followed or plainer or list(tables))[0]


def _check_steps(table: SamplerTable, steps: object) -> None:
    """Refuses the picture's number of steps where there is no table for it, with the nearest."""
    if not isinstance(steps, int) or steps in table.steps.tolist():
        return
    nearest = min(table.steps.tolist(), key=lambda count: abs(count - steps))
    raise InputError(
        "This bundle has no table for the picture's number of steps.",
        given=f"{steps} steps of {table.sampler}",
        advice=f"Give --steps {nearest}, the nearest there is, or build the bundle with {steps}.",
    )
