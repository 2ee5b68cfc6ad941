"""The generated data set `digits`."""
