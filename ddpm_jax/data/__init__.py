"""Images in: their sources (sources, prepared), their order (batches, prefetch), their preparation (prepare)."""
