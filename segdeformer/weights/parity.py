"""Do the converted weights compute what they did? Compared with the library they come from, and written back.

B batch, K classes, HW image, hw logits.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segdeformer.errors import UserError
from segdeformer.models.fusion import MLPFusion
from segdeformer.models.mit import MIT_SIZES, STRIDES, MiT
from segdeformer.models.segmenter import SegDeformer, Segmenter
from segdeformer.weights.names import HUGGINGFACE_MIT, Naming, name_table

LARGEST_DIFFERENCE = 1e-4  # of logits, in float64; what differs there is no rounding
IMAGE_HW = (97, 65)  # odd, so that every border counts


class Parity(NamedTuple):
    """compared_with: None where there is nothing to compare with, then `reason` says why."""

    rewritten: int  # tensors that came back equal to the bit
    compared_with: str | None
    largest_difference: float | None
    reason: str | None


def check_parity(
    model: Segmenter, naming: Naming, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Parity:
    """Write the model back in the project's names, which must give the file's tensors, and compare logits.

    config: of Hugging Face; None for files without one, and for other projects. Raises `UserError` when a
    tensor differs in a bit, or a logit by more than 1e-4.
    """
    rewritten = _compare_tensors(model, naming, tensors)
    if naming not in ("huggingface", "transformers5"):
        return Parity(rewritten, None, None, "only Hugging Face's code is run for that")
    if importlib.util.find_spec("transformers") is None:
        return Parity(rewritten, None, None, "transformers is not installed (pip install transformers)")
    import transformers

    difference = compare_with_transformers(model, tensors, config or huggingface_config(model))
    return Parity(rewritten, f"transformers {transformers.__version__}", difference, None)


def _compare_tensors(model: Segmenter, naming: Naming, tensors: Mapping[str, Tensor]) -> int:
    state, count = model.state_dict(), 0
    for link in name_table(model, naming).links:
        if link.theirs not in tensors:  # a counter that the file lacks
            continue
        written = link.write(state)
        if not torch.equal(written, tensors[link.theirs].to(written.dtype)):
            raise UserError(f"`{link.theirs}` does not come back as it was; please report this as a bug")
        count += 1
    return count


def compare_with_transformers(
    model: Segmenter, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> float:
    """Largest difference of the logits of a random image, in float64; raises `UserError` above 1e-4."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    known = ("segformer.", "decode_head.")
    wanted = {name: value for name, value in tensors.items() if name.startswith(known)}
    build: Any = SegformerForSemanticSegmentation.from_pretrained
    with _quiet_transformers():
        try:
            settings = SegformerConfig(**config)
        except (TypeError, ValueError) as error:
            raise UserError(f"transformers refuses config.json: {str(error).splitlines()[0]}") from error
        theirs, about = build(None, config=settings, state_dict=wanted, output_loading_info=True)
    if missing := sorted(about["missing_keys"]):
        raise UserError(f"transformers needs tensors that the file lacks: {', '.join(missing[:3])}")
    generator = torch.Generator().manual_seed(0)
    images_B3HW = torch.randn(1, 3, *IMAGE_HW, generator=generator, dtype=torch.float64)
    own_dtype, was_training = next(model.parameters()).dtype, model.training
    try:
        with torch.inference_mode():
            expected_BKhw = theirs.double().eval()(pixel_values=images_B3HW).logits
            logits_BKhw = model.double().eval()(images_B3HW).logits_BKhw
    finally:
        model.to(own_dtype).train(was_training)
    difference = float((logits_BKhw - expected_BKhw).abs().max())
    if not difference <= LARGEST_DIFFERENCE:  # NaN too
        raise UserError(
            f"logits differ from transformers' by {difference:.2g}, at most {LARGEST_DIFFERENCE:g} is "
            "allowed; nothing was written. --no-check writes anyway"
        )
    return difference


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and notes on loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def huggingface_config(model: Segmenter) -> dict[str, Any]:
    """The settings in Hugging Face's words of a SegFormer of ours, but for its class names."""
    assert isinstance(model.encoder, MiT)
    assert isinstance(model.decoder, SegDeformer)
    assert isinstance(model.decoder.fusion, MLPFusion)
    blocks = {tuple(name.split(".")[1:4:2]) for name in model.encoder.state_dict() if ".blocks." in name}
    depths = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(len(STRIDES)))
    size = next(s for s in MIT_SIZES.values() if (s.channels, s.depths) == (model.encoder.channels, depths))
    return {
        "num_labels": model.decoder.head.classify.out_channels,
        "num_channels": 3,
        "num_encoder_blocks": len(STRIDES),
        "depths": list(size.depths),
        "hidden_sizes": list(size.channels),
        "num_attention_heads": list(size.heads),
        **HUGGINGFACE_MIT,
        "classifier_dropout_prob": model.decoder.head.dropout.p,
        "decoder_hidden_size": model.decoder.fusion.width,
    }
