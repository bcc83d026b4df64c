"""Side-by-side ratios against the hand-made limit and against peers; see README.md in this folder."""
