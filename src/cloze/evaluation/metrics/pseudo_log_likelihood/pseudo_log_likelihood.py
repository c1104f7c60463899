"""Pseudo-log-likelihood of texts under a masked language model, as a module of the `evaluate` library."""

import datasets
import evaluate
from accelerate import Accelerator

from cloze.evaluation.evaluator import open_subject
from cloze.evaluation.pll import pseudo_perplexity

_DESCRIPTION = """
Pseudo-log-likelihood: the sum of the log-probabilities of a text's tokens, each predicted from all others (Salazar et
al., 2020). With word_l2r the later tokens of its own word are masked too (Kauf and Ivanova, 2023).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the texts.
    model (str): a model folder, a run's folder, or a model on the Hub.
    word_l2r (bool): mask the later tokens of a token's own word too. Default: False.
    batch_size (int): masked copies per forward pass. Default: 32.
Returns:
    plls (list of float): per text, in nats.
    mean_pll (float): their mean.
    pseudo_perplexity (float): exp of the mean negative log-probability of a token.
Examples (`model` is the path of a model):
    >>> import cloze, evaluate, pathlib
    >>> path = pathlib.Path(cloze.__file__).parent / "evaluation" / "metrics" / "pseudo_log_likelihood"
    >>> metric = evaluate.load(str(path))
    >>> result = metric.compute(predictions=["The Milky Way is a spiral galaxy."], model=model)
    >>> sorted(result)
    ['mean_pll', 'plls', 'pseudo_perplexity']
    >>> result["plls"][0] < 0
    True
"""

_CITATION = """
@inproceedings{salazar2020masked,
    title = {Masked Language Model Scoring},
    author = {Salazar, Julian and Liang, Davis and Nguyen, Toan Q. and Kirchhoff, Katrin},
    booktitle = {ACL}, year = {2020}
}
@inproceedings{kauf2023better,
    title = {A Better Way to Do Masked Language Model Scoring},
    author = {Kauf, Carina and Ivanova, Anna},
    booktitle = {ACL}, year = {2023}
}
"""


class PseudoLogLikelihood(evaluate.Metric):
    """See `_KWARGS_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, word_l2r=False, batch_size=32):
        subject = open_subject(model, None, "", Accelerator())
        found = subject.score_sentences(subject.read_sentences(predictions), batch_size, word_l2r)
        plls = [one.pll for one in found]
        return {"plls": plls, "mean_pll": sum(plls) / len(plls), "pseudo_perplexity": pseudo_perplexity(found)}
