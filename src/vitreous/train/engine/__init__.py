"""The engine of training: session, loop, one step, and how a run stops and goes on.

docs/engine.md follows a batch through its files.
"""
