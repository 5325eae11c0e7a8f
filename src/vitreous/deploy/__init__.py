"""What is done with a finished model: prediction, and export without Vitreous."""
