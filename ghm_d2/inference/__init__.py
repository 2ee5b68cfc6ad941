"""Loading, evaluating, predicting with and exporting a trained detector."""
