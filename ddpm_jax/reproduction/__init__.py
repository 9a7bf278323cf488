"""Fill the cells of the papers' tables, and report what filled them."""
