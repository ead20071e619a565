"""Compare generated pictures with real ones, and write a report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixcell.console import console
from pixcell.errors import EvaluationError, OutputError
from pixcell.evaluation.comparison import NUM_SPLITS, PairFigures, compare_pairs, compare_sets, split_unit
from pixcell.evaluation.features import Extractor, Features, extract, load_extractor
from pixcell.evaluation.metrics import PairSimilarity
from pixcell.evaluation.page import Example, html_page
from pixcell.evaluation.pictures import Picture, PictureSet, check_comparable, pairs_of
from pixcell.evaluation.plots import draw_plot
from pixcell.evaluation.report import Report, SetFacts
from pixcell.files import write_json, write_text, write_whole, writing_to
from pixcell.provenance import environment, now

__all__ = ["evaluate"]

_EXAMPLES = 14
_PAIRS_SHOWN = 8
_OF_ONE_PICTURE = {"index", "like", "like_sha256", "embedding_hash", "embedding_sha256", "synthetic"}
"""Entries of a record that differ from picture to picture and say nothing about the generator."""


def evaluate(
    real: Path,
    synthetic: Path,
    *,
    extractor: str | Extractor = "stain-texture",
    extractor_weights: Path | None = None,
    out: Path = Path("report.json"),
    where: Mapping[str, Sequence[str]] | None = None,
    pairs: bool = True,
    references: Path | None = None,
    field_size: int | None = None,
    max_images: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    seed: int = 0,
    kernel_subset_size: int = 1000,
    kernel_subsets: int = 100,
    download: bool = False,
) -> Report:
    """Measure how far generated pictures are from real ones.

    Writes ``out`` (JSON) and beside it, under the same stem, ``.md``, ``.png`` and ``.html``.

    Args:
        real: Folder of pictures (recursive), or a tile store.
        synthetic: Folder of generated pictures. Contact sheets are left out.
        extractor: ``"inception"``, the name of an encoder, or an object that turns pictures into features.
        extractor_weights: Its weights on disk.
        out: The JSON file; a folder means ``report.json`` in it.
        where: Which tiles of a real store to take, such as ``{"split": ["test"]}``. None: all.
        pairs: Whether to compare pictures with their references.
        references: Folder (or store) of the pictures that were imitated, where they are not among the real.
        field_size: Cut pictures of both sets into squares of this many pixels first. None: whole pictures;
            tiles of a store are cut to the size of the synthetic pictures where they divide evenly.
        max_images: Use at most so many pictures of each set, drawn at random. None: all.
        batch_size: Fields that go through the network at once.
        device: Where it runs: ``auto``, ``cpu``, ``cuda``, ...
        seed: Decides everything drawn at random.
        kernel_subset_size: Pictures in a subset of the kernel distance.
        kernel_subsets: How many subsets.
        download: Whether weights that are not on disk may be downloaded.

    Raises:
        EvaluationError: If the sets cannot be compared; says why and what to do.
        UnreadableSlide: If a picture is damaged; names it.
        MissingWeights: If the extractor's weights are not there.
        OutputError: If the report cannot be written.
    """
    out = _checked_out(out)
    for name, number, least in (
        ("field_size", field_size, 32),
        ("max_images", max_images, 2),
        ("batch_size", batch_size, 1),
        ("kernel_subset_size", kernel_subset_size, 2),
        ("kernel_subsets", kernel_subsets, 1),
        ("seed", seed, 0),
    ):
        if number is not None and number < least:
            raise EvaluationError(f"{name} must be at least {least}, not {number}.")
    all_real, all_synthetic = PictureSet.open(real, where), PictureSet.open(synthetic)
    field_size = field_size or _field_of_store(all_real, all_synthetic)
    warnings = check_comparable(all_real, all_synthetic, field_size)
    real_set, synthetic_set = all_real.chosen(max_images, seed), all_synthetic.chosen(max_images, seed)
    found: Sequence[tuple[Picture, Picture]] = ()
    found_by = None
    all_references = all_real if references is None else PictureSet.open(references)
    if pairs:
        found, found_by, remarks = pairs_of(all_references, synthetic_set)
        warnings += remarks
    paired = list({reference.name: reference for reference, _ in found}.values())
    _check_references(paired, field_size)

    space = (
        load_extractor(extractor, extractor_weights, device=device, download=download)
        if isinstance(extractor, str)
        else extractor
    )
    # References that were not drawn are looked at, too, but only as references.
    drawn = {picture.name for picture in real_set.pictures}
    extra = [each for each in paired if each.name not in drawn] if references is None else []
    looked_at = real_set.with_pictures([*real_set.pictures, *extra])
    real_features = extract(looked_at, space, batch_size=batch_size, field_size=field_size)
    synthetic_features = extract(synthetic_set, space, batch_size=batch_size, field_size=field_size)
    reference_set, reference_features = looked_at, real_features
    if references is not None and paired:
        reference_set = all_references.with_pictures(paired)
        reference_features = extract(reference_set, space, batch_size=batch_size, field_size=field_size)

    counted = real_features.picture_of < len(real_set)
    real_values, synthetic_values = real_features.values[counted], synthetic_features.values
    picture_groups = [picture.group for picture in real_set.pictures]
    unit = split_unit(picture_groups, real_set.kind, is_cut=field_size is not None)
    groups: list[Any] = [
        row if unit == "field" else picture_groups[picture]
        for row, picture in enumerate(real_features.picture_of[counted])
    ]
    with console.status("distances and their floors"):
        measures = compare_sets(
            real_values, synthetic_values, groups, seed, kernel_subset_size, kernel_subsets
        )
    figures, similarity = _pairs(
        found, found_by, reference_set, synthetic_set, reference_features, synthetic_features, asked=pairs
    )
    description = space.describe()
    generator = _generator_of(synthetic_set)
    warnings += _warnings(
        real_set, synthetic_set, real_features, synthetic_features, description, generator,
        min(len(real_values), len(synthetic_values)),
    )  # fmt: skip
    report = Report(
        real=_facts_of(all_real, real_set, real_features, int(counted.sum())),
        synthetic=_facts_of(all_synthetic, synthetic_set, synthetic_features, len(synthetic_values)),
        generator=generator,
        extractor=description,
        measures=measures,
        pairs=figures,
        settings={
            "where": where,
            "field_size": field_size,
            "max_images": max_images,
            "references": None if references is None else str(references),
            "seed": seed,
            "split_unit": unit,
            "num_splits": NUM_SPLITS,
            "kernel_subset_size": kernel_subset_size,
            "kernel_subsets": kernel_subsets,
            "batch_size": batch_size,
            "device": device,
        },
        warnings=warnings,
        environment={**environment(), **_more_versions()},
        created=now(),
        files=[str(out.with_suffix(ending)) for ending in (".json", ".md", ".png", ".html")],
    )
    plot = draw_plot(real_values, synthetic_values, measures, similarity, space.name, seed)
    _write(report, out, plot, real_set, synthetic_set, reference_set, found, seed)
    return report


def _checked_out(out: Path) -> Path:
    """Find out before the work, not after it, that a report cannot be written."""
    if out.is_dir() or not out.suffix:
        out = out / "report.json"
    if out.suffix != ".json":
        raise OutputError(f"a report is a .json file (the others go beside it), not {out.name}.")
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _field_of_store(real: PictureSet, synthetic: PictureSet) -> int | None:
    """Return the side of the synthetic pictures if a store's larger tiles are a whole number of them."""
    sides = {side for picture in synthetic.pictures for side in (picture.height, picture.width)}
    if real.kind != "store" or len(sides) != 1:
        return None
    side, tile_size = sides.pop(), real.pictures[0].width
    return side if side < tile_size and tile_size % side == 0 else None


