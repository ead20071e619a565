"""Every published golden case is here, is listed, and is read by the tests it is listed with."""

import ast
import re
from fnmatch import fnmatch

import pytest

from golden_vectors import FOLDER

TESTS = FOLDER.parent
PUBLISHED = {
    "came_steps",
    "controlnet",
    "controlnet_sampling",
    "convert_original_to_diffusers",
    "diffusers_transformer_16tok",
    "diffusers_transformer_1tok",
    "diffusers_transformer_4tok",
    "dpms_sampling",
    "flow_mlp",
    "hf_pipeline_sampling",
    "iddpm_loss",
    "iddpm_steps",
    "large_image",
    "latent_loading",
    "lora_transformer",
    "lowres_crop",
    "original_transformer_1024like",
    "original_transformer_256like",
    "original_transformer_512like",
    "pathldm-ddim-tiny",
    "pathldm-kl-tiny",
    "pathldm-largeimage-tiny",
    "pathldm-loss-tiny",
    "pathldm-prompts",
    "pathldm-text-tiny",
    "pathldm-unet-tiny",
    "pathldm-vq-tiny",
    "position_tables",
    "timestep_features",
    "uni_preprocess",
    "uni_tiny_vit",
    "vae_tiny",
}
"""The cases that came with the facts about the reference implementations."""


def listed_cases() -> dict[str, list[str]]:
    """The rows of the README: a case and its test files."""
    rows = {}
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and (name := re.fullmatch(r"`([\w*-]+)`", cells[0])):
            assert name[1] not in rows, f"{name[1]} is listed twice"
            rows[name[1]] = re.findall(r"`([\w/]+\.py)`", cells[2])
    return rows


def reads(file: str, case: str) -> bool:
    """Whether a test file names the case, whole or as the beginning of a formatted name."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    beginnings = tuple(text for text in texts if isinstance(text, str) and text.endswith(("_", "-")))
    return bool(texts & {case, f"{case}.json"}) or case.rstrip("*").startswith(beginnings)


def test_no_published_case_is_missing():
    assert set(listed_cases()) >= PUBLISHED
    assert [name for name in listed_cases() if not any(FOLDER.glob(f"{name}.json"))] == []


def test_no_file_is_unlisted():
    names = {file.stem for file in FOLDER.iterdir()} - {"README"}
    assert [name for name in sorted(names) if not any(fnmatch(name, row) for row in listed_cases())] == []


@pytest.mark.parametrize("case", sorted(PUBLISHED | set(listed_cases())))
def test_every_case_is_read_by_a_test(case):
    files = listed_cases().get(case, [])
    assert files, f"tests/golden/README.md names no test for {case}"
    assert [file for file in files if not reads(file, case)] == []


def test_the_page_of_agreement_has_every_published_case():
    page = (TESTS.parent / "docs/models/agreement.md").read_text(encoding="utf-8")
    assert {case for case in PUBLISHED if f"`{case}`" not in page} == set()
