"""The agent: what is sent to a device to run artifacts there. Standard library, numpy, and the runtime found there."""
