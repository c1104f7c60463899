"""Perplexity on fixed masks (`perplexity`) and pseudo-log-likelihood of sentences (`pll`), and how sure they are."""
