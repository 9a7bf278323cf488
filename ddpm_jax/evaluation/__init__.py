"""Measure a trained network: likelihood, FID and its like, and whether it only remembers."""
