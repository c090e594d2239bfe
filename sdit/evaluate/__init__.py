"""What a trained model draws, and how good it is."""
