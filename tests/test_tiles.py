"""Which tile and which implementation runs where: tables and rules, no GPU needed."""

import json
from types import SimpleNamespace

import pytest
import torch

from segdeformer.kernels import impl as impl_module
from segdeformer.kernels import tiles
from segdeformer.kernels.attention import attention, attention_reference
from segdeformer.kernels.choices import Choice, Kind, forget_choices
from segdeformer.kernels.impl import check_impl, choose_impl, describe_impl
from segdeformer.kernels.tiles import ARCHITECTURES, Tile, choose_tile, default_tile, split_width

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("width", "panels"),
    [
        *[(1, (16, 0)), (16, (16, 0)), (19, (32, 0)), (33, (32, 16)), (150, (128, 32)), (160, (128, 32))],
        *[(171, (128, 64)), (200, (256, 0)), (256, (256, 0)), (257, (256, 16)), (512, (512, 0))],
    ],
)
def test_widths_are_split_into_the_least_two_powers_of_two(width, panels):
    assert split_width(width) == panels


def fake_gpu(monkeypatch, *, name="NVIDIA H200", shared_kb=227, major=9):
    properties = SimpleNamespace(
        name=name, shared_memory_per_block_optin=shared_kb * 1024, major=major, minor=5
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)


@pytest.mark.parametrize(
    ("shared_kb", "major", "expected"),
    [
        (227, 9, "sm_90"),
        (227, 10, "sm_100"),
        (163, 8, "sm_80"),
        (99, 8, "sm_86"),
        (99, 12, "sm_86"),  # consumer Blackwell has the memory of consumer Ampere
    ],
)
def test_an_unknown_card_gets_tiles_that_fit_its_shared_memory(monkeypatch, shared_kb, major, expected):
    fake_gpu(monkeypatch, shared_kb=shared_kb, major=major)
    assert tiles.architecture_of(GPU).name == expected
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert tiles.architecture_of(GPU).name == "gfx942"


def test_a_card_without_matrix_instructions_in_triton_is_refused(monkeypatch):
    fake_gpu(monkeypatch, name="Tesla T4", shared_kb=64, major=7)
    with pytest.raises(ValueError, match=r"compute capability 8.0 or newer, Tesla T4 has 7.5.*--impl sdpa"):
        tiles.architecture_of(GPU)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda card: card.name)
