"""Commands for the operator. They talk to a running server over HTTP."""
