"""`cloze grow`: make an initial model from a trained one, with another vocabulary, more or wider layers.

axes        what each axis of each weight is, and which old place each new place is copied from
depth       which old layer each new layer is copied from
vocabulary  the old rows from which the embedding of each new token is made
exact       preserve the function of the model if requested
warm_start  all of it together: reads the one model and writes the other
"""
