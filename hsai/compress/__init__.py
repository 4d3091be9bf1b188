"""Compression: each step is params -> params, and says in a ledger what every weight costs and how far it moved."""

from hsai.compress.ledger import Ledger, LedgerRow
from hsai.compress.one_shot import compress
from hsai.compress.plan import Plan, check_kernels, plan_recipe
from hsai.compress.recipe import RecipeConfig, Rule

__all__ = ["Ledger", "LedgerRow", "Plan", "RecipeConfig", "Rule", "check_kernels", "compress", "plan_recipe"]
