"""Interpolation and sampling in space."""

from __future__ import annotations

from edgeprune.ops import Axes, Call, Rule


def upsample(call: Call) -> Axes:
    """(N, C, *space) -> (N, C, *other space)."""
    x = call.value("input" if "input" in call.arguments else "self")
    call.masked = x.masked
    for space in x.axes[2:]:
        call.freeze(space, "is resampled")
    return (x.axes[0], x.axes[1], *[None] * (len(x.shape) - 2))


def grid_sample(call: Call) -> Axes:
    """Sample (N, C, *space) at the places of a grid."""
    for axis in call.value("grid").axes:
        call.freeze(axis, "is a sampling grid")
    return upsample(call)


RULES: dict[str, Rule] = dict.fromkeys(
    (
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_trilinear3d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
    ),
    upsample,
)
RULES |= dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), grid_sample)
