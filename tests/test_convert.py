"""Models of other projects compute here what they did there.

The models come from `foreign`, which knows the published names and equations and nothing of ours.
"""

import foreign
import foreign_equations
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from segdeformer.errors import UserError
from segdeformer.models.segmenter import Segmenter
from segdeformer.weights.exports import check_parity
from segdeformer.weights.imports import import_model
from segdeformer.weights.names import name_table, written


def logits(model: Segmenter, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.double().eval()(images).logits_BKhw


def test_segformer_b0_of_mmsegmentation_computes_what_its_equations_say(tmp_path):
    tensors = foreign.mmseg_segformer(foreign.B0, width=32, num_classes=150)
    imported = import_model(foreign.written(tmp_path / "b0.pth", tensors))
    assert (imported.used, imported.unused, imported.missing) == (len(tensors), (), ())
    assert imported.recipe.model.encoder.name == "mit_b0"
    assert imported.recipe.evaluate.resize_to == (2048, 512)
    images, exact = foreign.random_images(97, 65), foreign.in_float64(tensors)
    maps = foreign_equations.run_mmseg_mit(
        exact, images, heads=(1, 2, 5, 8), reductions=foreign.B0[2], eps=1e-5
    )
    expected = foreign_equations.run_mmseg_segformer_head(exact, maps)
    torch.testing.assert_close(logits(imported.model, images), expected, atol=1e-12, rtol=1e-12)


def test_swin_s_with_upernet_computes_what_its_equations_say_at_odd_sizes(tmp_path):
    tensors = foreign.swin(foreign.SWIN_S, num_classes=150)
    imported = import_model(foreign.written(tmp_path / "swin.pth", tensors))
    assert imported.title == "Swin-S + UperNet"
    assert imported.missing == ()
    indices = {name for name in tensors if name.endswith("relative_position_index")}
    assert {item.name for item in imported.unused} == indices
    assert len(indices) == 24
    assert imported.used == len(tensors) - 24
    assert imported.recipe.model.auxiliary.stage == 3
    images, exact = foreign.random_images(61, 97), foreign.in_float64(tensors)
    maps = foreign_equations.run_mmseg_swin(exact, images, heads=foreign.SWIN_S["heads"], window=7)
    expected = foreign_equations.run_mmseg_upernet_head(exact, maps)
    torch.testing.assert_close(logits(imported.model, images), expected, atol=1e-11, rtol=1e-11)


def test_swin_in_microsofts_names_and_order_is_the_same_model(tmp_path):
    tensors = foreign.swin(foreign.SWIN_T)
    renamed = foreign.to_microsoft_swin(tensors)
    renamed["backbone.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    ours = import_model(foreign.written(tmp_path / "mmseg.pth", tensors))
    theirs = import_model(foreign.written(tmp_path / "microsoft.pth", renamed))
    assert (ours.naming, theirs.naming) == ("mmseg", "microsoft")
    assert (ours.license, theirs.license) == ("Apache-2.0", "MIT")
    state = theirs.model.state_dict()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    order = "backbone.stages.0.downsample.reduction.weight"
    assert not torch.equal(tensors[order], renamed["backbone.layers.0.downsample.reduction.weight"])
    check_parity(theirs.model, theirs.naming, theirs.source.tensors, None)


@pytest.mark.parametrize("neck", [False, True])
def test_deit_s_with_upernet_computes_what_its_equations_say(neck, tmp_path):
    tensors = foreign.vit(neck=neck)
    imported = import_model(foreign.written(tmp_path / "deit.pth", tensors))
    assert imported.title == "DeiT-S + UperNet"
    assert (imported.used, imported.unused, imported.missing) == (len(tensors), (), ())
    assert imported.recipe.model.encoder.image_size == (64, 64)
    assert imported.recipe.model.fusion.neck is neck
    images, exact = foreign.random_images(64, 64), foreign.in_float64(tensors)
    maps = foreign_equations.run_mmseg_vit(exact, images, heads=6, taps=(2, 5, 8, 11))
    maps = foreign_equations.run_mmseg_neck(exact, maps) if neck else maps
    expected = foreign_equations.run_mmseg_upernet_head(exact, maps)
    torch.testing.assert_close(logits(imported.model, images), expected, atol=1e-12, rtol=1e-12)


def test_the_released_segdeformer_head_computes_what_its_equations_say(tmp_path):
    context = foreign.random_tensors(foreign.released_segdeformer_context(24, 7), seed=2)
    tensors = foreign.mmseg_segformer() | context
    imported = import_model(foreign.written(tmp_path / "segdeformer.pth", tensors))
    assert (imported.used, imported.unused) == (len(tensors), ())
    images, exact = foreign.random_images(65, 33), foreign.in_float64(tensors)
    maps = foreign_equations.run_mmseg_mit(
        exact, images, heads=(1, 2, 4, 8), reductions=foreign.NANO[2], eps=1e-5
    )
    expected, class_logits = foreign_equations.run_released_segdeformer(exact, maps)
    with torch.inference_mode():
        output = imported.model.double()(images)
    torch.testing.assert_close(output.logits_BKhw, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(output.class_logits_BKhw, class_logits, atol=1e-12, rtol=1e-12)


@pytest.fixture(scope="module")
def transformers_b0():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150)).eval()
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:  # norms and biases that are not 1 and 0
            tensor += 0.2 * torch.rand_like(tensor) + ("running_var" in name)
    return model


@pytest.mark.parametrize("size", [(64, 64), (97, 65)])
@pytest.mark.parametrize("form", ["folder", "bin", "state dict of transformers 5"])
def test_segformer_b0_of_hugging_face_has_the_logits_of_transformers(size, form, transformers_b0, tmp_path):
    if form == "state dict of transformers 5":
        path = tmp_path / "model.pt"
        torch.save(transformers_b0.state_dict(), path)
    else:
        path = tmp_path / "b0"
        transformers_b0.save_pretrained(path)
    if form == "bin":
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    imported = import_model(path)
    assert (imported.unused, imported.missing) == ((), ())
    assert "non-commercial" in imported.license
    images = foreign.random_images(*size).float()
    with torch.inference_mode():
        expected = transformers_b0(pixel_values=images).logits
        ours = imported.model(images).logits_BKhw
    assert (ours - expected).abs().max() < 1e-4
    assert expected.std() > 0.01
    parity = check_parity(
        imported.model, imported.naming, imported.source.tensors, imported.source.huggingface_config
    )
    assert parity.compared_with.startswith("transformers ")
    assert parity.largest_difference < 1e-10


def test_the_parity_check_finds_a_changed_weight(transformers_b0, tmp_path):
    transformers_b0.save_pretrained(tmp_path)
    imported = import_model(tmp_path)
    with torch.no_grad():
        imported.model.decoder.head.classify.bias[3] += 1e-3
    with pytest.raises(UserError, match=r"`decode_head.classifier.bias` does not come back"):
        check_parity(imported.model, "huggingface", imported.source.tensors, None)
    imported.model.decoder.head.classify.bias[3].data.sub_(1e-3)
    moved = dict(imported.source.tensors)
    moved["decode_head.classifier.bias"] = imported.model.decoder.head.classify.bias.detach()
    for norm in (m for m in imported.model.encoder.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.eps = 1e-2
    with pytest.raises(UserError, match=r"logits differ from transformers' by .*, at most 0.0001 is allowed"):
        check_parity(imported.model, "huggingface", moved, None)


def test_nvlabs_names_have_the_logits_of_transformers_too(tmp_path):
    tensors = foreign.nvlabs_segformer()
    imported = import_model(foreign.written(tmp_path / "nvlabs.pth", tensors))
    assert [item.name for item in imported.unused] == [
        "decode_head.conv_seg.weight",
        "decode_head.conv_seg.bias",
    ]
    # The order of NVlabs' fused keys and values is checked in test_weights; here the head's.
    state = imported.model.state_dict()
    links = name_table(imported.model, "huggingface").links
    in_their_names = written(links, state)
    fuse = in_their_names["decode_head.linear_fuse.weight"]
    assert torch.equal(fuse, tensors["decode_head.linear_fuse.conv.weight"])
    assert torch.equal(
        in_their_names["decode_head.linear_c.3.proj.weight"], tensors["decode_head.linear_c4.proj.weight"]
    )
    assert check_parity(imported.model, "huggingface", in_their_names, None).largest_difference < 1e-10
