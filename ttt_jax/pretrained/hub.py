"""Models by name: a local folder, or a model of the Hugging Face Hub in its own cache.

The Hub is asked through `huggingface_hub`, whose environment variables count: HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE. What is small comes first, so that a wrong setting is told before the weights are
fetched. Files go to the Hub's cache, and are read like any other foreign folder.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ttt_jax.errors import CheckpointError
from ttt_jax.files.stores import is_url
from ttt_jax.files.text import one_line
from ttt_jax.pretrained.companions import COMPANIONS
from ttt_jax.pretrained.safetensors_io import INDEX_FILE

_SMALL = ("config.json", INDEX_FILE, *COMPANIONS)
_WEIGHTS = ("*.safetensors",)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def is_hub_id(name: str) -> bool:
    """Say whether a name that is no local folder may be a model of the Hub, as in `org/model`."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def model_folder(name: str, field: str, *, weights: bool) -> Path:
    """Find the folder of a model, and fetch what is missing of one of the Hub.

    Args:
      name: a folder, or a model of the Hub when there is no such folder.
      field: what errors name, for instance "config field init_from".
      weights: whether the tensors are wanted; else config, tokenizer and templates only.

    Raises: CheckpointError, one line, when there is no such folder and the Hub cannot help.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if is_url(name):
        raise CheckpointError(
            f"{field} = {name!r}: is a URL; a model is read from a disk: copy it to a folder"
        )
    if folder.exists() or not is_hub_id(name):
        raise CheckpointError(
            f"{field} = {name!r}: no such folder; give a Hugging Face, converted or run folder, or "
            "a model of the Hugging Face Hub (organisation/name)"
        )
    return _from_hub(name, field, (*_SMALL, *_WEIGHTS) if weights else _SMALL)


def _from_hub(name: str, field: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub  # half a second that local folders need not wait for
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    quiet = not set(patterns) & set(_WEIGHTS) or not sys.stderr.isatty()
    if quiet:
        disable_progress_bars()
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), etag_timeout=5)
        )
    except errors.GatedRepoError:
        fix = "accept its terms on huggingface.co, and log in with `hf auth login`"
        reason = "the Hub gives it to those who have accepted its terms only"
    except errors.RepositoryNotFoundError:
        reason, fix = "no such folder, and no such model on the Hub", "check the name"
    except errors.LocalEntryNotFoundError:
        reason = "no such folder; the Hub cannot be reached, and its cache does not have the model"
        fix = "give a local folder, or fetch it with a network (`hf download`)"
    except Exception as error:  # of the network, the disk or the library, in many classes
        reason, fix = one_line(error, 160), "give a local folder"
    finally:
        if quiet:
            enable_progress_bars()
    raise CheckpointError(f"{field} = {name!r}: {reason}; {fix}")
