"""Weights of other code bases, in and out: one file a layout, each declared once and used in both directions."""
