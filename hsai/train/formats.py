"""Training as if packed: the forward pass sees what packing to a format would hold, and training makes up for it.

A rule gives the weights whose names match a format, as in a recipe of `hsai.compress`. Behind each such weight stay
latent values in float32; the model that computes the loss has in their place what the format holds of them: rounded
(quantization-aware training; ternary: BitNet b1.58, 2402.17764), masked (SR-STE, 2102.04010), or both. Gradients come
back to the latent values by the rules of `hsai.compress.latent`. What a run leaves is packed by the same arithmetic, so
that the packed model is the trained one (`pack_trained`).

L layers, D contraction, F outputs, G positions that share a scale.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from hsai.compress.grid import grid_of, pattern_of
from hsai.compress.latent import Straight, begin_latent, pack_latent, see_weight
from hsai.compress.plan import plan_recipe
from hsai.compress.recipe import RecipeConfig, Rule
from hsai.errors import InputError
from hsai.formats import FormatConfig, OutliersConfig, Weight, to_dense
from hsai.formats.storage import named_weights, replace_weights
from hsai.models import Transformer, TransformerConfig
from hsai.models.transformer import abstract_transformer
from hsai.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatRule:
    """Trains the weights whose names match as if they were packed."""

    pattern: str
    """Shell-style pattern on the dotted name, as in a recipe: "layers.*", "*embed", "*". The first match decides; a
    router of experts matches none without "router" in it."""

    format: FormatConfig
    """What the forward pass sees of these weights."""

    scales: Literal["derived", "learned"] = "derived"
    """Of a format with scales: found anew in every step as packing would, or learned (LSQ, 1902.08153)."""

    masks: Literal["magnitude", "fixed"] = "magnitude"
    """Of a format that prunes: by the magnitudes of each step (SR-STE), or as they are at the start."""

    decay: float = 2e-4
    """Pull of pruned weights towards zero where masks follow magnitudes: lambda of SR-STE, eq. 10."""

    def __post_init__(self) -> None:
        Rule(pattern=self.pattern, format=self.format)
        kind = self.format.format
        if isinstance(self.format, OutliersConfig):
            raise InputError(f"rule {self.pattern!r}: {kind} cannot be trained in; leave that to a recipe, afterwards")
        if self.scales == "learned" and grid_of(self.format) is None:
            raise InputError(f"rule {self.pattern!r}: {kind} has no scales to learn; leave scales 'derived'")
        if self.masks == "fixed" and pattern_of(self.format) is None:
            raise InputError(f"rule {self.pattern!r}: {kind} prunes nothing; leave masks 'magnitude'")
        if not 0 <= self.decay < float("inf"):
            raise InputError(f"rule {self.pattern!r}: decay={self.decay} must be at least 0, and finite")

    @property
    def straight(self) -> Straight:
        """What a weight under this rule is to `hsai.compress.latent`."""
        learned, fixed = self.scales == "learned", self.masks == "fixed"
        return Straight(format=self.format, learned=learned, fixed=fixed, decay=self.decay)


Rules = tuple[FormatRule, ...]


def match_formats(rules: Rules, config: TransformerConfig) -> dict[str, FormatRule]:
    """The rule of each weight that is trained as if packed; raises `InputError` as `plan_recipe`."""
    if not rules:
        return {}
    recipe = RecipeConfig(rules=tuple(Rule(pattern=rule.pattern, format=rule.format) for rule in rules))
    plan = plan_recipe(recipe, abstract_transformer(config))
    return {name: rules[recipe.rules.index(rule)] for name, rule in plan.rules.items()}


def begin(model: Transformer, rules: Rules) -> Transformer:
    """The model as training begins: latent values, float32 (L, D, F), with what the rules keep beside them.

    Of a weight that is packed in its rule's format already, a fixed mask and learned scales are taken over; everything
    else is made dense, and masks and scales are found.
    """
    matched = match_formats(rules, model.config)
    values: dict[str, Weight] = {}
    for name, param in named_weights(model).items():
        value = param.get_value()
        values[name] = (
            begin_latent(value, matched[name].straight) if name in matched else to_dense(value).astype(jnp.float32)
        )
    return replace_weights(model, values)


def see_packed(model: Transformer, rules: Rules) -> Transformer:
    """The model that a forward pass computes with, dense; differentiable to the latent values (and scales) behind it.

    Raises:
      InputError: see `plan_recipe`.
    """
    params = named_weights(model)
    values: dict[str, Weight] = {}
    for name, rule in match_formats(rules, model.config).items():
        held = see_weight(params[name].get_value(), rule.straight)
        # Laid out as the parameter is, whatever the search over its groups made of it.
        values[name] = constrain(held, *params[name].get_metadata("out_sharding"))
    return replace_weights(model, values)


def pack_trained(model: Transformer, rules: Rules) -> Transformer:
    """The trained model with its weights packed: of `see_packed`, not a number changes.

    What no rule matches stays dense, float32. (Derived scales are searched once more, by another program; of two whose
    errors differ by less than the rounding of their sums it may take the other. Learned ones are the same bits.)
    """
    params = named_weights(model)
    values: dict[str, Weight] = {}
    for name, rule in match_formats(rules, model.config).items():
        values[name] = pack_latent(params[name].get_value(), rule.straight)
    return replace_weights(model, values)
