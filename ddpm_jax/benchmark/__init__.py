"""Measure speed, alone and beside PyTorch; docs/performance.md has the results."""
