"""The Flax network that predicts the noise, and its parts."""
