"""MiniCPM-V: pictures of any size are cut into patches, and the patches of all pictures of a batch form one row.

Three of four text layers have linear attention without q, k, v and o, so only the other layers get an adapter.
"""

from __future__ import annotations

from fedmllm.models.families import Family, families


@families.register("minicpmv4_6")
def minicpmv4_6() -> Family:
    """MiniCPM-V 4.6."""
    return Family(first_position=0, continues=False, pixels_dim=-1)  # the state of linear attention cannot be copied by row


@families.register("minicpmv4_7")
def minicpmv4_7() -> Family:
    """MiniCPM-V 4.7."""
    return Family(pixels_dim=-1)  # position ids follow the patches on a canvas, and the model computes them itself
