"""Scores on public benchmarks, one command each; every score keeps its predictions."""
