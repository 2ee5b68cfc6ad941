"""Checks of data sets before a training."""
