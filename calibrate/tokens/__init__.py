"""Token pruning on a captured transformer: which tokens go, where, and everything behind made to fit.

`attention` finds the blocks, `axis` follows the tokens through what is behind a block, `insert` puts a selection there
and reduces whatever meets the tokens later; `methods/` says which tokens go, `selection` how they are taken.
"""
