"""Readings and runs as one HTML page that opens from disk.

It reads files only and imports no model code.
"""
