"""What a dynamics model is made of."""
