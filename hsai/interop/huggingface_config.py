"""config.json <-> TransformerConfig, by the tables of hsai.interop.families.

Nothing is taken on trust: a key that asks for what our decoder does not do is refused by its name, and what is written
is read back and compared before anyone gets it. Both of the forms that `transformers` has had for rotary embeddings
(rope_theta with rope_scaling; rope_parameters) are read; the first is written, which every version of it reads.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hsai.configuration import field_types, from_data, suggest
from hsai.errors import InputError
from hsai.interop.families import FAMILIES, TRAITS, Family
from hsai.models import MoEConfig, RopeConfig, RopeScaling, TransformerConfig

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
SCALING_KEYS = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}
HARMLESS = frozenset(
    """_attn_implementation_autoset _name_or_path _sliding_window_pattern architectures attention_dropout bos_token_id
    cache_implementation dtype eos_token_id head_dim initializer_range intermediate_size is_llama_config layer_types
    max_window_layers model_type output_router_logits pad_token_id pretraining_tp rope_local_base_freq rope_parameters
    rope_scaling rope_theta router_aux_loss_coef router_jitter_noise sliding_window sliding_window_pattern torch_dtype
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache""".split()
)
"""Keys that change nothing of what a model computes for given tokens, or that are read where they do."""

FULL, SLIDING = "full_attention", "sliding_attention"


def read_config(raw: Any, dtype: str = "bfloat16") -> tuple[Family, TransformerConfig]:
    """The family and the config of a model, from what its config.json holds.

    Args:
      raw: the content of config.json.
      dtype: of activations and products.
    Raises:
      InputError: an architecture that is not in FAMILIES, a key that is missing or of the wrong type, or one that asks
        for what our decoder does not do.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"config.json holds {type(raw).__name__}, and not an object")
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
        raise InputError(
            f"config.json: quantization_config {method!r} is not supported; give the unquantized checkpoint"
        )
    family = _find_family(raw)
    _refuse_unknown(raw, family)
    hints = field_types(TransformerConfig)
    fields: dict[str, Any] = {trait: trait in family.traits for trait in TRAITS}
    for field, key in family.keys.items():
        value = _get(raw, family, key)
        if field == "activation":
            fields[field] = _choose(ACTIVATIONS, value, key)
        elif value is None and field == "kv_heads":
            fields[field] = fields["heads"]
        elif value is None and field == "head_dim":
            fields[field] = fields["embed"] // max(1, fields["heads"])
        else:
            fields[field] = from_data(hints[field], value, key)
    every, window = _read_windows(raw, family, fields["layers"])
    rope, local = _read_ropes(raw, family)
    scalar = from_data(hints["query_scalar"], _get(raw, family, "query_pre_attn_scalar"), "query_pre_attn_scalar")
    config = TransformerConfig(
        **fields,
        sliding_window=window,
        global_every=every,
        rope=rope,
        local_rope=local if every is not None and local != rope else None,
        query_scalar=None if scalar == fields["head_dim"] else scalar,
        moe=_read_experts(raw, family) if family.experts else None,
        dtype=dtype,  # type: ignore[arg-type]
    )
    return family, config


