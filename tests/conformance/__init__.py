"""transformers' own common tests, run on Hope: `make conformance`.

They are in no wheel. The source archive of the installed version holds most of them; what stands only in
transformers' repository is taken from a folder. Both stay in a cache that git does not see.
"""
