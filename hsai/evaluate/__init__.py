"""Benchmarks: how likely a model finds the right answers, by the definitions of EleutherAI's lm-evaluation-harness.

`documents.py` brings the documents of a task, `tasks.py` says how each becomes a question, `fewshot.py` which solved
examples stand before it, `pairs.py` how text becomes tokens, `scorer.py` what the model gives them, `metrics.py` what
that is worth, `perplexity.py` the same for plain text, and `report.py` a table and JSON of it. `runner.py` does all of
it for one model. `harness.py` lets the harness itself drive our models.
"""

from hsai.evaluate.batches import Pair
from hsai.evaluate.runner import EvaluationConfig, TaskResult, evaluate_tasks
from hsai.evaluate.scorer import Score, Scorer

__all__ = ["EvaluationConfig", "Pair", "Score", "Scorer", "TaskResult", "evaluate_tasks"]
