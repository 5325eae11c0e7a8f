"""Probes, one per file: what `look` reads from a pass over images.

The file's stem is the probe's name.
"""
