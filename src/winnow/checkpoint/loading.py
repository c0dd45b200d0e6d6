"""Loads models for computation: strictly, and without network access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import winnow.checkpoint.hf  # noqa: F401 - registers the loader of compressed checkpoints and is part of the fingerprint
from winnow.errors import InputError
from winnow.models.classes import empty_model
from winnow.models.experts import unfuse
from winnow.models.files import weight_files

logging.disable_progress_bar()  # progress bars are useless in a log


def load_model(directory: Path | str, dtype: str, device: str) -> PreTrainedModel:
    """The model of a directory, dense or compressed, of the class that its config names, without randomly initialised weights.

    Raises InputError if a tensor is missing or has another shape. (Unexpected tensors are refused at retrieval for dense models,
    and by the checkpoint loader for compressed ones.)
    """
    weight_files(directory)
    loaded: Any = type(empty_model(directory)).from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report[problem]:
            raise InputError(f"{directory}: {problem.replace('_', ' ')}: {sorted(report[problem])[0]}")
    ready: Any = unfuse(model)
    return ready.to(device).eval()