def _check_references(references: Sequence[Picture], field_size: int | None) -> None:
    small = [each for each in references if field_size and min(each.height, each.width) < field_size]
    if small:
        raise EvaluationError(
            f"the reference {small[0].name} ({small[0].width} x {small[0].height}) is smaller than a field "
            f"of {field_size} px. Choose a smaller field_size, or leave pairs out with --set pairs=false."
        )


def _pairs(
    found: Sequence[tuple[Picture, Picture]],
    found_by: str | None,
    references: PictureSet,
    synthetic: PictureSet,
    reference_features: Features,
    synthetic_features: Features,
    asked: bool,
) -> tuple[PairFigures, PairSimilarity | None]:
    if not asked:
        return PairFigures(0, 0, None, reason="Pairs were not asked for."), None
    if not found or found_by is None:
        reason = (
            "No pairs: no synthetic picture names a reference ('like' in its record) that is among the real "
            "ones, and no file names agree. Say where they are with references."
        )
        return PairFigures(0, 0, None, reason=reason), None
    place_of = {picture.name: place for place, picture in enumerate(references.pictures)}
    own_place_of = {picture.name: place for place, picture in enumerate(synthetic.pictures)}
    names = list(dict.fromkeys(reference.name for reference, _ in found))
    row_of = {name: row for row, name in enumerate(names)}
    reference_of = np.array([row_of[reference.name] for reference, _ in found])
    return compare_pairs(
        _mean_per_picture(synthetic_features, [own_place_of[picture.name] for _, picture in found]),
        _mean_per_picture(reference_features, [place_of[name] for name in names]),
        reference_of,
        found_by,
    )


def _mean_per_picture(features: Features, pictures: Sequence[int]) -> np.ndarray:
    """One vector per picture, also where a picture was cut into several fields."""
    return np.stack([features.values[features.rows_of(picture)].mean(0) for picture in pictures])


