"""Perplexity and accuracy of masked predictions, as a module of the `evaluate` library.

The library's own `perplexity` is for causal models. This one takes, for each example, the sum of the cross entropies
of its masked tokens and how many there are, so that examples with many masks weigh as much as they should.
"""

import math

import datasets
import evaluate

_DESCRIPTION = """
Perplexity of a masked language model: exp(sum of the cross entropies of all masked tokens / their number). Natural
logarithms. With `correct`, also the share of masked tokens that were predicted right.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): per example, the sum of the cross entropies (nats) of its masked tokens.
    references (list of int): per example, the number of its masked tokens.
    correct (list of int, optional): per example, how many masked tokens were predicted right.
Returns:
    loss (float): mean cross entropy of a masked token, in nats.
    perplexity (float): exp(loss).
    masked_tokens (int): number of masked tokens.
    masked_accuracy (float): share predicted right, where `correct` was given.
Examples:
    >>> import cloze, evaluate, pathlib
    >>> path = pathlib.Path(cloze.__file__).parent / "evaluation" / "metrics" / "masked_perplexity"
    >>> metric = evaluate.load(str(path))
    >>> metric.compute(predictions=[2.0, 6.0], references=[1, 3], correct=[1, 1])
    {'loss': 2.0, 'perplexity': 7.38905609893065, 'masked_tokens': 4, 'masked_accuracy': 0.5}
"""

_CITATION = ""


class MaskedPerplexity(evaluate.Metric):
    """See `_KWARGS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, correct=None):
        masked_tokens = int(sum(references))
        if masked_tokens == 0:
            raise ValueError("no token was masked")
        loss = float(sum(predictions)) / masked_tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        result = {"loss": loss, "perplexity": perplexity, "masked_tokens": masked_tokens}
        if correct is not None:
            result["masked_accuracy"] = int(sum(correct)) / masked_tokens
        return result
