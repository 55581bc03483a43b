"""Low-rank factors in memory: read once per adapter, joined side by side for a batch.

A batch may hold rows of different adapters, or of none. The base weights are multiplied once for
all rows; the low-rank update of every row comes from the joined factors,
`y = W x + B (mask * (A x))`, where the mask keeps for each row the columns of its own adapter. This
is S-LoRA's heterogeneous batch (Sheng et al. 2023) with a mask in place of a gather, since on a CPU
one small dense product is cheaper than copying factors for every row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polymath.experts.adapter import ADAPTER_WEIGHTS, AdapterFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["JoinedLora", "LoraWeights", "Site", "join", "read_weights"]

PANEL = 128
"""Terms that a matrix product sums at once (ONNX Runtime's MLAS); an adapter within one panel gets
the same bits whatever stands beside it."""


@dataclass(frozen=True, slots=True)
class Site:
    """Matrices that multiply the same input at once, and so share one low-rank update.

    Attributes:
        modules: full names, in the order of their outputs.
        group: sites of one group have the same number of low-rank columns, so that a mask fits all.
        outputs: features of each module.
    """

    name: str
    group: str
    modules: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """One adapter.

    Attributes:
        widths: group -> low-rank columns.
        down: site -> A, [width of its group, inputs]; absent where the adapter changes nothing.
        up: site -> B times the adapter's scale, [width of its group, outputs].
    """

    name: str
    widths: Mapping[str, int]
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class JoinedLora:
    """The adapters of a batch side by side; `down` and `up` as in `LoraWeights`."""

    members: tuple[LoraWeights, ...]
    widths: Mapping[str, int]
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]

    def mask(self, group: str, rows: Sequence[LoraWeights | None]) -> Tensor:
        """1 in the columns of each row's own adapter, else 0; [rows, width of the group]."""
        import torch

        starts = _starts(self.members, group)
        mask = torch.zeros(len(rows), self.widths[group])
        for index, row in enumerate(rows):
            if row is not None:
                first = starts[row]
                mask[index, first : first + row.widths.get(group, 0)] = 1.0
        return mask


def read_weights(
    name: str,
    file: AdapterFile,
    sites: Sequence[Site],
    dtype: torch.dtype,
    device: torch.device,
) -> LoraWeights:
    """Load a checked adapter in the shape of a network's sites."""
    from safetensors import safe_open

    widths: dict[str, int] = {}
    for site in sites:
        width = sum(file.ranks.get(module, 0) for module in site.modules)
        widths[site.group] = max(widths.get(site.group, 0), width)
    down, up = {}, {}
    with safe_open(file.folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
        for site in sites:
            if not any(module in file.ranks for module in site.modules):
                continue
            a, b = _site_factors(site, file, widths[site.group], tensors.get_tensor)
            down[site.name] = a.to(device, dtype)
            up[site.name] = b.to(device, dtype)
    return LoraWeights(name, widths, down, up)


def _site_factors(
    site: Site, file: AdapterFile, width: int, tensor: object
) -> tuple[Tensor, Tensor]:
    """A [width, inputs] and scaled B [width, outputs]; every module has columns of its own."""
    import torch

    down = torch.zeros(width, site.inputs)
    up = torch.zeros(width, sum(site.outputs))
    column = output = 0
    for module, features in zip(site.modules, site.outputs, strict=True):
        if rank := file.ranks.get(module, 0):
            a, b = (
                tensor(f"base_model.model.{module}.lora_{factor}.weight").float()  # type: ignore[operator]
                for factor in "AB"
            )
            down[column : column + rank] = a
            up[column : column + rank, output : output + features] = file.scales[module] * b.T
            column += rank
        output += features
    return down, up


def join(members: Iterable[LoraWeights], sites: Sequence[Site]) -> JoinedLora:
    """Put adapters side by side; sites that none of them changes are left out."""
    import torch

    chosen = tuple(members)
    if len(chosen) == 1:
        return JoinedLora(chosen, chosen[0].widths, chosen[0].down, chosen[0].up)
    widths = {site.group: _width(chosen, site.group) for site in sites}
    down, up = {}, {}
    for site in sites:
        parts = [member for member in chosen if site.name in member.down]
        if not parts:
            continue
        starts = _starts(chosen, site.group)
        like = parts[0].down[site.name]
        down[site.name] = torch.zeros(widths[site.group], site.inputs).to(like)
        up[site.name] = torch.zeros(widths[site.group], sum(site.outputs)).to(like)
        for member in parts:
            columns = slice(starts[member], starts[member] + member.widths[site.group])
            down[site.name][columns] = member.down[site.name]
            up[site.name][columns] = member.up[site.name]
    return JoinedLora(chosen, widths, down, up)


def _starts(members: Sequence[LoraWeights], group: str) -> dict[LoraWeights, int]:
    """The first column of each adapter; none lies across a panel's border without need."""
    starts, end = {}, 0
    for member in members:
        width = member.widths.get(group, 0)
        if end % PANEL + width > PANEL:
            end += -end % PANEL
        starts[member] = end
        end += width
    return starts


def _width(members: Sequence[LoraWeights], group: str) -> int:
    starts = _starts(members, group)
    return max((starts[one] + one.widths.get(group, 0) for one in members), default=0)
