"""Training options in combination: rows in which every pair of their values occurs, each run and compared."""
