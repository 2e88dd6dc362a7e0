"""Lets torchvision from PyPI, a CUDA build, be imported beside the CPU build of torch.

It looks up two operators of its own library when it is imported. Declared here, they are found; they are never called.
"""

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    """Watches the imports until torchvision comes."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            kept.append(self)  # the declarations last as long as their library object
        return None


kept: list[_Declare] = []
sys.meta_path.insert(0, _Declare())