def write_config(config: TransformerConfig, architecture: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family of a model and the content of its config.json, without dtype and special tokens.

    Args:
      config: of the model.
      architecture: which one is tried first; by default the first in FAMILIES that is this model.
    Raises:
      InputError: no family is this model.
    """
    for family in sorted(FAMILIES, key=lambda family: family.architecture != architecture):
        raw = _write(config, family)
        try:
            found = read_config(raw, config.dtype)
        except InputError:
            continue
        if found == (family, config):
            return family, raw
    raise InputError(
        "no architecture of transformers computes this model: of "
        f"{', '.join(family.architecture for family in FAMILIES)} each lacks one of its options, or has another"
    )


def _find_family(raw: Mapping[str, Any]) -> Family:
    names = raw.get("architectures") or [raw.get("model_type")]
    if not isinstance(names, list):
        raise InputError(f"config.json: architectures is {str(names)[:80]}, and not a list")
    for family in FAMILIES:
        if names in ([family.architecture], [family.model_type]):
            return family
    known = [family.architecture for family in FAMILIES]
    raise InputError(
        f"config.json: architecture {', '.join(map(str, names))} is unknown; {suggest(str(names[0]), known)}"
    )


def _refuse_unknown(raw: Mapping[str, Any], family: Family) -> None:
    """Refuses what a key asks for and no code of ours does; a key without a value asks for nothing."""
    known = {*HARMLESS, *family.keys.values(), *family.defaults, *family.experts, *family.fixed}
    known |= {"num_experts_per_tok"} if family.experts else set()
    for key, value in raw.items():
        if key in family.fixed and (value or None) != (family.fixed[key] or None):
            raise InputError(
                f"config.json: {key}={value!r} is not supported in {family.architecture}: it must be "
                f"{family.fixed[key]!r}"
            )
        if key not in known and value not in (None, False, 0, "", [], {}):
            raise InputError(f"config.json: {key}={repr(value)[:80]} is unknown for {family.architecture}")


def _get(raw: Mapping[str, Any], family: Family, key: str) -> Any:
    if raw.get(key) is not None:
        return raw[key]
    if key in family.defaults and key not in raw:
        return family.defaults[key]
    if key in ("head_dim", "num_key_value_heads", "sliding_window", "query_pre_attn_scalar"):
        return None
    if key == "hidden_act":
        return "silu"
    raise InputError(f"config.json: {key} is missing")


def _choose(choices: Mapping[str, str], value: Any, key: str) -> str:
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"config.json: {key}={value!r} is not supported; valid: {', '.join(choices)}")
    return choices[value]


def _read_windows(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, int | None]:
    """Every how manyth layer is global (None: none, or all), and the window of the others."""
    window = _get(raw, family, "sliding_window") if family.window or family.alternating else None
    window = from_data(int | None, window, "sliding_window")
    kinds = raw.get("layer_types")
    pattern = None
    if family.alternating:
        default = family.defaults["sliding_window_pattern"]
        pattern = from_data(int, raw.get("sliding_window_pattern", default), "sliding_window_pattern")
    if kinds is None:
        return (None, None) if pattern == 1 else (pattern, window)
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise InputError(f"config.json: layer_types must be {FULL} or {SLIDING} for each of {layers} layers")
    if SLIDING not in kinds:
        return None, None
    if window is None:
        raise InputError(f"config.json: layer_types names {SLIDING}, and sliding_window is missing")
    if not family.alternating:
        if FULL in kinds:
            raise InputError(
                f"config.json: layer_types mixes {FULL} and {SLIDING}, which {family.architecture} may not"
            )
        return None, window
    every = kinds.index(FULL) + 1 if FULL in kinds else max(layers + 1, pattern or 0)
    if kinds != [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]:
        raise InputError(f"config.json: layer_types does not have {FULL} at every {every}th layer, and nowhere else")
    return every, window


def _read_ropes(raw: Mapping[str, Any], family: Family) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embedding of layers that see all, and of those with a window."""
    parameters = raw.get("rope_parameters")
    if parameters is None:
        scaling = raw.get("rope_scaling") or {}
        theta = _get(raw, family, "rope_theta")
        rope = _read_rope(scaling, theta, "rope_scaling")
        local = raw.get("rope_local_base_freq", family.defaults.get("rope_local_base_freq"))
        return rope, rope if local is None else _read_rope({}, local, "rope_local_base_freq")
    if not family.alternating:
        rope = _read_rope(parameters, _get(raw, family, "rope_theta"), "rope_parameters")
        return rope, rope
    if not isinstance(parameters, Mapping) or set(parameters) != {FULL, SLIDING}:
        raise InputError(f"config.json: rope_parameters must have {FULL} and {SLIDING}")
    keys = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
    both = (_read_rope(parameters[kind], family.defaults[key], f"rope_parameters.{kind}") for kind, key in keys.items())
    rope, local = both
    return rope, local


def _read_rope(parameters: Any, theta: Any, key: str) -> RopeConfig:
    if not isinstance(parameters, Mapping):
        raise InputError(f"config.json: {key} is {str(parameters)[:80]}, and not an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = from_data(float, parameters.get("rope_theta", theta), f"{key}.rope_theta")
    names = {"default": [], "linear": ["factor"], "llama3": ["factor", *SCALING_KEYS.values()]}
    if kind not in names:
        raise InputError(f"config.json: {key}.rope_type={kind!r} is not supported; valid: {', '.join(names)}")
    for name, value in parameters.items():
        if name not in ("rope_type", "type", "rope_theta", *names[kind]) and value not in (None, False, 1.0):
            raise InputError(f"config.json: {key}.{name}={value!r} is unknown for rope_type {kind!r}")
    if kind == "default":
        return RopeConfig(theta=theta)
    values = {"factor": "factor", **(SCALING_KEYS if kind == "llama3" else {})}
    if missing := [name for name in values.values() if name not in parameters]:
        raise InputError(f"config.json: {key}.{missing[0]} is missing")
    scaling = {field: parameters[name] for field, name in values.items()}
    return RopeConfig(theta=theta, scaling=from_data(RopeScaling, {"kind": kind, **scaling}, key))


def _read_experts(raw: Mapping[str, Any], family: Family) -> MoEConfig:
    count = next((raw[key] for key in family.experts if raw.get(key) is not None), None)
    normalize = _get(raw, family, "norm_topk_prob") if "norm_topk_prob" in family.defaults else True
    active = raw.get("num_experts_per_tok")
    for key, value in ((family.experts[0], count), ("num_experts_per_tok", active)):
        if value is None:
            raise InputError(f"config.json: {key} is missing")
    return from_data(MoEConfig, {"experts": count, "active": active, "normalize": normalize}, "experts")


def _write(config: TransformerConfig, family: Family) -> dict[str, Any]:
    """config.json as the family would have it, whether or not it says all."""
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for field, key in family.keys.items():
        raw[key] = getattr(config, field)
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    raw[family.keys["activation"]] = activations[config.activation]
    raw |= {**family.fixed, **_write_rope(config.rope)}
    if family.window:
        raw["sliding_window"] = config.sliding_window
    if family.alternating:
        every = config.global_every or 1
        raw |= {
            "sliding_window": config.sliding_window,
            "sliding_window_pattern": every,
            "layer_types": [FULL if config.is_global(layer) else SLIDING for layer in range(config.layers)],
            "rope_local_base_freq": (config.local_rope or config.rope).theta,
            "query_pre_attn_scalar": config.query_scalar or config.head_dim,
        }
    if config.moe is not None and family.experts:
        raw |= {family.experts[0]: config.moe.experts, "num_experts_per_tok": config.moe.active}
        if "norm_topk_prob" in family.defaults:
            raw |= {"norm_topk_prob": config.moe.normalize, "intermediate_size": config.mlp}
    return raw


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    values = dataclasses.asdict(scaling)
    names = {"factor": "factor", **(SCALING_KEYS if scaling.kind == "llama3" else {})}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": {"rope_type": scaling.kind, **{name: values[field] for field, name in names.items()}},
    }
