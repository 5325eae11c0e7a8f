"""One run, step by step: session, loop, step, state, resume."""
