"""Pure decisions: events and time in, effects out. No clock, no I/O, no randomness of its own."""
