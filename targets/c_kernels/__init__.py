"""The C99 sources that every folder written by the target `c` gets a copy of: kernels, no model."""
