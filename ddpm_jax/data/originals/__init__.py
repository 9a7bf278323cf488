"""Read data sets as their publishers give them away."""
