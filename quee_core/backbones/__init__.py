"""Frozen classifiers, cut into segments by exits (design, section 1)."""

from quee_core.backbones.registry import BACKBONES, LoadedBackbone, list_backbones, load_backbone
from quee_core.backbones.segmented import SegmentedBackbone, check_exits, evenly_spaced_exits, segment

__all__ = [
    "BACKBONES",
    "LoadedBackbone",
    "SegmentedBackbone",
    "check_exits",
    "evenly_spaced_exits",
    "list_backbones",
    "load_backbone",
    "segment",
]
