"""The model card of a bundle: what a person should know before asking the model anything.

The form follows Mitchell et al., Model Cards for Model Reporting, FAT* 2019. Every figure in a card is one of the
bundle's manifest; what the manifest does not say, the card says is not recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hemacrypt import DISCLAIMER
from hemacrypt.model.bundle import Manifest
from hemacrypt.model.preprocess import Preprocessing
from training.errors import RunError

_METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "weighted_f1": "F1, weighed by label",
    "auroc": "AUROC",
    "sensitivity": "leukaemic cells found (sensitivity)",
    "specificity": "normal cells found (specificity)",
    "ece": "calibration error (ECE)",
    "subject_auroc": "AUROC of subjects, by mean logit",
    "subject_accuracy": "subjects called rightly, by mean logit",
}
_COUNTS = {"n": "cells", "n_leukaemic": "of them leukaemic", "n_subjects": "subjects", "n_groups": "groups of subjects"}
_NONE = "Not recorded in this bundle."

_INTENDED = """\
Research on encrypted inference: a hospital has one cell looked at without showing it. The model reads one
segmented, stain-normalised white blood cell on black and gives a logit for each label. It supports the decision of
people who see the whole case.

Not for:

- diagnosis, screening or triage of patients, or any decision without a haematologist;
- cells that are not segmented and stain-normalised as those it was trained on, whole fields, other stains, other
  microscopes, other diseases or other kinds of leukaemia;
- saying anything of a person from a few cells: figures by subject below rest on all cells of each."""

_LICENCE = """\
The images are under Creative Commons Attribution 3.0 Unported (CC BY 3.0), as public listings of the collection
state it; one public copy found no licence stated, so check the collection's page before publishing anything derived
from them. The bundle holds no image."""

_LIMITS = """\
- One data set from one centre, segmented and normalised by its makers. How the model does on another laboratory's
  cells is unknown.
- Few normal donors, and persons with very different numbers of cells: a figure by cell is dominated by a few
  persons, and intervals by group of subjects are wide for a reason.
- Label and donor cannot be told apart fully. Size and colour of a cell alone carry information about both; compare
  the baselines where they are given.
- A split by image lets a person stand on both sides, and flatters every model. Read the protocol beside each
  figure.
- The images were reduced to few pixels and cropped in the centre; large or double cells lose their rim.
- Under encryption logits have an error within the plan's bound (CKKS), or weights are rounded to integers (BFV)."""

_ETHICS = """\
The images come from patients and donors, published without names by the makers of the data set; their subject numbers
are used for honest splits and for nothing else. Age, sex and ancestry are no part of the data, so nobody can say
whether the model serves all alike. A false negative may delay treatment, a false positive frightens: neither label
may stand alone. Encryption keeps pixels and logits from whoever runs the model. It does not keep the model from
whoever may ask it often: answers tell something about weights, and weights something about training data."""


def model_card(manifest: Manifest) -> str:
    """Write the model card of a bundle that reads cells.

    Parameters
    ----------
    manifest:
        Of the bundle, sealed or not; digests are not looked at. ``training``, ``data`` and ``metrics`` are read as
        `docs/bundle-format.md` describes them, and all of them may be empty.

    Returns
    -------
    str
        Markdown.

    Raises
    ------
    RunError
        If the bundle reads something else than cells.
    """
    reads = manifest.preprocessing
    if not isinstance(reads, Preprocessing):
        raise RunError(f"bundle {manifest.name!r} reads arrays, not cells; this card is about blood cells")
    metrics = manifest.metrics
    parts = {name: part for name, part in metrics.items() if _is_figures(part)}
    sections = {
        f"Model card: {manifest.name}": [manifest.description, f"**{DISCLAIMER}**", _network(manifest, reads)],
        "Intended use": [_INTENDED],
        "Data": [*_data(manifest.data), _LICENCE],
        "Figures": [*_figures(parts), *(_siblings(manifest.training) if parts else ())] or [_NONE],
        "By subject": list(_subjects(_mapping(metrics, "subject_scores"))) or [_NONE],
        "Confounders": list(_confounders(_mapping(metrics, "baselines"), _mapping(metrics, "differences"))) or [_NONE],
        "Calibration": list(_calibration(_mapping(metrics, "calibration"))) or [_NONE],
        "Limits": [_LIMITS],
        "Ethics and privacy": [_ETHICS],
        "How to make it again": list(_reproduction(manifest.training)) or [_NONE],
    }
    lines = [
        "\n\n".join([f"{'#' if index == 0 else '##'} {title}", *filter(None, paragraphs)])
        for index, (title, paragraphs) in enumerate(sections.items())
    ]
    return "\n\n".join(lines) + "\n"


