"""Distances and scores of sets of images, as functions of arrays."""
