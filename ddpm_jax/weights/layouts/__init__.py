"""Declare the layouts of other code bases, one file each."""
