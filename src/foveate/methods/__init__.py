"""The methods: one paper, one file. Importing this package registers them."""

from __future__ import annotations

from foveate.methods.adav import AdaV
from foveate.methods.cdpruner import CDPruner
from foveate.methods.chance import Random
from foveate.methods.dart import DART
from foveate.methods.divprune import DivPrune
from foveate.methods.evocut import EvoCut
from foveate.methods.fastv import FastV
from foveate.methods.grid import Grid, Pool
from foveate.methods.holov import HoloV
from foveate.methods.prumerge import PruMerge, PruMergePlus
from foveate.methods.pyramiddrop import PyramidDrop
from foveate.methods.sparsevlm import SparseVLM
from foveate.methods.todre import ToDRE
from foveate.methods.v2drop import V2Drop
from foveate.methods.visionzip import VisionZip
from foveate.methods.vispruner import VisPruner
from foveate.methods.vscan import VScan

__all__ = [
    "AdaV",
    "CDPruner",
    "DART",
    "DivPrune",
    "EvoCut",
    "FastV",
    "Grid",
    "HoloV",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "ToDRE",
    "V2Drop",
    "VisionZip",
    "VisPruner",
    "VScan",
]
