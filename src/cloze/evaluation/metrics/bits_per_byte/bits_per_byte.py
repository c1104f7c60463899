"""Bits per byte of masked predictions, as a module of the `evaluate` library: a loss that does not depend on how a
tokenizer cuts its text."""

import math

import datasets
import evaluate

_DESCRIPTION = """
Bits per byte of a masked language model: the sum of the cross entropies of all masked tokens, in bits, over the UTF-8
bytes of those tokens. Unlike perplexity it can be compared between models with different tokenizers, on the same text
and the same share of masked tokens.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): per example, the sum of the cross entropies (nats) of its masked tokens.
    references (list of str): per example, the text of its masked tokens, spaces included.
Returns:
    bits_per_byte (float): bits for each byte of masked text.
    num_bytes (int): UTF-8 bytes of masked text.
Examples:
    >>> import cloze, evaluate, pathlib
    >>> path = pathlib.Path(cloze.__file__).parent / "evaluation" / "metrics" / "bits_per_byte"
    >>> metric = evaluate.load(str(path))
    >>> result = metric.compute(predictions=[2.0, 6.0], references=[" spiral", "é"])
    >>> round(result["bits_per_byte"], 6), result["num_bytes"]
    (1.282396, 9)
"""

_CITATION = ""


class BitsPerByte(evaluate.Metric):
    """See `_KWARGS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        num_bytes = sum(len(text.encode()) for text in references)
        if num_bytes == 0:
            raise ValueError("no text was masked")
        return {"bits_per_byte": float(sum(predictions)) / math.log(2) / num_bytes, "num_bytes": num_bytes}
