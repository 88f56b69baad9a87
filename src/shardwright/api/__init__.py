"""The HTTP API: schemas, routes, streams. Knows the engine's interface alone."""
