"""`cloze grow`: make a model to start from out of a trained one, with another vocabulary, more or wider layers.

axes        what each axis of each weight is, and which old place each new place is copied from
depth       which old layer each new layer is copied from
vocabulary  which old rows the embedding of each new token is made of
exact       what keeps the function of the model the same where that was asked for
warm_start  all of it together: reads the one model and writes the other
"""
