"""The live page of runs that train: what is read, who may read it, and the server."""
