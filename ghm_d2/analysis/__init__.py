"""What a trained detector does beyond its AP: gradients, samples, noise, cost."""
