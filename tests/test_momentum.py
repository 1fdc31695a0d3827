"""Momentum tokens: class means by hand, the running mean, one result for any split of the batch."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ValidationError
from torch import multiprocessing

from segdeformer.config import (
    ContextConfig,
    EncoderConfig,
    ExternalConfig,
    InternalConfig,
    MLPFusionConfig,
    ModelConfig,
    load_recipe,
    parse_recipe,
    recipe_toml,
)
from segdeformer.data.built_in import SyntheticDataset
from segdeformer.errors import UsageError
from segdeformer.models.momentum import ClassSums, MomentumTokens, class_sums, summed_over_processes
from segdeformer.models.segmenter import build_decoder
from segdeformer.weights.build import build_model
from segdeformer.weights.checkpoint import load, save_checkpoint

K, C, IGNORED = 6, 5, 255
SHARE = 0.25


def batch(images=3, height=7, width=9, size=(33, 50), seed=0):
    """A map, and labels of another size whose ratio to it is no whole number; class 4 is absent."""
    generator = torch.Generator().manual_seed(seed)
    map_BChw = torch.randn(images, C, height, width, generator=generator)
    labels_BHW = torch.randint(0, K, (images, *size), generator=generator)
    labels_BHW[labels_BHW == 4] = IGNORED
    return map_BChw, labels_BHW


def sums_of(map_BChw, labels_BHW):
    return class_sums(map_BChw, labels_BHW, num_classes=K, ignore_index=IGNORED)


def means_by_hand(map_BChw, labels_BHW, num_classes=K):
    """{class: float64 mean}, pixel by pixel."""
    images, _, height, width = map_BChw.shape
    pixels = {}
    for b in range(images):
        for i in range(height):
            for j in range(width):
                row, column = i * labels_BHW.shape[1] // height, j * labels_BHW.shape[2] // width
                pixels.setdefault(int(labels_BHW[b, row, column]), []).append(map_BChw[b, :, i, j].double())
    pixels.pop(IGNORED, None)
    return {k: torch.stack(found).mean(0) for k, found in pixels.items() if k < num_classes}


def test_first_update_gives_the_class_means_computed_by_hand_and_leaves_absent_classes():
    torch.manual_seed(0)
    tokens, (map_BChw, labels_BHW) = MomentumTokens(K, C, momentum=SHARE).double(), batch()
    before = tokens.tokens_KC.clone()
    tokens.update(sums_of(map_BChw, labels_BHW))
    expected = means_by_hand(map_BChw, labels_BHW)
    assert sorted(expected) == [0, 1, 2, 3, 5]
    for k, mean in expected.items():
        torch.testing.assert_close(tokens.tokens_KC[k], mean, atol=1e-14, rtol=1e-14)
    assert torch.equal(tokens.tokens_KC[4], before[4])
    assert tokens.seen_K.tolist() == [True, True, True, True, False, True]


def test_later_updates_follow_the_momentum_formula_and_a_new_class_takes_its_mean():
    torch.manual_seed(0)
    tokens = MomentumTokens(K, C, momentum=SHARE).double()
    first, second = batch(seed=1), batch(seed=2)
    second[1][second[1] == 2] = 4  # class 2 is absent now, class 4 new
    tokens.update(sums_of(*first))
    tokens.update(sums_of(*second))
    old, new = means_by_hand(*first), means_by_hand(*second)
    for k in (0, 1, 3, 5):
        expected = (1 - SHARE) * old[k] + SHARE * new[k]
        torch.testing.assert_close(tokens.tokens_KC[k], expected, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(tokens.tokens_KC[2], old[2], atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(tokens.tokens_KC[4], new[4], atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("size", [(7, 9), (8, 11), (28, 36), (65, 97), (5, 4)])
def test_labels_are_taken_as_pytorchs_nearest_interpolation_does(size):
    map_BChw, labels_BHW = batch(size=size)
    resized = F.interpolate(labels_BHW[:, None].double(), (7, 9), mode="nearest")[:, 0].long()
    expected = sums_of(map_BChw, resized)
    ours = sums_of(map_BChw, labels_BHW.to(torch.uint8))
    assert torch.equal(ours.counts_K, expected.counts_K)
    assert torch.equal(ours.sums_KC, expected.sums_KC)


def test_sums_leave_out_ignored_and_impossible_labels_and_may_be_empty():
    map_BChw, labels_BHW = batch()
    impossible = labels_BHW.clone()
    impossible[labels_BHW == 3] = -1
    impossible[labels_BHW == 5] = K
    ours = sums_of(map_BChw, impossible)
    assert torch.equal(ours.counts_K > 0, torch.tensor([True, True, True, False, False, False]))
    assert torch.equal(ours.sums_KC[:3], sums_of(map_BChw, labels_BHW).sums_KC[:3])
    tokens = MomentumTokens(K, C, momentum=1.0)
    before = tokens.tokens_KC.clone()
    tokens.update(sums_of(map_BChw, torch.full_like(labels_BHW, IGNORED)))
    assert torch.equal(tokens.tokens_KC, before)
    assert not tokens.seen_K.any()


def test_sums_of_micro_batches_add_up_to_those_of_the_whole_batch():
    map_BChw, labels_BHW = batch()
    whole = sums_of(map_BChw, labels_BHW)
    parts = [sums_of(m[None], y[None]) for m, y in zip(map_BChw, labels_BHW, strict=True)]
    added = parts[0].plus(parts[1]).plus(parts[2])
    assert torch.equal(added.counts_K, whole.counts_K)
    torch.testing.assert_close(added.sums_KC, whole.sums_KC, atol=1e-13, rtol=1e-13)
    assert summed_over_processes(whole) is whole  # no processes but this


def tokens_of_process(rank, rendezvous):
    """Two steps, of which this process sees its own images only: rank 0 two of three, rank 1 the third."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        tokens = MomentumTokens(K, C, momentum=SHARE)
        mine = slice(0, 2) if rank == 0 else slice(2, 3)
        for seed in (1, 2):
            map_BChw, labels_BHW = batch(seed=seed)
            labels_BHW[2][labels_BHW[2] == 5] = IGNORED  # rank 1 has no class 5
            tokens.update(summed_over_processes(sums_of(map_BChw[mine], labels_BHW[mine])))
        return tokens.tokens_KC
    finally:
        dist.destroy_process_group()


