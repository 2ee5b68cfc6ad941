"""Gradient Harmonizing Mechanism (GHM-C, GHM-R; arXiv 1811.05181) for Detectron2."""

__version__ = "0.1.0"
