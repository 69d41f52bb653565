"""Puts a trained model into the package: `python examples/demo_model/publish.py --work training`."""

import argparse
import shutil
from pathlib import Path

from denoiser import held_out_prompts
from scenes import Library

from hidiff_export.demo_model.demo_files import write_hashes

PACKAGE = Path(__file__).parents[2] / "hidiff_export/demo_model"
MOST_BYTES = 12_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--annotations", type=Path, required=True, help="CLDR's common/annotations/en.xml")
    parser.add_argument("--work", type=Path, required=True, help="what train.py wrote")
    arguments = parser.parse_args()
    for part in ("model", "classifier"):
        shutil.rmtree(PACKAGE / part, ignore_errors=True)
        shutil.copytree(arguments.work / part, PACKAGE / part)
    prompts = [prompt for _, prompt in held_out_prompts(Library.read(arguments.font, arguments.annotations))]
    (PACKAGE / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    write_hashes(PACKAGE)
    size = sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.is_file())
    print(f"{len(prompts)} prompts, {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"That is more than {MOST_BYTES:,}.")


if __name__ == "__main__":
    main()
