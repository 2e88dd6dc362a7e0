"""Weights of two of foveate's demo models: ``hd`` and ``video``. ``foveate.demo.load`` finds them here."""
