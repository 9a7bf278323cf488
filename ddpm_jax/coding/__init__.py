"""Compress images with a trained network, losslessly or progressively."""