def _network(manifest: Manifest, reads: Preprocessing) -> str:
    kinds = ", square, ".join(layer.kind for layer in manifest.layers)
    return (
        f"Labels: {', '.join(manifest.labels)}. Layers: {kinds}. Input: {reads.image_size}x{reads.image_size} pixels, "
        f"of which the central {reads.crop}x{reads.crop} are reduced to {reads.size}x{reads.size}."
    )


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"Source: {data['source']}" if "source" in data else f"Source: {_NONE}"
    if "protocol_in_words" in data:
        yield f"How it was divided: {data['protocol_in_words']}."
    parts = _mapping(data, "parts")
    if parts:
        rows = [
            [name, part.get("images", ""), part.get("leukaemic", ""), len(part.get("groups", ()))]
            for name, part in parts.items()
        ]
        yield _table(["part", "cells", "of them leukaemic", "groups of subjects"], rows)
    if "fingerprint" in data:
        yield f"Fingerprint of the cells trained and validated on: `{data['fingerprint']}`"


def _figures(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if not parts:
        return
    yield "\n".join(f"- {name}: {part['protocol']}" for name, part in parts.items())
    yield "Leukaemic counts as positive. In brackets: 95 % intervals by resampling groups of subjects, where recorded."
    yield _comparison(parts)


def _siblings(training: Mapping[str, Any]) -> Iterator[str]:
    if "study" in training:
        yield (
            "Each column is about networks of the same recipe and seed, trained and tested in that way. The one in "
            f"this bundle is that of `{training['protocol']}`, fold {training['fold']}."
        )


def _subjects(scores: Mapping[str, Any]) -> Iterator[str]:
    for name, part in scores.items():
        yield (
            f"{name}: mean difference of logits over a subject's cells, leukaemic minus normal; above zero the subject "
            "is called leukaemic."
        )
        rows = [
            [
                score["subject"],
                "leukaemic" if score["label"] else "normal",
                score["cells"],
                f"{score['mean_difference']:.2f}",
                f"{score['share_leukaemic']:.1%}",
            ]
            for score in part
        ]
        yield _table(["subject", "label", "cells", "mean difference", "cells called leukaemic"], rows)


def _confounders(baselines: Mapping[str, Any], differences: Mapping[str, Any]) -> Iterator[str]:
    if baselines:
        yield "\n".join(f"- {name} alone: {part['protocol']}" for name, part in baselines.items())
        yield _comparison({f"{name} alone": part for name, part in baselines.items()})
    if differences:
        yield "Differences of two models on the same cells, the first minus the second, with 95 % intervals:"
        yield _comparison({name: part | part["values"] for name, part in differences.items()}, signed=True)


def _calibration(record: Mapping[str, Any]) -> Iterator[str]:
    if record:
        yield (
            f"The last layer was divided by the temperature {record['temperature']:.4g}, fitted on {record['n']} cells "
            f"({record['fitted_on']}). Calibration error there before {record['ece_before']:.3f}, after "
            f"{record['ece_after']:.3f}. The softmax of the logits is the probability as it stands."
        )


def _reproduction(training: Mapping[str, Any]) -> Iterator[str]:
    if training:
        made = "`hemacrypt train`, `hemacrypt export`, `hemacrypt evaluate`"
        if "study" in training:
            made = (
                f"`{training['command']}`, then `hemacrypt study export OUT {training['model']} --protocol "
                f"{training['protocol']} --fold {training['fold']} --seed {training['seed']}`"
            )
        yield (
            f"With the data named above: {made}, and `hemacrypt verify` for the encrypted figures. Settings, seeds "
            "included:"
        )
        yield f"```json\n{json.dumps(dict(training), indent=2, ensure_ascii=False)}\n```"


def _comparison(parts: Mapping[str, Mapping[str, Any]], signed: bool = False) -> str:
    """Return a table with a column for each part, a row for each number that any of them has."""
    rows: list[list[object]] = [
        [words, *(part.get(key, "") for part in parts.values())]
        for key, words in _COUNTS.items()
        if any(key in part for part in parts.values())
    ]
    rows += [
        [words, *(_figure(part, key, signed) for part in parts.values())]
        for key, words in _METRICS.items()
        if any(key in part for part in parts.values())
    ]
    return _table(["", *parts], rows)


def _figure(part: Mapping[str, Any], name: str, signed: bool) -> str:
    if name not in part:
        return ""
    # Bundles from before every metric had an interval keep two of them under names of their own.
    interval = part.get("intervals", {}).get(name) or part.get(f"{name}_interval")
    form = "{:+.3f}" if signed else "{:.3f}"
    told = form.format(part[name])
    return f"{told} ({' to '.join(form.format(end) for end in interval)})" if interval else told


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", r"\|").replace("\n", " ")


def _is_figures(value: object) -> bool:
    return isinstance(value, Mapping) and {"protocol", "n", "auroc"} <= value.keys()


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key, {})
    return found if isinstance(found, Mapping) else {}
