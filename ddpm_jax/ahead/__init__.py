"""Compile for machines that are not here, and report what the compiler decided."""
