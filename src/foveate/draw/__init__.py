"""Pictures of what a method did: kept tokens, scores, stages, tokens per layer, two methods beside each other.

Each function returns an image of Pillow; its twin ``.svg``, with the same arguments, returns the text of an SVG file:
``draw.tokens(picture, report.images[0])`` and ``draw.tokens.svg(picture, report.images[0])``.
"""

from foveate.draw.charts import alive, sheet
from foveate.draw.overlay import compare, heat, kept, prompt, scores, stages, tokens
from foveate.draw.scene import RAMP

__all__ = ["RAMP", "alive", "compare", "heat", "kept", "prompt", "scores", "sheet", "stages", "tokens"]
