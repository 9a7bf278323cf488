"""The Inception network behind FID: its weights, its files and its features."""
