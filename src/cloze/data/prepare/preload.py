"""What worker processes import before there is work: the tokenizer backends that are installed, and pandas, which
pyarrow imports when it sees its first Python value."""

from __future__ import annotations

from contextlib import suppress

with suppress(ImportError):
    import awkward  # noqa: F401
    import gigatoken  # noqa: F401
with suppress(ImportError):
    import tokenizers  # noqa: F401
with suppress(ImportError):
    import pandas  # noqa: F401
