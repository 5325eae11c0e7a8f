"""Vitreous."""
