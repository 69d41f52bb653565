"""``hidiff-run generate`` on the toy: what is written, what is shown, and that bad input writes nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
import toy_pictures
from PIL import Image

from hidiff_runtime import bundle as bundle_module
from hidiff_runtime import cli
from hidiff_runtime.bundle import Bundle
from hidiff_runtime.console.progress import RunProgress
from hidiff_runtime.format import tokenizer
from hidiff_runtime.format.tokenizer import Tokenizer

pytestmark = pytest.mark.alone

SIZE = (toy_pictures.WIDTH, toy_pictures.HEIGHT)
Run = Callable[..., int]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bundles")
    kinds = {"sd": toy.Toy(), "sdxl": toy.Toy(sdxl=True), "batch": toy.Toy(batch=2), "control": toy.Toy(control=True)}
    made = {name: toy_pictures.make(home / name, kind) for name, kind in kinds.items()}
    made["no text"] = toy_pictures.make(home / "no text", with_text=False)
    made["no vae"] = toy_pictures.make(home / "no vae", with_vae=False)
    return made


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> toy_pictures.Backend:
    """The backend that commands find."""
    real, found = bundle_module.open, toy_pictures.Backend()

    def opened(folder: Path, *, backend: str | None, **options: Any) -> Bundle:
        assert backend is None
        return real(folder, backend=found, **options)

    monkeypatch.setattr(bundle_module, "open", opened)
    return found


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with pictures to start from."""
    monkeypatch.chdir(tmp_path)
    colours = np.random.RandomState(0).randint(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
    Image.fromarray(colours).save("image.png")
    Image.fromarray(colours[:8, :8]).save("small.png")
    Image.new("L", SIZE, 255).save("mask.png")
    Path("empty.txt").write_text("\n \n")
    Path("bad.jsonl").write_text('"a boat"\n{"prompt": "a tree", "seed": }\n')
    Path("unknown.jsonl").write_text('{"prompt": "a tree", "sead": 3}\n')
    Path("text.jsonl").write_text("a boat\n")
    Path("half.jsonl").write_text('"a boat"\n{"prompt": "a \\ud800 tree"}\n')
    Path("options.txt").write_text("a boat\n--prompt tree --seed 5\n")
    Path("header.txt").write_text("prompt,seed\na boat,3\n")
    Path("array.txt").write_text('["a boat"]\n')
    Path("prompts").write_text("a boat\n")
    Path("untabulated.jsonl").write_text('"a boat"\n\n{"prompt": "a tree", "steps": 99}\n')
    Path("there.png").write_text("mine")
    Path("folder").mkdir()
    return tmp_path


@pytest.fixture
def generate(folders: dict[str, Path], backend: toy_pictures.Backend, work: Path) -> Run:  # noqa: ARG001 - made ready
    def run(*arguments: str, bundle: str = "sd") -> int:
        return cli.main(["generate", str(folders[bundle]), *arguments])

    return run


def info(path: str | Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        picture.load()
        return dict(json.loads(picture.info["hidiff"]))


def test_a_seed_of_minus_one_is_a_random_one_that_the_picture_tells(generate: Run, work: Path) -> None:
    for name in ("a.png", "b.png"):
        assert generate("-p", "a boat", "--seed", "-1", "--steps", "3", "-o", name) == 0
    seeds = [info(name)["seed"] for name in ("a.png", "b.png")]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert generate("-p", "a boat", "--seed", str(seeds[0]), "--steps", "3", "-o", "again.png") == 0
    assert Path("again.png").read_bytes() == Path("a.png").read_bytes()
    (work / "rows.jsonl").write_text('{"prompt": "a boat", "seed": -1}\n{"prompt": "a boat", "seed": 4}\n' * 2)
    assert generate("--prompts", "rows.jsonl", "--steps", "3", "-o", "{index}.png") == 0
    drawn = [info(f"{index:03}.png")["seed"] for index in range(4)]
    assert drawn[1] == drawn[3] == 4
    assert drawn[0] != drawn[2]
    assert -1 not in drawn


def test_a_dry_run_says_that_a_random_seed_is_not_drawn_yet(generate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, told in (("-1", 1), ("3", 0)):
        assert generate("-p", "a", "--seed", seed, "--steps", "3", "--dry-run", "--json", "-o", "a.png") == 0
        out, err = capsys.readouterr()
        assert len(json.loads(out)["warnings"]) == err.count("is drawn anew when pictures are made") == told


def test_a_prompt_becomes_a_file(generate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "a lighthouse", "-n", "fog", "--seed", "3", "--steps", "4", "-o", "out.png") == 0
    out, err = capsys.readouterr()
    assert out.startswith("out.png: 64x48, seed 3, 4 steps, ")
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 1/4  strided_pooled  ")
    assert "s/step" in lines[0]
    assert lines[-1].endswith("0:00 left")
    with Image.open("out.png") as picture:
        assert (picture.size, picture.mode) == (SIZE, "RGB")
        assert picture.info["parameters"].startswith("a lighthouse\nNegative prompt: fog\nSteps: 4, Sampler: plain")
    assert info("out.png")["seed"] == 3


def test_options_reach_the_run(generate: Run) -> None:
    run = ["-p", "a lighthouse", "--steps", "5", "--sampler", "noisy", "--guidance", "3"]
    run += ["--clip-skip", "1", "--guidance-rescale", "0.7"]
    assert generate(*run, "--image", "image.png", "--mask", "mask.png", "--strength", "0.5", "-o", "out.png") == 0
    facts = info("out.png")
    wanted = {"steps": 5, "sampler": "noisy", "guidance_scale": 3.0, "clip_skip": 1, "strength": 0.5}
    wanted |= {"guidance_rescale": 0.7}
    assert {name: facts[name] for name in wanted} == wanted
    assert facts["given"] == ["image", "mask"]


def test_a_control_image_and_its_scale(generate: Run) -> None:
    assert generate("-p", "x", "--control", "image.png", "--steps", "2", "-o", "out.png", bundle="control") == 0
    more = ["--conditioning-scale", "0.5", "-o", "half.png"]
    assert generate("-p", "x", "--control", "small.png", "--resize", "--steps", "2", *more, bundle="control") == 0
    assert info("half.png")["conditioning_scale"] == 0.5


def test_sdxl_sizes_are_given_width_first(generate: Run) -> None:
    sizes = ["--original-size", "200x100", "--crop", "4,3", "--target-size", "60x50"]
    assert generate("-p", "x", "--steps", "1", *sizes, "-o", "out.png", bundle="sdxl") == 0
    assert info("out.png")["time_ids"] == [100, 200, 3, 4, 50, 60]
    own = {"negative_original_size": [9, 8], "negative_crops": [7, 6], "negative_target_size": [5, 4]}
    Path("sizes.jsonl").write_text(json.dumps({"prompt": "x", **own}))
    assert generate("--prompts", "sizes.jsonl", "--steps", "1", "-o", "negative.png", bundle="sdxl") == 0
    assert info("negative.png")["negative_time_ids"] == [9, 8, 7, 6, 5, 4]
    for wrong in (["--crop", "4"], ["--original-size", "4"], ["--target-size", "axb"]):
        with pytest.raises(SystemExit) as caught:
            generate("-p", "x", *wrong, "-o", "other.png", bundle="sdxl")
        assert caught.value.code == 2


def test_prompts_from_a_file_with_settings_of_their_own(generate: Run, work: Path) -> None:
    lines = [
        "a boat",
        "",
        '{"prompt": "a tree", "seed": 7, "steps": 3, "negative_prompt": "fog", "image": "image.png"}',
    ]
    (work / "folder" / "prompts.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    (work / "image.png").rename(work / "folder/image.png")
    more = ["--seed", "2", "--steps", "2", "--sheet", "sheet.png", "--previews", "previews.png"]
    assert generate("--prompts", "folder/prompts.txt", *more, "-o", "made/") == 0
    assert sorted(path.name for path in (work / "made").iterdir()) == ["000.png", "001.png"]
    first, second = info("made/000.png"), info("made/001.png")
    assert (first["prompt"], first["seed"], first["steps"]) == ("a boat", 2, 2)
    assert (second["prompt"], second["seed"], second["steps"], second["given"]) == ("a tree", 7, 3, ["image"])
    for path in ("sheet.png", "previews.png"):
        with Image.open(path) as sheet:
            assert sheet.width > 2 * 100


def test_several_prompts_and_a_pattern(generate: Run, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "a boat", "-p", "a tree", "--steps", "1", "-o", "out-{index}.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [picture["file"] for picture in told["pictures"]] == ["out-000.png", "out-001.png"]
    assert [picture["prompt"] for picture in told["pictures"]] == ["a boat", "a tree"]
    assert info("out-001.png")["prompt"] == "a tree"
    assert generate("-p", "x", "--steps", "1", "--seed", "5", "-o", "{seed}-{index}.png", bundle="batch") == 0
    assert info("5-001.png")["index"] == 1
    assert len(list(work.glob("*-*.png"))) == 4


def test_what_is_cut_is_told_in_the_end(generate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-p", "x" * 75 + "the end", "--steps", "1", "-o", "out.png") == 0
    assert "over 75 tokens: 'the end'" in capsys.readouterr().err


def test_a_file_that_is_there_is_replaced_only_by_force(generate: Run, work: Path) -> None:
    assert generate("-p", "x", "--steps", "1", "-o", "there.png") == 2
    assert (work / "there.png").read_text() == "mine"
    assert generate("-p", "x", "--steps", "1", "-o", "there.png", "--force") == 0
    assert info("there.png")["prompt"] == "x"


def test_a_dry_run_checks_and_tells_and_does_nothing(
    generate: Run, work: Path, backend: toy_pictures.Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(work.iterdir())
    run = ["-p", "xyz", "-n", "x" * 78, "--steps", "8", "--image", "image.png", "--strength", "0.5", "--dry-run"]
    assert generate(*run, "-o", "out.png") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in ("'xyz', 3 tokens", "78 tokens, of which is cut: 'xxx'", "strided_pooled 0-0, strided 1-1", "out.png"):
        assert part in out
    assert "strength 0.5" in out
    assert generate(*run, "-o", "out.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"][0]["prompts"][1] == {"text": "x" * 78, "tokens": 78, "cut": "xxx"}
    assert told["runs"][0]["phases"][-1] == {"phase": "windowed", "first": 2, "last": 3}
    assert generate("-p", "x", "-p", "y", "--dry-run", "-o", "new/") == 0
    assert sorted(work.iterdir()) == before
    assert backend.events == []


def test_a_dry_run_shows_the_first_prompts_as_they_would_be_drawn(
    generate: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"prompt": "a tree", "negative_prompt": "fog", "seed": 7, "sampler": "noisy", "steps": 3}', "# more"]
    Path("many.txt").write_text("\n".join([*lines, *(f"picture {number}" for number in range(6))]))
    assert generate("--prompts", "many.txt", "--dry-run", "-o", "new/") == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "line 1:\nprompt    'a tree', 5 tokens\nnegative  'fog', 3 tokens\n  run     64x48, seed 7, 3 steps of noisy"
    )
    assert "line 6:\nprompt    'picture 3'" in out
    assert "picture 4" not in out
    assert "and 2 more runs, which --json shows\nwould write 7 files" in out
    assert generate("--prompts", "many.txt", "--dry-run", "-o", "new/", "--json") == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["where"] for run in runs] == ["line 1", *(f"line {number}" for number in range(3, 9))]
    assert runs[0]["negative_prompts"] == ["fog"]
    assert runs[-1]["prompts"][0]["text"] == "picture 5"


def test_a_dry_run_reads_the_tokenizer_once(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = Tokenizer.open

    def counted(path: Path, places: int | None = None) -> Tokenizer:
        opened.append(path)
        return real(path, places)

    monkeypatch.setattr(Tokenizer, "open", counted)
    assert generate("-p", "x", "-p", "y", "-n", "fog", "--dry-run", "-o", "new/") == 0
    assert len(opened) == 1


def test_a_dry_run_finds_what_a_run_would(generate: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    assert generate("-p", "x", "--steps", "99", "--dry-run", "-o", "out.png") == 2
    assert generate("-p", "x", "--dry-run", "-o", "there.png") == 2
    assert generate("-p", "x" * 200, "--long-prompt", "chunk", "--dry-run", "-o", "out.png") == 2
    broken = toy_pictures.make(tmp_path / "broken")
    (broken / "vae/decoder.toy").write_text("short")
    folders["broken"] = broken
    assert generate("-p", "x", "--dry-run", "-o", "out.png", bundle="broken") == 4


# One of each kind: the rest is tested where its rule is, in test_pipeline.py, test_images.py and test_prompt_files.py.
BAD: dict[str, tuple[str, list[str], int, str]] = {
    "empty prompt": ("sd", ["-p", " "], 2, "prompt is empty"),
    "bytes that are no text": ("sd", ["-p", "a\udcff"], 2, "surrogate"),
    "controls in a name": ("sd", ["-p", "x", "--sampler", "a\x1b[31mb\udcff"], 2, "a\\x1b[31mb\\udcff"),
    "no image for the mask": ("sd", ["-p", "x", "--mask", "mask.png"], 2, "mask needs an image"),
    "wrong size": ("sd", ["-p", "x", "--image", "small.png"], 2, "--resize"),
    "mask of a wrong size": ("sd", ["-p", "x", "--image", "image.png", "--mask", "small.png"], 2, "The mask is not"),
    "missing picture": ("sd", ["-p", "x", "--image", "none.png"], 2, "none.png: No such file"),
    "negative strength": ("sd", ["-p", "x", "--image", "image.png", "--strength", "-0.5"], 2, "strength"),
    "strength alone": ("sd", ["-p", "x", "--strength", "0.5"], 2, "start from an image"),
    "guidance beyond float32": ("sd", ["-p", "x", "--guidance", "1e39"], 2, "from -1000 to 1000"),
    "unknown sampler": ("sd", ["-p", "x", "--sampler", "brush"], 2, "no such sampler"),
    "untabulated steps": ("sd", ["-p", "x", "--steps", "99"], 2, "no table"),
    "clip skip": ("sd", ["-p", "x", "--clip-skip", "9"], 2, "clip_skip"),
    "seed": ("sd", ["-p", "x", "--seed", str(2**64)], 2, "not a seed"),
    "long prompt": ("sd", ["-p", "x" * 76, "--long-prompt", "chunk"], 2, "prompt_chunks"),
    "long prompt for a folder": ("sd", ["--long-prompt", "chunk", *["-p", "x" * 76] * 2, "-o", "new/"], 2, "too long"),
    "no ControlNet": ("sd", ["-p", "x", "--control", "image.png"], 2, "has no ControlNet"),
    "no control image": ("control", ["-p", "x"], 2, "needs a control image"),
    "no text encoder": ("no text", ["-p", "x"], 4, "no text encoder"),
    "no VAE": ("no vae", ["-p", "x"], 4, "no VAE"),
    "no prompts": ("sd", ["--prompts", "empty.txt"], 2, "no prompts in the file"),
    "no prompt file": ("sd", ["--prompts", "none.txt"], 2, "none.txt: No such file"),
    "prompt file that is no text": (
        "sd",
        ["--prompts", "image.png"],
        2,
        "Expected one of .txt, .jsonl, .ndjson, .json",
    ),
    "prompt file without an ending": ("sd", ["--prompts", "prompts"], 2, "Expected one of .txt, .jsonl"),
    "bad JSON": ("sd", ["--prompts", "bad.jsonl"], 2, "bad.jsonl, line 2: Expecting value"),
    "text as JSON": ("sd", ["--prompts", "text.jsonl"], 2, '{"prompt": "a boat"}'),
    "JSON as text": ("sd", ["--prompts", "array.txt"], 2, "Call it array.json"),
    "a table as text": ("sd", ["--prompts", "header.txt"], 2, "Call it header.csv"),
    "a web UI's options": ("sd", ["--prompts", "options.txt"], 2, 'Write it as JSON: {"prompt": "tree", "seed": 5}'),
    "a line's half of a pair": ("sd", ["--prompts", "half.jsonl", "-o", "new/"], 2, "line 2: U+D800 at position 3"),
    "unknown setting": ("sd", ["--prompts", "unknown.jsonl"], 2, "unknown.jsonl, line 1: sead"),
    "a line's steps": ("sd", ["--prompts", "untabulated.jsonl", "-o", "new/"], 2, "untabulated.jsonl, line 3: 99"),
    "folder": ("sd", ["-p", "x", "-o", "folder"], 2, "is a folder"),
    "nowhere": ("sd", ["-p", "x", "-o", "no/where.png"], 2, "folder does not exist"),
    "a name that is too long": ("sd", ["-p", "x", "-o", "x" * 300 + ".png"], 6, "name too long"),
    "no PNG": ("sd", ["-p", "x", "-o", "out.jpg"], 2, "ends in .png"),
    "one file for two": ("sd", ["-p", "x", "-p", "y", "-o", "two.png"], 2, "two-{index}.png"),
    "same names": ("sd", ["-p", "x", "-p", "y", "-o", "{seed}.png"], 2, "same name"),
    "sheet over picture": ("sd", ["-p", "x", "-o", "out.png", "--sheet", "out.png"], 2, "same name"),
    "sheet over picture by another way": ("sd", ["-p", "x", "--sheet", "folder/../out.png"], 2, "same name"),
    "sheet is there": ("sd", ["-p", "x", "--sheet", "there.png"], 2, "there already"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_runs_and_writes_nothing(
    generate: Run, work: Path, backend: toy_pictures.Backend, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    bundle, arguments, code, message = BAD[case]
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    output = [] if "-o" in arguments else ["-o", "out.png"]
    assert generate(*arguments, *output, bundle=bundle) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    assert not (work / "new").exists()
    assert backend.events == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(generate: Run, work: Path) -> None:
    (work / "folder").chmod(0o500)
    assert generate("-p", "x", "-o", "folder/out.png") == 6


def test_an_interrupt_exits_130_and_leaves_no_file(
    generate: Run, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: RunProgress, info: Any) -> None:
        if info.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunProgress, "step", interrupt)
    before = sorted(work.iterdir())
    assert generate("-p", "x", "--steps", "4", "-o", "out.png", "--sheet", "sheet.png") == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(work.iterdir()) == before


def test_a_disk_that_is_full_leaves_no_file(generate: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(work.iterdir())
    monkeypatch.setattr("os.fsync", refuse)
    assert generate("-p", "x", "--steps", "1", "-o", "out.png") == 6
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize("library", ["PIL.Image", "tokenizers"])
def test_without_a_library_the_command_that_installs_it_is_named(
    generate: Run, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    tokenizer._kept.cache_clear()  # as in a process that has read none
    assert generate("-p", "x", "-o", "out.png") == 5
    assert "pip install 'hidiff-runtime[pictures]'" in capsys.readouterr().err
    assert not (work / "out.png").exists()


def test_prompts_are_needed_and_come_from_one_place(generate: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-o", "out.png") == 2
    assert "-p TEXT, --prompts FILE or --like PICTURE" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        generate("-p", "x", "--prompts", "empty.txt", "-o", "out.png")
    assert caught.value.code == 2
