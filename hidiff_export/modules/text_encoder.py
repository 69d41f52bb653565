"""A CLIP text encoder as a static graph: tokens in, the embeddings that the UNet is conditioned on out.

The layer that the embeddings are taken from is an input, so that one graph serves every ``clip_skip``. SD takes the
last layer through the final normalization, SDXL the last but one of both its encoders without it; this is what
diffusers' ``encode_prompt`` does. Pooling is transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch

from hidiff_export.families.graph_io import text_encoder_inputs, text_encoder_outputs
from hidiff_export.modules.graph_module import GraphModule
from hidiff_runtime.format.manifest import TensorSpec

_FIRST_OF_HIGHEST = 2
"""The ``eos_token_id`` of configurations from before transformers could find the end itself: it is the highest id."""


class TextEncoderModule(GraphModule):
    """A text encoder for one prompt of 77 tokens; int32 in, float32 out.

    Args:
        text_encoder: transformers' ``CLIPTextModel``, or ``CLIPTextModelWithProjection``, which pools besides.
        penultimate: whether the embeddings are SDXL's: no skipping means the last layer but one, not normalized.
    """

    network = "text_encoder"
    title = "the text encoder"

    def __init__(self, text_encoder: Any, *, penultimate: bool) -> None:
        super().__init__()
        self.text_encoder: Any = text_encoder
        self._penultimate = penultimate
        self._projects = hasattr(text_encoder, "text_projection")

    def input_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:  # noqa: ARG002 - one prompt
        """Returns ``input_ids`` and ``clip_skip``; prompts come one at a time, whatever the batch."""
        return text_encoder_inputs()

    def output_specs(self, model_batch: int) -> tuple[TensorSpec, ...]:  # noqa: ARG002 - one prompt
        """Returns ``prompt_embeds``, and ``text_embeds`` of an encoder that projects."""
        return text_encoder_outputs(self.text_encoder.config.to_dict(), pooled=self._projects)

    def forward(self, input_ids: torch.Tensor, clip_skip: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the prompt's embeddings, float32.

        Args:
            input_ids: [1, 77], int32, as the tokenizer gives them, start, end and padding included.
            clip_skip: [1], int32, from 0 to :func:`~hidiff_export.families.graph_io.most_skipped`.

        Returns:
            ``prompt_embeds`` [1, 77, width]; of an encoder that projects also ``text_embeds`` [1, projection].
        """
        model = self.text_encoder.text_model if self._projects else self.text_encoder
        hidden = model.embeddings(input_ids=input_ids)
        states = []
        for layer in model.encoder.layers:
            hidden = layer(hidden, attention_mask=None, is_causal=True)
            states.append(hidden)
        kept = torch.cat(states[:-1] if self._penultimate else states)
        chosen = kept.index_select(0, kept.shape[0] - 1 - clip_skip)
        embeds = chosen if self._penultimate else model.final_layer_norm(chosen)
        if not self._projects:
            return (embeds.float(),)
        end = end_positions(input_ids, model.eos_token_id)
        pooled = model.final_layer_norm(hidden[0].index_select(0, end))
        return embeds.float(), self.text_encoder.text_projection(pooled).float()


def end_positions(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Returns where each prompt ends, as transformers finds it: int64 [prompts].

    With the ``eos_token_id`` 2 of the published configurations it is at the first of the highest ids, else at the
    first token of that id. (transformers' ``CLIPTextModel.forward``)

    Args:
        input_ids: [prompts, tokens].
    """
    if eos_token_id == _FIRST_OF_HIGHEST:
        return input_ids.to(torch.int32).argmax(dim=-1)
    return (input_ids == eos_token_id).to(torch.int32).argmax(dim=-1)
