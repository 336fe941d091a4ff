"""What tokens know of where they come from, after any path, against slow obvious references."""

import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from timm.layers import apply_rot_embed_cat

from poolshare.space import OPERATORS, Architecture, SearchSpace
from poolshare.supernet import Subnet, SuperNet
from poolshare.supernet.tokens import Carry, Tokens, grid_places, grid_sizes, grid_sources, merge

TINY = {"img_size": 128, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "depth": 4}
LEVELS = (64, 32, 16, 4)
DROPS = [name for name, operator in OPERATORS.items() if operator.drops]


def make(operators, sharing="qk", levels=LEVELS, **options):
    torch.manual_seed(0)
    net = SuperNet.from_timm(
        "vit_tiny_patch16_224", SearchSpace(4, levels, operators), sharing=sharing, **TINY, **options
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net.eval()


def images_for(count=3):
    return torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def outputs(model, images, carry=Carry.SOURCES):
    """Tokens after each block, with all the bookkeeping."""
    with torch.no_grad():
        return model._block_outputs(images, len(model.blocks), carry)


def paths(net, count):
    return [net.space.sample(random.Random(seed)) for seed in range(count)]


def test_a_grid_s_constants_equal_hand_arithmetic():
    # 4 × 4 patches as 2 × 2 cells: the first holds rows and columns 0 and 1, so its centre is (½, ½).
    assert grid_sizes(4, 16).tolist() == [4, 4, 4, 4]
    assert grid_places(4, 16).tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    assert grid_sources(4, 16).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    # 14 → 10: each cell covers 1.4 patches; the second begins at 1.4 and ends at 2.8 of edges, centre 2.1 - ½.
    assert grid_places(100, 196)[1].tolist() == pytest.approx([0.2, 1.6])
    assert grid_sizes(100, 196).sum() == pytest.approx(196)
    assert grid_sources(196, 196).tolist() == list(range(196))
    # A patch goes to the cell whose centre is nearest, as F.interpolate has it.
    for count in (1, 9, 25, 49, 100):
        side = int(count**0.5)
        cells = torch.arange(count, dtype=torch.float32).reshape(1, 1, side, side)
        nearest = F.interpolate(cells, (14, 14), mode="nearest-exact").flatten().long()
        assert torch.equal(grid_sources(count, 196), nearest)


def test_merging_all_tokens_of_a_cell_gives_the_cells_centre():
    whole = Tokens(torch.randn(2, 1 + 16, 8))
    holders = grid_sources(4, 16).expand(2, -1)
    cells = merge(whole, torch.randn(2, 1 + 4, 8), holders, 16, Carry.SOURCES)
    assert torch.equal(cells.places, grid_places(4, 16).expand(2, -1, -1))
    assert torch.equal(cells.sizes, grid_sizes(4, 16).expand(2, -1))
    assert torch.equal(cells.sources, holders)
    halves = merge(cells, torch.randn(2, 1 + 2, 8), torch.tensor([[0, 0, 0, 1]] * 2), 16, Carry.SOURCES)
    # The first holds the cells at (½, ½), (½, 2½) and (2½, ½): a mean of 3½/3, patches counted.
    torch.testing.assert_close(halves.places[0], torch.tensor([[3.5 / 3, 3.5 / 3], [2.5, 2.5]]))
    assert halves.sizes[0].tolist() == [12, 4]


@pytest.mark.parametrize("sharing", ["qk", "map"])
def test_sizes_sum_to_the_patches_and_are_counts_of_sources_after_any_path(sharing):
    net = make(tuple(OPERATORS), sharing)
    seen = set()
    for architecture in paths(net, 24):
        model, dropped = Subnet.from_supernet(net, architecture), False
        for layer, tokens in zip(architecture.layers, outputs(model, images_for()), strict=True):
            dropped = dropped or layer.operator in DROPS
            if tokens.sizes is None:
                assert int(layer.tokens**0.5) ** 2 == layer.tokens  # a grid, whose sizes are constants
                continue
            seen.add(layer.operator)
            assert tokens.sizes.shape == (3, layer.tokens)
            assert (tokens.sizes > 0).all()
            total = tokens.sizes.sum(dim=1)
            if dropped:
                assert (total < 64).all()
                continue
            torch.testing.assert_close(total, torch.full((3,), 64.0))
            if not any(OPERATORS[before.operator].keeps_grid for before in architecture.layers if before.operator):
                counts = torch.stack([row.bincount(minlength=layer.tokens) for row in tokens.sources])
                assert torch.equal(tokens.sizes, counts.float())
    assert len(seen) > 8


def test_places_are_means_over_the_patches_a_token_holds():
    net = make(("tome", "kmeans", "mstm", "max1d", "wkmedoids"))
    whole = grid_places(64, 64)
    for architecture in paths(net, 8):
        for tokens in outputs(Subnet.from_supernet(net, architecture), images_for()):
            if tokens.sizes is None:
                continue
            for image in range(3):
                for token in range(tokens.sizes.shape[1]):
                    held = whole[tokens.sources[image] == token]
                    torch.testing.assert_close(tokens.places[image, token], held.mean(dim=0))


@pytest.mark.parametrize("operator", DROPS)
def test_what_is_dropped_goes_to_the_nearest_that_is_left(operator):
    net = make(("tome", operator))
    before, after = outputs(
        Subnet.from_supernet(net, Architecture.parse(f"64 32@tome 16@{operator} 16")), images_for()
    )[1:3]
    for image in range(3):
        left = [tuple(place) for place in after.places[image].tolist()]
        kept = [i for i, place in enumerate(before.places[image].tolist()) if tuple(place) in left]
        for token in kept:  # its patches stay with it
            now = after.sources[image][before.sources[image] == token].unique()
            assert before.places[image, token].tolist() in after.places[image, now].tolist()
        distances = torch.cdist(before.places[image], after.places[image])
        chosen = distances.gather(
            1, torch.stack([after.sources[image][before.sources[image] == token][0] for token in range(32)])[:, None]
        )[:, 0]
        torch.testing.assert_close(chosen, distances.min(dim=1).values)


def test_bookkeeping_changes_no_feature_and_is_not_done_unasked():
    net = make(("max2d", "avg2d", "mstm", "evit", "topk"))
    assert net.carry == Carry.NOTHING
    for architecture in paths(net, 6):
        model = Subnet.from_supernet(net, architecture)
        bare, known = (outputs(model, images_for(), carry) for carry in (Carry.NOTHING, Carry.SOURCES))
        for plain, full in zip(bare, known, strict=True):
            assert plain[1:] == (None, None, None, False, None)
            assert torch.equal(plain.features, full.features)


# Maps of the full grid


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_patch_of_a_map_has_the_features_of_the_token_that_holds_it(operator):
    """Patches are followed by what is unique about them: which reduction sent them where, one after the other."""
    counts = (64, 32, 16) if "max1d" in operator else (64, 16, 4)
    net = make((operator,), levels=counts)
    architecture = Architecture.parse(f"64 {counts[1]}@{operator} {counts[2]}@{operator} {counts[2]}")
    model, images = Subnet.from_supernet(net, architecture), images_for()
    holders = []  # of each reduction, (B, P)

    def recorded(module, patches, *others):
        reduced, which = type(module)._reduce(module, patches, *others)
        holders.append(which)
        return reduced, which

    for pooling in model.poolings.values():
        pooling._reduce = functools.partial(recorded, pooling)
    with torch.no_grad():
        maps = model.forward_intermediates(images, norm=True, intermediates_only=True)
        tokens = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)
    for image in range(3):
        where = list(range(64))  # the token that holds each patch
        centres = [(float(p // 8), float(p % 8)) for p in range(64)]
        for layer, (grid, sequence) in enumerate(zip(maps, tokens, strict=True)):
            if architecture.layers[layer].operator:
                which, after = holders[layer - 1], sequence.shape[1]
                if which is None:  # a cell of the grid
                    where = [
                        patch // 8 * int(after**0.5) // 8 * int(after**0.5) + patch % 8 * int(after**0.5) // 8
                        for patch in range(64)
                    ]
                elif operator in DROPS:
                    kept = which[image].tolist()
                    left = [centres[token] for token in kept]
                    to = [min(range(after), key=lambda k, c=c, left=left: (math.dist(c, left[k]), k)) for c in centres]
                    where, centres = [to[token] for token in where], left
                else:
                    where = [which[image, token].item() for token in where]
            expected = sequence[image][where].T.reshape(32, 8, 8)
            assert torch.equal(grid[image], expected)


def test_bilinear_maps_interpolate_between_the_centres_of_cells_and_nowhere_else():
    net = make(("avg2d", "tome"), levels=(64, 16, 8))
    model, images = Subnet.from_supernet(net, Architecture.parse("64 16@avg2d 8@tome 8")), images_for()
    with torch.no_grad():
        _, cells, merged, _ = model.forward_intermediates(images, intermediates_only=True, maps="bilinear")
        reduced = model.forward_intermediates(images, [1], intermediates_only=True, maps="reduced")[0]
        nearest = model.forward_intermediates(images, [2], intermediates_only=True)[0]
    assert torch.equal(merged, nearest)
    # Row 1 of 8 lies at (1 + ½)/2 - ½ = ¼ of 4: three quarters of row 0 and a quarter of row 1; row 0 beyond the first.
    torch.testing.assert_close(cells[:, :, 1, 0], 0.75 * reduced[:, :, 0, 0] + 0.25 * reduced[:, :, 1, 0])
    torch.testing.assert_close(cells[:, :, 0, 0], reduced[:, :, 0, 0])


# ToMe over several layers, from the paper


def slow_merge(tokens, keys, sizes, merges):
    """Bipartite soft matching (arXiv 2210.09461, appendix D) of one image, prefix tokens set aside."""
    A, B = range(0, len(tokens), 2), range(1, len(tokens), 2)
    scores = {a: max((F.cosine_similarity(keys[a], keys[b], dim=0).item(), -b) for b in B) for a in A}
    merged = sorted(A, key=lambda a: -scores[a][0])[:merges]
    groups = {i: [i] for i in range(len(tokens)) if i not in merged}
    for a in merged:
        groups[-scores[a][1]].append(a)
    new = [sum(sizes[i] * tokens[i] for i in group) / sum(sizes[i] for i in group) for group in groups.values()]
    return torch.stack(new), torch.stack([sum(sizes[i] for i in group) for group in groups.values()])


def slow_tome(model, image, levels, proportional):
    """The whole network on one image: softmax(QKᵀ/√d + log size)·V in every block, merging by the last block's keys."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    sizes, keys = torch.ones(len(x)), None
    for block, level in zip(model.blocks, levels, strict=True):
        if len(x) - 1 > level:
            patches, held = slow_merge(x[1:], keys[1:], sizes[1:], len(x) - 1 - level)
            x, sizes = torch.cat([x[:1], patches]), torch.cat([sizes[:1], held])
        heads, normed = block.attn.num_heads, block.norm1(x)
        q, k, v = block.attn.qkv(normed).reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + (sizes.log() if proportional else 0)
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
        keys = k.mean(dim=0)
    return model.forward_head(model.norm(x[None]))[0], sizes


@pytest.mark.parametrize("operator", ["tome", "tome_prop"])
@pytest.mark.parametrize("sharing", ["qk", "map"])
def test_tome_over_several_layers_equals_the_paper(operator, sharing):
    levels = (64, 50, 38, 20)
    net = make((operator,), sharing, levels).double()
    architecture = Architecture.parse(f"64 50@{operator} 38@{operator} 20@{operator}")
    model, images = Subnet.from_supernet(net, architecture), images_for().double()
    with torch.no_grad():
        found, final = model(images), outputs(model, images)[-1]
        for image, logits, sizes in zip(images, found, final.sizes, strict=True):
            expected, counted = slow_tome(net, image, levels, operator == "tome_prop")
            torch.testing.assert_close(logits, expected)
            assert sizes.tolist() == counted[1:].tolist()
    assert (final.sizes > 1).any()


def slow_rotary_tome(model, image, levels):
    """A DINOv3 on one image: each token's queries and keys are turned by the mean place of the patches it stands for."""
    prefix, x = model.num_prefix_tokens, model.embed(image[None]).features[0]
    places = torch.tensor([[patch // 8, patch % 8] for patch in range(64)], dtype=x.dtype)
    sizes, keys = torch.ones(64), None
    for block, level in zip(model.blocks, levels, strict=True):
        if len(places) > level:
            held = torch.cat([x[prefix:], places], dim=1)  # what is merged with the tokens is weighted like them
            held, sizes = slow_merge(held, keys[prefix:], sizes, len(places) - level)
            x, places = torch.cat([x[:prefix], held[:, :-2]]), held[:, -2:]
        heads, normed = block.attn.num_heads, block.norm1(x)
        q, k, v = block.attn.qkv(normed).reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        turn = torch.cat(model.rope._get_pos_embed_from_coords((2 * places + 1) / 8 - 1), dim=-1)
        q, k = (torch.cat([t[:, :prefix], apply_rot_embed_cat(t[:, prefix:], turn, half=True)], 1) for t in (q, k))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        x = x + block.gamma_1 * block.attn.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
        keys = k.mean(dim=0)
    return model.forward_head(model.norm(x[None]))[0]


def test_tome_of_a_rotary_model_turns_merged_tokens_by_the_means_of_their_places():
    space = SearchSpace(4, (64, 50, 38, 20), ("tome",))
    net = randomise(SuperNet.from_timm("vit_small_patch16_dinov3", space, **TINY)).eval().double()
    model = Subnet.from_supernet(net, Architecture.parse("64 50@tome 38@tome 20@tome"))
    images = images_for().double()
    with torch.no_grad():
        for image, logits in zip(images, model(images), strict=True):
            expected = slow_rotary_tome(net, image, space.levels)
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharing", ["qk", "map"])
@pytest.mark.usefixtures("kernel")
def test_followers_and_what_comes_after_attend_in_proportion_too(sharing):
    """With all sizes one it is plain attention; with others, repeating each patch token as often as it stands for."""
    net = make(("tome_prop",), sharing)
    texts = ("64 32@tome_prop*2 32", "64 32@tome_prop 32*2", "64 32@tome_prop 16@tome_prop*2")
    population = [Architecture.parse(text) for text in texts]
    images = images_for()
    with torch.no_grad():
        for architecture, logits in zip(population, net(images, population), strict=True):
            assert torch.equal(net(images, [architecture])[0], logits)
            model = Subnet.from_supernet(net, architecture)
            assert torch.equal(model(images), logits)
        sizes = torch.randint(1, 5, (1, 16), generator=torch.Generator().manual_seed(0))
        patches = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))
        prefix, followed, path = torch.randn(1, 1, 32), Architecture.parse(texts[0]).layers[2], []
        repeated = patches[0].repeat_interleave(sizes[0], dim=0)[None]
        for tokens in (
            Tokens(torch.cat([prefix, patches], 1), sizes.float(), proportional=True),
            Tokens(torch.cat([prefix, repeated], 1)),
        ):
            leave, used = sharing, None
            for layer in (followed._replace(shared=False), followed):
                tokens, used = net.run_layer(1, layer, tokens, used, leave)
            path.append(tokens.features[:, 1:])
    torch.testing.assert_close(path[0].repeat_interleave(sizes[0], dim=1), path[1], rtol=1e-4, atol=1e-5)