def send_tokens(rank, rendezvous, results):
    results.put(tokens_of_process(rank, rendezvous).numpy())


def test_two_processes_give_the_tokens_of_one_with_the_joined_batch(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    other = context.Process(target=send_tokens, args=(1, tmp_path / "rendezvous", results))
    other.start()
    try:
        ours = tokens_of_process(0, tmp_path / "rendezvous")
        theirs = torch.from_numpy(results.get(timeout=60))
    finally:
        other.join()
    torch.manual_seed(0)
    joined = MomentumTokens(K, C, momentum=SHARE)
    for seed in (1, 2):
        map_BChw, labels_BHW = batch(seed=seed)
        labels_BHW[2][labels_BHW[2] == 5] = IGNORED
        joined.update(sums_of(map_BChw, labels_BHW))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, joined.tokens_KC, atol=1e-7, rtol=1e-6)


# In the model.

EXTERNAL = ExternalConfig(tokens="momentum", momentum=SHARE, decouple=False)
CONTEXTS = {
    "as Table 5": ContextConfig(external=EXTERNAL),
    "both, reduced": ContextConfig(reduction=2, internal=InternalConfig(), external=EXTERNAL),
    "without Y_ext": ContextConfig(external=EXTERNAL.model_copy(update={"second_stage": False})),
    "released style": ContextConfig(projection="conv_bn_relu", external=EXTERNAL),
}
CHANNELS = (3, 4, 5, 6)


def maps():
    return [torch.randn(2, c, n, n + 2) for c, n in zip(CHANNELS, (17, 9, 5, 3), strict=True)]


def model_config(context):
    return ModelConfig(
        num_classes=4,
        encoder=EncoderConfig(name="mit_nano"),
        fusion=MLPFusionConfig(width=16),
        context=context,
    )


@pytest.mark.parametrize("name", CONTEXTS)
def test_tokens_of_a_trained_decoder_are_the_means_of_its_fused_map(name):
    torch.manual_seed(0)
    decoder = build_decoder(model_config(CONTEXTS[name]), CHANNELS).train()
    tokens, seen = decoder.momentum_tokens, []
    decoder.fusion.register_forward_hook(lambda _, inputs, fused: seen.append(fused.as_map()))
    labels = torch.randint(0, 3, (2, 68, 76))  # class 3 is absent
    labels[torch.rand(labels.shape) < 0.2] = IGNORED
    output = decoder(maps())
    used = tokens.tokens_KC.clone()
    sums = class_sums(output.fused_BChw, labels, num_classes=4, ignore_index=IGNORED)
    small = F.interpolate(output.logits_BKhw, labels.shape[1:], mode="bilinear")
    loss = F.cross_entropy(small, labels, ignore_index=IGNORED)
    if output.class_logits_BKhw is not None:
        up = F.interpolate(output.class_logits_BKhw, labels.shape[1:], mode="bilinear")
        loss = loss + F.cross_entropy(up, labels, ignore_index=IGNORED)
    loss.backward()
    assert torch.equal(tokens.tokens_KC, used)  # a forward pass changes nothing
    tokens.update(sums)
    for k, mean in means_by_hand(seen[0].detach(), labels).items():
        torch.testing.assert_close(tokens.tokens_KC[k].double(), mean, atol=1e-6, rtol=1e-6)
    assert torch.equal(tokens.tokens_KC[3], used[3])
    assert not output.fused_BChw.requires_grad
    assert not list(tokens.parameters()) and tokens.tokens_KC.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_fused_map_is_handed_out_only_where_tokens_are_averaged():
    decoder = build_decoder(model_config(CONTEXTS["as Table 5"]), CHANNELS)
    assert decoder.train()(maps()).fused_BChw.shape == (2, 16, 17, 19)
    assert decoder.eval()(maps()).fused_BChw is None
    learned = build_decoder(model_config(ContextConfig(external=ExternalConfig())), CHANNELS)
    assert learned.train()(maps()).fused_BChw is None
    assert learned.momentum_tokens is None
    assert build_decoder(model_config(None), CHANNELS).momentum_tokens is None


