"""Errors, files, processes, text forms: what every other folder may import."""
