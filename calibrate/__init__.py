"""Graph and data in, better graph out: statistics, the Q/DQ vocabulary and one file per step."""
