"""The methods: one paper, one file. Importing this package registers them."""

from __future__ import annotations

from foveate.methods.adav import AdaV
from foveate.methods.chance import Random
from foveate.methods.evocut import EvoCut
from foveate.methods.grid import Grid, Pool
from foveate.methods.todre import ToDRE
from foveate.methods.v2drop import V2Drop

__all__ = ["AdaV", "EvoCut", "Grid", "Pool", "Random", "ToDRE", "V2Drop"]
