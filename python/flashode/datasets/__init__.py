"""Data for the examples and tests of models: densities in the plane, motions, and images; nothing is downloaded."""