def test_there_is_a_default_tile_for_every_width(architecture):
    for kernel in ("attention_forward", "attention_forward_few_keys", "external_backward_keys"):
        for width in (16, 48, 150, 192, 256, 272, 512):
            for element_bytes in (2, 4):
                tile = default_tile(kernel, width, 16, element_bytes, architecture)
                assert tile == default_tile(kernel, 16, width, element_bytes, architecture)
                assert tile.block_queries >= 16
                assert tile.block_keys >= (0 if kernel.endswith("few_keys") else 16)
    # Also where only half precision has a tile of its own.
    for kernel, widths in json.loads((tiles.TUNED / "defaults.json").read_text())[architecture.name].items():
        for place in widths:
            for element_bytes in (2, 4):
                assert default_tile(kernel, *map(int, place.split("x")), element_bytes, architecture)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A GPU on which something was measured."""
    fake_gpu(monkeypatch)
    comparisons = [
        Choice("attention", 256, 150, 2, False, 64 * 64, 1.0, 2.0),
        Choice("attention", 256, 256, 2, True, 64 * 64, 3.0, 2.0),
        Choice("external_attention", 150, 150, 2, True, 64 * 64, 1.0, 5.0),
    ]
    table = {
        "architecture": "sm_90",
        "tiles": {"attention_forward": {"256x160": {"2": [128, 64, 4, 2, True, True]}}},
        "backward": {"256x256": {"2": "chunks"}},
        "choices": [comparison.row() for comparison in comparisons],
    }
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    (tmp_path / "defaults.json").write_text(
        (tiles.Path(tiles.__file__).parent / "tuned/defaults.json").read_text()
    )
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(table))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget_choices()
    yield tmp_path
    forget_choices()


def test_a_measured_tile_comes_before_the_default_one_and_the_users_before_ours(measured):
    assert choose_tile("attention_forward", 256, 160, 2, GPU) == Tile(128, 64, 4, 2, True, True)
    default = default_tile("attention_forward", 256, 256, 2, ARCHITECTURES["sm_90"])
    assert choose_tile("attention_forward", 256, 256, 2, GPU) == default
    queries = SimpleNamespace(shape=(1, 8, 256), device=GPU, element_size=lambda: 2)
    assert tiles.backward_form(queries, queries) == "chunks"
    own = measured / "cache/segdeformer/tuned"
    own.mkdir(parents=True)
    (own / "nvidia_h200.json").write_text(
        json.dumps({"tiles": {"attention_forward": {"256x160": {"2": [64, 64, 4, 2]}}}})
    )
    tiles.forget_tables()
    assert choose_tile("attention_forward", 256, 160, 2, GPU) == Tile(64, 64, 4, 2)


def stand_in(width, device=GPU, dtype=torch.bfloat16):
    return SimpleNamespace(
        shape=(1, 64, width), device=device, dtype=dtype, element_size=lambda: dtype.itemsize
    )


@pytest.mark.parametrize(
    ("operation", "width", "value_width", "training", "expected"),
    [
        ("attention", 256, 150, False, "triton"),
        ("attention", 256, 160, False, "triton"),  # the same after padding
        ("attention", 256, 150, True, "sdpa"),  # not measured
        ("attention", 256, 256, True, "sdpa"),  # measured slower
        ("external_attention", 150, 150, True, "triton"),
        ("external_attention", 700, 700, True, "sdpa"),  # no kernel takes it
    ],
)
def test_auto_takes_on_a_gpu_what_was_measured_faster(
    measured, operation, width, value_width, training, expected
):
    with torch.set_grad_enabled(training):
        q, v = stand_in(width), stand_in(value_width)
        assert choose_impl("auto", q, q, v, operation=operation) == expected
    words = "auto (as measured on NVIDIA H200: triton in 2 of 3 cases, else PyTorch)"
    assert describe_impl("auto", GPU) == words


def test_a_compiled_graph_takes_the_choice_without_looking_into_files(measured):
    def chosen(x):
        faster = impl_module._faster_on_gpu("cuda:0", Kind("attention", 256, 150, 2, False), 64 * 64)
        return x + 1 if faster else x - 1

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_auto_says_that_nothing_was_measured(measured, monkeypatch):
    fake_gpu(monkeypatch, name="Some Card")
    q = stand_in(256)
    assert choose_impl("auto", q, q, q) == "sdpa"
    assert describe_impl("auto", GPU) == (
        "auto (sdpa: nothing measured on Some Card yet; `segdeformer bench --tune` does)"
    )


def test_a_damaged_tile_file_is_named(measured):
    (measured / "nvidia_h200.json").write_text("{")
    tiles.forget_tables()
    with pytest.raises(ValueError, match=r"nvidia_h200.json is not valid JSON .*delete it"):
        choose_tile("attention_forward", 256, 160, 2, GPU)


def test_on_a_cpu_the_choice_follows_size_type_and_gradients():
    small, large = torch.zeros(1, 8, 4), torch.zeros(1, 2048, 4)
    for name in ("triton", "sdpa", "blocks", "reference"):
        assert choose_impl(name, large, large, large) == name
    assert choose_impl("auto", large, large, large) == "sdpa"  # gradients may be wanted
    with torch.inference_mode():
        assert choose_impl("auto", large, large, large) == "blocks"
        assert choose_impl("auto", small, large, large) == "sdpa"
        doubles = large.double()
        assert choose_impl("auto", doubles, doubles, doubles) == "sdpa"


def test_a_name_that_cannot_run_is_refused_with_what_can(monkeypatch):
    with pytest.raises(ValueError, match="impl is `cuda`; expected one of auto, triton, sdpa"):
        check_impl("cuda")
    with pytest.raises(ValueError, match="impl is `cuda`"):
        attention(*(torch.zeros(1, 2, 3),) * 3, scale=1.0, impl="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fake_gpu(monkeypatch)
    assert check_impl("triton", GPU) == check_impl("triton") == "triton"
    with pytest.raises(ValueError, match="needs a GPU, the device is cpu; use auto, sdpa, blocks"):
        check_impl("triton", torch.device("cpu"))
    monkeypatch.setattr(impl_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs Triton, which is not installed"):
        check_impl("triton")


@pytest.mark.parametrize(("d", "e"), [(19, 40), (40, 19), (16, 16)])
def test_unequal_widths_reach_sdpa_padded(monkeypatch, d, e):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: seen.append((q.shape[-1], v.shape[-1])) or original(q, k, v, **options),
    )
    q, k, v = torch.randn(1, 9, d), torch.randn(1, 11, d), torch.randn(1, 11, e)
    out = attention(q, k, v, scale=0.3, impl="sdpa")
    torch.testing.assert_close(out, attention_reference(q, k, v, scale=0.3))
    assert seen == [(max(d, e), max(d, e))]
