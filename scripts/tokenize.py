"""Rule `tokenize`: windows of token ids (windows, length) int32, and for an evaluation the first scored token of each."""

from typing import TYPE_CHECKING

import torch

from winnow.data.texts import text_digest
from winnow.data.tokens import (
    PROTOCOLS,
    calibration_windows,
    check_causal,
    check_length,
    encode,
    evaluation_windows,
    load_tokenizer,
)
from winnow.io.artifacts import read_json, read_parquet, write_tensors
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.CalibrationWindows | specs.EvaluationWindows" = job.spec
    model = read_json(snakemake.input.model)
    check_length(spec["length"], model["max_length"])
    tokenizer = load_tokenizer(ModelFiles(snakemake.input.model).verify())
    text = spec["join"].join(read_parquet(snakemake.input.text)["text"])
    if spec["kind"] == "calibrations":
        ids = encode(tokenizer, text, spec["special_tokens"])
        windows = calibration_windows(ids, spec["windows"], spec["length"], spec["seed"])
        tensors = {"ids": torch.from_numpy(windows)}
    else:
        check_causal(model)
        ids = encode(tokenizer, text, PROTOCOLS[spec["protocol"]].special_tokens)
        cut = (spec["protocol"], spec["length"], spec["stride"], spec["windows"])
        windows, first = evaluation_windows(ids, *cut, bos=tokenizer.bos_token_id)
        tensors = {"ids": torch.from_numpy(windows), "first": torch.from_numpy(first)}
    bos = int(tensors["ids"][0, 0]) == tokenizer.bos_token_id
    facts = {"text_digest": text_digest(text), "text_tokens": len(ids), "bos": bos}
    write_tensors(snakemake.output[0], tensors, {**facts, "provenance": job.provenance}, sealed=True)
