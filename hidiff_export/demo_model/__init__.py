"""The model that comes with the package: 200 emoji, small enough to ship, drawn like any other checkpoint."""

from hidiff_export.demo_model.demo_files import (
    DEMO_SOURCE,
    demo_classifier,
    demo_model,
    demo_prompts,
)

__all__ = ["DEMO_SOURCE", "demo_classifier", "demo_model", "demo_prompts"]
