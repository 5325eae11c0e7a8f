"""The engine of training: a session, its loop, one step, and what lets a run stop and go on. See docs/engine.md."""
