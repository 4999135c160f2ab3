"""The lives of the processes: the first one, which owns the engine, and the front-ends beside it."""