def trained(context):
    """A model whose tokens and norms have seen one batch."""
    torch.manual_seed(0)
    model = build_model(model_config(context)).train()
    output = model(torch.randn(2, 3, 64, 64))
    labels = torch.randint(0, 4, (2, 64, 64))
    model.momentum_tokens.update(class_sums(output.fused_BChw, labels, num_classes=4, ignore_index=IGNORED))
    return model.eval()


@pytest.mark.parametrize("name", [n for n in CONTEXTS if n != "released style"])
def test_folded_model_gives_the_same_logits(name):
    model = trained(CONTEXTS[name]).double()
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        expected, ours = model(images), model.fold()(images)
    assert model.fold().momentum_tokens is None
    torch.testing.assert_close(ours.logits_BKhw, expected.logits_BKhw, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("fold", [False, True])
def test_checkpoint_keeps_tokens_and_which_were_seen(fold, tmp_path):
    model = trained(CONTEXTS["as Table 5"])
    model.momentum_tokens.seen_K[2] = False
    recipe = load_recipe("synthetic")
    recipe = recipe.model_copy(update={"model": model_config(CONTEXTS["as Table 5"])})
    classes = SyntheticDataset("val").classes
    file = tmp_path / "last.safetensors"
    save_checkpoint(file, model, recipe=recipe, classes=classes, iteration=1, best_miou=None)
    loaded = load(file, fold=fold or None)
    assert loaded.checkpoint.recipe == recipe
    images = torch.randn(1, 3, 33, 50)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images).logits_BKhw, model(images).logits_BKhw)
    if not fold:
        assert torch.equal(loaded.model.momentum_tokens.tokens_KC, model.momentum_tokens.tokens_KC)
        assert loaded.model.momentum_tokens.seen_K.tolist() == [True, True, False, True]


def test_training_forward_compiles_as_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    decoder = build_decoder(model_config(CONTEXTS["both, reduced"]), CHANNELS).train()
    decoder.head.dropout.p = 0.0
    given = maps()
    ours, expected = torch.compile(decoder, fullgraph=True, backend="eager")(given), decoder(given)
    torch.testing.assert_close(ours.fused_BChw, expected.fused_BChw)
    torch.testing.assert_close(ours.logits_BKhw, expected.logits_BKhw)


# In the recipe.


def test_momentum_has_a_default_that_the_resolved_recipe_writes_out():
    recipe = load_recipe("synthetic")
    external = ExternalConfig(tokens="momentum", decouple=False)
    assert external.momentum == 0.1
    model = recipe.model.model_copy(update={"context": ContextConfig(external=external)})
    recipe = recipe.model_copy(update={"model": model})
    text = recipe_toml(recipe)
    assert 'tokens = "momentum"\nmomentum = 0.1\n' in text
    assert parse_recipe(text, "resolved") == recipe
    assert "momentum" not in recipe_toml(load_recipe("synthetic"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ('tokens = "momentum"', "`decouple` is true, but momentum tokens are one table of class means"),
        ("momentum = 0.5", '`momentum` is 0.5, but tokens are "learned"; leave it out'),
        ('tokens = "momentum"\ndecouple = false\nmomentum = 0.0', "greater than 0; got 0.0"),
        ('tokens = "momentum"\ndecouple = false\nmomentum = 1.5', "less than or equal to 1; got 1.5"),
        ('tokens = "median"', "'learned' or 'momentum'; got 'median'"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused_in_one_line(changes, told):
    text = recipe_toml(load_recipe("synthetic"))
    head, _, _ = text.partition("[model.context.external]")
    _, _, tail = text.partition("[model.head]")
    with pytest.raises(UsageError) as refusal:
        parse_recipe(f"{head}[model.context.external]\n{changes}\n[model.head]{tail}", "mine.toml")
    assert "`model.context.external" in str(refusal.value)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_momentum_of_exactly_one_forgets_the_old_mean_and_is_allowed():
    tokens = MomentumTokens(
        2, 1, momentum=ExternalConfig(tokens="momentum", momentum=1.0, decouple=False).momentum
    )
    for value in (3.0, -2.0):
        tokens.update(ClassSums(torch.tensor([[value], [0.0]], dtype=torch.float64), torch.tensor([1, 0])))
    assert tokens.tokens_KC[0].item() == -2.0
    with pytest.raises(ValidationError):
        ExternalConfig(tokens="momentum", momentum=float("nan"), decouple=False)
