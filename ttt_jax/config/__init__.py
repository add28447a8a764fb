"""The settings of a run: dataclasses, how they are read and written, and what is checked.

Imports no jax, so that every `--help` is quick.
"""

from ttt_jax.config.describe import field_names, fields_help, help_text
from ttt_jax.config.fields import (
    OPEN_REMAT,
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
    TargetSource,
    TTTConfig,
)
from ttt_jax.config.loading import (
    dump_yaml,
    from_dict,
    load_config,
    make_config,
    parse_overrides,
    read_written,
    replace,
    to_dict,
)
from ttt_jax.config.presets import preset_names
from ttt_jax.config.validate import validate, validate_context, validate_model
from ttt_jax.config.written import Written

__all__ = [
    "OPEN_REMAT",
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
    "TargetSource",
    "Written",
    "dump_yaml",
    "field_names",
    "fields_help",
    "from_dict",
    "help_text",
    "load_config",
    "make_config",
    "parse_overrides",
    "preset_names",
    "read_written",
    "replace",
    "to_dict",
    "validate",
    "validate_context",
    "validate_model",
]
