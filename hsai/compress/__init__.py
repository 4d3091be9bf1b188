"""Compression: each step is params -> params, and says in a ledger what every weight costs and how far it moved."""

from hsai.compress.ledger import Ledger, LedgerRow
from hsai.compress.one_shot import compress
from hsai.compress.recipe import RecipeConfig, Rule, match_weights, reads_calibration

__all__ = ["Ledger", "LedgerRow", "RecipeConfig", "Rule", "compress", "match_weights", "reads_calibration"]
