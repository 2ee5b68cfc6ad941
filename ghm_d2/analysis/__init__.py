"""Analyses of a trained detector beyond its AP: gradients, samples, noise, cost."""
