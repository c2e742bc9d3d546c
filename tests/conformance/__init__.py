"""transformers' own common tests, run on Hope: `make conformance`.

They are in no wheel. The source archive of the installed version holds most of them; what stands in transformers'
repository only is taken from a folder. Both stay in a cache outside of what git sees.
"""
