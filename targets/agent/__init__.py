"""The agent: what is sent to a device to run artifacts there. Standard library, numpy, and the runtime found there.

It is packed into one file by `targets/errands/`, with nothing else of ours, and must run under Python 3.9: imports are
relative, and nothing newer than 3.9 is used.
"""
