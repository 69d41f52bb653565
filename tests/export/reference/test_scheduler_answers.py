"""A build records what schedulers answer only beside tables that agree with them."""

import dataclasses
from pathlib import Path

import pytest

from hidiff_export.errors import ParityError
from hidiff_export.families.family import Family, default_scheduler
from hidiff_export.recipe import Recipe
from hidiff_export.reference.scheduler_answers import compare_samplers, record_samplers
from hidiff_export.reference.tolerances import Boundary
from hidiff_export.scheduler_tables.scheduler_probe import probe
from hidiff_runtime.verification.reference_samples import ReferenceSamples
from hidiff_runtime.verification.replay_schedulers import replay_sampler
from hidiff_runtime.verification.sample_recorder import SampleRecorder
from hidiff_runtime.verification.scheduler_samples import AGREES, SamplerAnswers

CONFIG = default_scheduler(Family.SD15)[1]
RECIPE = Recipe.from_dict(
    {
        **{"family": "sd15", "source": "random:0", "unet_width": "tiny", "width": 128, "height": 128},
        **{"sampler": ["ddim", "tcd"], "steps": [2, 4], "tcd_eta": 0.5},
    }
)


def test_what_is_recorded_survives_the_disk_and_a_changed_table_is_not_recorded(tmp_path: Path) -> None:
    tables = {name: probe(name, CONFIG, RECIPE.steps, tcd_eta=RECIPE.tcd_eta) for name in ("ddim", "tcd")}
    recorder = SampleRecorder("diffusers", AGREES, AGREES)
    record_samplers(recorder, RECIPE, CONFIG, tables)
    recorder.facts = {"steps": [2, 4]}
    samples = ReferenceSamples.read(recorder.write(tmp_path)[0])
    assert samples.facts == {"steps": [2, 4]}
    assert [(sample.sampler, sample.eta) for sample in samples.samplers] == [("ddim", None), ("tcd", 0.5)]
    for sample in samples.samplers:
        assert replay_sampler(tables[sample.sampler], sample, SamplerAnswers.of(sample, samples.tensors)).ok
    wrong = {**tables, "tcd": dataclasses.replace(tables["tcd"], input_scale=tables["tcd"].input_scale * 2)}
    with pytest.raises(
        ParityError, match="table of the sampler tcd is not what its diffusers scheduler does"
    ) as caught:
        record_samplers(recorder, RECIPE, CONFIG, wrong)
    assert caught.value.given == "scaled sample of 2 steps, evaluation 1"
    assert caught.value.exit_code == 1
    verdicts = list(compare_samplers(RECIPE, CONFIG, wrong))
    assert [(verdict.boundary, verdict.phase, verdict.ok) for verdict in verdicts] == [
        (Boundary.SAMPLER.value, "ddim", True),
        (Boundary.SAMPLER.value, "tcd", False),
    ]