def _generator_of(synthetic: PictureSet) -> dict[str, Any]:
    """Sum up what the pictures' records say: one value where they agree, else which values there are."""
    values: dict[str, dict[str, Any]] = {}
    for picture in synthetic.pictures:
        for key, value in (picture.record or {}).items():
            if key not in _OF_ONE_PICTURE:
                values.setdefault(key, {})[json.dumps(value, sort_keys=True)] = value
    return {
        key: next(iter(each.values()))
        if len(each) == 1
        else (list(each.values()) if len(each) <= 5 else f"{len(each)} different values")
        for key, each in sorted(values.items())
    }


def _warnings(
    real: PictureSet,
    synthetic: PictureSet,
    real_features: Features,
    synthetic_features: Features,
    extractor: Mapping[str, Any],
    generator: Mapping[str, Any],
    smaller: int,
) -> list[str]:
    warnings = []
    if real.num_synthetic:
        warnings.append(
            f"{real.num_synthetic} of the real pictures say that they are synthetic: the figures mean "
            "nothing until those are removed."
        )
    if synthetic.num_synthetic < len(synthetic):
        warnings.append(
            f"{len(synthetic) - synthetic.num_synthetic} of {len(synthetic)} synthetic pictures carry no "
            "record of how they were made; nothing can be said about their generator."
        )
    real_hashes = set(real_features.pixel_hashes)
    copies = sum(each in real_hashes for each in synthetic_features.pixel_hashes)
    if copies:
        warnings.append(f"{copies} synthetic pictures are pixel for pixel equal to a real one.")
    for name, features in (("real", real_features), ("synthetic", synthetic_features)):
        if duplicates := _num_duplicates(features):
            warnings.append(
                f"{duplicates} {name} pictures repeat another one pixel for pixel; they count as often "
                "as they are there."
            )
    if extractor.get("is_standard") is False:
        warnings.append(
            "The Inception weights are not the standard file: the figures do not compare with others' ones."
        )
    encoder = generator.get("encoder")
    encoder_name = encoder.get("name") if isinstance(encoder, Mapping) else encoder
    if encoder_name == extractor["name"]:
        warnings.append(
            f"The generator was conditioned on embeddings of {encoder_name}, the space of this report. That "
            "flatters it; evaluate with another extractor, too."
        )
    models = generator.get("model_sha256")
    if isinstance(models, list | str) and not (isinstance(models, str) and "different" not in models):
        warnings.append("The synthetic pictures come from more than one model.")
    if smaller < 10 * extractor["dim"]:
        warnings.append(
            f"Few pictures: {smaller} on the smaller side for {extractor['dim']} features. The Frechet "
            "distance, where given, is biased upwards; read it beside its floor at equal count only."
        )
    return warnings


def _num_duplicates(features: Features) -> int:
    return len(features.pixel_hashes) - len(set(features.pixel_hashes))


def _facts_of(found: PictureSet, used: PictureSet, features: Features, num_fields: int) -> SetFacts:
    hashes = features.pixel_hashes[: len(used)]
    return SetFacts(
        path=str(used.path),
        kind=used.kind,
        num_found=len(found),
        num_pictures=len(used),
        num_fields=num_fields,
        sizes=used.sizes,
        mpp=used.mpp,
        num_marked_synthetic=used.num_synthetic,
        num_duplicates=len(hashes) - len(set(hashes)),
        left_out=used.left_out,
    )


def _more_versions() -> dict[str, str]:
    """Versions that decide pixels and figures and are not among the package's usual ones."""
    import PIL
    import scipy

    return {"pillow": PIL.__version__, "scipy": scipy.__version__}


def _write(
    report: Report,
    out: Path,
    plot: bytes,
    real: PictureSet,
    synthetic: PictureSet,
    references: PictureSet,
    pairs: Sequence[tuple[Picture, Picture]],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)

    def shown(pictures: PictureSet, count: int) -> list[Example]:
        rows = rng.choice(len(pictures), min(count, len(pictures)), replace=False)
        return [_example(pictures, pictures.pictures[row]) for row in sorted(rows)]

    chosen = sorted(rng.choice(len(pairs), min(_PAIRS_SHOWN, len(pairs)), replace=False)) if pairs else []
    pair_examples = [
        (_example(references, pairs[row][0]), _example(synthetic, pairs[row][1])) for row in chosen
    ]
    page = html_page(report, plot, shown(real, _EXAMPLES), shown(synthetic, _EXAMPLES), pair_examples)
    with write_whole(out.with_suffix(".png")) as temporary:
        temporary.write_bytes(plot)
    write_text(out.with_suffix(".md"), report.markdown(out.with_suffix(".png").name))
    write_text(out.with_suffix(".html"), page)
    write_json(out, report.as_json())  # last: where it is, the others are


def _example(pictures: PictureSet, picture: Picture) -> Example:
    return Example(pictures.read(picture), picture.name)
