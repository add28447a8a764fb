"""The settings of a run: dataclasses, how they are read and written, and what is checked.

Imports no jax, so that every `--help` is quick.
"""

from ttt_jax.config.describe import field_names, fields_help, help_text
from ttt_jax.config.fields import (
    REMAT_NAMES,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GuardConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ParamGroup,
    RopeConfig,
    SampleConfig,
    TTTConfig,
)
from ttt_jax.config.loading import (
    dump_yaml,
    from_dict,
    load_config,
    parse_overrides,
    replace,
    to_dict,
)
from ttt_jax.config.presets import preset_names
from ttt_jax.config.validate import validate, validate_context, validate_model

__all__ = [
    "REMAT_NAMES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GuardConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParamGroup",
    "RopeConfig",
    "SampleConfig",
    "TTTConfig",
    "dump_yaml",
    "field_names",
    "fields_help",
    "from_dict",
    "help_text",
    "load_config",
    "parse_overrides",
    "preset_names",
    "replace",
    "to_dict",
    "validate",
    "validate_context",
    "validate_model",
]
