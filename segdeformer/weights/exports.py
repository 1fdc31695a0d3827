"""Our checkpoints as files of another project, where that project has such a model.

And do converted weights compute what they did? Compared with the library they come from, and written back.

B batch, K classes, HW image, hw logits.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from segdeformer.config import MLPFusionConfig, ModelConfig, UperNetConfig
from segdeformer.errors import UsageError, UserError, count
from segdeformer.files import replacing, write_json
from segdeformer.models.encoders import TimmEncoder
from segdeformer.models.fusion import MLPFusion
from segdeformer.models.mit import MIT_SIZES, STRIDES, MiT
from segdeformer.models.segmenter import SegDeformer, Segmenter
from segdeformer.weights.checkpoint import Loaded
from segdeformer.weights.deduce import RELEASED_CONTEXT
from segdeformer.weights.imports import POSITION_INDEX
from segdeformer.weights.names import HUGGINGFACE_MIT, PROJECT_TITLES, Naming, Project, name_table, written

LARGEST_DIFFERENCE = 1e-4  # of logits, in float64; what differs there is no rounding
IMAGE_HW = (97, 65)  # odd, so that every border counts


class Parity(NamedTuple):
    """compared_with: None where there is nothing to compare with, then `reason` says why."""

    rewritten: int  # tensors that came back equal to the bit
    compared_with: str | None
    largest_difference: float | None
    reason: str | None


class Exported(NamedTuple):
    """left_out: our tensors that only training needs, and the project's model has no place for."""

    files: tuple[Path, ...]
    tensors: int
    left_out: tuple[str, ...]
    parity: Parity | None


def export_model(loaded: Loaded, project: Project, out: Path, *, license_text: str, check: bool) -> Exported:
    """Write a checkpoint for another project: a folder for Hugging Face, else a .pth or .safetensors file.

    check: compare with the project's library where that is installed, before anything is written. Raises
    `UsageError` when the project has no such model.
    """
    checkpoint, model = loaded.checkpoint, loaded.model
    _check_out(out, project)
    if checkpoint.folded:
        raise UsageError(
            f"{checkpoint.path} holds a folded model, for inference only; convert the one it was made of"
        )
    if obstacle := _obstacle(checkpoint.recipe.model, project):
        raise UsageError(f"{checkpoint.path} cannot be written for {PROJECT_TITLES[project]}: {obstacle}")
    table, state = name_table(model, project), model.state_dict()
    if unknown := [name for name in table.unknown if not name.startswith("auxiliary.")]:
        raise UsageError(
            f"{checkpoint.path} cannot be written for {PROJECT_TITLES[project]}, which has no name for "
            f"`{unknown[0]}` ({count(len(unknown), 'such tensor')})"
        )
    tensors = {name: tensor.cpu().contiguous() for name, tensor in written(table.links, state).items()}
    parity = check_parity(model, project, tensors, None) if check else None
    if project == "huggingface":
        files = _write_huggingface(loaded, tensors, out, license_text)
    else:
        files = _write_file(loaded, tensors | _position_indices(model), out, license_text)
    return Exported(files, len(tensors), table.unknown, parity)


def _check_out(out: Path, project: Project) -> None:
    if project == "huggingface":
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out}: is a file; Hugging Face's models are folders, name one")
    elif out.suffix not in {".pth", ".safetensors"} or out.is_dir():
        raise UsageError(f"--out {out}: must be a .pth or .safetensors file for {project}")


def _obstacle(config: ModelConfig, project: Project) -> str | None:
    """Why the project has no such model."""
    fusion = config.fusion
    mlp = isinstance(fusion, MLPFusionConfig) and fusion.depth == 2
    projection = fusion.projection if isinstance(fusion, MLPFusionConfig) else None
    if project != "mmseg":
        if config.context is not None:
            return "it has a model.context, SegDeformer's; SegFormer has none"
        if not config.encoder.name.startswith("mit_") or not mlp or projection != "linear":
            return (
                'SegFormer there is MiT with model.fusion = "mlp", depth 2 and projection "linear"; '
                f"this is {config.encoder.name} with {_described(config)}"
            )
        return None
    if config.context is not None and (config.context != RELEASED_CONTEXT or not mlp):
        return "its model.context is not that of the released SegDeformer (conv_bn_relu, on an MLP)"
    if (mlp and projection == "conv_bn_relu") or isinstance(fusion, UperNetConfig):
        return None
    return f'only an MLP of depth 2 with "conv_bn_relu", and UperNet, can be; this is {_described(config)}'


def _described(config: ModelConfig) -> str:
    fusion = config.fusion
    if isinstance(fusion, MLPFusionConfig):
        return f'an MLP of depth {fusion.depth} with "{fusion.projection}"'
    return fusion.kind


def _position_indices(model: Segmenter) -> dict[str, Tensor]:
    """mmsegmentation's Swin keeps its index into the table of relative positions in the file."""
    if not isinstance(model.encoder, TimmEncoder):
        return {}
    return {
        name.replace("backbone.layers", "backbone.stages").replace(".attn.", ".attn.w_msa."): buffer.cpu()
        for name, buffer in model.encoder.named_buffers()
        if name.endswith(POSITION_INDEX)
    }


def _write_file(loaded: Loaded, tensors: dict[str, Tensor], out: Path, license_text: str) -> tuple[Path, ...]:
    classes, iteration = loaded.checkpoint.classes, loaded.checkpoint.iteration
    with replacing(out) as aside:
        if out.suffix == ".safetensors":
            save_file(tensors, aside, {"format": "pt", "license": license_text})
            return (out,)
        names, palette = list(classes.names), [list(color) for color in classes.colors]
        meta: dict[str, Any] = {
            "CLASSES": names,  # mmsegmentation 0.x
            "PALETTE": palette,
            "dataset_meta": {"classes": names, "palette": palette},  # 1.x
            "iter": iteration,
            "license": license_text,
        }
        torch.save({"meta": meta, "state_dict": tensors}, aside)
    return (out,)


def _write_huggingface(
    loaded: Loaded, tensors: dict[str, Tensor], out: Path, license_text: str
) -> tuple[Path, ...]:
    recipe, names = loaded.checkpoint.recipe, loaded.checkpoint.classes.names
    config = huggingface_config(loaded.model)
    del config["num_labels"]  # id2label tells
    config |= {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "dtype": "float32",
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "semantic_loss_ignore_index": 255,
        "license": license_text,
    }
    height, width = recipe.augment.crop
    preprocessor = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in recipe.data.mean],
        "image_std": [value / 255 for value in recipe.data.std],
        "do_reduce_labels": recipe.data.name == "ade20k",
    }
    weights = out / "model.safetensors"
    with replacing(weights) as aside:
        save_file(tensors, aside, {"format": "pt", "license": license_text})
    settings = {out / "config.json": config, out / "preprocessor_config.json": preprocessor}
    for path, values in settings.items():
        write_json(path, values)
    return (weights, *settings)


# Parity.


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
