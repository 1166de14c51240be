"""What a user runs: the command line, the pipeline, capture, measurement and reports."""
