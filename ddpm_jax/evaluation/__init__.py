"""What a trained network is worth: one file for each kind of number, and the record they all leave behind."""
