import numpy as np
import pytest

from hidiff_export.families.family import Family
from hidiff_export.families.graph_io import phase_inputs
from hidiff_export.recipe import Recipe
from hidiff_export.reference.random_inputs import arrays, mixed_shifts, random_inputs
from hidiff_runtime.phases import Phase, PhaseKind
from hidiff_runtime.verification.reference_samples import Drawn


def inputs_of(family: str, control: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    recipe = Recipe.from_dict(
        {
            "family": family,
            "source": "random:0",
            "unet_width": "tiny",
            "width": 512,
            "height": 256,
            "task": "controlnet" if control else "text-to-image",
        }
    )
    phase = Phase(PhaseKind.WINDOWED, control)
    specs = phase_inputs(recipe.unet_config(), recipe.unet_layout, phase, 32, 64, recipe.model_batch)
    inputs = arrays(random_inputs(specs, timestep=761.0, width=512, height=256, seed=seed))
    assert {name: value.shape for name, value in inputs.items()} == {
        spec.name: spec.shape for spec in specs if spec.name != "window_shifts"
    }
    return inputs


@pytest.mark.parametrize("control", [False, True])
def test_numbers_are_of_order_one_and_no_input_is_another(control: bool) -> None:
    inputs = inputs_of(Family.SDXL.value, control)
    noise = {name: value for name, value in inputs.items() if name not in ("timestep", "time_ids")}

    for value in inputs.values():
        assert value.dtype == np.float32
    for value in noise.values():
        assert 0.5 < value.std() < 1.5
        assert abs(value.mean()) < 0.5
        assert not np.array_equal(value[0], value[1])
    assert len({value.ravel()[:16].tobytes() for value in noise.values()}) == len(noise)


def test_the_timestep_is_the_one_asked_for_and_the_sizes_are_the_pictures() -> None:
    inputs = inputs_of("sdxl")

    assert inputs["timestep"].tolist() == [761.0]
    assert inputs["time_ids"].tolist() == [[256, 512, 0, 0, 256, 512]] * 2


def test_a_seed_gives_the_same_inputs_and_another_seed_others() -> None:
    first, again, other = inputs_of("sd15", seed=3), inputs_of("sd15", seed=3), inputs_of("sd15", seed=4)

    assert np.array_equal(first["latents"], again["latents"])
    assert not np.array_equal(first["latents"], other["latents"])


def test_noise_is_kept_as_a_seed() -> None:
    specs = phase_inputs(
        Recipe.from_dict({"family": "sd15", "source": "random:0", "width": 512, "height": 512}).unet_config(),
        Recipe.from_dict({"family": "sd15", "source": "random:0", "width": 512, "height": 512}).unet_layout,
        Phase(PhaseKind.STRIDED),
        64,
        64,
        2,
    )

    inputs = random_inputs(specs, timestep=1.0, width=512, height=512, seed=0)

    assert isinstance(inputs["latents"], Drawn)
    assert isinstance(inputs["prompt_embeds"], Drawn)


@pytest.mark.parametrize("blocks", [5, 10])
def test_shifts_mix_every_value_and_change_from_call_to_call(blocks: int) -> None:
    calls = [mixed_shifts((blocks,), seed) for seed in range(4)]

    for shifts in calls:
        assert shifts.dtype == np.int32
        assert set(shifts.tolist()) == {0, 1, 2, 3}
        assert (np.diff(shifts) != 0).all()
    assert {tuple(sorted(set(column.tolist()))) for column in np.array(calls).T} == {(0, 1, 2, 3)}
