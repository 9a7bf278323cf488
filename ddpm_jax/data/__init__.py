"""Read images: their sources (load, folder, prepared), their order, their preparation."""
