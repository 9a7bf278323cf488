"""Samples of a trained network: any number, over all devices."""
