"""A model by name, from a folder, or from an untrusted source."""
