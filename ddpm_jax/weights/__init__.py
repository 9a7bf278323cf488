"""Read and write the weights of other code bases: each layout is declared once, for both ways."""
