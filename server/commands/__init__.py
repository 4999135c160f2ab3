"""Commands beside `serve`. They talk to a running server over HTTP."""
