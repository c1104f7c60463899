"""Measure perplexity on fixed masks (`perplexity`) and pseudo-log-likelihood of sentences (`pll`), with intervals."""
