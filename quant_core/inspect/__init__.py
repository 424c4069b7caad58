"""What a model is made of: its layers and units, in the order in which they run."""
