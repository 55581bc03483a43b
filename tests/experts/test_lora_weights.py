"""Low-rank factors in memory: they are the adapter's own update, alone and beside others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from polymath.experts import read_adapter
from polymath.experts.lora_weights import PANEL, LoraWeights, Site, join, read_weights

QKV = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
SITES = (
    *(
        Site(f"{name}.qkv", "qkv", tuple(f"{name}.{part}_proj" for part in "qkv"), 6, (8, 4, 4))
        for name in QKV
    ),
    Site("model.layers.0.down", "down", ("model.layers.0.mlp.down_proj",), 10, (6,)),
)
FEATURES = {
    module: (outputs, site.inputs)
    for site in SITES
    for module, outputs in zip(site.modules, site.outputs, strict=True)
}
BASE = {f"{module}.weight": shape for module, shape in FEATURES.items()}
CPU = torch.device("cpu")

Ranks = dict[str, int]
ranks_of_modules = (
    st.fixed_dictionaries({module: st.integers(0, 3) for module in FEATURES})
    .map(lambda ranks: {module: rank for module, rank in ranks.items() if rank})
    .filter(bool)
)


class Written:
    """An adapter of small whole numbers, whose sums float32 holds exactly in any order."""

    def __init__(self, folder: Path, ranks: Ranks, alpha: float = 2.0, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.folder = folder
        self.factors = {
            module: (
                _whole(draw, rank, FEATURES[module][1]),
                _whole(draw, FEATURES[module][0], rank),
            )
            for module, rank in ranks.items()
        }
        self.scales = {module: alpha / rank for module, rank in ranks.items()}
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": alpha,
            "rank_pattern": {module: rank for module, rank in ranks.items() if rank != 1},
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {
            f"base_model.model.{module}.lora_{factor}.weight": tensor
            for module, pair in self.factors.items()
            for factor, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, folder / "adapter_model.safetensors")

    def update(self, site: Site, inputs: Tensor) -> Tensor:
        """scale B (A x) of every module of a site, computed one by one."""
        return torch.cat(
            [
                self.scales[module]
                * (inputs @ self.factors[module][0].T)
                @ self.factors[module][1].T
                if module in self.factors
                else torch.zeros(len(inputs), outputs)
                for module, outputs in zip(site.modules, site.outputs, strict=True)
            ],
            1,
        )

    def read(self, name: str = "expert", dtype: torch.dtype = torch.float32) -> LoraWeights:
        return read_weights(name, read_adapter(self.folder, BASE), SITES, dtype, CPU)


def _whole(draw: torch.Generator, *size: int) -> Tensor:
    return torch.randint(-4, 5, size, generator=draw).float()


def inputs_of(site: Site, rows: int = 4) -> Tensor:
    return _whole(torch.Generator().manual_seed(1), rows, site.inputs)


def applied(
    down: Mapping[str, Tensor], up: Mapping[str, Tensor], site: Site, inputs: Tensor
) -> Tensor:
    if site.name not in down:
        return torch.zeros(len(inputs), sum(site.outputs))
    return inputs @ down[site.name].T @ up[site.name]


def bare(name: str, **widths: int) -> LoraWeights:
    """An adapter of so many columns that changes nothing."""
    return LoraWeights(name, widths, {}, {})


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Written]:
    def write_one(name: str, ranks: Ranks, alpha: float = 2.0, seed: int = 0) -> Written:
        return Written(tmp_path / name, ranks, alpha, seed)

    return write_one


@given(ranks=ranks_of_modules, alpha=st.sampled_from([0.5, 3.0, 6.0]), seed=st.integers(0, 99))
def test_the_factors_of_a_site_give_the_updates_of_its_modules(
    tmp_path_factory: pytest.TempPathFactory, ranks: Ranks, alpha: float, seed: int
) -> None:
    written = Written(tmp_path_factory.mktemp("adapter"), ranks, alpha, seed)
    weights = written.read()
    for site in SITES:
        inputs = inputs_of(site)
        found = applied(weights.down, weights.up, site, inputs)
        assert torch.allclose(found, written.update(site, inputs), rtol=1e-6, atol=1e-4)


@given(ranks_of_modules)
def test_sites_of_a_group_have_as_many_columns_as_the_widest_needs(
    tmp_path_factory: pytest.TempPathFactory, ranks: Ranks
) -> None:
    weights = Written(tmp_path_factory.mktemp("adapter"), ranks).read()
    needed = [(site, sum(ranks.get(module, 0) for module in site.modules)) for site in SITES]
    assert weights.widths == {
        group: max(width for site, width in needed if site.group == group)
        for group in ("qkv", "down")
    }
    for site, width in needed:
        assert (site.name in weights.down) == (site.name in weights.up) == (width > 0)
        if width:
            columns = weights.widths[site.group]
            assert weights.down[site.name].shape == (columns, site.inputs)
            assert weights.up[site.name].shape == (columns, sum(site.outputs))


def test_an_adapter_has_a_scale_for_each_module(write: Callable[..., Written]) -> None:
    """alpha / r with another r for each module: 4 / 1 for the query, 4 / 2 for the value."""
    query, _, value = SITES[0].modules
    written = write("expert", {query: 1, value: 2}, alpha=4.0)
    weights = written.read()
    _, b = written.factors[query]
    assert torch.equal(weights.up[SITES[0].name][:1, :8], 4 * b.T)
    _, b = written.factors[value]
    assert torch.equal(weights.up[SITES[0].name][1:3, 12:], 2 * b.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_have_the_dtype_of_the_network(
    write: Callable[..., Written], dtype: torch.dtype
) -> None:
    written = write("expert", dict.fromkeys(FEATURES, 2))
    weights = written.read(dtype=dtype)
    for tensor in (*weights.down.values(), *weights.up.values()):
        assert tensor.dtype == dtype
    assert torch.equal(weights.down[SITES[2].name].float(), written.read().down[SITES[2].name])


def test_the_scale_is_applied_before_rounding(write: Callable[..., Written]) -> None:
    """B times the scale is rounded once; B rounded and then scaled would be rounded twice."""
    [module] = SITES[2].modules
    written = write("expert", {module: 3}, alpha=0.7)
    up = written.read(dtype=torch.bfloat16).up[SITES[2].name]
    assert torch.equal(up, (written.scales[module] * written.factors[module][1].T).bfloat16())


@given(
    members=st.lists(ranks_of_modules, min_size=1, max_size=4),
    rows=st.lists(st.integers(-1, 3), min_size=1, max_size=6),
)
def test_each_row_of_a_batch_gets_its_own_update_exactly(
    tmp_path_factory: pytest.TempPathFactory, members: list[Ranks], rows: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    written = [
        Written(folder / str(index), ranks, alpha=6.0, seed=index)
        for index, ranks in enumerate(members)
    ]
    weights = [one.read(f"expert{index}") for index, one in enumerate(written)]
    chosen = [weights[index] if 0 <= index < len(weights) else None for index in rows]
    joined = join(weights, SITES)
    for site in SITES:
        if site.name not in joined.down:
            assert not any(site.name in one.down for one in weights)
            continue
        inputs = inputs_of(site, len(rows))
        low = inputs @ joined.down[site.name].T * joined.mask(site.group, chosen)
        found = low @ joined.up[site.name]
        for row, own in enumerate(chosen):
            alone = inputs[row : row + 1]
            expected = (
                torch.zeros(1, sum(site.outputs))
                if own is None
                else applied(own.down, own.up, site, alone)
            )
            assert torch.equal(found[row : row + 1], expected)


def test_an_adapter_that_changes_nothing_at_a_site_is_zero_there(
    write: Callable[..., Written],
) -> None:
    attention = write("attention", dict.fromkeys(SITES[0].modules, 2)).read()
    feed_forward = write("feed_forward", dict.fromkeys(SITES[2].modules, 3)).read()
    joined = join([attention, feed_forward], SITES)
    assert set(joined.down) == set(joined.up) == {SITES[0].name, SITES[2].name}
    assert torch.equal(joined.down[SITES[0].name], attention.down[SITES[0].name])
    assert torch.equal(joined.up[SITES[2].name], feed_forward.up[SITES[2].name])
    assert not joined.mask("qkv", [feed_forward]).any()
    assert not joined.mask("down", [attention]).any()


def test_an_adapter_of_one_layer_is_zero_in_the_columns_of_the_other(
    write: Callable[..., Written],
) -> None:
    first = write("first", dict.fromkeys(SITES[0].modules, 1)).read()
    second = write("second", dict.fromkeys(SITES[1].modules, 2)).read()
    joined = join([first, second], SITES)
    assert joined.widths["qkv"] == 3 + 6
    assert not joined.down[SITES[0].name][3:].any()
    assert not joined.up[SITES[1].name][:3].any()


def test_an_adapter_alone_is_joined_without_a_copy(write: Callable[..., Written]) -> None:
    weights = write("expert", dict.fromkeys(FEATURES, 2)).read()
    joined = join([weights], SITES)
    assert joined.members == (weights,)
    assert joined.down is weights.down
    assert joined.up is weights.up
    assert joined.mask("qkv", [weights, None, weights]).tolist() == [[1] * 6, [0] * 6, [1] * 6]


def test_no_adapters_at_all_change_nothing() -> None:
    joined = join([], SITES)
    assert (joined.members, joined.down, joined.up) == ((), {}, {})
    assert joined.mask("qkv", [None, None]).shape == (2, 0)


def test_adapters_of_one_name_are_two(write: Callable[..., Written]) -> None:
    """A row goes on with the adapter that it began with when a new one takes the name."""
    ranks = dict.fromkeys(SITES[2].modules, 1)
    old, new = write("old", ranks, seed=1).read("math"), write("new", ranks, seed=2).read("math")
    joined = join([old, new], SITES)
    assert joined.mask("down", [new, old]).tolist() == [[0, 1], [1, 0]]


def columns(members: Sequence[LoraWeights]) -> list[list[int]]:
    """Where each adapter lies among the joined columns of the group `qkv`."""
    joined = join(members, SITES)
    masks = joined.mask("qkv", members)
    return [mask.nonzero().flatten().tolist() for mask in masks]


@given(st.lists(st.integers(0, 2 * PANEL), min_size=2, max_size=8))
def test_no_adapter_lies_across_a_panel_without_need(widths: list[int]) -> None:
    members = [bare(str(index), qkv=width, down=0) for index, width in enumerate(widths)]
    end = 0
    for width, own in zip(widths, columns(members), strict=True):
        if not width:
            assert own == []
            continue
        assert own == list(range(own[0], own[0] + width))
        fits = end % PANEL + width <= PANEL
        assert own[0] == (end if fits else -(-end // PANEL) * PANEL)
        assert width > PANEL or own[0] // PANEL == own[-1] // PANEL
        end = own[-1] + 1


def test_adapters_of_rank_16_fill_a_panel_without_gaps() -> None:
    members = [bare(str(index), qkv=48, down=16) for index in range(4)]
    assert [own[0] for own in columns(members)] == [0, 48, PANEL, PANEL + 48]


def test_an_adapter_wider_than_a_panel_begins_with_one() -> None:
    members = [bare("small", qkv=1), bare("large", qkv=PANEL + 1), bare("next", qkv=1)]
    assert [own[0] for own in columns(members)] == [0, PANEL, 2 * PANEL + 1]
