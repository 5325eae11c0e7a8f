"""What is done with a finished model: predict on images, and hand it over as a file that needs no Vitreous."""
